"""How important each token is: a weighted PageRank on a block's attention, then one score out of all heads.

Zero-TPrune (Wang, Dedhia and Jha, CVPR 2024): tokens are the nodes of a graph, and a query votes for the keys it attends to, as
strongly as it attends. A vote counts as much as its voter: s <- A^T s, again and again. (Not A s: the rows of A sum to 1, so
that would only average what a token looks at, and keeps a uniform start uniform.)

Scores have mean 1 over the tokens that are there. On that scale the variance of a head's scores lies between 0 and N - 1, and the
thresholds of the paper's head filter mean something; for scores that sum to 1 every variance is below 0.01 at 197 tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Signal = Float[Array, " tokens"] | Float[Array, "batch tokens"]
UNROLLED = 5  # so many iterations are written out; more of them, or a traced number, are a loop


def initial_signal(tokens: int, special: int = 1, boost: bool | Array = True) -> Float[Array, " tokens"]:
    """What votes weigh at first, sum 1: alike, or, with `boost`, special tokens sqrt(tokens) times as much as others."""
    here = jnp.arange(tokens) < special
    weight = jnp.where(here & boost, jnp.float32(tokens) ** 0.5, 1.0)
    return weight / weight.sum()


def living_signal(
    alive: Bool[Array, "batch tokens"], special: int = 1, boost: bool | Array = True
) -> Float[Array, "batch tokens"]:
    """`initial_signal` of each image's living tokens, 0 for the others."""
    number = alive.sum(1, keepdims=True).astype(jnp.float32)
    here = jnp.arange(alive.shape[1]) < special
    weight = jnp.where(here & boost, number**0.5, 1.0) * alive
    return weight / weight.sum(1, keepdims=True)


def restrict(
    attn: Float[Array, "batch heads tokens tokens"], alive: Bool[Array, "batch tokens"]
) -> Float[Array, "batch heads tokens tokens"]:
    """Attention among living tokens: rows and columns of others are 0, the rows that are left sum to 1 again."""
    inside = jnp.where(alive[:, None, :, None] & alive[:, None, None, :], attn.astype(jnp.float32), 0.0)
    return inside / jnp.maximum(inside.sum(-1, keepdims=True), 1e-9)


def wpr_scores(
    attn: Float[Array, "batch heads tokens tokens"],
    iters: int | Int[Array, ""],
    init: Signal,
    temperature: float = 1.0,
    alive: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch heads tokens"]:
    """Weighted PageRank per image and head after `iters` votes (Algorithm 1 of the paper), of mean 1.

    Arguments:
      attn: rows are queries and sum to 1.
      iters: votes; a traced number runs as a loop.
      init: what the first votes weigh, of any scale: see `initial_signal`.
      temperature: below 1 attention is sharpened before the votes, to softmax(logits / temperature).
      alive: tokens that vote and are voted for; None: all. Others get 0.

    Raises:
      ValueError: no iteration at all, or a temperature that is not above 0.
    """
    if isinstance(iters, int) and iters < 1:
        raise ValueError(f"{iters} iterations rank nothing: give at least 1")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0 (1 leaves attention as it is)")
    a = attn.astype(jnp.float32)
    if temperature != 1:
        a = a ** (1 / temperature)
        a = a / jnp.maximum(a.sum(-1, keepdims=True), 1e-30)
    tokens = a.shape[-1]
    number = jnp.float32(tokens)
    if alive is not None:
        a = restrict(a, alive)
        number = alive.sum(1).astype(jnp.float32)[:, None, None]
    start = jnp.broadcast_to(init.astype(jnp.float32) if init.ndim == 2 else init[None], (a.shape[0], tokens))
    start = start / start.sum(1, keepdims=True)

    def vote(_: Any, s: Array) -> Array:
        return jnp.einsum("bhij,bhi->bhj", a, s, precision=jax.lax.Precision.HIGHEST)

    s = jnp.broadcast_to(start[:, None].astype(jnp.float32), a.shape[:3])
    if isinstance(iters, int) and iters <= UNROLLED:
        for i in range(iters):
            s = vote(i, s)
    else:
        s = jax.lax.fori_loop(0, iters, vote, s)
    return s * number


def aggregate_heads(
    scores: Float[Array, "batch heads tokens"],
    mode: str = "rms",
    var_range: tuple[float, float] | Float[Array, " 2"] | None = None,
    alive: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch tokens"]:
    """One score out of all heads: root mean square, so that a token crucial to one head beats one mediocre in all, or the mean.

    Arguments:
      scores: of mean 1 over an image's tokens.
      mode: "rms" or "mean".
      var_range: heads whose scores vary less or more than this are left out, image by image; where none is left, all count.
      alive: tokens that variances run over; None: all.

    Raises:
      ValueError: another mode.
    """
    if mode not in ("rms", "mean"):
        raise ValueError(f"mode must be 'rms' or 'mean', not {mode!r}")
    s = scores.astype(jnp.float32)
    counted = jnp.ones((*s.shape[:2], 1), jnp.float32)
    if var_range is not None:
        here = jnp.ones_like(s) if alive is None else jnp.broadcast_to(alive[:, None].astype(jnp.float32), s.shape)
        number = here.sum(-1)
        mean = (here * s).sum(-1) / number
        variance = (here * (s - mean[..., None]) ** 2).sum(-1) / number
        passes = (variance >= var_range[0]) & (variance <= var_range[1])
        passes = passes | ~passes.any(1, keepdims=True)
        counted = passes[..., None].astype(jnp.float32)
    heads = counted.sum(1)
    if mode == "mean":
        return (counted * s).sum(1) / heads
    return ((counted * s * s).sum(1) / heads) ** 0.5
