"""LAPP: layers pruned while a network is trained for the first time, each by a threshold of its own that is learned.

LAPP as specified by jprune, following the published abstract (Zhai et al. 2023, arXiv 2309.14157). From the abstract:
from scratch, in the first epochs, one learned threshold a layer, moved by the task and by a constraint on the
MACs, a light bypass beside each layer. Everything marked [ours] is our concrete definition of what it
only names, and an option.

    before   a bypass B_l beside every prunable convolution (full width: masks are local, a layer may lose all filters)
    z        = (s - mean s) / (std s + 1e-8)              s: importance of the layer's filters        [ours]
    m        = 1 if z > t_l else 0;   dm/dt_l = -sig'((z - t_l) / tau) / tau                          [ours]
    y        = m * BN(conv(x)) + B_l(x)
    loss     = task + beta * max(0, MACs(m) / MACs_0 - r(e)),   r(e) falls to the target              [ours]
    t_l      <- clip(t_l - rate * gradient, -4, 4)        weights and thresholds learn together       [ours]
    finally  the smallest common offset on all thresholds that meets the target; masked filters are sliced off

These are the formulas; `lapp_layers`, `lapp_gates`, `lapp_forward` and `lapp_network` put them into a traced function,
`lapp_run` trains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jprune.methods.channels.lapp import bypass

SCORES, SCHEDULES, REGROW = ("l1", "bn", "taylor"), ("linear", "cubic", "constant"), ("none", "dense")
HEALTHY, SUSPICIOUS = 0.3, 0.5  # |offset|: below the one the thresholds were learned, above the other they were not


class Infeasible(ValueError):
    """The target lies below what is left when every layer loses all the filters it may."""


@dataclasses.dataclass(frozen=True)
class LappConfig:
    """What is pruned, and every choice that the abstract leaves open.

    Attributes:
      target: MACs to keep, bypasses included, as a fraction of the original network's.
      bypass: "pw" (1x1), "dw" (depthwise), "lowrank" or "none"; where "pw" would meet a 1x1 convolution it is "dw".
      bypass_scale: initial BatchNorm scale of the bypasses; 0 starts as the plain network.
      couple: with "none": channels go from their consumers too, one threshold per dependency group.
      score: "l1" (mean |w| of a filter), "bn" (|scale|) or "taylor" (moving average of |sum of w * gradient|).
      memory: share of the old value in that moving average.
      score_grad: the loss may move the scores through the gates as well.
      tau: width of the surrogate. start: initial thresholds. bound: largest |threshold|.
      threshold_rate: learning rate of the thresholds' plain gradient descent (no momentum, no decay).
      beta: weight of the constraint. schedule: r(e), "linear", "cubic" or "constant".
      task_to_threshold: False: the constraint alone moves the thresholds (ablation).
      regrow: "dense": masked filters get the surrogate's gradient and may come back.
      prune_1x1: also 1x1 convolutions. only: patterns of kernel paths.
      min_keep: filters every layer keeps; None: 0 with a bypass or a residual path around it, else 1.
    """

    target: float
    bypass: str = "pw"
    bypass_scale: float = 1.0
    couple: bool = False
    score: str = "l1"
    memory: float = 0.9
    score_grad: bool = False
    tau: float = 1.0
    start: float = -3.0
    bound: float = 4.0
    threshold_rate: float = 0.5
    beta: float = 20.0
    schedule: str = "linear"
    task_to_threshold: bool = True
    regrow: str = "none"
    prune_1x1: bool = False
    only: tuple[str, ...] = ("*",)
    min_keep: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("bypass", bypass.KINDS), ("score", SCORES), ("schedule", SCHEDULES), ("regrow", REGROW)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"LappConfig.{name} is {getattr(self, name)!r}: it must be one of {allowed}")
        rules = [
            ("target", 0 < self.target <= 1, "in (0, 1]"),
            ("memory", 0 <= self.memory < 1, "in [0, 1)"),
            ("tau", self.tau > 0, "above 0"),
            ("bound", self.bound > 0, "above 0"),
            ("start", abs(self.start) <= self.bound, f"within the bound, {self.bound}"),
            ("threshold_rate", self.threshold_rate >= 0, "at least 0"),
            ("beta", self.beta >= 0, "at least 0"),
            ("min_keep", (self.min_keep or 0) >= 0, "at least 0"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"LappConfig.{name} is {getattr(self, name)!r}: it must be {allowed}")
        if self.couple and self.bypass != "none":
            raise ValueError("couple=True takes channels from their consumers, to which a bypass would still give them: "
                             "use bypass='none'")  # fmt: skip


def standardise(s: Float[Array, " n"]) -> Float[Array, " n"]:
    """z = (s - mean) / (std + 1e-8) over one layer, population deviation: one scale of thresholds for all layers."""
    s = s.astype(jnp.float32)
    return (s - s.mean()) / (s.std() + 1e-8)


def gate(z: Float[Array, " n"], t: Any, tau: float = 1.0, min_keep: int = 0) -> Float[Array, " n"]:
    """1 where z > t (or among the `min_keep` largest), else 0; its derivative is that of sigmoid((z - t) / tau)."""
    soft = surrogate(z, t, tau)
    hard = (z > t) | (jnp.argsort(jnp.argsort(-z, stable=True), stable=True) < min_keep)
    return hard.astype(jnp.float32) + (soft - lax.stop_gradient(soft))  # exactly 0 or 1, not 1 + rounding


def surrogate(z: Float[Array, " n"], t: Any, tau: float = 1.0) -> Float[Array, " n"]:
    """sigmoid((z - t) / tau)."""
    return jax.nn.sigmoid((z - t) / tau)


def gated(y: Array, m: Array, soft: Array | None = None) -> Array:
    """m * y; with `soft`, masked entries of y get a gradient as if they were weighed by it (regrow="dense")."""
    if soft is None:
        return m.astype(y.dtype) * y
    m, soft = m.astype(y.dtype), lax.stop_gradient(soft).astype(y.dtype)
    return m * lax.stop_gradient(y) + soft * (y - lax.stop_gradient(y))


def target_at(e: Any, target: float, schedule: str = "linear") -> Any:
    """r(e): the budget at the fraction e of the pruning phase."""
    progress = {"linear": e, "cubic": 1 - (1 - e) ** 3, "constant": 1.0}[schedule]
    return 1 + (target - 1) * progress


def hinge(ratio: Any, budget: Any, beta: float = 20.0) -> Any:
    """beta * max(0, ratio - budget): no pressure once the moving budget is met."""
    return beta * jnp.maximum(ratio - budget, 0.0)


def threshold_step(t: Any, gradient: Any, rate: float = 0.5, bound: float = 4.0) -> Any:
    """What plain gradient descent adds to a threshold, clamped to [-bound, bound]."""
    return jnp.clip(t - rate * gradient, -bound, bound) - t


class Offset(NamedTuple):
    """keep: {layer: bool (n,)}; offset: what was added to all thresholds; ratio: cost that stays over the whole."""

    keep: dict[str, np.ndarray]
    offset: float
    ratio: float


def common_offset(
    z: Mapping[str, Any],
    t: Mapping[str, Any],
    ratio: Callable[[dict[str, Bool[np.ndarray, " n"]]], float],
    target: float,
    min_keep: Mapping[str, int] | int = 0,
    nearest: bool = False,
) -> Offset:
    """The smallest offset o with ratio(z > t + o) <= target, by 60 halvings; host-side.

    Many offsets give the same masks; the one nearest to 0 is reported. `nearest`: the next larger network instead,
    where its ratio is closer to the target (to compare methods whose steps are coarse).

    Args:
      z, t: per layer, standardised scores (n,) and threshold.
      ratio: cost of a keep set as a fraction.
      min_keep: filters a layer keeps whatever the offset.

    Raises:
      Infeasible: even the largest offset leaves more than the target.
    """
    gaps = {k: np.asarray(z[k], np.float64) - float(t[k]) for k in z}
    least = {k: min_keep if isinstance(min_keep, int) else min_keep[k] for k in z}
    for k, g in gaps.items():
        if not np.isfinite(g).all():
            raise ValueError(f"scores or threshold of layer {k!r} are not finite: training diverged")
    always = {k: np.argsort(np.argsort(-g, kind="stable"), kind="stable") < least[k] for k, g in gaps.items()}

    def masks(o: float) -> dict[str, np.ndarray]:
        return {k: (g > o) | always[k] for k, g in gaps.items()}

    every = np.concatenate([g[~always[k]] for k, g in gaps.items()] or [np.zeros(0)])
    low, high = min(-9.0, every.min(initial=0.0) - 1.0), max(9.0, every.max(initial=0.0))
    if ratio(masks(low)) <= target:
        high = low
    elif (minimum := ratio(masks(high))) > target:
        raise Infeasible(f"the target {target:.4g} cannot be reached: {minimum:.4g} is left when every layer is pruned "
                         "as far as it may be; raise the target, or use a cheaper bypass")  # fmt: skip
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio(masks(middle)) <= target else (middle, high)
    if nearest and (over := every[every <= high]).size:
        larger = np.nextafter(over.max(), -np.inf)  # the offset that lets the next filter stay
        if ratio(masks(larger)) - target < target - ratio(masks(high)):
            high = larger
    first, last = (f(every, high) for f in (_first_same, _last_same))
    offset = min(max(0.0, first), last)
    keep = masks(high)
    return Offset(keep, float(offset), float(ratio(keep)))


def _first_same(gaps: np.ndarray, o: float) -> float:
    """Smallest offset with the masks of o: the largest masked gap."""
    return float(gaps[gaps <= o].max(initial=-np.inf))


def _last_same(gaps: np.ndarray, o: float) -> float:
    """Largest offset with the masks of o: just below the smallest gap that stays."""
    return float(np.nextafter(gaps[gaps > o].min(initial=np.inf), -np.inf))
