"""Grouped products for any device: a loop over the groups that have rows, `tile` rows at a time, matrices read where they lie.

Work follows the rows that there are. The last tile of a group reaches into the next one, whose rows are masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.block_lists import pack_lists
from pallas_kernels.common.xla import accumulator, matmul
from pallas_kernels.grouped_matmul.problem import Static, spans

__all__ = ["outer", "product"]
ROWS = 128  # of a step


def _each(
    static: Static, sizes: Any, rows: int, group: Callable[[Any, Callable[..., Any], Any], Any], carry: Any
) -> Any:
    """Fold `group(g, tiles, carry)` over groups with rows; `tiles(step, carry)` folds `step(first row, mine, carry)`."""
    size = min(static.tile or ROWS, rows)
    start, end = spans(sizes, rows)
    used, count, _ = pack_lists(end > start, len(sizes))

    def one(i: Any, carry: Any) -> Any:
        g = used[i]

        def tiles(step: Callable[..., Any], carry: Any) -> Any:
            def body(j: Any, carry: Any) -> Any:
                at = start[g] + j * size
                first = jnp.minimum(at, rows - size)  # within the arrays
                row = first + jnp.arange(size)
                return step(first, ((row >= at) & (row < end[g]))[:, None], carry)

            return jax.lax.fori_loop(0, -(-(end[g] - start[g]) // size), body, carry)

        return group(g, tiles, carry)

    return jax.lax.fori_loop(0, count, one, carry)


def product(static: Static, lhs: Any, rhs: Any, sizes: Any, scale: Any = None) -> Any:
    """lhs[i] @ rhs[group of i], finished as `static` says; rows of no group are 0."""
    rows, size = len(lhs), min(static.tile or ROWS, len(lhs))
    dtype = accumulator(lhs)

    def group(g: Any, tiles: Callable[..., Any], out: Any) -> Any:
        w = jax.lax.dynamic_index_in_dim(rhs, g, keepdims=False)

        def step(first: Any, mine: Any, out: Any) -> Any:
            part = None if scale is None else jax.lax.dynamic_slice_in_dim(scale, first, size)[:, None]
            h = matmul(jax.lax.dynamic_slice_in_dim(lhs, first, size), w, dtype, transpose=static.transpose)
            new = static.finished(h, part).astype(out.dtype)
            old = jax.lax.dynamic_slice_in_dim(out, first, size)
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, new, old), first, 0)

        return tiles(step, out)

    columns = rhs.shape[1 if static.transpose else 2]
    return _each(static, sizes, rows, group, jnp.zeros((rows, columns), static.dtype))


def outer(static: Static, lhs: Any, dout: Any, sizes: Any) -> Any:
    """lhs[rows of g].T @ dout[rows of g] for every group g, 0 for groups without rows."""
    rows, size = len(lhs), min(static.tile or ROWS, len(lhs))
    dtype, shape = accumulator(lhs), (lhs.shape[1], dout.shape[1])
    turned = shape[1] < shape[0]  # of the two factors the narrow one is turned, which takes a third of the time

    def group(g: Any, tiles: Callable[..., Any], out: Any) -> Any:
        def step(first: Any, mine: Any, total: Any) -> Any:
            a, b = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, first, size), 0) for x in (lhs, dout))
            return total + (matmul(b.T, a, dtype) if turned else matmul(a.T, b, dtype))

        total = tiles(step, jnp.zeros(shape[::-1] if turned else shape, dtype))
        total = total.T if turned else total
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), g, 0)

    return _each(static, sizes, rows, group, jnp.zeros((len(sizes), *shape), static.dtype))
