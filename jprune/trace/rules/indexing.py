"""Gather, scatter and dynamic slices: axes taken whole are carried, axes that data indexes are frozen.

A sum does not ask in which order, or how many, terms are added: the rows that scatter-add adds are one axis with the
entries of the index that says where, and may be removed together if what they add is zero.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jprune.trace.analysis import Analysis, Eqn, Rule, Val
from jprune.trace.tags import Tag


def _gather(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    operand, indices = vals
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
    "gather": Rule(_gather, _gather_sizes),
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
