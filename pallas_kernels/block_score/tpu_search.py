"""Dense attention and its block masses in one pass over the keys, on TPU.

One program takes neighbouring query blocks and tiles of keys that pass by. The log-sum-exp of every query in every key
block waits in VMEM, (key blocks, queries) in float32, until the one over all keys is known; its exponential, summed over the
queries of a block, is the mass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_score.tpu_tiles import STEP, Passing, of_query_blocks, rows_of, rules
from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens
from pallas_kernels.common.attention_tpu import NEVER
from pallas_kernels.common.tpu import call, dot
from pallas_kernels.common.xla import padded

TILE = 2048  # keys fetched at once


def shape_of(static: Static, q: Any, k: Any) -> tuple[int, int, int]:
    """(query blocks of a program, keys of a step, keys of a tile); a step has whole blocks, a multiple of eight of them."""
    eight = 8 * static.block_k
    step = max(1, (static.config.step_tokens or STEP) // eight) * eight
    return rows_of(static, q, step), step, min(-(-k.shape[2] // step), max(1, TILE // step)) * step


def vmem_of(static: Static, q: Any, k: Any, v: Any | None) -> int:
    """Bytes of VMEM that a program holds: log-sum-exps and masses of all key blocks, a step's products, double buffers."""
    group, step, tile = shape_of(static, q, k)
    rows, blocks = -(-group * static.block_q // 128) * 128, -(-k.shape[2] // tile) * (tile // static.block_k)
    features = [-(-x.shape[-1] // 128) * 128 for x in ([k] if v is None else [k, v])]
    buffers = 2 * q.dtype.itemsize * (sum(features) * tile + 2 * max(features) * rows)
    return 4 * blocks * (rows + 16) + 16 * step * rows + 8 * max(features) * rows + buffers


def refusal(static: Static, q: Any, k: Any, v: Any | None) -> str | None:
    """Why one pass is not possible on the present chip, or None."""
    need = vmem_of(static, q, k, v)
    room = int(0.85 * pltpu.get_tpu_info().vmem_capacity_bytes) if pltpu.is_tpu_device() else need
    if need <= room:
        return None
    return f"a search of {k.shape[2]} keys in one pass needs {need >> 20} MB of VMEM of {room >> 20}: use passes=2"


def _kernel(static: Static, tokens: Tokens, group: int, step: int, values: bool, numbers: Any, *arrays: Any) -> None:
    refs = list(arrays)
    segments = (refs.pop(0), refs.pop(0)) if tokens.q_segments is not None else None
    q, k = refs.pop(0), refs.pop(0)
    v, out = (refs.pop(0), refs.pop(0)) if values else (None, None)
    lse, masses, logs, top, total, *acc = refs
    rows, tile = q.shape[0], k.shape[0]
    first_key = pl.program_id(3) * tile
    passing = Passing(static, tokens, numbers, segments, q, k, pl.program_id(2) * rows, first_key, step)

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        logs[...] = jnp.full_like(logs, -jnp.inf)  # of blocks that nobody comes by
        top[...] = jnp.full_like(top, NEVER)
        for x in (total, *acc):
            x[...] = jnp.zeros_like(x)

    def update(start: Any, pairs: Any) -> None:
        for at, size, z, ok in passing.logits(start, pairs):
            z = z if ok is None else jnp.where(ok, z, NEVER)
            before = top[...]
            new = jnp.maximum(before, z.max(0, keepdims=True))
            e = jnp.exp2(z - new)
            e = e if ok is None else jnp.where(ok, e, 0)
            sums, old = passing.by_block(e), jnp.exp2(before - new)
            top[...] = new
            total[...] = old * total[...] + sums.sum(0, keepdims=True)
            block = pl.multiple_of((first_key + at) // static.block_k, 8)
            logs[pl.ds(block, size // static.block_k), :] = new + jnp.log2(sums)
            if v is not None:
                acc[0][...] = old * acc[0][...] + dot(v[:, pl.ds(at, size)], e.astype(v.dtype))

    passing.each(update)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        alive = (total[...] != 0) & (passing.own < numbers[0, 2])  # not-a-number stays what it is
        safe = jnp.where(alive, total[...], 1)
        known = top[...] + jnp.log2(safe)
        lse[...] = jnp.where(alive, known / LOG2E, -jnp.inf)
        weights = jnp.exp2(logs[...] - jnp.where(alive, known, -NEVER))  # a large number: exp2 makes 0 of the rest
        masses[...] = of_query_blocks(static, weights, group)
        if out is not None:
            out[...] = jnp.transpose(jnp.where(alive, acc[0][...] / safe, 0)).astype(out.dtype)


def search(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens) -> tuple[Any, Any, Any]:
    """(out or None, log-sum-exp, masses).

    Raises:
      ValueError: the chip has no room for what one pass keeps.
    """
    problem = refusal(static, q, k, v)
    if problem:
        raise ValueError(problem)
    batch, heads, queries, features = q.shape
    keys, shared = k.shape[2], heads // k.shape[1]
    nq, nk = queries // static.block_q, keys // static.block_k
    group, step, tile = shape_of(static, q, k)
    rows, need = group * static.block_q, vmem_of(static, q, k, v)
    q, k = padded(q, 2, rows), padded(k, 2, tile)
    grid = (batch, heads, q.shape[2] // rows, k.shape[2] // tile)
    blocks = k.shape[2] // static.block_k
    inputs, specs = rules(static, tokens, batch, keys, rows, tile, live, lambda b, h, p, t: (b, p, t))

    def own(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda b, h, p, t: (b, h, p, 0, 0))

    inputs += [q, k]
    specs.append(pl.BlockSpec((None, None, rows, features), lambda b, h, p, t: (b, h, p, 0)))
    specs.append(pl.BlockSpec((None, None, tile, features), lambda b, h, p, t: (b, h // shared, t, 0)))
    out = [jax.ShapeDtypeStruct((*grid[:3], 1, rows), jnp.float32),
           jax.ShapeDtypeStruct((*grid[:3], group, blocks), jnp.float32)]  # fmt: skip
    out_specs = [own(1, rows), own(group, blocks)]
    scratch = [pltpu.VMEM((blocks, rows), jnp.float32), *[pltpu.VMEM((1, rows), jnp.float32)] * 2]
    if v is not None:
        size = v.shape[-1]
        inputs.append(jnp.swapaxes(padded(v, 2, tile), 2, 3))
        specs.append(pl.BlockSpec((None, None, size, tile), lambda b, h, p, t: (b, h // shared, 0, t)))
        out.insert(0, jax.ShapeDtypeStruct((*q.shape[:3], size), v.dtype))
        out_specs.insert(0, pl.BlockSpec((None, None, rows, size), lambda b, h, p, t: (b, h, p, 0)))
        scratch.append(pltpu.VMEM((size, rows), jnp.float32))
    fetched = (
        batch * heads * grid[2] * k.shape[2] * sum(x.shape[-1] * x.dtype.itemsize for x in (k, v) if x is not None)
    )
    *given, lse, masses = call(
        functools.partial(_kernel, static, tokens, group, step, v is not None), "search", grid, inputs, specs,
        out, out_specs, scratch, pairs=batch * heads * queries * keys, fetched=fetched,
        features=features + (0 if v is None else v.shape[-1]), vmem_bytes=need + (16 << 20), interpret=static.interpret,
    )  # fmt: skip
    masses = masses.reshape(batch, heads, -1, blocks)[:, :, :nq, :nk]
    return (given[0][:, :, :queries] if given else None), lse.reshape(q.shape[:3])[..., :queries], masses
