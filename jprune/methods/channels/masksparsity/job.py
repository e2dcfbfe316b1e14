"""MaskSparsity: its five steps as `jprune.methods.channels.masksparsity.run` takes them, from the run's own baseline on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from jprune.data import steps_per_epoch
from jprune.graph import Graph, trace
from jprune.methods.channels.after_training import check_rebuilt
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.channels.masksparsity import run as masksparsity_run
from jprune.methods.outcome import Outcome
from jprune.models import rebuild
from jprune.report import plots
from jprune.tracing.paths import flatten
from jprune.training import learning_rates

if TYPE_CHECKING:
    from jprune.jobs.classifier import Run


def epochs(run: Run) -> int:
    """Of all phases together."""
    return 3 * run.o.epochs + run.o.finetune_epochs


def check_reachable(run: Run) -> None:
    """Refuse a network without scales, before anything is trained."""
    variables, x = run.shapes()
    ms.listed_scales(trace(run.model.apply, variables, x))


def settings(run: Run) -> masksparsity_run.MaskSparsityConfig:
    """The run's options as the method's: by threshold, or a mask of a given size where a sparsity is asked for."""
    o = run.o
    recipe = o.recipe(o.epochs, o.learning_rate)
    rates = learning_rates(recipe, steps_per_epoch(run.data.train, o.batch_size))
    # on all scales at once a penalty that takes them surely to zero would take the network with them
    gentle, strength = (o.strength or ms.suggest_s(rates, recipe.momentum, safety=k) for k in (1.0, 3.0))
    how = ("threshold", 0.5) if o.sparsity is None else ("ratio", o.sparsity)
    return masksparsity_run.MaskSparsityConfig(
        baseline=None,
        sparse=recipe,
        finetune=o.recipe(o.finetune_epochs, o.finetune_learning_rate) if o.finetune_epochs else None,
        strength_global=gentle,
        strength=strength,
        rule=ms.MaskRule(how[0], threshold=o.threshold, ratio=how[1], min_keep=o.min_keep),
        prune_threshold=o.threshold,
    )


def small_model(run: Run, graph: Graph, variables: Any, dense: Any, progress: Progress) -> Outcome:
    """Steps 1 to 5."""
    weights: dict[str, Any] = {}

    def fit(name: str, model: Any, start: Any, recipe: Any, transform: Any) -> Any:
        name = name.removeprefix("round1-")
        weights[name] = run.fit(name, recipe, model, start, transform, progress)
        return weights[name]

    found = masksparsity_run.run(run.model, dense, run.data, settings(run), train_fn=fit)
    (only,) = found.rounds
    keep = only.decision.keep
    module = rebuild(run.model, found.variables)
    check_rebuilt(run, graph, keep, module, found.variables)
    gammas = dict(flatten(weights["masked"]))
    scales = {g: np.mean([np.abs(np.asarray(gammas[p])) for p in paths], axis=0)
              for g, paths in ms.listed_scales(graph).items()}  # fmt: skip
    if all(k.all() for k in keep.values()):
        run.warn(
            f"nothing is removed: no scale fell to {run.o.threshold:g}; train longer, or give --strength or --sparsity"
        )
    return Outcome(
        graph,
        dense,
        module,
        found.variables,
        {g: (int(k.size), int(k.sum())) for g, k in keep.items()},
        getattr(graph.cost(keep), run.o.quantity),
        {"config": dataclasses.asdict(module.config)},  # pyright: ignore[reportAttributeAccessIssue]
        keep,
        (("Scales after the masked phase", "importance", lambda p: plots.histograms(p, scales, keep)),),
        {
            "masksparsity": {
                "masked": {g: int((~k).sum()) for g, k in only.mask.items()},
                "masked_survivors": only.decision.masked_survivors,
                "unmasked_losses": only.decision.unmasked_losses,
                "given_back": only.decision.given_back,
                "masked_peak": only.masked_peak,
                "accuracy": only.accuracy,
            }
        },
    )
