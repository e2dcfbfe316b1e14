"""ATS, adaptive token sampling (Fayyaz et al., ECCV 2022): each image keeps as many tokens as its attention is spread over.

A patch's significance is the class token's attention to it, summed over heads, times the norm of its values. Patches are
sampled at evenly spaced heights of the significances' cumulative distribution; a patch that is hit twice is kept once, so that
images whose attention is concentrated keep fewer. Arrays have a place for every height, and `alive` says which hold a token:
what is computed is the maximum, what a ragged implementation would compute are the living ones.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jprune.methods.tokens.selection import pack, patches, ranks
from jprune.models.token_hook import Seen, TokenReducer, Tokens


def significance(seen: Seen) -> Float[Array, "batch tokens"]:
    """Attention of the class token, summed over heads, times the norm of all heads' values."""
    assert seen.weights is not None
    norm = jnp.sqrt((seen.value.astype(jnp.float32) ** 2).sum((2, 3)))
    return seen.weights[:, :, 0].sum(1) * norm


def sampled(
    score: Float[Array, "batch tokens"], among: Bool[Array, "batch tokens"], heights: int
) -> Bool[Array, "batch tokens"]:
    """Which of these tokens lie nearest to one of so many heights of their cumulative distribution, sorted by score.

    The distribution is rescaled to begin at 0 and end at 1; heights go from its smallest value above 0 to 1.
    """
    rank = ranks(-score, among)  # 0 for the least
    up_to = (rank[:, None, :] <= rank[:, :, None]) & among[:, None, :]
    total = jnp.where(up_to, score[:, None, :], 0.0).sum(-1)
    low = jnp.where(among, total, jnp.inf).min(1, keepdims=True)
    high = jnp.where(among, total, -jnp.inf).max(1, keepdims=True)
    spread = jnp.where(among, (total - low) / jnp.maximum(high - low, 1e-30), -1.0)
    start = jnp.where(spread > 0, spread, jnp.inf).min(1, keepdims=True)
    start = jnp.where(jnp.isfinite(start), start, 0.0)
    at = start + jnp.arange(heights) / max(heights - 1, 1) * (1 - start)
    distance = jnp.where(among[:, None], jnp.abs(at[..., None] - spread[:, None]), jnp.inf)
    hit = jnp.argmin(distance, axis=-1)
    return among & (hit[..., None] == jnp.arange(score.shape[1])).any(1)


@dataclasses.dataclass(frozen=True)
class ATS(TokenReducer):
    """Samples at most so many patches between attention and MLP of the blocks that `samples` names: (block, heights) each.

    Raises:
      ValueError: blocks named twice or out of order, or fewer than two heights.
    """

    samples: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        layers = [layer for layer, _ in self.samples]
        if layers != sorted(set(layers)):
            raise ValueError(f"blocks to sample in are {layers}: name each once, in their order")
        if any(n < 2 for _, n in self.samples):
            raise ValueError(f"samples are {self.samples}: a distribution is sampled at 2 heights or more")

    @property
    def needs_class_token(self) -> bool:
        return True

    def reads_weights(self, layer: int) -> bool:
        return layer in dict(self.samples)

    def inside(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        heights = dict(self.samples).get(layer)
        if heights is None:
            return tokens
        if seen.prefix < 1:
            raise ValueError("ATS asks what the class token attends to, and there is none: use zero_tprune or tome")
        among = patches(tokens, seen.prefix)
        kept = sampled(significance(seen), among, heights) | (jnp.arange(among.shape[1]) < seen.prefix)
        return pack(tokens, kept, seen.prefix + min(heights, among.shape[1] - seen.prefix))

    def overhead(self, layer: int, tokens: int, prefix: int, heads: int, head: int) -> int:
        n = dict(self.samples).get(layer)
        return 0 if n is None else tokens * heads * (head + 1) + n * (tokens - prefix)
