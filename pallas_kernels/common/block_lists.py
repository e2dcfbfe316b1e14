"""Padded lists of block ids, one a row, and the flags that they stand for: what kernels walk in place of a dense mask.

A list holds its active blocks first; entries behind the count mean nothing to a reader (the functions here repeat the last
active one). All of it is jit-able; the number of ids that are possible and the room of a list are static.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(jax.jit, static_argnums=1)
def pack_lists(
    active: Bool[Array, "*rows n"], width: int
) -> tuple[Int[Array, "*rows W"], Int[Array, "*rows"], Bool[Array, ""]]:
    """(ids ascending and padded with the last, counts, whether a row has more than `width`) of rows of flags."""
    total = active.sum(-1, dtype=jnp.int32)
    ids = jnp.arange(active.shape[-1], dtype=jnp.int32)
    order = jnp.sort(jnp.where(active, ids, active.shape[-1]), axis=-1)[..., :width]  # the others go to the end
    count = jnp.minimum(total, width)
    return pad_lists(order, count), count, jnp.any(total > width)


def pad_lists(ids: Int[Array, "*rows W"], count: Int[Array, "*rows"]) -> Int[Array, "*rows W"]:
    """The lists with every entry behind the count replaced by the last active one, by 0 where there is none."""
    last = jnp.maximum(count - 1, 0)[..., None]
    padded = jnp.take_along_axis(ids, jnp.minimum(jnp.arange(ids.shape[-1]), last), axis=-1)
    return jnp.where(count[..., None] > 0, padded, 0)


@functools.partial(jax.jit, static_argnums=2)
def flags_of(ids: Int[Array, "*rows W"], count: Int[Array, "*rows"], n: int) -> Bool[Array, "*rows n"]:
    """Flags of the ids in each list, of `n` possible ones."""
    return jax.lax.platform_dependent(
        ids, count, tpu=functools.partial(flags_compared, n), default=functools.partial(flags_scattered, n)
    )


def flags_scattered(n: int, ids: Any, count: Any) -> Any:
    """`flags_of` by a scatter."""
    lists = ids.reshape(-1, ids.shape[-1])
    valid = (jnp.arange(ids.shape[-1]) < count[..., None]).reshape(lists.shape)
    flags = jnp.zeros((lists.shape[0], n), bool)
    return flags.at[jnp.arange(lists.shape[0])[:, None], lists].max(valid).reshape(*count.shape, n)


def flags_compared(n: int, ids: Any, count: Any) -> Any:
    """`flags_of` by comparisons, which a TPU makes in the time that it scatters a few numbers."""

    def entry(t: Any, flags: Any) -> Any:
        listed = jax.lax.dynamic_slice_in_dim(ids, t, 1, axis=-1)
        return flags | ((listed == jnp.arange(n)) & (t < count)[..., None])

    return jax.lax.fori_loop(0, ids.shape[-1], entry, jnp.zeros((*count.shape, n), bool))


@functools.partial(jax.jit, static_argnums=(2, 3))
def union_lists(
    ids: Int[Array, "*rows W"], count: Int[Array, "*rows"], n: int, together: int
) -> tuple[Int[Array, "*groups V"], Int[Array, "*groups"], Int[Array, "*groups V"]]:
    """(lists, counts, owners) of every `together` lists in a row as one; bit i of an owner: the i-th of them has the id.

    A last group that is not full counts as if lists without ids followed. `n` ids are possible.
    """
    missing = -count.shape[-1] % together
    flags = jnp.pad(flags_of(ids, count, n), [(0, 0)] * (count.ndim - 1) + [(0, missing), (0, 0)])
    flags = flags.reshape(*count.shape[:-1], -1, together, n)
    bits = (flags << jnp.arange(together, dtype=jnp.int32)[:, None]).sum(-2, dtype=jnp.int32)
    idx, cnt, _ = pack_lists(bits > 0, min(together * ids.shape[-1], n))
    return idx, cnt, jnp.take_along_axis(bits, idx, axis=-1)
