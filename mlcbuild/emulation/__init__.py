"""A GPU on the CPU: kernels as the compiler emits them, run thread by thread; races and stray accesses are found."""
