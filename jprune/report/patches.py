"""Pictures with the patches that are left, stage by stage, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

FOG = (88, 128, 176)


class Shown(NamedTuple):
    """One picture.

    Attributes:
      pixels: (height, width, 3) as the model sees it.
      patch: side of a patch in pixels.
      title: of the row.
      stages: (what the stage is, numbers of the patches that are left, row by row from 0).
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    patch: int
    title: str
    stages: tuple[tuple[str, Int[np.ndarray, " _"]], ...]


def dimmed(
    pixels: UInt8[np.ndarray, "h w 3"], patch: int, left: Int[np.ndarray, " n"], light: float = 0.25
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with all patches but those `left` fogged in blue."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    here = np.zeros(rows * columns, bool)
    here[left] = True
    mask = np.zeros(pixels.shape[:2], bool)
    spread = here.reshape(rows, columns).repeat(patch, 0).repeat(patch, 1)
    mask[: spread.shape[0], : spread.shape[1]] = spread
    pale = light * pixels.astype(np.float32) + (1 - light) * np.array(FOG, np.float32)
    return np.where(mask[..., None], pixels, pale.round()).astype(np.uint8)


def kept_patches(path: Path, shown: Sequence[Shown]) -> None:
    """A row a picture: as it is, then after each stage."""
    columns = 1 + max(len(s.stages) for s in shown)
    figure = Figure(figsize=(1.9 * columns, 2.25 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, s in zip(axes, shown, strict=True):
        row[0].imshow(s.pixels)
        row[0].set_title(s.title, fontsize=7)
        for ax, (what, left) in zip(row[1:], s.stages, strict=False):
            ax.imshow(dimmed(s.pixels, s.patch, left))
            ax.set_title(what, fontsize=7)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
