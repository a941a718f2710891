"""The kinds of fused operation: shapes, bindings, kernels, and what a target has no kernel for."""
