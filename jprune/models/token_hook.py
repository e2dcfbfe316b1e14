"""What a transformer hands to a token reducer between its blocks, and what it takes back.

A model calls a reducer at three places: before its first block, inside each block between attention and MLP (`inside`: where
merging takes place), and after each block (`after`: where tokens are dropped). A reducer is static configuration, a frozen
dataclass; how many tokens are left at each place follows from it and from shapes, so that the whole model is one jitted function.

The first `prefix` tokens are special (class token, distillation token, registers): no reducer removes them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Tokens(NamedTuple):
    """The tokens that are left of each image.

    Attributes:
      x: (batch, tokens, width), the residual stream.
      index: (batch, tokens) int32, which original token each is (prefix included); a merged one has the index of the token that
        took the others in, and -1 is a token that was none of them or a place without one.
      size: (batch, tokens) float32, how many original tokens each stands for; None: one each, and attention is as trained.
      alive: (batch, tokens), places that hold a token; None: all. Others are seen by nobody.
      key: for reducers that draw; None: none was given.
    """

    x: Float[Array, "batch tokens width"]
    index: Int[Array, "batch tokens"]
    size: Float[Array, "batch tokens"] | None = None
    alive: Bool[Array, "batch tokens"] | None = None
    key: Any = None


class Aux(NamedTuple):
    """What a vision tower knows of an image's patches; a method that needs a field which is None says so.

    Attributes:
      cls_attention: the class token's attention to every patch, probabilities over all tokens, in the layer whose output the
        features are.
      cls_feature: the class token's own features.
      keys: of every patch in that layer.
      last_query, last_key, last_keys: of the class token, of it and of every patch in the last layer, heads side by side.
      key: for `random`.
    """

    cls_attention: Float[Array, "heads m"] | None = None
    cls_feature: Float[Array, " d"] | None = None
    keys: Float[Array, "heads m head"] | None = None
    last_query: Float[Array, " c"] | None = None
    last_key: Float[Array, " c"] | None = None
    last_keys: Float[Array, "m c"] | None = None
    key: Any = None


class Seen(NamedTuple):
    """What a block's attention computed over the tokens that went into it.

    Attributes:
      weights: (batch, heads, tokens, tokens) float32, rows are queries and sum to 1; None unless the reducer `reads_weights`.
      query, key, value: (batch, tokens, heads, size of a head).
      prefix: number of special tokens.
    """

    weights: Float[Array, "batch heads tokens tokens"] | None
    query: Float[Array, "batch tokens heads head"]
    key: Float[Array, "batch tokens heads head"]
    value: Float[Array, "batch tokens heads value"]
    prefix: int


@dataclasses.dataclass(frozen=True)
class TokenReducer:
    """A reducer that removes nothing: override what yours does."""

    @property
    def needs_class_token(self) -> bool:
        """Whether it looks at the class token, the first of the special ones; a model without one then refuses it."""
        return False

    @property
    def proportional(self) -> bool:
        """Whether a merged token draws as much attention as all those that it stands for (see `key_bias`)."""
        return True

    def reads_weights(self, layer: int) -> bool:
        """Whether `inside` or `after` of this block looks at attention weights; other blocks may use a fused attention."""
        return False

    def before(self, tokens: Tokens, prefix: int) -> Tokens:
        """The embedded tokens that enter the first block."""
        return tokens

    def inside(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Between attention (its residual added) and MLP of a block."""
        return tokens

    def after(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        """After the block; if `inside` removed tokens, `seen` still has those that went in."""
        return tokens

    def overhead(self, layer: int, tokens: int, prefix: int, heads: int, head: int) -> int:
        """MACs per image of choosing tokens in this block, into whose attention `tokens` went; layer -1: `before`."""
        return 0


def all_tokens(x: Float[Array, "batch tokens width"], key: Any = None) -> Tokens:
    """Tokens of which none is removed yet."""
    index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Tokens(x, index, key=key)


def take(tokens: Tokens, places: Int[Array, "batch kept"]) -> Tokens:
    """The tokens at these places, in this order."""

    def at(a: Any) -> Any:
        return None if a is None else jnp.take_along_axis(a, places, axis=1)

    x = jnp.take_along_axis(tokens.x, places[..., None], axis=1)
    return tokens._replace(x=x, index=at(tokens.index), size=at(tokens.size), alive=at(tokens.alive))


def key_bias(tokens: Tokens, proportional: bool = True) -> Float[Array, "batch 1 1 tokens"] | None:
    """What is added to attention logits: the logarithm of a key's size, and -1e30 where there is no token; None: nothing.

    Not `proportional`: sizes add nothing, as for models that were trained on parts of images (MAE).
    """
    size = tokens.size if proportional else None
    if size is None and tokens.alive is None:
        return None
    bias = jnp.zeros(tokens.index.shape, jnp.float32) if size is None else jnp.log(size)
    if tokens.alive is not None:
        bias = jnp.where(tokens.alive, bias, -1e30)
    return bias[:, None, None, :]


def pooled(tokens: Tokens, prefix: int) -> Float[Array, "batch width"]:
    """Mean over the patches that are left, each as often as its size says."""
    x = tokens.x[:, prefix:]
    share = jnp.ones(x.shape[:2], jnp.float32) if tokens.size is None else tokens.size[:, prefix:]
    if tokens.alive is not None:
        share = share * tokens.alive[:, prefix:]
    total = jnp.einsum("bn,bnc->bc", share, x.astype(jnp.float32))
    return (total / share.sum(1, keepdims=True)).astype(x.dtype)
