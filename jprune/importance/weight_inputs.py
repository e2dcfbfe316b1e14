"""What single weights meet: sums over the inputs of every weight matrix, streamed over batches, for any traced function.

    matrices = weight_matrices(graph, weight_leaves(graph))
    found = input_sums(graph, params, batches, matrices, squares)     {leaf path: (*lead, inputs)}

Sums add up over batches, and over the devices of a sharded batch. Positions of padding count like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from rich.progress import track

from jprune.graph import Graph
from jprune.surgery.products import Product
from jprune.tracing.errors import TraceError
from jprune.tracing.probes import Point, Probe, probed
from jprune.tracing.taps import is_empty

Sum = Callable[[Float[Array, "samples inputs"]], Any]


def squares(x: Float[Array, "samples inputs"]) -> Float[Array, " inputs"]:
    """Sum of x^2 per input: what Wanda weighs with."""
    return jnp.sum(x * x, axis=0)


def gram(x: Float[Array, "samples inputs"]) -> Float[Array, "inputs inputs"]:
    """Sum of x x^T: half of the Hessian that SparseGPT takes for every output's squared error."""
    return jnp.einsum("si,sj->ij", x, x, precision="highest")


def input_sums(
    graph: Graph, params: Any, batches: Iterable[Any], matrices: Mapping[str, Product], of: Sum, progress: bool = False
) -> dict[str, Any]:
    """{leaf path: `of` of the inputs' rows, summed over all batches, with the leading axes of the matrix}.

    Args:
      graph: the traced function.
      params: its parameters.
      batches: of inputs, each a tuple like the traced inputs, or the one array where there is one input.
      matrices: whose inputs; from `weight_matrices`.
      of: the sum to take: a function of (samples, inputs) rows, which is summed over batches. `squares` or `gram`.
      progress: show a bar.

    Raises:
      TraceError: no batches, only empty ones, or batches that do not fit.
      ValueError: sums that are not finite, with the leaf's name.
    """
    step, states = _step(graph, tuple(matrices.items()), of)
    seen = 0
    for batch in track(batches, "calibrating", disable=not progress):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if is_empty(graph, inputs):
            continue
        states = step(states, params, inputs)
        seen += 1
    if not seen:
        raise TraceError("calibration got no batches, or only empty ones: pass at least one with samples")
    finite = jax.device_get({p: jnp.all(jnp.isfinite(s)) for p, s in states.items()})
    if wrong := next((p for p, good in finite.items() if not good), None):
        raise ValueError(f"the inputs of {wrong!r} hold NaN or infinity: look for them in the batches and the weights")
    return states


@functools.lru_cache(maxsize=8)
def _step(graph: Graph, matrices: tuple[tuple[str, Product], ...], of: Sum) -> tuple[Any, Any]:
    """One compiled step and the sums of nothing; kept, so that another pass compiles nothing."""
    run, states = probed(graph, {leaf: _probe(m, of) for leaf, m in matrices})

    @jax.jit
    def step(states: Any, params: Any, inputs: Any) -> Any:
        return run(states, params, *inputs)[1]

    return step, states


def _probe(m: Product, of: Sum) -> Probe:
    each: Any = of
    for _ in m.batch:
        each = jax.vmap(each)
    shape = jax.eval_shape(each, jax.ShapeDtypeStruct((*m.batch, 1, m.shape[1]), jnp.float32))
    init = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    tap = m.tap

    def update(state: Any, value: Any) -> Any:
        return jax.tree.map(jnp.add, state, each(m.samples(value))) if value.size else state

    return Probe((Point(tap.use.path, tap.use.data_operand, False),), init, update, tap.scan_path, tap.layers)


def input_rows(
    graph: Graph, matrices: Mapping[str, Product]
) -> Callable[..., dict[str, Float[Array, "*lead samples inputs"]]]:
    """fn(params, *inputs) -> {leaf path: the rows of data that meet this weight}: activations themselves, jitted.

    For batches of the size that was traced; much memory where inputs are many.
    """
    shapes: dict[str, Any] = {}
    for leaf, m in matrices.items():
        operand = m.tap.use.eqn.invars[m.tap.use.data_operand].aval
        shapes[leaf] = jax.eval_shape(m.samples, jax.ShapeDtypeStruct(operand.shape, operand.dtype))
    probes = {
        leaf: Probe((Point(m.tap.use.path, m.tap.use.data_operand, False),), jnp.zeros(shapes[leaf].shape),
                    lambda _, x, m=m: m.samples(x), m.tap.scan_path, m.tap.layers)
        for leaf, m in matrices.items()
    }  # fmt: skip
    run, states = probed(graph, probes)
    return jax.jit(lambda params, *inputs: run(states, params, *inputs)[1])
