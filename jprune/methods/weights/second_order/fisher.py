"""Inverses of damped Fisher matrices, and the ridge regression that moves the weights that stay.

    F = damp I + (1/N) sum_s g_s g_s^T

The inverse is kept as a root. Where a block has no more weights than there are samples, F is factored itself:
F^-1 = R^T R. Otherwise by Woodbury, with the N x N matrix of inner products instead: F^-1 = (I - R^T R) / damp. It is what
WoodFisher's recursion over the samples arrives at, without a matrix of weights times weights.
A damping that leaves the matrix indefinite in the arithmetic at hand is raised tenfold until it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float

RAISES = 20  # of the damping, before a block is given up as not finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverse:
    """Inverses of the blocks of a Fisher matrix.

    Attributes:
      root: R of every block.
      damp: that each block was inverted with.
      woodbury: how F^-1 follows from R.
    """

    root: Float[Array, "blocks rank size"]
    damp: Float[Array, " blocks"]
    woodbury: bool = dataclasses.field(metadata={"static": True})

    def of_groups(self, size: int) -> Float[Array, "blocks groups group group"]:
        """F^-1 restricted to successive groups of weights."""
        r = self.root.reshape(*self.root.shape[:2], -1, size)
        inner = jnp.einsum("bnqi,bnqj->bqij", r, r)
        return (jnp.eye(size, dtype=r.dtype) - inner) / self.damp[:, None, None, None] if self.woodbury else inner

    def diagonal(self) -> Float[Array, "blocks size"]:
        """The diagonal of F^-1."""
        return self.of_groups(1)[..., 0, 0]

    def times(self, v: Float[Array, "blocks size"]) -> Float[Array, "blocks size"]:
        """F^-1 v."""
        inner = jnp.einsum("bni,bn->bi", self.root, jnp.einsum("bni,bi->bn", self.root, v))
        return (v - inner) / self.damp[:, None] if self.woodbury else inner

    def matrix(self) -> Float[Array, "blocks size size"]:
        """F^-1 as matrices."""
        return self.of_groups(self.root.shape[-1])[:, 0]


def inverse(gradients: Float[Array, "samples blocks size"], damp: Any) -> Inverse:
    """The inverse of damp I + G^T G / N, block by block; jit-able.

    Args:
      gradients: of the samples, in blocks of weights.
      damp: absolute; a block where it is too small for the arithmetic gets ten times as much, and so on.
    """
    n, _, size = gradients.shape
    woodbury = size > n

    def one(g: Any) -> Any:
        def root(damp: Any) -> Any:
            if not woodbury:
                f = g.T @ g / n + damp * jnp.eye(size, dtype=g.dtype)
                r = solve_triangular(jnp.linalg.cholesky(f), jnp.eye(size, dtype=g.dtype), lower=True)
                return r, jnp.isfinite(r).all()
            k = g @ g.T + n * damp * jnp.eye(n, dtype=g.dtype)
            r = solve_triangular(jnp.linalg.cholesky(k), g, lower=True)
            left = 1 - jnp.sum(r * r, axis=0)  # what the samples leave of each weight; below rounding it says nothing
            return r, jnp.isfinite(r).all() & jnp.all(left > 8 * jnp.finfo(g.dtype).eps)

        return raised(root, jnp.asarray(damp, g.dtype))

    by_block = gradients.swapaxes(0, 1)
    root, used = lax.map(one, by_block) if woodbury else jax.vmap(one)(by_block)
    return Inverse(root, used, woodbury)


def ridge(
    a: Float[Array, "samples k"],
    target: Float[Array, " samples"],
    penalty: Any,
    linear: Float[Array, " k"] | None = None,
) -> tuple[Float[Array, " k"], Float[Array, ""]]:
    """(argmin_d 1/2 |target - A d|^2 + penalty/2 |d|^2 + linear d, the penalty that was needed).

    Normal equations of size k, or of size N by Woodbury where k is larger.
    """
    n, k = a.shape

    def solve(penalty: Any) -> Any:
        if k <= n:
            right = a.T @ target - (0 if linear is None else linear)
            d = cho_solve((jnp.linalg.cholesky(a.T @ a + penalty * jnp.eye(k, dtype=a.dtype)), True), right)
            return d, jnp.isfinite(d).all()
        factor = jnp.linalg.cholesky(a @ a.T + penalty * jnp.eye(n, dtype=a.dtype))
        offset = jnp.zeros(k, a.dtype) if linear is None else linear / penalty
        d = a.T @ cho_solve((factor, True), target + a @ offset) - offset
        return d, jnp.isfinite(d).all()

    return raised(solve, jnp.asarray(penalty, a.dtype))


def refit(
    w: Float[Array, " n"], g: Float[Array, "samples n"], stays: Any, penalty: Any, linear: Any = None
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Weights that stay, moved so that they make up for those that go; with the penalty that was needed.

        min_b 1/2 |G (w - b)|^2 + penalty/2 |b - w|^2 + linear b,   b = 0 where nothing stays

    With penalty = N damp it is the joint update of optimal brain surgery: w - F^-1_{:,P} ([F^-1]_PP)^-1 w_P (CBS-U).
    """
    kept = jnp.where(stays, g, 0)
    d, used = ridge(kept, g @ jnp.where(stays, 0, w), penalty, None if linear is None else jnp.where(stays, linear, 0))
    return jnp.where(stays, w + d, 0), used


def raised(solve: Callable[[Any], tuple[Any, Any]], damp: Any) -> tuple[Any, Any]:
    """(what `solve` makes of the first damping of damp, 10 damp, 100 damp, ... that it says is enough, that damping)."""

    def again(state: Any) -> Any:
        return ~state[1] & (state[4] < RAISES)

    def attempt(state: Any) -> Any:
        _, _, _, damp, tries = state
        found, enough = solve(damp)
        return found, enough, damp, damp * 10, tries + 1

    shape = jax.eval_shape(solve, damp)[0]
    empty = jnp.zeros(shape.shape, shape.dtype)
    found, _, used, _, _ = lax.while_loop(again, attempt, (empty, jnp.array(False), damp, damp, jnp.array(0)))
    return found, used
