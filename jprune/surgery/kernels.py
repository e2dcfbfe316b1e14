"""Every weight as a matrix that maps inputs to outputs: matrix products, and convolutions as products with patches.

What scores or replaces single weights by what they meet (Wanda, SparseGPT, refitting) needs the rows of data behind a
weight. A convolution's are its patches: one row per position of the result, the kernel's window of all input channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jprune.surgery.products import Product, TapError, product
from jprune.tracing import operand as moves
from jprune.tracing.errors import suggest
from jprune.tracing.primitives import DENSE_CONTRACTIONS

if TYPE_CHECKING:
    from jprune.graph import Graph


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel(Product):
    """A convolution as a matrix (outputs, window x input channels); groups of channels are its leading axis."""

    @property
    def _order(self) -> tuple[int, ...]:
        out, channel, *window = self.tap.use.eqn.params["dimension_numbers"].rhs_spec
        return (out, *window, channel)

    def samples(self, x: Any) -> Float[Array, "*batch samples in"]:
        """The patches of the data, one row per position of the result, float32."""
        p = self.tap.use.eqn.params
        numbers = p["dimension_numbers"]
        sizes = self.tap.use.eqn.invars[1].aval.shape
        patches = lax.conv_general_dilated_patches(
            x.astype(jnp.float32), tuple(sizes[i] for i in numbers.rhs_spec[2:]), p["window_strides"], p["padding"],
            p["lhs_dilation"], p["rhs_dilation"], numbers, precision=lax.Precision.HIGHEST)  # fmt: skip
        window, channels = self.inputs[:-1], self.inputs[-1]  # the patches have all channels first
        rows = jnp.moveaxis(patches, numbers.out_spec[1], -1).reshape(-1, *self.batch, channels, math.prod(window))
        return jnp.moveaxis(rows.swapaxes(-1, -2).reshape(-1, *self.batch, self.shape[1]), 0, -2)


def weight_matrix(graph: Graph, leaf: str) -> Product:
    """A weight as the matrix it is multiplied with.

    Raises:
      TapError: the leaf multiplies no data, does so more than once, or is computed with before it does.
    """
    taps = [t for t, tap in graph.taps.items() if tap.leaf == leaf and tap.primitive in DENSE_CONTRACTIONS]
    if not taps:
        near = "" if leaf in graph.leaves else suggest(leaf, graph.leaves)
        raise TapError(f"{leaf!r} is not multiplied with data as a kernel or a matrix of its own{near}: leave it dense")
    if len(taps) > 1:
        where = "; ".join(graph.taps[t].where for t in taps[:3])
        raise TapError(f"{leaf!r} is used {len(taps)} times ({where}): its inputs cannot be told apart; leave it dense")
    tap = graph.taps[taps[0]]
    if tap.primitive == "dot_general":
        return product(graph, taps[0])
    if reason := moves.check(tap.use.moves, tap.layers):
        raise TapError(f"{leaf!r} has no matrix: {reason}, at {tap.where}")
    p = tap.use.eqn.params
    if p["batch_group_count"] != 1 or tap.use.leaf_operand != 1:
        raise TapError(f"{leaf!r} is not an ordinary convolution's kernel, at {tap.where}: leave it dense")
    spec, sizes, groups = p["dimension_numbers"].rhs_spec, tap.use.eqn.invars[1].aval.shape, p["feature_group_count"]
    out, into, window = sizes[spec[0]], sizes[spec[1]], tuple(sizes[i] for i in spec[2:])
    return Kernel(tap, (groups,) if groups > 1 else (), (*window, into), (out // groups,))


def weight_matrices(graph: Graph, leaves: Iterable[str]) -> dict[str, Product]:
    """{leaf path: its matrix}; raises TapError as `weight_matrix` does."""
    return {leaf: weight_matrix(graph, leaf) for leaf in leaves}
