"""How much softmax mass every pair of blocks carries, exactly and without an array of tokens times tokens."""

from pallas_kernels.block_score.api import block_scores, search_attention

__all__ = ["block_scores", "search_attention"]
