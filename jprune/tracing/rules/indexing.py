"""Gather, scatter and dynamic slices: axes taken whole are carried, axes that data indexes are frozen.

A sum does not ask in which order, or how many, terms are added: the rows that scatter-add adds are one axis with the
entries of the index that says where, and may be removed together if what they add is zero.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.tracing import refine
from jprune.tracing import tags as T
from jprune.tracing.rules.shaping import taken
from jprune.tracing.tags import Misaligned, Tag
from jprune.tracing.walk import Analysis, Eqn, Rule, Val


def _gather(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    operand, indices = vals
    known = _constant_positions(eqn, operand, indices)
    if known is not None:
        return _take(a, eqn, operand, *known)
    p, aval = eqn.params, eqn.outvars[0].aval
    dn, sizes = p["dimension_numbers"], p["slice_sizes"]
    gone = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
    offset_of = dict(zip([i for i in range(len(operand.shape)) if i not in gone], dn.offset_dims, strict=True))
    tags: list[Tag] = [()] * len(aval.shape)
    zero = [False] * len(aval.shape)
    whole = []
    filled = _fills(p, aval.dtype)
    for i, n in enumerate(operand.shape):
        if i in offset_of and sizes[i] == n:  # taken whole: a start index can only be clamped to 0, or miss all of it
            tags[offset_of[i]], zero[offset_of[i]] = operand.tags[i], operand.zero[i] and not filled
            whole.append(offset_of[i])
        elif i not in dn.operand_batching_dims:
            a.freeze(operand.tags[i], "DATA_INDEXED", "gather")
            if i in offset_of:
                tags[offset_of[i]] = a.fixed(sizes[i], "DATA_INDEXED", "gather")
    batch_axes = [i for i in range(len(aval.shape)) if i not in dn.offset_dims]
    for k, out_axis in enumerate(batch_axes):
        tags[out_axis], zero[out_axis] = indices.tags[k], False
    for i, k in zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True):
        a.unify(operand.tags[i], indices.tags[k])
        zero[batch_axes[k]] = operand.zero[i] and not filled
    if len(indices.shape) > len(batch_axes):
        a.freeze(indices.tags[-1], "DATA_INDEXED", "gather")
    if operand.leaf is not None and indices.leaf is None:
        a.use(vals, 0, 1, "lookup", (), (), whole)
    return [a.value(aval, tags, zero)]


def _constant_positions(eqn: Eqn, operand: Val, indices: Val) -> tuple[int, np.ndarray] | None:
    """(axis, positions) where a gather takes constant positions of one prunable axis, and all others whole."""
    p, known = eqn.params, indices.known
    dn, sizes = p["dimension_numbers"], p["slice_sizes"]
    axes = [i for i in dn.start_index_map if sizes[i] != operand.shape[i]]
    if known is None or len(axes) != 1 or dn.operand_batching_dims:
        return None
    (axis,), n = axes, operand.shape[axes[0]]
    if sizes[axis] != 1 or not T.is_live(operand.tags[axis]):
        return None
    if any(k != m for i, (k, m) in enumerate(zip(sizes, operand.shape, strict=True)) if i != axis):
        return None
    starts = known().astype(np.int64)
    at = starts[..., dn.start_index_map.index(axis)]
    if p["mode"] == lax.GatherScatterMode.CLIP:
        at = at.clip(0, n - 1)
    elif p["mode"] == lax.GatherScatterMode.FILL_OR_DROP and any(
        starts[..., k].any() for k, i in enumerate(dn.start_index_map) if i != axis
    ):
        return None
    return (axis, at) if at.size and (at >= 0).all() and (at < n).all() else None


def _take(a: Analysis, eqn: Eqn, operand: Val, axis: int, at: np.ndarray) -> list[Val]:
    """Positions that constants name: a permutation, a repeat, a choice."""
    dn, aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    a.indices[a.path] = (axis, at)
    others = iter(dn.offset_dims)
    tags: list[Tag] = [()] * len(aval.shape)
    zero = [False] * len(aval.shape)
    for i in range(len(operand.shape)):
        if i in dn.collapsed_slice_dims:
            continue
        j = next(others)
        if i != axis:
            tags[j], zero[j] = operand.tags[i], operand.zero[i]
    rest = taken(a, operand, axis, at.ravel())
    owned = {id(x) for x in T.atoms(operand.tags[axis])}
    # copies of a position are not zero where only some of them are removed
    stays = operand.zero[axis] and all(id(x) in owned or x.reason is not None for x in T.atoms(rest))
    rows = [j for j in range(len(aval.shape)) if j not in dn.offset_dims and aval.shape[j] > 1]
    for j in rows:
        try:
            tags[j], rest = refine.split_front(rest, aval.shape[j])
        except Misaligned:
            a.freeze(rest, "MISALIGNED_RESHAPE", "gather")
            tags[j], rest = (
                a.fixed(aval.shape[j], "MISALIGNED_RESHAPE"),
                a.fixed(T.size(rest) // aval.shape[j], "MISALIGNED_RESHAPE"),
            )
        zero[j] = stays
    return [a.value(aval, tags, zero)]


def _take_kept(eqn: Eqn, args: list[Any], s: Any) -> list[Any] | None:
    """The gather with the positions that its constants name counted among those that are left."""
    if s.index is None or (s.in_shape(0) == s.full_in_shape(0) and s.out_shape(0) == s.full_out_shape(0)):
        return None
    axis, at = s.index
    dn = eqn.params["dimension_numbers"]
    rows = [j for j in range(len(s.full_out_shape(0))) if j not in dn.offset_dims]
    at = at[np.ix_(*(s.out_kept(0, j) for j in rows))] if rows else at
    starts = np.zeros((*at.shape, len(dn.start_index_map)), args[1].dtype)
    starts[..., dn.start_index_map.index(axis)] = np.searchsorted(s.kept(0, axis), at)
    return [eqn.primitive.bind(args[0], jnp.asarray(starts), **_gather_sizes(eqn, s))]


def _fills(p: Any, dtype: Any) -> bool:
    """Whether rows that lie outside the operand are filled with something else than 0.

    NaN does not count: it marks an error in every kept position of the row as well.
    """
    fill = p["fill_value"]
    if p["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return False
    if fill is None:
        return not jnp.issubdtype(dtype, jnp.inexact)
    return bool(fill == fill and fill != 0)


def _gather_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    p = eqn.params
    full, new = s.full_in_shape(0), s.in_shape(0)
    sizes = tuple(n if k == f else k for k, f, n in zip(p["slice_sizes"], full, new, strict=True))
    return {**p, "slice_sizes": sizes}


def _scatter(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    operand, indices, updates = vals
    dn = eqn.params["dimension_numbers"]
    gone = (*dn.inserted_window_dims, *dn.operand_batching_dims)
    window = dict(zip([i for i in range(len(operand.shape)) if i not in gone], dn.update_window_dims, strict=True))
    zero = [False] * len(operand.shape)
    name = eqn.primitive.name.replace("_", "-")
    rows = [j for j in range(len(updates.shape)) if j not in dn.update_window_dims]
    batch = dict(zip(dn.operand_batching_dims, dn.scatter_indices_batching_dims, strict=True))

    def stays_zero(i: int, j: int) -> bool:
        mine, theirs = operand.zero[i] or operand.scalar == 0, updates.zero[j] or updates.scalar == 0
        return mine if name == "scatter-mul" else mine and theirs

    for i, n in enumerate(operand.shape):
        j = window.get(i)
        if i in batch:  # every row of a batch is written into its own part of the operand
            k = batch[i]
            a.unify(operand.tags[i], indices.tags[k])
            a.unify(operand.tags[i], updates.tags[rows[k]])
            zero[i] = stays_zero(i, rows[k])
        elif j is not None and updates.shape[j] == n:  # written whole: the start can only be clamped to 0
            a.unify(operand.tags[i], updates.tags[j])
            zero[i] = stays_zero(i, j)
        else:
            a.freeze(operand.tags[i], "DATA_INDEXED", "scatter")
            if j is not None:
                a.freeze(updates.tags[j], "DATA_INDEXED", "scatter")
    for k, j in enumerate(rows):
        if k in dn.scatter_indices_batching_dims:
            continue
        if name in ("scatter-add", "scatter-sub"):
            a.unify(indices.tags[k], updates.tags[j])
            if not (updates.zero[j] or updates.scalar == 0):
                a.inexact(updates.tags[j], f"{name} adds values that are not zero at removed positions")
        else:
            a.freeze(updates.tags[j], "DATA_INDEXED", "scatter")
            a.freeze(indices.tags[k], "DATA_INDEXED", "scatter")
    a.freeze(indices.tags[-1], "DATA_INDEXED", "scatter")
    return [a.value(eqn.outvars[0].aval, operand.tags, zero)]


def _dynamic_slice(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, sizes = vals[0], eqn.params["slice_sizes"]
    tags, zero = [], []
    for i, (n, k) in enumerate(zip(v.shape, sizes, strict=True)):
        if n == k:
            tags.append(v.tags[i])
            zero.append(v.zero[i])
        else:
            a.freeze(v.tags[i], "DYNAMIC_SLICE")
            tags.append(a.fixed(k, "DYNAMIC_SLICE"))
            zero.append(False)
    return [a.value(eqn.outvars[0].aval, tags, zero, scalar=v.scalar, leaf=v.leaf)]


def _dynamic_slice_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    p = eqn.params
    sizes = tuple(
        n if k == f else k for k, f, n in zip(p["slice_sizes"], s.full_in_shape(0), s.in_shape(0), strict=True)
    )
    return {**p, "slice_sizes": sizes}


def _dynamic_update_slice(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, update = vals[0], vals[1]
    zero = []
    for i, (n, k) in enumerate(zip(v.shape, update.shape, strict=True)):
        if n == k:
            a.unify(v.tags[i], update.tags[i])
            zero.append((v.zero[i] or v.scalar == 0) and (update.zero[i] or update.scalar == 0))
        else:
            a.freeze(v.tags[i], "DYNAMIC_SLICE")
            a.freeze(update.tags[i], "DYNAMIC_SLICE")
            zero.append(False)
    return [a.value(eqn.outvars[0].aval, v.tags, zero)]


RULES: dict[str, Rule] = {
    "gather": Rule(_gather, _gather_sizes, perform=_take_kept),
    **{
        name: Rule(_scatter)
        for name in (
            "scatter",
            "scatter-add",
            "scatter_add",
            "scatter-mul",
            "scatter_mul",
            "scatter_min",
            "scatter_max",
            "scatter-min",
            "scatter-max",
            "scatter_sub",
            "scatter-sub",
        )
    },
    "dynamic_slice": Rule(_dynamic_slice, _dynamic_slice_sizes),
    "dynamic_update_slice": Rule(_dynamic_update_slice),
}
