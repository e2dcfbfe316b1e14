"""All methods that remove channels of a classifier, in the order in which they are listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jprune import importance
from jprune.methods.channels.after_training import fisher, method, taylor
from jprune.methods.channels.lapp.method import METHODS as LAPP
from jprune.methods.channels.masksparsity.method import METHODS as MASKSPARSITY
from jprune.methods.channels.precrop.method import METHODS as PRECROP
from jprune.methods.contract import Method


def of_weights(criterion: Callable[..., Any], *settings: Any) -> Callable[[Any], Any]:
    """The scores of a task's network by its variables alone, in one program."""
    return lambda task: jax.jit(lambda v: criterion(task.graph, v, *settings))(task.variables)


METHODS: tuple[Method, ...] = (
    method("magnitude-l2", "sum of squared weights of the group (DepGraph)",
           of_weights(importance.magnitude, 2)),
    method("magnitude-l1", "sum of absolute weights of the group",
           of_weights(importance.magnitude, 1)),
    method("lamp", "squared weights over the sum of those that are not smaller",
           of_weights(importance.lamp)),
    method("fpgm", "distance to the other units (geometric median)", of_weights(importance.fpgm)),
    method("batchnorm", "BatchNorm scale of a normally trained network",
           of_weights(importance.batchnorm_scale)),
    method("taylor", "|weight x gradient|", taylor),
    method("fisher", "weight^2 x mean squared per-sample gradient (diagonal Fisher)", fisher),
    method("random", "uniform random scores, the baseline to beat",
           lambda t: importance.random(t.graph, jax.random.key(t.seed))),
    method("slimming", "BatchNorm scale after training with a penalty on all scales (network slimming)",
           of_weights(importance.batchnorm_scale), penalty=True),
    *MASKSPARSITY,
    *PRECROP,
    *LAPP,
)  # fmt: skip
