"""MaskSparsity as a method: its five steps, as `run` takes them, from the trained network on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jprune.data import steps_per_epoch
from jprune.graph import trace
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.channels.masksparsity import run as masksparsity_run
from jprune.methods.contract import UNITS, ClassifierTask, Method, Outcome, check_rebuilt, checked, widths
from jprune.models import rebuild
from jprune.report import plots
from jprune.tracing.paths import flatten
from jprune.training import learning_rates


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings. An amount of units replaces the threshold of step 2 by a mask of that size.

    Attributes:
      strength: of the penalty on the scales; 0: what the schedule needs
      threshold: channels whose scales end at or below it go
      min_units: units every group keeps
      finetune_epochs: after pruning
      finetune_learning_rate: of these epochs
    """

    strength: float = 0.0
    threshold: float = 0.01
    min_units: int = 1
    finetune_epochs: int = 15
    finetune_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        checked(self, {
            "strength": (self.strength >= 0, "at least 0"),
            "threshold": (self.threshold > 0, "above 0"),
            "min_units": (self.min_units >= 1, "at least 1"),
            "finetune_epochs": (self.finetune_epochs >= 0, "at least 0"),
            "finetune_learning_rate": (self.finetune_learning_rate > 0, "above 0"),
        })  # fmt: skip


def check(task: ClassifierTask, config: Config) -> None:
    """Refuse a network without scales."""
    ms.listed_scales(trace(task.model.apply, task.variables, *task.example))


def training(task: ClassifierTask, config: Config) -> int:
    """Two sparse phases and fine-tuning."""
    return (2 * task.recipe.epochs + config.finetune_epochs) * steps_per_epoch(task.data.train, task.recipe.batch_size)


def settings(task: ClassifierTask, config: Config) -> masksparsity_run.MaskSparsityConfig:
    """Of the whole method: by threshold, or a mask of a given size where an amount is asked for."""
    recipe = task.recipe
    rates = learning_rates(recipe, steps_per_epoch(task.data.train, recipe.batch_size))
    # on all scales at once a penalty that takes them surely to zero would take the network with them
    gentle, strength = (config.strength or ms.suggest_s(rates, recipe.momentum, safety=k) for k in (1.0, 3.0))
    how = ("threshold", 0.5) if task.amount is None else ("sparsity", task.amount.sparsity)
    n = config.finetune_epochs
    return masksparsity_run.MaskSparsityConfig(
        baseline=None,
        sparse=recipe,
        finetune=task.trained_for(n, config.finetune_learning_rate) if n else None,
        strength_global=gentle,
        strength=strength,
        rule=ms.MaskRule(how[0], threshold=config.threshold, sparsity=how[1], min_keep=config.min_units),
        prune_threshold=config.threshold,
    )


def find(task: ClassifierTask, config: Config) -> Outcome:
    """Steps 1 to 5."""
    weights: dict[str, Any] = {}

    def fit(name: str, model: Any, start: Any, recipe: Any, transform: Any) -> Any:
        name = name.removeprefix("round1-")
        weights[name] = task.fit(name, recipe, model, start, transform)
        return weights[name]

    found = masksparsity_run.run(task.model, task.variables, task.data, settings(task, config), train_fn=fit)
    (only,) = found.rounds
    keep = only.decision.keep
    module = rebuild(task.model, found.variables)
    check_rebuilt(task, keep, module, found.variables)
    gammas = dict(flatten(weights["masked"]))
    scales = {g: np.mean([np.abs(np.asarray(gammas[p])) for p in paths], axis=0)
              for g, paths in ms.listed_scales(task.graph).items()}  # fmt: skip
    said = ()
    if all(k.all() for k in keep.values()):
        more = "a larger --strength" if task.amount is not None else "--strength or --sparsity"
        said = (f"nothing is removed: no scale fell to {config.threshold:g}; train longer, or give {more}",)
    return Outcome(
        module, found.variables, task.graph.cost(keep), widths(keep), keep, task.graph,
        metadata={"config": dataclasses.asdict(module.config)},  # pyright: ignore[reportAttributeAccessIssue]
        notes={
            "masksparsity": {
                "masked": {g: int((~k).sum()) for g, k in only.mask.items()},
                "masked_survivors": only.decision.masked_survivors,
                "unmasked_losses": only.decision.unmasked_losses,
                "given_back": only.decision.given_back,
                "masked_peak": only.masked_peak,
                "accuracy": only.accuracy,
            }
        },
        figures=(("Scales after the masked phase", "importance", lambda p: plots.histograms(p, scales, keep)),),
        warnings=said,
    )  # fmt: skip


METHODS = (
    Method(
        "masksparsity", "penalty only on the scales of the channels that will go, by threshold (MaskSparsity)",
        "classifiers", find, Config, (UNITS,), optional=True, check=check, training=training),
)  # fmt: skip
