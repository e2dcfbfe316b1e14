"""The mixture of experts by sorting: pairs of a token and an expert lie one expert after the other, for grouped products.

    rows = x[token of pair]    hidden = score * silu(rows @ up[expert of pair])    y[t] = sum of (hidden @ down) over t's pairs

Tokens need not use the same experts as their neighbours, but every pair moves a token's numbers several times, so it pays where
experts are wide or tokens differ. The room for pairs is static; where there are more, `xla` computes the layer: none is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.backends import Operation
from pallas_kernels.common.block_lists import pack_lists
from pallas_kernels.common.xla import accumulator, gates
from pallas_kernels.grouped_matmul.problem import Static as ProductStatic
from pallas_kernels.sparse_moe import xla
from pallas_kernels.sparse_moe.problem import Static, weighted

__all__ = ["PERMUTED", "Pairs", "PermutedStatic", "forward", "gradients", "permute_pairs", "room"]
PERMUTED = Operation("a permuted mixture of experts", "pallas_kernels.grouped_matmul", kernels=("tpu",))
SHARE = 0.35  # of all pairs that there is room for by default
ROUND = 128


@dataclasses.dataclass(frozen=True)
class PermutedStatic:
    """What is known while a program is traced.

    Attributes:
      impl: of the grouped products. capacity: pairs that there is room for. tile, interpret: of the grouped products.
      save_hidden: whether x @ up of the pairs is kept for the gradients.
    """

    impl: str
    capacity: int
    tile: int | None = None
    interpret: Any = False
    save_hidden: bool = False

    def products(self, dtype: Any, *, transpose: bool = False, activation: str | None = None) -> ProductStatic:
        """The settings of grouped products with this result."""
        return ProductStatic(self.tile, transpose, activation, jnp.dtype(dtype).name, self.interpret)


class Pairs(NamedTuple):
    """Active pairs, sorted by expert and then by token; entries behind the last one repeat it, with a score of 0.

    Attributes:
      row_token, row_score: int32 and float32, the token and its score. group_sizes: pairs of each expert.
      overflow: whether there are more pairs than the room; then the last ones are missing here.
    """

    row_token: Int[Array, " P"]
    row_score: Float[Array, " P"]
    group_sizes: Int[Array, " E"]
    overflow: Bool[Array, ""]


def room(tokens: int, experts: int, capacity: int | None = None) -> int:
    """Pairs that there is room for: what is asked for, or 0.35 of all in whole tiles, and never more than there can be."""
    wanted = capacity if capacity is not None else -(-int(SHARE * tokens * experts + 1) // ROUND) * ROUND
    return min(wanted, tokens * experts)


def permute_pairs(
    active: Bool[Array, "T E"] | np.ndarray, scores: Float[Array, "T E"] | np.ndarray, capacity: int
) -> Pairs:
    """The first `capacity` active pairs, expert by expert, tokens ascending. Sorts each expert's flags alone.

    >>> import jax.numpy as jnp
    >>> active = jnp.array([[True, False, True], [True, False, True], [False, False, True]])
    >>> pairs = permute_pairs(active, active * 2.0, 6)
    >>> pairs.row_token.tolist(), pairs.group_sizes.tolist(), bool(pairs.overflow)
    ([0, 1, 0, 1, 2, 2], [2, 0, 3], False)
    """
    active, scores = jnp.asarray(active), jnp.asarray(scores)
    listed, count, _ = pack_lists(active.T, active.shape[0])
    behind = jnp.cumsum(count)
    start = behind - count
    row = jnp.arange(capacity, dtype=jnp.int32)
    expert = jnp.minimum((row[:, None] >= behind).sum(1), len(count) - 1)
    place = jnp.minimum(row - start[expert], jnp.maximum(count[expert] - 1, 0))
    token = listed[expert, place]
    score = jnp.where(row < behind[-1], scores[token, expert], 0)
    sizes = jnp.clip(capacity - start, 0, count)
    return Pairs(token, score, sizes.astype(jnp.int32), behind[-1] > capacity)


class _Places(NamedTuple):
    """Where the pairs of a token lie among the sorted ones."""

    of_pair: Any  # (tokens, experts); means nothing at pairs that are not active
    listed: Any  # (tokens, experts): of the active ones alone
    count: Any  # (tokens,)

    @classmethod
    def of(cls, active: Any, sizes: Any, capacity: int) -> _Places:
        rank = jnp.cumsum(active, axis=0, dtype=jnp.int32) - 1
        place = jnp.clip(jnp.cumsum(sizes) - sizes + rank, 0, capacity - 1)
        experts, count, _ = pack_lists(active, active.shape[1])
        return cls(place, jnp.take_along_axis(place, experts, axis=1), count)

    def summed(self, rows: Any, dtype: Any) -> Any:
        """(tokens, width): the sum of each token's rows, experts ascending; by gathers, since scatters are slow on TPU."""

        def add(j: Any, total: Any) -> Any:
            at = jax.lax.dynamic_index_in_dim(self.listed, j, axis=1, keepdims=False)
            return total + jnp.where((j < self.count)[:, None], _rows(rows, at).astype(dtype), 0)

        return jax.lax.fori_loop(0, self.count.max(), add, jnp.zeros((len(self.count), rows.shape[1]), dtype))


def _rows(array: Any, at: Any) -> Any:
    return jnp.take(array, at, axis=0, mode="clip")  # no place is outside


def _unless(
    overflow: Any, static: PermutedStatic, run: Callable[..., Any], other: Callable[..., Any], *problem: Any
) -> Any:
    """`run` where all pairs have room, else `other`, which needs none."""
    tokens, experts = problem[2].shape
    if static.capacity >= tokens * experts:
        return run(*problem)
    return jax.lax.cond(overflow, other, run, *problem)


def forward(static: PermutedStatic, x: Any, scores: Any, active: Any, up: Any, down: Any) -> tuple[Any, Any]:
    """(the layer's output, x @ up of the sorted pairs if it is to be kept)."""
    dtype, run = accumulator(x), PERMUTED.implementation(static.impl)
    pairs = permute_pairs(active, scores, static.capacity)

    def sorted_(x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
        own, h = _rows(x, pairs.row_token), None
        if static.save_hidden:
            h = run.product(static.products(x.dtype), own, up, pairs.group_sizes)
            hidden = weighted(h.astype(dtype), pairs.row_score[:, None]).astype(x.dtype)
        else:
            silu = static.products(x.dtype, activation="silu")
            hidden = run.product(silu, own, up, pairs.group_sizes, pairs.row_score)
        out = run.product(static.products(x.dtype), hidden, down, pairs.group_sizes)
        return _Places.of(active, pairs.group_sizes, static.capacity).summed(out, dtype).astype(x.dtype), h

    def loop(*problem: Any) -> Any:
        y, _ = xla.forward(Static(static.tile), *problem)
        return y, jnp.zeros((static.capacity, up.shape[2]), x.dtype) if static.save_hidden else None

    return _unless(pairs.overflow, static, sorted_, loop, x, scores, active, up, down)


def gradients(
    static: PermutedStatic, x: Any, scores: Any, active: Any, up: Any, down: Any, dy: Any, kept: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Gradients of x, scores (which mean nothing at pairs that are not active), up and down (0 of experts that nobody uses)."""
    dtype, run = accumulator(x), PERMUTED.implementation(static.impl)
    pairs = permute_pairs(active, scores, static.capacity)

    def sorted_(x: Any, scores: Any, active: Any, up: Any, down: Any, dy: Any) -> Any:
        sizes, score = pairs.group_sizes, pairs.row_score[:, None]
        own, dout = _rows(x, pairs.row_token), _rows(dy, pairs.row_token)
        h = run.product(static.products(dtype), own, up, sizes) if kept is None else kept.astype(dtype)
        silu, slope = gates(h)
        g = run.product(static.products(dtype, transpose=True), dout, down, sizes)
        dh, hidden = (jnp.where(score != 0, score * a, 0).astype(x.dtype) for a in (g * slope, silu))
        back = run.product(static.products(x.dtype, transpose=True), dh, up, sizes)
        places = _Places.of(active, sizes, static.capacity)
        dscores = (silu * g).sum(1)[places.of_pair]
        dup, ddown = (
            run.outer(static.products(w.dtype), a, b, sizes) for w, a, b in ((up, own, dh), (down, hidden, dout))
        )
        return places.summed(back, dtype).astype(x.dtype), dscores, dup, ddown

    def loop(*problem: Any) -> Any:
        return xla.gradients(Static(static.tile), *problem)

    return _unless(pairs.overflow, static, sorted_, loop, x, scores, active, up, down, dy)
