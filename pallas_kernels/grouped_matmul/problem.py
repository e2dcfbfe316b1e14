"""One grouped product as its implementations get it: what is static about it, the checks that make it, who owns which rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.block_lists import in_host_memory
from pallas_kernels.common.xla import accumulator, gates

ACTIVATIONS = (None, "silu")


class GroupError(ValueError):
    """Arguments of a grouped product that do not fit together."""


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known while a program is traced.

    Attributes:
      tile: rows that are computed together; None: what suits the device. transpose: whether rows meet the transposed matrices.
      activation: of the products. dtype: of the result. interpret: as kernels get it; false: on the device.
    """

    tile: int | None = None
    transpose: bool = False
    activation: str | None = None
    dtype: str = "float32"
    interpret: Any = False

    def finished(self, h: Any, scale: Any) -> Any:
        """What becomes of products: (rows, columns) with scales (rows, 1) or None; exactly 0 where a scale is."""
        h = gates(h)[0] if self.activation else h
        return h if scale is None else jnp.where(scale != 0, h * scale, 0)


def spans(sizes: Any, rows: int) -> tuple[Any, Any]:
    """(first row, first row behind) of every group."""
    end = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]]), end


def checked(lhs: Any, rhs: Any, sizes: Any, scale: Any) -> tuple[Any, Any, Any, Any]:
    """The arrays of a product.

    Raises:
      GroupError: shapes or types that do not fit together, or more rows in groups than there are, where they are in host memory.
    """
    lhs, rhs, sizes = map(jnp.asarray, (lhs, rhs, sizes))
    for name, array, wanted in (
        ("lhs", lhs, "(rows, k)"),
        ("rhs", rhs, "(groups, k, n)"),
        ("group_sizes", sizes, "(groups,)"),
    ):
        if array.ndim != wanted.count(",") + (wanted != "(groups,)") or 0 in array.shape:
            raise GroupError(f"{name} has shape {array.shape}: wanted {wanted}, none empty")
    if rhs.shape[1] != lhs.shape[1] or sizes.shape != rhs.shape[:1]:
        raise GroupError(f"lhs {lhs.shape}, rhs {rhs.shape} and group_sizes {sizes.shape} do not fit: wanted (rows, k), "
                         "(groups, k, n) and (groups,)")  # fmt: skip
    if lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        raise GroupError(f"lhs and rhs are {lhs.dtype} and {rhs.dtype}: wanted one floating type")
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise GroupError(f"group_sizes are {sizes.dtype}: wanted integers")
    if in_host_memory(sizes) and ((counts := np.asarray(sizes)).min() < 0 or counts.sum() > len(lhs)):
        raise GroupError(f"group_sizes sum up to {counts.sum()}, the least is {counts.min()}: wanted none below 0, and at most "
                         f"the {len(lhs)} rows of lhs")  # fmt: skip
    if scale is not None:
        scale = jnp.asarray(scale)
        if scale.shape != lhs.shape[:1] or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise GroupError(
                f"row_scale is {scale.dtype} of shape {scale.shape}: wanted a number a row, {lhs.shape[:1]}"
            )
        scale = scale.astype(accumulator(lhs))
    return lhs, rhs, sizes.astype(jnp.int32), scale
