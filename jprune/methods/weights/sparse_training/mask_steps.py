"""When masks are chosen during training, and how many weights stay at each of these steps; always ends on the target."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune.budget.schedules import KINDS, Schedule
from jprune.budget.weights import Distribution, counts
from jprune.surgery.patterns import NM, by_glob

MOST = 20_000_000  # numbers in a table of counts


@dataclasses.dataclass(frozen=True)
class MaskSteps:
    """Steps of training at which masks are chosen: start, start + every, ..., and `end` in any case.

    >>> MaskSteps("cubic", start=0, end=99, every=10).number
    11

    Attributes:
      kind: how the sparsity grows over these steps, from none before the first to the target at the last: "one_shot" (at
        once), "linear", "cubic" (fast at first), "exponential" (the same share of what is left each time); or
        "constant": masks of the target are made before training, and the steps (but for step 0) only change them.
      start: the first such step; training counts its steps from 0.
      end: the last one; None: `start`.
      every: steps from one to the next.
    """

    kind: str = "one_shot"
    start: int = 0
    end: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "constant"):
            raise ValueError(f"masks go by {', '.join(map(repr, KINDS))} or 'constant', not {self.kind!r}")
        for name in ("start", "last", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise ValueError(f"{name.replace('last', 'end')} is {value}: it is a number of steps, 0 or more")
        if self.every < 1 or self.last < self.start:
            raise ValueError(f"masks are chosen from step {self.start} to {self.last}, every {self.every} steps: the end is "
                             "not before the start, and every is at least 1")  # fmt: skip

    @property
    def last(self) -> int:
        """The last step at which masks are chosen."""
        return self.start if self.end is None else self.end

    @property
    def number(self) -> int:
        """How many steps there are at which masks are chosen."""
        return -(-(self.last - self.start) // self.every) + 1

    def due(self, step: Any) -> Any:
        """Whether masks are chosen at a step (a traced integer)."""
        inside = (step >= max(self.start, int(self.kind == "constant"))) & (step <= self.last)
        return inside & (((step - self.start) % self.every == 0) | (step == self.last))

    def index(self, step: Any) -> Any:
        """How many such steps lie before a step at which masks are chosen."""
        return jnp.where(step == self.last, self.number - 1, (step - self.start) // self.every)

    def keep(self, target: float) -> list[float]:
        """Share of weights that stays after each of these steps, but for the last, which is the target."""
        if self.kind == "constant":
            return [target] * (self.number - 1)
        return list(Schedule(self.kind, self.number, target))[:-1]


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Numbers for every step at which masks are chosen: rows of tables, made on the host.

    Attributes:
      paths: leaves with a count, in the tables' order.
      kept: weights that stay, uint32 (steps, leaves).
      groups: N of each N:M leaf, {path: int32 (steps,)}; M where it is still dense.
    """

    paths: tuple[str, ...]
    kept: np.ndarray
    groups: dict[str, np.ndarray]


@functools.lru_cache(64)
def amounts(
    steps: MaskSteps,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    nm: tuple[tuple[str, NM], ...],
    sparsity: float,
    distribution: Distribution | tuple[tuple[str, float | None], ...],
) -> Amounts:
    """The tables of one training run.

    Args:
      steps: when.
      shapes: (path, shape) of the leaves that are counted.
      nm: (path, pattern) of the leaves with N:M.
      sparsity: at the end.
      distribution: as `counts` has it, a mapping as its items.

    Raises:
      ValueError: what `counts` refuses, or tables too large to be part of a program.
    """
    if steps.number * (len(shapes) + len(nm)) > MOST:
        raise ValueError(
            f"masks of {len(shapes) + len(nm)} leaves are chosen {steps.number} times: choose them less often"
        )
    how: Any = dict(distribution) if isinstance(distribution, tuple) else distribution
    target = counts(dict(shapes), sparsity, how)
    paths = tuple(target)
    size = dict(shapes)
    kept = np.empty((steps.number, len(paths)), np.uint32)
    kept[-1] = [target[p] for p in paths]
    own = {p: sparsity for p in paths}
    if isinstance(how, dict):
        own |= {p: v for p, v in by_glob(how, size, "sparsity").items() if p in own}
    at_once = sparsity or 0.5  # leaves may have a sparsity of their own though the others have none
    for i, share in reversed(list(enumerate(steps.keep(1 - at_once)))):
        if steps.kind == "constant":
            kept[i] = kept[-1]
            continue
        grown = (1 - share) / at_once
        now = {p: min(max(v * grown, 0.0), 0.999999999) for p, v in own.items()}
        sizes = {p: size[p] for p in paths}
        found = counts(sizes, sparsity * grown, now if isinstance(how, dict) else how) if paths else {}
        kept[i] = np.maximum([found[p] for p in paths], kept[i + 1])  # roundings never bring a weight back
    groups = {}
    for p, v in nm:
        falling = steps.keep(v.keep / v.of)
        groups[p] = np.array([max(v.keep, math.ceil(v.of * k - 1e-6)) for k in falling] + [v.keep], np.int32)
    return Amounts(paths, kept, groups)
