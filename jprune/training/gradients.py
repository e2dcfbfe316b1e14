"""Gradients on their way to the optimiser: accumulated over micro-batches, clipped by their global norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def accumulated(of: Callable[..., Any], batch: Any, micro: int, key: Any) -> Any:
    """Means in float32 of everything in of(micro-batch, its key) over `micro` parts of the rows, computed one by one.

    With `of` a function's value and gradient, means over equal parts are those of the whole batch wherever the loss is
    a mean over rows. One part is returned in its own types.

    >>> import jax, jax.numpy as jnp
    >>> rows = jnp.arange(6.0)
    >>> accumulated(lambda part, key: {"mean": part.mean()}, rows, 3, jax.random.key(0))
    {'mean': Array(2.5, dtype=float32)}

    Raises:
      ValueError: they do not divide the rows.
    """

    def cut(x: Any) -> Any:
        if x.shape[0] % micro:
            raise ValueError(f"{x.shape[0]} rows cannot be cut into {micro} micro-batches: give a multiple")
        return jnp.reshape(x, (micro, x.shape[0] // micro, *x.shape[1:]))

    keys = jax.random.split(key, micro)
    if micro == 1:
        return of(batch, keys[0])
    parts = (jax.tree.map(cut, batch), keys)
    shapes = jax.eval_shape(of, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + jnp.asarray(x, jnp.float32), total, of(*part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / micro, total)


def clipped(grads: Any, most: float) -> tuple[Any, Any]:
    """(gradients scaled down to a global norm of at most `most`, the norm they had).

    >>> import jax.numpy as jnp
    >>> clipped({"a": jnp.array([3.0, 4.0])}, 1.0)[1]
    Array(5., dtype=float32)
    """
    norm = optax.tree_utils.tree_norm(grads)
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-12)), grads), norm
