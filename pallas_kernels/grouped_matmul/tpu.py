"""Grouped products on TPU: a grid has one step a visit of a tile of rows by a group that owns some of them.

Rows of other groups are masked where a tile is shared, and neighbouring visits of one group fetch its matrix once. A matrix's
inner axis lies in VMEM whole; its columns are split where there is no room. Tiles of no group are written as 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.tpu import column, dot
from pallas_kernels.common.xla import padded
from pallas_kernels.grouped_matmul.problem import Static, spans

__all__ = ["outer", "product", "refusal"]
LANES, SUBLANES = 128, 16  # of a tile of bfloat16
ROWS = 128  # of a tile: as many as the matrix unit has; more are wasted where groups meet
SHARE = 0.6  # of VMEM: the rest is the compiler's


class Visits(NamedTuple):
    """Visits in order, of which the first `n` count: their tile and group, and the rows [start, end) of each group.

    valid: whether the group has rows in the tile; else the visit is made so that what belongs to either is written.
    """

    tile: Any
    group: Any
    valid: Any
    start: Any
    end: Any
    n: Any

    @classmethod
    def of(cls, sizes: Any, rows: int, tile: int, *, by: str) -> Visits:
        """by "tile": every tile at least once, in order. by "group": every group at least once."""
        tiles, groups = -(-rows // tile), len(sizes)
        start, end = spans(sizes, rows)
        first = jnp.minimum(start // tile, tiles - 1)
        own = jnp.where(end > start, (end - 1) // tile - first + 1, 0)
        count = own if by == "tile" else jnp.maximum(own, 1)
        behind = jnp.cumsum(count, dtype=jnp.int32)
        w = jnp.arange(tiles + groups, dtype=jnp.int32)
        group = jnp.minimum((w[:, None] >= behind).sum(1, dtype=jnp.int32), groups - 1)
        at, valid, n = first[group] + w - behind[group] + count[group], own[group] > 0, behind[-1]
        if by == "tile":  # behind the last rows come tiles of no group, and the last matrix stays
            used = -(-end[-1] // tile)
            free = w >= n
            at, group = jnp.where(free, used + w - n, at), jnp.where(free, group[jnp.maximum(n - 1, 0)], group)
            valid, n = valid & ~free, n + tiles - used
        return cls(jnp.minimum(at, tiles - 1), group, valid.astype(jnp.int32), start, end, n)


class _Visit:
    """One step: whether it is the first or last of its tile or group, and which rows are the group's."""

    def __init__(self, axis: int, owner: int, refs: Sequence[Any]) -> None:
        self.tiles, self.groups, valid, self.start, self.end, n = refs
        w = pl.program_id(axis)
        owners = refs[owner]
        self.tile, self.group, self.valid = self.tiles[w], self.groups[w], valid[w] != 0
        self.first = (w == 0) | (owners[w] != owners[jnp.maximum(w - 1, 0)])
        self.last = (w == n[0] - 1) | (owners[w] != owners[jnp.minimum(w + 1, n[0] - 1)])

    def mine(self, rows: int) -> Any:
        """(rows, 1)"""
        row = self.tile * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        return (row >= self.start[self.group]) & (row < self.end[self.group])


def _product_kernel(static: Static, scaled: bool, *refs: Any) -> None:
    lists, (lhs, rhs, *scale, out) = refs[:6], refs[6:]
    visit = _Visit(1, 0, lists)

    @pl.when(visit.first)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(visit.valid)
    def _() -> None:
        h = dot(lhs[...], rhs[...], transpose=static.transpose)
        new = static.finished(h, column(scale[0][...]) if scaled else None)
        out[...] = jnp.where(visit.mine(len(lhs)), new.astype(out.dtype), out[...])


def _outer_kernel(turned: bool, *refs: Any) -> None:
    lists, (lhs, dout, out, total) = refs[:6], refs[6:]
    visit = _Visit(2, 1, lists)

    @pl.when(visit.first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(visit.valid)
    def _() -> None:
        mine = visit.mine(len(lhs))
        a, b = (jnp.where(mine, x[...], 0) for x in (lhs, dout))
        total[...] += dot(b.T, a) if turned else dot(a.T, b)  # of the two factors the narrow one is turned

    @pl.when(visit.last)
    def _() -> None:
        out[...] = (total[...].T if turned else total[...]).astype(out.dtype)


def _bytes(rows: int, columns: int, itemsize: int) -> int:
    sublanes = 32 // itemsize
    return -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * itemsize


def _vmem() -> int:
    """Bytes of VMEM; of the smallest chip where there is none."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 64 << 20


def _tile(static: Static, rows: int) -> int:
    return min(-(-(static.tile or ROWS) // SUBLANES), -(-rows // SUBLANES)) * SUBLANES


def _for_outer(static: Static, rows: int, groups: int) -> Static:
    """With more rows a tile where groups are large: every visit adds to sums as large as a group's matrix."""
    mean = rows // groups
    return (
        static
        if static.tile
        else dataclasses.replace(static, tile=ROWS * (4 if mean >= 1024 else 2 if mean >= 512 else 1))
    )


class _Blocks(NamedTuple):
    """Sizes of the blocks of a product (tile, inner) x (inner, columns), or of (tile, inner).T x (tile, columns)."""

    tile: int
    inner: int
    columns: int
    need: int

    @classmethod
    def of(cls, static: Static, rows: int, inner: int, columns: int, item: int, *, whole: bool) -> _Blocks:
        """The fewest blocks that VMEM has room for. whole: whether the inner axis stays in one piece."""
        tile, parts = _tile(static, rows), [1, 1]
        room = SHARE * _vmem()
        while True:
            k, n = (_part(size, p) for size, p in zip((inner, columns), parts, strict=True))
            out = _bytes(tile, n, 4) if whole else _bytes(k, n, item)
            blocks = _bytes(tile, k, item) + (_bytes(k, n, item) if whole else _bytes(tile, n, item)) + out
            work = (
                3 * _bytes(tile, n, 4) if whole else 2 * _bytes(k, n, 4) + _bytes(tile, k, item) + _bytes(tile, n, item)
            )
            work += 2 * (blocks - out) if item == 4 else 0  # products of float32 are made of bfloat16 parts
            need = 2 * blocks + work
            least = n <= LANES and (whole or k <= LANES)
            if need <= room or least:
                return cls(tile, k, n, need)
            split = 1 if whole or n >= k else 0
            parts[split] += 1


def _part(size: int, parts: int) -> int:
    return size if parts == 1 else -(-size // parts // LANES) * LANES if size > LANES else size


def _call(static: Static, name: str, kernel: Any, visits: Visits, grid: tuple[Any, ...], inputs: Sequence[Any],
          in_specs: Sequence[Any], out: Any, out_spec: Any, scratch: Sequence[Any], need: int, flops: int) -> Any:  # fmt: skip
    size = sum(a.size * a.dtype.itemsize for a in (*inputs, out))
    return pl.pallas_call(
        kernel, out,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=6, grid=grid, in_specs=in_specs, out_specs=out_spec,
                                               scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(pltpu.ARBITRARY,) * len(grid),
                                             vmem_limit_bytes=min(need + (16 << 20), _vmem())),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=size),
        interpret=static.interpret, name=name,
    )(*visits[:5], visits.n[None], *inputs)  # fmt: skip


def product(static: Static, lhs: Any, rhs: Any, sizes: Any, scale: Any = None) -> Any:
    """lhs[i] @ rhs[group of i], finished as `static` says; rows of no group are 0."""
    rows, inner = lhs.shape
    columns = rhs.shape[1 if static.transpose else 2]
    tile, _, part, need = _Blocks.of(static, rows, inner, columns, lhs.dtype.itemsize, whole=True)
    lhs = padded(lhs, 0, tile)
    visits = Visits.of(sizes, rows, tile, by="tile")
    matrix = (None, part, inner) if static.transpose else (None, inner, part)
    if not static.interpret:  # XLA would move all matrices into VMEM where they fit, for a kernel that reads some
        rhs = pltpu.with_memory_space_constraint(rhs, pltpu.HBM)
    inputs = [lhs, rhs]
    in_specs = [
        pl.BlockSpec((tile, inner), lambda j, w, tiles, *_: (tiles[w], 0)),
        pl.BlockSpec(matrix, lambda j, w, tiles, groups, *_: (groups[w], *((j, 0) if static.transpose else (0, j)))),
    ]
    if scale is not None:
        inputs.append(padded(scale, 0, tile).reshape(-1, 1, tile))
        in_specs.append(pl.BlockSpec((None, 1, tile), lambda j, w, tiles, *_: (tiles[w], 0, 0)))
    out = _call(
        static, "grouped_matmul", functools.partial(_product_kernel, static, scale is not None), visits,
        (pl.cdiv(columns, part), visits.n), inputs, in_specs, jax.ShapeDtypeStruct((len(lhs), columns), static.dtype),
        pl.BlockSpec((tile, part), lambda j, w, tiles, *_: (tiles[w], j)), [], need, 2 * rows * inner * columns,
    )  # fmt: skip
    return out[:rows]


def outer(static: Static, lhs: Any, dout: Any, sizes: Any) -> Any:
    """lhs[rows of g].T @ dout[rows of g] for every group g, 0 for groups without rows."""
    rows, inner = lhs.shape
    columns = dout.shape[1]
    static = _for_outer(static, rows, len(sizes))
    tile, k, n, need = _Blocks.of(static, rows, inner, columns, lhs.dtype.itemsize, whole=False)
    visits = Visits.of(sizes, rows, tile, by="group")
    lhs, dout = (padded(x, 0, tile) for x in (lhs, dout))
    turned = n < k
    return _call(
        static, "grouped_matmul_outer", functools.partial(_outer_kernel, turned), visits,
        (pl.cdiv(inner, k), pl.cdiv(columns, n), visits.n), [lhs, dout],
        [pl.BlockSpec((tile, k), lambda i, j, w, tiles, *_: (tiles[w], i)),
         pl.BlockSpec((tile, n), lambda i, j, w, tiles, *_: (tiles[w], j))],
        jax.ShapeDtypeStruct((len(sizes), inner, columns), static.dtype),
        pl.BlockSpec((None, k, n), lambda i, j, w, tiles, groups, *_: (groups[w], i, j)),
        [pltpu.VMEM((n, k) if turned else (k, n), jnp.float32)], need, 2 * rows * inner * columns,
    )  # fmt: skip


def refusal(static: Static, lhs: Any, rhs: Any) -> str | None:
    """Why these kernels cannot run a product and its derivatives, or None. Arrays may be shapes alone."""
    if lhs.dtype not in (jnp.float32, jnp.bfloat16):
        return f"arrays are {lhs.dtype}, not float32 or bfloat16"
    if not static.interpret and not pltpu.is_tpu_device():
        return f"the device is {jax.devices()[0].device_kind}, no TPU (interpret=True runs them anywhere, slowly)"
    if pltpu.is_tpu_device():
        (rows, _), (groups, *sides) = lhs.shape, rhs.shape
        info, item = pltpu.get_tpu_info(), lhs.dtype.itemsize
        room = int(SHARE * info.vmem_capacity_bytes)
        ways = [(static, sides, True), (static, sides[::-1], True), (_for_outer(static, rows, groups), sides, False)]
        need = max(_Blocks.of(s, rows, a, b, item, whole=whole).need for s, (a, b), whole in ways)
        if need > room:
            return (f"matrices of {sides[0]} x {sides[1]} with tiles of {_tile(static, rows)} rows need {need / 2**20:.1f} MB "
                    f"of VMEM of {room / 2**20:.1f}: use a smaller tile, or impl='xla'")  # fmt: skip
        words = 3 * (-(-rows // _tile(static, rows)) + groups) + 2 * groups
        if 4 * words > info.smem_capacity_bytes // 2:
            return (f"visits of {rows} rows by {groups} groups need {4 * words >> 10} KB of scalar memory of "
                    f"{info.smem_capacity_bytes >> 11}: use a larger tile, fewer rows a call, or impl='xla'")  # fmt: skip
    return None
