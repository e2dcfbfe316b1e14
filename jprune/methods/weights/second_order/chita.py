"""CHITA (Benbaki et al., ICML 2023): the weights that stay, and their values, as a sparse regression on the gradients.

    min_b 1/2 |G (w - b)|^2 + lam |b - w|^2 + alpha b,   |b|_0 <= k,   lam = l2 N / 2

G holds the samples' gradients and alpha is their mean, or 0. G^T G is never made.
1. Hard thresholding: b <- the k largest of b - eta grad, from the k largest weights on. eta is the exact minimiser along
   the gradient on the support, where the support stays the same up to there; otherwise from where the support changes
   (at least 1/L) on, it is doubled for as long as the objective falls.
2. Only `active` k coordinates take part; a step of all of them finds who is missing, until nobody is.
3. Backsolve: ridge regression on the final support.
Blocks: the k largest weights stay, and the backsolve runs in every block. CHITA++ is several stages of this, each with
gradients at the weights of the stage before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jprune.methods.weights.second_order.fisher import refit, ridge
from jprune.methods.weights.second_order.flat import (
    Flat,
    Keep,
    Pruned,
    Views,
    blocks,
    flat,
    largest,
    most,
    row,
    together,
)
from jprune.methods.weights.second_order.settings import checked

DOUBLINGS = 30


@dataclasses.dataclass(frozen=True)
class CHITAConfig:
    """Settings of CHITA.

    Attributes:
      l2: weight of the distance from the given weights, per sample
      first_order: use the mean gradient too
      steps: most steps of hard thresholding, for every active set
      tolerance: relative fall of the objective that ends them
      active: coordinates that take part, as a multiple of those that stay
      rounds: most active sets
      block: neighbouring weights of a leaf that are solved by themselves; None: all together, with hard thresholding
      average: samples whose mean is one gradient
    """

    l2: float = 1e-3
    first_order: bool = False
    steps: int = 200
    tolerance: float = 1e-6
    active: float = 1.5
    rounds: int = 20
    block: int | None = None
    average: int = 1

    def __post_init__(self) -> None:
        checked(self, {
            "steps": (self.steps >= 0, "at least 0"), "tolerance": (self.tolerance >= 0, "at least 0"),
            "active": (self.active >= 1, "at least 1"), "rounds": (self.rounds >= 1, "at least 1"),
        })  # fmt: skip


class Problem(NamedTuple):
    """min_b 1/2 |y - G b|^2 + lam |b - w|^2 + alpha b."""

    g: Float[Array, "samples n"]
    y: Float[Array, " samples"]
    w: Float[Array, " n"]
    alpha: Float[Array, " n"]
    lam: Float[Array, ""]

    def left(self, b: Any) -> Float[Array, " samples"]:
        """The residual r = y - G b."""
        return self.y - self.g @ b

    def value(self, b: Any, r: Any) -> Float[Array, ""]:
        """The objective, up to what coordinates cost that take no part."""
        return r @ r / 2 + self.lam * jnp.sum((b - self.w) ** 2) + self.alpha @ b

    def gradient(self, b: Any, r: Any) -> Float[Array, " n"]:
        """Of the objective."""
        return -(r @ self.g) + self.alpha + 2 * self.lam * (b - self.w)


def chita(
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    keep: Keep,
    config: CHITAConfig = CHITAConfig(),
    *,
    masks: Mapping[str, Any] | None = None,
    views: Views | None = None,
) -> Pruned:
    """Prune by sparse regression. Host-side: the data decides how many active sets there are.

        >>> w = {"w": jnp.array([[3.0, 1.0], [2.0, 1.5]])}
        >>> print(chita(w, {"w": jnp.eye(4).reshape(4, 2, 2)}, 2).masks["w"])
        [[ True False]
         [ True False]]

    Args:
      keep: weights that stay, of all leaves together; or {path: of the leaf}: then every leaf is solved by itself.

    The other arguments and errors are those of `woodfisher`; `damp` of the result is the l2 that was needed.
    """
    all_ = flat(weights, gradients, keep, masks=masks, views=views, average=config.average)
    each = all_.alone() if isinstance(all_.keep, tuple) else [all_]
    solve = _supported if config.block is None else _largest_kept
    return together([x.pruned(*solve(config, x)) for x in each])


def _supported(config: CHITAConfig, all_: Flat) -> tuple[Any, Any, Any]:
    """(weights, support, l2) by hard thresholding of active sets and a backsolve."""
    whole, short, b, stays = _start(config, all_)
    for _ in range(config.rounds):
        b, stays, missing = _round(config, all_, whole, short, b, stays)
        if not bool(missing):
            break
    return _backsolved(all_, whole, stays)


@partial(jax.jit, static_argnums=0)
def _start(config: CHITAConfig, all_: Flat) -> Any:
    """(the problem, a step that always lowers it, the largest weights, which they are)."""
    n = len(all_.g)
    alpha = jnp.where(config.first_order, all_.g.mean(0), 0)
    whole = Problem(all_.g, all_.g @ all_.w, all_.w, alpha, jnp.asarray(config.l2 * n / 2, all_.w.dtype))
    stays = all_.stays(jnp.abs(all_.w))
    short = 1 / (1.05 * (_largest_singular_value(all_.g) ** 2 + 2 * whole.lam))
    return whole, short, jnp.where(stays, all_.w, 0), stays


@partial(jax.jit, static_argnums=0)
def _round(config: CHITAConfig, all_: Flat, whole: Problem, short: Any, b: Any, stays: Any) -> Any:
    """(b, its support, whether a coordinate is missing) after hard thresholding of one active set."""
    p, alive, keep = all_.w.size, all_.alive, all_.keep
    assert isinstance(keep, int)
    size = min(p, math.ceil(config.active * keep))

    wish = jnp.where(alive, jnp.abs(b - short * whole.gradient(b, whole.left(b))), -1)
    wanted = largest(jnp.where(stays, jnp.inf, wish), size)
    index = jnp.nonzero(wanted, size=size)[0]
    # what takes no part is 0: it adds a constant to the objective and nothing to the gradient
    part = Problem(whole.g[:, index], whole.y, whole.w[index], whole.alpha[index], whole.lam)
    of = (part, alive[index], b[index], stays[index], short)
    part_b, part_stays = _thresholded(config.steps, config.tolerance, keep, *of)
    b = jnp.zeros(p, b.dtype).at[index].set(part_b)
    stays = jnp.zeros(p, bool).at[index].set(part_stays)
    b, stays = _thresholded(1, 0.0, keep, whole, alive, b, stays, short)
    return b, stays, jnp.any(stays & ~wanted)


@jax.jit
def _backsolved(all_: Flat, whole: Problem, stays: Any) -> tuple[Any, Any, Any]:
    assert isinstance(all_.keep, int)
    index = jnp.nonzero(stays, size=all_.keep)[0]
    rest = whole.g @ jnp.where(stays, 0, all_.w)
    d, used = ridge(whole.g[:, index], rest, 2 * whole.lam, whole.alpha[index])
    return jnp.zeros_like(all_.w).at[index].set(all_.w[index] + d), stays, used / len(all_.g)


@partial(jax.jit, static_argnums=0)
def _largest_kept(config: CHITAConfig, all_: Flat) -> tuple[Any, Any, Any]:
    """The largest weights, with a backsolve in every block."""
    n, rows, used = len(all_.g), [], []
    assert config.block is not None
    alpha, stays = jnp.where(config.first_order, all_.g.mean(0), 0), all_.stays(jnp.abs(all_.w))
    for span, size in all_.segments(config.block):
        g, w = blocks(all_.g[:, span], size).swapaxes(0, 1), blocks(all_.w[span], size)
        each = (w, g, blocks(stays[span], size), blocks(alpha[span], size))
        moved, penalty = lax.map(lambda x: refit(x[0], x[1], x[2], n * config.l2, x[3]), each)
        rows.append(row(moved, span))
        used.append(penalty / n)
    return jnp.concatenate(rows), stays, most(used)


def _thresholded(
    steps: int, tolerance: float, keep: int, of: Problem, alive: Any, b: Any, stays: Any, short: Any
) -> tuple[Any, Any]:
    """(b, its support) after steps of hard thresholding that each lower the objective."""

    def top(b: Any) -> tuple[Any, Bool[Array, " n"]]:
        support = largest(jnp.where(alive, jnp.abs(b), -1), keep)
        return jnp.where(support, b, 0), support

    def step(state: Any) -> Any:
        b, stays, r, value, _, count = state
        gradient = of.gradient(b, r)
        inside = jnp.where(stays, gradient, 0)
        outside = jnp.max(jnp.where(stays | ~alive, 0, jnp.abs(gradient)))
        through = of.g @ inside
        slope = inside @ inside
        exact = slope / jnp.maximum(through @ through + 2 * of.lam * slope, jnp.finfo(b.dtype).tiny)
        # a weight of the support falls behind the best outsider where |b| - eta g sign(b) = eta |outsider's gradient|
        faster = outside + inside * jnp.where(b < 0, -1, 1)
        change = jnp.min(jnp.where(stays & (faster > 0), jnp.abs(b) / jnp.where(faster > 0, faster, 1), jnp.inf))

        def on_the_support(eta: Any) -> Any:
            moved, left = b - eta * inside, r + eta * through
            return moved, stays, left, of.value(moved, left)

        def beyond() -> Any:
            def doubled(search: Any) -> Any:
                eta, best, _, tries = search
                moved, support = top(b - eta * gradient)
                left = of.left(moved)
                new = (moved, support, left, of.value(moved, left))
                falls = new[3] < best[3]
                return 2 * eta, jax.tree.map(lambda x, y: jnp.where(falls, x, y), new, best), falls, tries + 1

            search = (jnp.maximum(1.001 * change, short), on_the_support(change), jnp.array(True), jnp.array(0))
            return lax.while_loop(lambda s: s[2] & (s[3] < DOUBLINGS), doubled, search)[1]

        b, stays, r, now = lax.cond(exact < change, lambda: on_the_support(exact), beyond)
        return b, stays, r, now, value - now, count + 1

    def falls(state: Any) -> Any:
        _, _, _, value, fall, count = state
        return (count < steps) & (fall > tolerance * jnp.abs(value))

    r = of.left(b)
    state = (b, stays, r, of.value(b, r), jnp.asarray(jnp.inf, b.dtype), jnp.array(0))
    b, stays, *_ = lax.while_loop(falls, step, state)
    return b, stays


def _largest_singular_value(g: Float[Array, "samples n"]) -> Float[Array, ""]:
    """By power iteration on the smaller matrix of inner products, from below; 5 % are added where it is used."""
    inner = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
    start = jax.random.normal(jax.random.key(0), (len(inner),), g.dtype)

    def again(_: Any, u: Any) -> Any:
        u = inner @ u
        return u / jnp.maximum(jnp.linalg.norm(u), jnp.finfo(g.dtype).tiny)

    return jnp.sqrt(jnp.linalg.norm(inner @ lax.fori_loop(0, 50, again, start)))
