"""Gradients of block-sparse attention on Hopper GPUs: two kernels without atomic sums, so that every run gives the same bits.

That of the queries walks the lists of the forward pass with 128 queries a program. That of keys and values has 128 keys a
program, walks the transposed lists of all query heads that share them, and works on transposed tiles, keys along rows, so that
what belongs to a query lies along columns. Where the two sums do not fit the registers together (beyond 256 features of keys
and values) it runs twice, once for either.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import mosaic_gpu as hopper
from pallas_kernels.common.attention_mosaic_gpu import Rules, base2, rule_inputs, split
from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens, finite_lse
from pallas_kernels.common.block_mask import BlockMask
from pallas_kernels.common.mosaic_gpu_tile import add_product, column_layout, full_of, load, over, product, row_layout
from pallas_kernels.common.xla import padded

TOGETHER = 256  # features of keys and values whose gradients fit the registers at once
STEP = 64  # a tile of logits, one of their gradients and a sum of 128 features share the registers


def query_plan(static: Static, features: int, values: int) -> hopper.Plan | None:
    """How the gradient of the queries walks."""
    return hopper.plan(
        static.block_q, static.block_k, STEP, 2 * hopper.TILE * (features + values), 2 * (features + values)
    )


def key_plan(static: Static, features: int, values: int) -> hopper.Plan | None:
    """How the gradients of keys and values walk."""
    return hopper.plan(
        static.block_k, static.block_q, STEP, 2 * hopper.TILE * (features + values), 2 * (features + values)
    )


def _query_kernel(static: Static, tokens: Tokens, p: hopper.Plan, shared: int, lists: int, *references: Any) -> None:
    found, numbers, segments, refs = split(tokens, lists, references)
    q, dout, shift, delta, k, v, dq, (keys, values), (query, cotangent), (arrived, filled, emptied) = refs
    batch, head, tile = (jax.lax.axis_index(name) for name in ("batch", "head", "tile"))
    walk, interpret = hopper.Walk(p, found, (batch, head, p.list_of(tile))), static.interpret

    def copy() -> None:
        def of(x: Any, to: Any) -> Any:
            return lambda start: [(x.at[batch, jax.lax.div(head, shared), pl.ds(start, p.step)], to)]

        hopper.drain(hopper.feed(walk, 0, [of(k, keys), of(v, values)], filled, emptied), p.buffers, emptied)

    def compute(worker: Any) -> None:
        first = tile * hopper.TILE + worker * hopper.ROWS
        mine = (batch, head, pl.ds(first, hopper.ROWS))
        plgpu.copy_gmem_to_smem(q.at[mine], query.at[worker], arrived.at[worker])
        plgpu.copy_gmem_to_smem(dout.at[mine], cotangent.at[worker], arrived.at[worker])
        plgpu.barrier_wait(arrived.at[worker])
        rules = Rules(tokens, numbers, segments, batch, first, interpret)
        top, less = (load(x.at[mine], row_layout, interpret) for x in (shift, delta))

        def turn(step: Any, acc: Any) -> Any:
            slot, mine = hopper.slot_of(step, p.buffers), walk.owned(step, worker)
            for full in filled:
                plgpu.barrier_wait(full.at[slot])

            def add(acc: Any) -> Any:
                z, slope = base2(static, product(query.at[worker], keys.at[slot], interpret))
                z = rules.hide(z, walk.start(step) if tokens.any else 0)
                w = jnp.exp2(z - over(top, z.shape))
                ds = w * (product(cotangent.at[worker], values.at[slot], interpret) - over(less, z.shape))
                ds = ds if slope is None else ds * slope
                return add_product(acc, ds.astype(k.dtype), keys.at[slot], interpret)

            acc = add(acc) if mine is None else jax.lax.cond(mine, add, lambda acc: acc, acc)
            for empty in emptied:
                plgpu.barrier_arrive(empty.at[slot])
            return acc

        acc = jax.lax.fori_loop(0, walk.steps(), turn, full_of((hopper.ROWS, q.shape[-1]), 0, interpret))
        query.at[worker][...] = (acc * static.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query.at[worker], dq.at[mine])
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(compute, copy, hopper.BACKWARD)


def query_gradient(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                   tokens: Tokens) -> Any:  # fmt: skip
    """Gradient of the queries, over the lists of the forward pass."""
    batch, heads, queries, features = q.shape
    keys, shared = k.shape[2], heads // k.shape[1]
    q, dout, k, v = (padded(x, 3, hopper.ROWS) for x in (q, dout, k, v))
    q, dout, shift, delta = (padded(x, 2, hopper.TILE) for x in (q, dout, finite_lse(lse) * LOG2E, delta))
    p = query_plan(static, q.shape[-1], v.shape[-1])
    assert p is not None  # features and blocks that `refusal` lets through have one
    lists = hopper.lists_of(p, mask.kv_idx, mask.kv_cnt, mask.kv_blocks)
    sizes = [q.shape[-1], v.shape[-1]]
    kernel = functools.partial(_query_kernel, static, tokens, p, shared, len(lists))
    types = (
        *hopper.scratch(p, q.dtype, sizes, sizes),
        (plgpu.Barrier(num_arrivals=2, num_barriers=hopper.WORKERS), *hopper.barriers(p, [1, 1])),
    )
    inputs = [*lists, *rule_inputs(tokens, batch, keys), q, dout, shift, delta, k, v]
    grid, out = (batch, heads, q.shape[2] // hopper.TILE), [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    dq = hopper.call(kernel, "block_sparse_attention_dq", grid, out, types, inputs, static.interpret)
    return dq[0][:, :, :queries, :features]


def _key_kernel(
    static: Static, tokens: Tokens, p: hopper.Plan, shared: int, lists: int, wanted: str, *references: Any
) -> None:
    found, numbers, segments, refs = split(tokens, lists, references)
    k, v, q, dout, shift, delta = refs[:6]
    outs, (streamed, own, (shifts, deltas), (arrived, filled, emptied)) = refs[6:-4], refs[-4:]
    queries, douts = streamed
    of_keys, of_values = "dk" in wanted, "dv" in wanted
    batch, kv_head, tile = (jax.lax.axis_index(name) for name in ("batch", "head", "tile"))
    interpret = static.interpret

    def walk_of(r: Any) -> tuple[Any, hopper.Walk]:
        head = kv_head * shared + r
        return head, hopper.Walk(p, found, (batch, head, p.list_of(tile)))

    def copy() -> None:
        def of_head(r: Any, done: Any) -> Any:
            head, walk = walk_of(r)

            def of(x: Any, to: Any, number: Any, numbers_to: Any) -> Any:
                def copies(start: Any) -> list[tuple[Any, Any]]:
                    at = (batch, head, pl.ds(start, p.step))
                    return [(x.at[at], to), (number.at[at], numbers_to)]

                return copies

            return hopper.feed(
                walk, done, [of(q, queries, shift, shifts), of(dout, douts, delta, deltas)], filled, emptied
            )

        hopper.drain(jax.lax.fori_loop(0, shared, of_head, jnp.int32(0)), p.buffers, emptied)

    def compute(worker: Any) -> None:
        first = tile * hopper.TILE + worker * hopper.ROWS
        mine = (batch, kv_head, pl.ds(first, hopper.ROWS))
        rows = [x.at[worker] for x in own]
        for x, to in zip((k, v), rows):
            plgpu.copy_gmem_to_smem(x.at[mine], to, arrived.at[worker])
        plgpu.barrier_wait(arrived.at[worker])
        rules = Rules(tokens, numbers, segments, batch, first, interpret, transposed=True)

        def of_head(r: Any, carry: Any) -> Any:
            done, grads = carry
            _, walk = walk_of(r)

            def turn(step: Any, grads: Any) -> Any:
                slot, mine = hopper.slot_of(done + step, p.buffers), walk.owned(step, worker)
                for full in filled:
                    plgpu.barrier_wait(full.at[slot])

                def add(grads: Any) -> Any:
                    dk, dv = grads
                    z, slope = base2(static, product(rows[0], queries.at[slot], interpret))
                    z = rules.hide(z, walk.start(step) if tokens.any else 0)
                    w = jnp.exp2(z - over(load(shifts.at[slot], column_layout, interpret), z.shape, 1))
                    slope = w if slope is None else w * slope
                    if of_values:
                        dv = add_product(dv, w.astype(dout.dtype), douts.at[slot], interpret)
                    if of_keys:
                        less = over(load(deltas.at[slot], column_layout, interpret), z.shape, 1)
                        ds = slope * (product(rows[1], douts.at[slot], interpret) - less)
                        dk = add_product(dk, ds.astype(q.dtype), queries.at[slot], interpret)
                    return dk, dv

                grads = add(grads) if mine is None else jax.lax.cond(mine, add, lambda g: g, grads)
                plgpu.commit_smem()  # the next copies come after the plain reads of shifts and deltas
                for empty in emptied:
                    plgpu.barrier_arrive(empty.at[slot])
                return grads

            steps = walk.steps()
            return done + steps, jax.lax.fori_loop(0, steps, turn, grads)

        zeros = tuple(
            full_of((hopper.ROWS, x.shape[-1]), 0, interpret) if on else 0 for x, on in ((k, of_keys), (v, of_values))
        )
        _, (dk, dv) = jax.lax.fori_loop(0, shared, of_head, (jnp.int32(0), zeros))
        given = ([(dk * static.scale, rows[0])] if of_keys else []) + ([(dv, rows[1])] if of_values else [])
        for out, (grad, to) in zip(outs, given):
            to[...] = grad.astype(out.dtype)
        plgpu.commit_smem()
        for out, (_, to) in zip(outs, given):
            plgpu.copy_smem_to_gmem(to, out.at[mine])
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(compute, copy, hopper.BACKWARD)


def key_gradients(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                  tokens: Tokens) -> tuple[Any, Any]:  # fmt: skip
    """Gradients of keys and values, over the transposed lists, summed over the query heads that share a key head."""
    batch, heads, _, _ = q.shape
    kv_heads, keys, features, values = k.shape[1], k.shape[2], k.shape[3], v.shape[3]
    q, k, v, dout = (padded(x, 3, hopper.ROWS) for x in (q, k, v, dout))
    k, v = padded(k, 2, hopper.TILE), padded(v, 2, hopper.TILE)
    p = key_plan(static, k.shape[-1], v.shape[-1])
    assert p is not None  # features and blocks that `refusal` lets through have one
    lists = hopper.lists_of(p, mask.q_idx, mask.q_cnt, mask.q_blocks)
    sizes = [k.shape[-1], v.shape[-1]]
    inputs = [*lists, *rule_inputs(tokens, batch, keys, rows="kv"), k, v, q, dout, finite_lse(lse) * LOG2E, delta]
    vector = plgpu.SMEM((p.buffers, p.step), jnp.float32)
    types = (*hopper.scratch(p, q.dtype, sizes, sizes), (vector, vector),
             (plgpu.Barrier(num_arrivals=2, num_barriers=hopper.WORKERS), *hopper.barriers(p, [2, 2])))  # fmt: skip

    def of(wanted: str, *arrays: Any) -> list[Any]:
        kernel = functools.partial(_key_kernel, static, tokens, p, heads // kv_heads, len(lists), wanted)
        out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        grid = (batch, kv_heads, k.shape[2] // hopper.TILE)
        return hopper.call(kernel, f"block_sparse_attention_{wanted}", grid, out, types, inputs, static.interpret)

    dk, dv = of("dkdv", k, v) if sum(sizes) <= TOGETHER else (*of("dk", k), *of("dv", v))
    return dk[:, :, :keys, :features], dv[:, :, :keys, :values]
