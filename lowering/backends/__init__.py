"""Make machine code of kernels, and tell IREE of it."""
