"""WoodFisher and WoodTaylor (Singh & Alistarh, NeurIPS 2020): weights whose loss the inverse Fisher matrix says is least.

1. F is block-diagonal: blocks of neighbouring weights inside each leaf (or one block of all leaves).
2. Score of weight q: w_q^2 / (2 [F^-1]_qq). The lowest scores go, of all leaves together or of each leaf.
3. What stays moves by the sum of the single updates: w <- w - F^-1 sum_q w_q / [F^-1]_qq e_q, then the mask.
WoodTaylor keeps the gradient gbar too: everywhere w - F^-1 gbar in place of w.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jprune.methods.weights.second_order.fisher import inverse
from jprune.methods.weights.second_order.flat import Flat, Keep, Pruned, Views, blocks, flat, most, row
from jprune.methods.weights.second_order.settings import checked


@dataclasses.dataclass(frozen=True)
class WoodFisherConfig:
    """Settings of WoodFisher.

    Attributes:
      damp: added to the diagonal of the Fisher matrix; its authors use 1e-5
      block: neighbouring weights of a leaf that share a block of it; None: one block of all leaves
      average: samples whose mean is one gradient of the Fisher matrix
      taylor: use the gradient itself too (WoodTaylor)
      scale: factor on the update of what stays
    """

    damp: float = 1e-5
    block: int | None = 12288
    average: int = 1
    taylor: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        checked(self)


def woodfisher(
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    keep: Keep,
    config: WoodFisherConfig = WoodFisherConfig(),
    *,
    masks: Mapping[str, Any] | None = None,
    views: Views | None = None,
) -> Pruned:
    """Prune by WoodFisher's scores and updates; jit-able, with `keep` and `config` static.

        >>> w = {"w": jnp.array([[3.0, 1.0], [2.0, 1.5]])}
        >>> print(woodfisher(w, {"w": jnp.eye(4).reshape(4, 2, 2)}, 2).masks["w"])  # F is a multiple of I: the largest stay
        [[ True False]
         [ True False]]

    Args:
      weights: {path: leaf}.
      gradients: {path: (samples, *leaf shape)}, every sample's own.
      keep: weights that stay, of all leaves together, or {path: of the leaf}.
      masks: weights that are already gone; they stay gone and count nothing.
      views: leaves as matrices where convention does not hold.

    Raises:
      ValueError: leaves, shapes or counts that do not fit, values that are not finite.
    """
    all_ = flat(weights, gradients, keep, masks=masks, views=views, average=config.average)
    return all_.pruned(*_pruned(config, all_))


@partial(jax.jit, static_argnums=0)
def _pruned(config: WoodFisherConfig, all_: Flat) -> tuple[Any, Any, Any]:
    """(the row moved, what stays of it, dampings)."""
    segments, found = all_.segments(config.block), []
    for span, size in segments:
        w, g = blocks(all_.w[span], size), blocks(all_.g[:, span], size)
        f = inverse(g, config.damp)
        found.append((f, w, f.times(g.mean(0)) if config.taylor else jnp.zeros_like(w)))
    scores = [
        row((w - step) ** 2 / (2 * f.diagonal()), s) for (s, _), (f, w, step) in zip(segments, found, strict=True)
    ]
    stays = all_.stays(jnp.concatenate(scores))
    rows = []
    for (span, size), (f, w, step) in zip(segments, found, strict=True):
        gone = blocks(~stays[span], size)
        delta = f.times(gone * (w - step) / f.diagonal()) + step
        rows.append(row(w - config.scale * delta, span))
    return jnp.concatenate(rows), stays, most([f.damp for f, _, _ in found])
