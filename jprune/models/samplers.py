"""Deterministic samplers: rectified flow by Euler steps (Liu et al. 2023) and DDIM (Song et al. 2021).

A sampler is a table of times and a step. `times[i]` is where step i starts; the model predicts at it, the step goes to
`times[i + 1]`. Steps are linear in the sample and work on any shape; arithmetic is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


@runtime_checkable
class Sampler(Protocol):
    """What drives a model from noise to a sample."""

    @property
    def steps(self) -> int:
        """How often the model is asked."""
        ...

    def times(self) -> np.ndarray:
        """(steps + 1,) float32: the time the model is given at each step, and the last one reached."""
        ...

    def step(self, i: Any, x: Any, prediction: Any) -> Any:
        """The sample after step i (which may be traced), from the model's prediction at its start."""
        ...


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) data + t noise; the model predicts noise - data. Euler steps from t = 1 to 0.

    Attributes:
      steps: of equal size before the shift.
      shift: times become shift t / (1 + (shift - 1) t): larger ones spend more steps on the noisy end.
    """

    steps: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.shift > 0:
            raise ValueError(f"steps is at least 1 and shift above 0, not {self.steps} and {self.shift}")

    def times(self) -> np.ndarray:
        """(steps + 1,) float32, from 1 to 0."""
        t = np.linspace(1.0, 0.0, self.steps + 1)
        return (self.shift * t / (1 + (self.shift - 1) * t)).astype(np.float32)

    def step(self, i: Any, x: jax.Array, prediction: jax.Array) -> jax.Array:
        """x + (t' - t) v."""
        t = jnp.asarray(self.times())
        return (x.astype(jnp.float32) + (t[i + 1] - t[i]) * prediction.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DDIM:
    """x_t = sqrt(a_t) data + sqrt(1 - a_t) noise over a table of `trained` noise levels, visited in `steps` steps.

    Attributes:
      steps: number of levels visited, the noisiest first, evenly spaced and ending at the noisiest ("trailing").
      predicts: "noise", "data" or "velocity" (sqrt(a) noise - sqrt(1 - a) data).
      trained, start, end: a is the running product of 1 - beta, the square roots of beta evenly spaced.
      zero_snr: scale the table so that the noisiest level is pure noise (Lin et al. 2024, algorithm 1).
    """

    steps: int = 50
    predicts: Literal["noise", "data", "velocity"] = "noise"
    trained: int = 1000
    start: float = 0.00085
    end: float = 0.012
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.trained:
            raise ValueError(f"steps is {self.steps}: between 1 and the {self.trained} levels of training")
        if self.predicts not in ("noise", "data", "velocity"):
            raise ValueError(f"predicts is {self.predicts!r}: it must be noise, data or velocity")
        if self.zero_snr and self.predicts == "noise":
            raise ValueError("pure noise says nothing of the data: with zero_snr the model predicts velocity or data")
        if not 0 < self.start <= self.end < 1:
            raise ValueError(f"betas run from start to end within (0, 1), not from {self.start} to {self.end}")

    def levels(self) -> np.ndarray:
        """(steps,) indices of the visited levels, descending."""
        return np.round(np.arange(self.trained, 0, -self.trained / self.steps)).astype(int)[: self.steps] - 1

    def signal(self) -> Float[np.ndarray, " levels"]:
        """(steps + 1,) a at each visited level, and 1 at the end."""
        beta = np.linspace(self.start**0.5, self.end**0.5, self.trained) ** 2
        root = np.sqrt(np.cumprod(1 - beta))
        if self.zero_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return np.append(root[self.levels()] ** 2, 1.0)

    def times(self) -> np.ndarray:
        """(steps + 1,) float32: the levels as fractions of the table, and 0."""
        return np.append((self.levels() + 1) / self.trained, 0.0).astype(np.float32)

    def step(self, i: Any, x: jax.Array, prediction: jax.Array) -> jax.Array:
        """sqrt(a') data + sqrt(1 - a') noise, both as predicted."""
        table = self.signal()
        signal, noise = (jnp.asarray(np.sqrt(v), jnp.float32) for v in (table, 1 - table))
        wide, said = x.astype(jnp.float32), prediction.astype(jnp.float32)
        if self.predicts == "noise":
            data, eps = (wide - noise[i] * said) / signal[i], said
        elif self.predicts == "velocity":
            data, eps = signal[i] * wide - noise[i] * said, noise[i] * wide + signal[i] * said
        else:
            data, eps = said, (wide - signal[i] * said) / noise[i]
        return (signal[i + 1] * data + noise[i + 1] * eps).astype(x.dtype)


def sample(
    predict: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: jax.Array,
    sampler: Sampler,
    state: Any = None,
    first: int = 0,
    last: int | None = None,
) -> tuple[jax.Array, Any]:
    """(sample, state) after steps first, ..., last - 1, as one scan; jit-able and differentiable.

    Args:
      predict: (x, time, state) -> (prediction, new state of the same structure).
      x: noise, or what an earlier call returned.
      sampler: of the whole way.
      state: of whatever the model carries from step to step.
      first, last: which steps; None: to the end.

    Raises:
      ValueError: steps that the sampler does not have.
    """
    last = sampler.steps if last is None else last
    if not 0 <= first <= last <= sampler.steps:
        raise ValueError(f"steps {first} to {last} are not among the sampler's {sampler.steps}")
    times = jnp.asarray(sampler.times())

    def step(carry: tuple[Any, Any], i: Any) -> tuple[tuple[Any, Any], None]:
        x, state = carry
        prediction, state = predict(x, times[i], state)
        return (sampler.step(i, x, prediction), state), None

    return jax.lax.scan(step, (x, state), jnp.arange(first, last))[0]
