"""Dense attention with the meaning all implementations share, differentiable to any order; for small sizes and for checks.

Memory is (query blocks x keys x features) per head: every query block gets its own copy of the keys, with zeros for those in
blocks it does not visit, so that what lies there (even not-a-number) reaches nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.attention_problem import Static, Tokens, logits, visible
from pallas_kernels.common.xla import accumulator


def attention(static: Static, active: Any, q: Any, k: Any, v: Any, tokens: Tokens) -> tuple[Any, Any]:
    """(out, log-sum-exp) for flags `active`, bool (batch or 1, heads or 1, query blocks, key blocks)."""
    batch, heads, queries, _ = q.shape
    keys, dtype = k.shape[2], accumulator(q, k, v)
    active = jnp.broadcast_to(active, (batch, heads, *active.shape[2:]))
    seen = jnp.repeat(active, static.block_k, axis=3)[..., None]  # (batch, heads, query blocks, keys, 1)

    def of_blocks(x: Any) -> Any:
        x = jnp.repeat(x, heads // x.shape[1], axis=1)[:, :, None]
        return jnp.where(seen, x, 0).astype(dtype)

    rows = q.astype(dtype).reshape(batch, heads, -1, static.block_q, q.shape[-1])
    s = logits(static, jnp.einsum("bhpid,bhpjd->bhpij", rows, of_blocks(k), precision="highest"))
    rules = jax.vmap(visible, (None, 0, None, None))(tokens, jnp.arange(batch), jnp.arange(queries), jnp.arange(keys))
    ok = rules.reshape(batch, 1, -1, static.block_q, keys) & jnp.swapaxes(seen, -1, -2)
    alive = ok.any(-1, keepdims=True)
    s = jnp.where(ok, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(alive, s.max(-1, keepdims=True), 0))
    e = jnp.where(ok, jnp.exp(jnp.where(ok, s, 0) - top), 0)
    total = jnp.where(alive, e.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bhpij,bhpjd->bhpid", e / total, of_blocks(v), precision="highest")
    lse = jnp.where(alive, top + jnp.log(total), -jnp.inf)
    return out.reshape(batch, heads, queries, -1).astype(v.dtype), lse.reshape(batch, heads, queries)
