"""Block masses from the dense weights, for small sizes and for checks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.attention_problem import Static, Tokens, finite_lse, logits, visible
from pallas_kernels.common.xla import accumulator


def _dense(static: Static, q: Any, k: Any, tokens: Tokens) -> tuple[Any, Any]:
    """(logits, which count), (batch, heads, queries, keys)."""
    dtype = accumulator(q, k)
    keys = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1).astype(dtype)
    s = logits(static, jnp.einsum("bhid,bhjd->bhij", q.astype(dtype), keys, precision="highest"))
    positions = jnp.arange(q.shape[0]), jnp.arange(q.shape[2]), jnp.arange(k.shape[2])
    return s, jax.vmap(visible, (None, 0, None, None))(tokens, *positions)[:, None]


def _sums(static: Static, weights: Any) -> Any:
    batch, heads, queries, keys = weights.shape
    split = (batch, heads, queries // static.block_q, static.block_q, keys // static.block_k, static.block_k)
    return weights.reshape(split).sum((3, 5))


def scores(static: Static, q: Any, k: Any, lse: Any, tokens: Tokens) -> Any:
    """Masses for a known log-sum-exp."""
    s, ok = _dense(static, q, k, tokens)
    return _sums(static, jnp.where(ok, jnp.exp(s - finite_lse(lse)[..., None]), 0))


def search(static: Static, q: Any, k: Any, v: Any | None, live: Any, tokens: Tokens) -> tuple[Any, Any, Any]:
    """(out or None, log-sum-exp, masses)."""
    s, ok = _dense(static, q, k, tokens)
    ok &= (jnp.arange(q.shape[2]) < live[:, None])[:, None, :, None]
    lse = jax.nn.logsumexp(s, axis=-1, where=ok)
    w = jnp.where(ok, jnp.exp(s - finite_lse(lse)[..., None]), 0)
    if v is None:
        return None, lse, _sums(static, w)
    values = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1).astype(w.dtype)
    return jnp.einsum("bhij,bhjd->bhid", w, values, precision="highest").astype(v.dtype), lse, _sums(static, w)
