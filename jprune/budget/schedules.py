"""Sparsity schedules: how the fraction kept goes from 1 to its target over the steps of a progressive pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

KINDS = ("one_shot", "linear", "cubic", "exponential")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Fraction kept after step t of `steps` (t = 1..steps).

    Attributes:
      kind: "one_shot", "linear", "cubic" (sparsity s(t) = s (1 - (1 - t/steps)^3), Zhu and Gupta 2017, eq. 1) or
        "exponential" (the same share of what is left goes in each step).
      steps: number of pruning steps.
      keep: fraction kept at the end, in (0, 1].
    """

    kind: str
    steps: int
    keep: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a schedule is one of {', '.join(map(repr, KINDS))}, not {self.kind!r}")
        if self.steps < 1:
            raise ValueError(f"a schedule has at least 1 step, not {self.steps}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"the fraction kept must be in (0, 1], not {self.keep}; sparsity is 1 minus it")

    def __call__(self, step: int) -> float:
        """Fraction kept after `step` steps; 1.0 at step 0."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} is outside 0..{self.steps}")
        done = step / self.steps
        if self.kind == "exponential":
            return self.keep**done
        grown = {"one_shot": float(step > 0), "linear": done, "cubic": 1 - (1 - done) ** 3}[self.kind]
        return 1 - (1 - self.keep) * grown

    def __iter__(self) -> Iterator[float]:
        """The fractions after steps 1..steps."""
        return (self(t) for t in range(1, self.steps + 1))
