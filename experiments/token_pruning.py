"""Token reducers on a vision transformer trained here: where digits lie, what is lost before and between its blocks.

    python -m experiments.token_pruning                       # three models, a thousand canvases each

Nothing is trained after tokens are dropped. What is asked for is that scores find the digit, that dropping by them before the
first block beats dropping by chance, and that Zero-TPrune's stages in the network lose little; which score is best is
reported and not asked for, since small models spread an image over all their tokens within two blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments.compared_reducers import SHARE, at_entry, by_stages, costs, in_network
from experiments.digit_canvas import sizes
from experiments.digit_reader import DigitReader, Setting
from experiments.figures import label, line, mean, panels, spread, table
from experiments.study import Demand, Key, Study, at_least, at_most
from jprune.methods.tokens.reducers_by_name import reducer_for
from jprune.models.token_hook import TokenReducer

# of `jprune.methods.tokens.reducers_by_name`, those that work between blocks
COLORS = {"zero_tprune": "#c1121f", "zero_tprune_uni": "#e07a5f", "tome": "#2a6f97", "ats": "#61a5c2", "evit": "#588157",
          "cls_topk": "#a3b18a", "column_mean": "#9d4edd", "random": "#8d99a6"}  # fmt: skip


def rows(s: Setting) -> dict[Key, Callable[[DigitReader], Any]]:
    """Everything of one model."""

    def read(reducer: TokenReducer, twice: bool = False) -> Callable[[DigitReader], float]:
        return lambda one: one.accuracy(reducer, twice)

    last = by_stages(s.schedules[-1], SHARE)
    return {
        ("full",): read(TokenReducer()),
        **{
            ("localisation", str(b)): functools.partial(DigitReader.localisation, block=b)
            for b in range(sizes().depth - 1)
        },
        **{("entry", str(k), name): read(*one) for k in s.kept for name, one in at_entry(k).items()},
        **{
            ("network", "-".join(map(str, c)), name): read(one)
            for c in s.schedules
            for name, one in in_network(c).items()
        },
        **{("curves", name, f"{f:g}"): read(reducer_for(name, f, sizes())) for name in s.methods for f in s.fractions},
        ("hidden against dropped",): lambda one: one.hidden(last),
        **{("searched", f"{f:g}"): functools.partial(DigitReader.searched, fraction=f) for f in s.searched},
    }


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over models; in points of accuracy, of 64 tokens 20 or 32 kept before the first block."""
    results = stored["results"]
    full = results["full"]["mean"]
    entry = {k: {n: r["mean"] for n, r in row.items()} for k, row in results["entry"].items()}
    mild, hard = ({n: r["mean"] for n, r in row.items()} for row in list(results["network"].values())[:2])
    at, diverse = entry["20"], entry["20"]["DivPrune"]
    votes, found = at["PageRank, 5 votes"], results["localisation"]["0"]["PageRank, 5 votes"]["mean"]
    return {
        "PageRank in the first block finds the digit: AUROC of at least 0.93": at_least(found, 0.93),
        "20 tokens by PageRank: at most 12 points below all": at_least(votes, full - 0.12),
        "20 tokens by PageRank: at least 35 points above chance": at_least(votes, at["random"] + 0.35),
        "20 tokens by PageRank: at least 25 points above the wrong transpose": at_least(votes, at["wrong transpose"] + 0.25),
        "24, 12, 8, 6 tokens: all stages are not below importance alone":
            at_least(hard["Zero-TPrune"], hard["importance, 5 votes"]),
        "44, 32, 24, 16 tokens: at most 2.5 points lost": at_least(mild["Zero-TPrune"], full - 0.025),
        "hidden and dropped tokens: logits within 1e-4": at_most(results["hidden against dropped"]["mean"], 1e-4),
        "20 tokens by DivPrune: at least 30 points above chance and above a grid":
            at_least(diverse, max(at["random"], at["grid"]) + 0.3),
        "20 tokens by DivPrune: at most 15 points below all": at_least(diverse, full - 0.15),
        "32 tokens by DivPrune: at most 7 points below all": at_least(entry["32"]["DivPrune"], full - 0.07),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Before the first block, in the network, where the digit is, and what a search finds."""
    r, percent = stored["results"], functools.partial(spread, form=".1f", scale=100)
    out: list[Any] = []
    for title, kind, shown in (
        (f"accuracy in per cent with so many of 64 tokens from the start (all: {percent(r['full'])})", "entry", percent),
        (f"accuracy in per cent with so many tokens after blocks 0 to 3 (all: {percent(r['full'])})", "network", percent),
        ("AUROC of scores for tokens that show the digit, after each block of the whole model", "localisation", mean),
    ):  # fmt: skip
        names = list(next(iter(r[kind].values())))
        out.append(table(title, ["", *r[kind]], [[n, *(shown(row[n]) for row in r[kind].values())] for n in names]))
    for f, found in r["searched"].items():
        ready = percent(r["curves"].get("zero_tprune", {}).get(f))
        out.append(f"at {f} of the MACs a searched schedule: {percent(found['held_out'])}; the ready-made one {ready}")
    return out


def draw(stored: Mapping[str, Any]) -> Any:
    """Accuracy against MACs in the network (left), against tokens kept before the first block (right)."""
    results, cost = stored["results"], stored["costs"]["curves"]
    figure, (left, right) = panels(2, (11, 4.4), sharey=True)
    for name, at in results["curves"].items():
        line(left, [cost[name][f]["fraction"] for f in at], list(at.values()), 100, color=COLORS[name], label=name)
    for i, name in enumerate(next(iter(results["entry"].values()))):
        points = [100 * row[name]["mean"] for row in results["entry"].values()]
        right.plot([int(k) for k in results["entry"]], points, "o-", ms=3.5, lw=1.2, color=f"C{i}", label=name)
    for axis in (left, right):
        axis.axhline(100 * results["full"]["mean"], color="k", lw=0.7, ls=":")
    label(left, "share of MACs in the blocks", "accuracy, per cent", loc="lower right")
    label(right, "of 64 tokens kept before the first block", "", loc="lower right")
    return figure


STUDY = Study(
    "token_pruning", __doc__, {"small": Setting()}, DigitReader, rows, demands, tables, draw, once={"costs": costs}
)

if __name__ == "__main__":
    STUDY.main()
