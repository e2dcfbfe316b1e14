"""How much softmax mass every pair of blocks carries, exactly and without an array of tokens times tokens.

It never says which blocks to keep: that is the caller's decision. A search is dense attention as well, so on TPU and GPU it
stands on the kernels of block_sparse_attention.
"""

from pallas_kernels.block_score.api import block_scores, search_attention

__all__ = ["block_scores", "search_attention"]
