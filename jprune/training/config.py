"""The training recipe: what it may say, the learning-rate schedule and the optimiser it stands for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import numpy as np
import optax
from jaxtyping import Float32


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """SGD with momentum, as CNNs are customarily trained; milestones and warm-up are counted in epochs.

    `checkpoint_every_steps` 0 means once an epoch; `eval_every_epochs` 0 means only after the last one.
    `recalibrate_examples` above 0 replaces BatchNorm's moving averages by means over that many examples at the end of
    every epoch. The defaults train a small ResNet on the digits in under a minute.
    """

    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 0.05
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    checkpoint_every_steps: int = 0
    eval_every_epochs: int = 1
    recalibrate_examples: int = 0
    log_every_steps: int = 1

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0 and math.isfinite(self.learning_rate), "positive and finite"),
            ("schedule", self.schedule in ("cosine", "step"), "'cosine' or 'step'"),
            ("decay", 0 < self.decay <= 1, "in (0, 1]"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and less than epochs"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
            ("seed", self.seed >= 0, "at least 0"),
            ("checkpoint_every_steps", self.checkpoint_every_steps >= 0, "at least 0"),
            ("eval_every_epochs", self.eval_every_epochs >= 0, "at least 0"),
            ("recalibrate_examples", self.recalibrate_examples >= 0, "at least 0"),
            ("log_every_steps", self.log_every_steps >= 1, "at least 1"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)!r}: it must be {allowed}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"TrainConfig.milestones is {self.milestones}: epochs, from 1 on, in increasing order")
        if self.milestones and self.schedule != "step":
            raise ValueError("TrainConfig.milestones only mean something with schedule='step'")
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list from a JSON file would not hash


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> Float32[np.ndarray, " steps"]:
    """The learning rate of every step: linear warm-up, then half a cosine to zero or a factor at each milestone."""
    step = np.arange(config.epochs * steps_per_epoch, dtype=np.float64)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        factor = 0.5 * (1.0 + np.cos(np.pi * np.clip((step - warmup) / (len(step) - warmup), 0.0, 1.0)))
    else:
        factor = config.decay ** np.searchsorted(np.array(config.milestones) * steps_per_epoch, step, side="right")
    ramp = np.minimum((step + 1) / warmup, 1.0) if warmup else 1.0
    return np.asarray(config.learning_rate * factor * ramp, np.float32)


@functools.lru_cache(maxsize=32)
def sgd(weight_decay: float, momentum: float, nesterov: bool) -> optax.GradientTransformationExtraArgs:
    """Weight decay on every parameter, then (Nesterov) momentum, then the `learning_rate` given to each update.

    The rate is an argument and equal settings give the same object, so that phases of training which differ in
    length or schedule share one compiled step.
    """

    def scale(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params
        learning_rate = extra["learning_rate"]
        return jax.tree.map(lambda u: -learning_rate.astype(u.dtype) * u, updates), state

    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov),
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale),
    )


def with_own_updates(
    optimizer: optax.GradientTransformation, rules: Mapping[str, Callable[[Any, Any], Any]]
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, but for some entries of the parameters: rules[key](gradients, parameters) updates params[key].

    For what is learned beside the weights (thresholds, multipliers, moving averages of gradients): a rule sees all
    gradients and parameters and returns what is added to its entry; neither decay nor momentum touches it.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        out, state = inner.update(updates, state, params, **extra)
        out = dict(cast("Mapping[str, Any]", out))
        if missing := [k for k in rules if k not in out]:
            raise ValueError(f"the parameters have the entries {sorted(out)}, none called {missing[0]!r}")
        return {**out, **{key: rule(updates, params) for key, rule in rules.items()}}, state

    return optax.GradientTransformationExtraArgs(inner.init, update)
