"""The table and the panels that experiments' reports are made of; their numbers are {"mean", "std"} over seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from rich.table import Table

OURS, OTHERS = "#2a6f97", "#b8c4d0"


def spread(r: Mapping[str, float] | None, form: str = ".3f", scale: float = 1.0) -> str:
    """Mean ± deviation; nothing for a number that is not there."""
    return "" if r is None else f"{scale * r['mean']:{form}} ± {scale * r['std']:{form}}"


def mean(r: Mapping[str, float] | None, form: str = ".3f") -> str:
    """The mean alone; nothing for a number that is not there."""
    return "" if r is None else f"{r['mean']:{form}}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of text under a title."""
    out = Table(*columns, title=title)
    for row in rows:
        out.add_row(*row)
    return out


def panels(n: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of n panels side by side, and the panels."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False, **options)[0]


def bars(
    ax: Any,
    rows: Mapping[str, Mapping[str, Any]],
    number: str,
    label: str,
    ours: Collection[str] = (),
    fontsize: int = 7,
) -> None:
    """One horizontal bar a row, the first one on top; `ours` are blue."""
    names = list(rows)[::-1]
    ax.barh(names, [rows[n][number]["mean"] for n in names], 0.7, color=[OURS if n in ours else OTHERS for n in names],
            xerr=[rows[n][number]["std"] for n in names], error_kw={"lw": 0.8})  # fmt: skip
    ax.tick_params(axis="y", labelsize=fontsize)
    ax.set_xlabel(label)


def line(ax: Any, x: Sequence[Any], points: Sequence[Mapping[str, float]], scale: float = 1.0, **style: Any) -> None:
    """Means with bars for the deviation, over numbers or over {"mean", "std"}."""
    at = [p["mean"] if isinstance(p, Mapping) else p for p in x]
    style = {"marker": "o", "ms": 3.5, "lw": 1.2, "elinewidth": 0.6} | style
    ax.errorbar(at, [scale * p["mean"] for p in points], [scale * p["std"] for p in points], **style)


def label(ax: Any, x: str, y: str, title: str = "", **legend: Any) -> None:
    """What the axes say, and a legend if anything has a name."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**{"fontsize": 7, "frameon": False} | legend)


def logarithmic(axis: Any) -> None:
    """Powers of ten, twice and five times them, as plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())
