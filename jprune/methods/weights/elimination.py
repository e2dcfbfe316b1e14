"""SparseGPT: prune a matrix column by column and let the columns behind make up for the error.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (2023), algorithm 1. The
squared error of the outputs is a quadratic in every row of the weights, with the inputs' second moments as Hessian, the
same for all rows. Column after column is rounded to its mask; the error moves on through the Cholesky factor U of the
inverse Hessian, H^-1 = U^T U.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jprune.budget.weights import choose
from jprune.methods.contract import checked
from jprune.surgery.patterns import NM, Pattern, Unstructured

RAISED = 10.0  # factor by which a damping that leaves the Hessian indefinite is raised
TRIES = 8


@dataclasses.dataclass(frozen=True)
class SparseGPTConfig:
    """Settings of SparseGPT.

    Attributes:
      damping: share of the Hessian's mean diagonal that is added to it
      block_size: columns whose mask is chosen at once, and that are updated before the columns behind them
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        checked(self, {
            "damping": (self.damping > 0, "above 0"),
            "block_size": (self.block_size >= 1, "at least 1"),
        })  # fmt: skip


class Eliminated(NamedTuple):
    """One matrix after SparseGPT.

    Attributes:
      matrix: (out, in), zero outside the mask, the rest moved.
      mask: True where a weight stays.
      loss: half the squared error that the eliminated weights leave, in the Hessian's units.
      damping: share of the mean diagonal that was added at last; above the setting where that was too little.
    """

    matrix: Float[Array, "out in"]
    mask: Bool[Array, "out in"]
    loss: Float[Array, ""]
    damping: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("kept", "pattern", "config"))
def eliminate(
    matrix: Float[Array, "out in"],
    hessian: Float[Array, "in in"],
    kept: int,
    pattern: Pattern = Unstructured(),
    config: SparseGPTConfig = SparseGPTConfig(),
) -> Eliminated:
    """SparseGPT of one matrix.

        >>> out = eliminate(jnp.array([[3.0, 0.1]]), jnp.array([[1.0, 0.5], [0.5, 1.0]]), kept=1)
        >>> out.mask.tolist(), round(float(out.matrix[0, 0]), 2)  # what 0.1 did is in the weight that stays
        ([[True, False]], 3.0)

    An input that is always zero gets weights of zero, which are removed first.

    Args:
      matrix: weights.
      hessian: sum or mean of x x^T over the calibration inputs; its scale changes the loss alone.
      kept: weights to keep, divided over the blocks of columns by their width; N:M patterns keep what they keep.
      pattern: which weights are compared: `Unstructured("leaf")` those of a block of columns, `Unstructured("row")` those
        of a row in a block, `NM` along the inputs groups of successive columns, as the columns before have left them.
      config: damping and block size.

    Raises:
      ValueError: a pattern that this method cannot follow, or inputs that its groups do not divide.
    """
    rows, columns = matrix.shape
    group = _group(pattern, columns)
    size = -(-min(config.block_size, columns) // group) * group
    blocks = -(-columns // size)
    pad = blocks * size - columns
    h = hessian.astype(jnp.float32)
    dead = jnp.diagonal(h) == 0
    h = h + jnp.diag(dead.astype(jnp.float32))
    u, damping = _factor(h, config.damping)
    u = jnp.pad(u, (0, pad)) + jnp.diag((jnp.arange(columns + pad) >= columns).astype(jnp.float32))
    w = jnp.where(dead, 0.0, matrix.astype(jnp.float32)).T  # columns are contiguous
    w = jnp.pad(w, ((0, pad), (0, 0)))
    real = np.minimum(np.arange(1, blocks + 1) * size, columns)
    share = np.diff(np.round(kept * real / columns).astype(np.int64), prepend=0)  # weights that stay per block

    def block(w: Any, x: Any) -> Any:
        start, stay = x
        own = lax.dynamic_slice(w, (start, 0), (size, rows))
        factor = lax.dynamic_slice(u, (start, start), (size, size))
        is_real = (start + jnp.arange(size) < columns)[:, None]
        mask = _choose(own, jnp.diagonal(factor), is_real, stay, pattern)
        own, mask, errors = _columns(own, factor, mask, pattern, group)
        behind = lax.dynamic_slice(u, (start, 0), (size, columns + pad))
        behind = jnp.where(jnp.arange(columns + pad) >= start + size, behind, 0.0)
        w = w - jnp.einsum("kj,kr->jr", behind, errors, precision="highest")
        w = lax.dynamic_update_slice(w, own, (start, 0))
        return w, (mask, jnp.sum(errors**2))

    starts = jnp.arange(blocks) * size
    w, (mask, losses) = lax.scan(block, w, (starts, jnp.asarray(share)))
    mask = mask.reshape(blocks * size, rows)[:columns].T
    out = jnp.where(mask, w[:columns].T, 0.0).astype(matrix.dtype)
    return Eliminated(out, mask, jnp.sum(losses) / 2, damping)


def _group(pattern: Pattern, columns: int) -> int:
    """Columns whose weights are decided about together."""
    if isinstance(pattern, NM) and pattern.axis == "input":
        if columns % pattern.of:
            raise ValueError(
                f"{pattern.keep}:{pattern.of} does not divide {columns} inputs; SparseGPT does not pad them"
            )
        return pattern.of
    if isinstance(pattern, Unstructured) and pattern.within in ("leaf", "row"):
        return 1
    raise ValueError(f"SparseGPT cannot follow {pattern}: choose unstructured, row, or N:M along the inputs")


def _factor(h: Float[Array, "in in"], damping: float) -> tuple[Float[Array, "in in"], Float[Array, ""]]:
    """(upper U with H^-1 = U^T U, damping): raised tenfold until the damped H is positive definite.

    With the order of rows and columns reversed, H = L L^T; read forwards that is H = R R^T with R upper, and U = R^-1.
    """
    n = h.shape[0]
    mean = jnp.mean(jnp.diagonal(h))

    def root(damping: Any) -> Any:
        return jnp.linalg.cholesky((h + damping * mean * jnp.eye(n))[::-1, ::-1])

    def bad(state: Any) -> Any:
        k, _, lower = state
        return (k < TRIES) & ~jnp.all(jnp.isfinite(lower))

    def again(state: Any) -> Any:
        k, damping, _ = state
        return k + 1, damping * RAISED, root(damping * RAISED)

    first = jnp.asarray(damping, jnp.float32)
    _, used, lower = lax.while_loop(bad, again, (0, first, root(first)))
    upper = lower[::-1, ::-1]
    return lax.linalg.triangular_solve(upper, jnp.eye(n), left_side=True, lower=False), used


def _choose(w: Any, diagonal: Any, is_real: Any, stay: Any, pattern: Pattern) -> Bool[Array, "size rows"]:
    """The mask of one block, chosen when it is entered; N:M groups are decided later."""
    if isinstance(pattern, NM):
        return jnp.ones(w.shape, bool)
    scores = jnp.where(is_real, (w / diagonal[:, None]) ** 2, -1.0)
    return choose({"w": scores}, pattern, {"w": stay})[
        "w"
    ]  # inputs before outputs, as kernels are laid out by convention


def _columns(w: Any, u: Any, mask: Any, pattern: Pattern, group: int) -> tuple[Any, Any, Any]:
    """(weights, mask, errors) of one block after all its columns, group by group."""
    size = w.shape[0]

    def one_group(k: Any, state: Any) -> Any:
        w, mask, errors = state
        at = k * group
        diagonal = lax.dynamic_slice(jnp.diagonal(u), (at,), (group,))
        own = lax.dynamic_slice(mask, (at, 0), (group, w.shape[1]))
        if isinstance(pattern, NM):
            scores = (lax.dynamic_slice(w, (at, 0), (group, w.shape[1])) / diagonal[:, None]) ** 2
            own = jnp.argsort(jnp.argsort(-scores, axis=0, stable=True), axis=0) < pattern.keep
            mask = lax.dynamic_update_slice(mask, own, (at, 0))
        for i in range(group):
            row = lax.dynamic_slice(w, (at + i, 0), (1, w.shape[1]))[0]
            kept = jnp.where(own[i], row, 0.0)
            error = (row - kept) / diagonal[i]
            factor = lax.dynamic_slice(u, (at + i, 0), (1, size))[0]
            w = w - jnp.where(jnp.arange(size) > at + i, factor, 0.0)[:, None] * error
            w = lax.dynamic_update_slice(w, kept[None], (at + i, 0))
            errors = lax.dynamic_update_slice(errors, error[None], (at + i, 0))
        return w, mask, errors

    return lax.fori_loop(0, size // group, one_group, (w, mask, jnp.zeros_like(w)))
