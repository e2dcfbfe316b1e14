"""Block masses on TPU. One program takes up to eight query blocks, which see all keys, and a tile of keys that pass by.

The sums over a block's keys are a product with a 0/1 matrix that puts every block's sum in a lane of its own: 128 key blocks
fill one row of the output, and eight query blocks its rows. A search is one pass (tpu_search) where VMEM has room for it, or
two: attention, then masses.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_score import tpu_search
from pallas_kernels.block_sparse_attention import tpu as attention
from pallas_kernels.block_sparse_attention.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.problem import Static, Tokens, finite_lse
from pallas_kernels.block_sparse_attention.tpu_walk import LOG2E, base2, call, column, dot

LANES = 128  # key blocks of a row of the output
SUB = 512  # keys multiplied at once
TILE = 4096  # keys of a program: as many as are fetched together


def _kernel(static: Static, tokens: Tokens, group: int, sub: int, *arrays: Any) -> None:
    numbers, *refs = arrays
    segments = (refs.pop(0), refs.pop(0)) if tokens.q_segments is not None else None
    lse, q, k, out, sums = refs
    bq, rows = static.block_q, q.shape[0]
    first_row = pl.program_id(2) * rows
    tile, tiles = pl.program_id(4), pl.num_programs(4)
    first_key = (pl.program_id(3) * tiles + tile) * k.shape[0]
    limit, offset, causal = numbers[0, 0], numbers[0, 1], tokens.q_offset is not None

    shift = column(lse[...])

    @pl.when(tile == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    def part(n: Any, _: None) -> None:
        start = pl.multiple_of(n * sub, sub)
        z, _unused = base2(static, dot(q[...], k[pl.ds(start, sub), :], transpose=True))
        e = jnp.exp2(z - shift)
        key = first_key + start + jax.lax.broadcasted_iota(jnp.int32, (1, sub), 1)
        ok = key < limit
        if causal:
            ok = ok & (key <= first_row + offset + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0))
        if segments:
            ok = ok & (column(segments[0][...]) == segments[1][:, pl.ds(start, sub)])
        e = jnp.where(ok, e, 0)
        of_rows = e.reshape(group, bq, sub).sum(1)
        lane = tile * (k.shape[0] // static.block_k) + n * (sub // static.block_k)
        c, to = (jax.lax.broadcasted_iota(jnp.int32, (sub, LANES), d) for d in (0, 1))
        sums[...] += dot(of_rows, (to == lane + c // static.block_k).astype(jnp.float32))

    @pl.when(first_key < limit)
    def _() -> None:
        jax.lax.fori_loop(0, k.shape[0] // sub, part, None)

    @pl.when(tile == tiles - 1)
    def _() -> None:
        out[...] = sums[...]


def _power_of_two(n: int) -> int:
    """The largest one up to n and up to a row of the output, at least 1: then whole tiles make a row."""
    return 1 << (max(1, min(n, LANES)).bit_length() - 1)


def scores(static: Static, q: Any, k: Any, lse: Any, tokens: Tokens) -> Any:
    """Masses for a known log-sum-exp."""
    batch, heads, queries, features = q.shape
    keys, shared, bk = k.shape[2], heads // k.shape[1], static.block_k
    nq, nk = queries // static.block_q, keys // bk
    group = min(8, nq)
    sub, tile = (_power_of_two(n // bk) * bk for n in (SUB, TILE))
    more_rows, more_keys = -nq % group * static.block_q, -keys % (LANES * bk)
    pad = functools.partial(jnp.pad, mode="constant")
    q = pad(q, ((0, 0), (0, 0), (0, more_rows), (0, 0)))
    k = pad(k, ((0, 0), (0, 0), (0, more_keys), (0, 0)))
    known = pad(finite_lse(lse) * LOG2E, ((0, 0), (0, 0), (0, more_rows)), constant_values=1e30)
    rows, columns = group * static.block_q, (keys + more_keys) // (LANES * bk)
    tiles = LANES * bk // tile
    limit = jnp.full(batch, keys, jnp.int32) if tokens.kv_len is None else tokens.kv_len
    offset = jnp.zeros(batch, jnp.int32) if tokens.q_offset is None else tokens.q_offset
    inputs = [jnp.stack([limit, offset], -1)[:, None]]
    specs = [pl.BlockSpec((None, 1, 2), lambda b, h, p, j, t: (b, 0, 0), memory_space=pltpu.SMEM)]
    if tokens.q_segments is not None:
        inputs += [pad(tokens.q_segments, ((0, 0), (0, more_rows)))[:, None]]
        inputs += [pad(tokens.kv_segments, ((0, 0), (0, more_keys)))[:, None]]
        specs.append(pl.BlockSpec((None, 1, rows), lambda b, h, p, j, t: (b, 0, p)))
        specs.append(pl.BlockSpec((None, 1, tile), lambda b, h, p, j, t: (b, 0, j * tiles + t)))
    inputs += [known.reshape(batch, heads, -1, 1, rows), q, k]
    specs += [
        pl.BlockSpec((None, None, None, 1, rows), lambda b, h, p, j, t: (b, h, p, 0, 0)),
        pl.BlockSpec((None, None, rows, features), lambda b, h, p, j, t: (b, h, p, 0)),
        pl.BlockSpec((None, None, tile, features), lambda b, h, p, j, t: (b, h // shared, j * tiles + t, 0)),
    ]
    out = jax.ShapeDtypeStruct((batch, heads, q.shape[2] // static.block_q, columns * LANES), jnp.float32)
    found = call(
        functools.partial(_kernel, static, tokens, group, sub), static, "block_scores",
        (batch, heads, q.shape[2] // rows, columns, tiles), inputs, specs, out,
        pl.BlockSpec((None, None, group, LANES), lambda b, h, p, j, t: (b, h, p, j)),
        [pltpu.VMEM((group, LANES), jnp.float32)], pairs=batch * heads * queries * keys, features=features,
    )  # fmt: skip
    return found[:, :, :nq, :nk]


def search(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens) -> tuple[Any, Any, Any]:
    """(out or None, log-sum-exp, masses): in one pass, or attention over all blocks and then their masses.

    Raises:
      ValueError: one pass is asked for and the chip has no room for what it keeps.
    """
    passes = static.config.passes or (2 if tpu_search.refusal(static, q, k, v) else 1)
    if passes == 1:
        return tpu_search.search(static, q, k, v, live, tokens)
    nk = k.shape[2] // static.block_k
    every = jnp.arange(nk, dtype=jnp.int32).reshape(1, 1, 1, nk)  # one list for all rows
    count = jnp.full((1, 1, 1), nk, jnp.int32)
    mask = BlockMask(every, count, None, None, static.block_q, static.block_k, q.shape[2], k.shape[2])
    out, lse = attention.forward(static, q, k, v, mask, tokens)
    lse = jnp.where(jnp.arange(q.shape[2]) < live[:, None, None], lse, -jnp.inf)
    return out, lse, scores(static, q, k, lse, tokens)
