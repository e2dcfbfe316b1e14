"""Refit what stays: each output's kept weights by least squares on the dense layer's outputs, layer after layer.

With the layer's inputs A in the pruned network whose earlier layers are refitted already, and X those of the dense one,
the kept weights v of an output solve (A_S^T A_S + r I) v = A_S^T X w0 + r w0_S. Biases stay as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float
from rich.progress import track

from jprune.graph import Graph
from jprune.importance.at_init import weights_of
from jprune.importance.weight_inputs import input_rows
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import Masks, apply
from jprune.tracing.paths import with_leaves

DAMPING = 0.01  # r over the mean diagonal of A^T A


def refit(
    graph: Graph, params: Any, masks: Masks, batches: Iterable[Any], *, damping: float = DAMPING, progress: bool = False
) -> Any:
    """The masked parameters with every kept weight refitted; the masks hold exactly.

    Args:
      graph: of the function, traced with batches of the size of these.
      params: the trained, dense ones.
      masks: {leaf path: True where a weight stays}.
      batches: of inputs, all of the traced size; read once for every leaf.
      damping: r over the mean diagonal.
      progress: show a bar.

    Raises:
      ValueError: a leaf without a matrix of its own, no batches, or inputs that are not finite.
    """
    batches = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not batches:
        raise ValueError("refitting needs at least one batch of inputs")
    order = {leaf: i for i, leaf in enumerate(dict.fromkeys(c.name for c in graph.contractions))}
    now = apply(params, masks)
    for leaf in track(sorted(masks, key=lambda p: order.get(p, len(order))), "refitting", disable=not progress):
        matrices = weight_matrices(graph, [leaf])
        m, rows = matrices[leaf], _rows(graph, leaf)
        w0 = m.matrix(weights_of(params, [leaf])[leaf]).reshape(-1, *m.shape)
        mask = m.matrix(masks[leaf].astype(jnp.float32)).reshape(w0.shape) > 0
        h = cross = 0.0
        for inputs in batches:
            a, x = (rows(p, *inputs)[leaf].reshape(math.prod(m.lead), -1, m.shape[1]) for p in (now, params))
            h, cross = h + _product(a, a), cross + _product(a, x)
        new = _solved(w0, mask, h, cross, damping)
        if not bool(jnp.isfinite(new).all()):
            raise ValueError(f"the refitted {leaf!r} is not finite: raise the damping, or look at its inputs")
        shape = weights_of(params, [leaf])[leaf]
        now = with_leaves(now, {leaf: m.leaf_like(new.reshape(*m.lead, *m.shape), shape.shape).astype(shape.dtype)})
    return apply(now, masks)


@functools.lru_cache(maxsize=64)
def _rows(graph: Graph, leaf: str) -> Any:
    return input_rows(graph, weight_matrices(graph, [leaf]))


@jax.jit
def _product(a: Float[Array, "lead samples in"], x: Float[Array, "lead samples in"]) -> Float[Array, "lead in in"]:
    return jnp.einsum("lsi,lsj->lij", a, x, precision="highest")


@jax.jit
def _solved(
    w0: Float[Array, "lead out in"], mask: Bool[Array, "lead out in"], h: Any, cross: Any, damping: Any
) -> Float[Array, "lead out in"]:
    """Row after row: the system of the kept inputs, the others' rows and columns replaced by the identity's."""

    def row(given: Any) -> Any:
        w, m, h, c = given
        r = damping * jnp.mean(jnp.diagonal(h))
        keep = m.astype(jnp.float32)
        left = keep[:, None] * h * keep[None, :] + jnp.diag(jnp.where(m, r + 1e-12, 1.0))
        right = keep * (jnp.matmul(c, w, precision="highest") + r * w)
        return jax.scipy.linalg.solve(left, right, assume_a="pos")

    def matrix(given: Any) -> Any:
        w, m, h, c = given
        return lax.map(lambda x: row((*x, h, c)), (w, m), batch_size=16)

    return lax.map(matrix, (w0.astype(jnp.float32), mask, h, cross))
