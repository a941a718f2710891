"""Programs and kernels on a GPU machine."""
