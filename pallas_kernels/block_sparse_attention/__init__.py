"""Attention over the active blocks of a mask that may differ for every batch element and head, with gradients."""

from pallas_kernels.block_sparse_attention.api import (
    AttentionError,
    DerivativeError,
    MiscompilationError,
    block_sparse_attention,
)
from pallas_kernels.block_sparse_attention.block_mask import BlockMask, BlockMaskError
from pallas_kernels.block_sparse_attention.problem import KernelConfig
from pallas_kernels.block_sparse_attention.tune import blocks_together, tune

__all__ = [
    "AttentionError",
    "BlockMask",
    "BlockMaskError",
    "DerivativeError",
    "KernelConfig",
    "MiscompilationError",
    "block_sparse_attention",
    "blocks_together",
    "tune",
]
