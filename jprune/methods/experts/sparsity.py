"""How sparse experts run: per token, over chunks of tokens, from one token to the next, and which never run.

`active` is True where an expert runs for a token: (tokens, experts) of one layer. Shared experts always run.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Activity: TypeAlias = Bool[Array, "tokens experts"] | Bool[np.ndarray, "tokens experts"]


def token_sparsity(active: Activity, valid: Any = None) -> Float[Array, ""]:
    """TLS: the mean share of experts that a token does not use.

    >>> print(token_sparsity(jnp.array([[True, False], [True, True]])))
    0.25
    """
    a = active.astype(jnp.float32)
    if valid is None:
        return 1 - jnp.mean(a)
    return 1 - jnp.sum(jnp.where(valid[:, None], a, 0)) / (jnp.maximum(jnp.sum(valid), 1) * a.shape[1])


def chunk_sparsity(active: Activity, length: int, valid: Any = None, segments: Any = None) -> float:
    """CLS: the mean share of experts that no token of a window uses; host-side.

    Windows do not overlap; what is left at the end is not counted. Padding is taken out first; windows then reach over
    documents, unless `segments` names each token's document.

        >>> print(chunk_sparsity(np.array([[True, False], [False, False], [False, False], [False, False]]), 2))
        0.75

    Raises:
      ValueError: no whole window.
    """
    a = np.asarray(active)
    there = np.ones(len(a), bool) if valid is None else np.asarray(valid)
    names = np.zeros(len(a), int) if segments is None else np.asarray(segments)
    used, windows = 0, 0
    for name in dict.fromkeys(names[there].tolist()):
        own = a[there & (names == name)]
        whole = len(own) // length
        used += int(own[: whole * length].reshape(whole, length, a.shape[1]).any(1).sum())
        windows += whole
    if not windows:
        raise ValueError(f"there is no whole window of {length} tokens among these {int(there.sum())}")
    return 1 - used / (windows * a.shape[1])


def reuse(active: Activity, valid: Any = None) -> float:
    """Mean share of a token's experts that the next token uses too; tokens without experts are left out; host-side."""
    a = np.asarray(active)
    a = a if valid is None else a[np.asarray(valid)]
    many = a[:-1].sum(1)
    both = (a[:-1] & a[1:]).sum(1)
    return float((both[many > 0] / many[many > 0]).mean()) if (many > 0).any() else 0.0


def union_sparsity(active: Activity, groups: Any) -> float:
    """The mean share of experts that no token of a group uses, such as the nodes of a draft tree; host-side.

    Args:
      groups: lists of tokens.
    """
    a = np.asarray(active)
    return float(np.mean([1 - a[np.asarray(g)].any(0).mean() for g in groups]))


def dead_experts(active: Activity, valid: Any = None) -> Int[np.ndarray, " dead"]:
    """The experts that no token uses, ascending; host-side."""
    a = np.asarray(active) if valid is None else np.asarray(active) & np.asarray(valid)[:, None]
    return np.flatnonzero(~a.any(0))
