"""Importance criteria: pure functions (graph, params, ...) -> {group id: float32 score per unit}.

They decide on nothing: what goes is the budget's matter. The scores of single weights before training (SNIP, GraSP,
SynFlow, ...) are {leaf path: score per entry}.
"""

from jprune.importance.at_init import class_balanced_batches as class_balanced_batches
from jprune.importance.at_init import grasp as grasp
from jprune.importance.at_init import shuffled_masks as shuffled_masks
from jprune.importance.at_init import snip as snip
from jprune.importance.at_init import synflow as synflow
from jprune.importance.at_init import weight_chance as weight_chance
from jprune.importance.at_init import weight_leaves as weight_leaves
from jprune.importance.at_init import weight_magnitude as weight_magnitude
from jprune.importance.at_init import weight_masks as weight_masks
from jprune.importance.batchnorm import batchnorm_scale as batchnorm_scale
from jprune.importance.batchnorm import scale_leaves as scale_leaves
from jprune.importance.chance import random as random
from jprune.importance.density import densities as densities
from jprune.importance.density import erk as erk
from jprune.importance.density import synexp as synexp
from jprune.importance.expected_flow import synexp_of_paths as synexp_of_paths
from jprune.importance.geometric import fpgm as fpgm
from jprune.importance.gradient import fisher as fisher
from jprune.importance.gradient import mean_squared_gradients as mean_squared_gradients
from jprune.importance.gradient import taylor as taylor
from jprune.importance.magnitude import first_member as first_member
from jprune.importance.magnitude import lamp as lamp
from jprune.importance.magnitude import magnitude as magnitude
from jprune.importance.reduce import check_scores as check_scores
from jprune.importance.reduce import normalised as normalised
from jprune.importance.sample_gradients import block_gradients as block_gradients
from jprune.importance.sample_gradients import entry_gradients as entry_gradients
from jprune.importance.sample_gradients import sample_gradients as sample_gradients
