"""A GPU on the CPU: kernels as the compiler emits them, run thread by thread, with every race and stray access found."""
