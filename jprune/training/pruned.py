"""The pruned model of any user's code, ready to be trained: its training and evaluation functions, both replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jprune.graph import Graph, trace
from jprune.training.forward import Forward, as_forward


def pruned_forward(
    model: Any, variables: Any, x: Any, keep: Mapping[str, Any], *, allow_empty: bool = False
) -> Forward:
    """A `Forward` whose variables are `graph.compact(variables, keep)`, without an edit to the model's code.

    Both modes are traced, so BatchNorm goes on using and updating batch statistics in training.

    Args:
      model: whatever `as_forward` takes.
      variables: the dense variables (arrays or `ShapeDtypeStruct`s).
      x: an example batch of the size used in training: BatchNorm divides by it, so a replay is for that size only.
      keep: {group id: bool (size,)} of the evaluation function's graph.
      allow_empty: allow a group to lose all its units.

    Raises:
      ValueError: the training function ties the channels differently than the evaluation function.
    """
    forward = as_forward(model)
    evaluate = trace(forward.evaluate, variables, x)
    key = jax.eval_shape(lambda: jax.random.key(0))
    train = trace(forward.train, variables, x, key)
    _check_same_groups(evaluate, train, keep)
    modes = [
        graph.replay(graph.decide(keep, allow_inexact=True, allow_empty=allow_empty)) for graph in (train, evaluate)
    ]
    return Forward(modes[0], modes[1], casts=False)


def _check_same_groups(evaluate: Graph, train: Graph, keep: Mapping[str, Any]) -> None:
    def members(graph: Graph, g: str) -> set[tuple[str, int]]:
        return {(m.path, m.axis) for m in graph.groups[g].members if graph.leaves[m.path].is_param}

    for g in keep:
        if g not in train.groups or members(train, g) != members(evaluate, g):
            raise ValueError(
                f"group {g!r} is tied differently in training than in evaluation mode: "
                "give the pruned module itself (for the zoo: jprune.models.rebuild)"
            )
