"""What a method of sparse training sees at a step at which masks are chosen, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol


@dataclasses.dataclass(frozen=True)
class Look:
    """The leaves with a pattern at one step, as flat dicts {path: array}.

    Attributes:
      weights: the parameters, zero where a mask is False.
      gradients: of all weights, also of those that are zero; None when masks are made before training.
      masks: as they are.
      key: for what is random at this step.
      index: how many steps with a choice lie before this one (traced).
      number: how many such steps there are in all.
      step, last: the step of training, and the last one with a choice.
      kept: {path: weights that stay after this step} (traced); leaves with N:M have none.
      choose: (scores, kept, normalise=False) -> masks that keep the largest scores in each leaf's pattern, as
        `jprune.budget.choose`.
      choose_among: (scores, kept) -> the same, whatever the pattern: of N:M too it takes a count.
    """

    weights: dict[str, Any]
    gradients: dict[str, Any] | None
    masks: dict[str, Any]
    key: Any
    index: Any
    number: int
    step: Any
    last: int
    kept: dict[str, Any]
    choose: Callable[..., dict[str, Any]]
    choose_among: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class Method(Protocol):
    """Which weights stay. One frozen dataclass per algorithm.

    Attributes:
      regrows: whether a weight that went may come back: it starts from zero, with the optimizer's state anew. At a
        step at which masks are chosen the others then keep their values, though the optimizer sees their gradients.
    """

    regrows: ClassVar[bool]

    def masks(self, look: Look) -> dict[str, Any]:
        """The masks from this step on."""
        ...
