"""The same by dense products of every row with every group's matrix, differentiable to any order; for small sizes and checks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.xla import accumulator
from pallas_kernels.grouped_matmul.problem import Static, spans


def product(static: Static, lhs: Any, rhs: Any, sizes: Any, scale: Any = None) -> Any:
    """lhs[i] @ rhs[group of i]; rows of no group are 0, whatever they hold, and so may the matrices of groups without rows."""
    dtype, row = accumulator(lhs), jnp.arange(len(lhs))[:, None]
    start, end = spans(sizes, len(lhs))
    mine = (row >= start) & (row < end)
    lhs = jnp.where(mine.any(1, keepdims=True), lhs, 0).astype(dtype)
    rhs = jnp.where((sizes > 0)[:, None, None], rhs, 0).astype(dtype)
    each = jnp.einsum("pk,gnk->pgn" if static.transpose else "pk,gkn->pgn", lhs, rhs, precision="highest")
    h = jnp.where(mine[..., None], each, 0).sum(1)
    h = jax.nn.silu(h) if static.activation else h
    return (h if scale is None else h * scale[:, None]).astype(static.dtype)
