"""LAPP and its baselines: accuracy of networks pruned while they are trained, at equal MACs.

    python -m experiments.lapp                       # digits, three seeds, about half an hour
    python -m experiments.lapp --config resnet20-cifar10 --data-dir DIR

Rows differ in how filters are chosen: by thresholds that are learned (lapp), by one threshold for all layers (uniform)
or a random one per layer (random), both cut where lapp is cut, in one step; or not at all: a narrower network with
every width scaled alike, and one with random widths, trained from scratch. All have the same epochs and schedule, and
all costs are counted on the final function, bypasses included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import paper_data
from experiments.figures import label, line, mean, panels, spread, table
from experiments.lapp_network import LappNetwork, Setting, Way
from experiments.study import Demand, Key, Study, at_least, at_most
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.models import resnet
from jprune.training import TrainConfig

COLORS = {"lapp": "#2a6f97", "uniform": "#c8553d", "random": "#e0a458", "narrow": "#5b8c5a", "random widths": "#9b72aa"}
MARKERS = {"none": "o", "pw": "s", "dw": "^", "lowrank": "D", "": "*"}


SMALL = (
    *(Way(how, LappConfig(target, bypass, schedule="constant")) for target, bypass, ways in (
        (0.25, "none", ("lapp", "uniform", "random")), (0.25, "pw", ("lapp", "uniform", "random")),
        (0.25, "dw", ("lapp", "uniform")), (0.25, "lowrank", ("lapp", "uniform")),
        (0.15, "none", ("lapp", "uniform", "random")), (0.4, "none", ("lapp", "uniform")), (0.4, "pw", ("lapp",)),
        (0.25, "none", ("narrow", "random widths"))) for how in ways),
    Way("lapp", LappConfig(0.25, "none", schedule="constant", task_to_threshold=False)), Way("dense"))  # fmt: skip


def paper(target: float, *more: str) -> tuple[Way, ...]:
    """Every bypass, and BatchNorm's scales as scores."""
    configs = [LappConfig(target, b) for b in ("pw", "none", "dw", "lowrank")] + [LappConfig(target, score="bn")]
    return (Way("dense"), *(Way("lapp", c) for c in configs), *(Way(how, LappConfig(target, "none")) for how in more))


SETTINGS: dict[str, Setting] = {
    "small": Setting(
        lambda w: resnet.small((1, 1, 1), widths=w or (4, 8, 16)), (4, 8, 16),
        paper_data.digits, TrainConfig(15, 64, 0.1, weight_decay=5e-4, eval_every_epochs=0),
        warmup=1, stop=5, compared=SMALL,
    ),
    "resnet20-cifar10": Setting(
        lambda w: resnet.cifar(20, shortcut="pad" if w is None else "projection", widths=w or (16, 32, 64)),
        (16, 32, 64), paper_data.cifar10, TrainConfig(200, 128, 0.1, weight_decay=5e-4),
        warmup=1, stop=10, compared=paper(0.403, "narrow"),
    ),
    "resnet18-imagenet": Setting(
        lambda w: resnet.imagenet(18), (), paper_data.imagenet, TrainConfig(100, 256, 0.1, weight_decay=1e-4),
        warmup=1, stop=5, compared=paper(0.444),
    ),
}  # fmt: skip


def rows(s: Setting) -> dict[Key, Callable[[LappNetwork], Any]]:
    """Every way, by its name."""
    return {(way.name,): functools.partial(LappNetwork.row, way=way) for way in s.compared}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over seeds, or of every seed where it is said."""
    of = {name: r["accuracy"]["mean"] for name, r in stored["results"].items()}
    seeds, ours = list(stored["seeds"].values()), of["lapp none 0.25"]
    learned = [name for name in of if name.startswith("lapp ") and "alone" not in name]
    return {
        "lapp without bypass is 2 points above uniform at 0.25": at_least(ours, of["uniform none 0.25"] + 0.02),
        "and 2 points above random": at_least(ours, of["random none 0.25"] + 0.02),
        "a 1x1 bypass does not hurt at 0.25": at_least(of["lapp pw 0.25"], ours),
        "every learned offset is at most 0.3": at_most(max(abs(s[n]["offset"]) for s in seeds for n in learned), 0.3),
        "layers keep different fractions, by 0.3 at least, in every seed":
            at_least(min(s["lapp none 0.25"]["spread"] for s in seeds), 0.3),
        "the constraint alone is not better by more than half a point":
            at_most(of["lapp none constraint alone 0.25"], ours + 0.005),
        "lapp is not below the narrower network trained from scratch": at_least(ours, of["narrow 0.25"]),
        "lapp is not below random widths trained from scratch": at_least(ours, of["random widths 0.25"]),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Means and deviations."""
    columns = ("network", "accuracy", "MACs", "parameters", "right after slicing", "offset", "spread")
    lines = [[name, spread(r["accuracy"]), mean(r["macs_fraction"], ".1%"), mean(r["params"], ".0f"),
              *(mean(r.get(k)) for k in ("sliced", "offset", "spread"))] for name, r in stored["results"].items()]  # fmt: skip
    return [table("test accuracy, mean and deviation over seeds", columns, lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Accuracy against MACs, and how many filters each layer kept."""
    results = dict(stored["results"])
    figure, (left, right) = panels(2, (11, 4.6))
    if "dense" in results:
        left.axhline(results.pop("dense")["accuracy"]["mean"], color="#444444", lw=0.8, label="dense")
    curves: dict[Any, list[Any]] = {}
    for name, r in sorted(results.items(), key=lambda item: item[1]["macs_fraction"]["mean"]):
        how = next(h for h in sorted(COLORS, key=len, reverse=True) if name.startswith(h))
        curves.setdefault((how, name.removeprefix(how).strip().rpartition(" ")[0]), []).append(r)
    for (how, rest), points in curves.items():
        line(left, [r["macs_fraction"] for r in points], [r["accuracy"] for r in points], color=COLORS[how],
             marker=MARKERS.get(rest, "x"), ms=5, lw=1.0, label=f"{how} {rest}".strip())  # fmt: skip
    label(left, "MACs kept, bypass included", "test accuracy", loc="lower right")
    shown = [name for name in results if name.startswith("lapp ")][:6]
    for k, name in enumerate(shown):
        kept = results[name]["kept"]
        at = np.arange(len(kept)) + (k - len(shown) / 2) * 0.13
        right.bar(at, [n["mean"] for n in kept.values()], 0.13, label=name)
        right.set_xticks(range(len(kept)), [n.removesuffix(".kernel") for n in kept], rotation=20, fontsize=7)
    label(right, "", "filters kept (mean over seeds)")
    return figure


STUDY = Study("lapp", __doc__, SETTINGS, LappNetwork, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
