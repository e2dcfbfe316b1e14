"""CAP, also called oViT (Kuznedelev et al., NeurIPS 2023): optimal brain surgeon one weight at a time in every block.

1. In every block until it is empty: remove q = argmin w_q^2 / [F^-1]_qq, add half of that to the block's loss, move the
   rest, w <- w - F^-1_{:,q} w_q / [F^-1]_qq, and take q out of F^-1. The score of q is the loss so far.
2. The weights with the lowest scores go, of all leaves together or of each leaf: the first ones of every block.
3. What stays has the values it had at that point of the block's trace. They are those of the joint update for the set
   that went, and are computed so: a trace of every block after every removal would be size times as large as the weights.
N:M: only weights of groups that still have more than N are candidates, until every group has N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jprune.methods.weights.second_order.fisher import inverse, refit
from jprune.methods.weights.second_order.flat import Flat, Keep, Pruned, Views, blocks, flat, most, row
from jprune.methods.weights.second_order.settings import checked
from jprune.surgery.patterns import NM, groups_of, view_of


@dataclasses.dataclass(frozen=True)
class CAPConfig:
    """Settings of CAP.

    Attributes:
      damp: added to the diagonal of the Fisher matrix
      block: neighbouring weights of a leaf that share a block of it
      average: samples whose mean is one gradient of the Fisher matrix
      pattern: an N:M pattern along the inputs; None: no pattern
    """

    damp: float = 1e-8
    block: int = 192
    average: int = 1
    pattern: NM | None = None

    def __post_init__(self) -> None:
        rules = {"block": (self.block is not None and self.block >= 1, "at least 1")}
        if self.pattern is not None:
            fits = self.pattern.axis == "input" and not self.pattern.pad
            rules["pattern"] = (fits, "along the inputs and without padding")
            rules["block"] = (self.block >= 1 and self.block % self.pattern.of == 0, f"a multiple of {self.pattern.of}")
        checked(self, rules)


def cap(
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    keep: Keep | None,
    config: CAPConfig = CAPConfig(),
    *,
    masks: Mapping[str, Any] | None = None,
    views: Views | None = None,
) -> Pruned:
    """Prune by greedy, exact optimal brain surgery in blocks; jit-able, with `keep` and `config` static.

        >>> w = {"w": jnp.array([[3.0, 1.0], [2.0, 1.5]])}
        >>> print(cap(w, {"w": jnp.eye(4).reshape(4, 2, 2)}, 2).masks["w"])
        [[ True False]
         [ True False]]

    Args:
      keep: weights that stay, of all leaves together, or {path: of the leaf}; None with a pattern, which says it.

    The other arguments are those of `woodfisher`. Cost: size^3 for every block of that size.

    Raises:
      ValueError: what `woodfisher` refuses, a count besides a pattern, or an axis that the pattern does not divide.
    """
    if (keep is None) == (config.pattern is None):
        raise ValueError(
            f"keep is {keep} and the pattern {config.pattern}: give one of them, they both say how many stay"
        )
    all_ = flat(weights, gradients, keep, masks=masks, views=views, average=config.average)
    if config.pattern is not None:
        for x in all_.layout:
            groups_of(x.path, config.pattern, view_of(x.path, x.shape, views))
    return all_.pruned(*_pruned(config, all_))


@partial(jax.jit, static_argnums=0)
def _pruned(config: CAPConfig, all_: Flat) -> tuple[Any, Any, Any]:
    """(the row moved, what stays of it, dampings)."""
    segments, traces, damps = all_.segments(config.block), [], []
    group = None if config.pattern is None else (config.pattern.keep, config.pattern.of)
    for span, size in segments:
        f = inverse(blocks(all_.g[:, span], size), config.damp)
        there = blocks(jnp.ones(span.stop - span.start, bool), size)
        of = (blocks(all_.w[span], size), f.matrix(), there)
        traces.append(lax.map(lambda x: _trace(x[0], x[1], x[2], group), of, batch_size=64))
        damps.append(f.damp)
    gone, rows = _gone(all_, traces), []
    for (span, size), damp, out in zip(segments, damps, gone, strict=True):
        g, w = blocks(all_.g[:, span], size).swapaxes(0, 1), blocks(all_.w[span], size)
        moved, _ = lax.map(lambda x: refit(x[0], x[1], ~x[2], len(all_.g) * x[3]), (w, g, out, damp), batch_size=64)
        rows.append(row(moved, span))
    stays = ~jnp.concatenate([row(out, span) for out, (span, _) in zip(gone, segments, strict=True)])
    return jnp.concatenate(rows), stays, most(damps)


def _trace(
    w: Float[Array, " n"], f: Float[Array, "n n"], there: Bool[Array, " n"], group: tuple[int, int] | None
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """(which weight goes at every step, the block's loss after it: infinite where nothing may go any more)."""

    def step(state: Any, _: Any) -> Any:
        w, f, left, loss = state
        may = left
        if group is not None:
            enough = left.reshape(-1, group[1]).sum(-1) > group[0]
            may = left & jnp.repeat(enough, group[1])
        diagonal = jnp.diagonal(f)
        score = jnp.where(may, w**2 / jnp.where(left, diagonal, 1), jnp.inf)
        q = jnp.argmin(score)
        some = may.any()
        column, pivot = f[:, q], jnp.where(some, diagonal[q], 1)
        loss = loss + jnp.where(some, score[q] / 2, 0)
        after = (w - column * (w[q] / pivot)).at[q].set(0), f - jnp.outer(column, column) / pivot, left.at[q].set(False)
        w, f, left = (jnp.where(some, new, old) for new, old in zip(after, (w, f, left), strict=True))
        return (w, f, left, loss), (q, jnp.where(some, loss, jnp.inf))

    return lax.scan(step, (w, f, there, jnp.zeros((), w.dtype)), None, length=w.size)[1]


def _gone(all_: Flat, traces: list[Any]) -> list[Any]:
    """For every segment, which weights of its blocks go."""
    if all_.keep is None:
        counts = [jnp.isfinite(losses).sum(-1) for _, losses in traces]
    else:
        # the losses of a block only grow, so what of it lies below a threshold is the beginning of its trace
        by_step = [losses.reshape(-1) for _, losses in traces]
        padding = [x.size - (s.stop - s.start) for x, s in zip(by_step, all_.spans(), strict=True)]
        if isinstance(all_.keep, tuple):
            each = zip(by_step, all_.keep, padding, strict=True)
            stay = [_last(x, k + more) for x, k, more in each]
        else:
            ends = np.cumsum([x.size for x in by_step])[:-1]
            stay = jnp.split(_last(jnp.concatenate(by_step), all_.keep + sum(padding)), ends)
        counts = [(~s).reshape(losses.shape).sum(-1) for s, (_, losses) in zip(stay, traces, strict=True)]
    out = []
    for (order, _), n in zip(traces, counts, strict=True):
        first = jnp.arange(order.shape[-1]) < n[:, None]
        out.append(jax.vmap(lambda o, go: jnp.zeros(o.shape, bool).at[o].max(go))(order, first))
    return out


def _last(losses: Float[Array, " n"], keep: int) -> Bool[Array, " n"]:
    """True for the `keep` largest; where losses tie, those of later steps."""
    order = jnp.argsort(losses, stable=True)
    return jnp.zeros(losses.size, bool).at[order[losses.size - keep :]].set(True)
