"""Training recipes, by epochs and by steps: what they may say, the learning rates and the optimisers they stand for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import jax
import numpy as np
import optax
from jaxtyping import Float32

from jprune.training.schedules import SMOOTH, Smooth, smooth, stairs, warmed_up

Rule: TypeAlias = tuple[str, bool, str]  # a field, whether its value is allowed, what is allowed


def check_settings(settings: Any, rules: Sequence[Rule]) -> None:
    """Raise ValueError for the first field of a settings dataclass that breaks its rule."""
    for name, holds, allowed in rules:
        if not holds:
            value = getattr(settings, name)
            raise ValueError(f"{type(settings).__name__}.{name} is {value!r}: it must be {allowed}")


def _shared_rules(config: TrainConfig | TuningConfig) -> list[Rule]:
    rate = config.learning_rate
    return [
        ("learning_rate", rate > 0 and math.isfinite(rate), "positive and finite"),
        ("weight_decay", config.weight_decay >= 0, "at least 0"),
        ("seed", config.seed >= 0, "at least 0"),
        ("accumulate", config.accumulate >= 1, "at least 1"),
        ("clip", config.clip > 0, "positive (infinity: no clipping)"),
    ]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """SGD with momentum, as CNNs are customarily trained; milestones and warm-up are counted in epochs.

    `checkpoint_every_steps` 0 means once an epoch; `eval_every_epochs` 0 means only after the last one.
    `accumulate` micro-batches make a batch: so many times fewer images are computed at once, and BatchNorm sees the
    micro-batches. Gradients are scaled down to a global norm of `clip`, before weight decay.
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
    accumulate: int = 1
    clip: float = math.inf

    def __post_init__(self) -> None:
        rules = [
            *_shared_rules(self),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("schedule", self.schedule in ("cosine", "step"), "'cosine' or 'step'"),
            ("decay", 0 < self.decay <= 1, "in (0, 1]"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and less than epochs"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
            ("checkpoint_every_steps", self.checkpoint_every_steps >= 0, "at least 0"),
            ("eval_every_epochs", self.eval_every_epochs >= 0, "at least 0"),
            ("recalibrate_examples", self.recalibrate_examples >= 0, "at least 0"),
            ("log_every_steps", self.log_every_steps >= 1, "at least 1"),
        ]
        check_settings(self, rules)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"TrainConfig.batch_size is {self.batch_size}: it must be a multiple of accumulate, {self.accumulate}"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"TrainConfig.milestones is {self.milestones}: epochs, from 1 on, in increasing order")
        if self.milestones and self.schedule != "step":
            raise ValueError("TrainConfig.milestones only mean something with schedule='step'")
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list from a JSON file would not hash


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> Float32[np.ndarray, " steps"]:
    """The learning rate of every step: linear warm-up, then half a cosine to zero or a factor at each milestone."""
    steps, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        decay = smooth("cosine", steps, warmup)
    else:
        decay = stairs(steps, [m * steps_per_epoch for m in config.milestones], config.decay)
    return warmed_up(config.learning_rate, decay, warmup)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """AdamW for a number of steps: a linear warm-up (a share of the steps), then a decay to zero.

    `accumulate` micro-batches make a step: batches have that many times the rows that are computed at once. Gradients are
    scaled down to a global norm of `clip`.
    """

    steps: int
    learning_rate: float = 1e-4
    schedule: Smooth = "linear"
    warmup: float = 0.0
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            *_shared_rules(self),
            ("steps", self.steps >= 1, "at least 1"),
            ("schedule", self.schedule in SMOOTH, "'linear', 'cosine' or 'constant'"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, in [0, 1)"),
            ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps >= 0, "at least 0"),
        ]
        check_settings(self, rules)
        object.__setattr__(self, "betas", tuple(self.betas))  # a list from a JSON file would not hash

    @property
    def rates(self) -> Float32[np.ndarray, " steps"]:
        """The learning rate of every step; the first step after the warm-up has the full one."""
        warmup = math.ceil(self.warmup * self.steps)
        return warmed_up(self.learning_rate, smooth(self.schedule, self.steps, warmup), warmup)

    @property
    def stages(self) -> tuple[optax.GradientTransformation, ...]:
        """AdamW as stages of an optimiser, for `init_state` and `descend`; the rate is given to each update."""
        return adamw(self.betas, self.eps, self.weight_decay)


def _scaled_by_rate(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    del params
    learning_rate = extra["learning_rate"]
    return jax.tree.map(lambda u: -learning_rate.astype(u.dtype) * u, updates), state


times_rate = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), _scaled_by_rate)


@functools.lru_cache(maxsize=32)
def adamw(betas: tuple[float, float], eps: float, weight_decay: float) -> tuple[optax.GradientTransformation, ...]:
    """Adam's direction, then weight decay times the `learning_rate` given to each update; equal settings: equal objects."""
    decay = optax.add_decayed_weights(weight_decay)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return times_rate.update(decay.update(updates, state, params)[0], state, params, **extra)

    return optax.scale_by_adam(*betas, eps), optax.GradientTransformationExtraArgs(decay.init, update)


@functools.lru_cache(maxsize=32)
def sgd(weight_decay: float, momentum: float, nesterov: bool) -> optax.GradientTransformationExtraArgs:
    """Weight decay on every parameter, then (Nesterov) momentum, then the `learning_rate` given to each update.

    The rate is an argument and equal settings give the same object, so that phases of training which differ in
    length or schedule share one compiled step.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum, nesterov), times_rate)


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
