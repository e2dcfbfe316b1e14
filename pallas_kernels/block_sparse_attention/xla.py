"""Block-sparse attention for any device, in loops of plain matrix products over lists of blocks; no array is as large as
tokens times tokens. Memory beyond inputs and outputs: one step's keys and values per row handled at once.

One query block at a time on CPU, where two-dimensional products of one block beat batched ones several times over; many at
once elsewhere. Loops over lists have as many steps as the list needs, so they have no automatic derivative: the two
functions at the end are it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.attention_problem import Static, Tokens, finite_lse, logits, through_cap, visible
from pallas_kernels.common.block_mask import BlockMask
from pallas_kernels.common.xla import accumulator, each, leading, matmul

WHOLE_LIST = 4096  # keys: longer lists are walked in steps
STEP = 512
FEW = 8  # blocks: up to so many are copied one by one, which XLA does faster on a CPU than a gather


def _blocks(x: Any, block: int) -> Any:
    return x.reshape(*x.shape[:2], -1, block, *x.shape[3:])


def _walk(static: Static, ids: Any, count: Any, block: int, step: Callable[..., Any], carry: Any, whole: bool) -> Any:
    """Fold `step(carry, ids of some blocks, which of them are real)` over a list of blocks, `whole` in one step if short.

    What is behind the count is replaced by a real block, so that nothing but listed blocks is ever read.
    """
    width = ids.shape[0]
    ids = jnp.clip(ids[jnp.minimum(jnp.arange(width), jnp.maximum(count - 1, 0))], 0)
    tokens = static.config.step_tokens or (WHOLE_LIST if whole and width * block <= WHOLE_LIST else STEP)
    group = max(1, min(width, tokens // block))
    if group == width:
        return step(carry, ids, jnp.arange(width) < count)
    steps = -(-width // group)
    ids = jnp.pad(ids, (0, steps * group - width), mode="edge")

    def body(g: Any, c: Any) -> Any:
        return step(c, jax.lax.dynamic_slice(ids, (g * group,), (group,)), g * group + jnp.arange(group) < count)

    return jax.lax.fori_loop(0, (count + group - 1) // group, body, carry)


def _positions(ids: Any, block: int) -> Any:
    return (ids[:, None] * block + jnp.arange(block)).reshape(-1)


def _rows(blocks: Any, b: Any, h: Any, ids: Any) -> Any:
    """The tokens of the listed blocks of one head, (tokens, features)."""
    if ids.shape[0] > FEW:
        return blocks[b, h, ids].reshape(-1, blocks.shape[-1])
    one = (1, 1, 1, *blocks.shape[3:])
    found = [jax.lax.dynamic_slice(blocks, (b, h, ids[t], 0, 0), one) for t in range(ids.shape[0])]
    return jnp.concatenate(found, axis=3).reshape(-1, blocks.shape[-1])


def forward(static: Static, q: Any, k: Any, v: Any, mask: BlockMask, tokens: Tokens) -> tuple[Any, Any]:
    """(out, log-sum-exp) with an online softmax over each query block's list."""
    batch, heads, queries, _ = q.shape
    dtype, shared = accumulator(q, k, v), heads // k.shape[1]
    qs, ks, vs = _blocks(q, static.block_q), _blocks(k, static.block_k), _blocks(v, static.block_k)

    def row(b: Any, h: Any, p: Any) -> tuple[Any, Any]:
        at = (leading(b, mask.kv_idx, 0), leading(h, mask.kv_idx, 1), p)
        count, query, rows = mask.kv_cnt[at], qs[b, h, p], p * static.block_q + jnp.arange(static.block_q)

        def step(carry: Any, ids: Any, real: Any) -> Any:
            top, total, acc = carry
            keys, values = _rows(ks, b, h // shared, ids), _rows(vs, b, h // shared, ids)
            s = logits(static, matmul(query, keys, dtype, transpose=True))
            ok = jnp.repeat(real, static.block_k)[None]
            if tokens.any:
                ok = ok & visible(tokens, b, rows, _positions(ids, static.block_k))
            s = jnp.where(ok, s, -1e30)
            new = jnp.maximum(top, s.max(1))
            e = jnp.where(ok, jnp.exp(s - new[:, None]), 0)
            old = jnp.exp(top - new)
            return new, old * total + e.sum(1), old[:, None] * acc + matmul(e.astype(v.dtype), values, dtype)

        n = static.block_q
        start = (jnp.full(n, -1e30, dtype), jnp.zeros(n, dtype), jnp.zeros((n, v.shape[-1]), dtype))
        top, total, acc = _walk(static, mask.kv_idx[at], count, static.block_k, step, start, whole=True)
        alive = total != 0  # not-a-number stays what it is
        safe = jnp.where(alive, total, 1)
        out = jnp.where(alive[:, None], acc / safe[:, None], 0)
        return out.astype(v.dtype), jnp.where(alive, top + jnp.log(safe), -jnp.inf)

    out, lse = each(static.config.rows_at_once, (batch, heads, queries // static.block_q), row)
    return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)


def _gradient(static: Static, tokens: Tokens, b: Any, rows: Any, cols: Any, real: Any, *, query: Any, key: Any,
              value: Any, dout: Any, lse: Any, delta: Any, dtype: Any) -> tuple[Any, Any]:  # fmt: skip
    """(weights, gradient of the products) for some queries and keys; 0 at pairs that do not count."""
    s = logits(static, matmul(query, key, dtype, transpose=True))
    ok = real & visible(tokens, b, rows, cols) if tokens.any else real
    w = jnp.where(ok, jnp.exp(s - lse[:, None]), 0)
    ds = jnp.where(ok, w * (matmul(dout, value, dtype, transpose=True) - delta[:, None]), 0)
    return w, through_cap(static, s, ds)


def query_gradient(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                   tokens: Tokens) -> Any:  # fmt: skip
    """Gradient of the queries, over the lists of the forward pass; `delta` is sum(dout * out) minus the gradient of lse."""
    batch, heads, queries, _ = q.shape
    dtype, shared = accumulator(q, k, v), heads // k.shape[1]
    qs, ks, vs = _blocks(q, static.block_q), _blocks(k, static.block_k), _blocks(v, static.block_k)
    douts, lses, deltas = (_blocks(x, static.block_q) for x in (dout, finite_lse(lse), delta))

    def row(b: Any, h: Any, p: Any) -> Any:
        at = (leading(b, mask.kv_idx, 0), leading(h, mask.kv_idx, 1), p)
        rows, of = p * static.block_q + jnp.arange(static.block_q), (b, h, p)

        def step(acc: Any, ids: Any, real: Any) -> Any:
            keys, values = _rows(ks, b, h // shared, ids), _rows(vs, b, h // shared, ids)
            _, ds = _gradient(static, tokens, b, rows, _positions(ids, static.block_k),
                              jnp.repeat(real, static.block_k)[None], query=qs[of], key=keys, value=values,
                              dout=douts[of], lse=lses[of], delta=deltas[of], dtype=dtype)  # fmt: skip
            return acc + matmul(ds.astype(k.dtype), keys, dtype)

        count, start = mask.kv_cnt[at], jnp.zeros((static.block_q, q.shape[-1]), dtype)
        acc = _walk(static, mask.kv_idx[at], count, static.block_k, step, start, whole=True)
        return jnp.where(count > 0, acc, 0).astype(q.dtype)  # a whole list in one step reads a block even for count 0

    return each(static.config.rows_at_once, (batch, heads, queries // static.block_q), row).reshape(q.shape)


def key_gradients(static: Static, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, mask: BlockMask,
                  tokens: Tokens) -> tuple[Any, Any]:  # fmt: skip
    """Gradients of keys and values, over the transposed lists, summed over the query heads that share a key head.

    Those lists differ much in length, so each is walked in steps, only as far as it goes.
    """
    batch, heads, _, _ = q.shape
    dtype, shared = accumulator(q, k, v), heads // k.shape[1]
    qs, ks, vs = _blocks(q, static.block_q), _blocks(k, static.block_k), _blocks(v, static.block_k)
    douts, lses, deltas = (_blocks(x, static.block_q) for x in (dout, finite_lse(lse), delta))

    def column(b: Any, g: Any, r: Any) -> tuple[Any, Any]:
        key, value, cols = ks[b, g, r], vs[b, g, r], r * static.block_k + jnp.arange(static.block_k)

        def head(i: Any, carry: Any) -> Any:
            h = g * shared + i
            at = (leading(b, mask.q_idx, 0), leading(h, mask.q_idx, 1), r)

            def step(acc: Any, ids: Any, real: Any) -> Any:
                query, d = _rows(qs, b, h, ids), _rows(douts, b, h, ids)
                w, ds = _gradient(static, tokens, b, _positions(ids, static.block_q), cols,
                                  jnp.repeat(real, static.block_q)[:, None], query=query, key=key, value=value, dout=d,
                                  lse=lses[b, h, ids].reshape(-1), delta=deltas[b, h, ids].reshape(-1), dtype=dtype)  # fmt: skip
                return (acc[0] + matmul(ds.T.astype(q.dtype), query, dtype),
                        acc[1] + matmul(w.T.astype(d.dtype), d, dtype))  # fmt: skip

            count, start = mask.q_cnt[at], (jnp.zeros(key.shape, dtype), jnp.zeros(value.shape, dtype))
            got = _walk(static, mask.q_idx[at], count, static.block_q, step, start, whole=False)
            return jax.tree.map(lambda c, x: c + jnp.where(count > 0, x, 0), carry, got)

        start = (jnp.zeros(key.shape, dtype), jnp.zeros(value.shape, dtype))
        dk, dv = jax.lax.fori_loop(0, shared, head, start)
        return dk.astype(k.dtype), dv.astype(v.dtype)

    dk, dv = each(static.config.rows_at_once, (batch, k.shape[1], k.shape[2] // static.block_k), column)
    return dk.reshape(k.shape), dv.reshape(v.shape)
