"""Reductions, scans along an axis, orderings and windows."""

from __future__ import annotations

from collections.abc import Callable

from jprune.trace import tags as T
from jprune.trace.analysis import DIVISOR, Analysis, Eqn, Rule, Val


def _reduce(sums: bool) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        v, axes = vals[0], eqn.params["axes"]
        name = eqn.primitive.name
        for i in axes:
            T.stiffen(v.tags[i])
            if not sums:
                a.inexact(v.tags[i], f"{name} over removed positions")
            else:
                if not v.zero[i] and v.scalar != 0:
                    a.inexact(v.tags[i], f"{name} over values that are not zero at removed positions")
                a.inexact(v.tags[i], f"{DIVISOR} {name}")
        keep = [i for i in range(len(v.shape)) if i not in axes]
        return [
            a.value(
                eqn.outvars[0].aval,
                [v.tags[i] for i in keep],
                [v.zero[i] for i in keep],
                scalar=0.0 if v.scalar == 0 else None,
            )
        ]

    return propagate


def _axis_mixing(axes_of: Callable[[Eqn], tuple[int, ...]]) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    """Freeze the operated axes; the others are carried and shared by all operands and results."""

    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        axes = {i % len(vals[0].shape) for i in axes_of(eqn)}
        for v in vals:
            for i in axes:
                a.freeze(v.tags[i], "ORDER_OR_MIX", eqn.primitive.name)
        for v in vals[1:]:
            for i in range(len(v.shape)):
                a.unify(vals[0].tags[i], v.tags[i])
        outs = []
        for var in eqn.outvars:
            aval = var.aval
            if len(aval.shape) == len(vals[0].shape):
                tags = [
                    a.fixed(n, "ORDER_OR_MIX", eqn.primitive.name)
                    if i in axes and n != vals[0].shape[i]
                    else vals[0].tags[i]
                    for i, n in enumerate(aval.shape)
                ]
            else:  # the operated axes are gone (argmax, reduce_and, ...)
                tags = [t for i, t in enumerate(vals[0].tags) if i not in axes]
            outs.append(a.value(aval, tags))
        return outs

    return propagate


def _last_axes(count: int) -> Callable[[Eqn], tuple[int, ...]]:
    return lambda eqn: tuple(range(-count, 0))


def _window(dims_of: Callable[[Eqn], list[bool]]) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        v, untouched = vals[0], dims_of(eqn)
        outs = []
        for var in eqn.outvars:
            tags, zero = [], []
            for i, n in enumerate(var.aval.shape):
                if untouched[i]:
                    tags.append(v.tags[i])
                    zero.append(v.zero[i])
                else:
                    a.freeze(v.tags[i], "WINDOW_AXIS")
                    tags.append(a.fixed(n, "WINDOW_AXIS"))
                    zero.append(False)
            outs.append(a.value(var.aval, tags, zero))
        return outs

    return propagate


def _untouched(eqn: Eqn) -> list[bool]:
    p = eqn.params
    ones = (1,) * len(p["window_dimensions"])
    return [
        w == 1 and s == 1 and tuple(pad) == (0, 0) and b == 1
        for w, s, pad, b in zip(
            p["window_dimensions"], p["window_strides"], p["padding"], p.get("base_dilation") or ones, strict=True
        )
    ]


RULES: dict[str, Rule] = {
    "reduce_sum": Rule(_reduce(sums=True)),
    "reduce_max": Rule(_reduce(sums=False)),
    "reduce_min": Rule(_reduce(sums=False)),
    **{
        name: Rule(_axis_mixing(lambda e: tuple(e.params["axes"])))
        for name in ("reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin")
    },
    **{
        name: Rule(_axis_mixing(lambda e: (e.params["axis"],)))
        for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    },
    "sort": Rule(_axis_mixing(lambda e: (e.params["dimension"],))),
    "top_k": Rule(_axis_mixing(_last_axes(1))),
    "approx_top_k": Rule(_axis_mixing(lambda e: (e.params["reduction_dimension"],))),
    "fft": Rule(_axis_mixing(lambda e: tuple(range(-len(e.params["fft_lengths"]), 0)))),
    **{name: Rule(_window(_untouched)) for name in ("reduce_window_sum", "reduce_window_max", "reduce_window_min")},
}
