"""First- and second-order importance: Taylor (weight x gradient) and the diagonal Fisher / Hessian estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.graph import Graph
from jprune.importance.reduce import WEIGHTS, Scores, group_scores, leaf_values, per_unit, traced_leaf


def taylor(
    graph: Graph,
    params: Any,
    grads: Any,
    *,
    signed_sum: bool = False,
    reduce: str = "mean",
    normalise: str = "mean",
    roles: Sequence[str] = WEIGHTS,
    groups: Sequence[str] | None = None,
) -> Scores:
    """|w g| summed over each unit, or |sum of w g| with `signed_sum` (Molchanov et al. 2019, eq. 8).

    Args:
      grads: gradient of the loss, a tree like `params` (or its "params" collection inside the same nesting), or {leaf path:
        gradient} of the leaves that the scored groups are in.
      groups: which groups to score; None: all.
    """
    g = leaf_values(grads)

    def local(m: Any, w: Any) -> Any:
        product = w.astype(np.float32) * traced_leaf(graph, g, m.path, "gradients").astype(np.float32)
        return abs(per_unit(m, product)) if signed_sum else per_unit(m, abs(product))

    return group_scores(
        graph, leaf_values(params), local, reduce=reduce, normalise=normalise, roles=roles, groups=groups
    )


def fisher(
    graph: Graph,
    params: Any,
    squared_grads: Any,
    *,
    reduce: str = "mean",
    normalise: str = "mean",
    roles: Sequence[str] = WEIGHTS,
) -> Scores:
    """w^2 times the mean squared per-sample gradient, summed over each unit: OBD with the empirical Fisher diagonal.

    Args:
      squared_grads: from `mean_squared_gradients`.
    """
    g = leaf_values(squared_grads)

    def local(m: Any, w: Any) -> Any:
        return per_unit(m, w.astype(np.float32) ** 2 * traced_leaf(graph, g, m.path, "gradients").astype(np.float32))

    return group_scores(graph, leaf_values(params), local, reduce=reduce, normalise=normalise, roles=roles)


def mean_squared_gradients(loss: Callable[..., Any], params: Any, batch: Any) -> Any:
    """Mean over samples of the squared gradient of `loss(params, sample)`, a tree like `params`.

    Args:
      loss: scalar loss of one sample; batch leaves have the samples on axis 0.
    """
    per_sample = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)
    return jax.tree.map(lambda g: jnp.mean(g.astype(jnp.float32) ** 2, axis=0), per_sample)
