"""Block masses for any device: one query block at a time, its keys in tiles of whole blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.attention_problem import Static, Tokens, finite_lse, logits, visible
from pallas_kernels.common.xla import accumulator, each, matmul

TILE = 4096  # keys multiplied at once


def _tiles(static: Static, keys: int) -> int:
    """Key blocks of a tile: at most TILE tokens, and a divisor of their number, so that no tile is cut."""
    blocks = keys // static.block_k
    most = max(1, min(blocks, (static.config.step_tokens or TILE) // static.block_k))
    return next(n for n in range(most, 0, -1) if blocks % n == 0)


def _tile_of(x: Any, b: Any, g: Any, start: Any, size: int) -> Any:
    return jax.lax.dynamic_slice(x, (b, g, start, 0), (1, 1, size, x.shape[-1]))[0, 0]


def scores(static: Static, q: Any, k: Any, lse: Any, tokens: Tokens) -> Any:
    """Masses for a known log-sum-exp."""
    batch, heads, queries, _ = q.shape
    dtype, shared, bq = accumulator(q, k), heads // k.shape[1], static.block_q
    tile = _tiles(static, k.shape[2]) * static.block_k
    known = finite_lse(lse).astype(dtype)

    def row(b: Any, h: Any, p: Any) -> Any:
        query, shift = _tile_of(q, b, h, p * bq, bq), jax.lax.dynamic_slice(known, (b, h, p * bq), (1, 1, bq))[0, 0]

        def masses(start: Any) -> Any:
            s = logits(static, matmul(query, _tile_of(k, b, h // shared, start, tile), dtype, transpose=True))
            e = jnp.exp(s - shift[:, None])
            if tokens.any:
                e = jnp.where(visible(tokens, b, p * bq + jnp.arange(bq), start + jnp.arange(tile)), e, 0)
            return e.sum(0).reshape(-1, static.block_k).sum(1)

        if tile == k.shape[2]:
            return masses(0)
        return jax.lax.map(masses, jnp.arange(0, k.shape[2], tile)).reshape(-1)

    return each(static.config.rows_at_once, (batch, heads, queries // bq), row)


def search(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens) -> tuple[Any, Any, Any]:
    """(out or None, log-sum-exp, masses) in one pass, keeping each query's log-sum-exp in every key block."""
    batch, heads, queries, _ = q.shape
    dtype, shared, bq = accumulator(q, k), heads // k.shape[1], static.block_q
    tile = _tiles(static, k.shape[2]) * static.block_k
    features = 0 if v is None else v.shape[-1]

    def row(b: Any, h: Any, p: Any) -> tuple[Any, Any, Any]:
        query, rows = _tile_of(q, b, h, p * bq, bq), p * bq + jnp.arange(bq)

        def step(carry: Any, start: Any) -> tuple[Any, Any]:
            top, total, acc = carry
            s = logits(static, matmul(query, _tile_of(k, b, h // shared, start, tile), dtype, transpose=True))
            ok = visible(tokens, b, rows, start + jnp.arange(tile)) if tokens.any else None
            s = s if ok is None else jnp.where(ok, s, -1e30)
            new = jnp.maximum(top, s.max(1))
            e = jnp.exp(s - new[:, None])
            e = e if ok is None else jnp.where(ok, e, 0)
            sums, old = e.reshape(bq, -1, static.block_k).sum(2), jnp.exp(top - new)
            if v is not None:
                values = _tile_of(v, b, h // shared, start, tile)
                acc = old[:, None] * acc + matmul(e.astype(v.dtype), values, dtype)
            return (new, old * total + sums.sum(1), acc), new[:, None] + jnp.log(sums)

        carry = (jnp.full(bq, -1e30, dtype), jnp.zeros(bq, dtype), jnp.zeros((bq, features), dtype))
        (top, total, acc), logs = jax.lax.scan(step, carry, jnp.arange(0, k.shape[2], tile))
        alive = (total != 0) & (rows < live[b])  # not-a-number stays what it is
        safe = jnp.where(alive, total, 1)
        lse = jnp.where(alive, top + jnp.log(safe), -jnp.inf)
        masses = jnp.exp(logs - finite_lse(lse)[:, None]).sum(1)  # (tiles, blocks of a tile)
        return jnp.where(alive[:, None], acc / safe[:, None], 0), lse, masses.reshape(-1)

    out, lse, masses = each(static.config.rows_at_once, (batch, heads, queries // bq), row)
    out = None if v is None else out.reshape(batch, heads, queries, features).astype(v.dtype)
    return out, lse.reshape(batch, heads, queries), masses
