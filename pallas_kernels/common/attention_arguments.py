"""From a caller's arrays and rules to an attention problem of whole blocks: layouts, heads, lengths, segments, all checked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.common.attention_problem import Static, Tokens
from pallas_kernels.common.xla import padded

LAYOUTS = {"bhld": (0, 1, 2, 3), "blhd": (0, 2, 1, 3)}


class AttentionError(ValueError):
    """Arguments of an attention that do not fit together."""


def to_bhld(x: Any, layout: str) -> Any:
    """The array as (batch, heads, tokens, features)."""
    if layout not in LAYOUTS:
        raise AttentionError(f"layout {layout!r} is not known: {', '.join(LAYOUTS)}")
    if x.ndim != 4 or 0 in x.shape:
        raise AttentionError(f"an array of shape {x.shape}: wanted four axes, {', '.join(layout)}, none empty")
    return x.transpose(LAYOUTS[layout])


def check_heads(q: Any, k: Any, v: Any) -> None:
    """Raise AttentionError unless shapes (batch, heads, tokens, features) and dtypes fit together."""
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise AttentionError(f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}: wanted one floating type")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise AttentionError(f"queries {q.shape}, keys {k.shape} and values {v.shape} (batch, heads, tokens, features) do "
                             "not fit: batch, key tokens, key heads and the features of queries and keys must agree")  # fmt: skip
    if q.shape[1] % k.shape[1]:
        raise AttentionError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: one must divide the other")


def default_scale(q: Any, scale: float | None) -> float:
    """The given scale, or 1 / sqrt(features)."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A problem of whole blocks: arrays (query, key and perhaps value), rules, the true number of queries, and q_len."""

    arrays: tuple[Any, ...]
    tokens: Tokens
    queries: int
    q_len: Any

    def live(self, x: Any, otherwise: float) -> Any:
        """The true queries of (batch, heads, queries, ...), with `otherwise` behind `q_len`."""
        x = x[:, :, : self.queries]
        if self.q_len is None:
            return x
        return jnp.where((jnp.arange(self.queries) < self.q_len[:, None])[:, None, :, None], x, otherwise)


def whole_blocks(static: Static, q: Any, k: Any, v: Any | None, *, causal: bool, q_offset: Any, q_len: Any, kv_len: Any,
                 q_segment_ids: Any, kv_segment_ids: Any) -> Whole:  # fmt: skip
    """Pad tokens to whole blocks and put zeros where tokens do not count, so that no implementation meets what lies there.

    Raises:
      AttentionError: per-batch numbers or segment ids of the wrong shape or dtype.
    """
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise AttentionError("q_segment_ids and kv_segment_ids come together: give both or neither")
    q_len, kv_len = (
        n if n is None else _per_batch(what, n, batch) for what, n in (("q_len", q_len), ("kv_len", kv_len))
    )
    offset = _per_batch("q_offset", q_offset, batch) if causal else None
    q = padded(_zero_behind(q, q_len), 2, static.block_q)
    arrays = [padded(_zero_behind(x, kv_len), 2, static.block_k) for x in (k, v) if x is not None]
    if arrays[0].shape[2] != keys:
        kv_len = jnp.full(batch, keys, jnp.int32) if kv_len is None else jnp.minimum(kv_len, keys)
    segments = []
    sides = (("q", q_segment_ids, queries, static.block_q), ("kv", kv_segment_ids, keys, static.block_k))
    for what, ids, size, block in sides:
        if ids is not None:
            if jnp.shape(ids) != (batch, size) or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
                raise AttentionError(
                    f"{what}_segment_ids has shape {jnp.shape(ids)}: wanted integers ({batch}, {size})"
                )
            ids = padded(jnp.asarray(ids, jnp.int32), 1, block)
        segments.append(ids)
    return Whole((q, *arrays), Tokens(kv_len, offset, *segments), queries, q_len)


def _per_batch(name: str, value: Any, batch: int) -> Any:
    if jnp.shape(value) not in ((), (batch,)) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise AttentionError(f"{name} is {jnp.result_type(value)}{list(jnp.shape(value))}: wanted an integer, or {batch} "
                             "of them, one a batch element")  # fmt: skip
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))


def _zero_behind(x: Any, length: Any) -> Any:
    if length is None:
        return x
    return jnp.where((jnp.arange(x.shape[2]) < length[:, None])[:, None, :, None], x, 0)
