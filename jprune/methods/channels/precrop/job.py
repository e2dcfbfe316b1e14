"""Small from the start: widths chosen at initialisation (PreCrop, PreConfig), then trained as long as the baseline."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from jprune import budget
from jprune.graph import Graph
from jprune.methods.channels.precrop.precrop import Cropped, Scoring, WidthRule, precrop
from jprune.methods.outcome import Outcome
from jprune.models import rebuild

if TYPE_CHECKING:
    from jprune.jobs.classifier import Run

SAMPLES_PER_CLASS = 10  # training images that SNIP and GraSP look at


def epochs(run: Run) -> int:
    """Of the baseline and of the small network."""
    return 2 * run.o.epochs


def check_reachable(run: Run) -> None:
    """Refuse a target below what the widths that may change can reach, before anything is trained."""
    variables, x = run.shapes()
    precrop(run.model, variables, x, _target(run), "uniform_width", rule=_rule(run))


def small_model(run: Run, graph: Graph, variables: Any, dense: Any, progress: Progress) -> Outcome:
    """Choose widths from the baseline's own initialisation, initialise afresh, train."""
    o = run.o
    with run.phase("widths", progress):
        _, x = run.shapes()
        batches = _samples(run) if run.method.criterion in ("snip", "grasp") else ()
        scoring = Scoring() if o.quantity == "params" else Scoring(keep=o.target)
        found = precrop(run.model, variables, x, _target(run), run.method.criterion, batches=batches,
                        key=jax.random.key(o.seed), rule=_rule(run), scoring=scoring)  # fmt: skip
        module = rebuild(run.model, found.graph.resize(variables, found.widths))
        images = jnp.zeros((2, *run.data.image_shape), jnp.float32)
        small = jax.jit(module.init)(jax.random.key(o.seed + 1), images)
    small = run.fit("from scratch", o.recipe(o.epochs, o.learning_rate), module, small, None, progress)
    return Outcome(
        graph,
        dense,
        module,
        small,
        {g: (graph.groups[g].size, w) for g, w in found.widths.items()},
        getattr(graph.cost(widths=found.widths), o.quantity),
        {"config": dataclasses.asdict(module.config)},  # pyright: ignore[reportAttributeAccessIssue]
        more={"densities": _plain(found)},
    )


def _target(run: Run) -> list[budget.Target]:
    """The target; where layers may grow, the other quantity may not."""
    wanted = [budget.Target(run.o.quantity, run.o.target)]
    if run.method.cap > 1:
        wanted.append(budget.Target(next(q for q in run.method.quantities if q != run.o.quantity), 1.0))
    return wanted


def _rule(run: Run) -> WidthRule:
    return WidthRule(cap=run.method.cap, min_width=run.o.min_keep, round_to=run.o.multiple_of)


def _samples(run: Run) -> list[tuple[jax.Array, jax.Array]]:
    """The first images of every class in the training split, as one batch."""
    train, rows = run.data.train, []
    left = dict.fromkeys(range(run.data.num_classes), SAMPLES_PER_CLASS)
    for at in np.array_split(np.arange(len(train)), max(1, len(train) // 1024)):
        for i, label in zip(at, train.read(at)["label"], strict=True):
            if left[int(label)]:
                left[int(label)] -= 1
                rows.append(int(i))
        if not any(left.values()):
            break
    batch = train.read(np.array(sorted(rows)))
    return [(jnp.asarray(batch["image"]), jnp.asarray(batch["label"]))]


def _plain(found: Cropped) -> dict[str, float]:
    return {path: float(d) for path, d in found.densities.items()}
