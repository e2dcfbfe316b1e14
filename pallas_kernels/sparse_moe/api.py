"""The public functions: checks, choice of an implementation, and the derivative that all of them share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, no_type_check

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.backends import Operation, no_derivative
from pallas_kernels.sparse_moe import permuted, reference
from pallas_kernels.sparse_moe.problem import MoEError, Static, checked

KERNELS = ("tpu",)
TILES = Operation("a block-sparse mixture of experts", "pallas_kernels.sparse_moe", kernels=KERNELS)
UNION = Operation("a union of experts", "pallas_kernels.sparse_moe", kernels=KERNELS)
FEW = 64  # tokens whose union of experts is still small, and which fit beside the weights that pass by
_reference = jax.jit(reference.moe)


@no_type_check  # at run time: what it says of wrong arguments is its own
def tile_moe(
    x: Float[Array, "T d"],
    scores: Float[Array, "T E"],
    active: Bool[Array, "T E"],
    up: Float[Array, "E d f"],
    down: Float[Array, "E f d"],
    *,
    tile: int | None = None,
    save_hidden: bool = False,
    impl: str = "auto",
    interpret: Any = False,
) -> Float[Array, "T d"]:
    """sum_e (scores[:, e] * silu(x @ up[e])) @ down[e] over the active pairs of a token and an expert.

    Work follows the active experts. A token without any gets 0. Sums are kept in float32. Differentiable once in x, scores,
    up and down (with `impl="reference"` any number of times), exactly: pairs that are not active and experts that no token
    uses have gradient 0.

    Args:
      x, up, down: one dtype. Weights of experts that no token uses are not read, and may hold anything.
      scores: may be negative, or 0, where active; what they hold elsewhere counts as 0 and is not checked.
      active: which experts compute which tokens; of a ReLU router `pattern > 0`, never `scores > 0`.
      tile: tokens computed together, by default what suits the device. On a TPU a tile computes all its tokens by every
        expert that one of them uses, so neighbours should use the same; elsewhere it is how many rows are gathered at once.
      save_hidden: keep x @ up of the active pairs, in the dtype of x, for the backward pass, which then computes fewer products
        (on a TPU four in place of seven). It takes as much memory as the dense layer: tokens x experts x hidden.
      impl: "xla", "tpu", "reference" (dense), or "auto": the fastest that takes the problem. All mean the same.
      interpret: run the TPU kernels on another device: True or `pltpu.InterpretParams`.

    Raises:
      MoEError: arguments that do not fit together.
      BackendError: an unknown `impl`, or one that cannot take the problem.
      DerivativeError: a second derivative, other than of the reference.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1, 1))
    >>> y = tile_moe(one[0], 0.5 * one[0], one[0] > 0, one, 2 * one)
    >>> round(float(y[0, 0]), 6)
    0.731059
    """
    problem = checked(x, scores, active, up, down)
    if tile is not None and tile < 1:
        raise MoEError(f"tile is {tile}: wanted a number of tokens")
    static = Static(tile, interpret=interpret, save_hidden=save_hidden)
    chosen = TILES.choose(impl, static, problem, interpret=interpret)
    return _reference(*problem) if chosen == "reference" else _experts(TILES.implementation(chosen), static, *problem)


@no_type_check
def permuted_moe(
    x: Float[Array, "T d"],
    scores: Float[Array, "T E"],
    active: Bool[Array, "T E"],
    up: Float[Array, "E d f"],
    down: Float[Array, "E f d"],
    *,
    capacity: int | None = None,
    tile: int | None = None,
    save_hidden: bool = False,
    impl: str = "auto",
    interpret: Any = False,
) -> Float[Array, "T d"]:
    """`tile_moe` by sorting pairs of a token and an expert: for wide experts, and tokens that are unlike their neighbours.

    On a TPU work follows the active pairs, whoever is beside whom, where `tile_moe` computes tiles of tokens whole; but every
    pair moves its token's numbers several times. Arguments and derivatives as in `tile_moe`, except:

    Args:
      capacity: pairs of a token and an expert that there is room for, by default 0.35 of all; tokens times k for k experts a
        token. Memory grows with it. Where there are more pairs, the loop of `tile_moe(impl="xla")` computes all of them.
      tile: pairs of an expert that are computed together. save_hidden: keeps x @ up of as many pairs as have room, so that the
        backward pass computes four products in place of five.

    Raises:
      MoEError, BackendError, DerivativeError: as `tile_moe`.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1, 1))
    >>> y = permuted_moe(one[0], 0.5 * one[0], one[0] > 0, one, 2 * one)
    >>> round(float(y[0, 0]), 6)
    0.731059
    """
    problem = checked(x, scores, active, up, down)
    for name, value in (("tile", tile), ("capacity", capacity)):
        if value is not None and value < 1:
            raise MoEError(f"{name} is {value}: wanted a number of {'tokens' if name == 'tile' else 'pairs'}")
    tokens, experts = problem[2].shape
    static = permuted.PermutedStatic("xla", permuted.room(tokens, experts, capacity), tile, interpret, save_hidden)
    rows = jax.ShapeDtypeStruct((static.capacity, problem[0].shape[1]), problem[0].dtype)
    chosen = permuted.PERMUTED.choose(impl, static.products(rows.dtype), rows, problem[3], interpret=interpret)
    if chosen == "reference":
        return _reference(*problem)
    return _experts(permuted, dataclasses.replace(static, impl=chosen), *problem)


@no_type_check
def union_moe(
    x: Float[Array, "T d"],
    scores: Float[Array, "T E"],
    active: Bool[Array, "T E"],
    up: Float[Array, "E d f"],
    down: Float[Array, "E f d"],
    *,
    impl: str = "auto",
    interpret: Any = False,
) -> Float[Array, "T d"]:
    """`tile_moe` for the few tokens of a decoding step, without derivative: all of them pass through the union of their experts.

    What counts there is the memory that weights are read from, and of experts that no token uses nothing is read. Flags of
    tokens that only fill up a chunk are to be False, or their experts are read as well. Arguments as in `tile_moe`.

    Raises:
      MoEError: arguments that do not fit together, or more than 64 tokens.
      BackendError: an unknown `impl`, or one that cannot take the problem.
      DerivativeError: differentiation.

    >>> import jax.numpy as jnp
    >>> x, up, down = jnp.ones((2, 3)), jnp.ones((4, 3, 2)), jnp.ones((4, 2, 3)).at[2].set(jnp.nan)
    >>> active = jnp.array([[True, False, False, True], [False, False, False, False]])
    >>> print(union_moe(x, active / 2, active, up, down).round(3))
    [[5.715 5.715 5.715]
     [0.    0.    0.   ]]
    """  # fmt: skip
    problem = checked(x, scores, active, up, down)
    if len(problem[0]) > FEW:
        raise MoEError(f"{len(problem[0])} tokens, more than {FEW}: use tile_moe")
    static = Static(trained=False, interpret=interpret)
    chosen = UNION.choose(impl, static, problem, interpret=interpret)
    return _union(chosen, static, problem)


@no_derivative("a union of experts has no derivative: use tile_moe")
def _union(name: str, static: Static, problem: Any) -> Any:
    return reference.moe(*problem) if name == "reference" else UNION.implementation(name).union(static, *problem)


_only_first = no_derivative("a mixture of experts has first derivatives only: use impl='reference' for higher ones")


@_only_first
def _forward(way: Any, static: Any, problem: Any) -> Any:
    return way.forward(static, *problem)


@_only_first
def _backward(way: Any, static: Any, problem: Any) -> Any:
    return way.gradients(static, *problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(way: Any, static: Any, x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
    """way: a module with `forward` and `gradients`."""
    return _forward(way, dataclasses.replace(static, save_hidden=False), (x, scores, active, up, down))[0]


def _experts_forward(way: Any, static: Any, *problem: Any) -> Any:
    y, kept = _forward(way, static, problem)
    return y, (problem, kept)


def _experts_backward(way: Any, static: Any, saved: Any, dy: Any) -> Any:
    problem, kept = saved
    dx, dscores, dup, ddown = _backward(way, static, (*problem, dy, kept))
    return dx, dscores, None, dup, ddown


_experts.defvjp(_experts_forward, _experts_backward)
