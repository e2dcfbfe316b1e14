"""What TPU kernels are built from: lists walked by double-buffered copies, what is held in VMEM, small layouts, the call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.block_lists import union_lists
from pallas_kernels.common.xla import leading

ABSENT = 1 << 30  # the position of a token that is not in the list
STEP = 512  # tokens of a step: several times the matrix unit's width,
LONG = 4096  # and twice as many where lists have at least so many, of which a last step half empty is a small part


def group_of(step_tokens: int | None, width: int, block: int) -> int:
    """Blocks of a step over lists of `width` blocks; `step_tokens` None: as many tokens as suit the chip."""
    usual = STEP if width * block < LONG else 2 * STEP
    return max(1, min(width, (step_tokens or usual) // block))


def dot(a: Any, b: Any, *, transpose: bool = False) -> Any:
    """a @ b, or a @ b.T, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=exact, preferred_element_type=jnp.float32)


def fetching(arrays: Sequence[Any], block: int, pairs: int) -> dict[str, int]:
    """The cost of `pairs` for `call` where every block of the program's own tokens fetches rows of these arrays."""
    return {"pairs": pairs, "fetched": pairs // block * sum(x.shape[-1] * x.dtype.itemsize for x in arrays)}


def column(row: Any) -> Any:
    """(1, n) as (n, 1)."""
    return jnp.transpose(jnp.broadcast_to(row, (128, row.shape[1])))[:, :1]


def row(column: Any) -> Any:
    """(n, 1) as (1, n)."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], 128)))[:1]


def list_specs(lists: Sequence[Any]) -> tuple[list[Any], list[pl.BlockSpec]]:
    """Lists, counts and perhaps owners as arrays and blocks in scalar memory: one list a program, or one a grouped head.

    Lists are (batch, heads, blocks, width), or (batch, key heads, heads that share one, blocks, width).

    Raises:
      ValueError: scalar memory has no room for the lists of two programs, one at work and the next, or one list for all.
    """
    idx, cnt, *owners = lists
    shared = (idx.shape[2],) if idx.ndim == 5 else ()
    copies = 1 if idx.shape[0] * idx.shape[1] * idx.shape[-2] == 1 else 2
    words = copies * math.prod(shared) * sum(-(-x.shape[-1] // 128) * 128 for x in (idx, *owners))
    need = 4 * words + (8 << 10)
    if pltpu.is_tpu_device() and need > pltpu.get_tpu_info().smem_capacity_bytes:
        raise ValueError(f"lists of {idx.shape[-1]} blocks{f' for {shared[0]} heads' if shared else ''} need {need >> 10} "
                         f"KB of scalar memory of {pltpu.get_tpu_info().smem_capacity_bytes >> 10}: use larger blocks, "
                         "blocks_together=1, or impl='xla'")  # fmt: skip

    def at(i: Any, j: Any, r: Any) -> Any:
        own = leading(i, idx, 0), leading(j, idx, 1), *(0 for _ in shared), leading(r, idx, idx.ndim - 2)
        return *own, 0, 0

    arrays = [idx[..., None, :], cnt[..., None, None], *(x[..., None, :] for x in owners)]
    return arrays, [
        pl.BlockSpec((None, None, *shared, None, 1, x.shape[-1]), at, memory_space=pltpu.SMEM) for x in arrays
    ]


def joined(lists: int, idx: Any, cnt: Any, ids: int) -> tuple[Any, ...]:
    """What programs walk: (lists, counts) as they are, or unions of so many neighbours with the owners of every entry."""
    return (idx, cnt) if lists == 1 else union_lists(idx, cnt, ids, lists)


def held(resident: bool | None, arrays: Sequence[Any], lead: int, index: Callable[[Any], Any], more: int = 0,
         what: str = "") -> Any:  # fmt: skip
    """(block specifications, whether in VMEM, its limit in bytes) of arrays whose rows programs take by lists.

    Args:
      resident: whether they are to lie in VMEM; None: where they fit.
      lead: axes in front that are one head's; the others are whole. index: second index of a program's (batch, that).
      more: bytes of VMEM that the kernel holds besides, named by `what` in errors.

    Raises:
      ValueError: there is no room even for those.
    """
    size = more + sum(x.dtype.itemsize * math.prod((*x.shape[lead:-1], -(-x.shape[-1] // 128) * 128)) for x in arrays)
    room = int(0.85 * pltpu.get_tpu_info().vmem_capacity_bytes) if pltpu.is_tpu_device() else 0
    if pltpu.is_tpu_device() and more > room:
        raise ValueError(f"{what} need {more >> 20} MB of VMEM of {room >> 20}: use larger blocks, or impl='xla'")
    resident = size <= room if resident is None else resident
    if not resident:
        return [pl.BlockSpec(memory_space=pl.ANY)] * len(arrays), False, _limit(more)

    def whole(x: Any) -> pl.BlockSpec:
        rest = (0,) * (x.ndim - lead)
        return pl.BlockSpec((1,) * lead + x.shape[lead:], lambda b, h, r: (b, index(h), *rest),
                            pipeline_mode=pl.Buffered(1))  # fmt: skip

    return [whole(x) for x in arrays], True, _limit(size)


def _limit(held: int) -> int | None:
    """The limit of VMEM for a kernel that holds so many bytes besides its buffers; None where the default is enough."""
    return None if held < 4 << 20 else held + (16 << 20)


class Walk:
    """A list as a loop of steps: fetches the blocks of the next step while one works on those of this one.

    Args:
      lists: references of lists, counts and perhaps owners, one list each. group: blocks of a step. block: their tokens.
      sources: arrays with tokens first, in VMEM or, where there are buffers, anywhere.
      buffers: for each source (2, group * block, features), and DMA semaphores (2, number of sources); or empty.
      together: blocks whose lists these are the union of.
    """

    def __init__(self, lists: Sequence[Any], group: int, block: int, sources: Sequence[Any], buffers: Sequence[Any],
                 together: int) -> None:  # fmt: skip
        self.lists, self.count, self.group, self.block = lists, lists[1][0, 0], group, block
        self.sources, self.together = sources, together
        self.buffers: Sequence[Any] = buffers[:-1]
        self.semaphores: Any = buffers[-1] if buffers else None

    def entry(self, step: Any, t: int) -> Any:
        """The t-th block of a step; behind the end the last one again, so that buffers never hold garbage."""
        return self.lists[0][0, self._place(step, t)]

    def _place(self, step: Any, t: int) -> Any:
        return jnp.minimum(step * self.group + t, self.count - 1)

    def _owners(self, step: Any) -> list[Any]:
        return [self.lists[2][0, self._place(step, t)] for t in range(self.group)]

    def _transfers(self, step: Any, slot: Any) -> list[Any]:
        out = []
        for t in range(self.group):
            for n, (source, buffer) in enumerate(zip(self.sources, self.buffers)):
                to = buffer.at[slot, pl.ds(t * self.block, self.block), :]
                out.append(pltpu.make_async_copy(source.at[self._tokens(step, t), :], to, self.semaphores.at[slot, n]))
        return out

    def _tokens(self, step: Any, t: int) -> Any:
        return pl.ds(pl.multiple_of(self.entry(step, t) * self.block, self.block), self.block)

    def fetched(self, n: int, step: Any, slot: Any) -> Any:
        """(group * block, features): the tokens of a step of the n-th source.

        From a source in VMEM they are read where they lie: copies within VMEM cost more than the products.
        """
        if self.buffers:
            return self.buffers[n][slot]
        return jnp.concatenate([self.sources[n][self._tokens(step, t), :] for t in range(self.group)], axis=0)

    def _along_lanes(self, numbers: Sequence[Any]) -> Any:
        """int32 (1, group * block): every block's number at its tokens."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.group * self.block), 1)
        out = jnp.zeros_like(lane)
        for t, number in enumerate(numbers):
            out = jnp.where((lane >= t * self.block) & (lane < (t + 1) * self.block), number, out)
        return out

    def positions(self, step: Any) -> Any:
        """int32 (1, group * block): position of every fetched token, ABSENT or more behind the end of the list."""
        first = [
            jnp.where(step * self.group + t < self.count, (self.entry(step, t) - t) * self.block, ABSENT)
            for t in range(self.group)
        ]
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.group * self.block), 1)
        return self._along_lanes(first) + lane

    def owned_by_all(self, step: Any) -> Any:
        """Whether every block of a step is in the lists of all blocks together."""
        if self.together == 1:
            return True
        return functools.reduce(jnp.bitwise_and, self._owners(step)) == (1 << self.together) - 1

    def owned(self, step: Any, rows: int) -> Any:
        """bool (rows, group * block): whether a token's block is in the list of the block that the row belongs to."""
        bit = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) // (rows // self.together)
        return (self._along_lanes(self._owners(step)) & (1 << bit)) != 0

    def all_below(self, step: Any, limit: Any) -> Any:
        """Whether the step is full and every token's position is below a limit."""
        last = functools.reduce(jnp.maximum, [self.entry(step, t) for t in range(self.group)])
        return ((step + 1) * self.group <= self.count) & ((last + 1) * self.block <= limit)

    def run(self, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """Fold `body(step, slot of the buffers, carry)`."""
        steps = (self.count + self.group - 1) // self.group
        if not self.buffers:
            return jax.lax.fori_loop(0, steps, lambda step, carry: body(step, 0, carry), carry)

        @pl.when(steps > 0)
        def _() -> None:
            for c in self._transfers(0, 0):
                c.start()

        def turn(step: Any, carry: Any) -> Any:
            slot = jax.lax.rem(step, 2)

            @pl.when(step + 1 < steps)
            def _() -> None:
                for c in self._transfers(step + 1, 1 - slot):
                    c.start()

            for c in self._transfers(step, slot):
                c.wait()
            return body(step, slot, carry)

        return jax.lax.fori_loop(0, steps, turn, carry)


def buffers_of(arrays: Sequence[Any], rows: int, resident: bool) -> list[Any]:
    """Scratch of a walk over these arrays, `rows` tokens a step: none where it reads them in VMEM."""
    if resident:
        return []
    return [pltpu.VMEM((2, rows, x.shape[-1]), x.dtype) for x in arrays] + [pltpu.SemaphoreType.DMA((2, len(arrays)))]


def call(kernel: Callable[..., None], name: str, grid: tuple[int, ...], inputs: Sequence[Any],
         in_specs: Sequence[Any], out: Any, out_specs: Any, scratch: Sequence[Any], *, pairs: int, features: int,
         fetched: int = 0, vmem_bytes: int | None = None, interpret: Any = False) -> Any:  # fmt: skip
    """`pl.pallas_call` with two independent leading axes of the grid and a cost for XLA's scheduler.

    Args:
      pairs: pairs of rows at full lists. features: multiplied for each. fetched: bytes that the kernel copies itself.
      vmem_bytes: its limit, where the default is not enough.
    """
    arrays = (*inputs, *jax.tree.leaves(out))
    cost = pl.CostEstimate(flops=2 * pairs * features, transcendentals=pairs,
                           bytes_accessed=fetched + sum(x.size * x.dtype.itemsize for x in arrays))  # fmt: skip
    order = (pltpu.PARALLEL,) * 2 + (pltpu.ARBITRARY,) * (len(grid) - 2)
    return pl.pallas_call(
        kernel, out, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch, cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=vmem_bytes),
        interpret=interpret, name=name,
    )(*inputs)  # fmt: skip
