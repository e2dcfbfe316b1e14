"""Single weights of a small network on digits: iCBS against one-shot methods, with and without refitting what stays.

    python -m experiments.sparse_digits

scikit-learn's digits, 1347 to train on and 450 held back; a network 64-128-64-10, whose two hidden kernels are pruned to
densities of 0.1 and 0.05. iCBS with blocks of 256 weights, 200 images a step; nothing is trained after pruning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.figures import bars, label, panels, spread, table
from experiments.sparse_network import ONE_SHOT, SEARCHED, SECOND, Network, Setting, perceptron
from experiments.study import Demand, Key, Study, at_least, at_most


def rows(s: Setting) -> dict[Key, Callable[[Network], Any]]:
    """Every method at every density."""
    out: dict[Key, Callable[[Network], Any]] = {("dense",): lambda one: one.numbers(one.variables)}
    for d in s.densities:
        for name in (*ONE_SHOT, *SECOND, *(n for n in SEARCHED if not n.endswith("of all"))):
            out[f"{d:g}", name] = functools.partial(Network.row, name=name, density=d)
        for name in ("magnitude", "iCBS, 120 steps"):
            out[f"{d:g}", f"{name}, refitted"] = functools.partial(Network.row, name=name, density=d, refitted=True)
    return out


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """Per seed where they say so, else on means."""
    out = {}
    for d, gain in (("0.1", 10.0), ("0.05", 25.0)):
        r = stored["results"][d]
        acc, ours, start = {n: x["accuracy"]["mean"] for n, x in r.items()}, "iCBS, 40 steps", "magnitude"
        pairs = [(seed[d][ours], seed[d][start]) for seed in stored["seeds"].values()]
        least = min(a["accuracy"] - b["accuracy"] for a, b in pairs)
        out[f"{d}: at least {gain:g} points above its start, every seed"] = at_least(least, gain)
        most = max(a["training_loss"] / b["training_loss"] for a, b in pairs)
        out[f"{d}: at most 0.7 of its start's training loss, every seed"] = at_most(most, 0.7)
        for name in ("Wanda", "SparseGPT", "WoodFisher", "CBS-S", "CBS-S and CBS-U", "CHITA"):
            out[f"{d}: above {name}"] = at_least(acc[ours], acc[name])
        out[f"{d}: without a gradient nothing moves"] = at_most(abs(acc["iCBS, no gradient"] - acc[start]), 0.0)
        margin = 4.0 if d == "0.05" else 0.0
        out[f"{d}: refitted, {margin:g} points above magnitude refitted"] = at_least(
            acc["iCBS, 120 steps, refitted"] - acc["magnitude, refitted"], margin)  # fmt: skip
    r = stored["results"]["0.05"]
    gap = r["iCBS, 40 steps"]["accuracy"]["mean"] - r["iCBS, published form"]["accuracy"]["mean"]
    return out | {"0.05: not below the published form": at_least(gap, 0.0)}


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Accuracy and loss on the images held back."""
    found = {d: r for d, r in stored["results"].items() if d != "dense"}
    lines = [
        [n, *(spread(found[d][n][k]) for d in found for k in ("accuracy", "loss"))] for n in next(iter(found.values()))
    ]
    heads = [f"{what}, {d}" for d in found for what in ("accuracy", "loss")]
    return [table("held-back images; mean and deviation over seeds", ("method", *heads), lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Accuracy of every method, a panel per density."""
    found = {d: r for d, r in stored["results"].items() if d != "dense"}
    figure, axes = panels(len(found), (12, 4.6))
    for ax, (d, r) in zip(np.atleast_1d(axes), found.items()):
        bars(ax, r, "accuracy", "", ours=[n for n in r if n.startswith("iCBS")])
        label(ax, "accuracy on the held-back images (blue: iCBS), %", "", f"{d} of the weights stay")
    return figure


STUDY = Study("sparse_digits", __doc__, {"small": Setting()}, perceptron, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
