"""Straight-through training: the loss sees sparse weights, and all weights get its gradients (Bengio et al. 2013)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune.budget.weights import choose
from jprune.surgery.patterns import Pattern, Unstructured, View, apply, patterns_of
from jprune.tracing.paths import flatten, with_leaves


def masked(
    loss: Callable[..., Any],
    sparsity: float | None = None,
    *,
    pattern: Pattern | str | Mapping[str, Pattern | str | None] = Unstructured(),
    views: Mapping[str, View] | None = None,
    decay: float = 0.0,
) -> Callable[..., Any]:
    """A loss of the weights that are largest now; its gradient is that of the sparse network, for every weight.

    Masked weights keep training and may come back at any step. When training ends, `apply(params, magnitude_masks(params,
    ...))` makes the parameters sparse. With a pattern of N:M and `decay` this is SR-STE (Zhou et al. 2021, eq. 9).

    >>> square = masked(lambda p: jnp.sum(p["w"] ** 2), 0.5)
    >>> params = {"w": jnp.array([[3.0, 1.0]])}
    >>> square(params).item(), jax.grad(square)(params)["w"].tolist()
    (9.0, [[6.0, 0.0]])

    Args:
      loss: (params, *args, **kwargs) -> anything.
      sparsity, pattern, views: as those of `sparsify`.
      decay: adds decay times the weight to the gradient of weights that are masked.

    Raises:
      ValueError: what `jprune.budget.choose` refuses.
    """
    if not decay >= 0:
        raise ValueError(f"decay is {decay}: it is 0 or more")

    @functools.wraps(loss)
    def of_largest(params: Any, *args: Any, **kwargs: Any) -> Any:
        masks = magnitude_masks(params, sparsity, pattern=pattern, views=views)
        leaves = dict(flatten(params))
        sparse = {p: _straight(leaves[p], m, decay) for p, m in masks.items()}
        return loss(with_leaves(params, sparse), *args, **kwargs)

    return of_largest


def magnitude_masks(
    params: Any,
    sparsity: float | None = None,
    *,
    pattern: Pattern | str | Mapping[str, Pattern | str | None] = Unstructured(),
    views: Mapping[str, View] | None = None,
) -> dict[str, Any]:
    """Masks of the largest weights of a tree of parameters; the leaves that have one are those of `sparsify`."""
    scores = {p: jnp.abs(jax.lax.stop_gradient(x)) for p, x in flatten(params) if _able(x, pattern)}
    return choose(scores, patterns_of(pattern, scores), sparsity, views)


def _able(x: Any, pattern: Any) -> bool:
    floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return floating and (isinstance(pattern, Mapping) or jnp.ndim(x) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _straight(w: Any, mask: Any, decay: float) -> Any:
    return apply({"w": w}, {"w": mask})["w"]


def _forward(w: Any, mask: Any, decay: float) -> Any:
    return _straight(w, mask, decay), (w, mask) if decay else None


def _backward(decay: float, saved: Any, g: Any) -> Any:
    if saved is None:
        return g, None
    w, mask = saved
    return g + jnp.where(mask, 0, decay * w).astype(g.dtype), None


_straight.defvjp(_forward, _backward)
