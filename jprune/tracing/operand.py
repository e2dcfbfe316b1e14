"""From a leaf to the operand that an equation uses, and back: the transposes, reshapes and cuts in between.

A kernel may be stored transposed, flat, fused with others or stacked over layers on any axis. Whoever looks at the
matrix that meets the data, or adds something to it, replays those steps on an array of the leaf's shape, in any dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from jprune.tracing.primitives import SAME
from jprune.tracing.walk import LAYERS, Move

Moves: TypeAlias = Sequence[Move]

MOVED = ("transpose", "reshape", "squeeze", "expand_dims", "rev", "slice", "split", "broadcast_in_dim")


def check(moves: Moves, layers: int | None) -> str:
    """Why these steps cannot be undone; "" if they can."""
    if sum(m is LAYERS for m in moves) != (layers is not None):
        return "it is used in a loop whose layers cannot be told apart (nested loops, or a loop of one step)"
    for m in moves:
        if m is LAYERS:
            continue
        eqn, _ = m
        name = eqn.primitive.name
        grows = name == "broadcast_in_dim" and eqn.outvars[0].aval.size != eqn.invars[0].aval.size
        if name not in (*SAME, *MOVED) or grows:
            return f"between the leaf and its use lies {name}"
    return ""


def operand(moves: Moves, leaf: Any) -> Any:
    """The equation's operand of an array like the leaf; with a leading axis over layers where the leaf is stacked."""
    x = leaf
    for i, m in enumerate(moves):
        if m is LAYERS:
            return jax.vmap(functools.partial(operand, moves[i + 1 :]))(x)
        eqn, k = m
        if eqn.primitive.name not in SAME:
            out = eqn.primitive.bind(x, **eqn.params)
            x = out[k] if eqn.primitive.multiple_results else out
    return x


def split(moves: Moves) -> tuple[Moves, Moves]:
    """The steps before and behind the entry into a scan; without one, none before."""
    at = next((i for i, m in enumerate(moves) if m is LAYERS), -1)
    return moves[: max(at, 0)], moves[at + 1 :]


def leaf_like(moves: Moves, x: Any, shape: tuple[int, ...]) -> Any:
    """The array of the leaf's shape whose operand is `x`; zero where the leaf does not enter the operand."""
    if all(m is LAYERS or m[0].primitive.name in SAME for m in moves):
        return x
    return jax.linear_transpose(functools.partial(operand, moves), jax.ShapeDtypeStruct(shape, x.dtype))(x)[0]
