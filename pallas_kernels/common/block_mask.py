"""Which key blocks every query block attends to, as padded lists per (batch, head): what all attention kernels walk.

The lists are as in `block_lists`. The transposed ones, the query blocks of every key block, serve the gradients of keys and
values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.block_lists import flags_of, in_host_memory, known, pack_lists, pad_lists, union_lists


class BlockMaskError(ValueError):
    """A block mask that contradicts itself or its problem."""


def _sizes(block: Any, size: Any, name: str) -> int:
    """Number of blocks along one axis."""
    for what, n in (("block", block), ("size", size)):
        if not isinstance(n, int | np.integer) or n < 1:
            raise BlockMaskError(f"{name}_{what} is {n!r}: it must be a positive integer")
    return -(-size // block)


@functools.partial(jax.jit, static_argnums=2)
def _best(scores: Any, counts: Any, width: int) -> tuple[Any, Any]:
    """(lists of the best ids, counts); not-a-number ranks last."""
    _, best = jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), width)
    cnt = jnp.broadcast_to(jnp.clip(counts, 0, width), scores.shape[:3])
    chosen = jnp.where(jnp.arange(width) < cnt[..., None], best.astype(jnp.int32), scores.shape[3])
    return pad_lists(jnp.sort(chosen, -1), cnt), cnt


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_idx", "kv_cnt", "q_idx", "q_cnt"],
    meta_fields=["block_q", "block_k", "q_size", "kv_size"],
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Active key blocks of each query block; leading axes are (batch, heads), each of them 1 where all share the lists.

    Attributes:
      kv_idx: int32 (B, H, nq, W), ids of active key blocks, the first `kv_cnt` entries of each row.
      kv_cnt: int32 (B, H, nq).
      q_idx, q_cnt: the transposed lists, int32 (B, H, nk, Wt) and (B, H, nk), or None: then a gradient builds them.
      block_q, block_k: tokens of a block. q_size, kv_size: tokens in all; the last block may be shorter.
    """

    kv_idx: Any
    kv_cnt: Any
    q_idx: Any
    q_cnt: Any
    block_q: int
    block_k: int
    q_size: int
    kv_size: int

    @property
    def q_blocks(self) -> int:
        """Number of query blocks."""
        return -(-self.q_size // self.block_q)

    @property
    def kv_blocks(self) -> int:
        """Number of key blocks."""
        return -(-self.kv_size // self.block_k)

    @property
    def width(self) -> int:
        """Entries a list has room for."""
        return self.kv_idx.shape[-1]

    @classmethod
    def from_lists(
        cls, kv_idx: Any, kv_cnt: Any, *, block_q: int, block_k: int, q_size: int, kv_size: int
    ) -> BlockMask:
        """Lists as they are, in any order; values are checked where they are known (not under jit).

        Raises:
          BlockMaskError: shapes, dtypes, counts or ids that contradict the sizes, or an id twice in a list.
        """
        mask = cls(jnp.asarray(kv_idx), jnp.asarray(kv_cnt), None, None, block_q, block_k, q_size, kv_size)
        return mask.check()

    @classmethod
    def from_dense(
        cls,
        active: Bool[Array, "B H nq nk"] | np.ndarray,
        *,
        block_q: int,
        block_k: int,
        q_size: int,
        kv_size: int,
        width: int | None = None,
    ) -> BlockMask:
        """Lists of a boolean array that is known (under jit: `pack`), as wide as the fullest row unless `width` is given.

        Raises:
          BlockMaskError: the array is traced, has the wrong shape or dtype, or a row has more than `width` blocks.
        """
        if not known(active):
            raise BlockMaskError("from_dense needs a known array: under jit use BlockMask.pack(active, width, ...)")
        fullest = int(np.asarray(active).sum(-1, initial=0).max(initial=0)) if np.ndim(active) == 4 else 0
        with jax.ensure_compile_time_eval():  # what is known stays known inside a traced function
            mask, overflow = cls.pack(active, width or max(fullest, 1), block_q=block_q, block_k=block_k,
                                      q_size=q_size, kv_size=kv_size)  # fmt: skip
        if overflow:
            raise BlockMaskError(f"a row has {fullest} active blocks, more than width {width}: give width>={fullest}")
        return mask

    @classmethod
    def pack(
        cls,
        active: Bool[Array, "B H nq nk"] | np.ndarray,
        width: int,
        *,
        block_q: int,
        block_k: int,
        q_size: int,
        kv_size: int,
    ) -> tuple[BlockMask, Bool[Array, ""]]:
        """(lists of `width` entries, whether any row has more active blocks than that); jit-able.

        Where the flag is true the lists lack blocks: the caller decides what happens then.

        Raises:
          BlockMaskError: the wrong shape or dtype, or a width that is no positive integer.
        """
        nq, nk = _sizes(block_q, q_size, "q"), _sizes(block_k, kv_size, "kv")
        flags = active if isinstance(active, np.ndarray) else jnp.asarray(active)
        if flags.ndim != 4 or flags.shape[2:] != (nq, nk) or flags.dtype != bool:
            raise BlockMaskError(f"active is {flags.dtype}{list(flags.shape)}: wanted one flag a block, "
                                 f"bool[batch, heads, {nq}, {nk}] ({q_size} queries in blocks of {block_q}, "
                                 f"{kv_size} keys in blocks of {block_k})")  # fmt: skip
        if _sizes(1, width, "width") > nk:
            width = nk
        idx, cnt, overflow = pack_lists(flags, width)
        return cls(idx, cnt, None, None, block_q, block_k, q_size, kv_size), overflow

    @classmethod
    def top_k(
        cls,
        scores: Float[Array, "B H nq nk"],
        counts: int | Int[Array, "*lists"] | np.ndarray,
        *,
        block_q: int,
        block_k: int,
        q_size: int,
        kv_size: int,
        width: int | None = None,
    ) -> BlockMask:
        """The `counts` best-scored key blocks of every query block, lower ids first among equals; jit-able.

        Args:
          scores: one number a block; not-a-number ranks last.
          counts: one for all, or an array that broadcasts against (B, H, nq), at most nk.
          width: entries of a list, needed only where `counts` is traced; it caps traced counts, so choose the largest
            count there can be.

        Raises:
          BlockMaskError: the wrong shape, counts out of range, or traced counts without a width.
        """
        nq, nk = _sizes(block_q, q_size, "q"), _sizes(block_k, kv_size, "kv")
        if scores.ndim != 4 or scores.shape[2:] != (nq, nk):
            raise BlockMaskError(f"scores have shape {scores.shape}: wanted (batch, heads, {nq}, {nk})")
        if known(counts):
            most, least = int(np.max(counts)), int(np.min(counts))
            if least < 0 or most > nk or (width is not None and most > width):
                raise BlockMaskError(f"counts go from {least} to {most}: 0 to {min(nk, width or nk)} are possible")
            width = width or max(most, 1)
        elif width is None:
            raise BlockMaskError("counts are traced: give the width of the lists, the largest count there can be")
        width = min(width, nk)
        idx, cnt = _best(scores, jnp.asarray(counts, jnp.int32), width)
        return cls(idx, cnt, None, None, block_q, block_k, q_size, kv_size)

    @classmethod
    def dense(cls, *, block_q: int, block_k: int, q_size: int, kv_size: int) -> BlockMask:
        """Every block, for all batches and heads."""
        return cls.window(None, None, block_q=block_q, block_k=block_k, q_size=q_size, kv_size=kv_size)

    @classmethod
    def one_list(cls, *, block_q: int, block_k: int, q_size: int, kv_size: int) -> BlockMask:
        """Every block, as one list for all query blocks, (1, 1, 1, key blocks): what kernels walk, though `check` refuses it."""
        nk = _sizes(block_k, kv_size, "kv")
        every, count = np.arange(nk, dtype=np.int32).reshape(1, 1, 1, nk), np.full((1, 1, 1), nk, np.int32)
        return cls(jnp.asarray(every), jnp.asarray(count), None, None, block_q, block_k, q_size, kv_size)

    @classmethod
    def window(
        cls,
        before: int | None,
        after: int | None,
        *,
        block_q: int,
        block_k: int,
        q_size: int,
        kv_size: int,
        q_offset: int = 0,
    ) -> BlockMask:
        """The blocks that hold a pair with -before <= key - (query + q_offset) <= after; None is without bound.

        `window(None, 0)` is every block that a causal attention sees. The window is rounded up to blocks.
        """

        def near(p: Any, r: Any) -> Any:
            first, last = p * block_q + q_offset, np.minimum((p + 1) * block_q, q_size) - 1 + q_offset
            low, high = r * block_k, np.minimum((r + 1) * block_k, kv_size) - 1
            inside = np.ones(np.broadcast_shapes(p.shape, r.shape), bool)
            inside &= True if before is None else high >= first - before
            return inside & (True if after is None else low <= last + after)

        return cls.from_function(near, block_q=block_q, block_k=block_k, q_size=q_size, kv_size=kv_size)

    @classmethod
    def from_function(
        cls, active: Callable[..., Any], *, block_q: int, block_k: int, q_size: int, kv_size: int, batch: int = 1,
        heads: int = 1,
    ) -> BlockMask:  # fmt: skip
        """The blocks where a numpy predicate of ids is true: `active(query_block, key_block)`, broadcast against each other,
        or `active(batch, head, query_block, key_block)` where batch or heads exceed 1.
        """  # fmt: skip
        nq, nk = _sizes(block_q, q_size, "q"), _sizes(block_k, kv_size, "kv")
        ids = np.ogrid[:batch, :heads, :nq, :nk]
        flags = active(*(ids if batch * heads > 1 else ids[2:]))
        flags = np.broadcast_to(np.asarray(flags, bool), (batch, heads, nq, nk))
        return cls.from_dense(flags, block_q=block_q, block_k=block_k, q_size=q_size, kv_size=kv_size)

    def to_dense(self) -> Bool[Array, "B H nq nk"]:
        """One flag a block; jit-able."""
        return flags_of(self.kv_idx, self.kv_cnt, self.kv_blocks)

    def density(self) -> Float[Array, ""]:
        """Fraction of blocks that are active; jit-able."""
        return self.kv_cnt.astype(jnp.float32).mean() / self.kv_blocks

    def shared(self, together: int) -> Float[Array, ""]:
        """Fraction of active blocks where `together` neighbouring query blocks take the union of their lists; jit-able.

        1 where neighbours have the same lists, 1 / together where they have nothing in common.
        """
        _, union, _ = union_lists(self.kv_idx, self.kv_cnt, self.kv_blocks, together)
        return self.kv_cnt.sum() / (union.sum() * together)

    def with_transpose(self, width: int | None = None) -> BlockMask:
        """The same mask with its transposed lists; jit-able.

        Args:
          width: entries of a transposed list. By default what is needed, under jit the number of query blocks.

        Raises:
          BlockMaskError: the width is too small, or may be because the lists are traced.
        """
        if not known(self.kv_idx, self.kv_cnt):
            if width is not None and width < self.q_blocks:
                raise BlockMaskError(f"the lists are traced and may need more than width {width}: use transposed(width), "
                                     "which tells by a flag")  # fmt: skip
            return self.transposed(self.q_blocks)[0]
        with jax.ensure_compile_time_eval():
            if width is None:
                width = max(int(np.asarray(self.to_dense()).sum(2).max()), 1)
            mask, overflow = self.transposed(width)
        if overflow:
            raise BlockMaskError(f"a key block is active for more query blocks than width {width}: give more, or None")
        return mask

    def transposed(self, width: int) -> tuple[BlockMask, Bool[Array, ""]]:
        """(the mask with transposed lists of `width` entries, whether one needed more); jit-able."""
        flags = self.to_dense()
        flags = np.asarray(flags) if in_host_memory(flags) else flags
        idx, cnt, overflow = pack_lists(flags.swapaxes(-1, -2), min(width, self.q_blocks))
        return dataclasses.replace(self, q_idx=idx, q_cnt=cnt), overflow

    def check(self) -> BlockMask:
        """The mask itself, found consistent: shapes always, values where they are known.

        Raises:
          BlockMaskError: naming what contradicts what.
        """
        nq, nk = _sizes(self.block_q, self.q_size, "q"), _sizes(self.block_k, self.kv_size, "kv")
        _check_lists("kv", self.kv_idx, self.kv_cnt, nq, nk)
        if (self.q_idx is None) != (self.q_cnt is None):
            raise BlockMaskError("q_idx and q_cnt come together: give both or neither")
        if self.q_idx is not None:
            _check_lists("q", self.q_idx, self.q_cnt, nk, nq)
        return self


def _check_lists(name: str, idx: Any, cnt: Any, rows: int, ids: int) -> None:
    for what, x in ((f"{name}_idx", idx), (f"{name}_cnt", cnt)):
        if x.dtype != jnp.int32:
            raise BlockMaskError(f"{what} is {x.dtype}: block lists are int32")
    if idx.ndim != 4 or idx.shape[2] != rows or idx.shape[3] < 1 or cnt.shape != idx.shape[:3]:
        raise BlockMaskError(f"{name}_idx {idx.shape} and {name}_cnt {cnt.shape} do not fit {rows} blocks: "
                             f"wanted (batch, heads, {rows}, width) and (batch, heads, {rows})")  # fmt: skip
    if not known(idx, cnt) or not isinstance(idx, jax.Array | np.ndarray):
        return
    idx, cnt = np.asarray(idx), np.asarray(cnt)
    if cnt.size and (cnt.min() < 0 or cnt.max() > idx.shape[-1]):
        raise BlockMaskError(f"{name}_cnt goes from {cnt.min()} to {cnt.max()}: lists have room for {idx.shape[-1]}")
    real = np.arange(idx.shape[-1]) < cnt[..., None]
    if real.any() and (idx[real].min() < 0 or idx[real].max() >= ids):
        raise BlockMaskError(
            f"{name}_idx holds ids from {idx[real].min()} to {idx[real].max()}: there are {ids} blocks"
        )
    ordered = np.sort(np.where(real, idx, -1 - np.arange(idx.shape[-1])), -1)  # padding: distinct and negative
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise BlockMaskError(f"{name}_idx names a block twice in one list: its keys would count twice")
