"""dot_general, ragged_dot and convolution: what is summed over must be zero on one side, or pruning it is not exact."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jprune.tracing import refine
from jprune.tracing import tags as T
from jprune.tracing.tags import Misaligned, Tag
from jprune.tracing.walk import Analysis, Eqn, Rule, Val


def _contract(a: Analysis, lhs: Val, rhs: Val, i: int, j: int) -> None:
    """Tie one contracted pair and certify it."""
    a.unify(lhs.tags[i], rhs.tags[j])
    T.stiffen(lhs.tags[i])
    if not (lhs.zero[i] or rhs.zero[j] or lhs.scalar == 0 or rhs.scalar == 0):
        a.inexact(lhs.tags[i], f"{a.eqn.primitive.name} sums over values that are not zero at removed positions")


def _dot_general(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    lhs, rhs = vals
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    for i, j in zip(lc, rc, strict=True):
        _contract(a, lhs, rhs, i, j)
    for i, j in zip(lb, rb, strict=True):
        a.unify(lhs.tags[i], rhs.tags[j])
    lf = [i for i in range(len(lhs.shape)) if i not in (*lc, *lb)]
    rf = [j for j in range(len(rhs.shape)) if j not in (*rc, *rb)]
    tags = [lhs.tags[i] for i in (*lb, *lf)] + [rhs.tags[j] for j in rf]
    zero = [lhs.zero[i] or rhs.zero[j] for i, j in zip(lb, rb, strict=True)]
    zero += [lhs.zero[i] for i in lf] + [rhs.zero[j] for j in rf]
    out = a.value(eqn.outvars[0].aval, tags, zero)
    contracted = [lhs.tags[i] for i in lc]
    leaf = None
    nb = len(lb)
    for k, (v, other) in enumerate(((lhs, rhs), (rhs, lhs))):
        if v.leaf is None or other.leaf is not None:
            continue
        leaf = v.leaf
        data_features = (rc, lc)[k]
        out_features = range(nb, nb + len(lf)) if k == 0 else range(nb + len(lf), nb + len(lf) + len(rf))
        a.use(vals, k, 1 - k, "out", contracted, data_features, out_features)
    a.count(leaf, 1, [*tags, *contracted], tags, contracted)
    return [out]


def _ragged_dot(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    """A matrix product whose rows (or summed positions, or batch) come in runs, as many as there are groups.

    Which run an entry belongs to is counted from `group_sizes`, which is data: the ragged axis and the axis of the
    groups (the experts) stay whole. Everything else is a dot_general.
    """
    lhs, rhs, sizes, *offset = vals
    p = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = p.dot_dimension_numbers
    (ragged,) = p.lhs_ragged_dimensions
    groups = tuple(p.rhs_group_dimensions)
    why = "ragged_dot: which rows meet which expert is counted from group_sizes"
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        a.unify(lhs.tags[i], rhs.tags[j])
    if T.is_live(lhs.tags[ragged]):  # how many rows an input has may still change from call to call
        a.freeze(lhs.tags[ragged], "DATA_INDEXED", why)
    for j in groups:
        a.freeze(rhs.tags[j], "DATA_INDEXED", why)
    a.freeze_all([sizes, *offset], "DATA_INDEXED", why)
    for i, j in zip(lc, rc, strict=True):
        _contract(a, lhs, rhs, i, j)
    lf = [i for i in range(len(lhs.shape)) if i not in (*lc, *lb)]
    rf = [j for j in range(len(rhs.shape)) if j not in (*rc, *rb, *groups)]
    work = [lhs.tags[i] for i in (*lb, *lf)] + [rhs.tags[j] for j in rf]
    tags, lead = work, 0
    if ragged in lc:  # one product per run of the summed positions: the runs are a new leading axis
        tags, lead = [a.fixed(eqn.outvars[0].aval.shape[0], "DATA_INDEXED", why), *work], 1
    zero = [lhs.zero[i] or rhs.zero[j] for i, j in zip(lb, rb, strict=True)]
    zero = [False] * lead + zero + [lhs.zero[i] for i in lf] + [rhs.zero[j] for j in rf]
    contracted = [lhs.tags[i] for i in lc]
    leaf = rhs.leaf if lhs.leaf is None else None
    if leaf is not None:
        n = len(tags)
        a.use(vals, 1, 0, "out", contracted, lc, range(n - len(rf), n))
    a.count(leaf, 1, [*work, *contracted], tags, contracted)
    return [a.value(eqn.outvars[0].aval, tags, zero)]


def _split_channels(a: Analysis, tag: Tag, groups: int) -> tuple[Tag, Tag]:
    try:
        return refine.split_front(tag, groups)
    except Misaligned:
        a.freeze(tag, "MISALIGNED_RESHAPE", "feature groups")
        return a.fixed(groups, "MISALIGNED_RESHAPE"), a.fixed(T.size(tag) // groups, "MISALIGNED_RESHAPE")


def _conv(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    lhs, rhs = vals
    p, aval = eqn.params, eqn.outvars[0].aval
    dn = p["dimension_numbers"]
    (lb, lc, *ls), (ko, ki, *ks), (ob, oc, *os) = dn.lhs_spec, dn.rhs_spec, dn.out_spec
    if p["batch_group_count"] != 1:
        a.freeze_all(vals, "BATCH_GROUP")
        return [a.opaque(aval, "BATCH_GROUP")]
    for i in ls:
        a.freeze(lhs.tags[i], "CONV_SPATIAL")
    for i in ks:
        a.freeze(rhs.tags[i], "KERNEL_SPATIAL")
    groups = p["feature_group_count"]
    tags: list[Tag] = [()] * len(aval.shape)
    zero = [False] * len(aval.shape)
    tags[ob], zero[ob] = lhs.tags[lb], lhs.zero[lb]
    for i in os:
        tags[i] = a.fixed(aval.shape[i], "CONV_SPATIAL")
    if groups == 1:
        _contract(a, lhs, rhs, lc, ki)
        zero[oc] = rhs.zero[ko]
    else:
        g, inside = _split_channels(a, lhs.tags[lc], groups)
        g_out, _ = _split_channels(a, rhs.tags[ko], groups)
        a.unify(g, g_out)
        if T.size(inside) > 1:
            a.unify(inside, rhs.tags[ki])
            if not (lhs.zero[lc] or rhs.zero[ki]):
                a.inexact(rhs.tags[ki], "grouped convolution sums over values that are not zero at removed positions")
        zero[oc] = rhs.zero[ko]
    tags[oc] = T.norm(rhs.tags[ko])
    taps = math.prod(rhs.shape[i] for i in ks)
    dilated = any(d != 1 for d in p["lhs_dilation"])
    # a transposed convolution multiplies each input pixel once per tap; the zeros stuffed in between are not work
    pixels = math.prod(lhs.shape[i] for i in ls) if dilated else math.prod(aval.shape[i] for i in os)
    leaf = rhs.leaf if lhs.leaf is None else None
    a.count(leaf, taps * pixels, [tags[ob], rhs.tags[ki], tags[oc]], tags, [rhs.tags[ki]])
    if leaf is not None:
        a.use(vals, 1, 0, "out", [rhs.tags[ki]] if groups == 1 or rhs.shape[ki] > 1 else [], (lc,), (oc,))
    return [a.value(aval, tags, zero)]


def _feature_groups(eqn: Eqn, s: Any) -> int:
    dn, count = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    inside = s.in_shape(1)[dn.rhs_spec[1]]
    return s.in_shape(0)[dn.lhs_spec[1]] // inside if count > 1 and inside else 1


def _conv_groups(eqn: Eqn, s: Any) -> dict[str, Any]:
    return {**eqn.params, "feature_group_count": _feature_groups(eqn, s)}


def _no_groups(eqn: Eqn, args: list[Any], s: Any) -> list[Any] | None:
    """No channels, where a grouped convolution has lost all its groups: the primitive wants at least one."""
    return None if _feature_groups(eqn, s) else [jnp.zeros(s.out_shape(0), eqn.outvars[0].aval.dtype)]


RULES: dict[str, Rule] = {
    "dot_general": Rule(_dot_general),
    "ragged_dot_general": Rule(_ragged_dot),
    "conv_general_dilated": Rule(_conv, _conv_groups, perform=_no_groups),
}
