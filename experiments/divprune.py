"""DivPrune's choice on real vectors: how far apart the kept tokens are, what they cover, and what can still be read from them.

    python -m experiments.divprune                     # a minute on a CPU

576 of scikit-learn's digits are an image's tokens (64 numbers each), the other 1221 are asked about. Nothing is trained: a
question is answered by the label of the nearest kept token, and by attention over the kept tokens (a softmax over cosines, with
labels as values), which is what a layer that reads the tokens does. Chance is the mean of twenty draws.

The time of the choice itself is measured for 576 and 2880 tokens: the loop behind the matrix of distances has to grow with k m.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import digit_tokens
from experiments.figures import line, panels, spread, table
from experiments.study import Demand, Key, Run, Study, at_least, at_most
from jprune.methods.tokens import visual_selectors as selectors
from jprune.methods.tokens.divprune import divprune_select
from jprune.models.token_hook import Aux

COLOURS = {"divprune": "#2a6f97", "random": "#8d99a6", "norm_topk": "#e07a5f", "uniform_grid": "#81b29a"}
MEASURES = {"min_distance": "smallest distance", "cover_radius": "cover radius", "nearest": "nearest label",
            "attention": "attention's answers"}  # fmt: skip


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


class Choices:
    """Every choice among the tokens of one draw."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.seed, self.digits = s, run.seed, digit_tokens.draw(s.tokens, run.seed)
        self.order = divprune_select(self.digits.tokens, max(s.counts)).order  # smaller choices are its prefixes

    def numbers(self, index: Any) -> dict[str, float]:
        """Of one selection."""
        return digit_tokens.measured(self.digits, index, self.s.sharpness)

    def row(self, method: str, k: int) -> dict[str, float]:
        """Of k tokens; chance is the mean of many draws, with the best of their smallest distances beside."""
        x = self.digits.tokens
        if method != "random":
            return self.numbers(self.order[:k] if method == "divprune" else getattr(selectors, method)(x, Aux(), k))
        keys = jax.random.split(jax.random.key(self.seed), self.s.draws)
        draws = [self.numbers(selectors.random(x, Aux(key=key), k)) for key in keys]
        means = {name: statistics.fmean(d[name] for d in draws) for name in MEASURES}
        return means | {"best_min_distance": max(d["min_distance"] for d in draws)}


def rows(s: Setting) -> dict[Key, Callable[[Choices], Any]]:
    """Everything at every count."""
    chosen = {(str(k), m): functools.partial(Choices.row, method=m, k=k) for k in s.counts for m in COLOURS}
    return {("all",): lambda one: one.numbers(jnp.arange(one.s.tokens)), **chosen}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """Of every draw where it is said, else on means."""
    every = [seed[k] for seed in stored["seeds"].values() for k in ("32", "56", "144")]
    last = {m: {n: v["mean"] for n, v in row.items()} for m, row in stored["results"]["144"].items()}

    def worst(measure: str, of: str, choose: Callable[..., float]) -> float:
        return choose(r["divprune"][measure] / r["random"][of] for r in every)

    return {
        "smallest distance at least 3 times chance's mean, in every draw":
            at_least(worst("min_distance", "min_distance", min), 3),
        "and twice the best of twenty of chance's": at_least(worst("min_distance", "best_min_distance", min), 2),
        "cover radius at most 0.9 of chance's, in every draw":
            at_most(worst("cover_radius", "cover_radius", max), 0.9),
        **{f"{what} at 144 tokens above chance's, on the mean": at_least(last["divprune"][n], last["random"][n])
           for n, what in (("nearest", "nearest label"), ("attention", "attention"))},
        "the loop grows with k m: less than 40 times for 25 times": at_most(stored["cost"]["ratio"], 40),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Means over draws, and the time of the choice."""
    r, cost = dict(stored["results"]), stored["cost"]
    whole = {n: spread(v) for n, v in r.pop("all").items()}
    lines = [[k, m, *(spread(x[n]) for n in MEASURES)] for k, row in r.items() for m, x in row.items()]
    title = f"digits as tokens; with all of them: nearest {whole['nearest']}, attention {whole['attention']}"
    ms = ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in cost["seconds"].items())
    grown = f"{ms}: the loop takes {cost['ratio']:.1f} times as long for {cost['ratio_of_k_m']:.1f} times k m"
    return [table(title, ["kept", "method", *MEASURES.values()], lines), grown]


def draw(stored: Mapping[str, Any]) -> Any:
    """The smallest distance, the cover radius, what attention reads."""
    results = dict(stored["results"])
    whole = results.pop("all")
    figure, axes = panels(3, (11, 3.6))
    for ax, name in zip(axes, ("min_distance", "cover_radius", "attention"), strict=True):
        for m, colour in COLOURS.items():
            line(ax, [int(k) for k in results], [row[m][name] for row in results.values()], color=colour,
                 lw=2 if m == "divprune" else 1.2, label=m.replace("_", " "))  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks([int(k) for k in results], list(results))
        ax.minorticks_off()
        ax.set_xlabel(f"kept of {stored['setting']['tokens']} tokens")
        ax.set_title(MEASURES[name], fontsize=10)
    axes[2].axhline(whole["attention"]["mean"], color="black", lw=0.8, ls=":", label="all tokens")
    axes[2].legend(frameon=False, fontsize=8)
    return figure


STUDY = Study(
    "divprune",
    __doc__,
    {"digits": Setting()},
    Choices,
    rows,
    demands,
    tables,
    draw,
    once={"cost": lambda s: digit_tokens.timed(s.sizes, s.rounds)},
)

if __name__ == "__main__":
    STUDY.main()
