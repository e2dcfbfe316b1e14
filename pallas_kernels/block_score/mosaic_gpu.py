"""Block masses on Hopper GPUs: the walk of the attention kernels over all blocks.

A search goes over the keys once where there is room to keep every query's log-sum-exp in every step of keys, one head or more
at a time: the sum of a row is at hand anyway, and keeping it costs a store. Where there is none, and for a known log-sum-exp,
a kernel of its own adds the weights of a step up: along rows within threads, then over the 64 rows by way of shared memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention import mosaic_gpu as attention
from pallas_kernels.common import mosaic_gpu as hopper
from pallas_kernels.common.attention_mosaic_gpu import Rules, base2, refusal, rule_inputs, split
from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens, finite_lse
from pallas_kernels.common.block_mask import BlockMask
from pallas_kernels.common.mosaic_gpu_tile import column_layout, load, over, product, row_layout
from pallas_kernels.common.xla import padded

__all__ = ["refusal", "scores", "search"]
KEPT = 2 << 30  # bytes that a search may take for what it keeps


def _kernel(static: Static, tokens: Tokens, p: hopper.Plan, shared: int, *references: Any) -> None:
    found, numbers, segments, refs = split(tokens, 2, references)
    q, k, shift, out, streamed, own, totals, (arrived, filled, emptied) = refs
    batch, head, tile = (jax.lax.axis_index(name) for name in ("batch", "head", "tile"))
    walk, interpret = hopper.Walk(p, found, (batch, head, 0)), static.interpret

    def copy() -> None:
        at = (batch, jax.lax.div(head, shared))
        sources = [lambda start: [(k.at[(*at, pl.ds(start, p.step))], streamed[0])]]
        hopper.drain(hopper.feed(walk, 0, sources, filled, emptied), p.buffers, emptied)

    def compute(worker: Any) -> None:
        half = tile * hopper.WORKERS + worker
        first = half * hopper.ROWS
        plgpu.copy_gmem_to_smem(q.at[batch, head, pl.ds(first, hopper.ROWS)], own[0].at[worker], arrived.at[worker])
        plgpu.barrier_wait(arrived.at[worker])
        rules = Rules(tokens, numbers, segments, batch, first, interpret)
        less = load(shift.at[batch, head, pl.ds(first, hopper.ROWS)], row_layout, interpret)

        def turn(step: Any, _: None) -> None:
            slot = hopper.slot_of(step, p.buffers)
            plgpu.barrier_wait(filled[0].at[slot])
            z, _unused = base2(static, product(own[0].at[worker], streamed[0].at[slot], interpret))
            plgpu.barrier_arrive(emptied[0].at[slot])
            z = rules.hide(z, walk.start(step) if tokens.any else 0)
            rows = totals.at[worker]
            rows[...] = jnp.exp2(z - over(less, z.shape)).sum(axis=1)
            out[batch, head, half, step] = load(rows, column_layout, interpret).sum()

        jax.lax.fori_loop(0, walk.steps(), turn, None)

    hopper.roles(compute, copy, hopper.FORWARD)


def scores(static: Static, q: Any, k: Any, lse: Any, tokens: Tokens) -> Any:
    """Masses for a known log-sum-exp."""
    batch, heads, queries, _ = q.shape
    nq, nk = queries // static.block_q, k.shape[2] // static.block_k
    q, k = padded(padded(q, 3, 64), 2, hopper.TILE), padded(k, 3, 64)
    p = attention.forward_plan(static, q.shape[-1], 0)
    assert p is not None  # features and blocks that `refusal` lets through have one
    every, shift = _every(static, q, k), padded(finite_lse(lse) * LOG2E, 2, hopper.TILE)
    inputs = [every.kv_idx, every.kv_cnt, *rule_inputs(tokens, batch, k.shape[2]), q, k, shift]
    halves = q.shape[2] // hopper.ROWS
    buffers, rows = hopper.scratch(p, q.dtype, [k.shape[-1]], [q.shape[-1]])
    types = (buffers, rows, plgpu.SMEM((hopper.WORKERS, hopper.ROWS), jnp.float32),
             (plgpu.Barrier(num_barriers=hopper.WORKERS), *hopper.barriers(p, [1])))  # fmt: skip
    found = hopper.call(
        functools.partial(_kernel, static, tokens, p, heads // k.shape[1]), "block_scores",
        (batch, heads, halves // hopper.WORKERS), [jax.ShapeDtypeStruct((batch, heads, halves, nk * p.parts), jnp.float32)],
        types, inputs, static.interpret,
    )[0]  # fmt: skip
    found = found[:, :, : queries // hopper.ROWS]  # what is behind belongs to no query
    return found.reshape(batch, heads, nq, static.block_q // hopper.ROWS, nk, p.parts).sum((3, 5))


def _every(static: Static, q: Any, k: Any) -> BlockMask:
    sizes = {"block_q": static.block_q, "block_k": static.block_k, "q_size": q.shape[2], "kv_size": k.shape[2]}
    return BlockMask.one_list(**sizes)


def search(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens) -> tuple[Any, Any, Any]:
    """(out or None, log-sum-exp, masses), in one pass or, where that would keep too much, two."""
    kv_heads, keys = k.shape[1], k.shape[2]
    passes, at_once = static.config.passes, _heads_at_once(q.shape, kv_heads, keys)
    if passes == 2 or (passes is None and at_once is None):
        out, lse, _ = _dense(static, q, k, v, live, tokens, keep=False)
        return out, lse, scores(static, q, k, lse, tokens)
    at_once, shared = at_once or 1, q.shape[1] // kv_heads

    def some(group: Any) -> Any:
        heads: list[Any] = [
            x if x is None else jax.lax.dynamic_slice_in_dim(x, group * at_once * n, at_once * n, 1)
            for x, n in ((q, shared), (k, 1), (v, 1))
        ]
        q1, k1, v1 = heads
        out, lse, sums = _dense(static, q1, k1, v1, live, tokens, keep=True)
        nq, nk = q1.shape[2] // static.block_q, keys // static.block_k
        sums = sums[..., : q1.shape[2]].reshape(*q1.shape[:2], nk, -1, nq, static.block_q)
        known = (finite_lse(lse) * LOG2E).reshape(*q1.shape[:2], 1, 1, nq, static.block_q)
        return out, lse, jnp.exp2(sums - known).sum((3, 5)).swapaxes(2, 3)

    if at_once == kv_heads:
        return some(0)
    parts = jax.lax.map(some, jnp.arange(kv_heads // at_once))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), parts)


def _heads_at_once(queries: tuple[int, ...], kv_heads: int, keys: int) -> int | None:
    """The most key heads, a divisor of their number, for which a search may keep what it must; None if not for one."""
    batch, heads, tokens, _ = queries
    one = 4 * batch * (heads // kv_heads) * tokens * (keys // hopper.ROWS)  # no step has fewer keys
    return next((n for n in range(kv_heads, 0, -1) if kv_heads % n == 0 and n * one <= KEPT), None)


def _dense(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens, *, keep: bool) -> Any:
    out, lse, sums = attention.attend(static, q, k, v, _every(static, q, k), tokens, keep=keep)
    return out, jnp.where(jnp.arange(q.shape[2]) < live[:, None, None], lse, -jnp.inf), sums
