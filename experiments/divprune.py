"""DivPrune's choice on real vectors: how far apart the kept tokens are, what they cover, and what can still be read from them.

    python -m experiments.divprune                     # a minute on a CPU
    python -m experiments.divprune --redraw            # only the figure and the table, from the results file

576 of scikit-learn's digits are an image's tokens (64 numbers each), the other 1221 are asked about. Nothing is trained: a
question is answered by the label of the nearest kept token, and by attention over the kept tokens (a softmax over cosines, with
labels as values), which is what a layer that reads the tokens does. Chance is the mean of twenty draws.

The time of the choice itself is measured for 576 and 2880 tokens: the loop behind the matrix of distances has to grow with k m.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import in_turns
from jprune.methods.tokens import visual_selectors as selectors
from jprune.methods.tokens.divprune import (
    cosine_distance_matrix,
    cover_radius,
    divprune_select,
    farthest_first,
    mmdp_value,
)
from jprune.models.token_hook import Aux

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
METHODS = ("divprune", "random", "norm_topk", "uniform_grid")
MEASURES = ("min_distance", "cover_radius", "nearest", "attention")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is chosen from, and how it is read.

    Attributes:
      tokens: digits that are tokens.
      counts: how many are kept.
      draws: of chance.
      sharpness: of the attention: what cosines are multiplied with.
      sizes: (tokens, kept) of the two timed choices.
      rounds: of timing.
    """

    tokens: int = 576
    counts: tuple[int, ...] = (8, 16, 32, 56, 144)
    draws: int = 20
    sharpness: float = 40.0
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((576, 56), (2880, 282))
    rounds: int = 25


def digits(tokens: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """(tokens, their labels, questions, their labels)."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = jnp.asarray(pixels[order], jnp.float32), jnp.asarray(labels[order])
    return x[:tokens], y[:tokens], x[tokens:], y[tokens:]


def unit(x: Any) -> Any:
    """Rows of length one."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@jax.jit
def measured(x: Any, y: Any, questions: Any, answers: Any, index: Any, sharpness: Any) -> dict[str, Any]:
    """Every measure of one selection."""
    cosine = unit(questions) @ unit(x[index]).T
    read = jax.nn.softmax(sharpness * cosine, axis=-1) @ jax.nn.one_hot(y[index], 10)
    return {
        "min_distance": mmdp_value(x, index),
        "cover_radius": cover_radius(x, index),
        "nearest": (y[index][jnp.argmax(cosine, 1)] == answers).mean(),
        "attention": (jnp.argmax(read, 1) == answers).mean(),
    }


def compare(setting: Setting, seed: int) -> dict[str, Any]:
    """{count: {method: measures}} of one draw of tokens; chance also has the best of its draws."""
    x, y, questions, answers = digits(setting.tokens, seed)
    order = divprune_select(x, max(setting.counts)).order  # every smaller choice is a prefix of the largest
    keys = jax.random.split(jax.random.key(seed), setting.draws)

    def numbers(index: Any) -> dict[str, float]:
        found = measured(x, y, questions, answers, index, setting.sharpness)
        return {name: float(v) for name, v in found.items()}

    out: dict[str, Any] = {"all": numbers(jnp.arange(setting.tokens))}
    for k in setting.counts:
        draws = [numbers(selectors.random(x, Aux(key=key), k)) for key in keys]
        chance = {name: statistics.fmean(d[name] for d in draws) for name in MEASURES}
        out[str(k)] = {
            "divprune": numbers(order[:k]),
            "random": chance | {"best_min_distance": max(d["min_distance"] for d in draws)},
            "norm_topk": numbers(selectors.norm_topk(x, Aux(), k)),
            "uniform_grid": numbers(selectors.uniform_grid(x, Aux(), k)),
        }
    return out


def timed(setting: Setting) -> dict[str, Any]:
    """Seconds of the whole choice and of the loop behind the matrix of distances, in turns.

    The fastest round counts: it is the one that least else disturbed, and the longer a job, the more of its medians are
    other programs' time.
    """
    rng = np.random.default_rng(0)
    jobs = {}
    for m, k in setting.sizes:
        x = jnp.asarray(rng.normal(size=(m, 64)), jnp.float32)
        apart = cosine_distance_matrix(x)
        jobs[f"{m} whole"] = lambda x=x, k=k: divprune_select(x, k)
        jobs[f"{m} loop"] = lambda apart=apart, k=k: farthest_first(apart, k)
    times = in_turns(jobs, setting.rounds, 2)
    seconds = {name: min(of) for name, of in times.items()}
    (small, k), (large, more) = setting.sizes
    return {
        "seconds": seconds,
        "ratio": seconds[f"{large} loop"] / seconds[f"{small} loop"],
        "ratio_of_k_m": large * more / (small * k),
        "rounds": times,
    }


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over draws of tokens."""
    out: dict[str, Any] = {"all": {n: record.mean_and_spread([s["all"][n] for s in seeds]) for n in MEASURES}}
    for k in (k for k in seeds[0] if k != "all"):
        out[k] = {m: {n: record.mean_and_spread([s[k][m][n] for s in seeds]) for n in seeds[0][k][m]} for m in METHODS}
    return out


def checks(seeds: Sequence[dict[str, Any]], cost: dict[str, Any]) -> dict[str, bool]:
    """What has to show."""
    large = [s[k] for s in seeds for k in ("32", "56", "144")]

    def mean(k: str, method: str, name: str) -> float:
        return statistics.fmean(s[k][method][name] for s in seeds)

    def far(r: dict[str, Any], name: str, factor: float) -> bool:
        return r["divprune"]["min_distance"] >= factor * r["random"][name]

    return {
        "smallest distance at least 3 times chance's mean, in every draw": all(far(r, "min_distance", 3) for r in large),
        "and twice the best of twenty of chance's": all(far(r, "best_min_distance", 2) for r in large),
        "cover radius at most 0.9 of chance's, in every draw": all(
            r["divprune"]["cover_radius"] <= 0.9 * r["random"]["cover_radius"] for r in large),
        "nearest label at 144 tokens above chance's, on the mean": mean("144", "divprune", "nearest")
        > mean("144", "random", "nearest"),
        "attention at 144 tokens above chance's, on the mean": mean("144", "divprune", "attention")
        > mean("144", "random", "attention"),
        "the loop grows with k m: less than 40 times for 25 times": cost["ratio"] < 40,
    }  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """Means over draws."""
    whole = results["all"]
    out = Table(title=f"digits as tokens; with all of them: nearest {whole['nearest']['mean']:.3f}, "
                      f"attention {whole['attention']['mean']:.3f}")  # fmt: skip
    for column in ("kept", "method", "smallest distance", "cover radius", "nearest label", "attention"):
        out.add_column(column)
    for k in (k for k in results if k != "all"):
        for m in METHODS:
            r = results[k][m]
            out.add_row(k, m, *(f"{r[n]['mean']:.3f} ± {r[n]['std']:.3f}" for n in MEASURES))
    return out


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: the smallest distance. Middle: the cover radius. Right: what attention reads."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    colours = dict(zip(METHODS, ("#2a6f97", "#8d99a6", "#e07a5f", "#81b29a"), strict=True))
    counts = [k for k in results if k != "all"]
    at = [int(k) for k in counts]
    titles = {"min_distance": "smallest distance", "cover_radius": "cover radius", "attention": "attention's answers"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for m in METHODS:
            mean, spread = (np.array([results[k][m][name][s] for k in counts]) for s in ("mean", "std"))
            axes.plot(
                at, mean, "o-", ms=4, lw=2 if m == "divprune" else 1.2, color=colours[m], label=m.replace("_", " ")
            )
            axes.fill_between(at, mean - spread, mean + spread, color=colours[m], alpha=0.15, lw=0)
        if name == "attention":
            axes.axhline(results["all"][name]["mean"], color="black", lw=0.8, ls=":", label="all tokens")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, counts)
        axes.minorticks_off()
        axes.set_xlabel("kept of 576 tokens")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Table, verdict and figure."""
    Console(width=110 if not console.is_terminal else None).print(table(stored["results"]))
    cost = stored["cost"]
    (small, k), (large, more) = stored["setting"]["sizes"]
    ms = {name: f"{1e3 * t:.2f} ms" for name, t in cost["seconds"].items()}
    console.print(
        f"{k} of {small}: {ms[f'{small} whole']}, the loop {ms[f'{small} loop']}; {more} of {large}: {ms[f'{large} whole']}, the "
        f"loop {ms[f'{large} loop']}: {cost['ratio']:.1f} times for {cost['ratio_of_k_m']:.1f}"
    )
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored["results"], picture)
    console.print(f"drawn to {picture}")


def main(
    config: Literal["digits"] = "digits",
    setting: Setting = Setting(),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path | None = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no choosing: figure and table from the results file")] = False,
) -> None:
    """DivPrune's choice among digits, beside chance, norms and a grid."""
    console = Console()
    out = out or RESULTS / f"divprune-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"divprune-{config}.png"
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    per_seed = [compare(setting, seed) for seed in seeds]
    cost = timed(setting)
    stored = {
        **record.heading("divprune", config, seeds, setting),
        "checks": checks(per_seed, cost),
        "results": summary(per_seed),
        "cost": cost,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
