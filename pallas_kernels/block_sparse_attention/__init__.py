"""Attention over the active blocks of a mask that may differ for every batch element and head, with gradients.

It never chooses the blocks: a mask is data that the caller makes. It knows no model.
"""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.tune import blocks_together, tune
from pallas_kernels.common.attention_arguments import AttentionError
from pallas_kernels.common.attention_problem import KernelConfig
from pallas_kernels.common.backends import BackendError, DerivativeError, MiscompilationError
from pallas_kernels.common.block_mask import BlockMask, BlockMaskError

__all__ = [
    "AttentionError",
    "BackendError",
    "BlockMask",
    "BlockMaskError",
    "DerivativeError",
    "KernelConfig",
    "MiscompilationError",
    "block_sparse_attention",
    "blocks_together",
    "tune",
]
