"""Pictures with the patches that are left, stage by stage, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

from jprune.files.atomic import replacing
from jprune.report.kept_patches import draw_kept


class Shown(NamedTuple):
    """One picture.

    Attributes:
      pixels: (height, width, 3) as the model sees it.
      grid: rows and columns of patches.
      title: of the row.
      stages: (what the stage is, numbers of the patches that are left, row by row from 0).
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    grid: tuple[int, int]
    title: str
    stages: tuple[tuple[str, Int[np.ndarray, " _"]], ...]


def kept_patches(path: Path, shown: Sequence[Shown]) -> None:
    """A row a picture: as it is, then after each stage."""
    columns = 1 + max(len(s.stages) for s in shown)
    figure = Figure(figsize=(1.9 * columns, 2.25 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, s in zip(axes, shown, strict=True):
        row[0].imshow(s.pixels)
        row[0].set_title(s.title, fontsize=7, parse_math=False)
        for ax, (what, left) in zip(row[1:], s.stages, strict=False):
            ax.imshow(draw_kept(s.pixels, left, s.grid))
            ax.set_title(what, fontsize=7, parse_math=False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
