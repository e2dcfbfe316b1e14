"""Compacting trees that travel with the parameters: optimizer moments, running averages, factored statistics."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax

from jprune.surgery.compact import compact_leaf
from jprune.surgery.decision import Decision, touched
from jprune.trace import layout as L
from jprune.trace.errors import KeepError
from jprune.trace.leafpaths import path_str
from jprune.trace.structure import Leaf


def compact_like(decision: Decision, tree: Any, stacked: str = "pad") -> Any:
    """Slice every leaf of `tree` that mirrors a parameter, found by the longest common end of the two paths.

    A mirror has the parameter's shape, or that shape with some axes dropped (factored second moments). Scalars and
    leaves that mirror nothing pass through - unless their path ends like a parameter's and their shape fits none.
    Optimizers that choose what to factor by size (optax's adafactor) may choose otherwise at the smaller sizes: compare
    with the shapes that their own `init` gives the compacted parameters.

    Raises:
      KeepError: a leaf's path points at a pruned parameter but its shape does not fit, or fits in several ways that
        would be sliced differently.
    """
    return jax.tree_util.tree_map_with_path(lambda p, x: _one(decision, path_str(p), x, stacked), tree)


def _one(decision: Decision, path: str, x: Any, stacked: str) -> Any:
    shape: tuple[int, ...] = tuple(getattr(x, "shape", ()))
    if not shape or all(n == 1 for n in shape):
        return x
    leaf = _mirror(decision, path)
    if leaf is None:
        return x
    if not any(touched(lay, decision.keep) for lay in leaf.layouts):
        return x
    if shape == leaf.shape:
        return compact_leaf(decision, leaf, x, stacked)
    kept = {
        axes
        for axes in itertools.combinations(range(len(leaf.shape)), len(shape))
        if tuple(leaf.shape[a] for a in axes) == shape
    }
    ways = {
        tuple(leaf.layouts[a] if touched(leaf.layouts[a], decision.keep) else None for a in axes): axes for axes in kept
    }
    if len(ways) != 1:
        how = "fits it in several ways" if ways else "does not fit it"
        raise KeepError(
            f"leaf {path!r} of shape {shape} mirrors {leaf.path!r} of shape {leaf.shape} but {how}; "
            "slice it by hand or leave it out of the tree"
        )
    axes = next(iter(ways.values()))
    layouts = tuple(leaf.layouts[a] for a in axes)
    layer = axes.index(leaf.layer_axis) if leaf.layer_axis in axes else None
    if layer is None and any(decision.keep[g].ndim > 1 for a in layouts for g in L.groups_in(a) if g in decision.keep):
        raise KeepError(f"leaf {path!r} has no axis for the layers of {leaf.path!r}, which keep different units")
    small = dataclasses.replace(leaf, path=path, shape=shape, layouts=layouts, layer_axis=layer)
    return compact_leaf(decision, small, x, stacked)


def _mirror(decision: Decision, path: str) -> Leaf | None:
    """The parameter whose path shares the longest end with this one; a shared last key alone is not enough
    unless it is the parameter's whole path or nothing else ends so."""
    keys = path.split("/")
    best: list[Leaf] = []
    length = 0
    for leaf in decision.structure.leaves.values():
        own = leaf.path.split("/")
        n = 0
        while n < min(len(own), len(keys)) and own[-1 - n] == keys[-1 - n]:
            n += 1
        if n == 0 or (n < len(own) and n < 2 and len(own) > 2):
            continue
        if n > length:
            best, length = [leaf], n
        elif n == length:
            best.append(leaf)
    if len(best) > 1:
        whole = [b for b in best if len(b.path.split("/")) == length]
        if len(whole) != 1:
            raise KeepError(
                f"leaf {path!r} could mirror {best[0].path!r} or {best[1].path!r}; rename it or slice it by hand"
            )
        best = whole
    return best[0] if best else None
