"""Random scores: the baseline every criterion has to beat."""

from __future__ import annotations

import jax

from jprune.graph import Graph
from jprune.importance.reduce import Scores


def random(graph: Graph, key: jax.Array) -> Scores:
    """Uniform scores in [0, 1), one stream per group."""
    keys = jax.random.split(key, max(len(graph.groups), 1))
    return {g: jax.random.uniform(k, info.shape) for (g, info), k in zip(graph.groups.items(), keys, strict=False)}
