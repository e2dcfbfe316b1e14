"""The public function: checks, choice of an implementation, and the derivative that all of them share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.backends import Operation, no_derivative
from pallas_kernels.common.xla import accumulator, gates
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.problem import ACTIVATIONS, GroupError, Static, checked

PRODUCT = Operation("a grouped matrix product", "pallas_kernels.grouped_matmul", kernels=("tpu",))
_reference = jax.jit(reference.product, static_argnums=0)


@no_type_check  # at run time: what it says of wrong arguments is its own
def grouped_matmul(
    lhs: Float[Array, "P k"],
    rhs: Float[Array, "G k n"],
    group_sizes: Int[Array, " G"],
    *,
    activation: str | None = None,
    row_scale: Float[Array, " P"] | None = None,
    preferred_element_type: Any = None,
    tile: int | None = None,
    impl: str = "auto",
    interpret: Any = False,
) -> Float[Array, "P n"]:
    """row_scale[i] * activation(lhs[i] @ rhs[g]) for the rows i of each group g, which lie one group after the other.

    The meaning is that of `jax.lax.ragged_dot`, and work follows the rows. Sums are kept in float32. Rows behind the last group
    give 0, and what lies there, or in matrices of groups without rows, is not read. Differentiable once in lhs, rhs and
    row_scale (with `impl="reference"` any number of times).

    Args:
      lhs, rhs: one dtype, which the result has too, unless `preferred_element_type` says another.
      group_sizes: rows of each group, 0 too, together at most P, which is checked where they lie in host memory.
      activation: None or "silu". row_scale: a number a row, a row of 0 where it is 0.
      tile: rows computed together, by default what suits the device.
      impl: "xla", "tpu", "reference" (dense), or "auto": the fastest that takes the problem. All mean the same.
      interpret: run the TPU kernels on another device: True or `pltpu.InterpretParams`.

    Raises:
      GroupError: arguments that do not fit together.
      BackendError: an unknown `impl`, or one that cannot take the problem.
      DerivativeError: a second derivative, other than of the reference.

    >>> import jax.numpy as jnp
    >>> out = grouped_matmul(jnp.ones((4, 2)), jnp.stack([jnp.ones((2, 1)), jnp.full((2, 1), 5.0)]), jnp.array([1, 2]))
    >>> print(out[:, 0])
    [ 2. 10. 10.  0.]
    """
    lhs, rhs, sizes, scale = checked(lhs, rhs, group_sizes, row_scale)
    if activation not in ACTIVATIONS:
        raise GroupError(f"activation {activation!r} is not known: {', '.join(map(repr, ACTIVATIONS))}")
    if tile is not None and tile < 1:
        raise GroupError(f"tile is {tile}: wanted a number of rows")
    dtype = jnp.dtype(preferred_element_type or lhs.dtype).name
    static = Static(tile, activation=activation, dtype=dtype, interpret=interpret)
    chosen = PRODUCT.choose(impl, static, lhs, rhs, interpret=interpret)
    if chosen == "reference":
        return _reference(static, lhs, rhs, sizes, scale)
    return _product(chosen, static, lhs, rhs, sizes, scale)


_only_first = no_derivative("a grouped product has first derivatives only: use impl='reference' for higher ones")


@_only_first
def _forward(name: str, static: Static, problem: Any) -> Any:
    return PRODUCT.implementation(name).product(static, *problem)


@_only_first
def _backward(name: str, static: Static, problem: Any) -> Any:
    lhs, rhs, sizes, scale, dout = problem
    run, wide = PRODUCT.implementation(name), accumulator(lhs)
    dscale, dh = None, dout.astype(wide)
    if static.activation or scale is not None:
        plain = dataclasses.replace(static, activation=None, dtype=wide.name)
        h = run.product(plain, lhs, rhs, sizes)
        value, slope = gates(h) if static.activation else (h, 1)
        if scale is not None:
            dscale, dh = (value * dh).sum(1), jnp.where(scale[:, None] != 0, dh * scale[:, None], 0)
        dh = dh * slope
    dh = dh.astype(lhs.dtype)
    own = dataclasses.replace(static, activation=None, dtype=lhs.dtype.name)
    return run.product(dataclasses.replace(own, transpose=True), dh, rhs, sizes), run.outer(own, lhs, dh, sizes), dscale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(name: str, static: Static, lhs: Any, rhs: Any, sizes: Any, scale: Any) -> Any:
    return _forward(name, static, (lhs, rhs, sizes, scale))


def _product_forward(name: str, static: Static, *problem: Any) -> Any:
    return _forward(name, static, problem), problem


def _product_backward(name: str, static: Static, problem: Any, dout: Any) -> Any:
    dlhs, drhs, dscale = _backward(name, static, (*problem, dout))
    return dlhs, drhs, None, dscale


_product.defvjp(_product_forward, _product_backward)
