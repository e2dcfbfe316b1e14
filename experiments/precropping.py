"""PreCropping: widths from layer-wise densities against masks of the same densities, uniform and other widths.

    python -m experiments.precropping                       # digits, five seeds, half an hour
    python -m experiments.precropping --config mobilenet_v2-cifar10 --data-dir DIR

The small configuration is a plain chain (3x3 convolutions of widths 16, 16, pooling, 32, 32, pooling, 64, 64, BatchNorm,
mean over positions, a linear classifier) on 400 noisy digits; a fraction of its 71,568 convolution weights is kept. Every
row has the same number of weights, or as near below as whole channels allow, and the same training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.ticker import NullFormatter

from experiments import paper_data
from experiments.cropped_network import CroppedNetwork, Setting, step_times
from experiments.figures import bars, line, mean, panels, spread, table
from experiments.study import Demand, Key, Study, at_least, at_most
from jprune.data import load_digits
from jprune.methods.channels.precrop import precrop as pc
from jprune.models import build, vgg
from jprune.training import TrainConfig

SCORES = ("synflow", "synexp", "snip")
FULL = ("dense", *(f"{kind} {score}" for score in ("synflow", "snip") for kind in ("unstructured", "shuffled")),
        "reinitialised synflow", *(f"{score} {rule}" for score in SCORES for rule in ("sqrt", "lsq")),
        "first-channels synflow", "uniform_width", "random_width", "reverse")  # fmt: skip


def _chain() -> Any:
    """The plain chain; the classifier has no hidden layer, and the last block is averaged, not pooled."""
    widths = ((16, 16), (32, 32), (64, 64))
    return vgg.VGG(vgg.VGGConfig(widths, (), 10, bias=False, pools=(1, 2)))


_CIFAR = TrainConfig(160, 128, 0.1, schedule="step", milestones=(80, 120), weight_decay=5e-4)
_IMAGENET = TrainConfig(epochs=100, batch_size=256, learning_rate=0.1, schedule="cosine", weight_decay=1e-4,
                        warmup_epochs=5.0, recalibrate_examples=8192)  # fmt: skip
_SCALED = pc.WidthRule(stage_width="scale")

SETTINGS: dict[str, Setting] = {
    "small": Setting(
        _chain,
        lambda folder, seed: load_digits(seed, n_train=400, noise=0.5),
        TrainConfig(epochs=25, batch_size=32, learning_rate=0.1, weight_decay=5e-4, eval_every_epochs=0),
        keep=(0.02, 0.5, 0.2, 0.1, 0.05),
        rule=pc.WidthRule(count_bn=False),
        exempt=("params/head/kernel",),
    ),
    **{
        f"{name}-cifar10": Setting(lambda m=model: build(m, 10), paper_data.cifar10, _CIFAR, (0.1, 0.5, 0.2, 0.05), _SCALED)
        for name, model in (
            ("resnet20", "resnet20"), ("mobilenet_v2", "mobilenet_v2_small"), ("shufflenet_v2", "shufflenet_v2_small"))
    },
    **{
        f"{model}-imagenet": Setting(lambda m=model: build(m, 1000), paper_data.imagenet, _IMAGENET, (0.5,))
        for model in ("mobilenet_v2", "resnet50")
    },
}  # fmt: skip


def rows(s: Setting) -> dict[Key, Callable[[CroppedNetwork], Any]]:
    """Every row at the first budget, those of the curve at the others."""
    names = [(keep, name) for keep in s.keep for name in (FULL if keep == s.keep[0] else s.curve)]
    return {(f"{keep:g}", name): functools.partial(CroppedNetwork.row, keep=keep, name=name) for keep, name in names}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds, at the first budget."""
    row = {m: r["accuracy"]["mean"] for m, r in next(iter(stored["results"].values())).items()}
    ours = row["synflow sqrt"]
    return {
        **{f"shuffled within 1 point of unstructured ({name})": at_most(
            abs(row[f"shuffled {score}"] - row[f"unstructured {score}"]), 0.01)
           for score, name in (("synflow", "SynFlow"), ("snip", "SNIP"))},
        "PreCrop (SynFlow) at least 1 point above uniform width": at_least(ours, row["uniform_width"] + 0.01),
        "PreCrop (SynFlow) at least 3 points above reversed densities": at_least(ours, row["reverse"] + 0.03),
        **{f"sqrt at least as good as lsq ({m})": at_least(row[f"{m} sqrt"], row[f"{m} lsq"]) for m in SCORES},
        "PreCrop (SynFlow) within 3 points of its mask": at_least(ours, row["unstructured synflow"] - 0.03),
        "a step of the cropped network is faster than one of the masked":
            at_most(stored["step_ms"]["cropped"], stored["step_ms"]["masked"]),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Accuracies and costs, and the time of a step."""
    lines = [[f"{float(keep):.0%}", m, spread(r["accuracy"]), mean(r["weights"], ",.0f"), mean(r["macs"], ",.0f")]
             for keep, rows in stored["results"].items() for m, r in rows.items()]  # fmt: skip
    title = "test accuracy after training from scratch, mean and deviation over seeds"
    times = "a training step takes " + ", ".join(f"{t:.2f} ms {m}" for m, t in stored["step_ms"].items())
    return [table(title, ("kept", "row", "accuracy", "weights", "MACs"), lines), times]


def draw(stored: Mapping[str, Any]) -> Any:
    """Left: every row at the smallest budget. Right: accuracy against MACs over the budgets."""
    results = stored["results"]
    keep, rows = next(iter(results.items()))
    figure, (left, right) = panels(2, (11, 4.8), width_ratios=(1, 1.1))
    bars(left, rows, "accuracy", "test accuracy", ours=["synflow sqrt"])
    left.set_xlim(min(r["accuracy"]["mean"] - r["accuracy"]["std"] for r in rows.values()) - 0.02, 1.0)
    left.set_title(f"{float(keep):.0%} of the weights kept", fontsize=10)
    budgets = sorted(results, key=float)
    for m in [m for m in rows if len(budgets) > 1 and all(m in results[k] for k in budgets)]:
        at = [results[k][m] for k in budgets]
        line(right, [r["macs_if_skipped"] for r in at], [r["accuracy"] for r in at], capsize=2,
             label=m + (" (zeros skipped)" if m.startswith("unstructured") else ""))  # fmt: skip
        right.legend(fontsize=7, frameon=False)
    right.set_xscale("log")
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("MACs per image")
    right.set_ylabel("test accuracy")
    return figure


STUDY = Study("precropping", __doc__, SETTINGS, CroppedNetwork, rows, demands, tables, draw, once={"step_ms": step_times},
              seeds=(0, 1, 2, 3, 4))  # fmt: skip

if __name__ == "__main__":
    STUDY.main()
