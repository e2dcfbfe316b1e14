"""Pallas kernels for sparse attention and sparse experts; imports nothing of jprune."""
