"""Weight magnitude over groups: L1, L2 (DepGraph's group norm) and LAMP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jprune.graph import Graph
from jprune.importance.reduce import WEIGHTS, Scores, group_scores, leaf_values, per_unit


def magnitude(
    graph: Graph,
    params: Any,
    p: int = 2,
    *,
    reduce: str = "mean",
    normalise: str = "mean",
    roles: Sequence[str] = WEIGHTS,
) -> Scores:
    """Sum of |w|^p over each unit of each member (no root), reduced over members (DepGraph, section 3.3)."""

    def local(m: Any, w: Any) -> Any:
        v = abs(w.astype(np.float32, copy=False))
        v **= p  # a numpy array in its own memory, anything else as a new array
        return per_unit(m, v)

    return group_scores(graph, leaf_values(params), local, reduce=reduce, normalise=normalise, roles=roles)


def first_member(graph: Graph, params: Any, p: int = 1, *, normalise: str = "none") -> Scores:
    """Magnitude of the producing weight alone, the way pruning is done without dependency groups (a baseline)."""
    return magnitude(graph, params, p, reduce="first", normalise=normalise, roles=("out",))


def lamp(graph: Graph, params: Any, *, reduce: str = "mean") -> Scores:
    """Squared magnitude divided by the sum of the squared magnitudes that are not smaller (LAMP, eq. 3)."""
    return magnitude(graph, params, 2, reduce=reduce, normalise="lamp")
