"""Pallas kernels for sparse attention, sparse experts and grouped products, one folder an operation, and what they share.

Every operation has the same files: `api` (what users call), `reference` (dense, differentiable, for checks), `xla` (any
device), `tpu` and `mosaic_gpu` (Hopper) and `arg_specs` (real-world shapes, for tests, compile checks and benchmarks).
Nothing here imports jprune, and `common` imports no operation.
"""
