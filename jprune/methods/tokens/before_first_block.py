"""Tokens dropped before the first block: by a rule of `visual_selectors`, or by what a first pass through the model said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jprune.methods.tokens import visual_selectors as selectors
from jprune.models.token_hook import TokenReducer, Tokens, take

SELECTORS: dict[str, selectors.Selector] = {
    "random": selectors.random,
    "grid": selectors.uniform_grid,
    "norm": selectors.norm_topk,
    "divprune": selectors.divprune,
}


@dataclasses.dataclass(frozen=True)
class AtEntry(TokenReducer):
    """Keeps `keep` of an image's embedded patches, in their order: "random" (the model needs a key), "grid", "norm", "divprune".

    Raises:
      ValueError: another selector, or nothing to keep.
    """

    select: str
    keep: int

    def __post_init__(self) -> None:
        if self.select not in SELECTORS:
            raise ValueError(f"select must be one of {', '.join(SELECTORS)}, not {self.select!r}")
        if self.keep < 1:
            raise ValueError(f"{self.keep} patches cannot be kept: keep 1 or more")

    def before(self, tokens: Tokens, prefix: int) -> Tokens:
        patches = tokens.x[:, prefix:]
        batch, n, _ = patches.shape
        if self.keep >= n:
            return tokens
        if self.select == "random" and tokens.key is None:
            raise ValueError("tokens dropped by chance need a key: give the model one")
        key = jax.random.key(0) if tokens.key is None else tokens.key  # others do not draw
        chosen = jax.vmap(lambda f, k: SELECTORS[self.select](f, selectors.Aux(key=k), self.keep))(
            patches, jax.random.split(key, batch)
        )
        special = jnp.broadcast_to(jnp.arange(prefix, dtype=chosen.dtype), (batch, prefix))
        return take(tokens, jnp.concatenate([special, jnp.sort(chosen, axis=1) + prefix], axis=1))

    def overhead(self, layer: int, tokens: int, prefix: int, heads: int, head: int) -> int:
        n = tokens - prefix
        if layer >= 0 or self.keep >= n:
            return 0
        # a block's heads are as wide as the stream unless it was pruned
        return {"random": 0, "grid": 0, "norm": n * heads * head, "divprune": n * n * heads * head}[self.select]


@dataclasses.dataclass(frozen=True)
class Places(TokenReducer):
    """Keeps the embedded tokens of these original indices, special ones included; to be made within a jitted function."""

    index: Int[Array, "batch kept"]

    def before(self, tokens: Tokens, prefix: int) -> Tokens:
        return take(tokens, self.index)


def two_pass(apply: Callable[..., Any], images: Array, chooser: TokenReducer) -> Array:
    """Logits of a second pass on those embedded tokens that `chooser` leaves in a first one; under one jit.

    The blocks after the last one that `chooser` reduces are not computed in the first pass: nothing reads them.

    Arguments:
      apply: (images, reducer, trace) -> (logits, trace) if traced, else logits.
      images: (batch, height, width, channels).
      chooser: leaves as many tokens of every image, none merged.
    """
    _, passed = apply(images, reducer=chooser, trace=True)
    return apply(images, reducer=Places(passed.index[-1]), trace=False)
