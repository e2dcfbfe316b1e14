"""BlockFFN's two training losses, and the factor of the second: neighbours use the same experts, a chunk of tokens few.

Song et al., BlockFFN (2025), sections 3.2 and B. Per layer; a model's loss takes the mean over its layers. Where the paper and
its authors' program differ (a small constant in the logarithm, a ramp and a cap of the factor) the program is followed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SHARPNESS = 100.0
CHUNK = 64
EPS = 1e-5  # of the authors' program, in a sum and in a logarithm


def previous_tokens(
    segments: Int[Array, " tokens"], valid: Bool[Array, " tokens"] | None = None
) -> Int[Array, " tokens"]:
    """The token before each one, -1 for the first of every document and at padding.

    >>> previous_tokens(jnp.array([0, 0, 1, 1])).tolist()
    [-1, 0, -1, 2]
    """
    before = jnp.arange(len(segments)) - 1
    same = jnp.concatenate([jnp.zeros(1, bool), segments[1:] == segments[:-1]])
    if valid is not None:
        same &= valid & jnp.roll(valid, 1)
    return jnp.where(same, before, -1)


def activation_locality(
    logits: Float[Array, "tokens experts"], previous: Int[Array, " tokens"], sharpness: float = SHARPNESS
) -> Float[Array, ""]:
    """Cross-entropy of a token's soft activity with the next token's as target (equation 4), over pairs and experts.

    The gradient flows through both sides: neighbours are drawn together, and logits away from 0.

        >>> print(activation_locality(jnp.array([[1.0], [0.0]]), jnp.array([-1, 0]), sharpness=1.0).round(5))
        0.81326

    Args:
      logits: of the router, before its ReLU.
      previous: from `previous_tokens`.
      sharpness: alpha.
    """
    z = sharpness * logits.astype(jnp.float32)
    there = previous >= 0
    u = z[jnp.maximum(previous, 0)]
    # softplus(u) - sigmoid(z) u, which for large u would be the difference of two large numbers
    likely = jax.nn.softplus(-u) + jax.nn.sigmoid(-z) * u
    each = jnp.mean(jnp.where(u > 0, likely, jax.nn.softplus(u) - jax.nn.sigmoid(z) * u), axis=-1)
    return jnp.sum(jnp.where(there, each, 0.0)) / jnp.maximum(jnp.sum(there), 1)


def chunk_sparsification(
    unit: Float[Array, "tokens experts"], valid: Bool[Array, " tokens"] | None = None, chunk: int = CHUNK
) -> Float[Array, ""]:
    """Mean chance that an expert is used anywhere in a chunk of tokens (equation 5).

    A token's chances are its `unit` over their sum; of `Routed`, so that the learned gain gets no gradient and does not matter.

        >>> both = jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> print(chunk_sparsification(both, chunk=2).round(4))
        0.5

    Args:
      unit: not negative.
      valid: False at padding.
      chunk: consecutive tokens.

    Raises:
      ValueError: the tokens are no whole chunks.
    """
    tokens, experts = unit.shape
    if tokens % chunk:
        raise ValueError(
            f"{tokens} tokens are no whole chunks of {chunk}: pad every document to a multiple, with valid=False"
        )
    n = unit.astype(jnp.float32)
    p = n / (jnp.sum(n, axis=-1, keepdims=True) + EPS)
    if valid is not None:
        p = jnp.where(valid[:, None], p, 0.0)
    unused = jnp.exp(jnp.sum(jnp.log(1 - p + EPS).reshape(-1, chunk, experts), axis=1))
    return jnp.mean(1 - unused)


@dataclasses.dataclass(frozen=True)
class AdaptiveFactor:
    """The weight of the chunk loss, which follows the loss (appendix B, equation 7).

    It stays until step `stable`. From then on, every `adjust` steps, it heads for itself times the ratio of the loss's mean in
    this window to that in the window before, a ratio above 1 being at least `least`, and gets there linearly in one window.

    Attributes:
      start: the first weight
      stable: steps before the first change
      adjust: steps of a window
      least: smallest ratio of growth
      cap: the weight grows to at most so many times the first one; None: without a limit, as in the paper
    """

    start: float = 5e-2
    stable: int = 1000
    adjust: int = 100
    least: float = 1.025
    cap: float | None = 4.0

    def __post_init__(self) -> None:
        if self.start < 0 or self.stable < self.adjust or self.adjust < 1 or self.least < 1:
            raise ValueError("start is at least 0, adjust and least at least 1, and stable is not below adjust")


class FactorState(NamedTuple):
    """State of `AdaptiveFactor`, arrays only.

    Attributes:
      base, ratio, since, length: the ramp from base to ratio * base, `since` steps old, `length` steps long.
      step: steps made.
      total, count: sum and number of the losses of this window.
      before: mean of the window before; NaN before there is one.
    """

    base: Any
    ratio: Any
    since: Any
    length: Any
    step: Any
    total: Any
    count: Any
    before: Any


def factor_state(config: AdaptiveFactor) -> FactorState:
    """The state before the first step."""
    f, i = jnp.float32, jnp.int32
    return FactorState(f(config.start), f(1), i(0), i(config.stable), i(0), f(0), i(0), f(jnp.nan))


def adaptive_factor(config: AdaptiveFactor, state: FactorState, loss: Any) -> tuple[Float[Array, ""], FactorState]:
    """(the weight of this step's chunk loss, the new state); jit-able.

    Args:
      loss: the chunk loss of this step before it is weighted, over all devices.
    """
    step = state.step + 1
    total, count = state.total + loss, state.count + 1
    mean, before = total / count, state.before
    closes = step % config.adjust == 0
    weight = state.base * (1 + (state.ratio - 1) * jnp.minimum(1.0, state.since / state.length))
    growth = jnp.where(mean > before, jnp.maximum(config.least, mean / before), mean / before)
    if config.cap is not None:
        growth = jnp.minimum(config.cap * config.start / jnp.maximum(weight, 1e-30), growth)
    turns = closes & (step >= config.stable) & jnp.isfinite(growth)
    new = FactorState(
        jnp.where(turns, weight, state.base), jnp.where(turns, growth, state.ratio),
        jnp.where(turns, 0, state.since) + 1, jnp.where(turns, config.adjust, state.length), step,
        jnp.where(closes, 0.0, total), jnp.where(closes, 0, count), jnp.where(closes, mean, before))  # fmt: skip
    return weight, new
