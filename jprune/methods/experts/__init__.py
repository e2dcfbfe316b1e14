"""Experts: losses and measures of their sparsity, and fewer of them; kernels and models live elsewhere."""
