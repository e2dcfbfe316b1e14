"""The jaxpr of a function, which jax makes only once where the function cannot have changed since."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from jprune.tracing.errors import TraceError

REMEMBERED = 32  # methods whose jaxprs are kept


def jaxpr_of(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> tuple[Any, list[bool], Any]:
    """(closed jaxpr without dead code, which of its arguments are left, shapes of the outputs) of fn(params, *inputs).

    jax remembers the jaxpr of a function object per shapes, types, tree structures and configuration. That is used for
    methods of immutable modules (`module.apply` of a Flax linen module, also within `functools.partial`) and for what
    is already jitted. Any other function may read a variable that has changed since: its Python code runs again.
    """
    try:
        closed, out_shape = jax.make_jaxpr(_one_object(fn), return_shape=True)(params, *inputs)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.UnexpectedTracerError,
    ) as e:
        raise TraceError(
            "the function cannot be traced: it needs concrete values of its arguments "
            f"({str(e).splitlines()[0]}); close over static arguments instead of passing them"
        ) from e
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return type(closed)(jaxpr, closed.consts), list(used), out_shape


def _one_object(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same object for every equal method of an immutable module; a new one for any other function."""
    method, args, settings = (fn.func, fn.args, fn.keywords) if isinstance(fn, functools.partial) else (fn, (), {})
    if isinstance(method, types.MethodType) and all(map(_is_fixed, (method.__self__, *args, *settings.values()))):
        with contextlib.suppress(TypeError):  # a setting that has no hash
            return _kept(repr((args, settings)), method, *args, **settings)
    return lambda *xs: fn(*xs)


@functools.lru_cache(maxsize=REMEMBERED, typed=True)
def _kept(text: str, method: Callable[..., Any], *args: Any, **settings: Any) -> Callable[..., Any]:
    """A method with its settings as one object: jax knows functions by identity, and every `module.apply` is a new one.

    The settings' text tells apart what is equal in Python and not in jax: 1 and True, 0.0 and -0.0.
    """
    return functools.partial(method, *args, **settings)


def _is_fixed(x: Any) -> bool:
    """Whether nothing in `x` can be assigned to: modules, plain data, and functions, which jax takes to be pure."""
    if x is None or isinstance(x, PLAIN):
        return True
    if isinstance(x, tuple | frozenset):
        return all(map(_is_fixed, x))
    if dataclasses.is_dataclass(x):
        linen = sys.modules.get("flax.linen")
        frozen = x.__dataclass_params__.frozen or (linen is not None and isinstance(x, linen.Module))  # pyright: ignore[reportAttributeAccessIssue]
        return frozen and all(_is_fixed(getattr(x, f.name, None)) for f in dataclasses.fields(x))
    return False


PLAIN = (
    str, bytes, bool, int, float, complex, np.dtype, np.generic, enum.Enum, type, types.FunctionType,
    types.BuiltinFunctionType, jax.custom_jvp, jax.custom_vjp, jax.stages.Wrapped,
)  # fmt: skip
