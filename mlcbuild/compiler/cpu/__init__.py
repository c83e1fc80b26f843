"""The CPU's operations: C kernels (kernels/*.c) and the TIR functions that run them on all threads."""
