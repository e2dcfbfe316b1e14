"""Block masses on TPU. One program takes up to eight query blocks, which see all keys, and a tile of keys that pass by.

A column of the output is 128 key blocks: their sums for every query wait in VMEM until all tiles of the column have passed,
and are then summed over the queries of each block. A search is one pass (tpu_search) where VMEM has room for it, or two:
attention, then masses.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_score import tpu_search
from pallas_kernels.block_score.tpu_tiles import STEP, Passing, of_query_blocks, rows_of, rules
from pallas_kernels.block_sparse_attention import tpu as attention
from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens, finite_lse
from pallas_kernels.common.attention_tpu import refusal
from pallas_kernels.common.block_mask import BlockMask
from pallas_kernels.common.tpu import call
from pallas_kernels.common.xla import padded

__all__ = ["refusal", "scores", "search"]
LANES = 128  # key blocks of a row of the output
TILE = 4096  # keys of a program: as many as are fetched together


def _kernel(static: Static, tokens: Tokens, group: int, step: int, numbers: Any, *arrays: Any) -> None:
    refs = list(arrays)
    segments = (refs.pop(0), refs.pop(0)) if tokens.q_segments is not None else None
    lse, q, k, out, sums = refs
    rows, tile, tiles = q.shape[0], pl.program_id(4), pl.num_programs(4)
    first_key = (pl.program_id(3) * tiles + tile) * k.shape[0]
    passing = Passing(static, tokens, numbers, segments, q, k, pl.program_id(2) * rows, first_key, step)

    @pl.when(tile == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    def update(start: Any, pairs: Any) -> None:
        for at, size, z, ok in passing.logits(start, pairs):
            e = jnp.exp2(z - lse[...])
            e = e if ok is None else jnp.where(ok, e, 0)
            block = pl.multiple_of((tile * k.shape[0] + at) // static.block_k, 8)
            sums[pl.ds(block, size // static.block_k), :] = passing.by_block(e)

    passing.each(update)

    @pl.when(tile == tiles - 1)
    def _() -> None:
        out[...] = of_query_blocks(static, sums[...], group)


def shape_of(static: Static, q: Any) -> tuple[int, int, int]:
    """(query blocks of a program, keys of a step, keys of a tile); whole tiles make a column of the output."""
    step, tile = (1 << (max(8, min(n // static.block_k, LANES)).bit_length() - 1) for n in (
        static.config.step_tokens or STEP, TILE))  # fmt: skip
    step *= static.block_k
    return rows_of(static, q, step), step, max(step, tile * static.block_k)


def scores(static: Static, q: Any, k: Any, lse: Any, tokens: Tokens) -> Any:
    """Masses for a known log-sum-exp."""
    batch, heads, queries, features = q.shape
    keys, shared = k.shape[2], heads // k.shape[1]
    nq, nk = queries // static.block_q, keys // static.block_k
    group, step, tile = shape_of(static, q)
    rows, wide = group * static.block_q, LANES * static.block_k
    q, k = padded(q, 2, rows), padded(k, 2, wide)
    tokens = tokens if tokens.kv_segments is None else tokens._replace(kv_segments=padded(tokens.kv_segments, 1, wide))
    known = finite_lse(lse) * LOG2E
    known = padded(known, 2, rows, 1e30)
    tiles, grid = wide // tile, (batch, heads, q.shape[2] // rows, k.shape[2] // wide, wide // tile)
    every = jnp.full(batch, queries, jnp.int32)
    inputs, specs = rules(static, tokens, batch, keys, rows, tile, every, lambda b, h, p, j, t: (b, p, j * tiles + t))
    inputs += [known.reshape(*grid[:3], 1, rows), q, k]
    specs += [
        pl.BlockSpec((None, None, None, 1, rows), lambda b, h, p, j, t: (b, h, p, 0, 0)),
        pl.BlockSpec((None, None, rows, features), lambda b, h, p, j, t: (b, h, p, 0)),
        pl.BlockSpec((None, None, tile, features), lambda b, h, p, j, t: (b, h // shared, j * tiles + t, 0)),
    ]
    found = call(
        functools.partial(_kernel, static, tokens, group, step), "block_scores", grid, inputs, specs,
        jax.ShapeDtypeStruct((*grid[:3], group, k.shape[2] // static.block_k), jnp.float32),
        pl.BlockSpec((None, None, None, group, LANES), lambda b, h, p, j, t: (b, h, p, 0, j)),
        [pltpu.VMEM((LANES, rows), jnp.float32)], pairs=batch * heads * queries * keys, features=features,
        fetched=batch * heads * grid[2] * k.shape[2] * features * k.dtype.itemsize, vmem_bytes=48 << 20,
        interpret=static.interpret,
    )  # fmt: skip
    return found.reshape(batch, heads, -1, found.shape[-1])[:, :, :nq, :nk]


def search(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens) -> tuple[Any, Any, Any]:
    """(out or None, log-sum-exp, masses): in one pass, or attention over all blocks and then their masses.

    Raises:
      ValueError: one pass is asked for and the chip has no room for what it keeps.
    """
    passes = static.config.passes or (2 if tpu_search.refusal(static, q, k, v) else 1)
    if passes == 1:
        return tpu_search.search(static, q, k, v, live, tokens)
    sizes = {"block_q": static.block_q, "block_k": static.block_k, "q_size": q.shape[2], "kv_size": k.shape[2]}
    mask = BlockMask.one_list(**sizes)
    out, lse = attention.forward(static, q, k, v, mask, tokens)
    lse = jnp.where(jnp.arange(q.shape[2]) < live[:, None, None], lse, -jnp.inf)
    return out, lse, scores(static, q, k, lse, tokens)
