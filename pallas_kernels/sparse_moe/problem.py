"""One mixture-of-experts layer as its implementations get it: what is static about it, and the checks that make it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.common.xla import accumulator, gates


class MoEError(ValueError):
    """Arguments of a mixture of experts that do not fit together."""


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known while a program is traced.

    Attributes:
      tile: tokens that are computed together; None: what suits the device. trained: whether gradients are to be possible.
      interpret: as kernels get it; false: on the device. save_hidden: whether x @ up is kept for the gradients.
    """

    tile: int | None = None
    trained: bool = True
    interpret: Any = False
    save_hidden: bool = False


def checked(x: Any, scores: Any, active: Any, up: Any, down: Any) -> tuple[Any, Any, Any, Any, Any]:
    """The arrays of a layer, with 0 for the scores of pairs that are not active, whatever lies there.

    Raises:
      MoEError: shapes or dtypes that do not fit together.
    """
    x, scores, active, up, down = map(jnp.asarray, (x, scores, active, up, down))
    axes = {"x": (x, 2), "scores": (scores, 2), "active": (active, 2), "up": (up, 3), "down": (down, 3)}
    for name, (array, wanted) in axes.items():
        if array.ndim != wanted or 0 in array.shape:
            raise MoEError(f"{name} has shape {array.shape}: wanted {wanted} axes, none empty (x: tokens, width; scores and "
                           "active: tokens, experts; up: experts, width, hidden; down: experts, hidden, width)")  # fmt: skip
    (tokens, width), (experts, _, hidden) = x.shape, up.shape
    for name, array, shape in (
        ("up", up, (experts, width, hidden)),
        ("down", down, (experts, hidden, width)),
        ("scores", scores, (tokens, experts)),
        ("active", active, (tokens, experts)),
    ):
        if array.shape != shape:
            raise MoEError(f"{name} has shape {array.shape}: wanted {shape} with x {x.shape} and up {up.shape}")
    if not x.dtype == up.dtype == down.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise MoEError(f"x, up and down are {x.dtype}, {up.dtype}, {down.dtype}: wanted one floating type")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise MoEError(f"scores are {scores.dtype}: wanted a floating type")
    if active.dtype != jnp.bool_:
        raise MoEError(f"active is {active.dtype}: wanted bool, of a ReLU router's pattern `pattern > 0`")
    return x, jnp.where(active, scores.astype(accumulator(x)), 0), active, up, down


def weighted(h: Any, score: Any) -> Any:
    """score * silu(h), exactly 0 where the score is, whatever h is there; scores (tokens, 1)."""
    return jnp.where(score != 0, gates(h)[0] * score, 0)
