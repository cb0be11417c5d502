"""Hand-written Triton kernels: one source for cuda, gcu300 and gcu400. See README.md."""
