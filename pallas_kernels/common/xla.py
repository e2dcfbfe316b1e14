"""What plain XLA code of any operation shares: whole blocks, the type of sums, products, SiLU, a loop over a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def padded(x: Any, axis: int, to: int, value: float = 0) -> Any:
    """The array with `value` up to a multiple of `to` along an axis."""
    missing = -x.shape[axis] % to
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def accumulator(*arrays: Any) -> Any:
    """The type sums are kept in: float32, float64 for float64 inputs."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def matmul(a: Any, b: Any, dtype: Any, *, transpose: bool = False) -> Any:
    """a @ b, or a @ b.T, summed in `dtype`."""
    return jax.lax.dot_general(a, b, (((1,), (1 if transpose else 0,)), ((), ())), preferred_element_type=dtype)


def gates(h: Any) -> tuple[Any, Any]:
    """(silu(h), its derivative)."""
    gate = jax.nn.sigmoid(h)
    return h * gate, gate * (1 + h * (1 - gate))


def leading(index: Any, array: Any, axis: int) -> Any:
    """An index into an axis that may be a broadcast 1."""
    return index if array.shape[axis] > 1 else 0 * index


def each(rows_at_once: int | None, shape: tuple[int, ...], body: Callable[..., Any]) -> Any:
    """`body(*indices)` for all indices of a grid, results stacked with the grid's shape in front.

    So many indices at once; None: one on a CPU, where products of single blocks beat batched ones, and 32 elsewhere.
    """
    at_once = rows_at_once or (1 if jax.default_backend() == "cpu" else 32)
    points = jnp.arange(math.prod(shape))
    out = jax.lax.map(lambda i: body(*jnp.unravel_index(i, shape)), points, batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)
