"""LAPP as a method: shrunk while it is trained for the first time; thresholds learn in the first epochs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.data import steps_per_epoch
from jprune.files.json_files import Fields
from jprune.graph import trace
from jprune.methods.channels.lapp import run as lapp_run
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.methods.channels.lapp.network import init, prepare, slice_lapp
from jprune.methods.contract import ClassifierTask, Method, NoConfig, Outcome
from jprune.models import build
from jprune.report import plots
from jprune.training.forward import Forward


def _settings(task: ClassifierTask, bypass: Any) -> lapp_run.LappRunConfig:
    return lapp_run.LappRunConfig(LappConfig(target=task.wanted.keep, bypass=bypass), task.recipe)


def check(task: ClassifierTask, config: NoConfig, *, bypass: str) -> None:
    """Refuse a target below what is left with every prunable filter gone."""
    net = prepare(task.model, task.variables, task.example[0], _settings(task, bypass).lapp)
    lapp_run.check_reachable(net)


def training(task: ClassifierTask, config: NoConfig) -> int:
    """The network's that shrinks."""
    return task.recipe.epochs * steps_per_epoch(task.data.train, task.recipe.batch_size)


def find(task: ClassifierTask, config: NoConfig, *, bypass: str) -> Outcome:
    """Train from the baseline's own initialisation, shrinking on the way.

    Args:
      bypass: what lies beside each layer: "pw", "dw" or "none".
    """
    settings, folder = _settings(task, bypass), task.run.folder("lapp")
    with task.run.counted("lapp", training(task, config), ["lapp/pruning", "lapp/training"]) as on_step:
        found = lapp_run.run(task.model, task.fresh, task.data, settings, out=folder, resume=folder is not None,
                             progress=False if task.run.quiet else task.run.bars, on_step=on_step)  # fmt: skip
    x = jnp.zeros((2, *task.data.image_shape), jnp.float32)
    keep = {layer: np.flatnonzero(k).tolist() for layer, k in found.keep.items()}
    said = {"config": dataclasses.asdict(settings.lapp), "keep": keep, "batch": task.recipe.batch_size}
    return Outcome(
        found.model, found.variables, trace(found.model.evaluate, found.variables, x).cost(),
        {layer: (int(k.size), int(k.sum())) for layer, k in found.keep.items()},
        metadata={"lapp": said},
        warnings=found.warnings,
        notes={
            "lapp": {
                "offset": found.offset,
                "accuracy": found.accuracy,
                "thresholds": found.thresholds,
                "warnings": list(found.warnings),
            }
        },
        figures=(("Thresholds", "thresholds", lambda p: plots.thresholds(p, found.thresholds)),),
    )  # fmt: skip


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


def _method(name: str, about: str, bypass: str) -> Method:
    return Method(
        name, about, "classifiers", functools.partial(find, bypass=bypass), quantities=("macs",),
        check=functools.partial(check, bypass=bypass), training=training)  # fmt: skip


METHODS = (
    _method("lapp", "a learned threshold per layer, a 1x1 bypass beside each, in the first epochs (LAPP)", "pw"),
    _method("lapp-dw", "the same with depthwise bypasses, which cost least", "dw"),
    _method("lapp-none", "the same without bypasses", "none"),
)
