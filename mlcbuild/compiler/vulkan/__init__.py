"""Libraries for Vulkan: SPIR-V from TVM's scheduled kernels, in the form that TVM's Vulkan runtime loads.

The TVM that pip installs has no SPIR-V code generator, so this is one: for the nodes that our kernels are made of.
"""
