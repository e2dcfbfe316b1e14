"""What Hopper kernels are built from: steps and buffers that fit a chip, lists walked through barriers, the call itself.

A program is three warpgroups of 128 threads. Two compute, 64 rows each; the third only copies listed blocks from global into
shared memory, as many steps ahead as there are buffers, and waits until both have let go of a buffer before it fills it again.
A step is a part of a listed block. Where a list's rows are blocks of 64, the two that compute take a block each, over the
union of their lists: who does not own an entry lets its buffer pass.

"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.block_lists import union_lists

ROWS = 64  # of a warpgroup: what its matrix instruction multiplies
WORKERS = 2  # warpgroups that compute
TILE = WORKERS * ROWS  # rows of a program
SHARED_MEMORY = 232448 - 8192  # bytes of a program on Hopper, some left for barriers and vectors
MOST_BUFFERS = 4  # steps that copies run ahead
CHIPS = "NVIDIA H100, NVIDIA H200 or NVIDIA GH200"
FORWARD, BACKWARD = (232, 40), (240, 24)  # registers of a thread that computes and one that copies; 2 * 240 + 24 < 512


def device_kind() -> str:
    """The device that a program is traced for: that of an abstract mesh, or the default one."""
    chip: Any = jax.sharding.get_abstract_mesh().abstract_device
    return chip.device_kind if chip is not None else jax.devices()[0].device_kind


def is_hopper() -> bool:
    """Whether programs are traced for a chip with these instructions (compute capability 9.0 and no other)."""
    return any(name in device_kind() for name in ("H100", "H200", "H800", "H20", "GH200"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one kernel walks: tokens of a step, steps of a listed block, buffers, and whether two lists are walked as one.

    `block` tokens make a listed block; a program's `TILE` rows belong to one list or, `pair`, to two.
    """

    block: int
    step: int
    buffers: int
    rows_of_list: int
    pair: bool

    @property
    def parts(self) -> int:
        return self.block // self.step

    def list_of(self, tile: Any) -> Any:
        """The list that a program walks."""
        return tile if self.pair else tile * TILE // self.rows_of_list


def plan(rows_of_list: int, block: int, most: int, own: int, streamed: int) -> Plan | None:
    """The longest step, then the most buffers, that fit; None where nothing does.

    Args:
      rows_of_list: tokens that share a list, 64 or a multiple of 128. block: tokens of a listed block, a multiple of 64.
      most: tokens of a step for which a kernel has registers. own: bytes of shared memory for a program's own rows.
      streamed: bytes of one streamed token.
    """
    for step in (128, 64, 32):
        if step > most or block % step:
            continue
        buffers = min(MOST_BUFFERS, (SHARED_MEMORY - own) // (step * streamed))
        if buffers >= 2:
            return Plan(block, step, buffers, rows_of_list, rows_of_list == ROWS)
    return None


def wide(features: int) -> int:
    """Features with zeros up to what a swizzled row of shared memory holds."""
    return -(-features // 64) * 64


def lists_of(p: Plan, idx: Any, cnt: Any, ids: int) -> tuple[Any, ...]:
    """(lists, counts) as programs walk them; of pairs the unions, with the owners of every entry.

    One list for all rows, (batch, heads, 1, width), stays one.
    """
    return union_lists(idx, cnt, ids, 2) if p.pair and idx.shape[-2] > 1 else (idx, cnt)


@dataclasses.dataclass(frozen=True)
class Walk:
    """One list in global memory: (batch or 1, heads or 1, rows or 1, width) references and the place of a program in them."""

    plan: Plan
    lists: tuple[Any, Any, Any]  # ids, counts, owners or None
    at: tuple[Any, ...]  # batch, head, list

    def _place(self) -> tuple[Any, ...]:
        return tuple(i if n > 1 else 0 for i, n in zip(self.at, self.lists[1].shape))

    def steps(self) -> Any:
        return self.lists[1][self._place()] * self.plan.parts

    def start(self, step: Any) -> Any:
        """The first token of a step."""
        entry = self.lists[0][(*self._place(), jax.lax.div(step, self.plan.parts))]
        return entry * self.plan.block + jax.lax.rem(step, self.plan.parts) * self.plan.step

    def owned(self, step: Any, worker: Any) -> Any:
        """Whether a step's block is in the worker's own list; None where that is always so."""
        if self.lists[2] is None:
            return None
        owner = self.lists[2][(*self._place(), jax.lax.div(step, self.plan.parts))]
        return (jax.lax.shift_right_logical(owner, worker) & 1) != 0


def slot_of(step: Any, buffers: int) -> Any:
    """The buffer that holds a step."""
    return jax.lax.rem(step, buffers)


def feed(walk: Walk, first: Any, sources: Sequence[Callable[[Any], list[tuple[Any, Any]]]], full: Sequence[Any],
         free: Sequence[Any]) -> Any:  # fmt: skip
    """The copying warpgroup's part: fill buffers in the order of a list; returns the number of steps done in all.

    Args:
      first: steps done before, by other lists through the same buffers.
      sources: functions of a step's first token to [(source, buffers)] that one barrier tells of. full: those barriers.
      free: the barriers that tell that both workers are done with a buffer.
    """
    buffers = walk.plan.buffers

    def turn(step: Any, _: None) -> None:
        start, done = walk.start(step), first + step
        slot = slot_of(done, buffers)
        for copies, filled, emptied in zip(sources, full, free):

            @pl.when(done >= buffers)
            def _(emptied: Any = emptied) -> None:
                plgpu.barrier_wait(emptied.at[slot])

            for source, target in copies(start):
                plgpu.copy_gmem_to_smem(source, target.at[slot], filled.at[slot])

    steps = walk.steps()
    jax.lax.fori_loop(0, steps, turn, None)
    return first + steps


def drain(done: Any, buffers: int, free: Sequence[Any]) -> None:
    """Wait until the last buffers are let go, so that no barrier ends in the middle of a phase."""

    def turn(step: Any, _: None) -> None:
        for emptied in free:
            plgpu.barrier_wait(emptied.at[slot_of(step, buffers)])

    jax.lax.fori_loop(jnp.maximum(done - buffers, 0), done, turn, None)


def scratch(p: Plan, dtype: Any, features: Sequence[int], own: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """(buffers of streamed arrays, each worker's own rows), with the layout that matrix instructions read.

    Its rows of 128 bytes make instructions take 64 tokens of a step at a time, those of 64 bytes 32.
    """
    wide = min(p.step, 64)
    how = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(2 * wide))
    streamed = [plgpu.SMEM((p.buffers, p.step, d), dtype, transforms=how) for d in features]
    return streamed, [plgpu.SMEM((WORKERS, ROWS, d), dtype, transforms=how) for d in own]


def barriers(p: Plan, streams: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """(filled, emptied) barriers of streams, given how many copies fill one."""
    return ([plgpu.Barrier(num_arrivals=n, num_barriers=p.buffers) for n in streams],
            [plgpu.Barrier(num_arrivals=WORKERS, num_barriers=p.buffers) for _ in streams])  # fmt: skip


def call(kernel: Callable[..., None], name: str, grid: tuple[int, int, int], out: Sequence[Any], scratch_types: Any,
         inputs: Sequence[Any], interpret: Any) -> Any:  # fmt: skip
    """The kernel on three warpgroups, over (batch, head, tile): tiles of one head run together and share the cache."""

    def entry(*refs: Any) -> None:
        pl.run_scoped(lambda *given: kernel(*refs, *given), *scratch_types, collective_axes="warpgroup")

    entry.__name__ = name
    return plgpu.kernel(
        entry, out_type=list(out), grid=grid, grid_names=("batch", "head", "tile"),
        num_threads=WORKERS + 1, thread_name="warpgroup", interpret=interpret or None,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)  # fmt: skip


def roles(compute: Callable[[Any], None], copy: Callable[[], None], registers: tuple[int, int]) -> None:
    """Run `compute(worker)` on the first warpgroups and `copy()` on the last."""
    group = jax.lax.axis_index("warpgroup")

    @pl.when(group < WORKERS)
    def _() -> None:
        plgpu.set_max_registers(registers[0], action="increase")
        compute(group)

    @pl.when(group == WORKERS)
    def _() -> None:
        plgpu.set_max_registers(registers[1], action="decrease")
        copy()
