"""Fewer tokens behind some layer of a decoder: which go on, and what goes on with them.

Those that were dropped stay in the caches of the layers before, so that a prompt that loses tokens has one cache per stretch
of layers (`jprune.models.decoding.new_caches`). Positions stay those of the whole prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Drop:
    """Behind some layer fewer tokens go on.

    Attributes:
      layer: how many layers see all of them.
      kept: how many tokens of each row go on.
      pick: (stream (batch, tokens, stream), attention of the last token (batch, heads, tokens) float32 or None) -> places
        (batch, kept), ascending.
      reads_attention: whether `pick` is given that attention, of the layer just before.
    """

    layer: int
    kept: int
    pick: Callable[[Any, Any], Any]
    reads_attention: bool = False


def ends_of(depth: int, caches: Sequence[Any], drops: Sequence[Drop]) -> list[int]:
    """The layers at which stretches end, of as many caches (or of one None).

    Raises:
      ValueError: drops out of order or behind no layer, caches that end elsewhere.
    """
    layers = [d.layer for d in drops]
    if layers != sorted(set(layers)) or any(not 0 < n < depth for n in layers):
        raise ValueError(
            f"drops behind the layers {layers} of {depth}: give different ones from 1 to {depth - 1}, ascending"
        )
    if caches[0] is None:
        return [*layers, depth]
    ends = np.cumsum([len(cache.k) for cache in caches]).tolist()
    if ends[-1] != depth or (drops and ends[:-1] != layers):
        raise ValueError(f"the caches end at the layers {ends}, but tokens are dropped at {layers} of {depth}")
    return ends


def dropped(drop: Drop, x: jax.Array, last: Any, mask: Any, positions: Any) -> tuple[Any, Any, Any, Any]:
    """Stream, mask, positions and places of the tokens that go on; ValueError if they are not as many as was said."""
    index = drop.pick(x, last)
    if index.shape != (x.shape[0], drop.kept):
        raise ValueError(f"the drop behind layer {drop.layer} picked {index.shape}, not {(x.shape[0], drop.kept)}")

    def at(a: Any) -> Any:
        return None if a is None else jnp.take_along_axis(jnp.broadcast_to(a, x.shape[:2]), index, axis=1)

    return jnp.take_along_axis(x, index[..., None], axis=1), at(mask), at(positions), index
