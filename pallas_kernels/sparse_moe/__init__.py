"""Mixtures of many small experts of which every token uses its own few, as ReLU routers choose them: only those are computed.

It never routes: scores and flags of active experts are data that the caller makes. It knows no model.
"""

from pallas_kernels.common.backends import BackendError, DerivativeError
from pallas_kernels.sparse_moe.api import permuted_moe, tile_moe, union_moe
from pallas_kernels.sparse_moe.expert_parallel import expert_parallel_moe
from pallas_kernels.sparse_moe.permuted import Pairs, permute_pairs
from pallas_kernels.sparse_moe.problem import MoEError
from pallas_kernels.sparse_moe.work_lists import WorkList, tile_activity, tile_worklist, union_ids

__all__ = [
    "BackendError",
    "DerivativeError",
    "MoEError",
    "Pairs",
    "WorkList",
    "expert_parallel_moe",
    "permute_pairs",
    "permuted_moe",
    "tile_activity",
    "tile_moe",
    "tile_worklist",
    "union_ids",
    "union_moe",
]
