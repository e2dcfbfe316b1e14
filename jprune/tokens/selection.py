"""Choosing tokens by a score, with ties going to the first: as places of a shorter sequence, or as a mask over the same one.

Survivors stay in their order. The first `prefix` tokens always survive and do not count.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jprune.tokens.reducer import Tokens, take


def best_places(score: Float[Array, "batch tokens"], keep: int, prefix: int) -> Int[Array, "batch kept"]:
    """Places of the special tokens and of the `keep` highest-scored others, ascending: (batch, prefix + keep)."""
    _, chosen = jax.lax.top_k(score[:, prefix:], keep)  # of equals, the first
    chosen = jnp.sort(chosen, axis=1) + prefix
    special = jnp.broadcast_to(jnp.arange(prefix, dtype=chosen.dtype), (score.shape[0], prefix))
    return jnp.concatenate([special, chosen], axis=1)


def ranks(score: Float[Array, "batch tokens"], among: Bool[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """How many tokens among these are placed before each one of them; meaningless for the others."""
    order = jnp.argsort(jnp.where(among, -score, jnp.inf), axis=1, stable=True)
    return jnp.argsort(order, axis=1)


def best(
    score: Float[Array, "batch tokens"], keep: int | Int[Array, "*image"], among: Bool[Array, "batch tokens"]
) -> Bool[Array, "batch tokens"]:
    """Which are the `keep` highest-scored among these; `keep` may be traced, and of each image ((batch, 1))."""
    return among & (ranks(score, among) < keep)


def patches(tokens: Tokens, prefix: int) -> Bool[Array, "batch tokens"]:
    """Living tokens that are not special."""
    here = jnp.broadcast_to(jnp.arange(tokens.x.shape[1]) >= prefix, tokens.x.shape[:2])
    return here if tokens.alive is None else here & tokens.alive


def pack(tokens: Tokens, alive: Bool[Array, "batch tokens"], length: int) -> Tokens:
    """The living tokens first, in their order, `length` places altogether; `alive` says which hold a token."""
    places = jnp.argsort(~alive, axis=1, stable=True)[:, :length]
    return take(tokens._replace(alive=alive), places)
