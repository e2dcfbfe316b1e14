"""Which visual tokens stay: DivPrune and what it is measured against, all called alike, one image at a time.

    index = select(features, aux, k)               random, uniform_grid, norm_topk, cls_attention, divprune
    features, index = merge(features, aux, k)      visionzip, prumerge, prumerge_plus: tokens that took others in

`index` says which patch each kept token is, the best first where the method ranks; `features` are one image's patches without
the class token, and `aux` is what the vision tower knows of them beside their values. Under `jax.vmap` for batches; k is static.

VisionZip (Yang et al., CVPR 2025) and PruMerge (Shang et al., 2024) work on the tower's features, before the projector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jprune.methods.tokens.divprune import divprune_select
from jprune.models.token_hook import Aux

CLASS_TOKEN = -1  # the index of a kept token that is no patch
NEIGHBOURS = 32


class Merged(NamedTuple):
    """Tokens that took others in.

    Attributes:
      features: what goes on to the projector.
      index: the patch that each is built around; -1: none (the class token, the sum of the rest).
    """

    features: Float[Array, "n d"]
    index: Int32[Array, " n"]


Selector = Callable[[Any, Aux, int], Array]
Merger = Callable[[Any, Aux, int], Merged]


def random(features: Float[Array, "m d"], aux: Aux, k: int) -> Int32[Array, " k"]:
    """k patches by chance."""
    _count(features, k)
    return jax.random.permutation(_given(aux, "key", "random"), features.shape[0])[:k].astype(jnp.int32)


def uniform_grid(features: Float[Array, "m d"], aux: Aux, k: int) -> Int32[Array, " k"]:
    """Every (m / k)-th patch."""
    _count(features, k)
    return jnp.asarray(_spaced(features.shape[0], k), jnp.int32)


def norm_topk(features: Float[Array, "m d"], aux: Aux, k: int) -> Int32[Array, " k"]:
    """The k patches of largest Euclidean norm."""
    _count(features, k)
    return _best(jnp.linalg.norm(features.astype(jnp.float32), axis=-1), k)


def cls_attention(features: Float[Array, "m d"], aux: Aux, k: int) -> Int32[Array, " k"]:
    """The k patches that the class token attends to most, summed over heads."""
    _count(features, k)
    return _best(_given(aux, "cls_attention", "cls_attention").astype(jnp.float32).sum(0), k)


def divprune(features: Float[Array, "m d"], aux: Aux, k: int) -> Int32[Array, " k"]:
    """The k patches that differ most, in the order in which `jprune.methods.tokens.divprune.divprune_select` finds them."""
    return divprune_select(features, k).order


def visionzip(features: Float[Array, "m d"], aux: Aux, k: int, contextual: int | None = None) -> Merged:
    """The class token, the patches it attends to most, and `contextual` merged ones of the rest: k in all.

    The rest's evenly spaced members each take in the mean of those whose keys, averaged over heads, are nearest to theirs.

    Args:
      features: of the patches, before the projector.
      aux: with cls_attention, cls_feature and keys.
      k: tokens in all, the class token among them.
      contextual: merged ones among them; None: 10 of 64, as published.

    Raises:
      ValueError: counts that do not fit, or an `aux` without what is needed.
    """
    m = features.shape[0]
    contextual = round(k * 10 / 64) if contextual is None else contextual
    dominant = k - contextual  # the class token is one of them
    if not (1 <= dominant <= m and contextual >= 0 and dominant - 1 + contextual <= m):
        raise ValueError(
            f"{dominant} dominant and {contextual} contextual tokens cannot be had of {m} patches and a class token"
        )
    attention = _given(aux, "cls_attention", "visionzip").astype(jnp.float32).sum(0)
    kept = jnp.zeros(m, bool).at[_best(attention, dominant - 1)].set(True)
    order = jnp.argsort(~kept, stable=True)  # the kept ones first, either part ascending
    top, rest = order[: dominant - 1], order[dominant - 1 :]
    first = jnp.concatenate([_given(aux, "cls_feature", "visionzip")[None], features[top]])
    index = jnp.concatenate([jnp.full(1, CLASS_TOKEN), top])
    if contextual:
        step = max(1, len(rest) // contextual)
        where = np.arange(contextual) * step
        target, others = rest[where], rest[np.setdiff1d(np.arange(len(rest)), where)]
        metric = _unit(_given(aux, "keys", "visionzip").astype(jnp.float32).mean(0))
        nearest = jnp.argmax(_similar(metric[others], metric[target]), axis=1)
        taken = jax.nn.one_hot(nearest, contextual, dtype=jnp.float32)
        total = jnp.matmul(taken.T, features[others].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        mean = total / jnp.maximum(taken.sum(0), 1.0)[:, None]
        first = jnp.concatenate([first, (features[target] + mean).astype(features.dtype)])
        index = jnp.concatenate([index, target])
    return Merged(first, index.astype(jnp.int32))


def prumerge_attention(aux: Aux) -> Float32[Array, " m"]:
    """The class token's attention to every patch as PruMerge has it: one head of all channels, in the last layer."""
    query, own, keys = (_given(aux, name, "prumerge") for name in ("last_query", "last_key", "last_keys"))
    every = jnp.concatenate([own[None], keys]).astype(jnp.float32)
    logits = jnp.matmul(every, query.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(logits * query.shape[0] ** -0.5)[1:]


def outlier_count(attention: Any) -> int:
    """How many patches PruMerge keeps of its own accord: those above the third quartile by 1.5 of its distance to the first.

    On the host, since the result is a shape; at least 1.
    """
    low, high = np.quantile(np.asarray(attention, np.float64), (0.25, 0.75))
    return max(1, int((np.asarray(attention) > high + 1.5 * (high - low)).sum()))


def prumerge(features: Float[Array, "m d"], aux: Aux, k: int) -> Merged:
    """The k patches of most attention, each with its most similar others added, and one token of all the rest: k + 1.

    A kept token is itself plus the sum of the 32 others whose keys are nearest, weighted by attention (a sum: the weights are
    small and do not add up to 1); the last token is the same sum over all patches that were not kept.

    Args:
      features: of the patches, before the projector.
      aux: with last_query, last_key and last_keys.
      k: patches that stay; `outlier_count(prumerge_attention(aux))` is the published choice.
    """
    _count(features, k)
    attention = prumerge_attention(aux)
    return _absorb(features, aux, attention, _best(attention, k))


def prumerge_plus(features: Float[Array, "m d"], aux: Aux, k: int, spaced: int | None = None) -> Merged:
    """`prumerge` around `spaced` evenly spaced patches (half of k by default) and those of most attention besides: k + 1."""
    m = _count(features, k)
    spaced = k // 2 if spaced is None else spaced
    if not 0 <= spaced <= k:
        raise ValueError(f"spaced is {spaced}: of {k} tokens 0 to {k} can be evenly spaced")
    attention = prumerge_attention(aux)
    ahead = jnp.zeros(m).at[_spaced(m, spaced)].set(2.0)  # attention is at most 1
    return _absorb(features, aux, attention, _best(attention + ahead, k))


def _absorb(features: Any, aux: Aux, attention: Any, index: Any) -> Merged:
    """Ascending; neighbours by cosine of keys."""
    m = features.shape[0]
    index = jnp.sort(index)
    wide = features.astype(jnp.float32)
    metric = _unit(_given(aux, "last_keys", "prumerge").astype(jnp.float32))
    alike = _similar(metric[index], metric).at[jnp.arange(len(index)), index].set(-jnp.inf)
    _, near = jax.lax.top_k(alike, min(NEIGHBOURS, m - 1))
    merged = wide[index] + jnp.einsum("kn,knd->kd", attention[near], wide[near], precision=jax.lax.Precision.HIGHEST)
    rest = jnp.where(jnp.zeros(m, bool).at[index].set(True), 0.0, attention)
    extra = jnp.matmul(rest, wide, precision=jax.lax.Precision.HIGHEST)
    out = jnp.concatenate([merged, extra[None]]).astype(features.dtype)
    return Merged(out, jnp.concatenate([index, jnp.full(1, CLASS_TOKEN)]).astype(jnp.int32))


def _best(score: Any, k: int) -> Any:
    """Indices of the k largest, lower ones first among equals."""
    return jax.lax.top_k(score, k)[1].astype(jnp.int32)


def _spaced(m: int, k: int) -> np.ndarray:
    return np.arange(k) * m // max(k, 1)


def _unit(x: Any) -> Any:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _similar(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _count(features: Any, k: int) -> int:
    m = features.shape[0]
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}: of {m} tokens 1 to {m} can be kept")
    return m


def _given(aux: Aux, field: str, method: str) -> Any:
    value = getattr(aux, field)
    if value is None:
        raise ValueError(f"{method} needs aux.{field}, which is None: give what the vision tower computed")
    return value
