"""The five steps of MaskSparsity as one resumable run, and its baselines at the same training budget.

Each phase is one call of a training function; with `out` every phase keeps its checkpoints in a folder of its own, so
an interrupted run goes on where it was. Host-side: it trains, decides and slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.data import Dataset, epoch_batches
from jprune.graph import Graph, trace
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.surgery.compensate import compensate
from jprune.surgery.plan import Plan
from jprune.tracing import taps
from jprune.training import TrainConfig, evaluate, train
from jprune.training.forward import Forward, as_forward
from jprune.training.pruned import pruned_forward

TrainFunction = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class MaskSparsityConfig:
    """Settings of a run (the paper's ImageNet values are strength 5e-4, threshold 0.01, see section 3.7).

    Attributes:
      baseline: step 0, or None if the given variables are trained.
      sparse: steps 1 and 3.
      finetune: step 5, or None.
      strength_global, strength: s of steps 1 and 3; `suggest_s` says what a short schedule needs.
      kind: "l1", "l2" or "smooth_l1".
      rule: step 2.
      coupled, only: which groups are listed.
      prune_threshold, prune_by: step 4.
      absorb: move the constant that a pruned channel still emits into what follows (not in the paper).
      rounds: how often to repeat steps 1 to 5.
    """

    baseline: TrainConfig | None = TrainConfig()
    sparse: TrainConfig = TrainConfig()
    finetune: TrainConfig | None = TrainConfig(epochs=5, learning_rate=0.005)
    strength_global: float = 5e-4
    strength: float = 5e-4
    kind: str = "l1"
    rule: ms.MaskRule = ms.MaskRule()
    coupled: bool = True
    only: tuple[str, ...] = ("*",)
    prune_threshold: float = 0.01
    prune_by: str = "threshold"
    absorb: bool = False
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}: it must be at least 1")
        if self.finetune is not None and self.finetune.batch_size != self.sparse.batch_size:
            raise ValueError(f"finetune.batch_size is {self.finetune.batch_size}: a replayed network "
                             f"trains at the batch size it was traced with, {self.sparse.batch_size}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round decided.

    Attributes:
      graph: of the network it started from.
      mask: step 2, {group: bool (n,)}.
      decision: step 4.
      masked_peak: max |gamma| over the masked channels after step 3.
      accuracy: {"before": W3 unpruned, "pruned": right after step 4, "finetuned": after step 5} on the test split.
      macs: MACs of one image before and after.
      plan: to repeat the pruning on another copy of the weights.
    """

    graph: Graph
    mask: dict[str, np.ndarray]
    decision: ms.PruneDecision
    masked_peak: float
    accuracy: dict[str, float]
    macs: tuple[int, int]
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Result:
    """The pruned model (its replayed training and evaluation functions), its variables, and what each round did."""

    model: Forward
    variables: Any
    rounds: tuple[Round, ...]


def run(
    model: Any,
    variables: Any,
    dataset: Dataset,
    config: MaskSparsityConfig,
    *,
    train_fn: TrainFunction | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Any = True,
    mask: Mapping[str, Any] | None = None,
) -> Result:
    """Steps 0 to 5, `config.rounds` times.

    Args:
      model: whatever `jprune.training.as_forward` takes.
      variables: its variables.
      dataset: to train and test on.
      config: settings.
      train_fn: your own training, (phase name, model, variables, TrainConfig, optax transform or None) -> variables;
        the transform goes between the gradients (averaged over devices) and weight decay.
      out: folder for the phases' checkpoints and metrics; resume: go on with it.
      progress: show a bar, or a rich Progress to draw on.
      mask: {group: bool (n,)}, what is to stay, in place of steps 1 and 2: the method is said not to depend on
        where the mask comes from. For one round.

    Raises:
      ValueError: nothing to regularise, a phase diverged, or a mask that is not of the listed groups.
    """
    fit = train_fn or _trainer(dataset, Path(out) if out is not None else None, resume, progress)
    forward = as_forward(model)
    batch = config.sparse.batch_size
    x = jax.ShapeDtypeStruct((batch, *dataset.image_shape), jnp.float32)
    weights = variables
    if mask is not None and config.rounds != 1:
        raise ValueError(f"a mask is given for one round, not for {config.rounds}: its groups shrink with the first")
    if config.baseline is not None:
        weights = fit("baseline", forward, weights, config.baseline, None)
    rounds = []
    for k in range(config.rounds):
        name = f"round{k + 1}-"
        graph = trace(forward.evaluate, weights, x)
        listed = ms.listed_scales(graph, config.coupled, config.only)
        if mask is None:
            everywhere = ms.masked_penalty(ms.all_masked(graph, listed), config.strength_global, config.kind)
            slim = fit(name + "global", forward, weights, config.sparse, everywhere)
            wanted = ms.make_mask(slim, listed, config.rule).keep
        else:
            wanted = _checked(mask, listed, graph)
        masks = ms.leaf_masks(listed, wanted)
        sparse = fit(name + "masked", forward, weights, config.sparse,
                     ms.masked_penalty(masks, config.strength, config.kind))  # fmt: skip
        decision = ms.decide_pruning(sparse, listed, wanted, config.prune_threshold, config.prune_by, config.rule)
        before = evaluate(forward, sparse, dataset).accuracy
        small_forward, small = prune(forward, sparse, graph, decision.keep, dataset, batch, config.absorb)
        accuracy = {"before": before, "pruned": evaluate(small_forward, small, dataset).accuracy}
        if config.finetune is not None:
            small = fit(name + "finetune", small_forward, small, config.finetune, None)
            accuracy["finetuned"] = evaluate(small_forward, small, dataset).accuracy
        macs = tuple(int(c.macs) // batch for c in (graph.cost(), graph.cost(decision.keep)))
        rounds.append(Round(graph, wanted, decision, ms.largest_masked(sparse, masks), accuracy,
                            (macs[0], macs[1]), graph.plan(decision.keep)))  # fmt: skip
        forward, weights = small_forward, small
    return Result(forward, weights, tuple(rounds))


def _checked(mask: Mapping[str, Any], listed: Mapping[str, Any], graph: Graph) -> dict[str, np.ndarray]:
    keep = {g: np.asarray(k, bool) for g, k in mask.items()}
    if keep.keys() != listed.keys() or any(k.shape != graph.groups[g].shape for g, k in keep.items()):
        raise ValueError(f"a mask has one boolean per channel of every listed group, {', '.join(listed)}; not of "
                         f"{', '.join(f'{g} {k.shape}' for g, k in keep.items())}")  # fmt: skip
    return keep


def prune(
    forward: Forward,
    variables: Any,
    graph: Graph,
    keep: Mapping[str, Any],
    dataset: Dataset,
    batch_size: int,
    absorb: bool = False,
) -> tuple[Forward, Any]:
    """Step 4: the compacted variables and the pruned network that takes them, ready to be trained.

    `absorb` moves what the removed channels emit on average over one pass of the training data into the biases or
    BatchNorm means behind them.
    """
    if absorb:
        images = (b["image"] for b in epoch_batches(dataset.train, batch_size, seed=0, epoch=0))
        stats = graph.calibrate(variables, images, {"mean": taps.mean()})
        variables = compensate(graph, variables, keep, {t: s["mean"] for t, s in stats.items()}).params
    x = jax.ShapeDtypeStruct((batch_size, *dataset.image_shape), jnp.float32)
    return pruned_forward(forward, variables, x, keep), graph.compact(variables, keep)


def _trainer(dataset: Dataset, out: Path | None, resume: bool, progress: Any) -> TrainFunction:
    def fit(name: str, model: Any, variables: Any, config: TrainConfig, transform: Any) -> Any:
        folder = None if out is None else out / name
        return train(model, variables, dataset, config, transform=transform, out=folder, resume=resume,
                     progress=progress, title=name)[0]  # fmt: skip

    return fit
