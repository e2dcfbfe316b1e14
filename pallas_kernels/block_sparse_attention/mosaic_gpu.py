"""Block-sparse attention on Hopper GPUs (H100, H200): 128 queries a program, their listed keys fetched while others multiply.

Two warpgroups compute, 64 queries each, over one list; blocks of 64 queries are taken in pairs over the union of their lists,
and who does not own an entry skips it. Products run on the tensor cores from shared memory, sums and softmax are float32 in
registers, in base 2. Steps whose pairs all count (told from block ids) spend nothing on masks. Gradients: the module beside.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.mosaic_gpu_backward import key_gradients, query_gradient
from pallas_kernels.common import mosaic_gpu as hopper
from pallas_kernels.common.attention_mosaic_gpu import FLOOR, Rules, base2, refusal, rule_inputs, split
from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens
from pallas_kernels.common.block_mask import BlockMask
from pallas_kernels.common.mosaic_gpu_tile import add_product, full_of, over, product
from pallas_kernels.common.xla import padded

__all__ = ["attend", "forward", "key_gradients", "query_gradient", "refusal"]


def forward_plan(static: Static, features: int, values: int) -> hopper.Plan | None:
    """How the forward pass walks; values 0: only the log-sum-exp is wanted."""
    own = 2 * hopper.TILE * (features + (values if values != features else 0))
    return hopper.plan(static.block_q, static.block_k, 128 if values <= 128 else 64, own, 2 * (features + values))


def _forward_kernel(static: Static, tokens: Tokens, p: hopper.Plan, shared: int, values: bool, lists: int, keep: bool,
                    *references: Any) -> None:  # fmt: skip
    found, numbers, segments, refs = split(tokens, lists, references)
    q, k = refs.pop(0), refs.pop(0)
    v: Any = refs.pop(0) if values else None
    out: Any = refs.pop(0) if values else None
    lse = refs.pop(0)
    sums: Any = refs.pop(0) if keep else None
    streamed, own, lse_rows, (arrived, filled, emptied) = refs
    batch, head, tile = (jax.lax.axis_index(name) for name in ("batch", "head", "tile"))
    walk = hopper.Walk(p, found, (batch, head, p.list_of(tile)))
    at, interpret, keys = (batch, jax.lax.div(head, shared)), static.interpret, streamed[0]

    def copy() -> None:
        sources = [
            lambda start, x=x, to=to: [(x.at[(*at, pl.ds(start, p.step))], to)]
            for x, to in zip((k, v), streamed)
        ]  # fmt: skip
        hopper.drain(hopper.feed(walk, 0, sources, filled, emptied), p.buffers, emptied)

    def compute(worker: Any) -> None:
        first = tile * hopper.TILE + worker * hopper.ROWS
        query, to = own[0].at[worker], own[-1].at[worker]
        mine = (batch, head, pl.ds(first, hopper.ROWS))
        plgpu.copy_gmem_to_smem(q.at[mine], query, arrived.at[worker])
        plgpu.barrier_wait(arrived.at[worker])
        rules = Rules(tokens, numbers, segments, batch, first, interpret)

        def turn(step: Any, carry: Any) -> Any:
            slot, skipped = hopper.slot_of(step, p.buffers), walk.owned(step, worker)
            start = walk.start(step) if tokens.any else 0
            plgpu.barrier_wait(filled[0].at[slot])

            def attend(carry: Any) -> Any:
                top, total, acc = carry
                z, _ = base2(static, product(query, keys.at[slot], interpret))
                plgpu.barrier_arrive(emptied[0].at[slot])
                z = rules.hide(z, start)
                new = jnp.maximum(top, z.max(axis=1))
                e, old = jnp.exp2(z - over(new, z.shape)), jnp.exp2(top - new)
                part = e.sum(axis=1)
                total = old * total + part
                if keep:
                    sums[batch, head, step, pl.ds(first, hopper.ROWS)] = new + jnp.log(part) * LOG2E
                if values:
                    acc = acc * over(old, acc.shape)
                    weights = e.astype(v.dtype)
                    plgpu.barrier_wait(filled[1].at[slot])
                    acc = add_product(acc, weights, streamed[1].at[slot], interpret)
                    plgpu.barrier_arrive(emptied[1].at[slot])
                return new, total, acc

            def pass_by(carry: Any) -> Any:
                # Waited for all the same: else a worker would run ahead and let go of buffers that are not yet filled.
                plgpu.barrier_arrive(emptied[0].at[slot])
                if values:
                    plgpu.barrier_wait(filled[1].at[slot])
                    plgpu.barrier_arrive(emptied[1].at[slot])
                return carry

            return attend(carry) if skipped is None else jax.lax.cond(skipped, attend, pass_by, carry)

        start = (full_of((hopper.ROWS,), FLOOR, interpret), full_of((hopper.ROWS,), 0, interpret),
                 full_of((hopper.ROWS, v.shape[-1]), 0, interpret) if values else 0)  # fmt: skip
        top, total, acc = jax.lax.fori_loop(0, walk.steps(), turn, start)
        alive = total != 0  # not-a-number stays what it is
        safe = jnp.where(alive, total, jnp.full_like(total, 1))
        rows = lse_rows.at[worker]
        rows[...] = jnp.where(alive, top / LOG2E + jnp.log(safe), jnp.full_like(total, -jnp.inf))
        if values:
            inverse = jnp.where(alive, 1 / safe, jnp.full_like(total, 0))
            to[...] = (acc * over(inverse, acc.shape)).astype(out.dtype)
        plgpu.commit_smem()
        if values:
            plgpu.copy_smem_to_gmem(to, out.at[mine])
        plgpu.copy_smem_to_gmem(rows, lse.at[mine])
        plgpu.wait_smem_to_gmem(0)

    hopper.roles(compute, copy, hopper.FORWARD)


def forward(static: Static, q: Any, k: Any, v: Any | None, mask: BlockMask, tokens: Tokens) -> tuple[Any, Any]:
    """(out, log-sum-exp); without values only the latter, and None."""
    return attend(static, q, k, v, mask, tokens, keep=False)[:2]


def attend(static: Static, q: Any, k: Any, v: Any | None, mask: BlockMask, tokens: Tokens, *, keep: bool) -> Any:
    """(out or None, log-sum-exp, sums): to `keep` is the base-2 log-sum-exp of each query in each step of its list.

    Sums are (batch, heads, steps of the longest list, queries), undefined behind the end of a list.
    """
    batch, heads, queries, _ = q.shape
    keys, shared, features = k.shape[2], heads // k.shape[1], 0 if v is None else v.shape[-1]
    q, k, v = (x if x is None else padded(x, 3, 64) for x in (q, k, v))
    q = padded(q, 2, hopper.TILE)
    p = forward_plan(static, q.shape[-1], 0 if v is None else v.shape[-1])
    assert p is not None  # features and blocks that `refusal` lets through have one
    lists = hopper.lists_of(p, mask.kv_idx, mask.kv_cnt, mask.kv_blocks)
    values = v is not None
    arrays = [k, v] if values else [k]
    inputs = [*lists, *rule_inputs(tokens, batch, keys), q, *arrays]
    out = [jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype)] if values else []
    out.append(jax.ShapeDtypeStruct(q.shape[:3], jnp.float32))
    if keep:
        steps = lists[0].shape[-1] * p.parts
        out.append(jax.ShapeDtypeStruct((batch, heads, steps, q.shape[2]), jnp.float32))
    own = {q.shape[-1]: None} | ({v.shape[-1]: None} if values else {})  # out takes the queries' place where it fits
    buffers, rows = hopper.scratch(p, q.dtype, [x.shape[-1] for x in arrays], list(own))
    kernel = functools.partial(_forward_kernel, static, tokens, p, shared, values, len(lists), keep)
    types = (buffers, rows, plgpu.SMEM((hopper.WORKERS, hopper.ROWS), jnp.float32),
             (plgpu.Barrier(num_barriers=hopper.WORKERS), *hopper.barriers(p, [1] * len(arrays))))  # fmt: skip
    grid = (batch, heads, q.shape[2] // hopper.TILE)
    given = list(hopper.call(kernel, "block_sparse_attention", grid, out, types, inputs, static.interpret))
    sums = given.pop() if keep else None
    lse = given.pop()
    return (given[0][:, :, :queries, :features] if given else None), lse[:, :, :queries], sums
