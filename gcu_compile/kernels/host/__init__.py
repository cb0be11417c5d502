"""C++ kernels of the CPU target: built at first use, called through a plain C interface."""
