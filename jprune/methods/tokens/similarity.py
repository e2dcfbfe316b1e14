"""Near-duplicates: tokens are parted by importance, and of one part those are dropped that look most like one of the other.

The similarity stage of Zero-TPrune (Wang, Dedhia and Jha, CVPR 2024). Dropped, not merged: attention stays as it was trained.
Two forms of the same rule: `similarity_prune` gathers the two parts (a quarter of all pairs) and gives places, `similar_alive`
marks tokens among those alive and takes traced numbers.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jprune.methods.tokens.selection import best, by_rank, places_of, ranks
from jprune.models.token_hook import Seen

PARTITIONS = ("seq_u", "seq_i", "alternate", "random", "full")
FEATURES = ("key", "query", "value", "x")


def features(
    seen: Seen, x: Float[Array, "batch tokens width"], kind: str = "key", head_reduce: str = "concat"
) -> Float[Array, "batch tokens features"]:
    """What tokens are compared by: the block's keys, queries or values (heads side by side, or their mean), or its output x.

    Raises:
      ValueError: another feature or another way to reduce heads.
    """
    if kind not in FEATURES:
        raise ValueError(f"feature must be one of {', '.join(FEATURES)}, not {kind!r}")
    if head_reduce not in ("concat", "mean"):
        raise ValueError(f"head_reduce must be 'concat' or 'mean', not {head_reduce!r}")
    if kind == "x":
        return x
    per_head: Array = getattr(seen, kind)
    return per_head.mean(2) if head_reduce == "mean" else per_head.reshape(*per_head.shape[:2], -1)


def exponent(metric: str | float) -> float | None:
    """Minkowski's p of a metric; None: an inner product.

    Raises:
      ValueError: a metric that is none.
    """
    named: dict[Any, float | None] = {"cosine": None, "dot": None, "l1": 1.0, "l2": 2.0, "linf": float("inf")}
    p = named.get(metric, metric)
    if isinstance(p, str) or (p is not None and not p >= 1):
        raise ValueError(f"metric must be cosine, dot, l1, l2, linf or Minkowski's p >= 1, not {metric!r}")
    return p


def similarity(
    a: Float[Array, "batch rows features"], b: Float[Array, "batch columns features"], metric: str | float = "cosine"
) -> Float[Array, "batch rows columns"]:
    """How alike each of a is to each of b: cosine, inner product, or the negated Minkowski distance."""
    p, a, b = exponent(metric), a.astype(jnp.float32), b.astype(jnp.float32)
    if p is None:
        if metric == "cosine":
            a, b = (f / jnp.maximum(jnp.linalg.norm(f, axis=-1, keepdims=True), 1e-12) for f in (a, b))
        return jnp.einsum("bnc,bmc->bnm", a, b, precision=jax.lax.Precision.HIGHEST)

    def row(one: Float[Array, "batch features"]) -> Array:  # row by row: all differences at once would not fit
        return -jnp.linalg.norm(one[:, None] - b, ord=p, axis=-1)

    return jnp.moveaxis(jax.lax.map(row, jnp.moveaxis(a, 1, 0)), 0, 1)


def _draws(shape: tuple[int, ...], partition: str, key: PRNGKeyArray | None) -> Array | None:
    if partition not in PARTITIONS:
        raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
    if partition != "random":
        return None
    if key is None:
        raise ValueError("a random partition needs a key: give the model one, or choose another partition")
    return jax.random.uniform(key, shape)


def partition_tokens(
    importance: Float[Array, "batch tokens"], mode: str = "seq_u", special: int = 1, key: PRNGKeyArray | None = None
) -> tuple[Int[Array, "batch first"], Int[Array, "batch second"]]:
    """Places of the part to prune from, floor(n / 2) of n patches, and of the part that it is compared with, by importance.

    "seq_u" prunes from the less important half, "seq_i" from the more important one, "alternate" from odd ranks, "random" from
    a half that `key` draws; "full" parts nothing and gives all patches twice.

    Raises:
      ValueError: another mode, or none to draw with.
    """
    drawn = _draws(importance.shape, mode, key)
    score = (importance if drawn is None else drawn)[:, special:]
    n, everyone = score.shape[1], jnp.ones(score.shape, bool)
    order = by_rank(ranks(score, everyone), everyone, n) + special
    match mode:
        case "full":
            return order, order
        case "alternate":
            return order[:, 1::2], order[:, ::2]
        case "seq_i":
            return order[:, : n // 2], order[:, n // 2 :]
        case _:
            return order[:, n - n // 2 :], order[:, : n - n // 2]


def clipped(r: int, n: int) -> int:
    """At most half of n patches can be dropped at once; more is cut down to it with a warning.

    Raises:
      ValueError: fewer than none.
    """
    if r < 0:
        raise ValueError(f"{r} tokens cannot be removed: give 0 or more")
    if r > n // 2:
        warnings.warn(f"only half of {n} patches can be removed as duplicates: {r} becomes {n // 2}", stacklevel=3)
    return min(r, n // 2)


def similarity_prune(
    importance: Float[Array, "batch tokens"],
    feats: Float[Array, "batch tokens features"],
    r: int,
    partition: str = "seq_u",
    metric: str | float = "cosine",
    special: int = 1,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "batch kept"]:
    """Places of all tokens but the r of the first part that are most like one of the second, ascending.

    Raises:
      ValueError: an unknown partition or metric, or r below 0.
    """
    batch, tokens = importance.shape
    r = clipped(r, tokens - special)
    if not r:
        return jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    first, second = partition_tokens(importance, partition, special, key)
    a, b = (jnp.take_along_axis(feats, p[..., None], axis=1) for p in (first, second))
    alike = similarity(a, b, metric)
    if partition == "full":  # a token is no duplicate of itself
        alike = jnp.where(jnp.eye(alike.shape[1], dtype=bool), -jnp.inf, alike)
    match_of = jnp.full((batch, tokens), -jnp.inf).at[jnp.arange(batch)[:, None], first].set(alike.max(-1))
    candidate = jnp.zeros((batch, tokens), bool).at[jnp.arange(batch)[:, None], first].set(True)
    dropped = best(match_of, r, candidate)
    return places_of(~dropped, tokens - r)


def similar_alive(
    importance: Float[Array, "batch tokens"],
    feats: Float[Array, "batch tokens features"],
    r: int | Int[Array, ""],
    alive: Bool[Array, "batch tokens"],
    partition: str = "seq_u",
    metric: str | float = "cosine",
    special: int = 1,
    key: PRNGKeyArray | None = None,
) -> Bool[Array, "batch tokens"]:
    """`similarity_prune` among living tokens: which are alive afterwards. r, which may be traced, is cut to half of them."""
    drawn = _draws(importance.shape, partition, key)
    patch = alive & (jnp.arange(alive.shape[1]) >= special)
    rank = ranks(importance if drawn is None else drawn, patch)
    n = patch.sum(1, keepdims=True)
    match partition:
        case "full":
            first = second = patch
        case "alternate":
            first, second = patch & (rank % 2 == 1), patch & (rank % 2 == 0)
        case "seq_i":
            first, second = patch & (rank < n // 2), patch & (rank >= n // 2)
        case _:
            first, second = patch & (rank >= n - n // 2), patch & (rank < n - n // 2)
    seen = second[:, None, :] & ~jnp.eye(alive.shape[1], dtype=bool)
    match_of = jnp.where(seen, similarity(feats, feats, metric), -jnp.inf).max(-1)
    return alive & ~best(match_of, jnp.minimum(r, n // 2), first)
