"""oBERT (Kurtic et al., EMNLP 2022): WoodFisher in small blocks of many gradients, for single weights or groups of 4.

1. F in blocks of 50 neighbouring weights of a leaf, all blocks at once.
2. Score of a group Q of weights: w_Q^T ([F^-1]_QQ)^-1 w_Q / 2. The lowest go, of all leaves together or of each leaf.
3. w <- w - F^-1 sum_Q E_Q ([F^-1]_QQ)^-1 w_Q, then the mask.
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
class OBERTConfig:
    """Settings of oBERT.

    Attributes:
      damp: added to the diagonal of the Fisher matrix
      block: neighbouring weights of a leaf that share a block of it
      group: neighbouring weights that stay or go together: 1, or 4 for block-sparse kernels
      average: samples whose mean is one gradient of the Fisher matrix
    """

    damp: float = 1e-7
    block: int = 50
    group: int = 1
    average: int = 1

    def __post_init__(self) -> None:
        checked(self, {
            "block": (self.block is not None and self.block >= 1, "at least 1"),
            "group": (self.group >= 1 and self.block % self.group == 0, f"a divisor of the block, {self.block}"),
        })  # fmt: skip


def obert(
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    keep: Keep,
    config: OBERTConfig = OBERTConfig(),
    *,
    masks: Mapping[str, Any] | None = None,
    views: Views | None = None,
) -> Pruned:
    """Prune by oBERT's scores and updates; jit-able, with `keep` and `config` static.

        >>> w = {"w": jnp.array([[3.0, 1.0], [2.0, 1.5]])}
        >>> print(obert(w, {"w": jnp.eye(4).reshape(4, 2, 2)}, 2, OBERTConfig(block=4)).masks["w"])
        [[ True False]
         [ True False]]

    Args:
      keep: weights that stay, of all leaves together, or {path: of the leaf}; whole groups.

    The other arguments and errors are those of `woodfisher`.
    """
    all_ = flat(weights, gradients, keep, masks=masks, views=views, average=config.average, multiple=config.group)
    return all_.pruned(*_pruned(config, all_))


@partial(jax.jit, static_argnums=0)
def _pruned(config: OBERTConfig, all_: Flat) -> tuple[Any, Any, Any]:
    """(the row moved, what stays of it, dampings)."""
    group, segments, scores, found = config.group, all_.segments(config.block), [], []
    for span, size in segments:
        w = blocks(all_.w[span], size)
        f = inverse(blocks(all_.g[:, span], size), config.damp)
        by_group = w.reshape(len(w), -1, group)
        solved = jnp.linalg.solve(f.of_groups(group), by_group[..., None])[..., 0]
        scores.append(row(jnp.sum(by_group * solved, -1) / 2, slice(0, (span.stop - span.start) // group)))
        found.append((f, w, solved.reshape(w.shape)))
    stays = all_.stays(jnp.repeat(jnp.concatenate(scores), group))
    rows = []
    for (span, size), (f, w, solved) in zip(segments, found, strict=True):
        rows.append(row(w - f.times(blocks(~stays[span], size) * solved), span))
    return jnp.concatenate(rows), stays, most([f.damp for f, _, _ in found])
