"""BatchNorm scale as importance (network slimming): |gamma|, found by its use, not by its name."""

from __future__ import annotations

from typing import Any

import numpy as np

from jprune.graph import Graph
from jprune.importance.reduce import Scores, group_scores, leaf_values, per_unit


def scale_leaves(graph: Graph) -> dict[str, str]:
    """{path of a 1-D normalisation scale: id of the one group its entries belong to}, one unit an entry."""
    out = {}
    for gid, group in graph.groups.items():
        for m in group.members:
            leaf = graph.leaves[m.path]
            if m.role == "scale" and leaf.is_param and len(leaf.shape) == 1 and m.positions.shape == (leaf.shape[0], 1):
                out[m.path] = gid
    return out


def batchnorm_scale(graph: Graph, params: Any, *, reduce: str = "mean", normalise: str = "none") -> Scores:
    """Mean |gamma| over the scales of each group; groups without a scale get no score."""

    def local(m: Any, w: Any) -> Any:
        return per_unit(m, abs(w.astype(np.float32)))

    return group_scores(graph, leaf_values(params), local, reduce=reduce, normalise=normalise, roles=("scale",))
