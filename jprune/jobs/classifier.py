"""Prune a classifier of the zoo: train it, remove, fine-tune, measure, and leave a folder that says it all.

    phases/..          checkpoints and metrics of every phase, for resuming
    checkpoint/        the pruned model: orbax arrays and metadata to rebuild it (`load_pruned`)
    plan.json          what was removed, to repeat on another copy of the weights (where something was removed)
    metrics.jsonl      every step and epoch of every phase
    summary.json       before and after
    report.html, *.png

Every phase is a pure function of the options, so an interrupted run that is resumed ends with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jprune import checkpoint
from jprune.checkpoint.masks import save_masks
from jprune.data import Dataset, load_cifar, load_digits, load_image_folder, steps_per_epoch
from jprune.graph import Graph, trace
from jprune.jobs.outputs import layer_table, write_report
from jprune.jobs.pruning_run import PruningRun
from jprune.methods.contract import ClassifierTask, Method, Outcome, checked
from jprune.methods.names import method
from jprune.models import build
from jprune.report import measure, plots
from jprune.surgery.patterns import density
from jprune.training import TrainConfig, evaluate
from jprune.training.forward import as_forward
from jprune.training.loss import cross_entropy

SAMPLES = 256  # training images that gradient criteria look at
USUAL = 0.5  # share removed where nothing is asked for
DATA = {
    "digits": "scikit-learn's 1797 handwritten digits, 8x8, embedded",
    "cifar10": "CIFAR-10 in its binary format (--data-dir)",
    "cifar100": "CIFAR-100 in its binary format (--data-dir)",
    "imagenet-folder": "train/ and val/ with a folder of images per class (--data-dir)",
}


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Everything that decides the outcome of a run, beside the settings of its method.

    Attributes:
      model: a classifier of the zoo (see `jprune list`), or the folder of a language model
      data: digits, cifar10, cifar100 or imagenet-folder
      data_dir: where the data lies (all but digits)
      method: what is removed, and how; see `jprune list`
      sparsity: share of --quantity to REMOVE
      keep: share of --quantity to KEEP, in place of --sparsity
      quantity: what these shares count; macs, units for language models, or weights, as the method counts
      epochs: of the baseline, of each sparse phase, and of a network trained from scratch
      learning_rate: of all training but fine-tuning
      batch_size: examples at a time
      weight_decay: of all training
      seed: of everything
    """

    model: str = "resnet20"
    data: str = "digits"
    data_dir: str | None = None
    method: str = "magnitude-l2"
    sparsity: float | None = None
    keep: float | None = None
    quantity: Literal["macs", "params", "bytes", "latency", "units", "weights"] | None = None
    epochs: int = 20
    learning_rate: float = 0.05
    batch_size: int = 64
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self, {
            "data": (self.data in DATA, f"one of {', '.join(DATA)}"),
            "data_dir": (self.data == "digits" or self.data_dir is not None, f"the folder that holds {self.data}"),
        })  # fmt: skip
        _ = self.recipe, self.amount  # each says what is wrong with it

    @property
    def chosen(self) -> Method:
        """The method."""
        return method(self.method, "classifiers")

    @property
    def amount(self) -> Any:
        """How much is to go."""
        return self.chosen.amount(self.quantity, self.keep, self.sparsity, USUAL)

    @property
    def recipe(self) -> TrainConfig:
        """How the baseline is trained."""
        return TrainConfig(epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate,
                           weight_decay=self.weight_decay, seed=self.seed)  # fmt: skip


def load_data(o: ClassifierConfig) -> Dataset:
    """The data set that the options name; ValueError if its folder is not what it should be."""
    folder = Path(o.data_dir or "")
    if o.data == "digits":
        return load_digits(o.seed)
    if o.data == "imagenet-folder":
        return load_image_folder(folder)
    return load_cifar(folder, 10 if o.data == "cifar10" else 100)


class ClassifierRun(PruningRun):
    """One run in its folder; calling it goes through all phases."""

    def __init__(self, options: ClassifierConfig, *more: Any, **named: Any):
        """As `PruningRun`."""
        self.o = options
        super().__init__(options, *more, **named)

    def prepare(self, resume: bool) -> None:
        """Read the data, and check; nothing is trained yet."""
        options = self.o
        with self.claim(self.said, resume):
            self.data = load_data(options)
            steps_per_epoch(self.data.train, options.batch_size)  # refuses a batch larger than the data
            self.model: Any = build(options.model, self.data.num_classes)
            x = jax.ShapeDtypeStruct((2, *self.data.image_shape), jnp.float32)
            shapes = jax.eval_shape(self.model.init, jax.random.key(0), x)
            self.task = self._task(shapes, x)
            self.method.check(self.task, self.settings)

    def _task(self, shapes: Any, x: jax.ShapeDtypeStruct) -> ClassifierTask:
        """What the method sees, with shapes in place of weights."""

        def loss(model: Any, variables: Any, batch: Any) -> jax.Array:
            return cross_entropy(as_forward(model).evaluate(variables, batch[0]), batch[1]).mean()

        return ClassifierTask(
            self.model, trace(self.model.apply, shapes, x), shapes, (x,), self.o.amount,
            lambda: [self._samples()[0]], lambda: [self._samples()], loss, self, self.o.seed, shapes, self.data,
            self.o.recipe)  # fmt: skip

    def _samples(self) -> tuple[jax.Array, jax.Array]:
        """Images and labels that gradient criteria look at."""
        train = self.data.train
        chosen = np.random.default_rng(self.o.seed).choice(len(train), min(SAMPLES, len(train)), replace=False)
        batch = train.read(np.sort(chosen))
        return jnp.asarray(batch["image"]), jnp.asarray(batch["label"])

    def work(self) -> dict[str, Any]:
        """Train, remove, measure, write."""
        o = self.o
        x = jnp.zeros((2, *self.data.image_shape), jnp.float32)
        fresh = jax.jit(self.model.init)(jax.random.key(o.seed), x)
        task = dataclasses.replace(self.task, fresh=fresh, variables=fresh)
        baseline = o.epochs * steps_per_epoch(self.data.train, o.batch_size)
        with self.shown(baseline + self.method.training(task, self.settings)):
            dense = task.fit("baseline", o.recipe, self.model, fresh)
            task = dataclasses.replace(task, variables=dense)
            outcome = self.method.find(task, self.settings)
            for text in outcome.warnings:
                self.warn(text)
            with self.phase("measure"):
                final = trace(as_forward(outcome.model).evaluate, outcome.variables, x)
                found, promised = final.cost(), outcome.cost
                for quantity in ("macs", "params"):
                    if getattr(found, quantity) != getattr(promised, quantity):
                        raise ValueError(f"the small {o.model} has {getattr(found, quantity):,} {quantity}, "
                                         f"not {getattr(promised, quantity):,}")  # fmt: skip
                before, after = self._measure(task, outcome, final)
        return self._write(task, outcome, final, before, after)

    def _measure(self, task: ClassifierTask, outcome: Outcome, final: Graph) -> list[measure.Measured]:
        images = jnp.asarray(self.data.test.read(np.arange(min(self.o.batch_size, len(self.data.test))))["image"])
        programs, peak, out = {}, {}, []
        sides = {
            "before": (task.model, task.variables, task.graph.cost()),
            "after": (outcome.model, outcome.variables, final.cost()),
        }
        for name, (model, variables, _) in sides.items():
            program, peak[name] = measure.compiled(as_forward(model).evaluate, variables, images)
            programs[name] = (program, (variables, images))
        ms = measure.interleaved(programs)
        for name, (model, variables, cost) in sides.items():
            found = evaluate(model, variables, self.data)
            out.append(measure.Measured(
                found.accuracy, found.loss, int(cost.params), int(cost.macs) // 2, ms[name],
                1e3 * len(images) / ms[name], measure.tree_bytes(variables), peak[name]))  # fmt: skip
        return out

    def _write(
        self, task: ClassifierTask, outcome: Outcome, final: Graph, before: measure.Measured, after: measure.Measured
    ) -> dict[str, Any]:
        o, amount, out = self.o, self.o.amount, self.out
        assert out is not None
        if outcome.keep is not None and outcome.graph is not None:
            outcome.graph.plan(outcome.keep).save(out / "plan.json")
        checkpoint.save(out / "checkpoint", outcome.variables, overwrite=True, metadata={
            "model": o.model, "num_classes": self.data.num_classes, "image_shape": list(self.data.image_shape),
            "options": self.said, **outcome.metadata})  # fmt: skip
        share = {q: getattr(final.cost(), q) / getattr(task.graph.cost(), q) for q in ("macs", "params", "bytes")}
        share["latency"] = after.latency_ms / before.latency_ms
        if outcome.widths:
            share["units"] = sum(b for _, b in outcome.widths.values()) / sum(a for a, _ in outcome.widths.values())
        if outcome.masks is not None:
            share["weights"] = density(outcome.masks).total
            save_masks(out / "masks.safetensors", outcome.masks)
        quantity = (*self.method.quantities, "macs")[0] if amount is None else amount.quantity
        if amount is not None and quantity == "latency" and share[quantity] > 1.1 * amount.keep:
            self.warn(f"a batch takes {share[quantity]:.0%} of the time it took, not the {amount.keep:.0%} that its layers, "
                      "timed one by one, had promised: ask for less, or time on a machine that does nothing else")  # fmt: skip
        got = f"{o.method} pruned {o.model} on {self.data.name} to {share[quantity]:.2%} of its {quantity}"
        if amount is not None:
            got += f" (asked for: {amount.keep:.2%})"
        summary = {
            "options": self.said,
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "speed_up": before.latency_ms / after.latency_ms,
            "quantity": quantity,
            "kept": share,
            "widths": {g: list(w) for g, w in outcome.widths.items()},
            **outcome.notes,
        }
        w = outcome.widths if outcome.masks is None else weights_kept(outcome.masks)
        title = (
            ("Widths before and after", "widths") if outcome.masks is None else ("Weights before and after", "weights")
        )
        figures = [
            (*title, lambda p: plots.widths(p, list(w), [a for a, _ in w.values()], [b for _, b in w.values()])),
            *outcome.figures,
            ("Timeline", "timeline", lambda p: plots.timeline(p, self.histories())),
        ]  # fmt: skip
        notes = [f"{got}; timed on batches of {o.batch_size} on {jax.devices()[0].device_kind}."]
        return write_report(self, f"{o.model}: before and after", rows(before, after), self.said, figures, notes,
                            layer_table(task.graph, final), summary)  # fmt: skip


def weights_kept(masks: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{leaf path: (weights, those that stay)}."""
    found = density(masks)
    return {p: (n, found.kept[p]) for p, n in found.size.items()}


def rows(before: measure.Measured, after: measure.Measured) -> list[tuple[str, str, str, str]]:
    """The table before/after; its first row is the header."""
    mb = 2**20
    points = f"{100 * (after.accuracy - before.accuracy):+.2f} points"
    row = measure.row
    return [
        ("", "before", "after", "change"),
        ("test accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", points),
        row("parameters", before.params, after.params, ","),
        row("MACs per image", before.macs, after.macs, ","),
        row("latency of a batch", before.latency_ms, after.latency_ms, ".2f", " ms"),
        row("images per second", before.images_per_second, after.images_per_second, ",.0f"),
        row("size of the variables", before.param_bytes / mb, after.param_bytes / mb, ".2f", " MiB"),
        row("memory of a batch", before.peak_bytes / mb, after.peak_bytes / mb, ".2f", " MiB"),
    ]
