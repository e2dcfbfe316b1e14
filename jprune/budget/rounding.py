"""Whole numbers per layer from fractions of them: channels in multiples, at an exact budget; ranks within limits.

Host-side, a few numbers per layer in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def channel_counts(
    keep: Float[np.ndarray, " layers"],
    widths: int | Sequence[int],
    *,
    multiple_of: int | None = 128,
    official_counts: bool = False,
    exact_budget: bool = False,
) -> Int[np.ndarray, " layers"]:
    """Channels that each block keeps, rounded from the ratios; at least one multiple, at most all (host-side).

    Args:
      keep: fractions per layer.
      widths: channels per layer, or of every layer.
      multiple_of: counts are multiples of this, or the whole width; None or 1: any count.
      official_counts: without multiples, one channel more per layer, as the threshold of CFSP's authors keeps.
      exact_budget: move multiples between layers until the total is as near to sum(keep widths) as it can be with
        layers that ask for the same treated alike.

    Raises:
      ValueError: a multiple larger than a width, or the authors' counts together with an exact budget.
    """
    keep = np.asarray(keep, np.float64)
    full = np.broadcast_to(np.asarray(widths, np.int64), keep.shape)
    step = multiple_of or 1
    if step < 1 or (step > full).any():
        raise ValueError(
            f"{full.min()} channels cannot be a multiple of {step}: pass multiple_of=None, or a smaller one"
        )
    if official_counts and exact_budget:
        raise ValueError("official_counts keeps more than the budget by design: leave it or exact_budget out")
    asked = full * keep
    if official_counts and step == 1:
        counts = np.floor(asked + 1e-9).astype(np.int64) + 1
    else:
        counts = step * np.floor((asked + step / 2) / step + 1e-9).astype(np.int64)
    whole = full // step * step
    counts = np.where((counts > whole) | (asked > full - 1e-9), full, np.maximum(counts, step))
    return _balanced(counts, asked, full, step) if exact_budget else counts


def _balanced(counts: np.ndarray, asked: np.ndarray, full: np.ndarray, step: int) -> np.ndarray:
    """Steps given to the layers rounded down most, or taken from those rounded up most, while the total comes nearer.

    Layers of one width that ask for the same move together: only rounding would set them apart, and a model whose layers
    are alike is worth more than its last few channels.
    """
    counts = counts.copy()
    _, alike = np.unique(np.stack([asked, full], axis=1), axis=0, return_inverse=True)
    members = np.bincount(alike.ravel())[alike.ravel()]
    while True:
        off = counts.sum() - asked.sum()
        higher = np.where(counts + step > full, full, counts + step)
        lower = np.maximum(np.where(counts % step, counts - counts % step, counts - step), step)
        new = higher if off < 0 else lower
        moved = members * (new - counts)
        nearer = (moved != 0) & (abs(off + moved) < abs(off) - 1e-9)
        if not nearer.any():
            return counts
        i = int(np.argmax(np.where(nearer, (asked - counts) * -np.sign(off), -np.inf)))
        together = alike.ravel() == alike.ravel()[i]
        counts[together] = new[together]


def proportional_ranks(
    shares: Float[np.ndarray, " layers"], r_avg: int = 8, *, r_min: int = 2, r_max: int = 32
) -> Int[np.ndarray, " layers"]:
    """Whole numbers in [r_min, r_max], proportional to the shares where these limits allow, of mean r_avg exactly."""
    if not r_min <= r_avg <= r_max:
        raise ValueError(f"r_avg must lie in [r_min, r_max]; got {r_min}, {r_avg}, {r_max}")
    g = np.asarray(shares, np.float64)
    total = r_avg * len(g)
    low, high = 0.0, r_max / g.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * g, r_min, r_max).sum() < total else (low, middle)
    exact = np.clip(high * g, r_min, r_max)
    ranks = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(ranks - exact, kind="stable")  # largest remainder first
    ranks[order[: total - ranks.sum()]] += 1
    return ranks
