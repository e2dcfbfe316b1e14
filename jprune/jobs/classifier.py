"""One run in its folder: what every way to a small model shares - phases, progress, measuring, the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from jprune import checkpoint
from jprune.data import steps_per_epoch
from jprune.files.atomic import write_json
from jprune.graph import Graph, trace
from jprune.jobs.classifier_options import Options, load_data
from jprune.methods.channels import after_training as trained
from jprune.methods.channels.lapp import job as gradual
from jprune.methods.channels.masksparsity import job as masked
from jprune.methods.channels.names import Method, method
from jprune.methods.channels.precrop import job as cropped
from jprune.methods.outcome import Outcome
from jprune.models import build
from jprune.report import measure, page, plots
from jprune.training import evaluate, train
from jprune.training.forward import as_forward
from jprune.training.run_folder import Workspace

# modules of the same three functions
WAYS: dict[str, Any] = {
    "trained": trained,
    "masksparsity": masked,
    "precrop": cropped,
    "lapp": gradual,
}


class Run(Workspace):
    """One run of the main job; calling it goes through all phases."""

    def __init__(self, options: Options, out: Path, resume: bool = False, quiet: bool = False):
        super().__init__(out, quiet)
        self.o = options
        self.method: Method = method(options.method)
        self.way: Any = WAYS[self.method.way]
        options.recipe(options.epochs, options.learning_rate)  # says what is wrong with it before a folder is made
        with self.claim(dataclasses.asdict(options), resume):
            self.data = load_data(options)
            self.model = build(options.model, self.data.num_classes)
            self.way.check_reachable(self)
        self.phases: list[tuple[str, list[dict[str, Any]]]] = []

    def __call__(self) -> dict[str, Any]:
        """All phases; returns what summary.json says."""
        try:
            return self._run()
        finally:
            self.release()

    def _run(self) -> dict[str, Any]:
        o = self.o
        x = jnp.zeros((2, *self.data.image_shape), jnp.float32)
        variables = jax.jit(self.model.init)(jax.random.key(o.seed), x)
        with self.progress(self.way.epochs(self) * steps_per_epoch(self.data.train, o.batch_size)) as progress:
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
        self.join_metrics([name for name, _ in self.phases])
        achieved = getattr(final.cost(), o.quantity) / getattr(outcome.graph.cost(), o.quantity)
        summary = {
            "options": dataclasses.asdict(o),
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "speed_up": before.latency_ms / after.latency_ms,
            "achieved_fraction": achieved,
            "widths": {g: list(w) for g, w in outcome.widths.items()},
            **outcome.more,
            "warnings": self.warnings,
            "seconds": {k: round(v, 1) for k, v in self.seconds.items()},
            "device": jax.devices()[0].device_kind,
        }
        what = f"{o.method} pruned {o.model} on {self.data.name}"
        got = f"to {achieved:.2%} of its {o.quantity}"
        if "target" not in self.method.fixed:
            got += f" (target {o.target:.0%})"
        notes = [f"{what} {got}; timed on batches of {o.batch_size} on {summary['device']}.", *self.warnings]
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

    # -- training -----------------------------------------------------------------------------------------------

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
