"""Magnitude pruning while training (Zhu and Gupta 2017): the smallest weights go, and none comes back."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jprune.methods.weights.sparse_training.method import Look


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Score |w|. With an N:M pattern and a gradual schedule N falls from M to its target (iterative N:M).

    Attributes:
      normalise: where pattern="model" compares leaves, divide the scores of each by their L2 norm (global magnitude).
    """

    normalise: bool = False

    regrows: ClassVar[bool] = False

    def masks(self, look: Look) -> dict[str, Any]:
        """The largest weights."""
        return look.choose({p: jnp.abs(w) for p, w in look.weights.items()}, look.kept, self.normalise)
