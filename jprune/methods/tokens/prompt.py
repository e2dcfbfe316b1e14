"""An image's tokens within a prompt: which places of the sequence stay when some of them are dropped.

    [text][image 0: m tokens][text][image 1: m tokens][text]      ->      [text][k][text][k][text]

Images may begin elsewhere in every row. What is kept may be told in raster order (the released code of DivPrune) or in the
order of the choice (with which its tables were made), and the tokens may be numbered anew, 0, 1, 2, ... (DivPrune), or keep
their old positions (FastV; later work found that this preserves grounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from jprune.methods.tokens.divprune import divprune_select

ORDERS, POSITIONS, SCOPES = ("raster", "selection"), ("packed", "original"), ("image", "sample")


class PrunedPrompt(NamedTuple):
    """A prompt with fewer visual tokens.

    Attributes:
      embeddings: what the decoder reads; zeros at filled places.
      positions: of every token, to rotate queries and keys.
      mask: False at padding and at filled places, where an image had fewer tokens to keep than there are places.
      source: which token of the whole prompt each is (of merged ones, around which one it was built); -1 at filled places
        and at merged tokens that are no patch.
      chosen: of each image (or of all images of a row together) the kept tokens in the order of the choice; the number of tokens
        where there was none left, and for merged tokens that are no patch.
    """

    embeddings: Float[Array, "batch kept d"]
    positions: Int32[Array, "batch kept"]
    mask: Bool[Array, "batch kept"]
    source: Int32[Array, "batch kept"]
    chosen: Int32[Array, "batch groups k"]


def kept_length(tokens: int, images: int, length: int, k: int, scope: str = "image") -> int:
    """Tokens of a prompt in which k of every image's (or of all images') `length` visual tokens stay."""
    return tokens - images * length + (images if scope == "image" else 1) * k


def kept_source(
    start: Int[Array, "batch images"],
    length: int,
    chosen: Int[Array, "batch groups k"],
    tokens: int,
    order: str = "raster",
) -> Int32[Array, "batch kept"]:
    """Which token of the whole prompt stands where, -1 at places that stay empty.

    Args:
      start: where each image begins, ascending within a row.
      length: visual tokens of an image.
      chosen: kept tokens of each image, or, as one group, of all images side by side; what is not below their number is
        no token, and its place is the last of its image (of the last image).
      tokens: of the whole prompt.
      order: "raster": ascending; "selection": as in `chosen`.

    Raises:
      ValueError: an unknown order, groups that are neither one nor one per image.
    """
    batch, images = start.shape
    groups, k = chosen.shape[1:]
    if groups not in (1, images):
        raise ValueError(f"{groups} groups of chosen tokens for {images} images: give one for each, or one for all")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    own = images if groups == 1 else 1  # images in a group
    none = own * length
    raster = jnp.sort(chosen, axis=-1)

    def place(index: Any) -> Any:
        image = jnp.arange(groups)[:, None] * (groups > 1) + jnp.minimum(index // length, own - 1)
        at = jnp.take_along_axis(start, image.reshape(batch, -1), axis=1).reshape(index.shape) + index % length
        return jnp.where(index < none, at, -1)

    # Sort text, kept tokens and, behind the tokens of their image, empty places. All that goes out comes last.
    ends = (start[:, -1:] if groups == 1 else start)[..., None] + length - 1
    slots = jnp.where(raster < none, 2 * place(raster), 2 * ends + 1).reshape(batch, -1)
    every = jnp.arange(tokens, dtype=jnp.int32)
    visual = ((every >= start[..., None]) & (every < start[..., None] + length)).any(1)
    ranks = jnp.concatenate([jnp.where(visual, 2 * tokens + 2, 2 * every), slots], axis=1)
    went = jnp.argsort(ranks, axis=1, stable=True)[:, : tokens - images * length + groups * k]
    slot = went >= tokens
    told = place(raster if order == "raster" else chosen).reshape(batch, -1)
    nth = jnp.maximum(jnp.cumsum(slot, axis=1) - 1, 0)
    return jnp.where(slot, jnp.take_along_axis(told, nth, axis=1), went).astype(jnp.int32)


def diverse(x: Float[Array, "m d"], k: int, valid: Bool[Array, " m"]) -> Int32[Array, " k"]:
    """DivPrune, as `prune_visual_tokens` calls it."""
    return divprune_select(x, k, valid).order


def keep_visual_tokens(
    embeddings: Float[Array, "batch tokens d"],
    start: Int[Array, "batch images"],
    length: int,
    chosen: Int[Array, "batch groups k"],
    mask: Any = None,
    *,
    order: str = "raster",
    positions: str = "packed",
) -> PrunedPrompt:
    """The prompt in which only the chosen visual tokens stay; arguments as for `kept_source` and `prune_visual_tokens`."""
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, not {positions!r}")
    batch, tokens, _ = embeddings.shape
    real = _real(mask, batch, tokens)
    source = kept_source(start, length, chosen, tokens, order)
    at = jnp.maximum(source, 0)
    there = (source >= 0) & jnp.take_along_axis(real, at, axis=1)
    new = jnp.take_along_axis(embeddings, at[..., None], axis=1)
    if positions == "packed":
        where = jnp.cumsum(there, axis=1) - 1
    else:
        where = jnp.take_along_axis(jnp.cumsum(real, axis=1) - 1, at, axis=1)
    return PrunedPrompt(
        jnp.where((source >= 0)[..., None], new, 0),
        jnp.maximum(where, 0).astype(jnp.int32),
        there,
        source,
        chosen.astype(jnp.int32),
    )


def prune_visual_tokens(
    embeddings: Float[Array, "batch tokens d"],
    start: Int[Array, "batch images"],
    length: int,
    k: int,
    mask: Any = None,
    *,
    select: Callable[[Any, int, Any], Any] = diverse,
    order: str = "raster",
    positions: str = "packed",
    scope: str = "image",
    counts: Int[Array, "batch groups"] | None = None,
) -> PrunedPrompt:
    """Keep k of an image's visual tokens before the decoder sees them; jit-able with static lengths and k.

    Every row and every image is looked at by itself.

    Args:
      embeddings: of the whole prompt, visual tokens in their places.
      start: where each image's tokens begin, per row, ascending.
      length: tokens of an image.
      k: how many of an image stay; with scope "sample" of all images of the row, as for the frames of a video.
      mask: (batch, tokens), 0 at padding; padding among the visual tokens is never kept.
      select: (tokens (m, d), k, valid (m,)) -> indices, m where none is left, the best first.
      order: "raster" or "selection" (see above).
      positions: "packed" numbers the shorter prompt, "original" keeps what the tokens had.
      scope: "image" or "sample".
      counts: keep only so many of the first k; None: all.

    Raises:
      ValueError: an unknown option, k above the number of tokens, a mask of another length.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
    batch, tokens, width = embeddings.shape
    real = _real(mask, batch, tokens)
    images = start.shape[1]
    groups, m = (images, length) if scope == "image" else (1, images * length)
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}: of {m} visual tokens 1 to {m} can be kept")
    places = (start[..., None] + jnp.arange(length)).reshape(batch, -1)
    visual = jnp.take_along_axis(embeddings, places[..., None], axis=1).reshape(batch, groups, m, width)
    valid = jnp.take_along_axis(real, places, axis=1).reshape(batch, groups, m)
    chosen = jax.vmap(jax.vmap(lambda x, v: select(x, k, v)))(visual, valid)
    if counts is not None:
        chosen = jnp.where(jnp.arange(k) < counts[..., None], chosen, m)
    return keep_visual_tokens(embeddings, start, length, chosen, mask, order=order, positions=positions)


def _real(mask: Any, batch: int, tokens: int) -> Any:
    if mask is None:
        return jnp.ones((batch, tokens), bool)
    if mask.shape != (batch, tokens):
        raise ValueError(f"the mask is {mask.shape}, the prompt {(batch, tokens)}")
    return jnp.asarray(mask).astype(bool)
