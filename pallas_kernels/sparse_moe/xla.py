"""The mixture of experts for any device: a loop over the experts in use, whose weights are read where they lie.

An expert that few tokens use gets those alone, gathered in their order, `tile` at a time; one that more than half of them use
gets all tokens, since products of whole arrays are then cheaper than copies of their rows. No pair is ever dropped, and memory
beyond inputs and outputs is (tokens x expert width). The loops have as many steps as there are experts in use and tokens that
use one, so they have no automatic derivative: `gradients` is it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.block_lists import pack_lists
from pallas_kernels.common.xla import accumulator, gates, matmul, padded
from pallas_kernels.sparse_moe.problem import Static, weighted
from pallas_kernels.sparse_moe.work_lists import union_ids

__all__ = ["forward", "gradients", "union"]
ROWS = 128  # tokens of a step
WHOLE = 0.5  # of the tokens: an expert that more of them use gets all


def _of(array: Any, expert: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(array, expert, keepdims=False)


def union(static: Static, x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
    """All tokens through every expert that at least one of them uses, for a few tokens.

    A token's output does not depend on the other tokens, nor on the experts that only they use.
    """
    dtype, columns = accumulator(x), scores.T[..., None]
    ids, count = union_ids(active)

    def expert(i: Any, y: Any) -> Any:
        h = matmul(x, _of(up, ids[i]), dtype)
        return y + matmul(weighted(h, _of(columns, ids[i])).astype(x.dtype), _of(down, ids[i]), dtype)

    return jax.lax.fori_loop(0, count, expert, jnp.zeros(x.shape, dtype)).astype(x.dtype)


class _Tokens:
    """The tokens of each expert, and loops over them.

    Args:
      rows: tokens of a step.
    """

    def __init__(self, active: Any, rows: int) -> None:
        self.rows, self.all = rows, active.shape[0]
        self.experts, self.used = union_ids(active)
        listed, self.count, _ = pack_lists(active.T, self.all)
        listed = padded(listed, 1, rows)
        at = jnp.arange(listed.shape[1])
        # Behind the end come places outside the arrays, no two alike: read as 0 and written nowhere.
        self.listed = jnp.where(at < self.count[:, None], listed, self.all + at)

    def each(self, step: Callable[..., Any], carry: Any) -> Any:
        """Fold `step(expert, carry)` over the experts in use."""
        return jax.lax.fori_loop(0, self.used, lambda i, c: step(self.experts[i], c), carry)

    def fold(self, expert: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Fold `step(places of some tokens or None for all, carry)` over the tokens of an expert."""

        def some(carry: Any) -> Any:
            def body(j: Any, carry: Any) -> Any:
                return step(jax.lax.dynamic_slice(self.listed, (expert, j * self.rows), (1, self.rows))[0], carry)

            return jax.lax.fori_loop(0, -(-self.count[expert] // self.rows), body, carry)

        return jax.lax.cond(self.count[expert] > WHOLE * self.all, lambda c: step(None, c), some, carry)


def _rows(array: Any, at: Any) -> Any:
    return array if at is None else array.at[at].get(mode="fill", fill_value=0, indices_are_sorted=True)


def _added(array: Any, at: Any, more: Any) -> Any:
    if at is None:
        return array + more
    return array.at[at].add(more, mode="drop", indices_are_sorted=True, unique_indices=True)


def _placed(array: Any, at: Any, new: Any) -> Any:
    return new if at is None else array.at[at].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)


def forward(static: Static, x: Any, scores: Any, active: Any, up: Any, down: Any) -> tuple[Any, Any]:
    """(the layer's output, x @ up of the active pairs if it is to be kept: (experts, tokens, hidden))."""
    dtype, columns = accumulator(x), scores.T
    tokens = _Tokens(active, static.tile or ROWS)

    def expert(e: Any, carry: Any) -> Any:
        y, kept = carry
        u, d, score = _of(up, e), _of(down, e), _of(columns, e)

        def step(at: Any, carry: Any) -> Any:
            y, own = carry
            h = matmul(_rows(x, at), u, dtype)
            out = matmul(weighted(h, _rows(score, at)[:, None]).astype(x.dtype), d, dtype)
            return _added(y, at, out), None if own is None else _placed(own, at, h.astype(own.dtype))

        own = jnp.zeros((len(x), up.shape[2]), x.dtype) if static.save_hidden else None
        y, own = tokens.fold(e, step, (y, own))
        return y, None if own is None else jax.lax.dynamic_update_index_in_dim(kept, own, e, 0)

    kept = jnp.zeros((len(up), len(x), up.shape[2]), x.dtype) if static.save_hidden else None
    y, kept = tokens.each(expert, (jnp.zeros(x.shape, dtype), kept))
    return y.astype(x.dtype), kept


def gradients(
    static: Static, x: Any, scores: Any, active: Any, up: Any, down: Any, dy: Any, kept: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Gradients of x, scores (which mean nothing at pairs that are not active), up and down (0 of experts that nobody uses)."""
    dtype, columns = accumulator(x), scores.T
    tokens = _Tokens(active, static.tile or ROWS)

    def expert(e: Any, carry: Any) -> Any:
        dx, dcolumns, dup, ddown = carry
        u, d, score = _of(up, e), _of(down, e), _of(columns, e)
        saved = None if kept is None else _of(kept, e)

        def step(at: Any, carry: Any) -> Any:
            dx, dscore, du, dd = carry
            own, dout, s = _rows(x, at), _rows(dy, at), _rows(score, at)[:, None]
            h = matmul(own, u, dtype) if saved is None else _rows(saved, at).astype(dtype)
            g = matmul(dout, d, dtype, transpose=True)
            silu, slope = gates(h)
            dh = jnp.where(s != 0, s * g * slope, 0).astype(x.dtype)
            hidden = jnp.where(s != 0, s * silu, 0).astype(x.dtype)
            return (_added(dx, at, matmul(dh, u, dtype, transpose=True)), _added(dscore, at, (silu * g).sum(1)),
                    du + matmul(dh.T, own, dtype), dd + matmul(hidden.T, dout, dtype))  # fmt: skip

        # Of two factors the narrow one is turned, which takes a third of the time: du is (hidden, width) until the end.
        start = (dx, jnp.zeros(x.shape[0], dtype), jnp.zeros(d.shape, dtype), jnp.zeros(d.shape, dtype))
        dx, dscore, du, dd = tokens.fold(e, step, start)
        written = [jax.lax.dynamic_update_index_in_dim(a, new.astype(a.dtype), e, 0)
                   for a, new in ((dcolumns, dscore), (dup, du.T), (ddown, dd))]  # fmt: skip
        return dx, *written

    start = (jnp.zeros(x.shape, dtype), jnp.zeros_like(columns), jnp.zeros_like(up), jnp.zeros_like(down))
    dx, dcolumns, dup, ddown = tokens.each(expert, start)
    return dx.astype(x.dtype), dcolumns.T, dup, ddown
