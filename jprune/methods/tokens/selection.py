"""Choosing tokens by a score, with ties going to the first: as places of a shorter sequence, or as a mask over the same one.

Survivors stay in their order. The first `prefix` tokens always survive and do not count. There are few hundred tokens, so that
ranks come from comparing all pairs, in parallel; sorting them would take accelerators longer, and compilers too.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jprune.models.token_hook import Tokens, take


def ranks(score: Float[Array, "batch tokens"], among: Bool[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """How many of these tokens are placed before each token, 0 for the best."""
    own, other = score[:, :, None], score[:, None, :]
    place = jnp.arange(score.shape[1])
    ahead = (other > own) | ((other == own) & (place[None, :] < place[:, None]))
    return (ahead & among[:, None, :]).sum(-1, dtype=jnp.int32)


def best(
    score: Float[Array, "batch tokens"], keep: int | Int[Array, "*image"], among: Bool[Array, "batch tokens"]
) -> Bool[Array, "batch tokens"]:
    """Which are the `keep` highest-scored among these; `keep` may be traced, and of each image ((batch, 1))."""
    return among & (ranks(score, among) < keep)


def places_of(marked: Bool[Array, "batch tokens"], length: int) -> Int[Array, "batch length"]:
    """Places of the marked tokens, ascending; 0 where there are fewer than `length`."""
    nth = jnp.cumsum(marked, axis=1, dtype=jnp.int32) - 1
    hit = marked[:, None, :] & (nth[:, None, :] == jnp.arange(length)[:, None])
    return jnp.argmax(hit, axis=-1)


def by_rank(
    rank: Int[Array, "batch tokens"], among: Bool[Array, "batch tokens"], length: int
) -> Int[Array, "batch length"]:
    """Places of the first `length` of these tokens, the best first."""
    return jnp.argmax(among[:, None, :] & (rank[:, None, :] == jnp.arange(length)[:, None]), axis=-1)


def best_places(score: Float[Array, "batch tokens"], keep: int, prefix: int) -> Int[Array, "batch kept"]:
    """Places of the special tokens and of the `keep` highest-scored others, ascending: (batch, prefix + keep)."""
    special = jnp.broadcast_to(jnp.arange(score.shape[1]) < prefix, score.shape)
    return places_of(special | best(score, keep, ~special), prefix + keep)


def patches(tokens: Tokens, prefix: int) -> Bool[Array, "batch tokens"]:
    """Living tokens that are not special."""
    here = jnp.broadcast_to(jnp.arange(tokens.x.shape[1]) >= prefix, tokens.x.shape[:2])
    return here if tokens.alive is None else here & tokens.alive


def pack(tokens: Tokens, alive: Bool[Array, "batch tokens"], length: int) -> Tokens:
    """The living tokens first, in their order, `length` places in all; `alive` says which hold a token, else `index` is -1."""
    packed = take(tokens, places_of(alive, length))
    holds = jnp.arange(length) < alive.sum(1, keepdims=True)
    return packed._replace(alive=holds, index=jnp.where(holds, packed.index, -1))
