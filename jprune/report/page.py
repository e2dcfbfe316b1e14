"""report.html: one self-contained page with the numbers, the settings and the figures of a run."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jprune.files.atomic import replacing

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;border-bottom:1px solid #dde3e8;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:.5rem 0}code{background:#f2f5f7;padding:0 .3rem}
.good{color:#1b7f4d}.small{color:#5b6b79;font-size:.85rem}
"""


def write(path: Path, title: str, rows: Sequence[Sequence[str]], settings: Mapping[str, Any],
          figures: Sequence[tuple[str, Path]], notes: Sequence[str], layers: Sequence[Sequence[str]]) -> None:  # fmt: skip
    """Write the page, whole or not at all.

    Args:
      path: of the page.
      title: heading.
      rows: the table before/after; its first row is the header.
      settings: name -> value.
      figures: (caption, PNG file), embedded.
      notes: paragraphs.
      layers: the table of layers; its first row is the header.
    """
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{_e(title)}</title><style>{_STYLE}</style><h1>{_e(title)}</h1>"
    ]
    parts += [f"<p>{_e(n)}</p>" for n in notes]
    parts.append(_table(rows))
    for caption, png in figures:
        data = base64.b64encode(png.read_bytes()).decode()
        parts.append(f'<h2>{_e(caption)}</h2><img alt="{_e(caption)}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Layers</h2>", _table(layers), "<h2>Settings</h2>"]
    parts.append(_table([("setting", "value"), *((k, str(v)) for k, v in settings.items())]))
    with replacing(path) as unfinished:
        unfinished.write_text("\n".join(parts))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{_e(c)}</th>" for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_e(c)}</td>" for c in row) + "</tr>" for row in body]
    return "<table>" + "".join(lines) + "</table>"


def _e(text: Any) -> str:
    return html.escape(str(text))
