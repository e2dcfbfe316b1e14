"""Padded lists of block ids, one a row, and the flags that they stand for: what kernels walk in place of a dense mask.

A list holds its active blocks first; entries behind the count mean nothing to a reader (the functions here repeat the last
active one). All of it is jit-able; the number of ids that are possible and the room of a list are static. What is known and
lies in host memory numpy computes, which compiles nothing for a new shape.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int


def known(*arrays: Any) -> bool:
    """Whether these are values, not what stands for them while a program is traced."""
    return not any(isinstance(a, Tracer) for a in arrays)


def in_host_memory(*arrays: Any) -> bool:
    """Whether numpy reads these where they lie: its own, or known ones on CPUs of this process."""

    def one(a: Any) -> bool:
        if isinstance(a, Tracer) or not isinstance(a, jax.Array):
            return isinstance(a, np.ndarray)
        return a.is_fully_addressable and all(d.platform == "cpu" for d in a.devices())

    return all(map(one, arrays))


def pack_lists(
    active: Bool[Array, "*rows n"] | np.ndarray, width: int
) -> tuple[Int[Array, "*rows W"], Int[Array, "*rows"], Bool[Array, ""]]:
    """(ids ascending and padded with the last, counts, whether a row has more than `width`) of rows of flags."""
    if in_host_memory(active):
        return jax.tree.map(jnp.asarray, _pack(np, np.asarray(active), width))
    return _pack_traced(active, width)


def _pack(xp: Any, active: Any, width: int) -> tuple[Any, Any, Any]:
    total = active.sum(-1, dtype=xp.int32)
    ids = xp.arange(active.shape[-1], dtype=xp.int32)
    order = xp.sort(xp.where(active, ids, xp.int32(active.shape[-1])), axis=-1)[..., :width]  # the others go to the end
    count = xp.minimum(total, xp.int32(width))
    return _padded(xp, order, count), count, xp.any(total > width)


_pack_traced = jax.jit(functools.partial(_pack, jnp), static_argnums=1)


def pad_lists(ids: Int[Array, "*rows W"], count: Int[Array, "*rows"]) -> Int[Array, "*rows W"]:
    """The lists with every entry behind the count replaced by the last active one, by 0 where there is none."""
    return _padded(jnp, ids, count)


def _padded(xp: Any, ids: Any, count: Any) -> Any:
    last = xp.maximum(count - 1, 0)[..., None]
    repeated = xp.take_along_axis(ids, xp.minimum(xp.arange(ids.shape[-1]), last), axis=-1)
    return xp.where(count[..., None] > 0, repeated, xp.int32(0))


def flags_of(
    ids: Int[Array, "*rows W"] | np.ndarray, count: Int[Array, "*rows"] | np.ndarray, n: int
) -> Bool[Array, "*rows n"]:
    """Flags of the ids in each list, of `n` possible ones."""
    if in_host_memory(ids, count):
        return jnp.asarray(_flags_in_host_memory(n, np.asarray(ids), np.asarray(count)))
    return _flags_traced(n, ids, count)


def _flags_in_host_memory(n: int, ids: np.ndarray, count: np.ndarray) -> np.ndarray:
    flags = np.zeros((*count.shape, n), bool)
    *row, entry = np.nonzero(np.arange(ids.shape[-1]) < count[..., None])
    flags[(*row, ids[(*row, entry)])] = True
    return flags


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


@functools.partial(jax.jit, static_argnums=0)
def _flags_traced(n: int, ids: Any, count: Any) -> Any:
    ways = {"tpu": functools.partial(flags_compared, n), "default": functools.partial(flags_scattered, n)}
    return jax.lax.platform_dependent(ids, count, **ways)


def union_lists(
    ids: Int[Array, "*rows W"] | np.ndarray, count: Int[Array, "*rows"] | np.ndarray, n: int, together: int
) -> tuple[Int[Array, "*groups V"], Int[Array, "*groups"], Int[Array, "*groups V"]]:
    """(lists, counts, owners) of every `together` lists in a row as one; bit i of an owner: the i-th of them has the id.

    A last group that is not full counts as if lists without ids followed. `n` ids are possible.
    """
    room = min(together * ids.shape[-1], n)
    if in_host_memory(ids, count):
        flags = _flags_in_host_memory(n, np.asarray(ids), np.asarray(count))
        return jax.tree.map(jnp.asarray, _union(np, flags, room, together))
    return _union_traced(n, room, together, ids, count)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _union_traced(n: int, room: int, together: int, ids: Any, count: Any) -> Any:
    return _union(jnp, _flags_traced(n, ids, count), room, together)


def _union(xp: Any, flags: Any, room: int, together: int) -> tuple[Any, Any, Any]:
    missing = -flags.shape[-2] % together
    flags = xp.pad(flags, [(0, 0)] * (flags.ndim - 2) + [(0, missing), (0, 0)])
    flags = flags.reshape(*flags.shape[:-2], -1, together, flags.shape[-1])
    bits = (flags << xp.arange(together, dtype=xp.int32)[:, None]).sum(-2, dtype=xp.int32)
    idx, cnt, _ = _pack(xp, bits > 0, room)
    return idx, cnt, xp.take_along_axis(bits, idx, axis=-1)
