"""Tokens kept by one score: attention of the class token, mean attention, norm, or chance; EViT fuses what it drops.

The controls that a better ranking has to beat. "cls" is EViT's ranking (Liang et al., ICLR 2022), there between attention and
MLP: the mean over heads of what the class token attends to. "column" is one vote of every token (Zero-TPrune's score after one
iteration, mean over heads).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jprune.methods.tokens.selection import best_places, patches
from jprune.models.token_hook import Seen, TokenReducer, Tokens, take

SCORES = ("cls", "column", "norm", "random")


@dataclasses.dataclass(frozen=True)
class TopK(TokenReducer):
    """Keeps the highest-scored patches in the blocks that `keeps` names.

    Attributes:
      score: "cls", "column", "norm" (of the residual stream) or "random" (the model needs a key).
      keeps: (block, patches to keep) each.
      inside_block: drop between attention and MLP, else after the block.
      fused: add one token at the end, the dropped ones' sum weighted by their score (EViT); with "cls" and "column".

    Raises:
      ValueError: an unknown score, blocks named twice or out of order, or nothing to keep.
    """

    score: str
    keeps: tuple[tuple[int, int], ...]
    inside_block: bool = True
    fused: bool = False

    def __post_init__(self) -> None:
        layers = [layer for layer, _ in self.keeps]
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, not {self.score!r}")
        if layers != sorted(set(layers)):
            raise ValueError(f"blocks to drop in are {layers}: name each once, in their order")
        if any(k < 1 for _, k in self.keeps):
            raise ValueError(f"keeps are {self.keeps}: keep 1 patch or more")
        if self.fused and self.score not in ("cls", "column"):
            raise ValueError(f"tokens are fused by attention, not by {self.score!r}: use 'cls' or 'column'")

    @property
    def needs_class_token(self) -> bool:
        return self.score == "cls"

    def reads_weights(self, layer: int) -> bool:
        return self.score in ("cls", "column") and layer in dict(self.keeps)

    def inside(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        return self._reduced(layer, tokens, seen) if self.inside_block else tokens

    def after(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        return tokens if self.inside_block else self._reduced(layer, tokens, seen)

    def _scores(self, layer: int, tokens: Tokens, seen: Seen) -> Float[Array, "batch tokens"]:
        match self.score:
            case "random":
                if tokens.key is None:
                    raise ValueError("tokens dropped by chance need a key: give the model one")
                return jax.random.uniform(jax.random.fold_in(tokens.key, layer), tokens.x.shape[:2])
            case "norm":
                return jnp.linalg.norm(tokens.x.astype(jnp.float32), axis=-1)
            case "cls":
                if seen.prefix < 1:
                    raise ValueError("there is no class token to ask what it attends to: use score='column'")
                assert seen.weights is not None
                return seen.weights[:, :, 0].mean(1)
        assert seen.weights is not None
        weights = seen.weights
        if tokens.alive is not None:  # hidden queries do not vote
            weights = jnp.where(tokens.alive[:, None, :, None], weights, 0.0)
        return weights.mean((1, 2))

    def _reduced(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        keep, n = dict(self.keeps).get(layer), tokens.x.shape[1]
        if keep is None or keep >= n - seen.prefix:
            return tokens
        score = self._scores(layer, tokens, seen)
        places = best_places(jnp.where(patches(tokens, seen.prefix), score, -jnp.inf), keep, seen.prefix)
        left = take(tokens, places)
        if not self.fused:
            return left
        batch = len(score)
        dropped = patches(tokens, seen.prefix).at[jnp.arange(batch)[:, None], places].set(False)
        sum_of = jnp.einsum("bn,bnc->bc", jnp.where(dropped, score, 0.0), tokens.x.astype(jnp.float32))
        x = jnp.concatenate([left.x, sum_of[:, None].astype(left.x.dtype)], axis=1)
        index = jnp.concatenate([left.index, jnp.full((batch, 1), -1, jnp.int32)], axis=1)
        size, alive = left.size, left.alive
        if size is not None:
            size = jnp.concatenate([size, jnp.ones((batch, 1))], axis=1)
        if alive is not None:
            alive = jnp.concatenate([alive, jnp.ones((batch, 1), bool)], axis=1)
        return left._replace(x=x, index=index, size=size, alive=alive)

    def overhead(self, layer: int, tokens: int, prefix: int, heads: int, head: int) -> int:
        if layer not in dict(self.keeps):
            return 0
        per_token = {"cls": heads, "column": heads * tokens, "norm": heads * head, "random": 0}[self.score]
        return tokens * (per_token + (heads * head if self.fused else 0))
