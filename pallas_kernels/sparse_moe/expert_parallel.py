"""The mixture of experts over several devices: each holds its share of the experts and computes them for the tokens of all.

Tokens are gathered from all devices of the axis, scores and flags go to the devices of their experts, and what the experts give
is summed over the devices while it is scattered back. A token of many small experts has some on nearly every device, so sending
it only where it is wanted would save little; and nothing here has a capacity, so nothing can be too much for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.xla import accumulator, padded
from pallas_kernels.sparse_moe.api import tile_moe
from pallas_kernels.sparse_moe.problem import MoEError, checked


@no_type_check  # at run time: what it says of wrong arguments is its own
def expert_parallel_moe(
    x: Float[Array, "T d"],
    scores: Float[Array, "T E"],
    active: Bool[Array, "T E"],
    up: Float[Array, "E d f"],
    down: Float[Array, "E f d"],
    *,
    mesh: Mesh,
    axis: str = "expert",
    data: str | Sequence[str] = (),
    inner: Callable[..., Any] = tile_moe,
) -> Float[Array, "T d"]:
    """`inner` over a mesh: experts lie over one axis, tokens over it and perhaps over others, where each group has all experts.

    Equal to one device, forward and backward, up to the rounding of sums. Devices sum outputs and gradients of tokens in float32;
    gradients of weights are summed over `data` in their own type, as jax does.
    Arguments lie as they are laid out here, or are brought there; under `jax.jit`, give weights a sharding of P(axis).

    Args:
      x, scores, active, up, down: as `inner` gets them on one device; any number of tokens.
      mesh: with axes of the type Auto. axis: its axis of experts, which divides their number.
      data: further axes that tokens lie over.
      inner: the layer that every device runs on its experts: `tile_moe`, `permuted_moe`, `union_moe` (at most 64 tokens a
        group, no gradients), or a `functools.partial` of one with its options.

    Raises:
      MoEError: arguments that do not fit together, or the mesh. Whatever `inner` raises.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> one = jnp.ones((1, 1, 1))
    >>> y = expert_parallel_moe(one[0], 0.5 * one[0], one[0] > 0, one, 2 * one, mesh=mesh)
    >>> round(float(y[0, 0]), 6)
    0.731059
    """
    data = (data,) if isinstance(data, str) else tuple(data)
    for name in (*data, axis):
        if name not in mesh.shape:
            raise MoEError(f"the mesh has no axis {name!r}: it has {', '.join(map(repr, mesh.shape)) or 'none'}")
    if axis in data:
        raise MoEError(f"axis {axis!r} is among the axes of data: wanted others, {axis!r} holds tokens as well")
    problem = checked(x, scores, active, up, down)
    tokens, (experts, *_), devices = len(problem[0]), up.shape, mesh.shape[axis]
    if experts % devices:
        raise MoEError(
            f"{experts} experts do not lie evenly over the {devices} devices of {axis!r}: choose a divisor of {experts}"
        )
    rows = devices
    for name in data:
        rows *= mesh.shape[name]
    x, scores, active = (padded(a, 0, rows) for a in problem[:3])
    token, expert = P((*data, axis)), P(axis)
    run = jax.shard_map(functools.partial(_shard, axis, inner), mesh=mesh, in_specs=(token,) * 3 + (expert,) * 2,
                        out_specs=token, check_vma=False)  # fmt: skip
    return run(x, scores, active.astype(bool), *problem[3:])[:tokens]


def _shard(axis: str, inner: Callable[..., Any], x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
    scores, active = (jax.lax.all_to_all(a, axis, 1, 0, tiled=True) for a in (scores, active))
    part = inner(_gathered(axis, x), scores, active, up, down)
    return jax.lax.psum_scatter(part.astype(accumulator(x)), axis, tiled=True).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(axis: str, x: Any) -> Any:
    """The tokens of all devices of an axis; gradients are summed in float32 on the way back."""
    return jax.lax.all_gather(x, axis, tiled=True)


def _gathered_forward(axis: str, x: Any) -> Any:
    return _gathered(axis, x), None


def _gathered_backward(axis: str, _: None, dx: Any) -> tuple[Any]:
    return (jax.lax.psum_scatter(dx.astype(accumulator(dx)), axis, tiled=True).astype(dx.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
