"""AC/DC (Peste et al. 2021): training alternates between sparse and dense phases, and ends with a sparse one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jprune.methods.weights.sparse_training.method import Look


@dataclasses.dataclass(frozen=True)
class ACDC:
    """Every other step of `MaskSteps` compresses by magnitude, those between make all weights train again, from zero.

    The last one compresses. Give `MaskSteps("one_shot", start, end, every)`, with `every` the length of a phase: each
    sparse phase has the target's sparsity.
    """

    regrows: ClassVar[bool] = True

    def masks(self, look: Look) -> dict[str, Any]:
        """The largest weights, or all."""
        sparse = (look.number - 1 - look.index) % 2 == 0
        chosen = look.choose({p: jnp.abs(w) for p, w in look.weights.items()}, look.kept)
        return {p: m | ~sparse for p, m in chosen.items()}
