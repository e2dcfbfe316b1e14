"""One contract for everything that can be trained: linen modules, apply-like functions, replayed functions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model as training sees it.

    train(variables, x, key) -> (logits, updates): `updates` maps collections ("batch_stats") to their new values; two
    names are no collections: "losses" {name: scalar} is added to the loss and "metrics" {name: scalar} is logged.
    evaluate(variables, x) -> logits; `casts` says whether parameters and inputs may be given in another float dtype.
    """

    train: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Mapping[str, Any]]]
    evaluate: Callable[[Any, jax.Array], jax.Array]
    casts: bool = True


def as_forward(model: Any) -> Forward:
    """The Forward of a linen module or its `apply`, of apply(variables, x, train=, mutable=), or of fn(variables, x).

    A function without a `train` argument (such as a replayed one) is taken as it is in both modes: a BatchNorm
    inside keeps the statistics it was traced with.
    """
    if isinstance(model, Forward):
        return model
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(model, "__name__", "") == "apply":
        model = owner
    if isinstance(model, nn.Module):
        try:
            return _cached_of_module(model)
        except TypeError:  # a field such as a list does not hash; the module still works, only the cache is lost
            return _of_module(model)
    if not callable(model):
        raise ValueError(
            f"cannot train a {type(model).__name__}: give a linen module, a function "
            "apply(variables, x, train=, mutable=) or a function fn(variables, x)"
        )
    try:
        return _of_function(model)
    except TypeError as error:
        raise ValueError(f"cannot read the signature of {model!r}: wrap it as fn(variables, x)") from error


def split_variables(variables: Any) -> tuple[Any, dict[str, Any]]:
    """(params, other collections); a tree without a "params" collection is all parameters."""
    if isinstance(variables, Mapping) and "params" in variables:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}
    return variables, {}


def join_variables(like: Any, params: Any, rest: Mapping[str, Any]) -> Any:
    """The inverse of `split_variables`, in the form that `like` has."""
    if isinstance(like, Mapping) and "params" in like:
        return {k: params if k == "params" else rest[k] for k in like}
    return params


def _collections(variables: Any) -> list[str]:
    return list(split_variables(variables)[1])


def _of_module(module: nn.Module) -> Forward:
    has_mode = "train" in inspect.signature(type(module).__call__).parameters
    on: dict[str, Any] = {"train": True} if has_mode else {}
    off: dict[str, Any] = {"train": False} if has_mode else {}

    def train(variables: Any, x: jax.Array, key: jax.Array) -> Any:
        return module.apply(variables, x, mutable=_collections(variables), rngs={"dropout": key}, **on)

    def evaluate(variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, **off)

    return Forward(train, evaluate)


_cached_of_module = functools.lru_cache(maxsize=64)(_of_module)


@functools.lru_cache(maxsize=64)
def _of_function(fn: Callable[..., Any]) -> Forward:
    parameters = inspect.signature(fn).parameters
    takes_anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "train" not in parameters:
        return Forward(lambda variables, x, key: (fn(variables, x), {}), fn, casts=False)
    takes_rngs = takes_anything or "rngs" in parameters
    if not takes_anything and "mutable" not in parameters:
        raise ValueError(f"{fn!r} takes train= but not mutable=: BatchNorm statistics would be lost; add mutable=")

    def train(variables, x, key):
        rngs = {"rngs": {"dropout": key}} if takes_rngs else {}
        return fn(variables, x, train=True, mutable=_collections(variables), **rngs)

    def evaluate(variables, x):
        return fn(variables, x, train=False, mutable=False)

    return Forward(train, evaluate)
