"""What PreCropping claims, made testable: masks trained as masks, shuffled, cropped or fresh weights at given widths.

The claim is that only the number of weights per layer matters. So next to the cropped network stand: the unstructured
mask itself, trained (`masked`); the same densities at random positions (`jprune.importance.shuffled_masks`); the same
mask with other weights (initialise again, keep the masks); the original initialisation cut to the first channels
(`first_channels`); and, through `precrop(method=...)`, one ratio for all widths, random ones, reversed densities.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jprune.graph import Graph
from jprune.importance.at_init import weight_leaves, weights_of, with_weights
from jprune.tracing.paths import flatten, path_str
from jprune.training.forward import Forward, as_forward

MASKS = "masks"  # the collection they travel in: data, so other masks of the same network compile nothing


def with_masks(variables: Mapping[str, Any], masks: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a `masked` model: its own plus a collection of masks {leaf path: bool}.

    Raises:
      ValueError: bare parameters in place of collections, or a mask of a leaf that is not there or of another shape.
    """
    if "params" not in variables:
        raise ValueError("masks travel beside the parameters: give {'params': ..., other collections}")
    for p, w in weights_of(variables, tuple(masks)).items():
        if np.shape(masks[p]) != np.shape(w):
            raise ValueError(f"the mask of {p!r} has shape {np.shape(masks[p])}, the leaf {np.shape(w)}")
    return {**variables, MASKS: {p: jnp.asarray(m, jnp.bool_) for p, m in masks.items()}}


@functools.lru_cache(maxsize=64)
def masked(model: Any) -> Forward:
    """The model with its weights multiplied by their masks, in training and evaluation: unstructured sparsity.

    Masked weights get no gradient and stay zero in the function; the arrays keep their sizes.
    """
    forward = as_forward(model)

    def apply(variables: Any) -> Any:
        own = {k: v for k, v in variables.items() if k != MASKS}
        w = weights_of(own, tuple(variables[MASKS]))
        return with_weights(own, {p: x * variables[MASKS][p].astype(x.dtype) for p, x in w.items()})

    return Forward(
        lambda variables, x, key: forward.train(apply(variables), x, key),
        lambda variables, x: forward.evaluate(apply(variables), x),
        forward.casts,
    )


def first_channels(graph: Graph, variables: Any, widths: Mapping[str, int]) -> Any:
    """The original initialisation cut to the first channels of every group (in place of a fresh one).

    Raises:
      ValueError: a width above the original: there is nothing to cut it from.
    """
    for g, w in widths.items():
        if g in graph.groups and w > graph.groups[g].size:
            raise ValueError(f"group {g!r} is to have {w} units but had {graph.groups[g].size}: initialise afresh")
    graph.resize(variables, widths)  # refuses what is no width
    keep = {g: np.broadcast_to(np.arange(graph.groups[g].size) < w, graph.groups[g].shape) for g, w in widths.items()}
    return graph.compact(variables, graph.decide(keep, allow_inexact=True))


def initialise(
    graph: Graph, variables: Any, widths: Mapping[str, int], key: jax.Array, fan: Literal["in", "out"] = "in"
) -> Any:
    """A fresh initialisation at new widths for a function whose own initialiser is not at hand (host-side).

    Kernels and matrices are drawn normal, with the standard deviation of the given ones times sqrt(old fan / new fan);
    leaves of one value keep it; all others are drawn from the given entries, with replacement.

    Args:
      graph: of the function. variables: an initialisation at the traced widths. widths: {group: units}.
      fan: which number of units the initialiser divides by.

    Raises:
      KeepError: as `graph.resize`.
    """
    shapes = dict(flatten(graph.resize(variables, widths)))
    kernels = weight_leaves(graph)
    axes = {p: {m.axis for g in graph.groups.values() for m in g.members if m.path == p and m.role == fan}
            for p in kernels}  # the others do not change or are not divided by  # fmt: skip

    def one(path: Any, x: Any) -> Any:
        p = path_str(path)
        shape, k = shapes[p].shape, jax.random.fold_in(key, list(shapes).index(p))
        if p in axes:
            old, new = (np.prod([s[a] for a in axes[p]]) for s in (np.shape(x), shape))
            return (jax.random.normal(k, shape) * (np.std(np.asarray(x)) * np.sqrt(old / new))).astype(x.dtype)
        values = np.asarray(x).ravel()
        if values.size == 0 or (values == values[0]).all():
            return jnp.full(shape, values[0] if values.size else 0, x.dtype)
        return jax.random.choice(k, jnp.asarray(values), shape)

    return jax.tree_util.tree_map_with_path(one, variables)
