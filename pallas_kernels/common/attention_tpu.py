"""What attention kernels on TPU share: logits in base 2, the pairs that count, and the numbers that say which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens
from pallas_kernels.common.tpu import Walk, column

NEVER = -1e30  # a logit that does not count: -inf would make not-a-number of itself
SUBLANES = 16  # rows of a tile of bfloat16


def refusal(static: Static, q: Any, k: Any, v: Any | None, tokens: Tokens) -> str | None:
    """Why these kernels cannot run, or None."""
    for name, block in (("block_q", static.block_q), ("block_k", static.block_k)):
        if block % SUBLANES:
            return f"{name} is {block}, not a multiple of {SUBLANES}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"arrays are {q.dtype}, not float32 or bfloat16"
    if not static.interpret and not pltpu.is_tpu_device():
        return f"the device is {jax.devices()[0].device_kind}, no TPU (interpret=True runs them anywhere, slowly)"
    return None


def base2(static: Static, products: Any) -> tuple[Any, Any]:
    """(logits in base 2, derivative of the natural ones by the products)."""
    if static.soft_cap is None:
        return products * (static.scale * LOG2E), static.scale
    t = jnp.tanh(products * (static.scale / static.soft_cap))
    return t * (static.soft_cap * LOG2E), static.scale * (1 - t * t)


def rule_specs(
    static: Static, keys: int, tokens: Tokens, batch: int, transposed: bool = False
) -> tuple[list[Any], list[pl.BlockSpec]]:
    """[key limit, causal offset] of each batch element in scalar memory, then segment ids where there are any.

    A program has the ids of its own block, (1, tokens), and all of the other side, (blocks, tokens of a block).
    """
    arrays = [jnp.stack(tokens.limits(batch, keys), -1)[:, None]]
    specs = [pl.BlockSpec((None, 1, 2), lambda i, j, r: (i, 0, 0), memory_space=pltpu.SMEM)]
    if tokens.q_segments is not None:
        sides = [(tokens.q_segments, static.block_q), (tokens.kv_segments, static.block_k)]
        for n, (ids, block) in enumerate(sides):
            if n == transposed:
                arrays.append(ids.reshape(batch, -1, 1, block))
                specs.append(pl.BlockSpec((None, None, 1, block), lambda i, j, r: (i, r, 0, 0)))
            else:
                arrays.append(ids.reshape(batch, -1, block))
                specs.append(pl.BlockSpec((None, *arrays[-1].shape[1:]), lambda i, j, r: (i, 0, 0)))
    return arrays, specs


def split(tokens: Tokens, lists: int, references: Sequence[Any]) -> tuple[Any, Any, Any, list[Any]]:
    """(list references, [key limit, offset], segment references or None, the others), in the order of `rule_specs`."""
    found, numbers, rest = references[:lists], references[lists], list(references[lists + 1 :])
    if tokens.q_segments is None:
        return found, numbers, None, rest
    return found, numbers, (rest[0], rest[1]), rest[2:]


class Rules:
    """Which pairs of a query block and fetched keys count; `segments` is None or (query ids, key ids, blocks) refs."""

    def __init__(self, tokens: Tokens, numbers: Any, segments: Any, first_row: Any, rows: int) -> None:
        self.limit, self.offset = numbers[0, 0], numbers[0, 1]
        self.causal, self.segments = tokens.q_offset is not None, segments
        self.first, self.rows = first_row, rows

    def choose(self, walk: Walk, step: Any, plain: Callable[[Any], Any], masked: Callable[..., Any], carry: Any) -> Any:
        """`plain(carry)` where every pair of a step counts, else `masked(carry, pairs)`."""
        if self.segments:
            return masked(carry, self._pairs(walk, step))
        limit = jnp.minimum(self.limit, self.first + self.offset + 1) if self.causal else self.limit
        every = walk.all_below(step, limit) & walk.owned_by_all(step)
        return jax.lax.cond(every, plain, lambda c: masked(c, self._pairs(walk, step)), carry)

    def _pairs(self, walk: Walk, step: Any) -> Any:
        at = walk.positions(step)
        ok = jnp.broadcast_to(at < self.limit, (self.rows, at.shape[1]))
        if self.causal:
            row = self.first + jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)
            ok &= at <= row + self.offset
        if self.segments:
            queries, keys = self.segments
            own = jnp.concatenate([keys[pl.ds(walk.entry(step, t), 1), :] for t in range(walk.group)], axis=1)
            ok &= column(queries[...]) == own
        return ok & walk.owned(step, self.rows) if walk.together > 1 else ok
