"""What a warpgroup does with a tile of its 64 rows and a step's columns, in registers: products, vectors, layouts.

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
