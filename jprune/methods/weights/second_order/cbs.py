"""CBS, the combinatorial brain surgeon (Yu et al., ICML 2022): which weights go is chosen jointly, by swaps.

CBS-S: min (w x)^T F (w x) over x in {0, 1}^p with a fixed sum, x_i = 1 where the weight goes, F = G^T G / N.
1. Start from the smallest magnitudes; or from RMP, the best of many random divisions into about sqrt(p) chunks, of which
   each loses its smallest weights.
2. A pass: order those that are gone by alpha_i, what bringing i back gains; those that stay by what removing j costs once
   the best i is back. For the a-th gone one try the positions a - rho ... a + rho of the other order and take the first
   swap that gains eps at least, given all swaps made so far. The pass ends after tau that found none.
3. Passes until the best pair gains less than eps, or the loss has not fallen for `patience` passes.
CBS-U: what stays moves by the joint update of optimal brain surgery.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jprune.methods.weights.second_order.fisher import refit
from jprune.methods.weights.second_order.flat import Flat, Keep, Pruned, Views, blocks, flat, most, row, together
from jprune.methods.weights.second_order.settings import checked


@dataclasses.dataclass(frozen=True)
class CBSConfig:
    """Settings of CBS.

    Attributes:
      start: the first choice: "magnitude", or "rmp", the best of many random divisions into chunks
      divisions: random divisions that "rmp" tries
      eps: least gain of a swap
      rho: positions that are tried before and behind
      tau: weights without a swap that end a pass
      passes: most passes
      patience: passes without a lower loss that end the search
      update: move what stays (CBS-U)
      damp: added to the diagonal of the Fisher matrix of the update
      block: neighbouring weights of a leaf that share a block of the Fisher matrix; None: one block of all leaves
      average: samples whose mean is one gradient of the Fisher matrix
      seed: of the random divisions
    """

    start: Literal["magnitude", "rmp"] = "magnitude"
    divisions: int = 50
    eps: float = 1e-4
    rho: int = 10
    tau: int = 20
    passes: int = 100
    patience: int = 5
    update: bool = True
    damp: float = 1e-3
    block: int | None = None
    average: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self, {
            "start": (self.start in ("magnitude", "rmp"), "'magnitude' or 'rmp'"),
            "divisions": (self.divisions >= 1, "at least 1"), "eps": (self.eps > 0, "above 0"),
            "rho": (self.rho >= 0, "at least 0"), "tau": (self.tau >= 1, "at least 1"),
            "passes": (self.passes >= 0, "at least 0"), "patience": (self.patience >= 1, "at least 1"),
        })  # fmt: skip


def cbs(
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    keep: Keep,
    config: CBSConfig = CBSConfig(),
    *,
    masks: Mapping[str, Any] | None = None,
    views: Views | None = None,
    loss: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Pruned:
    """Prune by swaps (CBS-S), then move what stays (CBS-U). Host-side: the data decides how many passes there are.

        >>> w, g = {"w": jnp.array([[1.0, 0.9, 0.8]])}, jnp.array([[[2.0, 0.0, 0.0]], [[0.0, 2.0, 2.0]]])
        >>> print(cbs(w, {"w": g}, 1).masks["w"])  # the two smallest do the same: not both of them may go
        [[False  True False]]

    Args:
      keep: weights that stay, of all leaves together; or {path: of the leaf}: then every leaf is solved by itself.
      loss: {path: leaf} -> loss on the samples, which ranks RMP's divisions and ends the search; None: the objective.

    The other arguments and errors are those of `woodfisher`.
    """
    all_ = flat(weights, gradients, keep, masks=masks, views=views, average=config.average)
    if isinstance(all_.keep, tuple):
        return together([_solved(x, config, _with_others(loss, weights)) for x in all_.alone()])
    return _solved(all_, config, loss)


def _with_others(loss: Any, weights: Mapping[str, Any]) -> Any:
    return None if loss is None else lambda own: loss({**weights, **own})


def _solved(all_: Flat, config: CBSConfig, loss: Any) -> Pruned:
    block_of, count = _blocks_of(all_, config.block)
    v = (all_.g * all_.w).T  # row i: w_i g_si of every sample

    def value(gone: Any) -> float:
        if loss is None:
            return float(_objective(v, gone, block_of, count))
        return float(loss(all_.pruned(all_.w, ~gone, jnp.zeros(())).weights))

    gone = _start(all_, config, value)
    best, least, without = gone, value(gone), 0
    for _ in range(config.passes):
        gone, swaps = _pass(config.rho, config.tau, count, v, gone, all_.alive, block_of, config.eps)
        if int(swaps) == 0:
            break
        now = value(gone)
        best, least, without = (gone, now, 0) if now < least else (best, least, without + 1)
        if without == config.patience:
            break
    if not config.update:
        return all_.pruned(all_.w, ~best, jnp.zeros(()))
    return all_.pruned(*_updated(config, all_, ~best))


@partial(jax.jit, static_argnums=0)
def _updated(config: CBSConfig, all_: Flat, stays: Any) -> tuple[Any, Any, Any]:
    """(the row moved, what stays of it, dampings)."""
    rows, damps = [], []
    for span, size in all_.segments(config.block):
        g, w = blocks(all_.g[:, span], size).swapaxes(0, 1), blocks(all_.w[span], size)
        each = (w, g, blocks(stays[span], size))
        moved, used = lax.map(lambda x: refit(x[0], x[1], x[2], len(all_.g) * config.damp), each)
        rows.append(row(moved, span))
        damps.append(used / len(all_.g))
    return jnp.concatenate(rows), stays, most(damps)


def _start(all_: Flat, config: CBSConfig, value: Callable[[Any], float]) -> Any:
    size, keep = jnp.abs(all_.w), all_.keep
    assert isinstance(keep, int)
    if config.start == "magnitude":
        return ~all_.stays(size)
    rng, host, live = np.random.default_rng(config.seed), np.asarray(size), np.flatnonzero(np.asarray(all_.alive))
    chunks = max(1, min(math.isqrt(live.size), 1000))
    starts = []
    for _ in range(config.divisions):
        gone = np.ones(host.size, bool)
        ends = np.linspace(0, live.size, chunks + 1).astype(int)
        shares = np.floor(ends * (keep / live.size) + 0.5).astype(int)
        for part, n in zip(np.split(rng.permutation(live), ends[1:-1]), np.diff(shares), strict=True):
            gone[part[np.argsort(-host[part], kind="stable")[:n]]] = False
        starts.append(gone)
    return jnp.asarray(min(starts, key=lambda gone: value(jnp.asarray(gone))))


def _blocks_of(all_: Flat, block: int | None) -> tuple[Any, int]:
    """(number of the block that every weight is in, how many there are)."""
    numbers, count = [], 0
    for span, size in all_.segments(block):
        n = span.stop - span.start
        numbers.append(count + np.arange(n) // size)
        count += -(-n // size)
    return jnp.asarray(np.concatenate(numbers), jnp.int32), count


def _sums(v: Any, gone: Any, block_of: Any, count: int) -> Float[Array, "blocks samples"]:
    """G (w x) of every block."""
    return jax.ops.segment_sum(jnp.where(gone[:, None], v, 0), block_of, count)


@partial(jax.jit, static_argnums=3)
def _objective(v: Float[Array, "p samples"], gone: Bool[Array, " p"], block_of: Any, count: int) -> Float[Array, ""]:
    """(w x)^T F (w x)."""
    return jnp.sum(_sums(v, gone, block_of, count) ** 2) / v.shape[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pass(rho: int, tau: int, count: int, v: Any, gone: Any, alive: Any, block_of: Any, eps: Any) -> tuple[Any, Any]:
    """One pass of swaps: (what is gone after it, the number of swaps)."""
    n = v.shape[1]
    sums = _sums(v, gone, block_of, count)
    own = jnp.sum(v * v, axis=1) / n
    cross = 2 * jnp.sum(v * sums[block_of], axis=1) / n
    back = gone & alive
    first = jnp.argsort(jnp.where(back, own - cross, jnp.inf), stable=True)  # by alpha = cross - own, descending
    with_top = 2 * v @ v[first[0]] / n * (block_of == block_of[first[0]])
    second = jnp.argsort(jnp.where(gone, jnp.inf, cross + own - with_top), stable=True)
    many, others = back.sum(), (~gone).sum()

    def more(state: Any) -> Any:
        a, misses, swaps, *_ = state
        return (a < many) & (misses < tau) & ((a == 0) | (swaps > 0))

    def try_one(state: Any) -> Any:
        a, misses, swaps, used, gone, sums = state
        near = jnp.clip(a + jnp.arange(-rho, rho + 1), 0, others - 1)
        real = (near == a + jnp.arange(-rho, rho + 1)) & ~used[near] & ((a > 0) | (near == 0))
        i, j = first[a], second[near]
        same = block_of[j] == block_of[i]
        alpha = 2 * v[i] @ sums[block_of[i]] / n - own[i]
        beta = 2 * jnp.sum(v[j] * sums[block_of[j]], axis=1) / n + own[j]
        gamma = 2 * v[j] @ v[i] / n * same
        good = real & (alpha - beta + gamma >= eps)
        found, pick = good.any(), jnp.argmax(good)
        out = j[pick]
        step = jnp.where(found, 1, 0)
        sums = sums.at[block_of[out]].add(step * v[out]).at[block_of[i]].add(-step * v[i])
        gone = gone.at[i].set(jnp.where(found, False, gone[i])).at[out].set(jnp.where(found, True, gone[out]))
        used = used.at[near[pick]].set(used[near[pick]] | found)
        return a + 1, misses + ~found, swaps + found, used, gone, sums

    zero = jnp.array(0)
    _, _, swaps, _, gone, _ = lax.while_loop(more, try_one, (zero, zero, zero, jnp.zeros(gone.size, bool), gone, sums))
    return gone, swaps
