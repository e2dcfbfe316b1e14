"""The main job: train, score, prune, fine-tune, measure, and leave a folder that says it all.

    phases/..          checkpoints and metrics of every phase, for resuming
    checkpoint/        the pruned model: orbax arrays and metadata to rebuild it (`load_pruned`)
    plan.json          what was removed, to repeat on another copy of the weights
    metrics.jsonl      every step and epoch of every phase
    summary.json       before and after
    report.html, *.png

Every phase is a pure function of the options, so an interrupted run that is resumed ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jprune import budget, checkpoint
from jprune.channels import masksparsity as ms
from jprune.data import Dataset, load_cifar, load_digits, load_image_folder, steps_per_epoch
from jprune.graph import Graph, trace
from jprune.methods import Method, method
from jprune.models import build, rebuild
from jprune.report import measure, page, plots
from jprune.surgery.plan import Plan
from jprune.training import TrainConfig, evaluate, learning_rates, train
from jprune.whole_files import write_json

DATA = {
    "digits": "scikit-learn's 1797 handwritten digits, 8x8, embedded",
    "cifar10": "CIFAR-10 in its binary format (--data-dir)",
    "cifar100": "CIFAR-100 in its binary format (--data-dir)",
    "imagenet-folder": "train/ and val/ with a folder of images per class (--data-dir)",
}
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that decides the outcome of a run.

    Attributes:
      model, data, data_dir, method: names; see `jprune list`.
      target: fraction to keep, in (0, 1), of `quantity` ("macs", "params" or "bytes").
      scope: "global", "uniform" or "isomorphic".
      steps, schedule: prune in that many steps, "one_shot", "linear" or "cubic", fine-tuning after each.
      multiple_of: kept widths are multiples of this.
      min_keep: units every group keeps.
      epochs, finetune_epochs: of the baseline (and of each sparse phase), and after pruning in all.
      learning_rate, finetune_learning_rate, batch_size, weight_decay: of SGD with Nesterov momentum 0.9.
      strength: of the penalty of slimming and masksparsity; 0 means what the schedule needs (`suggest_s`).
      seed: of everything.
    """

    model: str = "resnet20"
    data: str = "digits"
    data_dir: str | None = None
    method: str = "magnitude-l2"
    target: float = 0.5
    quantity: str = "macs"
    scope: str = "global"
    steps: int = 1
    schedule: str = "linear"
    multiple_of: int = 1
    min_keep: int = 1
    epochs: int = 20
    finetune_epochs: int = 15
    learning_rate: float = 0.05
    finetune_learning_rate: float = 0.02
    batch_size: int = 64
    weight_decay: float = 5e-4
    strength: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("data", self.data in DATA, f"one of {', '.join(DATA)}"),
            ("quantity", self.quantity in ("macs", "params", "bytes"), "macs, params or bytes"),
            ("target", 0 < self.target < 1, "a fraction to keep, between 0 and 1"),
            ("scope", self.scope in ("global", "uniform", "isomorphic"), "global, uniform or isomorphic"),
            ("schedule", self.schedule in ("one_shot", "linear", "cubic"), "one_shot, linear or cubic"),
            ("steps", self.steps >= 1, "at least 1"),
            ("multiple_of", self.multiple_of >= 1, "at least 1"),
            ("min_keep", self.min_keep >= 1, "at least 1"),
            ("finetune_epochs", self.finetune_epochs >= 0, "at least 0"),
            ("strength", self.strength >= 0, "at least 0"),
            ("data_dir", self.data == "digits" or self.data_dir is not None, f"the folder that holds {self.data}"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {allowed}")
        method(self.method)

    def recipe(self, epochs: int, learning_rate: float) -> TrainConfig:
        """The training recipe of a phase."""
        return TrainConfig(epochs=epochs, batch_size=self.batch_size, learning_rate=learning_rate,
                           weight_decay=self.weight_decay, seed=self.seed)  # fmt: skip


def load_data(options: Options) -> Dataset:
    """The data set the options name; ValueError if its folder is not what it should be."""
    folder = Path(options.data_dir or "")
    if options.data == "digits":
        return load_digits(options.seed)
    if options.data == "imagenet-folder":
        return load_image_folder(folder)
    return load_cifar(folder, 10 if options.data == "cifar10" else 100)


class Run:
    """One run of the main job in its folder."""

    def __init__(self, options: Options, out: Path, resume: bool = False, quiet: bool = False):
        self.o, self.out, self.quiet = options, out, quiet
        self.method: Method = method(options.method)
        self.data = load_data(options)
        self.model = build(options.model, self.data.num_classes)
        options.recipe(options.epochs, options.learning_rate)  # says what is wrong with it before a folder is made
        self._check_reachable()
        self._claim(resume)
        self.phases: list[tuple[str, list[dict[str, Any]]]] = []
        self.seconds: dict[str, float] = {}

    def _claim(self, resume: bool) -> None:
        """Take the folder, or go on with the run that has it."""
        file = self.out / "options.json"
        mine = json.loads(json.dumps(dataclasses.asdict(self.o)))
        if file.is_file():
            if not resume:
                raise ValueError(f"{self.out} already holds a run: give --resume to go on with it, or another --out")
            try:
                theirs = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file} is damaged ({error}): choose another --out") from error
            for k in mine:
                if theirs.get(k) != mine[k]:
                    raise ValueError(
                        f"{self.out} was started with {k} = {theirs.get(k)!r}, now it is {mine[k]!r}: "
                        "resume with the same options, or choose another --out"
                    )
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} exists and is not a pruning run: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(file, mine)

    def __call__(self) -> dict[str, Any]:
        """All phases; returns what summary.json says."""
        o = self.o
        recipe = o.recipe(o.epochs, o.learning_rate)
        x = jnp.zeros((2, *self.data.image_shape), jnp.float32)
        variables = jax.jit(self.model.init)(jax.random.key(o.seed), x)
        extra = {"none": 0, "global": 1, "masked": 2}[self.method.sparse]
        epochs = o.epochs * (1 + extra) + (o.finetune_epochs if o.finetune_epochs else 0)
        with self._progress(epochs * steps_per_epoch(self.data.train, o.batch_size)) as progress:
            dense = self._fit("baseline", recipe, self.model, variables, None, progress)
            graph = trace(self.model.apply, dense, x)
            with self._phase("score", progress):
                pruned_from, scores, keep = self._decide(graph, dense, recipe, progress)
                fractions, accuracy = self._curve(graph, pruned_from, scores)
            small, keep = self._prune(graph, pruned_from, keep, progress)
            module = rebuild(self.model, small)
            with self._phase("measure", progress):
                self._check(graph, keep, module, small)
                before, after = self._measure(graph, dense, keep, module, small)
        return self._write(graph, keep, scores, small, module, before, after, (fractions, accuracy))

    def _check_reachable(self) -> None:
        """Refuse a target that no keep set of the groups this method scores can meet, before anything is trained."""
        x = jax.ShapeDtypeStruct((2, *self.data.image_shape), jnp.float32)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), x)
        graph = trace(self.model.apply, variables, x)
        scored = jax.eval_shape(lambda v: self.method.scores(graph, self.model, v, self.data, self.o.seed), variables)
        self._allocate(graph, {g: np.zeros(s.shape) for g, s in scored.items() if graph.groups[g].exact}, self.o.target)

    # -- phases ---------------------------------------------------------------------------------------------------

    def _decide(self, graph: Graph, dense: Any, recipe: TrainConfig, progress: Progress) -> tuple[Any, Any, Any]:
        """(weights to prune, their scores, what to keep in the first step)."""
        o = self.o
        first = budget.Schedule(self._kind(), o.steps, o.target)(1)
        if self.method.sparse == "none":
            scores = self._scores(graph, self.model, dense)
            return dense, scores, self._allocate(graph, scores, first).keep
        listed = ms.listed_scales(graph)
        rates = learning_rates(recipe, steps_per_epoch(self.data.train, o.batch_size))
        # on all scales at once a penalty that takes them surely to zero would take the network with them
        gentle, strength = (o.strength or ms.suggest_s(rates, recipe.momentum, safety=k) for k in (1.0, 3.0))
        slim = self._fit("global penalty", recipe, self.model, dense,
                         ms.masked_penalty(ms.all_masked(graph, listed), gentle), progress)  # fmt: skip
        scores = self._scores(graph, self.model, slim)
        keep = self._allocate(graph, scores, first).keep
        if self.method.sparse == "global":
            return slim, scores, keep
        masks = ms.leaf_masks({g: p for g, p in listed.items() if g in keep}, keep)
        sparse = self._fit("masked penalty", recipe, self.model, dense, ms.masked_penalty(masks, strength), progress)
        return sparse, scores, keep

    def _kind(self) -> str:
        return "one_shot" if self.o.steps == 1 else self.o.schedule

    def _scores(self, graph: Graph, model: Any, variables: Any) -> dict[str, Any]:
        found = self.method.scores(graph, model, variables, self.data, self.o.seed)
        return {g: np.asarray(s) for g, s in found.items() if graph.groups[g].exact}

    def _allocate(self, graph: Graph, scores: Mapping[str, Any], fraction: float | int) -> budget.Allocation:
        o = self.o
        target = budget.Target(o.quantity, fraction)
        return budget.allocate(graph, scores, target, o.scope, min_keep=o.min_keep, multiple_of=o.multiple_of)

    def _curve(self, graph: Graph, variables: Any, scores: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        """Accuracy at several fractions of the multiply-accumulates, one-shot, by masking: one compiled program."""
        fractions, accuracy = [1.0], [evaluate(self.model, variables, self.data).accuracy]
        for f in CURVE:
            try:
                found = budget.allocate(graph, scores, budget.Target.macs(f), self.o.scope, min_keep=self.o.min_keep)
            except ValueError:  # out of reach of the scored groups
                break
            fractions.append(found.achieved / found.dense)
            accuracy.append(evaluate(self.model, graph.mask(variables, found.keep), self.data).accuracy)
        return fractions, accuracy

    def _prune(self, graph: Graph, variables: Any, keep: Any, progress: Progress) -> tuple[Any, dict[str, np.ndarray]]:
        """Compact and fine-tune, step by step; returns the small variables and the keep set of all steps together."""
        o = self.o
        whole = {g: np.ones(i.size, bool) for g, i in graph.groups.items() if g in keep}
        dense = getattr(graph.cost(), o.quantity)
        schedule = list(budget.Schedule(self._kind(), o.steps, o.target))
        now, model, small = graph, self.model, variables
        for k in range(o.steps):
            if k:
                x = jnp.zeros((2, *self.data.image_shape), jnp.float32)
                now = trace(model.apply, small, x)
                keep = self._allocate(now, self._scores(now, model, small), int(schedule[k] * dense)).keep
            small = now.compact(small, keep)
            for g, kept in keep.items():
                whole[g][np.flatnonzero(whole[g])] = kept
            model = rebuild(self.model, small)
            epochs = o.finetune_epochs // o.steps + (1 if k >= o.steps - o.finetune_epochs % o.steps else 0)
            if epochs:
                name = "fine-tune" if o.steps == 1 else f"fine-tune {k + 1}"
                small = self._fit(name, o.recipe(epochs, o.finetune_learning_rate), model, small, None, progress)
        return small, whole

    def _check(self, graph: Graph, keep: Any, module: nn.Module, small: Any) -> None:
        """The rebuilt module has to be the replayed function, on real images."""
        images = jnp.asarray(self.data.test.read(np.arange(min(32, len(self.data.test))))["image"])
        one, other = module.apply(small, images), graph.replay(keep)(small, images)
        error = float(jnp.abs(one - other).max() / jnp.abs(other).max())
        if not error <= 1e-3:
            raise ValueError(
                f"the rebuilt {self.o.model} differs from the replayed function by {error:.1e} of its scale"
            )

    def _measure(self, graph: Graph, dense: Any, keep: Any, module: nn.Module, small: Any) -> list[measure.Measured]:
        images = jnp.asarray(self.data.test.read(np.arange(min(self.o.batch_size, len(self.data.test))))["image"])
        programs, peak = {}, {}
        for name, model, variables in (("before", self.model, dense), ("after", module, small)):
            program, peak[name] = measure.compiled(lambda v, x, m=model: m.apply(v, x), variables, images)
            programs[name] = (program, (variables, images))
        ms_ = measure.interleaved(programs)
        out = []
        for name, model, variables, cost in (
            ("before", self.model, dense, graph.cost()),
            ("after", module, small, graph.cost(keep)),
        ):
            found = evaluate(model, variables, self.data)
            out.append(measure.Measured(
                found.accuracy, found.loss, int(cost.params), int(cost.macs) // 2, ms_[name],
                1e3 * len(images) / ms_[name], measure.tree_bytes(variables), peak[name]))  # fmt: skip
        return out

    # -- files ----------------------------------------------------------------------------------------------------

    def _write(self, graph: Graph, keep: Any, scores: Any, small: Any, module: Any, before: measure.Measured,
               after: measure.Measured, curve: tuple[list[float], list[float]]) -> dict[str, Any]:  # fmt: skip
        plan = graph.plan(keep)
        plan.save(self.out / "plan.json")
        checkpoint.save(self.out / "checkpoint", small, overwrite=True, metadata={
            "model": self.o.model, "num_classes": self.data.num_classes, "image_shape": list(self.data.image_shape),
            "config": dataclasses.asdict(module.config), "options": dataclasses.asdict(self.o)})  # fmt: skip
        self._join_metrics()
        dense = getattr(graph.cost(), self.o.quantity)
        achieved = getattr(graph.cost(keep), self.o.quantity)
        summary = {
            "options": dataclasses.asdict(self.o),
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "speed_up": before.latency_ms / after.latency_ms,
            "achieved_fraction": achieved / dense,
            "widths": {g: [int(k.size), int(k.sum())] for g, k in keep.items()},
            "curve": {"macs_fraction": curve[0], "accuracy": curve[1]},
            "seconds": {k: round(v, 1) for k, v in self.seconds.items()},
            "device": jax.devices()[0].device_kind,
        }
        figures = self._figures(graph, keep, scores, after, summary)
        layers = [("layer", "MACs before", "MACs after", "kept")]
        for a, b in zip(graph.layer_costs(), graph.layer_costs(keep), strict=True):
            layers.append((a.name, f"{a.macs // 2:,}", f"{b.macs // 2:,}", f"{b.macs / a.macs:.0%}"))
        what = f"{self.o.method} pruned {self.o.model} on {self.data.name}"
        got = f"to {achieved / dense:.2%} of its {self.o.quantity} (target {self.o.target:.0%})"
        notes = [f"{what} {got}; timed on batches of {self.o.batch_size} on {summary['device']}."]
        page.write(self.out / "report.html", f"{self.o.model}: before and after", rows(before, after),
                   dataclasses.asdict(self.o), figures, notes, layers)  # fmt: skip
        write_json(self.out / "summary.json", summary)
        return summary

    def _figures(
        self, graph: Graph, keep: Any, scores: Any, after: measure.Measured, summary: Any
    ) -> list[tuple[str, Path]]:
        path = {n: self.out / f"{n}.png" for n in ("widths", "curve", "importance", "timeline")}
        names = list(keep)
        plots.widths(path["widths"], names, [keep[g].size for g in names], [int(keep[g].sum()) for g in names])
        at = summary["after"]["macs"] / summary["before"]["macs"]
        curve = summary["curve"]
        marks = {"after fine-tuning": (at, after.accuracy)}
        plots.curve(path["curve"], curve["macs_fraction"], curve["accuracy"], marks)
        plots.histograms(path["importance"], scores, keep)
        plots.timeline(path["timeline"], self.phases)
        captions = {"widths": "Widths before and after", "curve": "Sparsity and accuracy",
                    "importance": "Importance", "timeline": "Timeline"}  # fmt: skip
        return [(captions[n], p) for n, p in path.items()]

    def _join_metrics(self) -> None:
        temporary = self.out / "metrics.jsonl.tmp"
        with temporary.open("w") as out:
            for name, _ in self.phases:
                for line in (self.out / "phases" / _slug(name) / "metrics.jsonl").read_text().splitlines():
                    out.write(json.dumps({"phase": name, **json.loads(line)}) + "\n")
        os.replace(temporary, self.out / "metrics.jsonl")

    # -- progress -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _progress(self, steps: int) -> Iterator[Progress]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, disable=self.quiet) as progress:
            self._whole = progress.add_task("[bold]all of it", total=steps)
            yield progress

    @contextlib.contextmanager
    def _phase(self, name: str, progress: Progress) -> Iterator[None]:
        task = progress.add_task(name, total=1)
        inside = sum(self.seconds.values())
        start = time.monotonic()
        yield
        nested = sum(self.seconds.values()) - inside
        self.seconds[name] = time.monotonic() - start - nested
        progress.update(task, completed=1)

    def _fit(
        self, name: str, recipe: TrainConfig, model: Any, variables: Any, transform: Any, progress: Progress
    ) -> Any:
        before = progress.tasks[self._whole].completed
        total = recipe.epochs * steps_per_epoch(self.data.train, recipe.batch_size)
        start = time.monotonic()
        trained, history = train(
            model, variables, self.data, recipe, transform=transform, out=self.out / "phases" / _slug(name),
            resume=True, progress=progress, title=name,
            on_step=lambda step, _: progress.update(self._whole, completed=before + step))  # fmt: skip
        progress.update(self._whole, completed=before + total)
        self.seconds[name] = time.monotonic() - start
        self.phases.append((name, history))
        return trained


def rows(before: measure.Measured, after: measure.Measured) -> list[tuple[str, str, str, str]]:
    """The table before/after; its first row is the header."""

    def row(name: str, a: float, b: float, form: str, unit: str = "") -> tuple[str, str, str, str]:
        return name, f"{a:{form}}{unit}", f"{b:{form}}{unit}", f"{b / a:.2f}x"

    mb = 2**20
    points = f"{100 * (after.accuracy - before.accuracy):+.2f} points"
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


def load_pruned(folder: str | Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(module, variables, metadata) of a run's folder, ready to apply.

    Raises:
      ValueError: the folder holds no finished run, or a damaged one.
    """
    variables, metadata = checkpoint.load(Path(folder) / "checkpoint")
    if not {"model", "num_classes"} <= metadata.keys():
        raise ValueError(f"{folder} holds a checkpoint that no pruning run wrote: load it with jprune.checkpoint.load")
    return rebuild(build(metadata["model"], metadata["num_classes"]), variables), variables, metadata


def load_plan(folder: str | Path) -> Plan:
    """The plan of a run's folder."""
    return Plan.load(Path(folder) / "plan.json")


def _slug(name: str) -> str:
    return name.replace(" ", "-")
