"""What attention kernels on Hopper share: logits in base 2, the pairs that count, and the arrays that say which."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.attention_problem import LOG2E, Static, Tokens
from pallas_kernels.common.mosaic_gpu import CHIPS, ROWS, TILE, device_kind, is_hopper
from pallas_kernels.common.mosaic_gpu_tile import column_layout, load, over, positions, row_layout
from pallas_kernels.common.xla import padded

NEVER = -1e30  # a logit that does not count
FLOOR = -1e29  # where a running maximum starts: exp2(NEVER - FLOOR) is 0, so masked logits need no second mask
LARGEST = 256  # features of a head: more have no room in registers


def refusal(static: Static, q: Any, k: Any, v: Any | None, tokens: Tokens) -> str | None:
    """Why these kernels cannot run, or None."""
    if static.block_q != ROWS and static.block_q % TILE:
        return f"block_q is {static.block_q}: wanted 64 or a multiple of 128"
    if static.block_k % ROWS:
        return f"block_k is {static.block_k}, not a multiple of 64"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"arrays are {q.dtype}: its matrix instructions take bfloat16 or float16 (impl='xla' takes any)"
    features = max(x.shape[-1] for x in (q, k, v) if x is not None)
    if features > LARGEST:
        return f"heads have {features} features, more than {LARGEST}"
    if static.interpret is True:
        return "interpret=True is for TPU kernels: these take jax's parameters for interpreting GPU kernels"
    if not static.interpret and not is_hopper():
        return f"the device is {device_kind()}, no {CHIPS}"
    return None


def rule_inputs(tokens: Tokens, batch: int, keys: int, rows: str = "q") -> list[Any]:
    """int32 (batch, 2) [keys that count, causal offset], then segment ids where there are any.

    Those of a program's `rows`, "q" or "kv", come first, with zeros up to whole programs; then those of the other side.
    """
    numbers = [jnp.stack(tokens.limits(batch, keys), -1)]
    if tokens.q_segments is None:
        return numbers
    own, other = tokens.q_segments, tokens.kv_segments
    own, other = (own, other) if rows == "q" else (other, own)
    return [*numbers, padded(own, 1, TILE), other]


def split(tokens: Tokens, lists: int, references: Any) -> tuple[Any, Any, Any, list[Any]]:
    """((lists, counts, owners or None), numbers, segment references or None, the others), in the order of `rule_inputs`."""
    found, numbers, rest = references[:lists], references[lists], list(references[lists + 1 :])
    found = (*found, None)[:3]
    if tokens.q_segments is None:
        return found, numbers, None, rest
    return found, numbers, (rest[0], rest[1]), rest[2:]


def base2(static: Static, products: Any) -> tuple[Any, Any]:
    """(logits in base 2, derivative of the natural ones by the scaled products or None for 1).

    tanh is written with exp2: the chip's own has three digits, and a cap multiplies its error.
    """
    if static.soft_cap is None:
        return products * (static.scale * LOG2E), None
    t = 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * static.scale / static.soft_cap)))
    return t * (static.soft_cap * LOG2E), 1 - t * t


class Rules:
    """Which pairs of a worker's rows and a step's columns count; costs nothing where no rule exists.

    Args:
      numbers: reference of [keys that count, causal offset], (batch, 2). segments: references of the ids of all (row tokens,
        column tokens), or None. first: the first row's token. transposed: rows are keys and columns queries, not the reverse.
    """  # fmt: skip

    def __init__(self, tokens: Tokens, numbers: Any, segments: Any, batch: Any, first: Any, interpret: Any,
                 transposed: bool = False) -> None:  # fmt: skip
        self.any, self.causal, self.interpret = tokens.any, tokens.q_offset is not None, interpret
        self.first, self.batch, self.segments, self.transposed = first, batch, segments, transposed
        if self.any:
            self.limit, self.offset = numbers[batch, 0], numbers[batch, 1]
        if segments is not None:
            self.own = load(segments[0].at[batch, pl.ds(first, ROWS)], row_layout, interpret)

    def hide(self, z: Any, start: Any) -> Any:
        """Logits with NEVER at pairs that do not count, for columns from token `start` on."""
        if not self.any:
            return z
        if self.segments is not None:
            return self._masked(z, start)
        (query, key), keys = self._sides(self.first, start), z.shape[0 if self.transposed else 1]
        every = allowed(self.limit, self.offset, self.causal, query, key, keys - 1)
        return jax.lax.cond(every, lambda z: z, lambda z: self._masked(z, start), z)

    def _sides(self, row: Any, column: Any) -> tuple[Any, Any]:
        return (column, row) if self.transposed else (row, column)

    def _masked(self, z: Any, start: Any) -> Any:
        rows, columns = (positions(z.shape, axis, self.interpret) for axis in (0, 1))
        ok = allowed(self.limit, self.offset, self.causal, *self._sides(rows + self.first, columns + start))
        if self.segments is not None:
            theirs = load(self.segments[1].at[self.batch, pl.ds(start, z.shape[1])], column_layout, self.interpret)
            ok &= over(self.own, z.shape, 0) == over(theirs, z.shape, 1)
        return jnp.where(ok, z, jnp.full_like(z, NEVER))


def allowed(limit: Any, offset: Any, causal: bool, query: Any, key: Any, more: int = 0) -> Any:
    """Whether limit and causal rule let queries from `query` on see `more` keys after `key`."""
    ok = key + more < limit
    return ok & (key + more <= query + offset) if causal else ok
