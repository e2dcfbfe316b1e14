"""How many weights each layer keeps: counted from scores, or from closed forms that need neither data nor gradients.

A density is kept weights over all weights of one kernel or matrix; everything here is host-side, {leaf path: float}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from jprune.importance.at_init import weight_masks
from jprune.tracing.errors import suggest

Densities = dict[str, float]


def densities(scores: Mapping[str, Any], keep: float, exempt: Sequence[str] = ()) -> Densities:
    """Kept over total of every weight when the global fraction `keep` with the largest scores stays.

    Args:
      scores: {leaf path: array}, larger is kept.
      keep: fraction of all weights that stays, in (0, 1].
      exempt: paths that compete for the threshold but get no density: nothing is asked of their widths.

    Raises:
      ValueError: an exempt path without scores, a keep ratio outside (0, 1], or scores that are not finite.
    """
    for p in exempt:
        if p not in scores:
            raise ValueError(f"exempt names {p!r}, which has no scores{suggest(p, scores)}")
    return {p: float(m.mean()) for p, m in weight_masks(scores, keep).items() if p not in exempt}


def mean_densities(several: Sequence[Densities]) -> Densities:
    """Layer-wise mean of the densities of several initialisations."""
    return {p: float(np.mean([d[p] for d in several])) for p in several[0]}


def erk(shapes: Mapping[str, Sequence[int]], keep: float) -> Densities:
    """Erdos-Renyi-kernel densities, proportional to sum(shape) / prod(shape), at most 1 (Evci et al. 2020, section 3).

    A kernel (kh, kw, in, out) gets (in + out + kh + kw) / (in out kh kw).
    """
    return proportional({p: sum(s) / np.prod(s) for p, s in shapes.items()}, _counts(shapes), keep)


def reverse(shapes: Mapping[str, Sequence[int]], keep: float) -> Densities:
    """Densities proportional to the layer's own size: a control that has to lose against every sensible choice."""
    n = _counts(shapes)
    return proportional(n, n, keep)


def proportional(to: Mapping[str, float], n: Mapping[str, int], keep: float) -> Densities:
    """min(1, c * to) with the c at which the mean density, weighted by the counts `n`, is `keep`.

    Raises:
      ValueError: a keep ratio outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"the keep ratio is {keep}: it is the fraction of weights that stays, in (0, 1]")
    t, count = np.array([to[p] for p in n], np.float64), np.array(list(n.values()), np.float64)

    def density(log_c: float) -> np.ndarray:
        return np.minimum(1.0, np.exp(log_c) * t)

    c = _bisect(
        lambda c: float(count @ density(c) - keep * count.sum()), -np.log(t.max() / keep) - 50, -np.log(t.min())
    )
    return dict(zip(n, map(float, density(c)), strict=True))


def synexp(
    n: Real[np.ndarray, " layers"],
    f: Real[np.ndarray, " layers"],
    params: float | None = None,
    macs: float | None = None,
    cap: float = 1.0,
) -> Float[np.ndarray, " layers"]:
    """Densities p that maximise sum(log p), the expected synaptic flow of a chain, under one budget or two (SynExp).

        sum n p <= params,  sum f p <= macs,  0 < p <= cap:     p = min(cap, 1 / (lambda n + mu f))

    Skips are ignored. With a budget on parameters alone, all layers below the cap keep the same number of weights.

    Args:
      n: weights of every layer.
      f: MACs of every layer.
      params, macs: the budgets; at least one.
      cap: largest density: 1 narrows only, more lets layers grow.

    Raises:
      ValueError: no budget, one that is not positive, or a cap that is not.
    """
    n, f = np.asarray(n, np.float64), np.asarray(f, np.float64)
    if params is None and macs is None:
        raise ValueError("give params=, macs= or both: without a budget every layer keeps everything")
    if not all(b is None or b > 0 for b in (params, macs)) or not cap > 0 or not ((n > 0) & (f > 0)).all():
        raise ValueError(f"counts, budgets and cap must be above 0; got params={params}, macs={macs}, cap={cap}")

    def p(log_lambda: float, log_mu: float) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.minimum(cap, 1.0 / (np.exp(log_lambda) * n + np.exp(log_mu) * f))

    def alone(cost: np.ndarray, budget: float, at: Callable[[float], np.ndarray]) -> float:
        """The smallest log multiplier at which the budget holds."""
        if cost @ np.minimum(cap, at(-np.inf)) <= budget:
            return -np.inf
        return _bisect(
            lambda m: float(budget - cost @ at(m)), -np.log(cost.max() * cap) - 50, np.log(len(cost) / budget)
        )

    with np.errstate(divide="ignore"):
        for_params = -np.inf if params is None else alone(n, params, lambda m: p(m, -np.inf))
        if macs is None or f @ p(for_params, -np.inf) <= macs * (1 + 1e-12):
            return p(for_params, -np.inf)
        for_macs = alone(f, macs, lambda m: p(-np.inf, m))
        if params is None or n @ p(-np.inf, for_macs) <= params * (1 + 1e-12):
            return p(-np.inf, for_macs)

        def given(mu: float) -> np.ndarray:  # the best p at this price of a MAC that keeps to the parameters
            return p(alone(n, params, lambda m: p(m, mu)), mu)

        return given(_bisect(lambda m: float(macs - f @ given(m)), for_macs - 80, for_macs))


def _bisect(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function crosses 0."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) >= 0 else (middle, high)
    return high


def _counts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {p: int(np.prod(s)) for p, s in shapes.items()}
