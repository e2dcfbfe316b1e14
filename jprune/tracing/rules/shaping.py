"""Primitives that move, cut, join or create axes without arithmetic on the entries."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.tracing import refine
from jprune.tracing import tags as T
from jprune.tracing.tags import Misaligned, Tag
from jprune.tracing.walk import Analysis, Eqn, Rule, Val


def _broadcast(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, aval = vals[0], eqn.outvars[0].aval
    source = {d: i for i, d in enumerate(eqn.params["broadcast_dimensions"])}
    tags, zero = [], []
    for axis, n in enumerate(aval.shape):
        i = source.get(axis)
        if i is not None and v.shape[i] == n:
            tags.append(v.tags[i])
            zero.append(v.zero[i] or v.scalar == 0)
        else:
            tags.append(a.fresh(n))
            zero.append(v.scalar == 0)
    return [a.value(aval, tags, zero, scalar=v.scalar, leaf=v.leaf)]


def _broadcast_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    return {**eqn.params, "shape": s.out_shape(0)}


def blocks(src: tuple[int, ...], dst: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Minimal runs of source and target axes with equal products (size-1 axes join the run they stand in)."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(src) or j < len(dst):
        left, right = [], []
        p = q = 1
        if i < len(src):
            left.append(i)
            p *= src[i]
            i += 1
        if j < len(dst):
            right.append(j)
            q *= dst[j]
            j += 1
        while p != q:
            if p < q and i < len(src):
                left.append(i)
                p *= src[i]
                i += 1
            elif q < p and j < len(dst):
                right.append(j)
                q *= dst[j]
                j += 1
            else:
                raise AssertionError(f"reshape {src} -> {dst}")
        out.append((left, right))
    return out


def _reshape(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, aval = vals[0], eqn.outvars[0].aval
    if eqn.params.get("dimensions") is not None:
        a.freeze_all(vals, "MISALIGNED_RESHAPE")
        return [a.opaque(aval, "MISALIGNED_RESHAPE")]
    tags: list[Tag] = [()] * len(aval.shape)
    zero = [v.scalar == 0] * len(aval.shape)
    if 0 in aval.shape:
        return [a.opaque(aval, "MISALIGNED_RESHAPE")]
    for left, right in blocks(v.shape, tuple(aval.shape)):
        whole = T.norm(tuple(d for i in left for d in v.tags[i]))
        flag = all(v.zero[i] for i in left if v.shape[i] > 1 and T.is_live(v.tags[i])) or v.scalar == 0
        wide = [j for j in right if aval.shape[j] > 1]
        if not wide:
            continue
        try:
            rest = whole
            cut: list[Tag] = []
            for j in wide[:-1]:
                front, rest = refine.split_front(rest, aval.shape[j])
                cut.append(front)
            cut.append(rest)
            for j, t in zip(wide, cut, strict=True):
                tags[j] = t
                zero[j] = flag
        except Misaligned:
            a.freeze(whole, "MISALIGNED_RESHAPE")
            for j in wide:
                tags[j] = a.fixed(aval.shape[j], "MISALIGNED_RESHAPE")
    return [a.value(aval, tags, zero, scalar=v.scalar, leaf=v.leaf)]


def _reshape_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    return {**eqn.params, "new_sizes": s.out_shape(0)}


def _transpose(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, perm = vals[0], eqn.params["permutation"]
    return [
        a.value(eqn.outvars[0].aval, [v.tags[i] for i in perm], [v.zero[i] for i in perm], scalar=v.scalar, leaf=v.leaf)
    ]


def _squeeze(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, gone = vals[0], set(eqn.params["dimensions"])
    keep = [i for i in range(len(v.shape)) if i not in gone]
    return [
        a.value(eqn.outvars[0].aval, [v.tags[i] for i in keep], [v.zero[i] for i in keep], scalar=v.scalar, leaf=v.leaf)
    ]


def _expand_dims(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, new = vals[0], {d % len(eqn.outvars[0].aval.shape) for d in eqn.params["dimensions"]}
    old = iter(range(len(v.shape)))
    index = [None if i in new else next(old) for i in range(len(eqn.outvars[0].aval.shape))]
    return [
        a.value(
            eqn.outvars[0].aval,
            [() if i is None else v.tags[i] for i in index],
            [v.scalar == 0 if i is None else v.zero[i] for i in index],
            scalar=v.scalar,
            leaf=v.leaf,
        )
    ]


def _concatenate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    aval, axis = eqn.outvars[0].aval, eqn.params["dimension"]
    tags, zero = [], []
    for i in range(len(aval.shape)):
        if i == axis:
            parts = tuple(v.tags[i] for v in vals if v.shape[i] > 0)
            tags.append(T.norm((T.Sum(parts),)) if aval.shape[i] != 1 else ())
            zero.append(all(v.zero[i] or v.scalar == 0 or not T.is_live(v.tags[i]) for v in vals))
        else:
            for v in vals[1:]:
                a.unify(vals[0].tags[i], v.tags[i])
            tags.append(vals[0].tags[i])
            zero.append(all(v.zero[i] or v.scalar == 0 for v in vals))
    return [a.value(aval, tags, zero)]


def _stack(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    aval, axis = eqn.outvars[0].aval, eqn.params["axis"]
    tags, zero = [], []
    for i in range(len(vals[0].shape)):
        for v in vals[1:]:
            a.unify(vals[0].tags[i], v.tags[i])
        tags.append(vals[0].tags[i])
        zero.append(all(v.zero[i] or v.scalar == 0 for v in vals))
    tags.insert(axis, a.fixed(aval.shape[axis], "SEGMENT_AXIS"))
    zero.insert(axis, False)
    return [a.value(aval, tags, zero)]


def _unstack(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, axis = vals[0], eqn.params["axis"]
    a.freeze(v.tags[axis], "SEGMENT_AXIS")
    keep = [i for i in range(len(v.shape)) if i != axis]
    return [a.value(o.aval, [v.tags[i] for i in keep], [v.zero[i] for i in keep]) for o in eqn.outvars]


def cut(a: Analysis, v: Val, axis: int, lo: int, hi: int) -> Tag:
    """The tag of a contiguous range; a single index taken out has to stay."""
    tag = refine.slice_tag(v.tags[axis], lo, hi, a.where)
    if hi - lo == 1 and v.shape[axis] != 1:
        a.freeze(tag, "SINGLE_INDEX")
        return ()
    return tag


def _every(a: Analysis, v: Val, i: int, at: np.ndarray, step: int) -> Tag:
    """The tag of every step-th position; where the step divides the axis, its positions are units of `step` each."""
    if len(at) * step == v.shape[i]:
        try:
            front, back = refine.split_front(v.tags[i], len(at))
        except Misaligned:
            pass
        else:
            a.freeze(back, "STRIDED_SLICE")
            return front
    return taken(a, v, i, at)


def taken(a: Analysis, v: Val, i: int, at: np.ndarray) -> Tag:
    """The tag of constant positions of an axis, in any order; frozen where they cannot be followed."""
    if len(at) == 1:
        return cut(a, v, i, int(at[0]), int(at[0]) + 1)
    try:
        return refine.take(v.tags[i], at, a.where)
    except Misaligned:
        a.freeze(v.tags[i], "ORDER_OR_MIX", a.eqn.primitive.name)
        return a.fixed(len(at), "ORDER_OR_MIX", a.eqn.primitive.name)


def _slice(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, p = vals[0], eqn.params
    strides = p["strides"] or (1,) * len(v.shape)
    tags = []
    for i, (lo, hi, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        if step == 1 and hi > lo:
            tags.append(cut(a, v, i, int(lo), int(hi)))
        elif hi > lo and T.is_live(v.tags[i]):
            tags.append(_every(a, v, i, np.arange(lo, hi, step), int(step)))
        else:
            a.freeze(v.tags[i], "STRIDED_SLICE")
            tags.append(a.fixed(eqn.outvars[0].aval.shape[i], "STRIDED_SLICE"))
    return [a.value(eqn.outvars[0].aval, tags, v.zero, scalar=v.scalar, leaf=v.leaf)]


def _slice_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    start, limit = [], []
    for i, (lo, hi, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        if step == 1:
            lo = s.prefix(0, i, int(lo))
            hi = lo + s.out_shape(0)[i]
        start.append(lo)
        limit.append(hi)
    return {**p, "start_indices": tuple(start), "limit_indices": tuple(limit)}


def _slice_strided(eqn: Eqn, args: list[Any], s: Any) -> list[Any] | None:
    """Strides over an axis that lost positions: those that are left are taken one by one."""
    p = eqn.params
    strided = [i for i, step in enumerate(p["strides"] or ()) if step != 1]
    if all(s.in_shape(0)[i] == s.full_in_shape(0)[i] for i in strided):
        return None
    plain = {**_slice_sizes(eqn, s), "strides": None}
    shape = s.in_shape(0)
    start = [0 if i in strided else n for i, n in enumerate(plain["start_indices"])]
    limit = [shape[i] if i in strided else n for i, n in enumerate(plain["limit_indices"])]
    x = lax.slice(args[0], start, limit)
    for i in strided:
        at = p["start_indices"][i] + p["strides"][i] * s.out_kept(0, i)
        at = np.searchsorted(s.kept(0, i), at)
        step = int(at[1] - at[0]) if len(at) > 1 else 1
        if (np.diff(at) == step).all():
            x = (
                lax.slice_in_dim(x, int(at[0]), int(at[-1]) + 1, step, i)
                if len(at)
                else lax.slice_in_dim(x, 0, 0, 1, i)
            )
        else:
            x = jnp.take(x, at, axis=i, mode="clip")
    return [x]


def _split(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, axis = vals[0], eqn.params["axis"]
    outs, lo = [], 0
    for var, n in zip(eqn.outvars, eqn.params["sizes"], strict=True):
        tags = list(v.tags)
        tags[axis] = cut(a, v, axis, lo, lo + int(n)) if n else a.fixed(0, "SEGMENT_AXIS")
        lo += int(n)
        outs.append(a.value(var.aval, tags, v.zero, scalar=v.scalar, leaf=v.leaf))
    return outs


def _split_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    axis = eqn.params["axis"]
    return {**eqn.params, "sizes": tuple(s.out_shape(i)[axis] for i in range(len(eqn.outvars)))}


def _pad(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, fill = vals
    tags, zero = [], []
    for i, (lo, hi, interior) in enumerate(eqn.params["padding_config"]):
        tag, n = v.tags[i], eqn.outvars[0].aval.shape[i]
        zero_here = (v.zero[i] or v.scalar == 0) and fill.scalar == 0
        if not lo and not hi and not interior:
            tags.append(tag)
            zero.append(v.zero[i])
        elif lo >= 0 and hi >= 0 and not interior and T.is_live(tag):
            parts = [a.fresh(int(lo)) if lo else None, tag, a.fresh(int(hi)) if hi else None]
            tags.append(T.norm((T.Sum(tuple(p for p in parts if p is not None)),)))
            zero.append(zero_here)
        else:
            a.freeze(tag, "STRIDED_SLICE", "negative or interior padding")
            tags.append(a.fixed(n, "WINDOW_AXIS"))
            zero.append(False)
    # along the other axes a padded value is the fill value: zero flags survive only if that is 0
    if any(lo or hi or interior for lo, hi, interior in eqn.params["padding_config"]) and fill.scalar != 0:
        zero = [False] * len(zero)
    return [a.value(eqn.outvars[0].aval, tags, zero)]


def _pad_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    config = []
    for i, (lo, hi, interior) in enumerate(eqn.params["padding_config"]):
        resized = s.in_shape(0)[i] != s.full_in_shape(0)[i] or s.out_shape(0)[i] != s.full_out_shape(0)[i]
        if resized and (lo or hi):
            lo = s.out_prefix(0, i, int(lo))
            hi = s.out_shape(0)[i] - lo - s.in_shape(0)[i]
        config.append((int(lo), int(hi), int(interior)))
    return {**eqn.params, "padding_config": tuple(config)}


def _tile(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, aval = vals[0], eqn.outvars[0].aval
    reps = eqn.params["reps"]
    tags = [T.norm((*a.fresh(int(r)), *t)) for r, t in zip(reps, v.tags, strict=True)]
    zero = [v.zero[i] or v.scalar == 0 if n > 1 else v.scalar == 0 for i, n in enumerate(v.shape)]
    # a repeat axis that something prunes is not zero at the removed copies
    zero = [z and (reps[i] == 1 or v.scalar == 0) for i, z in enumerate(zero)]
    return [a.value(aval, tags, zero, scalar=v.scalar)]


def _tile_sizes(eqn: Eqn, s: Any) -> dict[str, Any]:
    reps = tuple(o // i if i else 1 for o, i in zip(s.out_shape(0), s.in_shape(0), strict=True))
    return {**eqn.params, "reps": reps}


def _iota(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    aval, axis = eqn.outvars[0].aval, eqn.params["dimension"]
    tags = [a.fixed(n, "CONST_IOTA") if i == axis else a.fresh(n) for i, n in enumerate(aval.shape)]
    return [a.value(aval, tags)]


def _shape_param(name: str) -> Any:
    def rewrite(eqn: Eqn, s: Any) -> dict[str, Any]:
        return {**eqn.params, name: s.out_shape(0)}

    return rewrite


def _rev(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    v, tags = vals[0], list(vals[0].tags)
    for i in eqn.params["dimensions"]:
        n = v.shape[i]
        if T.is_live(v.tags[i]):  # what is left is reversed as well: the primitive stays as it is
            tags[i] = taken(a, v, i, np.arange(n)[::-1])
        else:
            a.freeze(v.tags[i], "ORDER_OR_MIX", "rev")
            tags[i] = a.fixed(n, "ORDER_OR_MIX", "rev")
    return [a.value(eqn.outvars[0].aval, tags, v.zero, scalar=v.scalar)]


def random_value(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    """Random numbers: sizes follow what they meet, but pruned positions shift the stream, so that is noted.

    An array of keys gives numbers for each of them: its axes come first.
    """
    a.freeze_all(vals, "RNG", eqn.primitive.name)
    outs = []
    for var in eqn.outvars:
        keys = len(var.aval.shape) - len(eqn.params["shape"])
        drawn = [a.fresh(n) for n in var.aval.shape[keys:]]
        for t in drawn:
            a.inexact(t, "random numbers drawn along this axis")
        outs.append(a.value(var.aval, [*(vals[0].tags[:keys] if keys else ()), *drawn]))
    return outs


def _drawn_shape(eqn: Eqn, s: Any) -> dict[str, Any]:
    keys = len(eqn.outvars[0].aval.shape) - len(eqn.params["shape"])
    return {**eqn.params, "shape": s.out_shape(0)[keys:]}


def _random_opaque(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    a.freeze_all(vals, "RNG", eqn.primitive.name)
    return [a.opaque(v.aval, "RNG", eqn.primitive.name) for v in eqn.outvars]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": Rule(_broadcast, _broadcast_sizes),
    "reshape": Rule(_reshape, _reshape_sizes),
    "transpose": Rule(_transpose),
    "squeeze": Rule(_squeeze),
    "expand_dims": Rule(_expand_dims),
    "concatenate": Rule(_concatenate),
    "stack": Rule(_stack),
    "unstack": Rule(_unstack),
    "slice": Rule(_slice, _slice_sizes, perform=_slice_strided),
    "split": Rule(_split, _split_sizes),
    "pad": Rule(_pad, _pad_sizes),
    "tile": Rule(_tile, _tile_sizes),
    "iota": Rule(_iota, _shape_param("shape")),
    "empty2": Rule(
        lambda a, eqn, vals: [a.value(eqn.outvars[0].aval, [a.fresh(n) for n in eqn.outvars[0].aval.shape])],
        _shape_param("shape"),
    ),
    "rev": Rule(_rev),
    "random_bits": Rule(random_value, _drawn_shape),
    "rng_uniform": Rule(random_value, _drawn_shape),
    **{
        name: Rule(_random_opaque)
        for name in (
            "random_seed",
            "random_wrap",
            "random_unwrap",
            "random_split",
            "random_fold_in",
            "random_clone",
            "threefry2x32",
            "rng_bit_generator",
        )
    },
}
