"""What the kernels that see all keys share on TPU: tiles of keys that pass by, in steps, keys down and queries along lanes.

Products are transposed: then maxima and sums over the keys of a block are sums of whole registers, and no number crosses
lanes before the end. A step is two products where it can be: one is made while the softmax of the other is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.attention_problem import Static, Tokens
from pallas_kernels.common.attention_tpu import base2
from pallas_kernels.common.tpu import column, dot
from pallas_kernels.common.xla import padded

STEP = 1024  # keys of a step
ROWS = 512  # queries of a program: every fetched key serves so many


def rows_of(static: Static, q: Any, step: int) -> int:
    """Query blocks of a program: at most eight, fewer where a step's products would not fit."""
    return max(1, min(8, ROWS * STEP // max(step, STEP) // static.block_q, q.shape[2] // static.block_q))


def rules(static: Static, tokens: Tokens, batch: int, keys: int, rows: int, tile: int, live: Any,
          at: Callable[..., tuple[Any, Any, Any]]) -> tuple[list[Any], list[pl.BlockSpec]]:  # fmt: skip
    """[key limit, causal offset, queries that count] in scalar memory, then segment ids of a program's queries and tile.

    Args:
      at: a program's (batch, index of rows, index of tile) from its indices.
    """
    arrays = [jnp.stack([*tokens.limits(batch, keys), live.astype(jnp.int32)], -1)[:, None]]
    specs = [pl.BlockSpec((None, 1, 3), lambda *i: (at(*i)[0], 0, 0), memory_space=pltpu.SMEM)]
    if tokens.q_segments is not None:
        arrays += [padded(tokens.q_segments, 1, rows)[:, None], padded(tokens.kv_segments, 1, tile)[:, None]]
        specs.append(pl.BlockSpec((None, 1, rows), lambda *i: (at(*i)[0], 0, at(*i)[1])))
        specs.append(pl.BlockSpec((None, 1, tile), lambda *i: (at(*i)[0], 0, at(*i)[2])))
    return arrays, specs


class Passing:
    """A tile of keys before some queries; `numbers` and `segments` are the references of `rules`."""

    def __init__(self, static: Static, tokens: Tokens, numbers: Any, segments: Any, q: Any, k: Any, first_row: Any,
                 first_key: Any, step: int) -> None:  # fmt: skip
        self.static, self.segments, self.q, self.k, self.step = static, segments, q, k, step
        self.limit, self.offset = numbers[0, 0], numbers[0, 1]
        self.causal, self.rows, self.first_row, self.first_key = (
            tokens.q_offset is not None,
            q.shape[0],
            first_row,
            first_key,
        )
        self.own = first_row + jax.lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)  # positions of the queries

    def each(self, update: Callable[[Any, Any], None]) -> None:
        """`update(start, pairs)` for every step of the tile that a query sees; pairs are None where all count."""
        limit, last_row = self.limit, self.first_row + self.rows + self.offset
        seen = jnp.minimum(limit, last_row) if self.causal else limit

        def turn(n: Any, _: None) -> None:
            start = pl.multiple_of(n * self.step, self.step)
            if self.segments:
                return update(start, self._pairs(start))
            first_sees = jnp.minimum(limit, self.first_row + self.offset + 1) if self.causal else limit
            every = self.first_key + start + self.step <= first_sees
            pl.when(every)(lambda: update(start, None))
            pl.when(jnp.logical_not(every))(lambda: update(start, self._pairs(start)))

        steps = jnp.clip(-((self.first_key - seen) // self.step), 0, self.k.shape[0] // self.step)
        jax.lax.fori_loop(0, steps, turn, None)

    def _pairs(self, start: Any) -> Any:
        key = self.first_key + start + jax.lax.broadcasted_iota(jnp.int32, (self.step, 1), 0)
        ok = jnp.broadcast_to(key < self.limit, (self.step, self.rows))
        if self.causal:
            ok &= key <= self.own + self.offset
        if self.segments:
            ok &= column(self.segments[1][:, pl.ds(start, self.step)]) == self.segments[0][...]
        return ok

    def logits(self, start: Any, pairs: Any) -> Iterator[tuple[Any, int, Any, Any]]:
        """(first key in the tile, keys, logits in base 2, pairs that count or None) of each part of a step."""
        halves = 2 if self.step % (16 * self.static.block_k) == 0 else 1
        size = self.step // halves
        parts = range(0, self.step, size)
        products = [dot(self.k[pl.ds(start + at, size), :], self.q[...], transpose=True) for at in parts]
        for at, product in zip(parts, products):
            yield start + at, size, base2(self.static, product)[0], None if pairs is None else pairs[at : at + size]

    def by_block(self, x: Any) -> Any:
        """(blocks, queries): sums over the keys of each block."""
        return x.reshape(-1, self.static.block_k, self.rows).sum(1)


def of_query_blocks(static: Static, weights: Any, group: int) -> Any:
    """(group, key blocks) from (key blocks, queries): sums over the queries of each block."""
    block, row = (jax.lax.broadcasted_iota(jnp.int32, (group, weights.shape[1]), d) for d in (0, 1))
    return dot((row // static.block_q == block).astype(jnp.float32), weights, transpose=True)
