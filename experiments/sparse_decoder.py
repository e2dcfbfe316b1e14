"""Single weights of a language model: iCBS against Wanda, SparseGPT and size, in perplexity on held-back text.

    python -m experiments.sparse_decoder --model DIR --text FILE
    python -m experiments.sparse_decoder --config smollm2_careful --rows Wanda iCBS --model DIR --text FILE     # smaller steps

DIR is a LLaMA-like folder as Hugging Face's programs write it, FILE a text file, or a folder of HTML pages. The first half of
the text is for calibration and for the batches of iCBS, windows of the second half are measured on; nothing is trained.
All matrices of all layers are pruned, embeddings and head stay. iCBS starts from Wanda's mask and solves a block of every
matrix with each gradient (the paper solves one of one matrix); its row has the perplexity after so many steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.figures import label, panels, spread, table
from experiments.pruned_weights import ONE_SHOT, Decoder, Setting
from experiments.study import Demand, Key, Study, at_most

SETTINGS = {
    "smollm2": Setting(),
    "smollm2_careful": Setting(sparsities=(0.7,), icbs=dataclasses.replace(Setting().icbs, gradient_weight=0.1)),
}


def rows(s: Setting) -> dict[Key, Callable[[Decoder], Any]]:
    """Every method at every sparsity; 2:4 without iCBS, whose moves would break the groups."""
    out: dict[Key, Callable[[Decoder], Any]] = {("dense",): Decoder.dense}
    for p in s.sparsities:
        for name in ONE_SHOT:
            out[f"{p:g}", name] = functools.partial(Decoder.row, name=name, sparsity=p)
        out[f"{p:g}", "iCBS"] = functools.partial(Decoder.icbs, sparsity=p)
    for name in ONE_SHOT:
        out["2:4", name] = functools.partial(Decoder.row, name=name, sparsity=None, pattern="2:4")
    return out


def flat(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{sparsity: {row: numbers}}, iCBS after so many steps each for itself."""
    out = {}
    for p, found in stored["results"].items():
        if p != "dense":
            out[p] = {name: r for name, r in found.items() if name != "iCBS"} | found.get("iCBS", {})
    return out


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds."""
    out = {}
    for p, found in flat(stored).items():
        ours = [r["perplexity"]["mean"] for name, r in found.items() if name.startswith("iCBS")]
        if ours:
            out[f"{p}: iCBS below Wanda at the same density"] = at_most(ours[-1], found["Wanda"]["perplexity"]["mean"])
            out[f"{p}: more steps, a better model"] = at_most(ours[-1], ours[0])
    return out


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Perplexity of every row."""
    dense = stored["results"]["dense"]["perplexity"]["mean"]
    lines = [[p, name, spread(r["perplexity"]), f"{r['density']['mean']:.4f}", f"{r['seconds']['mean']:.0f}"]
             for p, found in flat(stored).items() for name, r in found.items()]  # fmt: skip
    return [table(f"perplexity; dense {dense:.2f}", ("sparsity", "method", "perplexity", "density", "seconds"), lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Perplexity of iCBS over its steps, the other methods as lines."""
    found = {p: r for p, r in flat(stored).items() if any(n.startswith("iCBS") for n in r)}
    figure, axes = panels(len(found), (5.2 * len(found), 4))
    for ax, (p, results) in zip(np.atleast_1d(axes), found.items()):
        steps = {int(n.split()[1]): r["perplexity"]["mean"] for n, r in results.items() if n.startswith("iCBS")}
        start = results["Wanda"]["perplexity"]["mean"]
        ax.plot([0, *steps], [start, *steps.values()], "o-", color="#2a6f97", label="iCBS")
        for name, color in (("Wanda", "#b8c4d0"), ("SparseGPT", "#d1495b")):
            ax.axhline(results[name]["perplexity"]["mean"], color=color, label=name)
        label(ax, "steps", "perplexity", f"{p} of the weights removed")
    return figure


STUDY = Study("sparse_decoder", __doc__, SETTINGS, Decoder, rows, demands, tables, draw, seeds=(0,))

if __name__ == "__main__":
    STUDY.main()
