"""Leaves as one row of weights, and back: what all second-order methods begin and end with.

A leaf is laid out as its matrix (outputs, inputs), row after row, so that neighbours feed the same output. Fisher
matrices are block-diagonal: blocks of neighbours inside each leaf, or one block of all leaves.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Shaped

from jprune.budget.weights import choose
from jprune.surgery.patterns import View, view_of
from jprune.tracing.errors import suggest

Keep: TypeAlias = int | Mapping[str, int]
Views: TypeAlias = Mapping[str, View]


class Pruned(NamedTuple):
    """What a method makes of the weights.

    Attributes:
      weights: {path: array of the leaf's dtype}, zero where removed.
      masks: {path: bool array}, True where the weight stays.
      damp: {path: the largest damping that a block of the leaf was inverted with}; above the configured one where that
        did not make the matrix positive definite.
    """

    weights: dict[str, Any]
    masks: dict[str, Any]
    damp: dict[str, Any]


class Leaf(NamedTuple):
    """A leaf of the row: its path, shape and dtype, and how it is a matrix (None: it is none)."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    view: View | None

    def row(self, x: Any) -> Any:
        """An array of the leaf's shape as one row, output after output."""
        return (x if self.view is None else self.view.matrix(x)).reshape(-1)

    def leaf(self, row: Any) -> Any:
        """The array of the leaf's shape."""
        if self.view is None:
            return row.reshape(self.shape)
        matrix = row.reshape(*self.view.lead, math.prod(self.view.outputs), -1)
        return self.view.leaf_like(matrix, self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """All weights in one row.

    Attributes:
      w: weights, at least float32. g: gradients of the samples. alive: False for weights that are already gone.
      layout: the leaves, in the order of the row.
      keep: weights that stay, of all leaves together or of each; None: a pattern says it.
    """

    w: Float[Array, " p"]
    g: Float[Array, "samples p"]
    alive: Bool[Array, " p"]
    layout: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})
    keep: int | tuple[int, ...] | None = dataclasses.field(metadata={"static": True})

    def spans(self) -> list[slice]:
        """Where every leaf stands in the row."""
        ends = itertools.accumulate((math.prod(x.shape) for x in self.layout), initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def leaves(self, row: Any) -> dict[str, Any]:
        """{path: array of the leaf's shape} of a row."""
        return {x.path: x.leaf(row[s]) for x, s in zip(self.layout, self.spans(), strict=True)}

    def segments(self, block: int | None) -> list[tuple[slice, int]]:
        """(span, size of its blocks): every leaf by itself, or all leaves as one block."""
        if block is None:
            return [(slice(0, self.w.size), self.w.size)]
        return [(s, min(block, s.stop - s.start)) for s in self.spans()]

    def stays(self, scores: Any) -> Any:
        """Which weights stay: the largest scores of all, or of each leaf; ties to the first of the row."""
        scores = jnp.where(self.alive, scores, -jnp.inf)
        if isinstance(self.keep, tuple):
            return jnp.concatenate([largest(scores[s], k) for s, k in zip(self.spans(), self.keep, strict=True)])
        return largest(scores, self.keep)

    def pruned(self, row: Any, stays: Any, damp: Any) -> Pruned:
        """The result: leaves of their own dtype, zero where nothing stays.

        Args:
          damp: one number for all leaves, or one for each.
        """
        damps = {x.path: damp if jnp.ndim(damp) == 0 else damp[i] for i, x in enumerate(self.layout)}
        if not isinstance(row, Tracer) and not bool(jnp.isfinite(row).all()):
            raise ValueError(
                f"the pruned weights are not finite with dampings up to {max(map(float, damps.values()))}: "
                "look for very large gradients, or raise the damping"
            )
        weights, masks = _as_leaves(self, row, stays)
        return Pruned(weights, masks, damps)

    def alone(self) -> list[Flat]:
        """Every leaf by itself, with the weights of it that stay."""
        assert isinstance(self.keep, tuple)
        each = zip(self.layout, self.spans(), self.keep, strict=True)
        return [Flat(self.w[s], self.g[:, s], self.alive[s], (x,), k) for x, s, k in each]


@jax.jit
def _as_leaves(all_: Flat, row: Any, stays: Any) -> Any:
    weights = all_.leaves(jnp.where(stays, row, 0))
    masks = {p: m != 0 for p, m in all_.leaves(stays.astype(jnp.float32)).items()}
    return {x.path: weights[x.path].astype(x.dtype) for x in all_.layout}, masks


def together(parts: list[Pruned]) -> Pruned:
    """Results of single leaves as one."""
    weights, masks, damps = ({k: v for found in field for k, v in found.items()} for field in zip(*parts, strict=True))
    return Pruned(weights, masks, damps)


def flat(
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    keep: Keep | None,
    *,
    masks: Mapping[str, Any] | None = None,
    views: Views | None = None,
    average: int = 1,
    multiple: int = 1,
) -> Flat:
    """All weights in one row, checked.

    Args:
      weights: {path: floating-point leaf}.
      gradients: {path: (samples, *leaf shape)}, of the same leaves.
      keep: weights that stay, of all leaves together or {path: of the leaf}.
      masks: {path: bool}: weights that are already gone count as zero, with no gradient, and stay gone.
      views: leaves as matrices where convention (outputs last, inputs before them) does not hold.
      average: successive samples whose mean is one gradient of the Fisher matrix.
      multiple: what all sizes and counts are multiples of.

    Raises:
      ValueError: other leaves in gradients, masks or counts; shapes that do not fit; values that are not finite; counts
        outside 1..weights that are left, or no multiples.
    """
    if not weights:
        raise ValueError("there are no weights to prune: name at least one leaf")
    _same(weights, gradients, "gradients")
    _same(weights, masks or {}, "masks", all_of=False)
    for p, w in weights.items():
        _check_leaf(p, w, gradients[p], None if masks is None else masks.get(p))
    lengths = {p: len(gradients[p]) for p in weights}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the leaves have gradients of different numbers of samples: {lengths}")
    samples = next(iter(lengths.values()))
    if average < 1 or samples % average:
        raise ValueError(f"{samples} samples are not whole groups of {average}: averages need groups of equal size")
    layout = tuple(
        Leaf(p, np.shape(w), w.dtype, view_of(p, np.shape(w), views) if np.ndim(w) >= 2 else None)
        for p, w in weights.items()
    )
    order = tuple(weights)
    w, g, alive = _in_a_row(layout, average, dict(weights), {p: gradients[p] for p in order}, dict(masks or {}))
    return Flat(w, g, alive, layout, _checked_keep(layout, alive, keep, multiple))


@partial(jax.jit, static_argnums=(0, 1))
def _in_a_row(layout: tuple[Leaf, ...], average: int, weights: Any, gradients: Any, masks: Any) -> Any:
    rows, samples, alive = [], [], []
    for x in layout:
        w, g = weights[x.path], gradients[x.path]
        rows.append(x.row(w.astype(jnp.promote_types(w.dtype, jnp.float32))))
        samples.append(jax.vmap(x.row)(g.astype(jnp.promote_types(g.dtype, jnp.float32))))
        mask = masks.get(x.path, jnp.ones(x.shape, bool))
        alive.append(x.row(mask.astype(jnp.float32)) != 0)
    w, g, left = jnp.concatenate(rows), jnp.concatenate(samples, axis=1), jnp.concatenate(alive)
    g = g.reshape(-1, average, w.size).mean(1) if average > 1 else g
    return jnp.where(left, w, 0), jnp.where(left, g, 0), left


def largest(scores: Float[Array, " n"], keep: Any) -> Bool[Array, " n"]:
    """True for the `keep` largest, exactly; ties to the first."""
    return choose({"scores": scores}, "unstructured", {"scores": keep})["scores"]


def blocks(x: Shaped[Array, "*lead n"], size: int) -> Shaped[Array, "*lead blocks size"]:
    """The last axis in blocks; zeros (False) fill the last one up."""
    missing = -x.shape[-1] % size
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, size)


def row(x: Shaped[Array, "blocks size"], span: slice) -> Shaped[Array, " n"]:
    """Blocks one after the other, without what filled the last one up."""
    return x.reshape(-1)[: span.stop - span.start]


def most(damps: list[Any]) -> Any:
    """The largest damping of every segment's blocks; one number where there is one segment."""
    largest = jnp.stack([jnp.max(d) for d in damps])
    return largest if len(damps) > 1 else largest[0]


def _same(weights: Mapping[str, Any], other: Mapping[str, Any], what: str, all_of: bool = True) -> None:
    for p in other:
        if p not in weights:
            raise ValueError(f"there are {what} for {p!r}, which is no leaf to prune{suggest(p, weights)}")
    for p in weights if all_of else ():
        if p not in other:
            raise ValueError(f"{p!r} has no {what}: every leaf to prune needs them")


def _check_leaf(path: str, w: Any, g: Any, mask: Any) -> None:
    shape = np.shape(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{path!r} holds {w.dtype}: only floating-point weights are pruned")
    if np.ndim(g) != len(shape) + 1 or np.shape(g)[1:] != shape or len(g) < 1:
        raise ValueError(f"the gradients of {path!r} have shape {np.shape(g)}: the samples come first, then {shape}")
    if mask is not None and (np.shape(mask) != shape or mask.dtype != np.bool_):
        raise ValueError(f"the mask of {path!r} is {mask.dtype}{list(np.shape(mask))}; a mask is bool{list(shape)}")
    for what, x in (("weights", w), ("gradients", g)):
        if not isinstance(x, Tracer) and not bool(_finite(x)):
            raise ValueError(f"the {what} of {path!r} are not finite: look for NaN or infinity in the model's loss")


@jax.jit
def _finite(x: Any) -> Any:
    return jnp.isfinite(x).all()


def _checked_keep(
    layout: tuple[Leaf, ...], alive: Any, keep: Keep | None, multiple: int
) -> int | tuple[int, ...] | None:
    if keep is None:
        return None
    sizes = {x.path: math.prod(x.shape) for x in layout}
    for p, size in sizes.items():
        if size % multiple:
            raise ValueError(f"{p!r} has {size} weights, which are not whole groups of {multiple}: leave the leaf out")
    left = sizes
    if not isinstance(alive, Tracer):
        parts = np.split(np.asarray(alive), np.cumsum(list(sizes.values()))[:-1])
        left = {p: int(x.sum()) for p, x in zip(sizes, parts, strict=True)}
        groups = np.asarray(alive).reshape(-1, multiple)
        if (groups.any(1) != groups.all(1)).any():
            raise ValueError(f"the masks cut through groups of {multiple} weights, which stay or go together")
    if isinstance(keep, Mapping):
        _same(sizes, keep, "counts")
        asked = [(p, keep[p], left[p]) for p in sizes]
    else:
        asked = [("all leaves", keep, sum(left.values()))]
    for name, count, most in asked:
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= most:
            raise ValueError(
                f"the count for {name!r} is {count}: it is a whole number of weights that stay, 1 to {most}"
            )
        if count % multiple:
            raise ValueError(f"the count for {name!r} is {count}: groups of {multiple} weights stay or go together")
    counts = tuple(int(n) for _, n, _ in asked)
    return counts if isinstance(keep, Mapping) else counts[0]
