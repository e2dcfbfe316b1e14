"""Filter pruning via geometric median: a unit close to all others is replaceable (FPGM, He et al. 2019, eq. 4)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jprune.graph import Graph
from jprune.importance.reduce import WEIGHTS, Scores, group_scores, leaf_values


def fpgm(graph: Graph, params: Any, *, reduce: str = "mean", normalise: str = "mean") -> Scores:
    """Sum of Euclidean distances from each unit's weights to those of all other units."""

    def one_layer(w: Any, axis: int, positions: Any) -> Any:
        rows = jnp.moveaxis(w, axis, 0)[positions].reshape(positions.shape[0], -1)
        square = jnp.sum(rows * rows, axis=1)
        product = jnp.matmul(rows, rows.T, precision="highest")
        distance = jnp.sqrt(jnp.maximum(square[:, None] + square[None, :] - 2 * product, 0.0))
        return jnp.sum(distance * (1 - jnp.eye(rows.shape[0])), axis=1)

    def local(m: Any, w: Any) -> Any:
        w = w.astype(jnp.float32)
        if m.layer_axis is None:
            return one_layer(w, m.axis, m.positions)
        axis = m.axis - (m.layer_axis < m.axis)
        return jax.vmap(lambda layer: one_layer(layer, axis, m.positions))(jnp.moveaxis(w, m.layer_axis, 0))

    return group_scores(graph, leaf_values(params), local, reduce=reduce, normalise=normalise, roles=WEIGHTS)
