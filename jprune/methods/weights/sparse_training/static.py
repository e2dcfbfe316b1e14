"""Static sparse training: the weights that are drawn before training stay, no other ever trains."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jprune.methods.weights.sparse_training.method import Look
from jprune.methods.weights.sparse_training.random import uniform


@dataclasses.dataclass(frozen=True)
class Static:
    """Random masks of the target's density from the beginning; for use with MaskSteps("constant")."""

    regrows: ClassVar[bool] = False

    def masks(self, look: Look) -> dict[str, Any]:
        """Drawn before training; later as they are."""
        return look.choose(uniform(look), look.kept) if look.gradients is None else look.masks
