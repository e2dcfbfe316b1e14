"""One run in its folder: what every way to a small model shares - phases, progress, measuring, the files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jprune import checkpoint
from jprune.data import steps_per_epoch
from jprune.graph import Graph, trace
from jprune.methods import Method, method
from jprune.models import build
from jprune.pipeline import cropped, gradual, trained
from jprune.pipeline.options import Options, load_data
from jprune.pipeline.outcome import Outcome
from jprune.report import measure, page, plots
from jprune.training import evaluate, train
from jprune.training.forward import as_forward
from jprune.whole_files import write_json

WAYS: dict[str, Any] = {"trained": trained, "precrop": cropped, "lapp": gradual}  # modules of the same three functions


class Run:
    """One run of the main job; calling it goes through all phases."""

    def __init__(self, options: Options, out: Path, resume: bool = False, quiet: bool = False):
        self.o, self.out, self.quiet = options, out, quiet
        self.method: Method = method(options.method)
        self.way: Any = WAYS[self.method.way]
        self.data = load_data(options)
        self.model = build(options.model, self.data.num_classes)
        options.recipe(options.epochs, options.learning_rate)  # says what is wrong with it before a folder is made
        self.way.check_reachable(self)
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
        x = jnp.zeros((2, *self.data.image_shape), jnp.float32)
        variables = jax.jit(self.model.init)(jax.random.key(o.seed), x)
        with self._progress(self.way.epochs(self) * steps_per_epoch(self.data.train, o.batch_size)) as progress:
            recipe = o.recipe(o.epochs, o.learning_rate)
            dense = self.fit("baseline", recipe, self.model, variables, None, progress)
            outcome = self.way.small_model(self, trace(self.model.apply, dense, x), variables, dense, progress)
            with self.phase("measure", progress):
                final = trace(as_forward(outcome.model).evaluate, outcome.small, x)
                found = getattr(final.cost(), o.quantity)
                if found != outcome.predicted:
                    raise ValueError(f"the small {o.model} has {found:,} {o.quantity}, not {outcome.predicted:,}")
                before, after = self._measure(outcome, final)
        return self._write(outcome, final, before, after)

    def shapes(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """(variables, a batch of two images) of the dense model, as shapes."""
        x = jax.ShapeDtypeStruct((2, *self.data.image_shape), jnp.float32)
        return jax.eval_shape(self.model.init, jax.random.key(0), x), x

    def _measure(self, outcome: Outcome, final: Graph) -> list[measure.Measured]:
        images = jnp.asarray(self.data.test.read(np.arange(min(self.o.batch_size, len(self.data.test))))["image"])
        programs, peak, out = {}, {}, []
        sides = {
            "before": (self.model, outcome.dense, outcome.graph.cost()),
            "after": (outcome.model, outcome.small, final.cost()),
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

    # -- files ----------------------------------------------------------------------------------------------------

    def _write(
        self, outcome: Outcome, final: Graph, before: measure.Measured, after: measure.Measured
    ) -> dict[str, Any]:
        o = self.o
        if outcome.keep is not None:
            outcome.graph.plan(outcome.keep).save(self.out / "plan.json")
        checkpoint.save(self.out / "checkpoint", outcome.small, overwrite=True, metadata={
            "model": o.model, "num_classes": self.data.num_classes, "image_shape": list(self.data.image_shape),
            "options": dataclasses.asdict(o), **outcome.metadata})  # fmt: skip
        self._join_metrics()
        achieved = getattr(final.cost(), o.quantity) / getattr(outcome.graph.cost(), o.quantity)
        summary = {
            "options": dataclasses.asdict(o),
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "speed_up": before.latency_ms / after.latency_ms,
            "achieved_fraction": achieved,
            "widths": {g: list(w) for g, w in outcome.widths.items()},
            **outcome.more,
            "seconds": {k: round(v, 1) for k, v in self.seconds.items()},
            "device": jax.devices()[0].device_kind,
        }
        what = f"{o.method} pruned {o.model} on {self.data.name}"
        got = f"to {achieved:.2%} of its {o.quantity} (target {o.target:.0%})"
        notes = [f"{what} {got}; timed on batches of {o.batch_size} on {summary['device']}."]
        page.write(self.out / "report.html", f"{o.model}: before and after", rows(before, after),
                   dataclasses.asdict(o), self._figures(outcome), notes, _layers(outcome.graph, final))  # fmt: skip
        write_json(self.out / "summary.json", summary)
        return summary

    def _figures(self, outcome: Outcome) -> list[tuple[str, Path]]:
        w = outcome.widths
        drawn = [
            ("Widths before and after", "widths",
             lambda p: plots.widths(p, list(w), [a for a, _ in w.values()], [b for _, b in w.values()])),
            *outcome.figures,
            ("Timeline", "timeline", lambda p: plots.timeline(p, self.phases)),
        ]  # fmt: skip
        out = []
        for caption, name, draw in drawn:
            out.append((caption, self.out / f"{name}.png"))
            draw(out[-1][1])
        return out

    def _join_metrics(self) -> None:
        temporary = self.out / "metrics.jsonl.tmp"
        with temporary.open("w") as out:
            for name, _ in self.phases:
                for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines():
                    out.write(json.dumps({"phase": name, **json.loads(line)}) + "\n")
        os.replace(temporary, self.out / "metrics.jsonl")

    def folder(self, phase: str) -> Path:
        """Where a phase of training keeps its checkpoints and metrics."""
        return self.out / "phases" / phase.replace(" ", "-")

    # -- progress -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _progress(self, steps: int) -> Iterator[Progress]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, disable=self.quiet) as progress:
            self._whole = progress.add_task("[bold]all of it", total=steps)
            yield progress

    @contextlib.contextmanager
    def phase(self, name: str, progress: Progress) -> Iterator[None]:
        """A phase that is no training: shown, and timed without the trainings inside."""
        task = progress.add_task(name, total=1)
        inside = sum(self.seconds.values())
        start = time.monotonic()
        yield
        nested = sum(self.seconds.values()) - inside
        self.seconds[name] = time.monotonic() - start - nested
        progress.update(task, completed=1)

    @contextlib.contextmanager
    def counted(self, name: str, steps: int, progress: Progress) -> Iterator[Callable[[int, Any], None]]:
        """A training phase of so many steps: timed; yields what is to be called after each, to move the bar on."""
        before = progress.tasks[self._whole].completed
        start = time.monotonic()
        yield lambda step, _: progress.update(self._whole, completed=before + step)
        progress.update(self._whole, completed=before + steps)
        self.seconds[name] = time.monotonic() - start

    def fit(self, name: str, recipe: Any, model: Any, variables: Any, transform: Any, progress: Progress) -> Any:
        """One phase of training, resumed if it was interrupted."""
        steps = recipe.epochs * steps_per_epoch(self.data.train, recipe.batch_size)
        with self.counted(name, steps, progress) as on_step:
            trained, history = train(
                model, variables, self.data, recipe, transform=transform, out=self.folder(name),
                resume=True, progress=progress, title=name, on_step=on_step)  # fmt: skip
        self.phases.append((name, history))
        return trained


def _layers(dense: Graph, final: Graph) -> list[tuple[str, str, str, str]]:
    """The table of layers: multiply-accumulates of one image; a layer only one side has leaves the other's cell empty."""
    after: dict[str, list[int]] = {}
    for c in final.layer_costs():
        after.setdefault(c.name, []).append(c.macs // 2)
    out = [("layer", "MACs before", "MACs after", "kept")]
    for c in dense.layer_costs():
        n = c.macs // 2
        left = after[c.name].pop(0) if after.get(c.name) else None
        out.append((c.name, f"{n:,}", "" if left is None else f"{left:,}", "" if left is None else f"{left / n:.0%}"))
    return out + [(name, "", f"{n:,}", "") for name, rest in after.items() for n in rest]


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
