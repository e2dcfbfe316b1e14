"""PreCropping: widths from layer-wise densities against masks of the same densities, uniform and other widths.

    python -m experiments.precropping                       # digits, three seeds
    python -m experiments.precropping --config mobilenet_v2-cifar10 --data-dir DIR
    python -m experiments.precropping --redraw              # only the figure and the table, from the results file

The small configuration is a plain chain (3x3 convolutions of widths 16, 16, pooling, 32, 32, pooling, 64, 64, BatchNorm,
mean over positions, a linear classifier) on 400 noisy digits; a fraction of its 71,568 convolution weights is kept. Every
row has the same number of weights, or as near below as whole channels allow, and the same training.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jprune
from experiments import paper_data, record
from jprune import importance
from jprune.budget import Target
from jprune.data import ArraySplit, Dataset, epoch_batches, load_digits
from jprune.methods.channels.precrop import controls as claims
from jprune.methods.channels.precrop import precrop as pc
from jprune.models import build, rebuild, vgg
from jprune.training import TrainConfig, as_forward, evaluate, mean_cross_entropy, sgd, train
from jprune.training.state import Recipe, compiled_step, init_state, update_of

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SCORES = ("synflow", "synexp", "snip")
CONTROLS = ("uniform_width", "random_width", "reverse")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      model: () -> linen module.
      data: (data folder or None, seed) -> dataset.
      recipe: of the training from scratch.
      keep: fractions of the counted weights kept; the first gets every row, the others the curve.
      rule: how widths are chosen.
      exempt: leaves that are neither scored nor counted.
      curve: the methods of the curve.
    """

    model: Callable[[], Any]
    data: Callable[[Path | None, int], Dataset]
    recipe: TrainConfig
    keep: tuple[float, ...]
    rule: pc.WidthRule = pc.WidthRule()
    exempt: tuple[str, ...] = ()
    curve: tuple[str, ...] = ("unstructured synflow", "synflow sqrt", "synexp sqrt", "snip sqrt", "uniform_width")


def _chain() -> Any:
    """The plain chain; the classifier has no hidden layer, and the last block is averaged, not pooled."""
    widths = ((16, 16), (32, 32), (64, 64))
    return vgg.VGG(vgg.VGGConfig(widths, (), 10, bias=False, pools=(1, 2)))


_CIFAR = TrainConfig(epochs=160, batch_size=128, learning_rate=0.1, schedule="step", milestones=(80, 120),
                     weight_decay=5e-4)  # fmt: skip
_IMAGENET = TrainConfig(epochs=100, batch_size=256, learning_rate=0.1, schedule="cosine", weight_decay=1e-4,
                        warmup_epochs=5.0, recalibrate_examples=8192)  # fmt: skip
_SCALED = pc.WidthRule(stage_width="scale")

SETTINGS: dict[str, Setting] = {
    "small": Setting(
        _chain,
        lambda folder, seed: load_digits(seed, n_train=400, noise=0.5),
        TrainConfig(epochs=25, batch_size=32, learning_rate=0.1, weight_decay=5e-4, eval_every_epochs=0),
        keep=(0.02, 0.5, 0.2, 0.1, 0.05),
        rule=pc.WidthRule(count_bn=False),
        exempt=("params/head/kernel",),
    ),
    **{
        f"{name}-cifar10": Setting(lambda m=model: build(m, 10), paper_data.cifar10, _CIFAR, (0.1, 0.5, 0.2, 0.05), _SCALED)
        for name, model in (
            ("resnet20", "resnet20"), ("mobilenet_v2", "mobilenet_v2_small"), ("shufflenet_v2", "shufflenet_v2_small"))
    },
    **{
        f"{model}-imagenet": Setting(lambda m=model: build(m, 1000), paper_data.imagenet, _IMAGENET, (0.5,))
        for model in ("mobilenet_v2", "resnet50")
    },
}  # fmt: skip


class Seed:
    """Every row of one seed."""

    def __init__(self, setting: Setting, dataset: Dataset, seed: int, work: Path | None, progress: Progress):
        self.s, self.data, self.seed, self.progress = setting, dataset, seed, progress
        self.work = None if work is None else work / f"seed{seed}"
        self.model = setting.model()
        self.x = jnp.zeros((2, *dataset.image_shape), jnp.float32)
        self.variables = jax.jit(self.model.init)(jax.random.key(seed), self.x)
        self.graph = jprune.trace(self.model.apply, self.variables, self.x)
        self.weights = tuple(p for p in importance.weight_leaves(self.graph) if p not in setting.exempt)
        self.total = sum(int(np.prod(self.graph.leaves[p].shape)) for p in self.weights)
        self.batches = _scoring_batches(dataset, seed)
        self.scores: dict[tuple[str, float], Any] = {}

    def score(self, method: str, keep: float) -> Any:
        """Scores of single weights; those of SynFlow depend on what is to be kept."""
        at = (method, keep if method == "synflow" else 1.0)
        if at not in self.scores:
            self.scores[at] = (
                importance.synflow(self.model.apply, self.variables, self.x, self.weights, keep)
                if method == "synflow"
                else getattr(importance, method)(self.model.apply, self.variables, self.batches, self.weights)
            )
        return self.scores[at]

    def fit(self, name: str, model: Any, variables: Any) -> float:
        """Test accuracy after training from scratch; resumed if it was interrupted."""
        folder = None if self.work is None else self.work / name.replace(" ", "-")
        recipe = dataclasses.replace(self.s.recipe, seed=self.seed)
        trained = train(model, variables, self.data, recipe, out=folder, resume=folder is not None,
                        progress=self.progress, title=f"seed {self.seed} {name}")[0]  # fmt: skip
        return evaluate(model, trained, self.data).accuracy

    def unstructured(self, name: str, masks: Any, variables: Any) -> dict[str, Any]:
        """The mask itself, trained on these weights."""
        return {
            "accuracy": self.fit(name, claims.masked(self.model), claims.with_masks(variables, masks)),
            "weights": sum(int(m.sum()) for m in masks.values()),
            "macs": self.macs(),
            "macs_if_skipped": self._macs_of(masks),
        }

    def macs(self, widths: Any = None) -> float:
        """Multiply-accumulates of one image."""
        return self.graph.cost(widths=widths or {}).macs / len(self.x)

    def _macs_of(self, masks: Any) -> float:
        """Multiply-accumulates an ideal sparse kernel would do: each layer's times its density."""
        rows = self.graph.layer_costs()
        return sum(r.macs * (float(masks[r.name].mean()) if r.name in masks else 1.0) for r in rows) / len(self.x)

    def cropped(self, name: str, found: pc.Cropped, weights: Any = None) -> dict[str, Any]:
        """The network of these widths, initialised afresh unless weights are given."""
        shapes = self.graph.resize(self.variables, found.widths)
        module = rebuild(self.model, shapes)
        if weights is None:
            weights = jax.jit(module.init)(jax.random.key(1000 + self.seed), self.x)
        macs = self.macs(found.widths)
        kept = sum(int(np.prod(leaf.shape)) for leaf in importance.at_init.weights_of(shapes, self.weights).values())
        return {"accuracy": self.fit(name, module, weights), "weights": kept, "macs": macs,
                "macs_if_skipped": macs, "widths": list(found.widths.values())}  # fmt: skip

    def widths(self, row: str, keep: float) -> pc.Cropped:
        """Widths of a row "method rule" or of a control."""
        method, _, rule = row.partition(" ")
        how = dataclasses.replace(self.s.rule, rule=rule or "sqrt")
        scoring = pc.Scoring(exempt=self.s.exempt)
        if method in ("synflow", "snip", "grasp"):  # scores are at hand: once for both rules and the masks
            d = importance.densities(self.score(method, keep), keep)
            return pc.widths(self.graph, d, Target.params(keep), how)
        return pc.precrop(self.model, self.variables, self.x, Target.params(keep), method, rule=how, scoring=scoring,
                          key=jax.random.key(self.seed))  # fmt: skip

    def row(self, row: str, keep: float) -> dict[str, Any]:
        """One row."""
        name = f"{keep:g} {row}"
        kind, _, method = row.partition(" ")
        if row == "dense":
            macs = self.macs()
            return {"accuracy": self.fit("dense", self.model, self.variables), "weights": self.total,
                    "macs": macs, "macs_if_skipped": macs}  # fmt: skip
        if kind in ("unstructured", "shuffled", "reinitialised"):
            masks = importance.weight_masks(self.score(method, keep), keep)
            if kind == "shuffled":
                masks = importance.shuffled_masks(masks, np.random.default_rng(self.seed))
            other = jax.jit(self.model.init)(jax.random.key(500 + self.seed), self.x)
            return self.unstructured(name, masks, other if kind == "reinitialised" else self.variables)
        if kind == "first-channels":
            found = self.widths(f"{method} sqrt", keep)
            return self.cropped(name, found, claims.first_channels(self.graph, self.variables, found.widths))
        return self.cropped(name, self.widths(row, keep))

    def run(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{keep ratio: {row: numbers}}."""
        rows = ["dense"]
        rows += [f"{kind} {m}" for m in ("synflow", "snip") for kind in ("unstructured", "shuffled")]
        rows += ["reinitialised synflow", *(f"{m} {rule}" for m in SCORES for rule in ("sqrt", "lsq"))]
        rows += ["first-channels synflow", *CONTROLS]
        first, *others = self.s.keep
        out = {f"{first:g}": {row: self.row(row, first) for row in rows}}
        for keep in others:
            out[f"{keep:g}"] = {row: self.row(row, keep) for row in self.s.curve}
        return out

    def step_times(self) -> dict[str, float]:
        """Milliseconds of a compiled training step: the dense network, the masked one, the cropped one; medians."""
        keep = self.s.keep[0]
        masks = importance.weight_masks(self.score("synflow", keep), keep)
        found = self.widths("synflow sqrt", keep)
        module = rebuild(self.model, self.graph.resize(self.variables, found.widths))
        small = jax.jit(module.init)(jax.random.key(0), self.x)
        batch = epoch_batches(self.data.train, self.s.recipe.batch_size, seed=0, epoch=0)[0]
        contenders = {
            "dense": (self.model, self.variables),
            "masked": (claims.masked(self.model), claims.with_masks(self.variables, masks)),
            "cropped": (module, small),
        }
        steps = {name: _stepper(model, variables, batch, self.s.recipe) for name, (model, variables) in
                 contenders.items()}  # fmt: skip
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(30):  # in turns, so that a busy moment of the machine meets all of them
            for name, step in steps.items():
                taken[name].append(step())
        return {name: float(np.median(t)) for name, t in taken.items()}


def _stepper(model: Any, variables: Any, batch: Any, recipe: TrainConfig) -> Callable[[], float]:
    """Milliseconds per step over ten steps, at each call."""
    from jprune.training.forward import split_variables
    from jprune.training.placement import data_mesh

    params, rest = split_variables(variables)
    descent = sgd(recipe.weight_decay, recipe.momentum, recipe.nesterov)
    state = init_state(params, rest, (descent,), data_mesh(None))
    shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(state))
    step = compiled_step(
        Recipe(as_forward(model), (update_of(descent),), mean_cross_entropy(0.0), "float32", True, shardings)
    )
    batch, key, rate = jax.device_put(batch), jax.random.key(0), np.float32(1e-3)
    holder = [step(state, batch, key, rate)[0]]

    def run() -> float:
        jax.block_until_ready(holder[0])
        began = time.perf_counter()
        for _ in range(10):
            holder[0] = step(holder[0], batch, key, rate)[0]
        jax.block_until_ready(holder[0])
        return 1e2 * (time.perf_counter() - began)

    return run


def _scoring_batches(data: Dataset, seed: int, per_class: int = 10) -> list[tuple[Any, Any]]:
    """Ten training examples of every class; a tenth of the training set is enough to find them."""
    split = data.train
    n = len(split) if isinstance(split, ArraySplit) and len(split) < 10000 else min(len(split), 100 * data.num_classes)
    chosen = np.random.default_rng(seed).permutation(len(split))[:n]
    read = split.read(np.sort(chosen))
    return importance.class_balanced_batches(read["image"], read["label"], per_class)


def checks(results: dict[str, Any], times: dict[str, float]) -> dict[str, bool]:
    """What the small configuration has to show, on means over the seeds."""
    rows = {m: r["accuracy"]["mean"] for m, r in next(iter(results.values())).items()}
    ours = rows["synflow sqrt"]
    return {
        "shuffled within 1 point of unstructured (SynFlow)": abs(
            rows["shuffled synflow"] - rows["unstructured synflow"]) <= 0.01,
        "shuffled within 1 point of unstructured (SNIP)": abs(
            rows["shuffled snip"] - rows["unstructured snip"]) <= 0.01,
        "PreCrop (SynFlow) at least 1 point above uniform width": ours >= rows["uniform_width"] + 0.01,
        "PreCrop (SynFlow) at least 3 points above reversed densities": ours >= rows["reverse"] + 0.03,
        **{f"sqrt at least as good as lsq ({m})": rows[f"{m} sqrt"] >= rows[f"{m} lsq"] for m in SCORES},
        "PreCrop (SynFlow) within 3 points of its mask": ours >= rows["unstructured synflow"] - 0.03,
        "a step of the cropped network is faster than one of the masked": times["cropped"] < times["masked"],
    }  # fmt: skip


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of every number of every row."""
    return {
        keep: {
            m: {k: record.mean_and_spread([s[keep][m][k] for s in seeds]) for k in numbers if k != "widths"}
            for m, numbers in rows.items()
        }
        for keep, rows in seeds[0].items()
    }


def table(results: dict[str, Any]) -> Table:
    """Means and deviations as a table."""
    out = Table(title="test accuracy after training from scratch, mean and deviation over seeds")
    for column in ("kept", "row", "accuracy", "weights", "MACs"):
        out.add_column(column)
    for keep, rows in results.items():
        for m, r in rows.items():
            out.add_row(f"{float(keep):.0%}", m, f"{r['accuracy']['mean']:.3f} ± {r['accuracy']['std']:.3f}",
                        f"{r['weights']['mean']:,.0f}", f"{r['macs']['mean']:,.0f}")  # fmt: skip
    return out


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: every row at the smallest budget. Right: accuracy against multiply-accumulates over the budgets."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(1, 1.1))
    keep, rows = next(iter(results.items()))
    names = list(rows)[::-1]
    colors = ["#2a6f97" if n == "synflow sqrt" else "#b8c4d0" for n in names]
    bars.barh(names, [rows[m]["accuracy"]["mean"] for m in names], 0.7, color=colors,
              xerr=[rows[m]["accuracy"]["std"] for m in names], error_kw={"lw": 0.8})  # fmt: skip
    bars.set_xlim(min(rows[m]["accuracy"]["mean"] - rows[m]["accuracy"]["std"] for m in names) - 0.02, 1.0)
    bars.tick_params(axis="y", labelsize=7)
    bars.set_xlabel("test accuracy")
    bars.set_title(f"{float(keep):.0%} of the weights kept", fontsize=10)
    ratios = sorted(results, key=float)
    for m in [m for m in rows if all(m in results[k] for k in ratios)] if len(ratios) > 1 else []:
        at = [results[k][m] for k in ratios]
        curve.errorbar([r["macs_if_skipped"]["mean"] for r in at], [r["accuracy"]["mean"] for r in at],
                       [r["accuracy"]["std"] for r in at], marker="o", ms=3, lw=1, capsize=2,
                       label=m + (" (zeros skipped)" if m.startswith("unstructured") else ""))  # fmt: skip
    curve.set_xscale("log")
    curve.xaxis.set_minor_formatter(NullFormatter())
    curve.set_xlabel("multiply-accumulates per image")
    curve.set_ylabel("test accuracy")
    if len(ratios) > 1:
        curve.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Table, step times, verdict and figure."""
    Console(width=110 if not console.is_terminal else None).print(table(stored["results"]))
    console.print("a training step takes " + ", ".join(f"{t:.2f} ms {m}" for m, t in stored["step_ms"].items()))
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored["results"], picture)
    console.print(f"drawn to {picture}")


def main(
    config: Literal["small", "resnet20-cifar10", "mobilenet_v2-cifar10", "shufflenet_v2-cifar10",
                    "mobilenet_v2-imagenet", "resnet50-imagenet"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    data_dir: Path | None = None,
    out: Path | None = None,
    work: Annotated[Path | None, tyro.conf.arg(help="keep every training's checkpoints here, and go on from them")] = None,
    epochs: Annotated[int | None, tyro.conf.arg(help="shorten every training to this many epochs")] = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no training: figure and table from the results file")] = False,
) -> None:  # fmt: skip
    """PreCrop by three density sources and two rules against masks of the same densities and other widths."""
    setting = SETTINGS[config]
    if epochs is not None:
        short = dataclasses.replace(setting.recipe, epochs=epochs, milestones=(), schedule="cosine", warmup_epochs=0.0)
        setting = dataclasses.replace(setting, recipe=short)
    out = out or RESULTS / f"precropping-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"precropping-{config}.png"
    console = Console()
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed, times = [], {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("seeds", total=len(seeds))
        for seed in seeds:
            one = Seed(setting, setting.data(data_dir, seed), seed, work, progress)
            times = times or one.step_times()
            per_seed.append(one.run())
            progress.update(whole, advance=1)
    results = summary(per_seed)
    stored = {
        **record.heading("precropping", config, seeds, setting),
        "checks": checks(results, times) if config == "small" else {},
        "step_ms": times,
        "results": results,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
