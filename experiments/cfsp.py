"""CFSP against other scores, other budgets over layers and other methods, on a small decoder or on yours.

    python -m experiments.cfsp                                     # the standard library's model, three seeds
    python -m experiments.cfsp --config paper --model DIR --text FILE --eval-text FILE

The small configuration prunes the FFN channels of a LLaMA of 1.95 million parameters that was trained on the source of
Python's standard library (experiments.stdlib_lm), byte by byte. A row's number is its excess: perplexity over that of the
unpruned model, minus one. Every row removes the same number of parameters; rows are evaluated as masks, so that one
compiled program serves all. Some are then tuned with low-rank adapters, all on the same text for the same steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments.figures import bars, label, logarithmic, panels, spread, table
from experiments.pruned_decoder import PrunedDecoder, Setting
from experiments.study import Demand, Key, Study, at_most
from jprune.methods.channels.decoder_channels import FINE
from jprune.training import TuningConfig

OTHERS = ("wanda global", "wanda in turn", "flap channels", "flap heads", "flap with biases", "taylor channels",
          "taylor heads")  # fmt: skip
RANKED = "official coarse, ranks by importance"
TUNED = (
    "random uniform",
    "magnitude uniform",
    "wanda uniform",
    "flap with biases",
    "taylor heads",
    "official coarse",
    RANKED,
)
CURVES = ("random uniform", "random coarse", "magnitude uniform", "flap heads", "flap channels", "wanda uniform",
          "official uniform", "official coarse")  # fmt: skip


SETTINGS = {
    "small": Setting(tuning=TuningConfig(steps=30, learning_rate=1e-3, schedule="cosine", warmup=0.03)),
    "paper": Setting(multiple_of=128, slopes=(), batch=1, source="folder"),
}


def rows(s: Setting) -> dict[Key, Callable[[PrunedDecoder], Any]]:
    """The same at every sparsity; the dense model is tuned too, where anything is."""
    names = [f"{fine} {coarse}" for fine in FINE for coarse in ("uniform", "coarse")]
    names += [*OTHERS, *(f"official coarse, a = {a:g}" for a in s.slopes)]
    names += ["official coarse, multiple_of = 32"] if s.multiple_of is None else []
    names += [RANKED] if s.tuning else []
    out: dict[Key, Callable[[PrunedDecoder], Any]] = {("model",): PrunedDecoder.about}
    for p in s.sparsities:
        if s.tuning:
            out[f"{p:g}", "dense"] = lambda one: one.dense_row
        for name in names:
            tune = s.tuning is not None and name in TUNED
            out[f"{p:g}", name] = functools.partial(PrunedDecoder.row, row=name, p=p, tune=tune)
    return out


def pruned(stored: Mapping[str, Any]) -> dict[str, Any]:
    """{sparsity: {row: numbers}}."""
    return {p: found for p, found in stored["results"].items() if p != "model"}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds."""
    half, fifth = ({row: r["excess"]["mean"] for row, r in pruned(stored)[p].items()} for p in ("0.5", "0.2"))
    ours = half["official coarse"]
    return {
        "0.5: at most 0.85 of the same score with uniform counts": at_most(ours, 0.85 * half["official uniform"]),
        "0.5: at most 0.90 of Wanda-sp with uniform counts": at_most(ours, 0.90 * half["wanda uniform"]),
        "0.5: at most 0.90 of Wanda-sp with one threshold": at_most(ours, 0.90 * half["wanda global"]),
        "0.5: at most a quarter of magnitude": at_most(ours, 0.25 * half["magnitude uniform"]),
        "0.5: at most a quarter of random channels": at_most(ours, 0.25 * half["random uniform"]),
        "0.2: an excess of at most 0.015": at_most(fifth["official coarse"], 0.015),
        "0.5: the budget over layers halves the excess of random channels":
            at_most(half["random coarse"], 0.5 * half["random uniform"]),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Excess of every row, and after tuning."""
    results = pruned(stored)
    lines = [[row, *(spread(results[p][row].get(k)) for k in ("excess", "recovered") for p in results)]
             for row in next(iter(results.values()))]  # fmt: skip
    title = "perplexity over the unpruned model's, minus 1; mean and deviation over seeds"
    return [table(title, ("row", *(f"p = {p}" for p in results), *(f"tuned, {p}" for p in results)), lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Left: every row at the largest sparsity, with a dot after tuning. Right: excess over sparsity."""
    results = pruned(stored)
    figure, (left, right) = panels(2, (11, 5.2), width_ratios=(1.1, 1))
    ps = sorted(results, key=float)
    shown = {row: r for row, r in results[ps[-1]].items() if row not in ("dense", RANKED)}
    shown = dict(sorted(shown.items(), key=lambda item: item[1]["excess"]["mean"]))
    bars(left, shown, "excess", "", ours=[row for row in shown if "coarse" in row])
    tuned = {row: r["recovered"]["mean"] for row, r in shown.items() if "recovered" in r}
    left.plot(list(tuned.values()), list(tuned), "o", color="#c0504d", ms=4, label="after tuning" if tuned else None)
    logarithmic(left.xaxis)
    title = f"{float(ps[-1]):.0%} of the FFN channels removed"
    label(left, "excess perplexity (blue: budget by importance of layers)", "", title)
    for row in CURVES:
        right.plot([float(p) for p in ps], [results[p][row]["excess"]["mean"] for p in ps],
                   "--" if "coarse" in row else "-", marker="o", ms=3, lw=1.2, label=row)  # fmt: skip
    right.set_yscale("log")
    label(right, "fraction of FFN channels removed", "excess perplexity")
    return figure


STUDY = Study("cfsp", __doc__, SETTINGS, PrunedDecoder, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
