"""Elementwise primitives: operands are tied axis by axis; what differs is only where a zero stays a zero."""

from __future__ import annotations

from collections.abc import Callable

from jprune.tracing.primitives import SAME
from jprune.tracing.walk import Analysis, Eqn, Rule, Val

Flags = list[bool]
ZeroRule = Callable[[Eqn, list[Val], Flags], bool]


def _any(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return any(flags)


def _all(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return all(flags)


def _never(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return False


def _first(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return flags[0]


def _max(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    x, y = vals
    return all(flags) or (flags[0] and _at_most_zero(y)) or (flags[1] and _at_most_zero(x))


def _min(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    x, y = vals
    return all(flags) or (flags[0] and _at_least_zero(y)) or (flags[1] and _at_least_zero(x))


def _clamp(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return flags[1] and _at_most_zero(vals[0]) and _at_least_zero(vals[2])


def _select(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return all(flags[1:])


def _positive_power(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return flags[0] and eqn.params["y"] > 0


def _pow(eqn: Eqn, vals: list[Val], flags: Flags) -> bool:
    return flags[0] and vals[1].scalar is not None and vals[1].scalar > 0


def _at_most_zero(v: Val) -> bool:
    return v.scalar is not None and v.scalar <= 0


def _at_least_zero(v: Val) -> bool:
    return v.scalar is not None and v.scalar >= 0


ROLES = {"mul": "scale", "div": "scale", "add": "shift", "sub": "shift", "add_any": "shift"}


def _elementwise(zero_rule: ZeroRule) -> Callable[[Analysis, Eqn, list[Val]], list[Val]]:
    def propagate(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
        outs = []
        for var in eqn.outvars:
            shape = var.aval.shape
            tags, zero = [], []
            for axis, n in enumerate(shape):
                tag, flags = None, []
                for v in vals:
                    has = bool(v.shape) and v.shape[axis] == n  # others are broadcast along this axis
                    if has and tag is None:
                        tag = v.tags[axis]
                    elif has and tag is not None and v.tags[axis] is not tag:
                        a.unify(tag, v.tags[axis])
                    flags.append(has and v.zero[axis] if v.scalar is None else v.scalar == 0)
                tags.append(a.fresh(n) if tag is None else tag)
                zero.append(zero_rule(eqn, vals, flags))
            outs.append(a.value(var.aval, tags, zero))
        _record_use(a, eqn, vals)
        if len(vals) == 1 and len(outs) == 1:
            v = vals[0]
            if v.scalar == 0 and zero_rule(eqn, vals, [True]):
                outs[0].scalar = 0.0
        elif eqn.primitive.name == "mul" and any(v.scalar == 0 for v in vals):
            outs[0].scalar = 0.0
        return outs

    return propagate


def _record_use(a: Analysis, eqn: Eqn, vals: list[Val]) -> None:
    role = ROLES.get(eqn.primitive.name)
    if role is None or len(vals) != 2:
        return
    for i, v in enumerate(vals):
        other = vals[1 - i]
        if v.leaf is not None and other.leaf is None and other.scalar is None and other.shape:
            features = [k for k, n in enumerate(v.shape) if n > 1]
            a.use(vals, i, 1 - i, role, (), features, features)


def _same_entries(a: Analysis, eqn: Eqn, vals: list[Val]) -> list[Val]:
    """Casts, copies, layout constraints: the entries are the operand's own."""
    return [
        a.value(var.aval, v.tags, v.zero, scalar=v.scalar, leaf=v.leaf)
        for var, v in zip(eqn.outvars, vals, strict=True)
    ]


ZERO_STAYS = (
    "neg abs sign sqrt cbrt tanh tan sin sinh asin asinh atan atanh erf erf_inv expm1 log1p floor ceil round square "
    "real imag conj"
)
ZERO_LOST = (
    "exp exp2 log cos cosh acos acosh logistic rsqrt erfc lgamma digamma is_finite not bessel_i0e bessel_i1e "
    "population_count clz eq ne lt le gt ge eq_to le_to lt_to nextafter complex igamma igammac zeta polygamma "
    "regularized_incomplete_beta igamma_grad_a random_gamma bitcast_convert_type"
)
RULES: dict[str, Rule] = {
    **{name: Rule(_elementwise(_first)) for name in ZERO_STAYS.split()},
    **{name: Rule(_elementwise(_never)) for name in ZERO_LOST.split()},
    **{name: Rule(_same_entries) for name in SAME},
    **{name: Rule(_elementwise(_all)) for name in ("add", "sub", "add_any", "or", "xor", "atan2")},
    **{name: Rule(_elementwise(_any)) for name in ("mul", "and")},
    **{
        name: Rule(_elementwise(_first))
        for name in ("div", "rem", "shift_left", "shift_right_logical", "shift_right_arithmetic")
    },
    "max": Rule(_elementwise(_max)),
    "min": Rule(_elementwise(_min)),
    "clamp": Rule(_elementwise(_clamp)),
    "select_n": Rule(_elementwise(_select)),
    "integer_pow": Rule(_elementwise(_positive_power)),
    "pow": Rule(_elementwise(_pow)),
}
