"""How LLaVA-1.6 lays out an image's tokens: a small base image, then tiles of the large one without their padding.

The image is fitted into the best of a few grids of tiles. The tiles' tokens form one map, from which the rows or columns that
only hold padding are cut; every row of the map ends with the same learned vector, `newline`. The base image's tokens stand in
front. DivPrune chooses among all of them together: `divprune_select(tokens, retained_count(len(tokens), ratio))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # height, width in pixels
TILE, SIDE = 336, 24  # of a tile: pixels, and tokens


def best_grid(height: int, width: int, pinpoints: Sequence[tuple[int, int]] = PINPOINTS) -> tuple[int, int]:
    """The (height, width) among `pinpoints` in which most pixels of the image survive; of equals the one with least padding.

    Raises:
      ValueError: an image without pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels has none: give a real size")

    def quality(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        survive = min(int(width * scale) * int(height * scale), width * height)
        return survive, survive - size[0] * size[1]

    return max(pinpoints, key=quality)


def unpadded(rows: int, columns: int, height: int, width: int) -> tuple[slice, slice]:
    """Which rows and columns of a map hold an image of that shape, fitted into its middle."""
    if width * rows > height * columns:  # wider than the map: padding above and below
        pad = (rows - height * columns // width) // 2
        return slice(pad, rows - pad), slice(0, columns)
    pad = (columns - width * rows // height) // 2
    return slice(0, rows), slice(pad, columns - pad)


def anyres_shape(
    height: int, width: int, pinpoints: Sequence[tuple[int, int]] = PINPOINTS, tile: int = TILE, side: int = SIDE
) -> tuple[int, int]:
    """(rows, columns) of the map without padding, newlines not counted."""
    grid = best_grid(height, width, pinpoints)
    rows, columns = unpadded(grid[0] // tile * side, grid[1] // tile * side, height, width)
    return rows.stop - rows.start, columns.stop - columns.start


def anyres_count(
    height: int, width: int, pinpoints: Sequence[tuple[int, int]] = PINPOINTS, tile: int = TILE, side: int = SIDE
) -> int:
    """How many visual tokens an image of so many pixels has: base image, map, a newline a row."""
    rows, columns = anyres_shape(height, width, pinpoints, tile, side)
    return side * side + rows * (columns + 1)


def anyres_tokens(
    base: Float[Array, "m d"],
    tiles: Float[Array, "n m d"],
    newline: Float[Array, " d"],
    height: int,
    width: int,
    pinpoints: Sequence[tuple[int, int]] = PINPOINTS,
    tile: int = TILE,
) -> Float[Array, "tokens d"]:
    """The visual tokens of one image, in the order in which the decoder reads them; jit-able for one image size.

    Args:
      base: tokens of the scaled-down image, row by row.
      tiles: tokens of every tile, row by row of the grid.
      newline: the learned vector.
      height, width: of the image in pixels.
      pinpoints, tile: heights and widths of the grids, and of a tile, in pixels.

    Raises:
      ValueError: another number of tiles than the image's grid has, or tiles that are not square.
    """
    grid = best_grid(height, width, pinpoints)
    down, across = grid[0] // tile, grid[1] // tile
    side = round(base.shape[0] ** 0.5)
    if tiles.shape[0] != down * across or side * side != base.shape[0]:
        raise ValueError(
            f"{tiles.shape[0]} tiles of {base.shape[0]} tokens: an image of {height}x{width} pixels has {down}x{across} tiles "
            "of a square number of tokens"
        )
    d = base.shape[1]
    joined = tiles.reshape(down, across, side, side, d).transpose(0, 2, 1, 3, 4).reshape(down * side, across * side, d)
    image = joined[unpadded(down * side, across * side, height, width)]
    ends = jnp.broadcast_to(newline, (image.shape[0], 1, d)).astype(image.dtype)
    return jnp.concatenate([base, jnp.concatenate([image, ends], axis=1).reshape(-1, d)])
