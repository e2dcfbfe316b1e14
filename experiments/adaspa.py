"""AdaSpa on a small video model trained here, against static and estimated patterns at equal sparsity.

    python -m experiments.adaspa                       # moving digits, three models with three noises each

Every method makes the same videos from the same noise: dense for ten steps, then attention over the text and 7 of 36 video
blocks per row. What is reported is how near it comes to the dense sample, and how much attention mass its blocks hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.figures import bars, label, panels, spread, table
from experiments.moving_digits import TOKENS, WORDS
from experiments.study import Demand, Key, Study, at_least, at_most
from experiments.video_samples import Setting, VideoModel
from jprune.methods.attention import patterns
from jprune.methods.attention.adaspa import attention_of
from jprune.methods.attention.adaspa_select import AdaSpaConfig

OURS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "exact": lambda s: {"search_steps": tuple(range(9, s.sampler.steps))},
    "adaspa": lambda s: {},
    "adaspa, cached lse": lambda s: {"research": "cached"},
    "adaspa, heads": lambda s: {"head_adaptive": "paper"},
    "adaspa, heads guarded": lambda s: {"head_adaptive": "guarded"},
    "adaspa, searched once": lambda s: {"search_steps": (9,)},
}
PATTERNS: dict[str, Callable[[int], patterns.Ranking]] = {
    "mean pool": lambda seed: patterns.mean_pool,
    "window": lambda seed: patterns.window,
    "last queries": lambda seed: patterns.last_queries(64),
    "random": lambda seed: patterns.chance(jax.random.key(seed)),
}


def rows(s: Setting) -> dict[Key, Callable[[VideoModel], Any]]:
    """Every method at every sparsity."""

    def config(sparsity: float, **more: Any) -> AdaSpaConfig:
        tokens = {"text_start": TOKENS - WORDS, "text_len": WORDS, "min_tokens": 0, "head_adaptive": "off"}
        return AdaSpaConfig(sparsity, s.block, **{**tokens, **more})

    def ours(c: AdaSpaConfig) -> Callable[[VideoModel], Any]:
        return lambda one: one.row(c, lambda action: attention_of(action, c))

    def pattern(c: AdaSpaConfig, ranking: Callable[[int], patterns.Ranking]) -> Callable[[VideoModel], Any]:
        return lambda one: one.row(c, lambda action: patterns.attention_of(ranking(one.seed), action, c))

    out: dict[Key, Callable[[VideoModel], Any]] = {}
    for p in s.sparsities:
        out |= {(f"{p:g}", name): ours(config(p, **options(s))) for name, options in OURS.items()}
        out |= {(f"{p:g}", name): pattern(config(p), ranking) for name, ranking in PATTERNS.items()}
    return out


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """At the first sparsity: for every model and noise in decibels, on means for recalls."""
    first = next(iter(stored["results"]))
    runs = [{m: x["psnr"] for m, x in zip(one[first], at, strict=True)}
            for one in stored["seeds"].values() for at in zip(*one[first].values(), strict=True)]  # fmt: skip
    recall = {m: r["recall"]["mean"] for m, r in stored["results"][first].items()}
    order = ("exact", "adaspa", "mean pool", "last queries")
    return {
        "at least 3 dB above a window, in every run": at_least(min(r["adaspa"] - r["window"] for r in runs), 3),
        "at least 1.5 dB above the last queries' pattern, in every run":
            at_least(min(r["adaspa"] - r["last queries"] for r in runs), 1.5),
        "cached and exact log-sum-exp within 1 dB, in every run":
            at_most(max(abs(r["adaspa"] - r["adaspa, cached lse"]) for r in runs), 1),
        "searching in every step at most 0.3 dB worse, in every run":
            at_least(min(r["exact"] - r["adaspa"] for r in runs), -0.3),
        "recall: exact > adaspa > mean pool > last queries":
            at_least(min(recall[a] - recall[b] for a, b in itertools.pairwise(order)), 0),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Means and deviations over models and noises."""
    lines = [[p, m, spread(r["psnr"], ".1f"), spread(r["ssim"]), spread(r["recall"])]
             for p, rows in stored["results"].items() for m, r in rows.items()]  # fmt: skip
    title = "distance to the dense sample, mean and deviation over models and noises"
    return [table(title, ("sparsity", "method", "PSNR, dB", "SSIM", "attention mass kept"), lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Left: decibels of every method. Right: decibels against attention mass."""
    results = stored["results"]
    first = next(iter(results))
    figure, (left, right) = panels(2, (11, 4.4))
    bars(left, results[first], "psnr", "PSNR to the dense sample, dB", ours=["adaspa"], fontsize=9)
    left.set_title(f"sparsity {first}", fontsize=10)
    for p, marker in zip(results, "os^", strict=False):
        for i, r in enumerate(results[p].values()):
            right.plot(r["recall"]["mean"], r["psnr"]["mean"], marker, ms=6, color=f"C{i}", alpha=0.8)
        right.plot([], [], marker, color="#8d99a6", label=f"sparsity {p}")
    for i, m in enumerate(results[first]):
        right.plot([], [], "_", ms=10, mew=3, color=f"C{i}", label=m)
    label(right, "attention mass in the kept blocks", "PSNR to the dense sample, dB")
    return figure


STUDY = Study("adaspa", __doc__, {"small": Setting()}, VideoModel, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
