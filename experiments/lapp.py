"""LAPP and its baselines: accuracy of networks pruned while they are trained, at equal multiply-accumulates.

    python -m experiments.lapp                       # digits, three seeds, about half an hour
    python -m experiments.lapp --config resnet20-cifar10 --data-dir DIR
    python -m experiments.lapp --redraw              # only the figure and the table, from the results file

Rows differ in how filters are chosen: by thresholds that are learned (lapp), by one threshold for all layers (uniform)
or a random one per layer (random), both cut where lapp is cut, in one step; or not at all: a narrower network with
every width scaled alike, and one with random widths, trained from scratch. All have the same epochs and schedule, and
all costs are counted on the final function, bypasses included.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jprune
from experiments import paper_data, record
from jprune.data import Dataset, load_digits
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.methods.channels.lapp.network import Network, finalise, init, prepare, slice_lapp
from jprune.methods.channels.lapp.run import LappRun, run
from jprune.models import resnet
from jprune.training import TrainConfig, evaluate, train

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to get a network of a given cost: "lapp", "uniform", "random", "dense", "narrow" or "random widths"."""

    how: str
    lapp: LappConfig | None = None

    @property
    def name(self) -> str:
        c = self.lapp
        if c is None:
            return self.how
        options = [c.bypass] if self.how in ("lapp", "uniform", "random") else []
        standard = LappConfig(c.target)
        options += [] if c.task_to_threshold else ["constraint alone"]
        options += [c.score] if c.score != standard.score else []
        return f"{self.how} {' '.join(options)} {c.target:g}".replace("  ", " ")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      model: widths of the stages or None for the whole ones -> linen module.
      widths: of the stages.
      data: (data folder or None, seed) -> dataset.
      train, warmup, stop: the recipe, the epochs of warm-up and when the network is sliced.
      rows: what is compared.
    """

    model: Callable[[Sequence[int] | None], Any]
    widths: tuple[int, ...]
    data: Callable[[Path | None, int], Dataset]
    train: TrainConfig
    warmup: int
    stop: int
    rows: tuple[Row, ...]


def _small_rows() -> tuple[Row, ...]:
    def c(target: float, bypass: str, **more: Any) -> LappConfig:
        return LappConfig(target, bypass, schedule="constant", **more)

    ways = ("lapp", "uniform", "random")
    return (
        *(Row(how, c(0.25, "none")) for how in ways),
        Row("lapp", c(0.25, "none", task_to_threshold=False)),
        *(Row(how, c(0.25, "pw")) for how in ways),
        *(Row(how, c(0.25, b)) for b in ("dw", "lowrank") for how in ("lapp", "uniform")),
        *(Row(how, c(0.15, "none")) for how in ways),
        *(Row(how, c(0.4, "none")) for how in ("lapp", "uniform")),
        Row("lapp", c(0.4, "pw")),
        Row("narrow", c(0.25, "none")),
        Row("random widths", c(0.25, "none")),
        Row("dense"),
    )


def _paper_rows(target: float) -> tuple[Row, ...]:
    return (
        Row("dense"),
        Row("lapp", LappConfig(target)),
        *(Row("lapp", LappConfig(target, b)) for b in ("none", "dw", "lowrank")),
        Row("lapp", LappConfig(target, score="bn")),
        Row("narrow", LappConfig(target, "none")),
    )


SETTINGS: dict[str, Setting] = {
    "small": Setting(
        lambda w: resnet.small((1, 1, 1), widths=w or (4, 8, 16)), (4, 8, 16),
        lambda folder, seed: load_digits(seed),
        TrainConfig(epochs=15, batch_size=64, learning_rate=0.1, weight_decay=5e-4, eval_every_epochs=0),
        warmup=1, stop=5, rows=_small_rows(),
    ),
    "resnet20-cifar10": Setting(
        lambda w: resnet.cifar(20, shortcut="pad" if w is None else "projection", widths=w or (16, 32, 64)),
        (16, 32, 64), paper_data.cifar10,
        TrainConfig(epochs=200, batch_size=128, learning_rate=0.1, weight_decay=5e-4),
        warmup=1, stop=10, rows=_paper_rows(0.403),
    ),
    "resnet18-imagenet": Setting(
        lambda w: resnet.imagenet(18), (), paper_data.imagenet,
        TrainConfig(epochs=100, batch_size=256, learning_rate=0.1, weight_decay=1e-4),
        warmup=1, stop=5, rows=tuple(r for r in _paper_rows(0.444) if r.how != "narrow"),
    ),
}  # fmt: skip


class Seed:
    """All rows of one seed."""

    def __init__(self, setting: Setting, dataset: Dataset, seed: int, work: Path | None, progress: Progress):
        self.s, self.data, self.seed, self.progress = setting, dataset, seed, progress
        self.work = None if work is None else work / f"seed{seed}"
        self.model = setting.model(None)
        self.recipe = dataclasses.replace(setting.train, seed=seed)
        self.x = jax.ShapeDtypeStruct((self.recipe.batch_size, *dataset.image_shape), jnp.float32)
        self.variables = self._initial(self.model)
        self.macs = self._cost(self.model.apply, self.variables).macs

    def _initial(self, model: Any) -> Any:
        return jax.jit(model.init)(jax.random.key(self.seed), jnp.zeros((2, *self.data.image_shape)))

    def _cost(self, fn: Any, variables: Any) -> Any:
        return jprune.trace(fn, variables, self.x).cost()

    def row(self, row: Row) -> dict[str, Any]:
        """Train one row; what it reached and what it costs."""
        if row.how == "dense":
            return self._trained(row, self.model, self.variables)
        assert row.lapp is not None
        if row.how == "narrow":
            module = self._narrow(row.lapp.target)
            return self._trained(row, module, self._initial(module))
        if row.how == "random widths":
            net = prepare(self.model, self.variables, self.x, row.lapp)
            start = init(jax.random.key(self.seed), net, self.variables)
            keep = finalise(net, start, self._random(net), nearest=True).keep
            small = slice_lapp(net, start, keep)
            return self._trained(row, small.forward, small.variables)
        choose = {"lapp": None, "uniform": self._uniform, "random": self._random}[row.how]
        config = LappRun(row.lapp, self.recipe, self.s.warmup, self.s.stop, choose is None, nearest=choose is not None)
        folder = None if self.work is None else self.work / row.name.replace(" ", "-")
        r = run(self.model, self.variables, self.data, config, choose=choose, out=folder, resume=folder is not None,
                progress=self.progress, title=f"seed {self.seed} {row.name}")  # fmt: skip
        share = {n: r.kept[n] / layer.size for n, layer in r.network.layers.items()}
        return {
            "accuracy": r.accuracy["final"], "macs_fraction": r.ratio, "params": r.params, "offset": r.offset,
            "gated": r.accuracy["gated"], "sliced": r.accuracy["sliced"],
            "spread": max(share.values()) - min(share.values()),
            "kept": r.kept, "thresholds": r.thresholds, "warnings": list(r.warnings),
        }  # fmt: skip

    def _uniform(self, net: Network) -> dict[str, float]:
        return dict.fromkeys(net.layers, 0.0)

    def _random(self, net: Network) -> dict[str, float]:
        rng = np.random.default_rng(self.seed)
        return {name: float(rng.normal()) for name in net.layers}

    def _trained(self, row: Row, model: Any, variables: Any) -> dict[str, Any]:
        """A network that is trained as it is."""
        folder = None if self.work is None else self.work / row.name.replace(" ", "-")
        forward = model.apply if hasattr(model, "apply") else model.evaluate
        tuned = train(model, variables, self.data, self.recipe, out=folder, resume=folder is not None,
                      progress=self.progress, title=f"seed {self.seed} {row.name}")[0]  # fmt: skip
        cost = self._cost(forward, variables)
        return {"accuracy": evaluate(model, tuned, self.data, self.recipe.batch_size).accuracy,
                "macs_fraction": cost.macs / self.macs, "params": cost.params}  # fmt: skip

    def _narrow(self, target: float) -> Any:
        """Every width times one number: of all such networks the one nearest to the target."""
        found: dict[tuple[int, ...], float] = {}
        for scale in np.linspace(0.1, 1.0, 91):
            widths = tuple(max(1, round(scale * w)) for w in self.s.widths)
            if widths not in found:
                module = self.s.model(widths)
                shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, *self.data.image_shape)))
                found[widths] = self._cost(module.apply, shapes).macs / self.macs
        return self.s.model(min(found, key=lambda w: abs(found[w] - target)))


def checks(results: dict[str, Any], seeds: list[dict[str, Any]]) -> dict[str, bool]:
    """What the small configuration has to show."""
    mean = {name: r["accuracy"]["mean"] for name, r in results.items()}
    ours, learned = mean["lapp none 0.25"], [n for n in results if n.startswith("lapp ") and "alone" not in n]
    return {
        "lapp without bypass is 2 points above uniform at 0.25": ours >= mean["uniform none 0.25"] + 0.02,
        "and 2 points above random": ours >= mean["random none 0.25"] + 0.02,
        "a 1x1 bypass does not hurt at 0.25": mean["lapp pw 0.25"] >= ours,
        "every learned offset is below 0.3": max(abs(s[n]["offset"]) for s in seeds for n in learned) < 0.3,
        "layers keep different fractions, by 0.3 at least": min(s["lapp none 0.25"]["spread"] for s in seeds) >= 0.3,
        "the constraint alone is not better by more than half a point":
            mean["lapp none constraint alone 0.25"] <= ours + 0.005,
        "lapp is above the narrower network trained from scratch": ours > mean["narrow 0.25"],
        "lapp is above random widths trained from scratch": ours > mean["random widths 0.25"],
    }  # fmt: skip


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of every number of every row."""
    return {
        name: {k: record.mean_and_spread([s[name][k] for s in seeds]) for k, v in row.items() if np.isscalar(v)}
        for name, row in seeds[0].items()
    }


def table(results: dict[str, Any]) -> Table:
    """Means and deviations as a table."""
    out = Table(title="test accuracy, mean and deviation over seeds")
    for column in ("network", "accuracy", "MACs", "parameters", "right after slicing", "offset", "spread"):
        out.add_column(column)
    for name, r in results.items():
        more = [f"{r[k]['mean']:.3f}" if k in r else "" for k in ("sliced", "offset", "spread")]
        out.add_row(name, f"{r['accuracy']['mean']:.3f} ± {r['accuracy']['std']:.3f}",
                    f"{r['macs_fraction']['mean']:.1%}", f"{r['params']['mean']:.0f}", *more)  # fmt: skip
    return out


COLORS = {"lapp": "#2a6f97", "uniform": "#c8553d", "random": "#e0a458", "narrow": "#5b8c5a", "random widths": "#9b72aa",
          "dense": "#444444"}  # fmt: skip
MARKERS = {"none": "o", "pw": "s", "dw": "^", "lowrank": "D", "": "*"}


def draw(results: dict[str, Any], seeds: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against multiply-accumulates, and how many filters each layer kept."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for name, r in results.items():
        how = next(h for h in sorted(COLORS, key=len, reverse=True) if name.startswith(h))
        rest = name.removeprefix(how).strip().rpartition(" ")[0]
        point = r["macs_fraction"]["mean"], r["accuracy"]["mean"], r["accuracy"]["std"]
        curves.setdefault((how, rest), []).append(point)
    for (how, rest), points in curves.items():
        x, y, e = zip(*sorted(points), strict=True)
        if how == "dense":
            left.axhline(y[0], color=COLORS[how], lw=0.8, label=how)
            continue
        left.errorbar(x, y, e, color=COLORS[how], marker=MARKERS.get(rest, "x"), ms=5, lw=1.0, elinewidth=0.6,
                      label=f"{how} {rest}".strip())  # fmt: skip
    left.set_xlabel("multiply-accumulates kept, bypass included")
    left.set_ylabel("test accuracy")
    left.legend(fontsize=7, frameon=False, loc="lower right")
    shown = [n for n in results if n.startswith("lapp ") and "kept" in next(iter(seeds.values()))[n]][:6]
    for k, name in enumerate(shown):
        kept = [s[name]["kept"] for s in seeds.values()]
        layers = list(kept[0])
        right.bar(np.arange(len(layers)) + (k - len(shown) / 2) * 0.13, [np.mean([s[n] for s in kept]) for n in layers],
                  0.13, label=name)  # fmt: skip
        if len(layers) <= 8:
            right.set_xticks(range(len(layers)), [n.removesuffix(".kernel") for n in layers], rotation=20, fontsize=7)
    right.set_ylabel("filters kept (mean over seeds)")
    right.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Table, verdict and figure."""
    Console(width=130 if not console.is_terminal else None).print(table(stored["results"]))
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored["results"], stored["seeds"], picture)
    console.print(f"drawn to {picture}")


def main(
    config: Literal["small", "resnet20-cifar10", "resnet18-imagenet"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    data_dir: Path | None = None,
    out: Path | None = None,
    work: Annotated[Path | None, tyro.conf.arg(help="keep every row's checkpoints here, and go on from them")] = None,
    epochs: Annotated[int | None, tyro.conf.arg(help="shorten the training to this many epochs")] = None,
    rows: Annotated[tuple[str, ...], tyro.conf.arg(help="only these rows, by name; all if none")] = (),
    redraw: Annotated[bool, tyro.conf.arg(help="no training: figure and table from the results file")] = False,
) -> None:
    """LAPP against one common threshold, random thresholds, and narrower networks trained from scratch."""
    setting = SETTINGS[config]
    if epochs is not None:
        setting = dataclasses.replace(
            setting, train=dataclasses.replace(setting.train, epochs=epochs), stop=min(setting.stop, epochs - 1)
        )
    if unknown := set(rows) - {r.name for r in setting.rows}:
        raise ValueError(f"no rows {sorted(unknown)}; there are {[r.name for r in setting.rows]}")
    chosen = [r for r in setting.rows if not rows or r.name in rows]
    out = out or RESULTS / f"lapp-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"lapp-{config}.png"
    console = Console()
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed: list[dict[str, Any]] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("rows", total=len(seeds) * len(chosen))
        for seed in seeds:
            one = Seed(setting, setting.data(data_dir, seed), seed, work, progress)
            per_seed.append({})
            for row in chosen:
                per_seed[-1][row.name] = found = one.row(row)
                progress.update(whole, advance=1)
                console.print(f"seed {seed}  {row.name}: {found['accuracy']:.3f} at {found['macs_fraction']:.1%}")
    results = summary(per_seed)
    stored = {
        **record.heading("lapp", config, seeds, setting),
        "checks": checks(results, per_seed) if config == "small" and not rows else {},
        "results": results,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
