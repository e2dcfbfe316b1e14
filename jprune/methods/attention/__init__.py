"""Attention that skips work: which blocks of keys matter, found while a model runs; the kernels lie elsewhere."""
