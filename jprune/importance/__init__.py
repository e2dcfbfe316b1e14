"""Importance criteria: pure functions (graph, params, ...) -> {group id: float32 score per unit}."""

from jprune.importance.batchnorm import batchnorm_scale as batchnorm_scale
from jprune.importance.batchnorm import scale_leaves as scale_leaves
from jprune.importance.chance import random as random
from jprune.importance.geometric import fpgm as fpgm
from jprune.importance.gradient import fisher as fisher
from jprune.importance.gradient import mean_squared_gradients as mean_squared_gradients
from jprune.importance.gradient import taylor as taylor
from jprune.importance.magnitude import first_member as first_member
from jprune.importance.magnitude import lamp as lamp
from jprune.importance.magnitude import magnitude as magnitude
from jprune.importance.reduce import check_scores as check_scores
from jprune.importance.reduce import normalised as normalised
