"""What a warpgroup does with a tile of its 64 rows and a step's columns, in registers: products, logits, which pairs count.

Under `interpret` (jax's interpreter of such kernels, which knows memories, copies and barriers) the few functions here that
name a layout or a matrix instruction take a plain path; everything else is the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.mosaic_gpu_walk import ROWS
from pallas_kernels.block_sparse_attention.problem import LOG2E, Static, Tokens

NEVER = -1e30  # a logit that does not count
FLOOR = -1e29  # where a running maximum starts: exp2(NEVER - FLOOR) is 0, so masked logits need no second mask
_WHOLE = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # of `load`, before jax 0.11
row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def positions(shape: tuple[int, int], axis: int, interpret: Any) -> Any:
    """int32: an element's index along an axis of a product."""
    if interpret:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def load(ref: Any, layout: Any, interpret: Any) -> Any:
    """A vector, one number a row (or column) of a product."""
    return ref[...] if interpret else plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


def full_of(shape: tuple[int, ...], value: float, interpret: Any) -> Any:
    """A product, or a number for each of its rows, of one value."""
    x = jnp.full(shape, value, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA if len(shape) == 2 else row_layout)


def over(x: Any, shape: tuple[int, int], axis: int = 0) -> Any:
    """A vector along an axis of a product."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def _read(x: Any) -> Any:
    """Interpreted only: shared memory, read as copies see it. Matrix instructions do; for plain reads that takes a fence."""
    value = x[...].astype(jnp.float32)
    plgpu.commit_smem()
    return value


def product(a: Any, b: Any, interpret: Any) -> Any:
    """a @ b.T of shared memory, in float32."""
    if interpret:
        return jnp.dot(_read(a), _read(b).T)

    def multiply(out: Any) -> Any:
        plgpu.wgmma(out, a, b.transpose((1, 0)))
        return out[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))


def add_product(acc: Any, a: Any, b: Any, interpret: Any) -> Any:
    """acc + a @ b for a in registers, b in shared memory; `acc` stays where it is."""
    if interpret:
        return acc + jnp.dot(a.astype(jnp.float32), _read(b))
    return pl.run_state(lambda out: plgpu.wgmma(out, a, b))(plgpu.WGMMAAccumulatorRef.init(acc))


def base2(static: Static, products: Any) -> tuple[Any, Any]:
    """(logits in base 2, derivative of the natural ones by the scaled products or None for 1).

    tanh is written with exp2: the chip's own has three digits, and a cap multiplies its error.
    """
    if static.soft_cap is None:
        return products * (static.scale * LOG2E), None
    t = 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * static.scale / static.soft_cap)))
    return t * (static.soft_cap * LOG2E), 1 - t * t


class Rules:
    """Which pairs of a worker's rows and a step's columns count; costs nothing where no rule exists.

    Args:
      numbers: reference of [keys that count, causal offset], (batch, 2). segments: references of the ids of all (row tokens,
        column tokens), or None. first: the first row's token. transposed: rows are keys and columns queries, not the reverse.
    """  # fmt: skip

    def __init__(self, tokens: Tokens, numbers: Any, segments: Any, batch: Any, first: Any, interpret: Any,
                 transposed: bool = False) -> None:  # fmt: skip
        self.any, self.causal, self.interpret = tokens.any, tokens.q_offset is not None, interpret
        self.first, self.batch, self.segments, self.transposed = first, batch, segments, transposed
        if self.any:
            self.limit, self.offset = numbers[batch, 0], numbers[batch, 1]
        if segments is not None:
            self.own = load(segments[0].at[batch, pl.ds(first, ROWS)], row_layout, interpret)

    def hide(self, z: Any, start: Any) -> Any:
        """Logits with NEVER at pairs that do not count, for columns from token `start` on."""
        if not self.any:
            return z
        if self.segments is not None:
            return self._masked(z, start)
        (query, key), keys = self._sides(self.first, start), z.shape[0 if self.transposed else 1]
        every = allowed(self.limit, self.offset, self.causal, query, key, keys - 1)
        return jax.lax.cond(every, lambda z: z, lambda z: self._masked(z, start), z)

    def _sides(self, row: Any, column: Any) -> tuple[Any, Any]:
        return (column, row) if self.transposed else (row, column)

    def _masked(self, z: Any, start: Any) -> Any:
        rows, columns = (positions(z.shape, axis, self.interpret) for axis in (0, 1))
        ok = allowed(self.limit, self.offset, self.causal, *self._sides(rows + self.first, columns + start))
        if self.segments is not None:
            theirs = load(self.segments[1].at[self.batch, pl.ds(start, z.shape[1])], column_layout, self.interpret)
            ok &= over(self.own, z.shape, 0) == over(theirs, z.shape, 1)
        return jnp.where(ok, z, jnp.full_like(z, NEVER))


def allowed(limit: Any, offset: Any, causal: bool, query: Any, key: Any, more: int = 0) -> Any:
    """Whether limit and causal rule let queries from `query` on see `more` keys after `key`."""
    ok = key + more < limit
    return ok & (key + more <= query + offset) if causal else ok
