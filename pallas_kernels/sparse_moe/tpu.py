"""The mixture of experts on TPU: tiles of tokens stay in VMEM while the weights of the experts that they use pass by.

A grid has one step a visit of the work list. Neighbouring visits of one tile fetch its tokens once, and sums wait in VMEM
until the last of them; a tile computes all its tokens by an expert that one of them uses, except parts of it that do not use
it. Nothing is sorted, gathered or copied. The gradients of tokens and scores walk the same list; those of weights walk it
expert by expert, and compute h again. Decoding is the forward pass with one tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.tpu import dot
from pallas_kernels.common.xla import gates, padded
from pallas_kernels.sparse_moe.problem import Static, weighted
from pallas_kernels.sparse_moe.work_lists import SUB_TILES, WorkList, tile_activity, tile_worklist

__all__ = ["forward", "gradients", "refusal", "union"]
LANES, SUBLANES = 128, 16  # of a tile of bfloat16
PART = 128  # tokens that skip an expert together: as many rows as the matrix unit has
SHARE = 0.6  # of VMEM: the rest is the compiler's


class _Sizes(NamedTuple):
    tokens: int
    experts: int
    width: int
    hidden: int
    itemsize: int

    @property
    def turned(self) -> bool:
        """Whether kernels get `up` as (experts, hidden, width): a TPU keeps it so where hidden is no whole number of lanes."""
        return self.hidden % LANES != 0

    @classmethod
    def of(cls, x: Any, up: Any) -> _Sizes:
        return cls(x.shape[0], up.shape[0], -(-x.shape[1] // LANES) * LANES, up.shape[2], x.dtype.itemsize)


def _part(tile: int) -> int:
    return PART if tile % PART == 0 else tile


def _bytes(rows: int, columns: int, itemsize: int) -> int:
    return -(-rows // (32 // itemsize)) * (32 // itemsize) * -(-columns // LANES) * LANES * itemsize


def need(static: Static, sizes: _Sizes, tile: int) -> int:
    """Bytes of VMEM: two of every block, one at work and the next, sums, and what a part of a tile computes."""
    _, experts, width, hidden, item = sizes
    tokens, scores, turned = _bytes(tile, width, item), _bytes(tile, experts, 4), _bytes(hidden, width, item)
    weights = turned + (turned if sizes.turned else _bytes(width, hidden, item))
    part = _part(tile)
    work = 2 * _bytes(part, width, 4) + 8 * _bytes(part, hidden, 4)
    sums = _bytes(tile, width, 4)
    kept = 2 * 2 * _bytes(tile, hidden, item) if static.save_hidden else 0
    kernels = [2 * (2 * tokens + scores + weights) + sums]
    if static.trained:
        kernels.append(2 * (3 * tokens + 2 * scores + weights) + sums)
        kernels.append(2 * (2 * tokens + scores + 2 * weights) + 2 * _bytes(hidden, width, 4))
        work += _bytes(width, hidden, 4)  # weights' gradients are turned once
    return max(kernels) + kept + work


def tile_of(static: Static, sizes: _Sizes) -> int:
    """Tokens of a tile: what is asked for, or as many as the chip's arithmetic needs for a weight fetched, if VMEM has room."""
    whole = -(-sizes.tokens // SUBLANES) * SUBLANES
    if not static.trained:
        return whole
    if static.tile:
        return -(-static.tile // SUBLANES) * SUBLANES
    if not pltpu.is_tpu_device():
        return min(whole, PART)
    info = pltpu.get_tpu_info()
    tile = 512 if info.generation >= 6 else 256
    while tile > PART and need(static, sizes, tile) > SHARE * info.vmem_capacity_bytes:
        tile //= 2
    return min(whole, tile)


def refusal(static: Static, problem: Sequence[Any]) -> str | None:
    """Why these kernels cannot run, or None."""
    x, _, _, up, _ = problem
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"arrays are {x.dtype}, not float32 or bfloat16"
    if not static.interpret and not pltpu.is_tpu_device():
        return f"the device is {jax.devices()[0].device_kind}, no TPU (interpret=True runs them anywhere, slowly)"
    sizes = _Sizes.of(x, up)
    tile = tile_of(static, sizes)
    if tile // _part(tile) > SUB_TILES:
        return f"tiles of {tile} tokens are more than {PART * SUB_TILES}"
    if pltpu.is_tpu_device():
        info = pltpu.get_tpu_info()
        vmem, room = need(static, sizes, tile), int(SHARE * info.vmem_capacity_bytes)
        if vmem > room:
            remedy = "a smaller tile, or " if static.trained else "fewer tokens, or "
            return (f"experts of {sizes.width} x {sizes.hidden} with tiles of {tile} tokens need {vmem / 2**20:.1f} MB "
                    f"of VMEM of {room / 2**20:.1f}: use {remedy}impl='xla'")  # fmt: skip
        words = 3 * -(-sizes.tokens // tile) * sizes.experts
        if 4 * words > info.smem_capacity_bytes // 2:
            return (f"visits of {-(-sizes.tokens // tile)} tiles to {sizes.experts} experts need {4 * words >> 10} KB of "
                    f"scalar memory of {info.smem_capacity_bytes >> 11}: use a larger tile, fewer tokens a call, or "
                    "impl='xla'")  # fmt: skip
    return None


class _Visit:
    """One step of the grid, told by the lists in scalar memory: whose it is, and whether it is the first or last there."""

    def __init__(self, owners: Any, lists: Sequence[Any], part: int) -> None:
        w, (_, expert, sub_mask, n) = pl.program_id(0), lists
        self.expert, self.bits, self.part = expert[w], sub_mask[w], part
        self.first = (w == 0) | (owners[w] != owners[jnp.maximum(w - 1, 0)])
        self.last = (w == n[0] - 1) | (owners[w] != owners[jnp.minimum(w + 1, n[0] - 1)])

    def parts(self, tile: int, body: Callable[[Any], None]) -> None:
        """`body(rows)` for the parts of the tile that use the expert."""
        for k in range(tile // self.part):
            pl.when((self.bits >> k) & 1 == 1)(functools.partial(body, pl.ds(k * self.part, self.part)))

    def score(self, scores: Any) -> Any:
        """(rows, 1): the expert's column, picked by a sum, since lanes cannot be indexed."""
        mine = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == self.expert
        return jnp.where(mine, scores, 0).sum(1, keepdims=True)


def _forward_kernel(part: int, turned: bool, _: bool, *refs: Any) -> None:
    lists, (x, scores, up, down, y, *kept, total) = refs[:4], refs[4:]
    visit = _Visit(lists[0], lists, part)

    @pl.when(visit.first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(rows: Any) -> None:
        h = dot(x[rows, :], up[...], transpose=turned)
        for place in kept:
            place[rows, :] = h.astype(place.dtype)
        total[rows, :] += dot(weighted(h, visit.score(scores[rows, :])).astype(x.dtype), down[...])

    visit.parts(x.shape[0], add)

    @pl.when(visit.last)
    def _() -> None:
        y[...] = total[...].astype(y.dtype)


def _slopes(visit: _Visit, rows: Any, h: Any, dy: Any, scores: Any, down: Any) -> tuple[Any, Any, Any]:
    """(gradient of h, weighted hidden, gradient of the score) for some rows of a tile and their h in float32."""
    score = visit.score(scores[rows, :])
    silu, slope = gates(h)
    g = dot(dy[rows, :], down[...], transpose=True)
    dh, hidden = (jnp.where(score != 0, score * a, 0).astype(dy.dtype) for a in (g * slope, silu))
    return dh, hidden, (silu * g).sum(1, keepdims=True)


def _token_kernel(part: int, turned: bool, saved: bool, *refs: Any) -> None:
    """Where h was saved it stands in the place of x, and its gradient is saved as well."""
    lists, (x, dy, scores, up, down, dx, dscores, *kept, total) = refs[:4], refs[4:]
    visit = _Visit(lists[0], lists, part)

    @pl.when(visit.first)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        dscores[...] = jnp.zeros_like(dscores)

    def add(rows: Any) -> None:
        h = x[rows, :].astype(jnp.float32) if saved else dot(x[rows, :], up[...], transpose=turned)
        dh, _, dscore = _slopes(visit, rows, h, dy, scores, down)
        for place in kept:
            place[rows, :] = dh
        total[rows, :] += dot(dh, up[...], transpose=not turned)
        mine = jax.lax.broadcasted_iota(jnp.int32, (part, dscores.shape[1]), 1) == visit.expert
        dscores[rows, :] += jnp.where(mine, dscore, 0)

    visit.parts(dy.shape[0], add)

    @pl.when(visit.last)
    def _() -> None:
        dx[...] = total[...].astype(dx.dtype)


def _weight_kernel(part: int, turned: bool, saved: bool, *refs: Any) -> None:
    """Where h and its gradient were saved they stand in the places of up and down."""
    lists, (x, dy, scores, up, down, dup, ddown, up_total, down_total) = refs[:4], refs[4:]
    visit = _Visit(lists[1], lists, part)

    @pl.when(visit.first)
    def _() -> None:
        up_total[...] = jnp.zeros_like(up_total)
        down_total[...] = jnp.zeros_like(down_total)

    def add(rows: Any) -> None:
        if saved:
            dh, hidden = (
                down[rows, :],
                weighted(up[rows, :].astype(jnp.float32), visit.score(scores[rows, :])).astype(x.dtype),
            )
        else:
            h = dot(x[rows, :], up[...], transpose=turned)
            dh, hidden, _ = _slopes(visit, rows, h, dy, scores, down)
        up_total[...] += dot(dh.T, x[rows, :])  # (hidden, width): of the two factors the narrow one is turned
        down_total[...] += dot(hidden.T, dy[rows, :])

    visit.parts(x.shape[0], add)

    @pl.when(visit.last)
    def _() -> None:
        dup[...] = (up_total[...] if turned else up_total[...].T).astype(dup.dtype)
        ddown[...] = down_total[...].astype(ddown.dtype)


def _call(static: Static, name: str, kernel: Callable[..., None], sizes: _Sizes, tile: int, work: WorkList,
          inputs: Sequence[Any], out: Sequence[Any], scratch: Sequence[tuple[int, int]], products: int) -> Any:  # fmt: skip
    """One step a visit; arrays of two axes come by tiles of tokens, of three by experts, of four by both."""

    def spec(array: Any) -> pl.BlockSpec:
        if len(array.shape) == 2:
            return pl.BlockSpec((tile, array.shape[1]), lambda w, tiles, experts, *_: (tiles[w], 0))
        if len(array.shape) == 4:
            return pl.BlockSpec(
                (None, None, *array.shape[2:]), lambda w, tiles, experts, *_: (tiles[w], experts[w], 0, 0)
            )
        return pl.BlockSpec((None, *array.shape[1:]), lambda w, tiles, experts, *_: (experts[w], 0, 0))

    every = len(work.tile) * tile  # pairs at full lists
    size = sum(a.size * a.dtype.itemsize for a in (*inputs, *out))
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 64 << 20
    return pl.pallas_call(
        functools.partial(kernel, _part(tile), sizes.turned, static.save_hidden),
        list(out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4, grid=(work.n,), in_specs=[spec(a) for a in inputs], out_specs=[spec(a) for a in out],
            scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.ARBITRARY,), vmem_limit_bytes=min(need(static, sizes, tile) + (16 << 20), capacity)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * every * sizes.width * sizes.hidden, transcendentals=every * sizes.hidden,
            bytes_accessed=size,
        ),
        interpret=static.interpret, name=name,
    )(work.tile, work.expert, work.sub_mask, work.n[None], *inputs)  # fmt: skip


class _Layout(NamedTuple):
    """A problem in whole tiles and lanes."""

    sizes: _Sizes
    tile: int
    parts: Any
    arrays: tuple[Any, ...]

    @classmethod
    def of(cls, static: Static, active: Any, *arrays: Any) -> _Layout:
        """Of (x, scores, up, down) and perhaps the output's gradient behind x."""
        *tokens, scores, up, down = arrays
        sizes = _Sizes.of(tokens[0], up)
        tile = tile_of(static, sizes)
        tokens = [padded(padded(a, 0, tile), 1, LANES) for a in tokens]
        up, down = padded(up, 1, LANES), padded(down, 2, LANES)
        up = up.swapaxes(1, 2) if sizes.turned else up
        if not static.interpret:  # XLA would move all weights into VMEM where they fit, for a kernel that reads some
            up, down = (pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in (up, down))
        return cls(sizes, tile, tile_activity(active, tile, _part(tile)),
                   (*tokens, padded(scores, 0, tile), up, down))  # fmt: skip


def _like(array: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)


def forward(static: Static, x: Any, scores: Any, active: Any, up: Any, down: Any) -> tuple[Any, Any]:
    """(the layer's output, x @ up if it is to be kept: (tiles, experts, tokens of a tile, hidden), of visits alone)."""
    sizes, tile, parts, arrays = _Layout.of(static, active, x, scores, up, down)
    name = "tile_moe" if static.trained else "union_moe"
    h = (len(parts), sizes.experts, tile, sizes.hidden)
    y, *kept = _call(static, name, _forward_kernel, sizes, tile, tile_worklist(parts), arrays,
                     [_like(arrays[0]), *([jax.ShapeDtypeStruct(h, x.dtype)] if static.save_hidden else [])],
                     [(tile, sizes.width)], 2)  # fmt: skip
    return y[: x.shape[0], : x.shape[1]], kept[0] if kept else None


def union(static: Static, *problem: Any) -> Any:
    """The output alone: all tokens are one tile."""
    return forward(static, *problem)[0]


def gradients(
    static: Static, x: Any, scores: Any, active: Any, up: Any, down: Any, dy: Any, kept: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Gradients of x, scores (which mean nothing at pairs that are not active), up and down (0 of experts that nobody uses)."""
    sizes, tile, parts, arrays = _Layout.of(static, active, x, dy, scores, up, down)
    call = functools.partial(_call, static)
    own, dout, score, *weights = arrays
    dx, dscores, *slopes = call(
        "tile_moe_dx", _token_kernel, sizes, tile, tile_worklist(parts), [own if kept is None else kept, dout, score, *weights],
        [_like(own), _like(score), *(() if kept is None else [_like(kept)])], [(tile, sizes.width)], 3 if kept is None else 2,
    )  # fmt: skip
    factors = weights if kept is None else [kept, *slopes]
    dup, ddown = call(
        "tile_moe_dw", _weight_kernel, sizes, tile, tile_worklist(parts, order="expert"), [own, dout, score, *factors],
        [_like(a) for a in weights], [(sizes.hidden, sizes.width)] * 2, 4 if kept is None else 2,
    )  # fmt: skip
    rows, width = x.shape
    dup = dup.swapaxes(1, 2) if sizes.turned else dup
    return dx[:rows, :width], dscores[:rows], dup[:, :width], ddown[:, :, :width]
