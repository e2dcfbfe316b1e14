"""Learning rates of every step, computed on the host: a linear warm-up times a decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float32

Smooth: TypeAlias = Literal["linear", "cosine", "constant"]

SMOOTH: Mapping[Smooth, Callable[[np.ndarray], np.ndarray]] = {  # the share done, in [0, 1] -> the share of the rate
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + np.cos(np.pi * done)),
    "constant": np.ones_like,
}


def smooth(shape: Smooth, steps: int, warmup: int = 0) -> Float[np.ndarray, " steps"]:
    """The decay of every step: from 1 at the first step after the warm-up to 0 just behind the last one.

    >>> smooth("linear", 4)
    array([1.  , 0.75, 0.5 , 0.25])
    """
    step = np.arange(steps, dtype=np.float64)
    return SMOOTH[shape](np.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0))


def stairs(steps: int, milestones: Sequence[int], factor: float) -> Float[np.ndarray, " steps"]:
    """The decay of every step: multiplied by `factor` at each milestone, a step counted from 0.

    >>> stairs(4, (1, 3), 0.5)
    array([1.  , 0.5 , 0.5 , 0.25])
    """
    return factor ** np.searchsorted(np.asarray(milestones, int), np.arange(steps), side="right")


def warmed_up(learning_rate: float, decay: Float[np.ndarray, " steps"], warmup: int) -> Float32[np.ndarray, " steps"]:
    """The learning rate of every step: `warmup` steps of a straight line up to the full rate, times the decay.

    >>> import numpy as np
    >>> warmed_up(1.0, np.ones(4), 2)
    array([0.5, 1. , 1. , 1. ], dtype=float32)
    """
    ramp = np.minimum((np.arange(len(decay)) + 1) / warmup, 1.0) if warmup else 1.0
    return np.asarray(learning_rate * decay * ramp, np.float32)
