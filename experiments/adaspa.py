"""AdaSpa on a small video model trained here, against static and estimated patterns at equal sparsity.

    python -m experiments.adaspa                       # moving digits, three models with three noises each
    python -m experiments.adaspa --config hunyuan      # no sampling: what the schedule costs at HunyuanVideo's shape
    python -m experiments.adaspa --redraw              # only the figure and the table, from the results file

Every method makes the same videos from the same noise: dense for ten steps, then attention over the text and 7 of 36 video
blocks per row. What is reported is how near it comes to the dense sample, and how much attention mass its blocks hold.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.ndimage import uniform_filter

from experiments import record
from experiments.moving_digits import MODEL, TOKENS, WORDS, Recipe, trained, videos
from jprune.methods.attention import patterns
from jprune.methods.attention.adaspa import Action, LayerState, attention_of, init_state, sample, segments
from jprune.methods.attention.adaspa_select import AdaSpaConfig, keep_counts, recall_of, spans
from jprune.models.samplers import RectifiedFlow
from pallas_kernels.block_score import block_scores

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
VIDEOS = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """Model, sampler and sparsity."""

    recipe: Recipe = Recipe()
    sampler: RectifiedFlow = RectifiedFlow(50, 7.0)
    sparsities: tuple[float, ...] = (0.8, 0.6)
    noises: int = 3
    block: int = 8


class Measured(NamedTuple):
    """A layer's state and the sum and number of its recalls in sparse steps."""

    inner: LayerState
    recall: Any
    steps: Any


def measuring(hook: Callable[..., Any], action: Action, config: AdaSpaConfig) -> Callable[..., Any]:
    """The hook, with the exact share of attention mass in the blocks it used added to its state."""

    def attention(layer: int, q: Any, k: Any, v: Any, valid: Any, state: Measured) -> Any:
        out, inner = hook(layer, q, k, v, valid, state.inner)
        if action in (Action.DENSE, Action.FUSED):
            return out, state._replace(inner=inner)
        masses = block_scores(q, k, block_q=config.block, block_k=config.block)
        share = recall_of(masses, inner.chosen, config, q.shape[2]).mean()
        return out, Measured(inner, state.recall + share, state.steps + 1)

    return attention


def methods(sparsity: float, setting: Setting, seed: int) -> dict[str, tuple[AdaSpaConfig, Callable[[Action], Any]]]:
    """{name: (settings, action -> hook)}."""
    tokens = {"text_start": TOKENS - WORDS, "text_len": WORDS, "min_tokens": 0}

    def config(**more: Any) -> AdaSpaConfig:
        return AdaSpaConfig(sparsity, setting.block, **{**tokens, "head_adaptive": "off", **more})

    ours = {
        "exact": config(search_steps=tuple(range(9, setting.sampler.steps))),
        "adaspa": config(),
        "adaspa, cached lse": config(research="cached"),
        "adaspa, heads": config(head_adaptive="paper"),
        "adaspa, heads guarded": config(head_adaptive="guarded"),
        "adaspa, searched once": config(search_steps=(9,)),
    }
    rankings = {
        "mean pool": patterns.mean_pool,
        "window": patterns.window,
        "last queries": patterns.last_queries(64),
        "random": patterns.chance(jax.random.key(seed)),
    }
    out: dict[str, Any] = {n: (c, lambda a, c=c: attention_of(a, c)) for n, c in ours.items()}
    return out | {n: (config(), lambda a, r=r: patterns.attention_of(r, a, config())) for n, r in rankings.items()}


def ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Mean structural similarity of frames (frames, height, width) with a range of 2 (Wang et al. 2004, uniform window)."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    size: Any = (1, window, window)
    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = uniform_filter(x, size), uniform_filter(y, size)
    n = window**2 / (window**2 - 1)
    vx, vy, cov = (n * (uniform_filter(p * q, size) - mp * mq)
                   for p, q, mp, mq in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))  # fmt: skip
    found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    pad = window // 2
    return float(found[:, pad:-pad, pad:-pad].mean())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In decibels, for a range of 2."""
    return float(10 * np.log10(4 / np.mean((a.astype(np.float64) - b) ** 2)))


def compare(setting: Setting, seed: int, progress: Progress) -> dict[str, dict[str, list[dict[str, float]]]]:
    """{sparsity: {method: numbers of every noise}} of one model."""
    module, variables, loss = trained(seed, setting.recipe, progress=progress)
    _, label, motion = videos(np.random.default_rng(1000 + seed), VIDEOS)

    def predictor(hook: Callable[..., Any]) -> Callable[..., Any]:
        def predict(x: Any, t: Any, states: Any) -> Any:
            return module.apply(variables, x, jnp.full(VIDEOS, t), label, motion, hook, states)

        return predict

    def runner(config: AdaSpaConfig, hook_of: Callable[[Action], Any]) -> Callable[[Any], Any]:
        heads = MODEL.blocks[0].heads

        def run(noise: Any) -> Any:
            zero = jnp.zeros((), jnp.float32)
            states = (Measured(init_state(VIDEOS, heads, TOKENS, config), zero, zero),) * len(MODEL.blocks)
            return sample(lambda a: predictor(measuring(hook_of(a), a, config)), noise, setting.sampler, states, config)

        return jax.jit(run)

    def dense_run(noise: Any) -> Any:
        config = AdaSpaConfig(0.0, setting.block, text_start=TOKENS - WORDS, text_len=WORDS, min_tokens=TOKENS + 1)
        return runner(config, lambda a: attention_of(Action.DENSE, config))(noise)[0]

    noises = [jax.random.normal(jax.random.fold_in(jax.random.key(77 + seed), i), (VIDEOS, 8, 12, 12, 1))
              for i in range(setting.noises)]  # fmt: skip
    whole = [np.asarray(dense_run(n)) for n in noises]
    out: dict[str, dict[str, list[dict[str, float]]]] = {}
    for sparsity in setting.sparsities:
        rows = out.setdefault(f"{sparsity:g}", {})
        for name, (config, hook_of) in methods(sparsity, setting, seed).items():
            task = progress.add_task(f"model {seed}, sparsity {sparsity:g}, {name}", total=len(noises))
            run = runner(config, hook_of)
            for noise, target in zip(noises, whole, strict=True):
                began = time.perf_counter()
                made, states = jax.block_until_ready(run(noise))
                made = np.asarray(made)
                rows.setdefault(name, []).append({
                    "psnr": psnr(made, target),
                    "ssim": float(np.mean([ssim(a[..., 0], b[..., 0]) for a, b in zip(made, target, strict=True)])),
                    "recall": float(np.mean([s.recall / s.steps for s in states])),
                    "seconds": time.perf_counter() - began,
                    "loss": loss,
                })  # fmt: skip
                progress.update(task, advance=1)
            progress.remove_task(task)
    return out


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over all models and noises."""
    return {
        s: {
            m: {
                k: record.mean_and_spread([run[k] for one in seeds for run in one[s][m]])
                for k in ("psnr", "ssim", "recall")
            }
            for m in seeds[0][s]
        }
        for s in seeds[0]
    }


def checks(results: dict[str, Any], seeds: list[dict[str, Any]]) -> dict[str, bool]:
    """What has to show at sparsity 0.8: for every model and noise in decibels, on means for recalls."""
    rows = [
        {m: runs[m][i]["psnr"] for m in runs}
        for one in seeds
        for runs in [one["0.8"]]
        for i in range(len(runs["exact"]))
    ]
    recall = {m: r["recall"]["mean"] for m, r in results["0.8"].items()}

    def each(a: str, b: str, least: float) -> bool:
        return all(r[a] - r[b] >= least for r in rows)

    return {
        "at least 3 dB above a window, in every run": each("adaspa", "window", 3.0),
        "at least 1.5 dB above the last queries' pattern, in every run": each("adaspa", "last queries", 1.5),
        "cached and exact log-sum-exp within 1 dB, in every run": all(
            abs(r["adaspa"] - r["adaspa, cached lse"]) <= 1 for r in rows),
        "searching in every step at most 0.3 dB worse, in every run": each("exact", "adaspa", -0.3),
        "recall: exact > adaspa > mean pool > last queries": recall["exact"] > recall["adaspa"] > recall["mean pool"]
        > recall["last queries"],
    }  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """Means and deviations as a table."""
    out = Table(title="distance to the dense sample, mean and deviation over models and noises")
    for column in ("sparsity", "method", "PSNR, dB", "SSIM", "attention mass kept"):
        out.add_column(column)
    for s, rows in results.items():
        for m, r in rows.items():
            out.add_row(
                s,
                m,
                *(f"{r[k]['mean']:.{d}f} ± {r[k]['std']:.{d}f}" for k, d in (("psnr", 1), ("ssim", 3), ("recall", 3))),
            )
    return out


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: decibels of every method. Right: decibels against attention mass."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    bars, cloud = figure.subplots(1, 2, width_ratios=(1, 1))
    first = next(iter(results))
    names = list(results[first])[::-1]
    tab10 = [f"C{i}" for i in range(10)]
    bars.barh(names, [results[first][m]["psnr"]["mean"] for m in names], 0.7,
              color=["#2a6f97" if m == "adaspa" else "#b8c4d0" for m in names],
              xerr=[results[first][m]["psnr"]["std"] for m in names], error_kw={"lw": 0.8})  # fmt: skip
    bars.set_xlabel("PSNR to the dense sample, dB")
    bars.set_title(f"sparsity {first}", fontsize=10)
    colors = dict(zip(results[first], tab10, strict=False))
    for s, marker in zip(results, "os^", strict=False):
        for m, r in results[s].items():
            cloud.plot(r["recall"]["mean"], r["psnr"]["mean"], marker, ms=6, color=colors[m], alpha=0.8)
        cloud.plot([], [], marker, color="#8d99a6", label=f"sparsity {s}")
    for m, color in colors.items():
        cloud.plot([], [], "_", ms=10, mew=3, color=color, label=m)
    cloud.set_xlabel("attention mass in the kept blocks")
    cloud.set_ylabel("PSNR to the dense sample, dB")
    cloud.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Table, verdict and figure."""
    Console(width=110 if not console.is_terminal else None).print(table(stored["results"]))
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored["results"], picture)
    console.print(f"drawn to {picture}")


# -- the paper's model -------------------------------------------------------------------------------------------------

CHIPS = {
    "H200": 989e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6e": 918e12,
}  # bfloat16, multiplies and adds a second


@dataclasses.dataclass(frozen=True)
class Hunyuan:
    """HunyuanVideo at 720p and 129 frames: 118,800 video tokens, 256 of text, 60 layers of 24 heads of 128."""

    tokens: int = 119056
    text: int = 256
    layers: int = 60
    heads: int = 24
    head: int = 128
    steps: int = 50
    efficiency: float = 0.8


def roofline(s: Hunyuan, config: AdaSpaConfig) -> dict[str, Any]:
    """Multiply-adds of attention over a whole sample, dense and by schedule, and lower bounds of seconds per chip.

    Bounds are arithmetic alone at `efficiency` of the peak: a head's keys and values fit the fast memory of all four
    chips, or their shared cache, and are read once. A dense pass is two products, a search in the same pass adds none, a
    later search is one.
    """
    at = spans(s.tokens, config)
    width = keep_counts(at.video, config.sparsity).base + at.sinks
    kept = (at.video * width + at.sinks * at.blocks) / at.blocks**2
    one = 2 * s.tokens**2 * s.head * s.heads * s.layers  # a product of all tokens with all, multiply and add apart
    cost = {Action.DENSE: 2.0, Action.FUSED: 2.0, Action.SPARSE: 2 * kept, Action.RESEARCH: 1 + 2 * kept}
    number = {a.value: sum(n - m for b, m, n in segments(s.steps, config) if b is a) for a in Action}
    products = sum(cost[a] * number[a.value] for a in Action)
    out: dict[str, Any] = {"kept": kept, "steps": number, "dense_flops": 2.0 * one * s.steps, "flops": one * products,
                           "speed_up_of_attention": 2.0 * s.steps / products, "chips": {}}  # fmt: skip
    for chip, peak in CHIPS.items():
        second = s.efficiency * peak
        out["chips"][chip] = {"dense_seconds": 2.0 * one * s.steps / second, "seconds": one * products / second}
    return out


def hunyuan(console: Console, out: Path) -> None:
    """Print and write the roofline."""
    shape = Hunyuan()
    found = {
        f"{s:g}": roofline(shape, AdaSpaConfig(s, text_start=shape.tokens - shape.text, text_len=shape.text))
        for s in (0.7, 0.8, 0.9)
    }
    view = Table(title="attention of one HunyuanVideo sample, lower bounds: nothing of this was run")
    for column in ("sparsity", "kept", "PFLOP", "speed-up", *CHIPS):
        view.add_column(column)
    for s, r in found.items():
        view.add_row(s, f"{r['kept']:.3f}", f"{r['flops'] / 1e15:.0f} of {r['dense_flops'] / 1e15:.0f}",
                     f"{r['speed_up_of_attention']:.2f}",
                     *(f"{c['seconds']:,.0f} of {c['dense_seconds']:,.0f} s" for c in r["chips"].values()))  # fmt: skip
    Console(width=130 if not console.is_terminal else None).print(view)
    record.write(out, {"command": "python -m experiments.adaspa --config hunyuan", "measured": False,
                       "shape": dataclasses.asdict(shape), "results": found})  # fmt: skip
    console.print(f"written to {out}")


def main(
    config: Literal["small", "hunyuan"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path | None = None,
    steps: Annotated[int | None, tyro.conf.arg(help="train the video model for so many steps only")] = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no sampling: figure and table from the results file")] = False,
) -> None:
    """AdaSpa against static and estimated patterns at equal sparsity."""
    console = Console()
    out = out or RESULTS / f"adaspa-{config}.json"
    if config == "hunyuan":
        hunyuan(console, out)
        return
    setting = Setting() if steps is None else Setting(Recipe(steps, warmup=min(100, steps // 4)))
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"adaspa-{config}.png"
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for seed in progress.track(seeds, description="models"):
            per_seed.append(compare(setting, seed, progress))
    results = summary(per_seed)
    stored = {
        **record.heading("adaspa", config, seeds, setting),
        "checks": checks(results, per_seed),
        "results": results,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
