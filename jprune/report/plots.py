"""The figures of a pruning run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

DENSE, KEPT, GONE = "#b8c4d0", "#2a6f97", "#d1495b"


def widths(path: Path, names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """Channels of every group before and after."""
    n = len(names)
    figure = Figure(figsize=(max(6.0, 0.32 * n + 2), 4.2), layout="constrained")
    ax = figure.subplots()
    at = np.arange(n)
    ax.bar(at, before, 0.8, color=DENSE, label="before")
    ax.bar(at, after, 0.8, color=KEPT, label="after")
    ax.set_xticks(at, [_short(g) for g in names], rotation=70, ha="right", fontsize=7)
    ax.set_ylabel("units")
    ax.set_xlim(-0.6, n - 0.4)
    ax.set_title("Width of each dependency group")
    ax.legend(frameon=False)
    _save(figure, path)


def curve(
    path: Path, fractions: Sequence[float], accuracy: Sequence[float], marks: Mapping[str, tuple[float, float]]
) -> None:
    """Accuracy against the fraction of MACs kept, without fine-tuning; and single points."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(fractions, accuracy, "o-", color=KEPT, label="one-shot, no fine-tuning")
    for (label, (x, y)), marker in zip(marks.items(), "*sD^v", strict=False):
        ax.plot([x], [y], marker, markersize=11, color=GONE, label=label)
    ax.set_xlabel("MACs kept")
    ax.set_ylabel("test accuracy")
    ax.set_ylim(-0.02, 1.02)
    ax.grid(alpha=0.3)
    ax.set_title("Sparsity and accuracy")
    ax.legend(frameon=False, loc="lower right")
    _save(figure, path)


def thresholds(path: Path, by_layer: Mapping[str, Sequence[float]]) -> None:
    """The learned threshold of every layer after each epoch, in standard deviations of its scores."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for name, values in by_layer.items():
        ax.plot(np.arange(1, len(values) + 1), values, lw=1.2, label=_short(name))
    ax.set_xlabel("epoch")
    ax.set_ylabel("threshold")
    ax.set_title("Learned thresholds")
    ax.grid(alpha=0.3)
    if len(by_layer) <= 12:
        ax.legend(frameon=False, fontsize=7)
    _save(figure, path)


def histograms(path: Path, scores: Mapping[str, Any], keep: Mapping[str, Any], most: int = 12) -> None:
    """Importance of the kept and the removed units, of all groups together and of the largest groups."""
    scores = {g: np.asarray(s, np.float64).ravel() for g, s in scores.items()}
    keep = {g: np.asarray(k, bool).ravel() for g, k in keep.items() if g in scores}
    largest = sorted(keep, key=lambda g: -keep[g].size)[:most]
    panels: list[tuple[str, np.ndarray, np.ndarray]] = [
        ("all groups", np.concatenate([scores[g] for g in keep]), np.concatenate([keep[g] for g in keep]))
    ]
    panels += [(_short(g), scores[g], keep[g]) for g in largest]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns, 2.2 * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for ax, (title, s, k) in zip(axes, panels, strict=False):
        bins = np.linspace(s.min(), s.max() if s.max() > s.min() else s.min() + 1.0, 25)
        ax.hist([s[k], s[~k]], bins=list(bins), stacked=True, color=[KEPT, GONE], histtype="stepfilled")
        ax.set_title(title, fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle("Importance of kept (blue) and removed (red) units", fontsize=10)
    _save(figure, path)


def timeline(path: Path, phases: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Loss of every epoch and test accuracy over the whole run, one band a phase."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    start = 0
    for i, (name, epochs) in enumerate(phases):
        at = [start + k + 1 for k in range(len(epochs))]
        left.axvspan(start + 0.5, start + len(epochs) + 0.5, color="#000000", alpha=0.04 if i % 2 else 0.0)
        left.plot(at, [e["loss"] for e in epochs], ".-", color=DENSE, label="training loss" if i == 0 else None)
        tested = [(x, e["test_accuracy"]) for x, e in zip(at, epochs, strict=True) if "test_accuracy" in e]
        right.plot([x for x, _ in tested], [y for _, y in tested], "o-", ms=3, color=KEPT,
                   label="test accuracy" if i == 0 else None)  # fmt: skip
        left.annotate(name, (start + 0.6, 0.5), xycoords=("data", "axes fraction"), fontsize=8, va="center")
        start += len(epochs)
    left.set_xlabel("epoch")
    left.set_ylabel("training loss")
    right.set_ylabel("test accuracy")
    right.set_ylim(-0.02, 1.02)
    left.set_title("Timeline")
    _save(figure, path)


def _short(group: str) -> str:
    return group.removeprefix("params/").replace("/kernel", "").rsplit(":", 1)[0] + (
        "#" + group.split("#")[1] if "#" in group else ""
    )


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
