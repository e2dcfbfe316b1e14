"""One attention problem as implementations receive it: (batch, heads, tokens, features) of whole blocks, and which pairs count.

A key counts for a query if its block is in the query block's list and every token rule holds. The rules that exist are
read from `Tokens`: an entry that is None is a rule that no implementation spends an instruction on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """What trades speed for memory, never results.

    Attributes:
      step_tokens: keys (in gradients of keys: queries) that one step of the loop over a list fetches and multiplies. On
        TPU below 256 wastes the matrix unit. None: 512 on TPU, 1024 for lists of 4096 and more; elsewhere a whole list
        where it has at most 4096 keys.
      rows_at_once: query blocks that the XLA implementation handles together. None: 1 on CPU, 32 elsewhere.
      blocks_together: query blocks (in gradients of keys: key blocks) that one TPU program takes as one, over the union of
        their lists: every fetched key serves so many times more queries, at the price of pairs that are masked. It pays
        where neighbours' lists are alike (`BlockMask.shared`) and their blocks short of 256 tokens. A value that is not
        finite then reaches all of them, not only those whose list has its block.
      resident: whether a TPU program keeps all keys and values of a head in VMEM (in gradients of keys: queries and
        cotangents) and takes blocks from there instead of HBM. None: where they fit.
      passes: how often a search on TPU or GPU goes over the keys, 1 or 2: once needs memory for a number of every query
        and key block (VMEM on TPU, at most 2 GiB on GPU, some heads at a time). None: once where that fits.
    """

    step_tokens: int | None = None
    rows_at_once: int | None = None
    blocks_together: int = 1
    resident: bool | None = None
    passes: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.blocks_together <= 16:
            raise ValueError(f"blocks_together is {self.blocks_together}: 1 to 16 are possible")
        for name in ("step_tokens", "rows_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be positive, or None")
        if self.passes not in (None, 1, 2):
            raise ValueError(f"passes is {self.passes}: 1, 2 or None")


@dataclasses.dataclass(frozen=True)
class Static:
    """What a compiled program is specific to."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    config: KernelConfig = KernelConfig()
    interpret: Any = False


class Tokens(NamedTuple):
    """Rules for pairs of tokens; None is no rule. Keys behind `kv_len` are zeros in every array.

    kv_len: int32 (batch,), keys before it count. q_offset: int32 (batch,), causal: key <= query + offset.
    q_segments, kv_segments: int32 (batch, tokens), equal ones see each other.
    """

    kv_len: Any = None
    q_offset: Any = None
    q_segments: Any = None
    kv_segments: Any = None

    @property
    def any(self) -> bool:
        """Whether a rule exists."""
        return any(x is not None for x in self)

    def limits(self, batch: int, keys: int) -> tuple[Any, Any]:
        """int32 (batch,) each: keys that count, and the causal offset (0 where there is no causal rule)."""
        limit = jnp.full(batch, keys, jnp.int32) if self.kv_len is None else self.kv_len
        return limit, jnp.zeros(batch, jnp.int32) if self.q_offset is None else self.q_offset


def visible(tokens: Tokens, batch: Any, rows: Any, cols: Any) -> Any:
    """bool (queries, keys): which pairs the rules allow, for positions `rows` and `cols` of one batch element."""
    ok = jnp.ones((rows.shape[0], cols.shape[0]), bool)
    if tokens.kv_len is not None:
        ok &= cols[None] < tokens.kv_len[batch]
    if tokens.q_offset is not None:
        ok &= cols[None] <= rows[:, None] + tokens.q_offset[batch]
    if tokens.q_segments is not None:
        ok &= tokens.q_segments[batch][rows][:, None] == tokens.kv_segments[batch][cols][None]
    return ok


def logits(static: Static, products: Any) -> Any:
    """Scaled and capped products of queries and keys."""
    s = products * static.scale
    return s if static.soft_cap is None else static.soft_cap * jnp.tanh(s / static.soft_cap)


def through_cap(static: Static, s: Any, ds: Any) -> Any:
    """The gradient of the products from that of the capped logits `s`."""
    return ds * static.scale if static.soft_cap is None else ds * static.scale * (1 - (s / static.soft_cap) ** 2)


def finite_lse(lse: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The log-sum-exp that a gradient subtracts: rows that saw no key get a number so large that exp(s - lse) is 0."""
    return jnp.where(jnp.isneginf(lse), 1e30, lse)
