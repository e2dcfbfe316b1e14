"""Reductions, scans along an axis, orderings and windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jprune.tracing import tags as T
from jprune.tracing.walk import DIVISOR, Analysis, Eqn, Rule, Val


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
        stays = sums or all(v.shape[i] for i in axes)  # of nothing the largest entry is minus infinity
        return [
            a.value(
                eqn.outvars[0].aval,
                [v.tags[i] for i in keep],
                [v.zero[i] and stays for i in keep],
                scalar=0.0 if v.scalar == 0 and stays else None,
            )
        ]

    return propagate


def _axis_mixing(
    axes_of: Callable[[Eqn], tuple[int, ...]], zero_stays: Callable[[int], bool] = lambda k: False
) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    """Freeze the operated axes; the others are carried and shared by all operands and results.

    `zero_stays(k)`: whether result k is 0 where all of the operated axes of operand k (of the only one) is 0.
    """

    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        axes = {i % len(vals[0].shape) for i in axes_of(eqn)}
        for v in vals:
            for i in axes:
                a.freeze(v.tags[i], "ORDER_OR_MIX", eqn.primitive.name)
        for v in vals[1:]:
            for i in range(len(v.shape)):
                a.unify(vals[0].tags[i], v.tags[i])
        outs = []
        for k, var in enumerate(eqn.outvars):
            aval, v = var.aval, vals[min(k, len(vals) - 1)]
            stays = zero_stays(k) and 0 not in v.shape
            if len(aval.shape) == len(vals[0].shape):
                zero = [z and stays and i not in axes for i, z in enumerate(v.zero)]
                tags = [
                    a.fixed(n, "ORDER_OR_MIX", eqn.primitive.name)
                    if i in axes and n != vals[0].shape[i]
                    else vals[0].tags[i]
                    for i, n in enumerate(aval.shape)
                ]
            else:  # the operated axes are gone (argmax, reduce_and, ...)
                tags = [t for i, t in enumerate(vals[0].tags) if i not in axes]
                zero = [z and stays for i, z in enumerate(v.zero) if i not in axes]
            outs.append(a.value(aval, tags, zero))
        return outs

    return propagate


def _window(sums: bool) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        v, untouched = vals[0], _untouched(eqn)
        stays = sums or _no_window_is_empty(eqn)
        outs = []
        for var in eqn.outvars:
            tags, zero = [], []
            for i, n in enumerate(var.aval.shape):
                if untouched[i]:
                    tags.append(v.tags[i])
                    zero.append(v.zero[i] and stays)
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


def _no_window_is_empty(eqn: Eqn) -> bool:
    """Whether every window meets an entry: the largest (smallest) of a window of padding alone is not 0."""
    p = eqn.params
    ones = (1,) * len(p["window_dimensions"])
    for n, m, w, stride, (lo, _), base, gap in zip(
        eqn.invars[0].aval.shape,
        eqn.outvars[0].aval.shape,
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p.get("base_dilation") or ones,
        p.get("window_dilation") or ones,
        strict=True,
    ):
        at = np.arange(m)[:, None] * stride - lo + np.arange(w) * gap
        if not ((at >= 0) & (at < n * base) & (at % base == 0)).any(axis=1).all():
            return False
    return True


def _all_results(k: int) -> bool:
    return True


def _values(k: int) -> bool:
    """The largest entries, but not where they stood."""
    return k == 0


RULES: dict[str, Rule] = {
    "reduce_sum": Rule(_reduce(sums=True)),
    "reduce_max": Rule(_reduce(sums=False)),
    "reduce_min": Rule(_reduce(sums=False)),
    **{
        name: Rule(_axis_mixing(lambda e: tuple(e.params["axes"]), _all_results))
        for name in ("reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
    },
    **{name: Rule(_axis_mixing(lambda e: tuple(e.params["axes"]))) for name in ("argmax", "argmin")},
    **{
        name: Rule(_axis_mixing(lambda e: (e.params["axis"],), _all_results))
        for name in ("cumsum", "cumprod", "cummax", "cummin")
    },
    "cumlogsumexp": Rule(_axis_mixing(lambda e: (e.params["axis"],))),
    "sort": Rule(_axis_mixing(lambda e: (e.params["dimension"],), _all_results)),
    "top_k": Rule(_axis_mixing(lambda e: (e.params.get("axis", -1),), _values)),
    "approx_top_k": Rule(_axis_mixing(lambda e: (e.params["reduction_dimension"],), _values)),
    "fft": Rule(_axis_mixing(lambda e: tuple(range(-len(e.params["fft_lengths"]), 0)), _all_results)),
    "reduce_window_sum": Rule(_window(sums=True)),
    "reduce_window_max": Rule(_window(sums=False)),
    "reduce_window_min": Rule(_window(sums=False)),
}
