"""How the size of a function's outputs depends on its weights: gradients without labels, of a model or of one layer of it.

Wanda++ (Yang and others 2025) calls them regional gradients where the function is one decoder layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import track

from jprune.graph import Graph
from jprune.importance.at_init import weights_of, with_weights
from jprune.tracing.errors import TraceError
from jprune.tracing.taps import is_empty


def output_norm_gradients(
    graph: Graph, params: Any, batches: Iterable[Any], leaves: Sequence[str], progress: bool = False
) -> dict[str, Any]:
    """{leaf path: root mean square over samples of the gradient of |f(x)|_2, x one sample}, float32.

    One backward pass a sample, one after the other; a sample is a slice of length 1 of every input's axis 0. An output of
    norm 0 has the gradient 0.

    Args:
      graph: of f, traced with inputs whose axis 0 holds the samples.
      params: of f.
      batches: of inputs, each a tuple like the traced inputs, or the one array where there is one input.
      leaves: paths of the weights.
      progress: show a bar.

    Raises:
      TraceError: no batches, only empty ones, or batches that do not fit.
      ValueError: inputs of different lengths, gradients that are not finite, with the leaf's name.
    """
    step, seen = _step(graph, tuple(leaves)), 0
    total = {p: jnp.zeros(w.shape, jnp.float32) for p, w in weights_of(params, leaves).items()}
    for batch in track(batches, "gradients", disable=not progress):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if is_empty(graph, inputs):
            continue
        sizes = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(inputs)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"inputs have {sorted(sizes)} entries on axis 0, where each holds the same samples")
        total = step(total, params, inputs)
        seen += sizes.pop()
    if not seen:
        raise TraceError("gradients got no batches, or only empty ones: pass at least one with samples")
    if wrong := next((p for p, x in total.items() if not bool(jnp.isfinite(x).all())), None):
        raise ValueError(
            f"the gradients of {wrong!r} hold NaN or infinity: look for them in the batches and the weights"
        )
    return {p: jnp.sqrt(x / seen) for p, x in total.items()}


@functools.lru_cache(maxsize=8)
def _step(graph: Graph, leaves: tuple[str, ...]) -> Any:
    def norm(weights: Any, params: Any, x: Any) -> Any:
        outputs = jax.tree.leaves(graph.dense(with_weights(params, weights), *x))
        square = sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in outputs if jnp.issubdtype(y.dtype, jnp.floating))
        return jnp.sqrt(jnp.where(square > 0, square, 1.0))  # at 0 the root has no gradient

    @jax.jit
    def step(total: Any, params: Any, inputs: Any) -> Any:
        def one(total: Any, x: Any) -> Any:
            x = jax.tree.map(lambda x: x[None], x)
            found = jax.grad(norm)(weights_of(params, leaves), params, x)
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32) ** 2, total, found), None

        return lax.scan(one, total, inputs)[0]

    return step
