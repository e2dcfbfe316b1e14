"""Whether a traced function is the same program at other sizes of its inputs' free axes.

The jaxpr of a function holds whatever Python made of a size: a mean written by hand divides by the number 32 that the
batch happened to have. Nothing in the jaxpr tells this 32 from another. So the function is traced again at the new
sizes, and both jaxprs are compared equation by equation: what replay would make of the first must be the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from jprune.tracing import layout as L
from jprune.tracing.evaluate import Layouts, Sizes, resized
from jprune.tracing.walk import Analysis, Eqn, Path, user_line


def difference(first: Analysis, second: Analysis, layouts: Layouts, symbols: Mapping[str, int]) -> str | None:
    """What of `first`, rewritten for these sizes, is not `second`: a description with the source line, or None.

    Args:
      first, second: walks over the function at the traced and at the new sizes.
      layouts: axis layouts of operands and results of the first, by call path.
      symbols: the new sizes.
    """
    needed: dict[tuple[Path, int], None] = {}  # folded constants that meet values which are not
    for path, (jaxpr, consts) in first.bodies.items():
        if path not in second.bodies:
            return f"the call {'/'.join(map(str, path))} is made at one of the sizes only"
        other, other_consts = second.bodies[path]
        if any(
            len(a) != len(b)
            for a, b in ((jaxpr.eqns, other.eqns), (jaxpr.outvars, other.outvars), (consts, other_consts))
        ):
            return "more or fewer operations are made"
        known = [dict(zip((*j.constvars, *j.invars), range(len(j.invars) + len(j.constvars)))) for j in (jaxpr, other)]
        for a, b in zip(consts, other_consts, strict=True):
            if not _same(a, b):
                return f"a constant array of shape {np.shape(a)} is another, of shape {np.shape(b)}"
        for i, (eqn, new) in enumerate(zip(jaxpr.eqns, other.eqns, strict=True)):
            if (*path, i) not in first.folded:
                found = _equation((*path, i), eqn, new, known, first, layouts, symbols)
                if found is not None:
                    where = user_line(eqn)
                    return f"{found} at {where}" if where else found
                needed |= dict.fromkeys(_folded_operands(eqn.invars, path, known[0], first))
            for seen, e in zip(known, (eqn, new), strict=True):
                seen.update({v: (i, k) for k, v in enumerate(e.outvars)})
        needed |= dict.fromkeys(_folded_operands(jaxpr.outvars, path, known[0], first))
        returned = [[_operand(v, seen) for v in j.outvars] for j, seen in zip((jaxpr, other), known, strict=True)]
        if not _same(*returned):
            return "other values are returned"
    for path, k in needed:
        fitted = resized(np.asarray(first.folded[path][k].const), layouts(path)[1][k], symbols)
        if path not in second.folded or not _same(fitted, np.asarray(second.folded[path][k].const)):
            return f"a folded constant changes along an axis of the input, at {user_line(first.eqns[path])}"
    return None


def _folded_operands(
    operands: Sequence[Any], path: Path, known: Mapping[Any, Any], analysis: Analysis
) -> Iterator[tuple[Path, int]]:
    for v in operands:
        made = None if isinstance(v, jex.Literal) else known[v]
        if isinstance(made, tuple) and (*path, made[0]) in analysis.folded:
            yield (*path, made[0]), made[1]


def _equation(
    path: Path,
    eqn: Eqn,
    new: Eqn,
    known: Sequence[Mapping[Any, Any]],
    analysis: Analysis,
    layouts: Layouts,
    symbols: Mapping[str, int],
) -> str | None:
    name = eqn.primitive.name
    if name != new.primitive.name:
        return f"{name} becomes {new.primitive.name}"
    if len(eqn.invars) != len(new.invars):
        return f"{name} takes {len(new.invars)} operands instead of {len(eqn.invars)}"
    for v, w in zip(eqn.invars, new.invars, strict=True):
        a, b = _operand(v, known[0]), _operand(w, known[1])
        if not _same(a, b):
            if isinstance(v, jex.Literal) and isinstance(w, jex.Literal):
                return f"the number {_short(v.val)} becomes {_short(w.val)} in {name}"
            return f"{name} has other operands"
    ins, outs = layouts(path)
    for lay, w in zip(outs, new.outvars, strict=True):
        predicted = tuple(int(L.width(axis, symbols)) for axis in lay)
        if predicted != tuple(w.aval.shape):
            return f"{name} makes shape {tuple(w.aval.shape)}, not {predicted}"
    rule = analysis.rules.get(name)
    params = eqn.params
    if rule is not None and rule.rewrite is not None:
        operands = [v.val if isinstance(v, jex.Literal) else v.aval for v in new.invars]
        shapes = [jax.ShapeDtypeStruct(np.shape(x), v.aval.dtype) for x, v in zip(operands, new.invars, strict=True)]
        params = rule.rewrite(eqn, Sizes((ins, outs), symbols, shapes, eqn))
    for key, value in params.items():  # the precision is a matter of the configuration around a call, not of sizes
        if key != "precision" and key in new.params and not _same(value, new.params[key]):
            return f"the {key} of {name} changes from {_short(value)} to {_short(new.params[key])}"
    return None


def _operand(v: Any, known: Mapping[Any, Any]) -> Any:
    return np.asarray(v.val) if isinstance(v, jex.Literal) else known[v]


def _same(a: Any, b: Any) -> bool:
    """Equality of plain data and arrays; jaxprs are compared as bodies of their own, and functions have no equality."""
    if a is b:
        return True
    a, b = (x.item() if isinstance(x, np.integer | np.bool_) else x for x in (a, b))
    if isinstance(a, ARRAYS) or isinstance(b, ARRAYS):
        return _same_arrays(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float | complex | str | bytes | bool | type(None) | np.dtype):
        return type(a) is type(b) and (a == b or a != a)
    return True


ARRAYS = (np.ndarray, np.generic, jax.Array)


def _same_arrays(a: Any, b: Any) -> bool:
    """Equality to the bit; values that another trace holds are equal only if they are the same object."""
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    if np.shape(a) != np.shape(b) or getattr(a, "dtype", None) != getattr(b, "dtype", None):
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.extended):
        return bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
