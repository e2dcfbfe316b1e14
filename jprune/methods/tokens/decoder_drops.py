"""Visual tokens that leave between the layers of a decoder: FastV, VTW, and DivPrune on hidden states.

Each makes a `jprune.models.token_drops.Drop` for `Llama(..., drops=[...])`. Positions stay those of the whole prompt, and the
layers before the drop have all tokens in their caches.

FastV (Chen et al., ECCV 2024) keeps the visual tokens that the prompt's last token attends to most; VTW (Lin et al., AAAI 2025)
none at all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jprune.methods.tokens.divprune import divprune_select
from jprune.methods.tokens.prompt import kept_length, kept_source
from jprune.models.token_drops import Drop


def fastv(start: Int[Array, "batch images"], length: int, k: int, tokens: int, layer: int = 2) -> Drop:
    """Behind `layer` layers, k of the visual tokens of all images go on, by the last token's attention in the layer before.

    Attention is averaged over heads. The prompt is padded on the left, if at all.

    Args:
      start: where each image begins, per row, ascending.
      length: visual tokens of an image.
      k: how many of all images of a row go on.
      tokens: of the whole prompt.
      layer: how many layers see all tokens; 2 as published.

    Raises:
      ValueError: k above the number of visual tokens, none (`vtw` keeps none).
    """
    _check(k, start.shape[1] * length)

    def pick(_: Any, attention: Any) -> Any:
        seen = jnp.take_along_axis(attention.mean(1), _places(start, length), axis=1)
        chosen = jax.lax.top_k(seen, k)[1]
        return kept_source(start, length, chosen[:, None], tokens)

    return Drop(layer, kept_length(tokens, start.shape[1], length, k, "sample"), pick, reads_attention=True)


def vtw(start: Int[Array, "batch images"], length: int, tokens: int, layer: int) -> Drop:
    """Behind `layer` layers no visual token goes on; arguments as for `fastv`."""

    def pick(*_: Any) -> Any:
        none = jnp.zeros((start.shape[0], 1, 0), jnp.int32)
        return kept_source(start, length, none, tokens)

    return Drop(layer, kept_length(tokens, start.shape[1], length, 0, "sample"), pick)


def divprune_inside(start: Int[Array, "batch images"], length: int, k: int, tokens: int, layer: int) -> Drop:
    """Behind `layer` layers the k visual tokens go on whose hidden states differ most; arguments as for `fastv`."""
    _check(k, start.shape[1] * length)

    def pick(x: Any, _: Any) -> Any:
        states = jnp.take_along_axis(x, _places(start, length)[..., None], axis=1)
        chosen = jax.vmap(lambda e: divprune_select(e, k).order)(states)
        return kept_source(start, length, chosen[:, None], tokens)

    return Drop(layer, kept_length(tokens, start.shape[1], length, k, "sample"), pick)


def _places(start: Any, length: int) -> Any:
    return (start[..., None] + jnp.arange(length)).reshape(start.shape[0], -1)


def _check(k: int, visual: int) -> None:
    if not 1 <= k <= visual:
        raise ValueError(f"k is {k}: of {visual} visual tokens 1 to {visual} can be kept; vtw keeps none")
