"""Block patterns to compare with: a window, chance, means of blocks, the last queries; at the same counts and sinks.

Each is a function of one layer's queries and keys that ranks blocks, (batch, heads, nq, nk), larger is kept. They go
through the same choice as AdaSpa's exact masses, so that only the ranking differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jprune.methods.attention.adaspa import Action, LayerState, dense_attention, rules_of, sparse_attention
from jprune.methods.attention.adaspa_select import AdaSpaConfig, select_blocks, spans

Ranking = Callable[[Any, Any, AdaSpaConfig], Any]


def window(
    q: Float[Array, "batch heads tokens head"], k: Float[Array, "batch heads tokens head"], config: AdaSpaConfig
) -> Float[Array, "batch heads nq nk"]:
    """The nearest blocks, whatever the data."""
    n = spans(q.shape[2], config).blocks
    near = -jnp.abs(jnp.arange(n)[:, None] - jnp.arange(n)).astype(jnp.float32)
    return jnp.broadcast_to(near, (*q.shape[:2], n, n))


def chance(key: jax.Array) -> Ranking:
    """Random blocks, the same in every step."""

    def ranked(q: Any, k: Any, config: AdaSpaConfig) -> Any:
        n = spans(q.shape[2], config).blocks
        return jax.random.uniform(key, (*q.shape[:2], n, n))

    return ranked


def mean_pool(
    q: Float[Array, "batch heads tokens head"], k: Float[Array, "batch heads tokens head"], config: AdaSpaConfig
) -> Float[Array, "batch heads nq nk"]:
    """Products of the means of the blocks' queries and keys."""
    a, b = (_blocked(x, config).mean(3) for x in (q, k))
    return jnp.einsum("bhpd,bhrd->bhpr", a, b, preferred_element_type=jnp.float32)


def last_queries(count: int = 64) -> Ranking:
    """Columns and diagonals that the last queries of the video attend to (after MInference's vertical-slash heads)."""

    def ranked(q: Any, k: Any, config: AdaSpaConfig) -> Any:
        at, tokens = spans(q.shape[2], config), q.shape[2]
        last = min(at.last * config.block, tokens)
        rows = jnp.arange(max(last - count, 0), last)
        logits = jnp.einsum("bhqd,bhkd->bhqk", q[:, :, rows], k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
        own, of = rows // config.block, jnp.arange(tokens) // config.block
        column = jax.ops.segment_sum(weights.sum(2).swapaxes(0, -1), of, at.blocks).swapaxes(0, -1)
        offset = of[None, :] - own[:, None] + at.blocks  # block of the key behind that of the query
        flat = weights.reshape(*weights.shape[:2], -1).swapaxes(0, -1)
        diagonal = jax.ops.segment_sum(flat, offset.reshape(-1), 2 * at.blocks + 1).swapaxes(0, -1)
        ids = jnp.arange(at.blocks)
        return column[:, :, None, :] + diagonal[:, :, ids[None, :] - ids[:, None] + at.blocks]

    return ranked


def attention_of(ranking: Ranking, action: Action, config: AdaSpaConfig) -> Callable[..., Any]:
    """The hook of `jprune.models.dit.VideoDiT` that ranks anew in every sparse step, as its `LayerState` says then."""
    plain = dataclasses.replace(config, head_adaptive="off")

    def attention(layer: int, q: Any, k: Any, v: Any, valid: Any, state: LayerState) -> tuple[Any, LayerState]:
        rules = rules_of(valid)
        if action in (Action.DENSE, Action.FUSED) or layer in config.dense_layers or q.shape[2] < config.min_tokens:
            return dense_attention(q, k, v, plain, rules), state
        chosen = select_blocks(ranking(q, k, plain), plain, q.shape[2]).chosen
        chosen = chosen._replace(ids=chosen.ids.astype(state.chosen.ids.dtype))
        return sparse_attention(q, k, v, chosen, plain, rules), state._replace(chosen=chosen)

    return attention


def _blocked(x: Any, config: AdaSpaConfig) -> Any:
    """(batch, heads, blocks, block, features); the last block is filled with its own last token."""
    short = -x.shape[2] % config.block
    x = jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0)), mode="edge")
    return x.reshape(*x.shape[:2], -1, config.block, x.shape[3])
