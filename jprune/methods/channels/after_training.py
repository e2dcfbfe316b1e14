"""The usual way: score the trained network, allocate, compact, fine-tune; in one step or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from jprune import budget
from jprune.data import steps_per_epoch
from jprune.graph import Graph, trace
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.outcome import Outcome
from jprune.models import rebuild
from jprune.report import plots
from jprune.training import evaluate, learning_rates

if TYPE_CHECKING:
    from jprune.jobs.classifier import Run

CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def epochs(run: Run) -> int:
    """Of all phases together."""
    return run.o.epochs * (1 + run.method.sparse) + run.o.finetune_epochs


def check_reachable(run: Run) -> None:
    """Refuse a target that no keep set of the groups this method scores can meet, before anything is trained."""
    variables, x = run.shapes()
    graph = trace(run.model.apply, variables, x)
    scored = jax.eval_shape(lambda v: run.method.scores(graph, run.model, v, run.data, run.o.seed), variables)
    _allocate(run, graph, {g: np.zeros(s.shape) for g, s in scored.items() if graph.groups[g].exact}, run.o.target)


def small_model(run: Run, graph: Graph, variables: Any, dense: Any, progress: Progress) -> Outcome:
    """Prune the trained network and fine-tune what is left."""
    with run.phase("score", progress):
        pruned_from, scores, keep = _decide(run, graph, dense, progress)
        fractions, accuracy = _curve(run, graph, pruned_from, scores)
    small, keep = _prune(run, graph, pruned_from, keep, progress)
    module = rebuild(run.model, small)
    check_rebuilt(run, graph, keep, module, small)
    cost = graph.cost(keep)
    at = cost.macs / graph.cost().macs

    def curve(path: Any) -> None:
        tuned = evaluate(module, small, run.data).accuracy
        plots.curve(path, fractions, accuracy, {"after fine-tuning": (at, tuned)})

    return Outcome(
        graph,
        dense,
        module,
        small,
        {g: (int(k.size), int(k.sum())) for g, k in keep.items()},
        getattr(cost, run.o.quantity),
        {"config": dataclasses.asdict(module.config)},  # pyright: ignore[reportAttributeAccessIssue]
        keep,
        (
            ("Sparsity and accuracy", "curve", curve),
            ("Importance", "importance", lambda p: plots.histograms(p, scores, keep)),
        ),
        {"curve": {"macs_fraction": fractions, "accuracy": accuracy}},
    )


def _decide(run: Run, graph: Graph, dense: Any, progress: Progress) -> tuple[Any, Any, Any]:
    """(weights to prune, their scores, what to keep in the first step)."""
    o, weights = run.o, dense
    if run.method.sparse:
        recipe = o.recipe(o.epochs, o.learning_rate)
        rates = learning_rates(recipe, steps_per_epoch(run.data.train, o.batch_size))
        # on all scales at once a penalty that takes them surely to zero would take the network with them
        gentle = o.strength or ms.suggest_s(rates, recipe.momentum, safety=1.0)
        everywhere = ms.masked_penalty(ms.all_masked(graph, ms.listed_scales(graph)), gentle)
        weights = run.fit("global penalty", recipe, run.model, dense, everywhere, progress)
    scores = _scores(run, graph, run.model, weights)
    first = budget.Schedule(_kind(run), o.steps, o.target)(1)
    return weights, scores, _allocate(run, graph, scores, first).keep


def _kind(run: Run) -> str:
    return "one_shot" if run.o.steps == 1 else run.o.schedule


def _scores(run: Run, graph: Graph, model: Any, variables: Any) -> dict[str, Any]:
    found = run.method.scores(graph, model, variables, run.data, run.o.seed)
    return {g: np.asarray(s) for g, s in found.items() if graph.groups[g].exact}


def _allocate(run: Run, graph: Graph, scores: Mapping[str, Any], fraction: float | int) -> budget.Allocation:
    o = run.o
    target = budget.Target(o.quantity, fraction)
    return budget.allocate(graph, scores, target, o.scope, min_keep=o.min_keep, multiple_of=o.multiple_of)


def _curve(run: Run, graph: Graph, variables: Any, scores: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Accuracy at several fractions of the multiply-accumulates, one-shot, by masking: one compiled program."""
    fractions, accuracy = [1.0], [evaluate(run.model, variables, run.data).accuracy]
    for f in CURVE:
        try:
            found = budget.allocate(graph, scores, budget.Target.macs(f), run.o.scope, min_keep=run.o.min_keep)
        except ValueError:  # out of reach of the scored groups
            break
        fractions.append(found.achieved / found.dense)
        accuracy.append(evaluate(run.model, graph.mask(variables, found.keep), run.data).accuracy)
    return fractions, accuracy


def _prune(run: Run, graph: Graph, variables: Any, keep: Any, progress: Progress) -> tuple[Any, dict[str, np.ndarray]]:
    """Compact and fine-tune, step by step; returns the small variables and the keep set of all steps together."""
    o = run.o
    whole = {g: np.ones(i.size, bool) for g, i in graph.groups.items() if g in keep}
    dense = getattr(graph.cost(), o.quantity)
    schedule = list(budget.Schedule(_kind(run), o.steps, o.target))
    now, model, small = graph, run.model, variables
    for k in range(o.steps):
        if k:
            x = jnp.zeros((2, *run.data.image_shape), jnp.float32)
            now = trace(model.apply, small, x)
            keep = _allocate(run, now, _scores(run, now, model, small), int(schedule[k] * dense)).keep
        small = now.compact(small, keep)
        for g, kept in keep.items():
            whole[g][np.flatnonzero(whole[g])] = kept
        model = rebuild(run.model, small)
        n = o.finetune_epochs // o.steps + (1 if k >= o.steps - o.finetune_epochs % o.steps else 0)
        if n:
            name = "fine-tune" if o.steps == 1 else f"fine-tune {k + 1}"
            small = run.fit(name, o.recipe(n, o.finetune_learning_rate), model, small, None, progress)
    return small, whole


def check_rebuilt(run: Run, graph: Graph, keep: Any, module: nn.Module, small: Any) -> None:
    """The rebuilt module has to be the replayed function, on real images."""
    images = jnp.asarray(run.data.test.read(np.arange(min(32, len(run.data.test))))["image"])
    one, other = module.apply(small, images), graph.replay(keep)(small, images)
    error = float(jnp.abs(one - other).max() / jnp.abs(other).max())  # pyright: ignore[reportArgumentType]
    if not error <= 1e-3:
        raise ValueError(f"the rebuilt {run.o.model} differs from the replayed function by {error:.1e} of its scale")
