"""MaskSparsity and its baselines: accuracy right after pruning and after the same fine-tuning.

    python -m experiments.masksparsity                       # digits, three seeds, a quarter of an hour
    python -m experiments.masksparsity --config resnet110-cifar10 --data-dir DIR
    python -m experiments.masksparsity --redraw              # only the figure and the table, from the results file

Every method prunes the same number of channels and gets the same three phases: the baseline W0, one more phase from W0
(with its penalty, or with none), and fine-tuning of the pruned network. The small configuration also shows the two
controls: a penalty too weak for the schedule must fail, a random mask must do as well as a chosen one. Random masks are
the chosen one shuffled inside every layer, and one drawn over the whole network, which leaves some narrow layers with
next to nothing; that one also at the strength `suggest_s` gives for this schedule.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
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
from jprune.data import Dataset, load_digits, steps_per_epoch
from jprune.importance import batchnorm_scale, magnitude, random
from jprune.methods.channels.depgraph_sparse import group_sparsity
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.channels.masksparsity.run import MaskSparsityConfig, run
from jprune.models import rebuild, resnet
from jprune.training import TrainConfig, evaluate, learning_rates, train

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration: the model, the data and the recipe of every phase.

    Attributes:
      model: () -> linen module.
      data: (data folder or None, seed) -> dataset.
      baseline, sparse, finetune: recipes of steps 0, 1 and 3, 5.
      ratios: fractions of the listed channels to prune, each a row of its own.
      strength: s of both sparse phases; weak: the control that must fail.
      group_strength: of DepGraph's group shrinkage.
      coupled: whether residual streams are pruned too.
      threshold: th of steps 2 and 4.
    """

    model: Callable[[], Any]
    data: Callable[[Path | None, int], Dataset]
    baseline: TrainConfig
    sparse: TrainConfig
    finetune: TrainConfig
    ratios: tuple[float, ...]
    strength: float
    group_strength: float
    weak: float | None = None
    coupled: bool = False
    threshold: float = 0.01


_DIGITS = TrainConfig(epochs=15, batch_size=64, learning_rate=0.05, weight_decay=5e-4, eval_every_epochs=0)
_CIFAR = TrainConfig(
    epochs=200, batch_size=128, learning_rate=0.1, schedule="step", milestones=(100, 150), weight_decay=1e-4
)
_IMAGENET = TrainConfig(epochs=100, batch_size=256, learning_rate=0.1, schedule="step", milestones=(30, 60, 90),
                        weight_decay=1e-4, recalibrate_examples=8192)  # fmt: skip

SETTINGS: dict[str, Setting] = {
    "small": Setting(
        lambda: resnet.small((2, 2, 2), widths=(16, 32, 64)),
        lambda folder, seed: load_digits(seed),
        _DIGITS, _DIGITS, dataclasses.replace(_DIGITS, epochs=5, learning_rate=0.01),
        ratios=(0.75, 0.5), strength=0.02, group_strength=5e-3, weak=5e-3,
    ),
    "resnet56-cifar10": Setting(
        lambda: resnet.cifar(56), paper_data.cifar10, _CIFAR, _CIFAR,
        dataclasses.replace(_CIFAR, epochs=40, learning_rate=0.01, milestones=(20, 30)),
        ratios=(0.5,), strength=5e-4, group_strength=5e-4, coupled=True,
    ),
    "resnet110-cifar10": Setting(
        lambda: resnet.cifar(110), paper_data.cifar10, _CIFAR, _CIFAR,
        dataclasses.replace(_CIFAR, epochs=40, learning_rate=0.01, milestones=(20, 30)),
        ratios=(0.6,), strength=5e-4, group_strength=5e-4, coupled=True,
    ),
    "resnet50-imagenet": Setting(
        lambda: resnet.imagenet(50), paper_data.imagenet, _IMAGENET, _IMAGENET,
        dataclasses.replace(_IMAGENET, epochs=40, learning_rate=5e-4, milestones=(10, 20, 30)),
        ratios=(0.5,), strength=5e-4, group_strength=5e-4,
    ),
}  # fmt: skip


class Seed:
    """All phases and methods of one seed."""

    def __init__(self, setting: Setting, dataset: Dataset, seed: int, work: Path | None, progress: Progress):
        self.s, self.data, self.seed, self.progress = setting, dataset, seed, progress
        self.work = None if work is None else work / f"seed{seed}"
        self.model = setting.model()
        x = jnp.zeros((2, *dataset.image_shape), jnp.float32)
        self.variables = jax.jit(self.model.init)(jax.random.key(seed), x)
        self.graph = jprune.trace(self.model.apply, self.variables, x)
        self.listed = ms.listed_scales(self.graph, setting.coupled)
        self.trained: dict[str, Any] = {}  # of phases that rows share

    def fit(self, name: str, recipe: TrainConfig, variables: Any, transform: Any = None, model: Any = None) -> Any:
        """One phase of training; resumed if it was interrupted."""
        folder = None if self.work is None else self.work / name
        recipe = dataclasses.replace(recipe, seed=self.seed)
        return train(
            model or self.model,
            variables,
            self.data,
            recipe,
            transform=transform,
            out=folder,
            resume=folder is not None,
            progress=self.progress,
            title=f"seed {self.seed} {name}",
        )[0]

    def accuracy(self, variables: Any, model: Any = None) -> float:
        """On the test split."""
        return evaluate(model or self.model, variables, self.data).accuracy

    def pruned(self, name: str, variables: Any, keep: dict[str, np.ndarray]) -> dict[str, Any]:
        """Prune, test, fine-tune, test."""
        small = self.graph.compact(variables, keep)
        module = rebuild(self.model, small)
        tuned = self.fit(f"{name}-finetune", self.s.finetune, small, model=module)
        accuracy = {"before": self.accuracy(variables), "pruned": self.accuracy(small, module),
                    "finetuned": self.accuracy(tuned, module)}  # fmt: skip
        return accuracy | self.described(variables, keep)

    def described(self, variables: Any, keep: dict[str, np.ndarray]) -> dict[str, float]:
        """What pruning these variables so leaves, and takes."""
        gammas = {p: np.abs(_leaf(variables, p)) for paths in self.listed.values() for p in paths}
        kept = np.concatenate([gammas[p][keep[g]] for g, paths in self.listed.items() for p in paths])
        gone = np.concatenate([gammas[p][~keep[g]] for g, paths in self.listed.items() for p in paths])
        cost, dense = self.graph.cost(keep), self.graph.cost()
        return {
            "macs_fraction": cost.macs / dense.macs,
            "params_fraction": cost.params / dense.params,
            "mean_kept_gamma": float(kept.mean()),
            "max_pruned_gamma": float(gone.max(initial=0.0)),
        }

    def masksparsity(
        self,
        name: str,
        masked: str,
        w0: Any,
        ratio: float = 0.5,
        mask: dict[str, np.ndarray] | None = None,
        strength: float | None = None,
        by: str = "mask",
    ) -> dict[str, Any]:
        """The method from W0 on: a row, and its masked phase under the name `masked`, which rows may share."""
        s = self.s
        config = MaskSparsityConfig(
            baseline=None, sparse=s.sparse, finetune=s.finetune, strength_global=s.strength,
            strength=s.strength if strength is None else strength, rule=ms.MaskRule("ratio", ratio=ratio),
            coupled=s.coupled, prune_threshold=s.threshold, prune_by=by)  # fmt: skip
        names = {"round1-global": "global", "round1-masked": masked, "round1-finetune": f"{name}-finetune"}

        def fit(phase: str, model: Any, variables: Any, recipe: TrainConfig, transform: Any) -> Any:
            phase = names[phase]
            if phase not in self.trained:
                self.trained[phase] = self.fit(phase, recipe, variables, transform, model)
            return self.trained[phase]

        (done,) = run(self.model, w0, self.data, config, train_fn=fit, mask=mask).rounds
        row = done.accuracy | self.described(self.trained[masked], done.decision.keep)
        if by == "threshold":
            row |= {k: getattr(done.decision, k) for k in ("masked_survivors", "unmasked_losses")}
        return row

    def run(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{ratio: {method: numbers}}."""
        s, g, listed = self.s, self.graph, self.listed
        w0 = self.fit("baseline", s.baseline, self.variables)
        more = self.fit("longer", s.sparse, w0)  # the budget of the sparse phases, without a penalty
        grouped = self.fit("group-norm", dataclasses.replace(s.sparse, weight_decay=0.0), w0,
                           group_sparsity(g, s.group_strength))  # fmt: skip
        out: dict[str, dict[str, dict[str, Any]]] = {}
        for ratio in s.ratios:
            rule = ms.MaskRule("ratio", ratio=ratio)

            def chosen(scores: Any, rule: ms.MaskRule = rule) -> dict[str, np.ndarray]:
                own = {gid: np.asarray(scores[gid]) for gid in listed}
                return ms.make_mask(own, {gid: (gid,) for gid in listed}, rule).keep

            at = f"{ratio:g}"
            ours = self.masksparsity(f"masked-{at}", f"masked-{at}", w0, ratio)
            slim = self.trained["global"]  # of the method's first step, which is network slimming
            mask = ms.make_mask(slim, listed, rule).keep
            rows = {
                "masksparsity": ours,
                "masksparsity, by threshold": self.masksparsity(
                    f"threshold-{at}", f"masked-{at}", w0, ratio, by="threshold"
                ),
                "slimming": self.pruned(f"slimming-{at}", slim, mask),
                "batchnorm-scale": self.pruned(f"scale-{at}", more, chosen(batchnorm_scale(g, more))),
                "magnitude-l1": self.pruned(f"l1-{at}", more, chosen(magnitude(g, more, 1))),
                "group-norm": self.pruned(f"norm-{at}", more, chosen(magnitude(g, more, 2))),
                "group-norm-sparse": self.pruned(f"normsparse-{at}", grouped, chosen(magnitude(g, grouped, 2))),
                "random": self.pruned(f"random-{at}", more, chosen(random(g, jax.random.key(self.seed)))),
            }
            if s.weak is not None and ratio == s.ratios[0]:
                luck = chosen(random(g, jax.random.key(1000 + self.seed)))
                gammas = [np.abs(_leaf(w0, p)).max() for paths in listed.values() for p in paths]
                rates = learning_rates(s.sparse, steps_per_epoch(self.data.train, s.sparse.batch_size))
                enough = ms.suggest_s(rates, s.sparse.momentum, float(max(gammas)))
                shuffled = {gid: np.random.default_rng(self.seed).permutation(k) for gid, k in mask.items()}

                def control(name: str, masked: str, mask: Any, strength: float = s.strength, by: str = "mask") -> Any:
                    return self.masksparsity(name, masked, w0, mask=mask, strength=strength, by=by)

                rows["control: network-wide random mask, suggested s"] = {
                    **control("random-mask-suggested", "random-mask-suggested", luck, enough), "s": enough
                }  # fmt: skip
                rows["control: penalty too weak"] = control("weak", "weak", mask, s.weak)
                rows["control: random mask"] = control("shuffled-mask", "shuffled-mask", shuffled)
                rows["control: random mask, by threshold"] = control(
                    "shuffled-threshold", "shuffled-mask", shuffled, by="threshold"
                )
                rows["control: network-wide random mask"] = control("random-mask", "random-mask", luck)
            out[at] = rows
        return out


def _leaf(tree: Any, path: str) -> np.ndarray:
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree)


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What the small configuration has to show, on means over the seeds at the first ratio."""
    rows = results[next(iter(results))]
    mean = {m: {k: v["mean"] for k, v in r.items()} for m, r in rows.items()}
    ours, slim = mean["masksparsity"], mean["slimming"]

    def drop(m: str) -> float:
        return mean[m]["before"] - mean[m]["pruned"]

    return {
        "masksparsity loses at most 2 points by pruning": drop("masksparsity") <= 0.02,
        "masksparsity is 20 points above slimming right after pruning": ours["pruned"] >= slim["pruned"] + 0.2,
        "its kept scales are 10 times those of slimming": ours["mean_kept_gamma"] >= 10 * slim["mean_kept_gamma"],
        "a penalty too weak loses more than 2 points": drop("control: penalty too weak") > 0.02,
        "a random mask, pruned by threshold, loses at most 2 points": drop("control: random mask, by threshold")
        <= 0.02,
        "a random mask, pruned by mask, loses at most 2 points": drop("control: random mask") <= 0.02,
        "so does one drawn over the whole network": drop("control: network-wide random mask") <= 0.02,
        "and at the suggested strength": drop("control: network-wide random mask, suggested s") <= 0.02,
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of every number of every row."""
    first = seeds[0]
    return {
        ratio: {
            m: {k: record.mean_and_spread([s[ratio][m][k] for s in seeds]) for k in numbers}
            for m, numbers in rows.items()
        }
        for ratio, rows in first.items()
    }


def table(results: dict[str, Any]) -> Table:
    """Means and deviations as a table."""
    out = Table(title="accuracy, mean and deviation over seeds")
    for column in (
        "pruned",
        "method",
        "before",
        "right after",
        "fine-tuned",
        "MACs",
        "kept |gamma|",
        "max gone |gamma|",
    ):
        out.add_column(column)
    for ratio, rows in results.items():
        for m, r in rows.items():
            cells = [f"{r[k]['mean']:.3f} ± {r[k]['std']:.3f}" for k in ("before", "pruned", "finetuned")]
            out.add_row(f"{float(ratio):.0%}", m, *cells, f"{r['macs_fraction']['mean']:.1%}",
                        f"{r['mean_kept_gamma']['mean']:.3g}", f"{r['max_pruned_gamma']['mean']:.1e}")  # fmt: skip
    return out


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy right after pruning and after fine-tuning, a panel per ratio, bars for the deviation over seeds."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for ax, (ratio, rows) in zip(figure.subplots(1, len(results), sharex=True, squeeze=False)[0], results.items()):
        names = list(rows)[::-1]
        at = np.arange(len(names))
        for key, label, color, shift in (("pruned", "right after pruning", "#2a6f97", 0.2),
                                         ("finetuned", "after fine-tuning", "#b8c4d0", -0.2)):  # fmt: skip
            ax.barh(at + shift, [rows[m][key]["mean"] for m in names], 0.38, color=color, label=label,
                    xerr=[rows[m][key]["std"] for m in names], error_kw={"lw": 0.8})  # fmt: skip
        ax.set_yticks(at, names, fontsize=7)
        ax.set_xlim(0, 1.05)
        ax.set_xlabel("test accuracy")
        ax.set_title(f"{float(ratio):.0%} of the listed channels pruned", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, results: dict[str, Any], verdict: dict[str, bool], picture: Path) -> None:
    """Table, verdict and figure."""
    Console(width=130 if not console.is_terminal else None).print(table(results))
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(results, picture)
    console.print(f"drawn to {picture}")


def main(
    config: Literal["small", "resnet56-cifar10", "resnet110-cifar10", "resnet50-imagenet"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    data_dir: Path | None = None,
    out: Path | None = None,
    work: Annotated[Path | None, tyro.conf.arg(help="keep every phase's checkpoints here, and go on from them")] = None,
    epochs: Annotated[int | None, tyro.conf.arg(help="shorten every phase to this many epochs")] = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no training: figure and table from the results file")] = False,
) -> None:
    """MaskSparsity against network slimming, magnitude, DepGraph's group norm and random, at equal training budgets."""
    setting = SETTINGS[config]
    if epochs is not None:
        short = {k: dataclasses.replace(getattr(setting, k), epochs=epochs, milestones=(), schedule="cosine")
                 for k in ("baseline", "sparse", "finetune")}  # fmt: skip
        setting = dataclasses.replace(setting, **short)
    out = out or RESULTS / f"masksparsity-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"masksparsity-{config}.png"
    console = Console()
    if redraw:
        stored = json.loads(out.read_text())
        report(console, stored["results"], stored["checks"], picture)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    per_seed = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("seeds", total=len(seeds))
        for seed in seeds:
            per_seed.append(Seed(setting, setting.data(data_dir, seed), seed, work, progress).run())
            progress.update(whole, advance=1)
    results = summary(per_seed)
    verdict = checks(results) if config == "small" else {}
    record.write(out, {
        **record.heading("masksparsity", config, seeds, setting),
        "checks": verdict,
        "results": results,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    })  # fmt: skip
    report(console, results, verdict, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
