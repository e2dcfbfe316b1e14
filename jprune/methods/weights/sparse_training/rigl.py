"""RigL (Evci et al. 2020): the smallest weights are exchanged for those with the largest gradients."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jprune.methods.weights.sparse_training.method import Look
from jprune.methods.weights.sparse_training.random import uniform
from jprune.methods.weights.sparse_training.regrowth import check_share, drop_and_grow


@dataclasses.dataclass(frozen=True)
class RigL:
    """Growth by |g|; for use with MaskSteps("constant"), or with another kind if the sparsity is to rise meanwhile.

    Attributes:
      drop: share of the weights left that is exchanged at first; it falls to 0 by a cosine.
    """

    drop: float = 0.3
    regrows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self.drop)

    def masks(self, look: Look) -> dict[str, Any]:
        """Random ones before training, then the exchange."""
        if look.gradients is None:
            return look.choose(uniform(look), look.kept)
        return drop_and_grow(look, self.drop, {p: jnp.abs(g) for p, g in look.gradients.items()})
