"""ToMe (Bolya et al., ICLR 2023): in every block the most similar tokens are merged in pairs, between attention and MLP.

Tokens in even places are compared with tokens in odd places by their keys, averaged over heads. Of the even ones the r most
similar to an odd one are merged into it, weighted by how many original tokens each stands for. In the blocks that follow a
merged token draws the attention of all of them: log(size) is added to its logits (proportional attention).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jprune.methods.tokens.selection import best, places_of
from jprune.methods.tokens.similarity import clipped, similarity
from jprune.models.token_hook import Seen, TokenReducer, Tokens


def tome_schedule(r: int, depth: int, inflect: float = 0.0) -> tuple[int, ...]:
    """Tokens to merge in each block: r in all, or, with `inflect` in [-1, 1], from r (1 - inflect) in a line to r (1 + inflect).

    Raises:
      ValueError: r below 0, or an inflection outside [-1, 1].
    """
    if r < 0 or not -1 <= inflect <= 1:
        raise ValueError(f"r is {r} and inflect {inflect}: r must be 0 or more, inflect between -1 and 1")
    least = int(r * (1 - inflect))
    step = (2 * r - 2 * least) / max(depth - 1, 1)
    return tuple(int(least + i * step) for i in range(depth))


def merge(tokens: Tokens, metric: Float[Array, "batch tokens features"], r: int, special: int) -> Tokens:
    """The r most similar pairs merged by size-weighted means: special tokens, then those of even places, then of odd ones."""
    batch, n, _ = metric.shape
    size = jnp.ones((batch, n), jnp.float32) if tokens.size is None else tokens.size
    alike = similarity(metric[:, ::2], metric[:, 1::2])
    protected = jnp.arange(n) < special
    alike = jnp.where(protected[::2, None] | protected[None, 1::2], -jnp.inf, alike)
    partner = jnp.argmax(alike, -1)
    match_of = alike.max(-1)
    gone = best(match_of, r, jnp.ones(match_of.shape, bool))
    merged, left = places_of(gone, r), places_of(~gone, match_of.shape[1] - r)
    into = jnp.take_along_axis(partner, merged, axis=1)
    row = jnp.arange(batch)[:, None]

    def combined(even: Array, odd: Array) -> Array:
        return jnp.concatenate([even[row, left], odd.at[row, into].add(even[row, merged])], axis=1)

    weighted = tokens.x.astype(jnp.float32) * size[..., None]
    x, sizes = combined(weighted[:, ::2], weighted[:, 1::2]), combined(size[:, ::2], size[:, 1::2])
    index = jnp.concatenate([tokens.index[:, ::2][row, left], tokens.index[:, 1::2]], axis=1)
    kept = n - r
    # special tokens come from even and odd places in turn: even ones lead the first part, odd ones the second
    odd = left.shape[1]
    front = [i // 2 if i % 2 == 0 else odd + i // 2 for i in range(special)]
    places = jnp.array(front + [i for i in range(kept) if i not in front])
    x = (x / sizes[..., None]).astype(tokens.x.dtype)
    return tokens._replace(x=x[:, places], index=index[:, places], size=sizes[:, places])


@dataclasses.dataclass(frozen=True)
class ToMe(TokenReducer):
    """Merges `r[i]` tokens in block i, none in blocks beyond the last entry; see `tome_schedule`.

    `attention_by_size` off leaves attention as trained, for models fine-tuned from masked autoencoders.

    Raises:
      ValueError: a negative number, or tokens of which some are hidden.
    """

    r: tuple[int, ...]
    attention_by_size: bool = True

    def __post_init__(self) -> None:
        if any(r < 0 for r in self.r):
            raise ValueError(f"r is {self.r}: a block merges 0 tokens or more")

    @property
    def proportional(self) -> bool:
        return self.attention_by_size

    def _number(self, layer: int, tokens: int, prefix: int) -> int:
        r = self.r[layer] if layer < len(self.r) else 0
        return clipped(r, tokens - prefix) if r else 0

    def inside(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        if tokens.alive is not None:
            raise ValueError("ToMe merges arrays full of tokens, and some of these are hidden: use it alone")
        r = self._number(layer, tokens.x.shape[1], seen.prefix)
        return merge(tokens, seen.key.mean(2), r, seen.prefix) if r else tokens

    def overhead(self, layer: int, tokens: int, prefix: int, heads: int, head: int) -> int:
        if layer < 0 or not self._number(layer, tokens, prefix):
            return 0
        return (tokens // 2) * (tokens - tokens // 2) * head
