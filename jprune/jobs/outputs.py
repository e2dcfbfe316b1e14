"""What every run leaves beside its model: metrics.jsonl, figures, report.html, summary.json, written in one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jprune.files.atomic import write_json
from jprune.graph import Graph
from jprune.report import page
from jprune.training.run_folder import RunFolder

Figure = tuple[str, str, Callable[[Path], None]]  # caption, file name without ending, draw(path)


def write_report(
    run: RunFolder,
    title: str,
    rows: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
    figures: Sequence[Figure],
    notes: Sequence[str],
    layers: Sequence[Sequence[str]],
    summary: Mapping[str, Any],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Write the files; returns the summary, to which the run's warnings, seconds and device are added.

    Args:
      run: whose warnings and seconds are told.
      title: of the report.
      rows, layers: tables, each with its header first.
      settings: {name: value}.
      figures: drawn here.
      notes: paragraphs, before the warnings.
      summary: entries of summary.json.
      folder: where to, in place of the run's folder.
    """
    folder = folder or run.out
    assert folder is not None
    if run.trained:
        run.join_metrics()
    drawn = []
    for caption, name, draw in figures:
        drawn.append((caption, folder / f"{name}.png"))
        draw(drawn[-1][1])
    whole = {
        **summary,
        "warnings": run.warnings,
        "seconds": {k: round(v, 1) for k, v in run.seconds.items()},
        "device": jax.devices()[0].device_kind,
    }
    page.write(folder / "report.html", title, rows, settings, drawn, [*notes, *run.warnings], layers)
    write_json(folder / "summary.json", whole)
    return whole


def layer_table(before: Graph, after: Graph) -> list[tuple[str, str, str, str]]:
    """MACs of one example by layer; a layer only one side has leaves the other's cell empty."""
    left: dict[str, list[int]] = {}
    for c in after.layer_costs():
        left.setdefault(c.name, []).append(c.macs // 2)
    out = [("layer", "MACs before", "MACs after", "kept")]
    for c in before.layer_costs():
        n = c.macs // 2
        now = left[c.name].pop(0) if left.get(c.name) else None
        out.append((c.name, f"{n:,}", "" if now is None else f"{now:,}", "" if now is None else f"{now / n:.0%}"))
    return out + [(name, "", f"{n:,}", "") for name, rest in left.items() for n in rest]
