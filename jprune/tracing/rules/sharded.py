"""shard_map, and the collectives by which its shards exchange values.

Inside the mapped function an axis that k devices share is n / k long. Position i of that axis is position i of every
shard: a unit is cut from all shards alike, so that what is left still divides among the devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jprune.tracing import refine
from jprune.tracing import tags as T
from jprune.tracing.errors import TraceError
from jprune.tracing.evaluate import Evaluator
from jprune.tracing.tags import Misaligned, Tag
from jprune.tracing.walk import Analysis, Eqn, Path, Rule, Val

Propagate = Callable[[Analysis, Eqn, list[Val]], list[Val]]


def _names(entry: Any) -> tuple[Any, ...]:
    return () if entry is None else tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _shares(eqn: Eqn, spec: Any, rank: int) -> list[int]:
    """Per axis, among how many devices it is divided."""
    entries = [*spec, *[None] * (rank - len(spec))]
    return [math.prod(dict(eqn.params["mesh"].shape)[n] for n in _names(e)) for e in entries]


def _devices(eqn: Eqn) -> int:
    """How many shards there are of anything: devices that hold copies of all operands and results count once."""
    used = {n for s in (*eqn.params["in_specs"], *eqn.params["out_specs"]) for e in s for n in _names(e)}
    return math.prod(dict(eqn.params["mesh"].shape)[n] for n in used)


def _part(a: Analysis, tag: Tag, k: int) -> Tag:
    """An axis inside one of its k shards."""
    if k == 1:
        return tag
    n = T.size(tag) // k
    try:
        front, back = refine.split_front(tag, k)
    except Misaligned:
        a.freeze(tag, "SHARDED", "the shards do not begin where the parts of this axis do")
        return a.fixed(n, "SHARDED")
    a.freeze(front, "SHARDED")
    return back


def _whole(a: Analysis, tag: Tag, k: int) -> Tag:
    """An axis put together of k shards."""
    return tag if k == 1 else T.norm((*a.fixed(k, "SHARDED"), *tag))


def _shard_map(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    p, path = eqn.params, a.path
    inside = []
    for v, spec, var in zip(vals, p["in_specs"], p["jaxpr"].invars, strict=True):
        parts = _shares(eqn, spec, len(v.shape))
        tags = tuple(_part(a, t, k) for t, k in zip(v.tags, parts, strict=True))
        leaf = v.leaf if max(parts, default=1) == 1 else None
        inside.append(Val(tuple(var.aval.shape), v.dtype, tags, v.zero, v.scalar, leaf, moves=v.moves))
    results: list[Val] = []

    def body() -> tuple[()]:
        results.extend(a.run_closed(p["jaxpr"], inside, "call"))
        return ()

    # derivative rules are traced on the way, which jax does with the names of the mesh axes at hand
    jax.eval_shape(_mapped(eqn, body, (), ()))
    devices = _devices(eqn)
    if devices > 1:  # the work of all devices is counted
        shards = a.fixed(devices, "SHARDED")
        for k in [k for k in a.macs if k[: len(path)] == path]:
            term = a.macs[k]
            a.macs[k] = dataclasses.replace(term, factors=(shards, *term.factors), out_tags=(shards, *term.out_tags))
    outs = []
    for v, spec, var in zip(results, p["out_specs"], eqn.outvars, strict=True):
        parts = _shares(eqn, spec, len(v.shape))
        tags = [_whole(a, t, k) for t, k in zip(v.tags, parts, strict=True)]
        outs.append(a.value(var.aval, tags, v.zero, scalar=v.scalar))
    return outs


def _mapped(eqn: Eqn, body: Any, in_specs: Any, out_specs: Any) -> Any:
    """`body` mapped over the same shards as the equation's own function."""
    p = eqn.params
    return jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )


def _eval_shard_map(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    p = eqn.params
    carried, stacked = ev.states_below(path)
    states = {**carried, **stacked}
    if states and p["mesh"].size > 1:
        raise TraceError(
            f"statistics of activations inside a shard_map over {p['mesh'].size} devices are not collected "
            f"(taps {sorted(states)}); name other taps, or trace the function with a mesh of one device"
        )

    def body(args: tuple[Any, ...], states: dict[str, Any]) -> Any:
        inner = ev.with_states(jax.tree.map(lambda s: s[0], states))
        outs = inner.run(p["jaxpr"], (), list(args), (*path, "call"))
        return tuple(outs), jax.tree.map(lambda s: s[None], {k: inner.states[k] for k in states})

    one = PartitionSpec(tuple(p["newly_manual_axes"]))  # states belong to the one shard there is
    mapped = _mapped(eqn, body, (tuple(p["in_specs"]), one), (tuple(p["out_specs"]), one))
    outs, states = mapped(tuple(args), jax.tree.map(lambda s: s[None], states))
    ev.states.update(jax.tree.map(lambda s: s[0], states))
    return list(outs)


def _same_axes(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    """Sums, maxima and exchanges over devices, entry by entry: the axes stay, and zeros stay zeros."""
    if any(len(v.shape) != len(o.aval.shape) for v, o in zip(vals, eqn.outvars, strict=True)):
        a.freeze_all(vals, "UNSUPPORTED", eqn.primitive.name)
        return [a.opaque(o.aval, "UNSUPPORTED", eqn.primitive.name) for o in eqn.outvars]
    return [
        a.value(o.aval, v.tags, v.zero, scalar=0.0 if v.scalar == 0 else None)
        for v, o in zip(vals, eqn.outvars, strict=True)
    ]


def _all_gather(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    (v,), p = vals, eqn.params
    axis, k = p["all_gather_dimension"], p["axis_size"]
    tags, zero = list(v.tags), list(v.zero)
    if p["tiled"]:
        tags[axis] = _whole(a, tags[axis], k)
    else:
        tags.insert(axis, a.fixed(k, "SHARDED"))
        zero.insert(axis, False)
    return [a.value(eqn.outvars[0].aval, tags, zero, scalar=v.scalar)]


def _reduce_scatter(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    (v,), p = vals, eqn.params
    axis, k = p["scatter_dimension"], p["axis_size"]
    tags, zero = list(v.tags), list(v.zero)
    if p["tiled"]:
        tags[axis] = _part(a, tags[axis], k)
    else:
        a.freeze(tags.pop(axis), "SHARDED")
        zero.pop(axis)
    return [a.value(eqn.outvars[0].aval, tags, zero, scalar=0.0 if v.scalar == 0 else None)]


def _axis_index(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    return [a.opaque(eqn.outvars[0].aval, "SHARDED")]


RULES: dict[str, Rule] = {
    "shard_map": Rule(_shard_map, evaluate=_eval_shard_map),
    **{name: Rule(_same_axes) for name in ("psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast")},
    "all_gather": Rule(_all_gather),
    "all_gather_invariant": Rule(_all_gather),
    "reduce_scatter": Rule(_reduce_scatter),
    "axis_index": Rule(_axis_index),
}
