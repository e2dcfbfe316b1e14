"""Random pruning while training: the control that every criterion has to beat."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jprune.methods.weights.sparse_training.method import Look


@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform scores for the weights that are left; none comes back."""

    regrows: ClassVar[bool] = False

    def masks(self, look: Look) -> dict[str, Any]:
        """Random ones of those that are left."""
        drawn = uniform(look)
        return look.choose({p: jnp.where(look.masks[p], s, -1.0) for p, s in drawn.items()}, look.kept)


def uniform(look: Look) -> dict[str, Any]:
    """Numbers in [0, 1) for every weight, from the look's key."""
    keys = jax.random.split(look.key, max(len(look.weights), 1))
    return {p: jax.random.uniform(k, w.shape) for (p, w), k in zip(look.weights.items(), keys, strict=False)}
