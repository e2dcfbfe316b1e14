"""Feed-forward layers made of experts: the routers that choose them, and the layers; knows no method."""

from jprune.models.moe.blockffn import BlockFFN as BlockFFN
from jprune.models.moe.blockffn import all_experts as all_experts
from jprune.models.moe.blockffn import blockffn as blockffn
from jprune.models.moe.blockffn import sorted_experts as sorted_experts
from jprune.models.moe.blockffn import tile_experts as tile_experts
from jprune.models.moe.blockffn import union_experts as union_experts
from jprune.models.moe.routers import DSMoE as DSMoE
from jprune.models.moe.routers import Experts as Experts
from jprune.models.moe.routers import Grin as Grin
from jprune.models.moe.routers import ReluNorm as ReluNorm
from jprune.models.moe.routers import ReMoE as ReMoE
from jprune.models.moe.routers import Routed as Routed
from jprune.models.moe.routers import TopK as TopK
