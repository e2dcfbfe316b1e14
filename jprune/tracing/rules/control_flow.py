"""Primitives that contain jaxprs: calls, rematerialisation, custom derivatives, scan, while and cond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.tracing import refine
from jprune.tracing import tags as T
from jprune.tracing.evaluate import Evaluator
from jprune.tracing.primitives import CALLS, REMAT
from jprune.tracing.tags import Frozen
from jprune.tracing.walk import LAYERS, Analysis, Eqn, Path, Rule, Val


def _inner(name: str) -> Callable[[Eqn], Any]:
    return lambda eqn: eqn.params[name]


def _call(jaxpr_of: Callable[[Eqn], Any]) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        return a.run_closed(jaxpr_of(eqn), vals, "call")

    return propagate


def _eval_call(jaxpr_of: Callable[[Eqn], Any]) -> Callable[[Evaluator, Eqn, list[Any], Path], list[Any]]:
    def evaluate(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
        return ev.run(jaxpr_of(eqn), (), args, (*path, "call"))

    return evaluate


def _eval_remat(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    carried, stacked = ev.states_below(path)

    def body(args: list[Any], states: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        inner = ev.with_states(states)
        outs = inner.run(eqn.params["jaxpr"], (), args, (*path, "call"))
        return outs, {k: inner.states[k] for k in states}

    p = eqn.params
    outs, states = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(args, {**carried, **stacked})
    ev.states.update(states)
    return outs


# -- custom derivatives: the rule's own jaxpr is walked too, so that replay keeps the author's derivative ----------


def _custom_jvp(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    outs = a.run_closed(eqn.params["call_jaxpr"], vals, "call")
    if a.shadow:
        return outs
    path = a.path
    vals = vals[eqn.params["num_consts"] :]  # what the function closes over comes first; its derivative has its own
    jaxpr, consts, out_zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*[False] * len(vals))
    a.jaxprs[(*path, "jvp")] = (jaxpr, consts, tuple(out_zeros))
    with a.in_shadow():
        tangents = [a.value(v.aval, p.tags, p.zero) for v, p in zip(jaxpr.invars[len(vals) :], vals, strict=True)]
        results = a.run(jaxpr, consts, [*vals, *tangents], (*path, "jvp"))
        a.path, a.eqn = path, eqn
        it = iter(results[len(outs) :])
        for o, r, zero in zip(outs, results, out_zeros, strict=False):
            for t, u in zip(o.tags, r.tags, strict=True):
                a.unify(t, u)
            if not zero:
                for t, u in zip(o.tags, next(it).tags, strict=True):
                    a.unify(t, u)
    return outs


def _eval_custom_jvp(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    made = ev.jaxprs.get((*path, "jvp"))
    if made is None or any(ev.states_below(path)):
        return ev.run(eqn.params["call_jaxpr"], (), args, (*path, "call"))
    jaxpr, consts, out_zeros = made
    n = eqn.params["num_consts"]

    @jax.custom_jvp
    def primal(*xs: Any) -> tuple[Any, ...]:
        return tuple(ev.run(eqn.params["call_jaxpr"], (), xs, (*path, "call")))

    @primal.defjvp
    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        results = ev.run(jaxpr, consts, [*primals[n:], *tangents[n:]], (*path, "jvp"))
        outs = results[: len(out_zeros)]
        it = iter(results[len(out_zeros) :])
        tangents_out = [_zero_tangent(o) if z else next(it) for o, z in zip(outs, out_zeros, strict=True)]
        return tuple(outs), tuple(tangents_out)

    return list(primal(*args))


def _zero_tangent(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, np.inexact):
        return jax.numpy.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _custom_vjp(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    outs = a.run_closed(eqn.params["call_jaxpr"], vals, "call")
    if a.shadow:
        return outs
    path, p = a.path, eqn.params
    differentiated = vals[p["num_consts"] :]
    forward, consts = p["fwd_jaxpr_thunk"].call_wrapped(*[True] * len(differentiated))
    _, residual_tree, forwarded = p["out_trees"]()
    made = residual_tree.num_leaves - sum(f is not None for f in forwarded)
    with a.in_shadow():
        results = a.run(forward, consts, differentiated, (*path, "fwd"))
        it = iter(results[:made])
        residuals = [next(it) if f is None else vals[f] for f in forwarded]
        # cotangents are traced at the traced sizes; their layouts say how to shrink them
        backward = jax.make_jaxpr(lambda *xs: _instantiate(p["bwd"].call_wrapped(*xs)))(
            *[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in residuals],
            *[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in outs],
        )
        cotangents = [a.value(jax.ShapeDtypeStruct(o.shape, o.dtype), o.tags, o.zero) for o in outs]
        grads = a.run(backward.jaxpr, backward.consts, [*residuals, *cotangents], (*path, "bwd"))
        a.path, a.eqn = path, eqn
        for v, g in zip(differentiated, grads, strict=True):
            if v.shape == g.shape:
                for t, u in zip(v.tags, g.tags, strict=True):
                    a.unify(t, u)
        for o, r in zip(outs, results[made:], strict=True):
            for t, u in zip(o.tags, r.tags, strict=True):
                a.unify(t, u)
    a.jaxprs[(*path, "fwd")] = (forward, consts, made, tuple(forwarded), backward)
    return outs


def _instantiate(cotangents: Sequence[Any]) -> list[Any]:
    """Symbolic zero cotangents as arrays (integer inputs get a placeholder that is dropped again)."""
    out = []
    for c in cotangents:
        aval = getattr(c, "aval", None)
        symbolic = type(c).__name__ in ("Zero", "SymbolicZero")
        out.append(jax.numpy.zeros(aval.shape, np.float32) if symbolic and aval is not None else c)
    return out


def _eval_custom_vjp(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    made = ev.jaxprs.get((*path, "fwd"))
    if made is None or any(ev.states_below(path)):
        return ev.run(eqn.params["call_jaxpr"], (), args, (*path, "call"))
    forward, consts, count, forwarded, backward = made
    num_consts = eqn.params["num_consts"]

    @jax.custom_vjp
    def primal(*xs: Any) -> tuple[Any, ...]:
        return tuple(ev.run(eqn.params["call_jaxpr"], (), xs, (*path, "call")))

    def fwd(*xs: Any) -> tuple[tuple[Any, ...], list[Any]]:
        results = ev.run(forward, consts, xs[num_consts:], (*path, "fwd"))
        it = iter(results[:count])
        return tuple(results[count:]), [next(it) if f is None else xs[f] for f in forwarded]

    def bwd(residuals: list[Any], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        grads = ev.run(backward, (), [*residuals, *cotangents], (*path, "bwd"))
        grads = [None] * num_consts + grads
        return tuple(g if jnp.issubdtype(x.dtype, np.inexact) else None for g, x in zip(grads, args, strict=True))

    primal.defvjp(fwd, bwd)
    return list(primal(*args))


# -- loops and branches --------------------------------------------------------------------------------------------


def _fixpoint(a: Analysis, carry: list[Val], step: Callable[[list[Val]], list[Val]]) -> tuple[list[Val], list[Val]]:
    """Run a loop body until the carry's zero flags hold; returns (carry, all results of the last run)."""
    carry = [Val(v.shape, v.dtype, v.tags, v.zero, v.scalar) for v in carry]
    while True:
        outs = step(carry)
        changed = False
        for i, (v, o) in enumerate(zip(carry, outs, strict=False)):
            for t, u in zip(v.tags, o.tags, strict=True):
                a.unify(t, u)
            zero = tuple((x or v.scalar == 0) and (y or o.scalar == 0) for x, y in zip(v.zero, o.zero, strict=True))
            scalar = v.scalar if v.scalar == o.scalar else None
            if zero != v.zero or scalar != v.scalar:
                changed = True
                carry[i] = Val(v.shape, v.dtype, v.tags, zero, scalar)
        if not changed:
            return carry, outs


def _scan_parts(eqn: Eqn) -> tuple[int, int]:
    """(end of the constants, end of the carry) among the operands.

    Counted from the ranks, since jax changed how the parameters say it: the stacked operands and results, and only
    they, have one axis more outside the body than inside.
    """
    body = eqn.params["jaxpr"]
    body = getattr(body, "jaxpr", body)
    assert len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    stacked = sum(len(v.aval.shape) != len(w.aval.shape) for v, w in zip(eqn.invars, body.invars, strict=True))
    carried = sum(len(v.aval.shape) == len(w.aval.shape) for v, w in zip(eqn.outvars, body.outvars, strict=True))
    return len(eqn.invars) - stacked - carried, len(eqn.invars) - stacked


def _scan(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    nc, nk = _scan_parts(eqn)
    length = eqn.params["length"]
    path = a.path
    layer = a.scan_of.get(path)
    if layer is None:
        layer = T.Atom(length, Frozen("SCAN_LENGTH", "", a.where), scan=len(a.scan_of))
        for v in vals[nk:]:
            t = T.norm(v.tags[0])
            if len(t) == 1 and isinstance(t[0], T.Atom) and t[0].scan is not None:
                layer = t[0]
                break
        a.scan_of[path] = layer
    axis = (layer,) if length != 1 else ()
    xs = []
    for v in vals[nk:]:
        t = T.norm(v.tags[0])
        if length != 1 and len(t) == 1 and isinstance(t[0], T.Atom) and (t[0].reason is None or t[0].scan is not None):
            refine.unify(axis, t)
        else:
            a.freeze(t, "SCAN_LENGTH")
        xs.append(Val(v.shape[1:], v.dtype, v.tags[1:], v.zero[1:], v.scalar, v.leaf, moves=(*v.moves, LAYERS)))
    consts = vals[:nc]
    _, outs = _fixpoint(a, vals[nc:nk], lambda c: a.run_closed(eqn.params["jaxpr"], [*consts, *c, *xs], "body"))
    results = [Val(v.shape, v.dtype, v.tags, v.zero, v.scalar) for v in outs[: nk - nc]]
    for var, y in zip(eqn.outvars[nk - nc :], outs[nk - nc :], strict=True):
        results.append(a.value(var.aval, [axis, *y.tags], [False, *y.zero], scalar=y.scalar))
    return results


def _eval_scan(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    nc, nk = _scan_parts(eqn)
    symbol = ev.scan_symbols.get(path)
    consts, carry, xs = args[:nc], list(args[nc:nk]), args[nk:]
    carried, stacked = ev.states_below(path)

    def one(ev: Evaluator, carry: list[Any], xs: Sequence[Any], length: int, states: Any) -> Any:
        def body(c: Any, x: Any) -> Any:
            inner = ev.with_states({**c[1], **x[1]})
            outs = inner.run(eqn.params["jaxpr"], (), [*consts, *c[0], *x[0]], (*path, "body"))
            return (
                (outs[: nk - nc], {k: inner.states[k] for k in c[1]}),
                (outs[nk - nc :], {k: inner.states[k] for k in x[1]}),
            )

        p = eqn.params
        return lax.scan(
            body,
            (carry, states[0]),
            (list(xs), states[1]),
            length=length,
            reverse=p["reverse"],
            unroll=p["unroll"] if length == p["length"] else 1,
        )

    if symbol is None or symbol not in ev.segments:
        (carry, carried), (ys, stacked) = one(ev, carry, xs, eqn.params["length"], (carried, stacked))
        ev.states.update(carried)
        ev.states.update(stacked)
        return [*carry, *ys]
    assert ev.layouts is not None
    _, outs = ev.layouts(path)
    runs = list(range(len(ev.segments[symbol])))
    if eqn.params["reverse"]:
        runs.reverse()
    results = {}
    for j in runs:
        lo, hi, _ = ev.segments[symbol][j]
        part = [ev.rows_of(symbol, x, j) for x in xs]
        (carry, _), (results[j], _) = one(ev.segment(symbol, j), carry, part, hi - lo, ({}, {}))
    ys = [
        ev.join(symbol, [results[j][k] for j in sorted(results)], outs[nk - nc + k])
        for k in range(len(eqn.outvars) - (nk - nc))
    ]
    return [*carry, *ys]


def _while(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    p = eqn.params
    cn, bn = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = vals[:cn], vals[cn : cn + bn], vals[cn + bn :]
    carry, _ = _fixpoint(a, init, lambda c: a.run_closed(p["body_jaxpr"], [*body_consts, *c], "body"))
    a.run_closed(p["cond_jaxpr"], [*cond_consts, *carry], "cond")
    return carry


def _eval_while(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    p = eqn.params
    cn, bn = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = args[:cn], args[cn : cn + bn], args[cn + bn :]
    carried, stacked = ev.states_below(path)

    def body(c: Any) -> Any:
        inner = ev.with_states(c[1])
        outs = inner.run(p["body_jaxpr"], (), [*body_consts, *c[0]], (*path, "body"))
        return outs, {k: inner.states[k] for k in c[1]}

    def cond(c: Any) -> Any:
        return ev.with_states({}).run(p["cond_jaxpr"], (), [*cond_consts, *c[0]], (*path, "cond"))[0]

    outs, states = lax.while_loop(cond, body, (init, {**carried, **stacked}))
    ev.states.update(states)
    return outs


def _cond(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    results = [a.run_closed(branch, vals[1:], f"branch{i}") for i, branch in enumerate(eqn.params["branches"])]
    outs = []
    for k, first in enumerate(results[0]):
        others = [r[k] for r in results[1:]]
        for o in others:
            for t, u in zip(first.tags, o.tags, strict=True):
                a.unify(t, u)
        every = [first, *others]
        zero = tuple(all(v.zero[i] or v.scalar == 0 for v in every) for i in range(len(first.shape)))
        scalar = first.scalar if all(v.scalar == first.scalar for v in others) else None
        outs.append(Val(first.shape, first.dtype, first.tags, zero, scalar))
    return outs


def _eval_cond(ev: Evaluator, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
    carried, stacked = ev.states_below(path)

    def run(i: int, branch: Any) -> Callable[..., Any]:
        def body(args: list[Any], states: dict[str, Any]) -> Any:
            inner = ev.with_states(states)
            outs = inner.run(branch, (), args, (*path, f"branch{i}"))
            return outs, {k: inner.states[k] for k in states}

        return body

    branches = [run(i, b) for i, b in enumerate(eqn.params["branches"])]
    outs, states = lax.switch(args[0], branches, args[1:], {**carried, **stacked})
    ev.states.update(states)
    return outs


RULES: dict[str, Rule] = {
    **{name: Rule(_call(_inner(p)), evaluate=_eval_call(_inner(p))) for name, p in CALLS.items()},
    **{name: Rule(_call(_inner("jaxpr")), evaluate=_eval_remat) for name in REMAT},
    "custom_jvp_call": Rule(_custom_jvp, evaluate=_eval_custom_jvp),
    "custom_vjp_call": Rule(_custom_vjp, evaluate=_eval_custom_vjp),
    "scan": Rule(_scan, evaluate=_eval_scan),
    "while": Rule(_while, evaluate=_eval_while),
    "cond": Rule(_cond, evaluate=_eval_cond),
}
