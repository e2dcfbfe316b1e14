"""MaskSparsity and its baselines: accuracy right after pruning and after the same fine-tuning.

    python -m experiments.masksparsity                       # digits, five seeds, half an hour
    python -m experiments.masksparsity --config resnet110-cifar10 --data-dir DIR

Every method prunes the same number of channels and gets the same three phases: the baseline W0, one more phase from W0
(with its penalty, or with none), and fine-tuning of the pruned network. The small configuration also shows the two
controls: a penalty too weak for the schedule must fail, a random mask must do as well as a chosen one. Random masks are
the chosen one shuffled inside every layer, and one drawn over the whole network, which leaves some narrow layers with
next to nothing; that one also at the strength `suggest_s` gives for this schedule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments import paper_data
from experiments.figures import OTHERS, OURS, panels, spread, table
from experiments.masked_network import MaskedNetwork, Setting
from experiments.study import Demand, Key, Study, at_least, at_most
from jprune.models import resnet
from jprune.training import TrainConfig

_DIGITS = TrainConfig(epochs=15, batch_size=64, learning_rate=0.05, weight_decay=5e-4, eval_every_epochs=0)
_CIFAR = TrainConfig(200, 128, 0.1, schedule="step", milestones=(100, 150), weight_decay=1e-4)
_IMAGENET = TrainConfig(100, 256, 0.1, schedule="step", milestones=(30, 60, 90), weight_decay=1e-4,
                        recalibrate_examples=8192)  # fmt: skip
_CIFAR_TUNED = dataclasses.replace(_CIFAR, epochs=40, learning_rate=0.01, milestones=(20, 30))

SETTINGS = {
    "small": Setting(
        lambda: resnet.small((2, 2, 2), widths=(16, 32, 64)), paper_data.digits,
        _DIGITS, _DIGITS, dataclasses.replace(_DIGITS, epochs=5, learning_rate=0.01),
        sparsities=(0.75, 0.5), strength=0.02, group_strength=5e-3, weak=5e-3,
    ),
    **{
        f"resnet{depth}-cifar10": Setting(
            functools.partial(resnet.cifar, depth), paper_data.cifar10, _CIFAR, _CIFAR, _CIFAR_TUNED,
            sparsities=(sparsity,), strength=5e-4, group_strength=5e-4, coupled=True,
        ) for depth, sparsity in ((56, 0.5), (110, 0.6))
    },
    "resnet50-imagenet": Setting(
        lambda: resnet.imagenet(50), paper_data.imagenet, _IMAGENET, _IMAGENET,
        dataclasses.replace(_IMAGENET, epochs=40, learning_rate=5e-4, milestones=(10, 20, 30)),
        sparsities=(0.5,), strength=5e-4, group_strength=5e-4,
    ),
}  # fmt: skip


def rows(s: Setting) -> dict[Key, Callable[[MaskedNetwork], Any]]:
    """Every method at every sparsity, and the controls at the first."""
    names = ("masksparsity", "masksparsity, by threshold", *MaskedNetwork.CHOSEN)
    keys = [(p, name) for p in s.sparsities for name in names]
    if s.weak is not None:
        keys += [(s.sparsities[0], f"control: {name}") for name in MaskedNetwork.CONTROLS]
    return {(f"{p:g}", name): functools.partial(MaskedNetwork.row, sparsity=p, name=name) for p, name in keys}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds at the first sparsity."""
    rows = next(iter(stored["results"].values()))
    mean = {m: {k: v["mean"] for k, v in r.items()} for m, r in rows.items()}
    ours, slim = mean["masksparsity"], mean["slimming"]

    def lost(m: str) -> float:
        return mean[m]["before"] - mean[m]["pruned"]

    return {
        "masksparsity loses at most 2 points by pruning": at_most(lost("masksparsity"), 0.02),
        "masksparsity is 20 points above slimming right after pruning": at_least(ours["pruned"], slim["pruned"] + 0.2),
        "its kept scales are 10 times those of slimming": at_least(ours["mean_kept_gamma"], 10 * slim["mean_kept_gamma"]),
        "a penalty too weak loses 2 points at least": at_least(lost("control: penalty too weak"), 0.02),
        "a random mask, pruned by threshold, loses at most 2 points":
            at_most(lost("control: random mask, by threshold"), 0.02),
        "a random mask, pruned by mask, loses at most 2 points": at_most(lost("control: random mask"), 0.02),
        "so does one drawn over the whole network": at_most(lost("control: network-wide random mask"), 0.02),
        "and at the suggested strength": at_most(lost("control: network-wide random mask, suggested s"), 0.02),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Accuracies, costs and scales."""
    columns = ("pruned", "method", "before", "right after", "fine-tuned", "MACs", "kept |gamma|", "max gone |gamma|")
    lines = [
        [f"{float(p):.0%}", m, *(spread(r[k]) for k in ("before", "pruned", "finetuned")), f"{r['macs_fraction']['mean']:.1%}",
         f"{r['mean_kept_gamma']['mean']:.3g}", f"{r['max_pruned_gamma']['mean']:.1e}"]
        for p, rows in stored["results"].items() for m, r in rows.items()
    ]  # fmt: skip
    return [table("accuracy, mean and deviation over seeds", columns, lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Accuracy right after pruning and after fine-tuning, a panel per sparsity."""
    figure, axes = panels(len(stored["results"]), (10, 5.2), sharex=True)
    for ax, (p, rows) in zip(axes, stored["results"].items(), strict=True):
        names = list(rows)[::-1]
        for key, label, color, shift in (("pruned", "right after pruning", OURS, 0.2),
                                         ("finetuned", "after fine-tuning", OTHERS, -0.2)):  # fmt: skip
            ax.barh([i + shift for i in range(len(names))], [rows[m][key]["mean"] for m in names], 0.38, color=color,
                    label=label, xerr=[rows[m][key]["std"] for m in names], error_kw={"lw": 0.8})  # fmt: skip
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.set_xlim(0, 1.05)
        ax.set_xlabel("test accuracy")
        ax.set_title(f"{float(p):.0%} of the listed channels pruned", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


STUDY = Study("masksparsity", __doc__, SETTINGS, MaskedNetwork, rows, demands, tables, draw, seeds=(0, 1, 2, 3, 4))

if __name__ == "__main__":
    STUDY.main()
