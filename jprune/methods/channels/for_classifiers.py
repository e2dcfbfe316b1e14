"""All methods that remove channels of a classifier, in the order in which they are listed."""

from __future__ import annotations

import jax

from jprune import importance
from jprune.methods.channels.after_training import fisher, method, taylor
from jprune.methods.channels.lapp.method import METHODS as LAPP
from jprune.methods.channels.masksparsity.method import METHODS as MASKSPARSITY
from jprune.methods.channels.precrop.method import METHODS as PRECROP
from jprune.methods.contract import Method

METHODS: tuple[Method, ...] = (
    method("magnitude-l2", "sum of squared weights of the group (DepGraph)",
           lambda t: importance.magnitude(t.graph, t.variables, 2)),
    method("magnitude-l1", "sum of absolute weights of the group",
           lambda t: importance.magnitude(t.graph, t.variables, 1)),
    method("lamp", "squared weights over the sum of those that are not smaller",
           lambda t: importance.lamp(t.graph, t.variables)),
    method("fpgm", "distance to the other units (geometric median)", lambda t: importance.fpgm(t.graph, t.variables)),
    method("batchnorm", "BatchNorm scale of a normally trained network",
           lambda t: importance.batchnorm_scale(t.graph, t.variables)),
    method("taylor", "|weight x gradient|", taylor),
    method("fisher", "weight^2 x mean squared per-sample gradient (diagonal Fisher)", fisher),
    method("random", "uniform random scores, the baseline to beat",
           lambda t: importance.random(t.graph, jax.random.key(t.seed))),
    method("slimming", "BatchNorm scale after training with a penalty on all scales (network slimming)",
           lambda t: importance.batchnorm_scale(t.graph, t.variables), penalty=True),
    *MASKSPARSITY,
    *PRECROP,
    *LAPP,
)  # fmt: skip
