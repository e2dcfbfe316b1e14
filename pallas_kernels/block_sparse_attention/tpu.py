"""Block-sparse attention on TPU: one program a query block, its list in scalar memory, its keys fetched block by block.

Keys and values stay in HBM. A step of the loop over a list copies `step_tokens` of them into one of two buffers in VMEM while
the step before multiplies from the other; the loop is as long as the list. Steps whose pairs all count (told from the block
ids alone) spend nothing on masks. Sums and softmax are float32, in base 2; float32 products are not rounded to bfloat16.
The gradient of the queries walks the same lists; that of keys and values is one program a key block over the transposed
ones, for all query heads that share it, with products transposed so that each query's numbers lie along lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.problem import Static, Tokens, finite_lse
from pallas_kernels.block_sparse_attention.tpu_walk import (
    ABSENT,
    LOG2E,
    NEVER,
    Rules,
    Walk,
    base2,
    call,
    column,
    dot,
    fetching,
    group_of,
    list_specs,
    row,
    rule_specs,
)

SUBLANES = 16  # rows of a tile of bfloat16


def refusal(static: Static, q: Any, k: Any, v: Any | None, tokens: Tokens) -> str | None:
    """Why these kernels cannot run, or None."""
    for name, block in (("block_q", static.block_q), ("block_k", static.block_k)):
        if block % SUBLANES:
            return f"{name} is {block}, not a multiple of {SUBLANES}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"arrays are {q.dtype}, not float32 or bfloat16"
    if not static.interpret and not pltpu.is_tpu_device():
        return f"the device is {jax.devices()[0].device_kind}, no TPU (interpret=True runs them anywhere, slowly)"
    return None


def _forward_kernel(static: Static, tokens: Tokens, group: int, shared: int, values: bool, *arrays: Any) -> None:
    idx, cnt, numbers, *refs = arrays
    segments = (refs.pop(0), refs.pop(0)) if tokens.q_segments is not None else None
    q, k = refs.pop(0), refs.pop(0)
    v = refs.pop(0) if values else None
    out = refs.pop(0) if values else None
    lse, keys, *more, semaphores = refs
    batch, head = pl.program_id(0), pl.program_id(1) // shared
    sources = [(k.at[batch, head], keys)] + ([(v.at[batch, head], more[0])] if v is not None else [])
    walk = Walk(lambda t: idx[0, t], cnt[0, 0], group, static.block_k, sources, semaphores)
    rules = Rules(static, tokens, numbers, segments, pl.program_id(2) * static.block_q, static.block_q)
    query = q[...]

    def body(step: Any, slot: Any, carry: Any) -> Any:
        def update(carry: Any, ok: Any = None) -> Any:
            top, total, acc = carry
            z, _ = base2(static, dot(query, keys[slot], transpose=True))
            z = z if ok is None else jnp.where(ok, z, NEVER)
            new = jnp.maximum(top, z.max(1, keepdims=True))
            e = jnp.exp2(z - new)
            e = e if ok is None else jnp.where(ok, e, 0)
            old = jnp.exp2(top - new)
            if v is not None:
                acc = old * acc + dot(e.astype(v.dtype), more[0][slot])
            return new, old * total + e.sum(1, keepdims=True), acc

        return rules.choose(walk, step, update, update, carry)

    n = static.block_q
    zero = jnp.zeros((n, v.shape[-1] if v is not None else 1), jnp.float32)
    top, total, acc = walk.run(body, (jnp.full((n, 1), NEVER, jnp.float32), jnp.zeros((n, 1), jnp.float32), zero))
    alive = total != 0  # not-a-number stays what it is
    safe = jnp.where(alive, total, 1)
    lse[...] = row(jnp.where(alive, (top + jnp.log2(safe)) / LOG2E, -jnp.inf))
    if out is not None:
        out[...] = jnp.where(alive, acc / safe, 0).astype(out.dtype)


def forward(static: Static, q: Any, k: Any, v: Any | None, mask: BlockMask, tokens: Tokens) -> tuple[Any, Any]:
    """(out, log-sum-exp); without values only the latter, and None."""
    batch, heads, queries, features = q.shape
    group, bq = group_of(static, mask.width, static.block_k), static.block_q
    rows, keys = queries // bq, k.shape[2]
    lists, list_blocks = list_specs(mask.kv_idx, mask.kv_cnt)
    rules, rule_blocks = rule_specs(static, keys, tokens, batch)
    arrays = [k] if v is None else [k, v]

    def mine(n: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, bq, n), lambda b, h, p: (b, h, p, 0))

    out = [jax.ShapeDtypeStruct((batch, heads, rows, 1, bq), jnp.float32)]
    out_specs = [pl.BlockSpec((None, None, None, 1, bq), lambda b, h, p: (b, h, p, 0, 0))]
    if v is not None:
        out.insert(0, jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype))
        out_specs.insert(0, mine(v.shape[-1]))
    pairs = batch * heads * queries * mask.width * static.block_k
    kernel = functools.partial(_forward_kernel, static, tokens, group, heads // k.shape[1], v is not None)
    *given, lse = call(
        kernel, static, "block_sparse_attention", (batch, heads, rows), [*lists, *rules, q, *arrays],
        [*list_blocks, *rule_blocks, mine(features), *[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays)], out, out_specs,
        [pltpu.VMEM((2, group * static.block_k, x.shape[-1]), x.dtype) for x in arrays]
        + [pltpu.SemaphoreType.DMA((2, len(arrays)))],
        features=sum(x.shape[-1] for x in arrays), **fetching(arrays, static.block_q, pairs),
    )  # fmt: skip
    return (given[0] if given else None), lse.reshape(q.shape[:3])


def _query_kernel(static: Static, tokens: Tokens, group: int, shared: int, *arrays: Any) -> None:
    idx, cnt, numbers, *refs = arrays
    segments = (refs.pop(0), refs.pop(0)) if tokens.q_segments is not None else None
    q, dout, lse, delta, k, v, dq, keys, values, semaphores = refs
    batch, head = pl.program_id(0), pl.program_id(1) // shared
    sources = [(k.at[batch, head], keys), (v.at[batch, head], values)]
    walk = Walk(lambda t: idx[0, t], cnt[0, 0], group, static.block_k, sources, semaphores)
    rules = Rules(static, tokens, numbers, segments, pl.program_id(2) * static.block_q, static.block_q)
    query, d, shift, less = q[...], dout[...], column(lse[...]), column(delta[...])

    def body(step: Any, slot: Any, acc: Any) -> Any:
        def update(acc: Any, ok: Any = None) -> Any:
            z, slope = base2(static, dot(query, keys[slot], transpose=True))
            w = jnp.exp2(z - shift)
            ds = w * (dot(d, values[slot], transpose=True) - less) * slope
            ds = ds if ok is None else jnp.where(ok, ds, 0)
            return acc + dot(ds.astype(k.dtype), keys[slot])

        return rules.choose(walk, step, update, update, acc)

    dq[...] = walk.run(body, jnp.zeros(q.shape, jnp.float32)).astype(dq.dtype)


def query_gradient(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                   tokens: Tokens) -> Any:  # fmt: skip
    """Gradient of the queries, over the lists of the forward pass."""
    batch, heads, queries, features = q.shape
    group, bq = group_of(static, mask.width, static.block_k), static.block_q
    rows = queries // bq
    lists, list_blocks = list_specs(mask.kv_idx, mask.kv_cnt)
    rules, rule_blocks = rule_specs(static, k.shape[2], tokens, batch)

    def mine(n: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, bq, n), lambda b, h, p: (b, h, p, 0))

    number = pl.BlockSpec((None, None, None, 1, bq), lambda b, h, p: (b, h, p, 0, 0))
    shift, delta = (x.reshape(batch, heads, rows, 1, bq) for x in (finite_lse(lse) * LOG2E, delta))
    return call(
        functools.partial(_query_kernel, static, tokens, group, heads // k.shape[1]), static,
        "block_sparse_attention_dq", (batch, heads, rows), [*lists, *rules, q, dout, shift, delta, k, v],
        [*list_blocks, *rule_blocks, mine(features), mine(v.shape[-1]), number, number,
         *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
        jax.ShapeDtypeStruct(q.shape, q.dtype), mine(features),
        [pltpu.VMEM((2, group * static.block_k, x.shape[-1]), x.dtype) for x in (k, v)]
        + [pltpu.SemaphoreType.DMA((2, 2))],
        features=2 * features + v.shape[-1], **fetching((k, v), bq, batch * heads * queries * mask.width * static.block_k),
    )  # fmt: skip


def _key_kernel(static: Static, tokens: Tokens, group: int, shared: int, *arrays: Any) -> None:
    idx, cnt, numbers, *refs = arrays
    segments = (refs.pop(0), refs.pop(0)) if tokens.q_segments is not None else None
    k, v, lse, delta, q, dout, dk, dv, queries, douts, semaphores = refs
    batch, kv_head = pl.program_id(0), pl.program_id(1)
    bq, bk, lists = static.block_q, static.block_k, idx.shape[0]
    limit, offset, causal = numbers[0, 0], numbers[0, 1], tokens.q_offset is not None
    last = (pl.program_id(2) + 1) * bk - 1  # key of this block
    key, value = k[...], v[...]
    own = last - bk + 1 + jax.lax.broadcasted_iota(jnp.int32, (bk, 1), 0)

    def of_head(r: Any, carry: Any) -> Any:
        head, which = kv_head * shared + r, r if lists > 1 else 0
        sources = [(q.at[batch, head], queries), (dout.at[batch, head], douts)]
        walk = Walk(lambda t: idx[which, 0, t], cnt[which, 0, 0], group, bq, sources, semaphores)

        def along_lanes(of: Any, step: Any) -> Any:
            return jnp.concatenate([of[pl.ds(walk.entry(step, t), 1), :] for t in range(group)], axis=1)

        def body(step: Any, slot: Any, carry: Any) -> Any:
            at = walk.positions(step)

            def update(carry: Any, ok: Any = None) -> Any:
                query, d = queries[slot], douts[slot]
                shift = jnp.where(at < ABSENT, along_lanes(lse.at[r], step), -NEVER)  # fetched twice, weighs nothing
                z, slope = base2(static, dot(key, query, transpose=True))
                w = jnp.exp2(z - shift)
                w = w if ok is None else jnp.where(ok, w, 0)
                ds = w * (dot(value, d, transpose=True) - along_lanes(delta.at[r], step)) * slope
                return carry[0] + dot(ds.astype(q.dtype), query), carry[1] + dot(w.astype(dout.dtype), d)

            def pairs() -> Any:
                ok = jnp.broadcast_to(own < limit, (bk, at.shape[1]))
                if causal:
                    ok &= own <= at + offset
                if segments:
                    ok &= column(segments[1][...]) == along_lanes(segments[0], step)
                return ok

            if segments:
                return update(carry, pairs())
            all_count = last < limit
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
    kv_heads, bq, bk = k.shape[1], static.block_q, static.block_k
    shared, group, width = heads // kv_heads, group_of(static, mask.q_idx.shape[-1], bq), mask.q_idx.shape[-1]

    def grouped(x: Any) -> Any:  # heads as (key heads, those that share one)
        return x.reshape(x.shape[0], *((kv_heads, shared) if x.shape[1] > 1 else (1, 1)), *x.shape[2:])

    lists, list_blocks = list_specs(grouped(mask.q_idx), grouped(mask.q_cnt))
    rules, rule_blocks = rule_specs(static, k.shape[2], tokens, batch, transposed=True)

    def mine(n: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, bk, n), lambda b, g, r: (b, g, r, 0))

    whole = pl.BlockSpec((None, None, shared, queries // bq, bq), lambda b, g, r: (b, g, 0, 0, 0))
    shift, delta = (grouped(x.reshape(batch, heads, -1, bq)) for x in (finite_lse(lse) * LOG2E, delta))
    blocks = [mine(k.shape[-1]), mine(v.shape[-1])]
    return call(
        functools.partial(_key_kernel, static, tokens, group, shared), static, "block_sparse_attention_dkv",
        (batch, kv_heads, k.shape[2] // bk), [*lists, *rules, k, v, shift, delta, q, dout],
        [*list_blocks, *rule_blocks, *blocks, whole, whole, *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)], blocks,
        [pltpu.VMEM((2, group * bq, x.shape[-1]), x.dtype) for x in (q, dout)] + [pltpu.SemaphoreType.DMA((2, 2))],
        features=2 * (k.shape[-1] + v.shape[-1]), **fetching((q, dout), bk, batch * heads * k.shape[2] * width * bq),
        vmem_bytes=_room(4 * 4 * shared * queries),
    )  # fmt: skip


def _room(needed: int) -> int | None:
    """The limit of VMEM for a kernel whose whole-head blocks take some bytes; None where the default is enough."""
    return None if needed < 4 << 20 else needed + (16 << 20)
