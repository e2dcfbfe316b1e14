"""Kept tokens drawn over their image: patches that were dropped lie in blue fog, light or dark as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8

FOG = (88, 128, 176)  # what dropped patches fade to


def draw_kept(
    image: UInt8[np.ndarray, "height width *channels"], index: Any, grid: tuple[int, int], dim: float = 0.2
) -> UInt8[np.ndarray, "height width 3"]:
    """The image as RGB with every patch that is not kept faded into fog.

    Args:
      image: grey or RGB.
      index: (n,) which patches are kept, numbered row by row; numbers that are no patch (-1, a class token) are passed over.
      grid: (rows, columns) of patches; they need not divide the image evenly.
      dim: how much of a dropped patch is left, 0 to 1.

    Raises:
      ValueError: an image that is neither grey nor RGB, a grid finer than its pixels, `dim` out of range.
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"the image is {image.shape}: give (height, width) or (height, width, 3)")
    rows, columns = grid
    height, width = image.shape[:2]
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"{rows}x{columns} patches do not fit an image of {height}x{width} pixels")
    if not 0 <= dim <= 1:
        raise ValueError(f"dim is {dim}: a share is between 0 and 1")
    index = np.asarray(index).reshape(-1)
    kept = np.zeros(rows * columns, bool)
    kept[index[(index >= 0) & (index < rows * columns)]] = True
    inside = kept.reshape(grid)[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    colour = np.broadcast_to(image.reshape(height, width, -1), (height, width, 3)).astype(np.float32)
    fog = np.array(FOG, np.float32)
    faded = fog + dim * (colour - fog)
    return np.where(inside[..., None], colour, faded).round().astype(np.uint8)
