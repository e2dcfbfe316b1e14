"""Block-sparse attention on TPU: one program a query block, its list in scalar memory, its keys fetched block by block.

Keys and values stay in HBM. A step of the loop over a list copies `step_tokens` of them into one of two buffers in VMEM while
the step before multiplies from the other; the loop is as long as the list. Steps whose pairs all count (told from the block
ids alone) spend nothing on masks. Sums and softmax are float32, in base 2; float32 products are not rounded to bfloat16.
The gradient of the queries walks the same lists; that of keys and values is one program a key block over the transposed
ones, for all query heads that share it, with products transposed so that each query's numbers lie along lanes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens, finite_lse
from pallas_kernels.common.attention_tpu import NEVER, Rules, base2, refusal, rule_specs, split
from pallas_kernels.common.block_mask import BlockMask
from pallas_kernels.common.tpu import (
    ABSENT,
    Walk,
    buffers_of,
    call,
    column,
    dot,
    fetching,
    group_of,
    held,
    joined,
    list_specs,
    row,
)
from pallas_kernels.common.xla import padded

__all__ = ["forward", "key_gradients", "query_gradient", "refusal"]


def _wide(static: Static, tokens: Tokens, side: str) -> tuple[Static, Tokens]:
    """The problem with several blocks of one side ("q" or "kv") as one."""
    name, ids = ("block_q", "q_segments") if side == "q" else ("block_k", "kv_segments")
    size = getattr(static, name) * static.config.blocks_together
    if tokens.q_segments is not None:
        tokens = tokens._replace(**{ids: padded(getattr(tokens, ids), 1, size)})
    return dataclasses.replace(static, **{name: size}), tokens


def _mine(rows: int, features: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, rows, features), lambda b, h, p: (b, h, p, 0))


def _forward_kernel(static: Static, tokens: Tokens, group: int, shared: int, lists: int, resident: bool, values: bool,
                    *references: Any) -> None:  # fmt: skip
    found, numbers, segments, refs = split(tokens, lists, references)
    q, k = refs.pop(0), refs.pop(0)
    v = refs.pop(0) if values else None
    out = refs.pop(0) if values else None
    lse, *buffers = refs
    at = (0, 0) if resident else (pl.program_id(0), pl.program_id(1) // shared)
    sources = [x.at[at] for x in (k, v) if x is not None]
    walk = Walk(found, group, static.block_k, sources, buffers, static.config.blocks_together)
    rules = Rules(tokens, numbers, segments, pl.program_id(2) * static.block_q, static.block_q)
    query = q[...]
    step_tokens = group * static.block_k
    lanes = 128 if step_tokens % 128 == 0 else step_tokens  # sums are taken along them after the loop only

    def body(step: Any, slot: Any, carry: Any) -> Any:
        def update(carry: Any, ok: Any = None) -> Any:
            top, total, acc = carry
            z, _ = base2(static, dot(query, walk.fetched(0, step, slot), transpose=True))
            z = z if ok is None else jnp.where(ok, z, NEVER)
            new = jnp.maximum(top, z.max(1, keepdims=True))
            e = jnp.exp2(z - new)
            e = e if ok is None else jnp.where(ok, e, 0)
            old = jnp.exp2(top - new)
            if v is not None:
                acc = old * acc + dot(e.astype(v.dtype), walk.fetched(1, step, slot))
            return new, old * total + sum(e[:, n : n + lanes] for n in range(0, e.shape[1], lanes)), acc

        return rules.choose(walk, step, update, update, carry)

    n = static.block_q
    zero = jnp.zeros((n, v.shape[-1] if v is not None else 1), jnp.float32)
    start = jnp.full((n, 1), NEVER, jnp.float32), jnp.zeros((n, lanes), jnp.float32), zero
    top, total, acc = walk.run(body, start)
    total = total.sum(1, keepdims=True)
    alive = total != 0  # not-a-number stays what it is
    safe = jnp.where(alive, total, 1)
    lse[...] = row(jnp.where(alive, (top + jnp.log2(safe)) / LOG2E, -jnp.inf))
    if out is not None:
        out[...] = jnp.where(alive, acc / safe, 0).astype(out.dtype)


def forward(static: Static, q: Any, k: Any, v: Any | None, mask: BlockMask, tokens: Tokens) -> tuple[Any, Any]:
    """(out, log-sum-exp); without values only the latter, and None."""
    batch, heads, queries, features = q.shape
    lists = joined(static.config.blocks_together, mask.kv_idx, mask.kv_cnt, mask.kv_blocks)
    group, width = group_of(static.config.step_tokens, lists[0].shape[-1], static.block_k), lists[0].shape[-1]
    static, tokens = _wide(static, tokens, "q")
    q, bq = padded(q, 2, static.block_q), static.block_q
    grid = (batch, heads, q.shape[2] // bq)
    arrays, shared = ([k] if v is None else [k, v]), heads // k.shape[1]
    list_arrays, list_blocks = list_specs(lists)
    rules, rule_blocks = rule_specs(static, k.shape[2], tokens, batch)
    sources, resident, limit = held(static.config.resident, arrays, 2, lambda h: h // shared)
    out = [jax.ShapeDtypeStruct((*grid, 1, bq), jnp.float32)]
    out_specs = [pl.BlockSpec((None, None, None, 1, bq), lambda b, h, p: (b, h, p, 0, 0))]
    if v is not None:
        out.insert(0, jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype))
        out_specs.insert(0, _mine(bq, v.shape[-1]))
    kernel = functools.partial(_forward_kernel, static, tokens, group, shared, len(lists), resident, v is not None)
    *given, lse = call(
        kernel, "block_sparse_attention", grid, [*list_arrays, *rules, q, *arrays],
        [*list_blocks, *rule_blocks, _mine(bq, features), *sources], out, out_specs,
        buffers_of(arrays, group * static.block_k, resident), features=sum(x.shape[-1] for x in arrays), vmem_bytes=limit,
        interpret=static.interpret,
        **fetching(arrays, bq, math.prod(q.shape[:3]) * width * static.block_k),
    )  # fmt: skip
    return (given[0][:, :, :queries] if given else None), lse.reshape(q.shape[:3])[..., :queries]


def _query_kernel(static: Static, tokens: Tokens, group: int, shared: int, lists: int, resident: bool,
                  *references: Any) -> None:  # fmt: skip
    found, numbers, segments, refs = split(tokens, lists, references)
    q, dout, lse, delta, k, v, dq, *buffers = refs
    at = (0, 0) if resident else (pl.program_id(0), pl.program_id(1) // shared)
    walk = Walk(found, group, static.block_k, [k.at[at], v.at[at]], buffers, static.config.blocks_together)
    rules = Rules(tokens, numbers, segments, pl.program_id(2) * static.block_q, static.block_q)
    query, d, shift, less = q[...], dout[...], column(lse[...]), column(delta[...])

    def body(step: Any, slot: Any, acc: Any) -> Any:
        def update(acc: Any, ok: Any = None) -> Any:
            keys = walk.fetched(0, step, slot)
            z, slope = base2(static, dot(query, keys, transpose=True))
            w = jnp.exp2(z - shift)
            ds = w * (dot(d, walk.fetched(1, step, slot), transpose=True) - less) * slope
            ds = ds if ok is None else jnp.where(ok, ds, 0)
            return acc + dot(ds.astype(k.dtype), keys)

        return rules.choose(walk, step, update, update, acc)

    dq[...] = walk.run(body, jnp.zeros(q.shape, jnp.float32)).astype(dq.dtype)


def query_gradient(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                   tokens: Tokens) -> Any:  # fmt: skip
    """Gradient of the queries, over the lists of the forward pass."""
    batch, heads, queries, features = q.shape
    lists = joined(static.config.blocks_together, mask.kv_idx, mask.kv_cnt, mask.kv_blocks)
    group, width = group_of(static.config.step_tokens, lists[0].shape[-1], static.block_k), lists[0].shape[-1]
    static, tokens = _wide(static, tokens, "q")
    q, dout, shift, delta = (padded(x, 2, static.block_q) for x in (q, dout, finite_lse(lse) * LOG2E, delta))
    bq, shared = static.block_q, heads // k.shape[1]
    grid = (batch, heads, q.shape[2] // bq)
    list_arrays, list_blocks = list_specs(lists)
    rules, rule_blocks = rule_specs(static, k.shape[2], tokens, batch)
    sources, resident, limit = held(static.config.resident, [k, v], 2, lambda h: h // shared)
    number = pl.BlockSpec((None, None, None, 1, bq), lambda b, h, p: (b, h, p, 0, 0))
    dq = call(
        functools.partial(_query_kernel, static, tokens, group, shared, len(lists), resident),
        "block_sparse_attention_dq", grid,
        [*list_arrays, *rules, q, dout, shift.reshape(*grid, 1, bq), delta.reshape(*grid, 1, bq), k, v],
        [*list_blocks, *rule_blocks, _mine(bq, features), _mine(bq, v.shape[-1]), number, number, *sources],
        jax.ShapeDtypeStruct(q.shape, q.dtype), _mine(bq, features),
        buffers_of([k, v], group * static.block_k, resident),
        features=2 * features + v.shape[-1], vmem_bytes=limit, interpret=static.interpret,
        **fetching([k, v], bq, math.prod(q.shape[:3]) * width * static.block_k),
    )  # fmt: skip
    return dq[:, :, :queries]


def _key_kernel(static: Static, tokens: Tokens, group: int, shared: int, lists: int, resident: bool,
                *references: Any) -> None:  # fmt: skip
    found, numbers, segments, refs = split(tokens, lists, references)
    k, v, lse, delta, q, dout, dk, dv, *buffers = refs
    at = (0, 0) if resident else (pl.program_id(0), pl.program_id(1))
    bq, bk = static.block_q, static.block_k
    limit, offset, causal = numbers[0, 0], numbers[0, 1], tokens.q_offset is not None
    last = (pl.program_id(2) + 1) * bk - 1  # key of these blocks
    key, value = k[...], v[...]
    own = last - bk + 1 + jax.lax.broadcasted_iota(jnp.int32, (bk, 1), 0)

    def of_head(r: Any, carry: Any) -> Any:
        mine = [x.at[r if x.shape[0] > 1 else 0] for x in found]
        walk = Walk(mine, group, bq, [q.at[(*at, r)], dout.at[(*at, r)]], buffers, static.config.blocks_together)

        def along_lanes(of: Any, step: Any) -> Any:
            return jnp.concatenate([of[pl.ds(walk.entry(step, t), 1), :] for t in range(group)], axis=1)

        def body(step: Any, slot: Any, carry: Any) -> Any:
            at = walk.positions(step)

            def update(carry: Any, ok: Any = None) -> Any:
                query, d = (walk.fetched(n, step, slot) for n in (0, 1))
                shift = jnp.where(at < ABSENT, along_lanes(lse.at[r], step), -NEVER)  # fetched twice, weighs nothing
                z, slope = base2(static, dot(key, query, transpose=True))
                w = jnp.exp2(z - shift)
                w = w if ok is None else jnp.where(ok, w, 0)
                ds = w * (dot(value, d, transpose=True) - along_lanes(delta.at[r], step)) * slope
                ds = ds if ok is None else jnp.where(ok, ds, 0)  # a weight of 0 hides no infinite value
                return carry[0] + dot(ds.astype(q.dtype), query), carry[1] + dot(w.astype(dout.dtype), d)

            def pairs() -> Any:
                ok = jnp.broadcast_to(own < limit, (bk, at.shape[1]))
                if causal:
                    ok &= own <= at + offset
                if segments:
                    ok &= column(segments[1][...]) == along_lanes(segments[0], step)
                return ok & walk.owned(step, bk) if walk.together > 1 else ok

            if segments:
                return update(carry, pairs())
            all_count = (last < limit) & walk.owned_by_all(step)
            if causal:
                first = functools.reduce(jnp.minimum, [walk.entry(step, t) for t in range(group)]) * bq
                all_count &= last <= first + offset
            return jax.lax.cond(all_count, update, lambda c: update(c, pairs()), carry)

        return walk.run(body, carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    gradients = jax.lax.fori_loop(0, shared, of_head, start)
    dk[...], dv[...] = gradients[0].astype(dk.dtype), gradients[1].astype(dv.dtype)


def key_gradients(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                  tokens: Tokens) -> tuple[Any, Any]:  # fmt: skip
    """Gradients of keys and values, over the transposed lists, summed over the query heads that share a key head."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys, bq = k.shape[1], k.shape[2], static.block_q
    shared = heads // kv_heads

    def grouped(x: Any) -> Any:  # heads as (key heads, those that share one)
        return x.reshape(x.shape[0], *((kv_heads, shared) if x.shape[1] > 1 else (1, 1)), *x.shape[2:])

    lists = joined(static.config.blocks_together, mask.q_idx, mask.q_cnt, mask.q_blocks)
    lists = tuple(map(grouped, lists))
    group, width = group_of(static.config.step_tokens, lists[0].shape[-1], bq), lists[0].shape[-1]
    static, tokens = _wide(static, tokens, "kv")
    k, v, bk = padded(k, 2, static.block_k), padded(v, 2, static.block_k), static.block_k
    list_arrays, list_blocks = list_specs(lists)
    rules, rule_blocks = rule_specs(static, keys, tokens, batch, transposed=True)
    whole = pl.BlockSpec((None, None, shared, queries // bq, bq), lambda b, g, r: (b, g, 0, 0, 0))
    q, dout = grouped(q), grouped(dout)
    shift, delta = (grouped(x.reshape(batch, heads, -1, bq)) for x in (finite_lse(lse) * LOG2E, delta))
    sources, resident, limit = held(
        static.config.resident, [q, dout], 2, lambda g: g, more=16 * shared * queries // bq * -(-bq // 128) * 128,
        what="log-sum-exps of all queries of the heads that share keys",
    )  # fmt: skip
    blocks = [_mine(bk, k.shape[-1]), _mine(bk, v.shape[-1])]
    dk, dv = call(
        functools.partial(_key_kernel, static, tokens, group, shared, len(lists), resident),
        "block_sparse_attention_dkv", (batch, kv_heads, k.shape[2] // bk),
        [*list_arrays, *rules, k, v, shift, delta, q, dout],
        [*list_blocks, *rule_blocks, *blocks, whole, whole, *sources],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)], blocks, buffers_of([q, dout], group * bq, resident),
        features=2 * (k.shape[-1] + v.shape[-1]), vmem_bytes=limit, interpret=static.interpret,
        **fetching([q, dout], bk, shared * math.prod(k.shape[:3]) * width * bq),
    )  # fmt: skip
    return dk[:, :, :keys], dv[:, :, :keys]
