"""Classification losses, in float32 whatever the compute dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Loss: TypeAlias = Callable[[jax.Array, Mapping[str, jax.Array], Any], Any]


def cross_entropy(logits: Float[Array, "b k"], labels: Int[Array, " b"], smoothing: float = 0.0) -> Float[Array, " b"]:
    """Cross-entropy per example against (1 - smoothing) * one-hot + smoothing / k."""
    logits = logits.astype(jnp.float32)
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return hard
    uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1.0 - smoothing) * hard + smoothing * uniform


@functools.lru_cache(maxsize=32)
def mean_cross_entropy(smoothing: float) -> Loss:
    """The default training loss: the batch mean of `cross_entropy`."""

    def loss(logits, batch, params):
        del params
        return cross_entropy(logits, batch["label"], smoothing).mean()

    return loss
