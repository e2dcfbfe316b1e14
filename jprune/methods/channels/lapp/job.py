"""Shrunk while it is trained for the first time (LAPP): thresholds learn in the first epochs, the rest is ordinary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from jprune.data import steps_per_epoch
from jprune.files.json_files import Fields
from jprune.graph import Graph, trace
from jprune.methods.channels.lapp import run as lapp_run
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.methods.channels.lapp.network import init, prepare, slice_lapp
from jprune.methods.outcome import Outcome
from jprune.models import build
from jprune.report import plots
from jprune.training.forward import Forward

if TYPE_CHECKING:
    from jprune.jobs.classifier import Run


def epochs(run: Run) -> int:
    """Of the baseline and of the network that shrinks."""
    return 2 * run.o.epochs


def _settings(run: Run) -> lapp_run.LappRunConfig:
    o = run.o
    recipe = o.recipe(o.epochs, o.learning_rate)
    return lapp_run.LappRunConfig(LappConfig(target=o.target, bypass=run.method.criterion), recipe)


def check_reachable(run: Run) -> None:
    """Refuse a target below what is left with every prunable filter gone, before anything is trained."""
    variables, x = run.shapes()
    lapp_run.check_reachable(prepare(run.model, variables, x, _settings(run).lapp))


def small_model(run: Run, graph: Graph, variables: Any, dense: Any, progress: Progress) -> Outcome:
    """Train from the baseline's own initialisation, shrinking on the way."""
    o, settings = run.o, _settings(run)
    steps = o.epochs * steps_per_epoch(run.data.train, o.batch_size)
    with run.counted("lapp", steps, progress) as on_step:
        found = lapp_run.run(run.model, variables, run.data, settings, out=run.out / "phases", resume=True,
                             progress=progress, on_step=on_step)  # fmt: skip
    cut = settings.stop
    run.phases += [("pruning", found.history[:cut]), ("training", found.history[cut:])]
    x = jnp.zeros((2, *run.data.image_shape), jnp.float32)
    cost = trace(found.model.evaluate, found.variables, x).cost()
    keep = {layer: np.flatnonzero(k).tolist() for layer, k in found.keep.items()}
    return Outcome(
        graph,
        dense,
        found.model,
        found.variables,
        {layer: (int(k.size), int(k.sum())) for layer, k in found.keep.items()},
        cost.macs,
        {"lapp": {"config": dataclasses.asdict(settings.lapp), "keep": keep, "batch": o.batch_size}},
        figures=(("Thresholds", "thresholds", lambda p: plots.thresholds(p, found.thresholds)),),
        more={
            "lapp": {
                "offset": found.offset,
                "accuracy": found.accuracy,
                "thresholds": found.thresholds,
                "warnings": list(found.warnings),
            }
        },
    )


def load(metadata: Mapping[str, Any]) -> Forward:
    """The small network of a finished run, from what its checkpoint says; its variables lie beside it."""
    f = Fields(metadata)
    saved = f.fields("lapp")
    settings, kept = saved.fields("config"), saved.fields("keep")
    if odd := set(settings) ^ {field.name for field in dataclasses.fields(LappConfig)}:
        raise ValueError(f"{settings.name} has or lacks {min(odd)!r}: another version of jprune wrote it")
    config = LappConfig(**{**settings, "only": settings.texts("only")})
    model = build(f.text("model"), f.integer("num_classes", least=1))
    shape = (saved.integer("batch", least=1), *f.integers("image_shape", count=3, least=1))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    net = prepare(model, variables, x, config)
    if odd := set(kept) - set(net.layers):
        raise ValueError(f"{kept.name} has the layer {min(odd)!r}, which {f['model']} has not")
    keep = {}
    for layer in kept:
        size = net.layers[layer].size
        keep[layer] = np.isin(np.arange(size), kept.integers(layer, most=size - 1))
    whole = jax.eval_shape(lambda v: init(jax.random.key(0), net, v), variables)
    return slice_lapp(net, whole, keep).forward
