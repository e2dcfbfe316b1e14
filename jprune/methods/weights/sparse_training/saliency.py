"""Saliency pruning while training: weights whose removal changes the loss least, to first order, go."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jprune.methods.weights.sparse_training.method import Look


@dataclasses.dataclass(frozen=True)
class Saliency:
    """Score |w g|, g the gradient of the step's batch (Molchanov et al. 2016, eq. 7).

    Attributes:
      normalise: where pattern="model" compares leaves, divide the scores of each by their L2 norm.
    """

    normalise: bool = False

    regrows: ClassVar[bool] = False

    def masks(self, look: Look) -> dict[str, Any]:
        """The largest scores. Raises ValueError before training, when there are no gradients."""
        if look.gradients is None:
            raise ValueError("saliency needs gradients, and masks made before training have none: take another kind of "
                             "MaskSteps than 'constant'")  # fmt: skip
        g = look.gradients
        scores = {p: jnp.abs(w.astype(jnp.float32) * g[p]) for p, w in look.weights.items()}
        return look.choose(scores, look.kept, self.normalise)
