"""MaskSparsity: sparse regularisation only of the channels that will be pruned (Jiang et al. 2023, arXiv 2201.06776).

    0 baseline    train normally                                                     -> W0
    1 global      from W0, penalty on all listed BatchNorm scales                     -> W1   (only to find a mask)
    2 mask        keep = |gamma| > threshold, coupled layers by vote
    3 masked      again from W0, penalty only where keep is False                     -> W3   (this is the method)
    4 prune       channels of W3 with |gamma| <= threshold
    5 fine-tune   short, at a small learning rate

Network slimming (Liu et al. 2017) is the same with step 3 left out: the penalty weakens the channels that stay as
well. Scales are found by their use in the traced function, coupled layers by their dependency group. The penalty is
float32 and element-wise, so sharded scales need nothing special; masks and strength are optimiser state, so changing
them does not recompile. Masks and thresholds are host-side numpy: sizes follow from them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from jprune.graph import Graph
from jprune.importance.batchnorm import scale_leaves
from jprune.tracing.errors import suggest
from jprune.tracing.paths import flatten, path_str

KINDS = ("l1", "l2", "smooth_l1")
METHODS = ("threshold", "optimal", "sparsity")
REDUCTIONS = ("vote", "mean", "first")


class PenaltyState(NamedTuple):
    """Masks by leaf path (float32, 1 = regularise) and the strength (float32 scalar)."""

    masks: dict[str, jax.Array]
    strength: jax.Array


def masked_penalty(
    masks: Mapping[str, Any], strength: float, kind: str = "l1"
) -> optax.GradientTransformationExtraArgs:
    """Add the penalty's gradient to that of the masked scales; the first link of an optimiser (section 3.2).

    "l1": s*sign(g)*M with sign(0) = 0; "l2": s*g*M; "smooth_l1": l2 where |g| < learning_rate*s, else l1 (it does not
    flutter around zero; the update then needs `learning_rate=`). All else passes bitwise unchanged.

    Args:
      masks: {leaf path: (n,) 1 where regularised, 0 where not}; leaves that are absent get no penalty.
      strength: s, the weight of the penalty in the loss.
      kind: "l1", "l2" or "smooth_l1".

    Raises:
      ValueError: unknown kind, a negative strength, masks that name no parameter or have another shape.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"the strength of the penalty is {strength}: it must be a finite number, at least 0")

    def init(params: Any) -> PenaltyState:
        del params
        return PenaltyState(
            {p: jnp.asarray(m, jnp.float32) for p, m in masks.items()}, jnp.asarray(strength, jnp.float32)
        )

    return optax.GradientTransformationExtraArgs(init, _add_penalty(kind))


@functools.lru_cache(maxsize=len(KINDS))
def _add_penalty(kind: str) -> Any:
    def update(updates: Any, state: PenaltyState, params: Any = None, **extra: Any) -> tuple[Any, PenaltyState]:
        if params is None:
            raise ValueError("masked_penalty needs the parameters: call update(updates, state, params)")
        rate: Any = extra.get("learning_rate")
        if kind == "smooth_l1" and rate is None:
            raise ValueError(
                "kind='smooth_l1' needs update(..., learning_rate=): its kink is at learning_rate*strength"
            )
        paths = [p for p, _ in flatten(params)]
        masks = {_as_in(p, paths): m for p, m in state.masks.items()}

        def one(path: Any, grad: Any, gamma: Any) -> Any:
            name = path_str(path)
            if name not in masks:
                return grad
            if masks[name].shape != gamma.shape:
                raise ValueError(f"the mask of {name!r} has shape {masks[name].shape}, the scale {gamma.shape}")
            g = gamma.astype(jnp.float32)
            slope = state.strength * (g if kind == "l2" else jnp.sign(g))
            if kind == "smooth_l1":
                slope = jnp.where(jnp.abs(g) < rate * state.strength, state.strength * g, slope)
            added = (grad.astype(jnp.float32) + slope * masks[name]).astype(grad.dtype)
            return jnp.where(masks[name] == 0, grad, added)  # bitwise what it was where nothing is asked

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return update


def _as_in(path: str, paths: Sequence[str]) -> str:
    """A path of the variables as a path of the tree the optimiser sees, which may be their "params" alone."""
    for p in (path, path.removeprefix("params/")):
        if p in paths:
            return p
    raise ValueError(f"a mask is given for {path!r}, which is no parameter{suggest(path, paths)}")


def listed_scales(graph: Graph, coupled: bool = True, only: Sequence[str] = ("*",)) -> dict[str, tuple[str, ...]]:
    """{group: its BatchNorm scales}, in program order: the layers that the method decides about.

    Args:
      graph: the traced function, in evaluation mode.
      coupled: also groups with several scales (residual streams, depthwise pairs), whose layers share one mask.
      only: patterns of group ids.

    Raises:
      ValueError: nothing is left, or a pattern matches no group.
    """
    for pattern in only:
        if not fnmatch.filter(graph.groups, pattern):
            raise ValueError(f"only={pattern!r} matches no group{suggest(pattern, graph.groups)}")
    found: dict[str, tuple[str, ...]] = {}
    for path, gid in scale_leaves(graph).items():
        group = graph.groups[gid]
        if group.exact and group.layers is None and any(fnmatch.fnmatch(gid, p) for p in only):
            found[gid] = (*found.get(gid, ()), path)
    found = {g: s for g, s in found.items() if coupled or len(s) == 1}
    if not found:
        raise ValueError("the function has no normalisation scale that owns the channels of a group; score its "
                         "weights instead (jprune.importance.magnitude)")  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """How scales become a mask (section 3.3 and 3.4).

    Attributes:
      method: "threshold" (one value for all layers), "optimal" (per layer, by energy: arXiv 2003.04566) or "sparsity"
        (that fraction of all listed channels, smallest |gamma| first).
      threshold: channels with |gamma| above it stay.
      delta: "optimal": fraction of the energy that may go.
      sparsity: "sparsity": fraction of channels that go, in [0, 1).
      reduce: layers that share a mask "vote" (the paper's), are averaged ("mean"), or follow the "first".
      min_keep: channels every layer keeps; 0 lets a branch vanish.
    """

    method: str = "threshold"
    threshold: float = 0.01
    delta: float = 1e-4
    sparsity: float = 0.5
    reduce: str = "vote"
    min_keep: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.reduce not in REDUCTIONS:
            raise ValueError(
                f"method is one of {METHODS} and reduce of {REDUCTIONS}; got {self.method!r}, {self.reduce!r}"
            )
        if not 0 <= self.sparsity < 1 or self.threshold < 0 or not 0 < self.delta < 1 or self.min_keep < 0:
            raise ValueError(f"{self}: sparsity lies in [0, 1), delta in (0, 1), threshold and min_keep are at least 0")


class Masks(NamedTuple):
    """keep: {group: bool (n,)}; given_back: {group: channels the minimum took back from the vote}, where it had to."""

    keep: dict[str, np.ndarray]
    given_back: dict[str, int]


def make_mask(gammas: Mapping[str, Any], listed: Mapping[str, Sequence[str]], rule: MaskRule) -> Masks:
    """Step 2 (and, on the scales of W3, step 4): which channels of which groups stay; host-side.

    Args:
      gammas: {leaf path: scales (n,)} or a whole tree of variables.
      listed: {group: paths of its scales}.
      rule: how.

    Raises:
      ValueError: a scale is missing or not finite.
    """
    size = {g: _scale(gammas, paths[0]) for g, paths in listed.items()}
    rows: dict[str, np.ndarray] = {}
    for g, paths in listed.items():
        stack = np.stack([_scale(gammas, p) for p in paths])
        if rule.reduce == "mean":
            stack = stack.mean(axis=0, keepdims=True)
        rows[g] = stack[:1] if rule.reduce == "first" else stack
    if rule.method == "sparsity":
        every = np.concatenate([r.ravel() for r in rows.values()])
        gone = np.zeros(every.size, bool)
        gone[np.argsort(every, kind="stable")[: int(np.floor(rule.sparsity * every.size + 1e-9))]] = True
        cuts = np.cumsum([r.size for r in rows.values()])[:-1]
        kept = {g: ~part.reshape(rows[g].shape) for g, part in zip(rows, np.split(gone, cuts), strict=True)}
    else:
        kept = {g: np.stack([x > _threshold(x, rule) for x in r]) for g, r in rows.items()}
    keep, given_back = {}, {}
    for g, r in rows.items():
        layers = np.stack([at_least(x, k, rule.min_keep) for x, k in zip(r, kept[g], strict=True)])
        keep[g], returned = vote(~layers, r.sum(axis=0), rule.min_keep) if len(layers) > 1 else (layers[0], 0)
        if returned:
            given_back[g] = returned
        assert keep[g].shape == size[g].shape
    return Masks(keep, given_back)


def _scale(gammas: Mapping[str, Any], path: str) -> Float[np.ndarray, " n"]:
    found = gammas.get(path)
    if found is None:
        found = dict(flatten(gammas)).get(path)
    if found is None:
        raise ValueError(f"no scale {path!r} among the values given")
    value = np.abs(np.asarray(jax.device_get(found), np.float32))
    if not np.isfinite(value).all():
        raise ValueError(f"{path!r} is not finite at channel {int(np.argmin(np.isfinite(value)))}: training diverged")
    return value


def _threshold(x: Float[np.ndarray, " n"], rule: MaskRule) -> float:
    return rule.threshold if rule.method == "threshold" else optimal_threshold(x, rule.delta)


def optimal_threshold(x: Float[np.ndarray, " n"], delta: float = 1e-4) -> float:
    """Threshold of one layer below which at most `delta` of the energy lies (arXiv 2003.04566, section 3.2).

    1 if no scale reaches 0.001 (all go), 0 if the smallest alone has more than `delta` of the energy.
    """
    if float(np.max(x)) < 1e-3:
        return 1.0
    ordered = np.sort(np.maximum(np.abs(np.asarray(x, np.float64)), 1e-18))
    first = int(np.argmax(np.cumsum(ordered**2) / np.sum(ordered**2) > delta))
    return 0.0 if first == 0 else float(ordered[first - 1] + ordered[first]) / 2


def at_least(x: Float[np.ndarray, " n"], keep: Bool[np.ndarray, " n"], minimum: int) -> Bool[np.ndarray, " n"]:
    """`keep`, or the `minimum` largest (ties: lowest index) where fewer would stay."""
    if keep.sum() >= min(minimum, keep.size):
        return keep
    out = np.zeros_like(keep)
    out[np.argsort(-x, kind="stable")[:minimum]] = True
    return out


def vote(
    prune: Bool[np.ndarray, "layers n"], score: Float[np.ndarray, " n"], minimum: int = 1
) -> tuple[Bool[np.ndarray, " n"], int]:
    """(keep, channels given back) of layers that share a mask (section 3.4).

    Unanimous channels go; if they are fewer than the most reluctant layer asked for, so do those with one vote less,
    and so on. The paper's rule has no minimum after the vote and can empty a residual stream; here the channels with
    the fewest votes (ties: largest score, then lowest index) are given back until `minimum` stay.
    """
    votes = prune.sum(axis=0)
    reluctant = int(prune.sum(axis=1).min())
    gone = np.zeros(prune.shape[1], bool)
    for v in range(len(prune), 0, -1):
        gone = votes >= v
        if gone.sum() >= reluctant:
            break
    missing = max(min(minimum, gone.size) - int((~gone).sum()), 0)
    back = np.lexsort((np.arange(gone.size), -score, votes, ~gone))[:missing]
    gone[back] = False
    return ~gone, missing


def leaf_masks(listed: Mapping[str, Sequence[str]], keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{scale path: float32 (n,), 1 = regularise} for `masked_penalty`: the channels that are not kept."""
    return {p: 1.0 - np.asarray(keep[g], np.float32) for g, paths in listed.items() for p in paths}


def all_masked(graph: Graph, listed: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Masks of step 1 and of network slimming: every listed scale."""
    return {p: np.ones(graph.groups[g].size, np.float32) for g, paths in listed.items() for p in paths}


def largest_masked(variables: Any, masks: Mapping[str, Any]) -> float:
    """max |gamma| over the channels that the penalty acts on: it has to fall below the threshold; log it."""
    values = dict(flatten(variables))
    peaks = [np.max(np.abs(np.asarray(values[p], np.float32)) * (np.asarray(m) > 0)) for p, m in masks.items()]
    return float(max(peaks, default=0.0))


class PruneDecision(NamedTuple):
    """Step 4.

    keep: {group: bool (n,)} for graph.compact. masked_survivors: channels the mask gave up that stay because their
    scale did not fall. unmasked_losses: channels the mask wanted that go because their scale did. given_back: as in
    `Masks`.
    """

    keep: dict[str, np.ndarray]
    masked_survivors: int
    unmasked_losses: int
    given_back: dict[str, int]


def decide_pruning(
    variables: Any,
    listed: Mapping[str, Sequence[str]],
    mask: Mapping[str, Any],
    threshold: float = 0.01,
    prune_by: str = "threshold",
    rule: MaskRule | None = None,
) -> PruneDecision:
    """What goes from W3: channels at or below the threshold (the published code's way), or exactly the mask.

    Raises:
      ValueError: `prune_by` is neither "threshold" nor "mask".
    """
    if prune_by not in ("threshold", "mask"):
        raise ValueError(f"prune_by must be 'threshold' or 'mask', not {prune_by!r}")
    rule = dataclasses.replace(rule or MaskRule(), method="threshold", threshold=threshold)
    keep, given_back = make_mask(variables, listed, rule)
    survivors = sum(int((k & ~np.asarray(mask[g], bool)).sum()) for g, k in keep.items())
    losses = sum(int((~k & np.asarray(mask[g], bool)).sum()) for g, k in keep.items())
    if prune_by == "mask":
        keep = {g: np.asarray(mask[g], bool) for g in listed}
    return PruneDecision(keep, survivors, losses, given_back)


def suggest_s(
    rates: Sequence[float] | np.ndarray, momentum: float, gamma_max: float = 1.0, safety: float = 3.0
) -> float:
    """Strength at which a scale of `gamma_max` without task gradient reaches zero within a `safety`-th of a schedule.

    With momentum m such a scale falls by rate*s/(1-m) a step, so it needs sum(rate)*s/(1-m) > gamma_max: the same s
    that suffices on ImageNet does nothing in a short run.

    Args:
      rates: learning rate of every step.
      momentum: of the optimiser, in [0, 1).
      gamma_max: largest |gamma| to bring down.
      safety: how many times over.

    Raises:
      ValueError: momentum outside [0, 1), or rates that sum to nothing.
    """
    total = float(np.sum(np.asarray(rates, np.float64)))
    if not 0 <= momentum < 1 or not total > 0:
        raise ValueError(
            f"momentum {momentum} must lie in [0, 1) and the learning rates sum to more than 0 (got {total})"
        )
    return safety * gamma_max * (1 - momentum) / total
