"""LAPP as one resumable run: warm-up, pruning phase, slicing, and the rest of the training.

    epochs 0 .. warmup-1        masks open, thresholds frozen
    epochs warmup .. pruning-1  weights and thresholds learn together, masks recomputed every step
    end of epoch pruning        a common offset meets the target exactly; filters are sliced, thresholds dropped
    the rest                    ordinary training of the small network, under the same learning-rate schedule

Both parts are calls of `jprune.training.train` with folders of their own, so an interrupted run goes on where it was.
The momentum starts anew with the small network. Host-side: it trains, decides and slices.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jprune.data import Dataset, steps_per_epoch
from jprune.files.atomic import write_json
from jprune.graph import trace
from jprune.methods.channels.lapp import lapp
from jprune.methods.channels.lapp.gates import ratio
from jprune.methods.channels.lapp.network import (
    Network,
    finalise,
    gated_forward,
    init,
    prepare,
    slice_lapp,
    update_rules,
)
from jprune.training import Forward, TrainConfig, evaluate, sgd, train, with_own_updates

STUCK = 0.05  # thresholds that moved less than this in a fifth of the pruning phase are in a dead zone


@dataclasses.dataclass(frozen=True)
class LappRunConfig:
    """Settings of a run.

    Attributes:
      lapp: the method.
      train: the recipe of the whole training, before and after slicing.
      warmup_epochs: with open masks.
      pruning_epochs: when the network is sliced, warm-up included; None: 5 % of the epochs, at least 3.
      learn: False: masks stay open until the end of that phase (baselines whose thresholds are chosen, not learned).
      nearest: slice to the ratio nearest to the target from either side, not to the largest that meets it.
    """

    lapp: lapp.LappConfig
    train: TrainConfig = TrainConfig()
    warmup_epochs: int = 1
    pruning_epochs: int | None = None
    learn: bool = True
    nearest: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < self.stop < self.train.epochs:
            raise ValueError(
                f"of {self.train.epochs} epochs {self.warmup_epochs} are warm-up and the network is sliced after "
                f"{self.stop}: this has to increase, with at least one epoch in each part"
            )

    @property
    def stop(self) -> int:
        """The epoch after which the network is sliced."""
        return self.pruning_epochs if self.pruning_epochs is not None else max(3, round(0.05 * self.train.epochs))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
      model, variables: the small network, ready to be trained on, evaluated or traced.
      network: the traced network it came from. keep: {layer: bool (n,)}.
      offset: added to all thresholds to meet the target; beyond 0.3 the learning did only part of the work.
      macs: MACs of one image: original, small (counted on the small function, bypasses included).
      params: parameters of the small network. ratio: macs kept.
      accuracy: {"gated": at the end of the pruning phase, "sliced": right after slicing, "final"} on the test split.
      thresholds: {layer: value after every epoch of the first part}; history: the epochs' records of both parts.
      warnings: what was found suspicious.
    """

    model: Forward
    variables: Any
    network: Network
    keep: dict[str, np.ndarray]
    offset: float
    macs: tuple[int, int]
    params: int
    ratio: float
    accuracy: dict[str, float]
    thresholds: dict[str, list[float]]
    history: list[dict[str, Any]]
    warnings: tuple[str, ...]

    @property
    def kept(self) -> dict[str, int]:
        """{layer: filters that stay}."""
        return {name: int(k.sum()) for name, k in self.keep.items()}


Choose = Callable[[Network], Mapping[str, float]]


def run(
    model: Any,
    variables: Any,
    dataset: Dataset,
    config: LappRunConfig,
    *,
    choose: Choose | None = None,
    mesh: Mesh | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Any = True,
    title: str = "lapp",
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Result:
    """Train a network from its initial variables and prune it on the way.

    Args:
      model: whatever `jprune.training.as_forward` takes; with a `train` argument if it has BatchNorm.
      variables: initial ones. dataset: to train and test on.
      choose: thresholds by layer that replace the learned ones when the network is sliced (baselines).
      mesh, out, resume, progress, on_step: as in `train`; both parts keep their checkpoints below `out`, which also gets
        lapp.json with the numbers of the result.

    Raises:
      Infeasible: the target cannot be reached.
      ValueError: settings that do not fit, or a part diverged.
    """
    batch = config.train.batch_size
    net = prepare(model, variables, jax.ShapeDtypeStruct((batch, *dataset.image_shape), jnp.float32), config.lapp)
    check_reachable(net)
    per_epoch = steps_per_epoch(dataset.train, batch)
    first, last = config.warmup_epochs * per_epoch, config.stop * per_epoch
    never = (last + 1, last + 2)  # a step that the first part does not reach
    gated = gated_forward(net, *((first, last) if config.learn else never))
    start = init(jax.random.key(config.train.seed), net, variables)
    found: list[str] = []
    out = None if out is None else Path(out)

    def watch(step: int, metrics: Mapping[str, float]) -> None:
        if on_step is not None:
            on_step(step, metrics)
        early = config.learn and step == first + -(-(last - first) // 5)
        if early and metrics["threshold_shift"] < STUCK and metrics["ratio"] > metrics["budget"]:
            _warn(found, f"after a fifth of the pruning phase no threshold has moved by {STUCK} and the budget is not "
                  "met: raise threshold_rate, beta or tau (the surrogate is flat far from the thresholds)")  # fmt: skip

    def on_epoch(epoch: int, now: Any) -> dict[str, float]:
        return {f"threshold/{n}": float(t) for n, t in now["params"]["threshold"].items()}

    descent = sgd(config.train.weight_decay, config.train.momentum, config.train.nesterov)
    optimizer = with_own_updates(descent, update_rules(net))
    common = {"mesh": mesh, "resume": resume, "progress": progress}
    trained, history = train(gated, start, dataset, config.train, optimizer=optimizer, epochs=(0, config.stop),
                             out=out and out / "pruning", on_step=watch, on_epoch=on_epoch,
                             title=f"{title} pruning", **common)  # fmt: skip
    chosen = finalise(net, trained, None if choose is None else choose(net), config.nearest)
    if choose is None and abs(chosen.offset) > lapp.SUSPICIOUS:
        _warn(found, f"the final offset is {chosen.offset:.2f}: the thresholds had not learned to meet the target; "
              "give the pruning phase more epochs, or raise threshold_rate or beta")  # fmt: skip
    small = slice_lapp(net, trained, chosen.keep)
    accuracy = {"gated": evaluate(gated, trained, dataset, mesh=mesh).accuracy}
    accuracy["sliced"] = evaluate(small.forward, small.variables, dataset, batch, mesh=mesh).accuracy
    tuned, rest = train(small.forward, small.variables, dataset, config.train, epochs=(config.stop, config.train.epochs),
                        out=out and out / "training", title=f"{title} small", on_step=on_step, **common)  # fmt: skip
    accuracy["final"] = evaluate(small.forward, tuned, dataset, batch, mesh=mesh).accuracy
    counted = trace(small.forward.evaluate, tuned, net.x, is_param=lambda p: net.graph.leaves[p].is_param).cost()
    promised = net.graph.cost(small.keep)
    if counted.macs != promised.macs or counted.params != promised.params:
        raise AssertionError(f"the sliced network costs {counted}, the decision promised {promised}")
    result = Result(
        small.forward, tuned, net, chosen.keep, chosen.offset, (net.macs // batch, int(counted.macs) // batch),
        int(counted.params), counted.macs / net.macs, accuracy,
        {n: [r[f"threshold/{n}"] for r in history] for n in net.layers}, [*history, *rest], tuple(found),
    )  # fmt: skip
    if out is not None:
        write_json(out / "lapp.json", json.loads(json.dumps({
            "kept": result.kept, "sizes": {n: layer.size for n, layer in net.layers.items()}, "offset": result.offset,
            "macs": result.macs, "params": result.params, "ratio": result.ratio, "accuracy": accuracy,
            "thresholds": result.thresholds, "warnings": result.warnings,
        })))  # fmt: skip
    return result


def check_reachable(net: Network) -> None:
    """Raise Infeasible, before the training rather than after it, for a target below what has to stay."""
    minimum = float(ratio(net, {n: layer.min_keep for n, layer in net.layers.items()}))
    if minimum > net.config.target:
        raise lapp.Infeasible(f"the target {net.config.target:.4g} cannot be reached: {minimum:.4g} is left when every "
                              "layer is pruned as far as it may be; raise the target, or use a cheaper bypass")  # fmt: skip


def _warn(found: list[str], text: str) -> None:
    found.append(text)
    warnings.warn(text, stacklevel=3)
