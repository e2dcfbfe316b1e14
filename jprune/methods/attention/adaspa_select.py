"""AdaSpa's choice of blocks from exact block masses: top blocks per row, sinks, head-adaptive counts (sections 4.2, 4.3)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_sparse_attention import BlockMask
from pallas_kernels.common.block_lists import pad_lists


@dataclasses.dataclass(frozen=True)
class AdaSpaConfig:
    """Settings of AdaSpa; hashable, so that it can be static under jit.

    Attributes:
      sparsity: fraction of video-video blocks to drop, in [0, 1).
      block: tokens of a block.
      search_steps: zero-based steps at which blocks are searched, increasing. Steps before the first are dense; the
        first one is dense too and searches by the way; later ones search first and are sparse already. The paper counts
        from one: its {10, 30} is (9, 29).
      recall_threshold: a head above it is one that can spare blocks.
      head_adaptive: "paper": such heads get (1 + s) / 2 and as many of the worst (3s - 1) / 2; "guarded": so, only
        where it raises the recall summed over heads; "off": all heads alike.
      fused: at the first search, masses by the way of the dense pass ("single_pass") or in a second pass over queries
        and keys ("two_pass", as published).
      research: at later ones, masses under their own log-sum-exp ("exact") or under that of the first search
        ("cached", as published).
      text_start, text_len: where the text tokens stand among all tokens: at the start or at the end.
      min_tokens: shorter sequences stay dense, where sparsity does not pay.
      dense_layers: layers that stay dense.
      impl: implementation of the kernels.
    """

    sparsity: float = 0.8
    block: int = 64
    search_steps: tuple[int, ...] = (9, 29)
    recall_threshold: float = 0.8
    head_adaptive: Literal["paper", "guarded", "off"] = "paper"
    fused: Literal["single_pass", "two_pass"] = "single_pass"
    research: Literal["exact", "cached"] = "exact"
    text_start: int = 0
    text_len: int = 0
    min_tokens: int = 4096
    dense_layers: tuple[int, ...] = ()
    impl: str = "auto"

    def __post_init__(self) -> None:
        steps = self.search_steps
        rules = [
            ("sparsity", 0 <= self.sparsity < 1, "a fraction, at least 0 and below 1"),
            ("block", self.block >= 1, "at least 1"),
            ("search_steps", bool(steps) and steps[0] >= 0 and all(a < b for a, b in itertools.pairwise(steps)),
             "increasing, from 0 on"),
            ("recall_threshold", 0 < self.recall_threshold < 1, "between 0 and 1"),
            ("head_adaptive", self.head_adaptive in ("paper", "guarded", "off"), "paper, guarded or off"),
            ("fused", self.fused in ("single_pass", "two_pass"), "single_pass or two_pass"),
            ("research", self.research in ("exact", "cached"), "exact or cached"),
            ("text_len", self.text_len >= 0, "at least 0"),
        ]  # fmt: skip
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {allowed}")

    @classmethod
    def paper(cls, **more: Any) -> AdaSpaConfig:
        """The published algorithm: two passes at the first search, the cached log-sum-exp afterwards."""
        return cls(**{"fused": "two_pass", "research": "cached", **more})


class Spans(NamedTuple):
    """Blocks of a sequence: `first` to `last` hold video alone; the others, with any text, are sinks at one end."""

    first: int
    last: int
    blocks: int

    @property
    def video(self) -> int:
        """Blocks of video alone."""
        return self.last - self.first

    @property
    def sinks(self) -> int:
        """Blocks with any text."""
        return self.blocks - self.video


def spans(tokens: int, config: AdaSpaConfig) -> Spans:
    """Which blocks of so many tokens hold text.

    Raises:
      ValueError: the text stands neither at the start nor at the end, or leaves no block of video alone.
    """
    c, blocks = config, -(-tokens // config.block)
    end = c.text_start + c.text_len
    if c.text_len == 0:
        first, last = 0, blocks
    elif c.text_start == 0 and end <= tokens:
        first, last = -(-end // c.block), blocks
    elif end == tokens:
        first, last = 0, c.text_start // c.block
    else:
        raise ValueError(
            f"text at {c.text_start} to {end} of {tokens} tokens: it must stand at the start or at the end"
        )
    if last - first < 1:
        raise ValueError(f"{tokens} tokens in blocks of {c.block} leave no block of video without text")
    return Spans(first, last, blocks)


class Counts(NamedTuple):
    """Video blocks that a row keeps: usually, of a head that can spare some, of one that needs more."""

    base: int
    spare: int
    need: int


def keep_counts(n: int, sparsity: float) -> Counts:
    """Counts whose sum over equally many sparing and needing heads is that of the base (section 4.2)."""

    def kept(s: float) -> int:
        return max(1, int((1 - s) * n + 0.5 + 1e-9))

    base = kept(sparsity)
    spare = min(base, kept((1 + sparsity) / 2 if sparsity >= 1 / 3 else 2 * sparsity))
    return Counts(base, spare, min(n, 2 * base - spare))


def tiers(recall: Float[Array, "batch heads"], threshold: float) -> Int[Array, "batch heads"]:
    """+1 for heads that can spare blocks, -1 for as many of the lowest recall, 0 for the others.

    Sparing are the heads above the threshold, at most half of all, the best first; ties go to the lower head.
    """
    heads = recall.shape[-1]
    many = jnp.minimum((recall > threshold).sum(-1, keepdims=True), heads // 2)
    order = jnp.argsort(-recall, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(rank < many, 1, jnp.where(rank >= heads - many, -1, 0))


class Chosen(NamedTuple):
    """The kept blocks of every row of video.

    Attributes:
      ids: (batch, heads, rows, most) ids among the video blocks, the best first: any count is a prefix.
      count: (batch, heads) how many of them each head keeps.
    """

    ids: Int[Array, "batch heads rows most"]
    count: Int[Array, "batch heads"]


class Selection(NamedTuple):
    """What was chosen, and what is known of it.

    Attributes:
      chosen: the blocks.
      recall: (batch, heads), attention mass of video rows in the kept blocks, sinks included, over all of it.
      tier: (batch, heads), see `tiers`.
    """

    chosen: Chosen
    recall: Float[Array, "batch heads"]
    tier: Int[Array, "batch heads"]


def select_blocks(masses: Float[Array, "batch heads nq nk"], config: AdaSpaConfig, tokens: int) -> Selection:
    """Per row of video the blocks of largest mass, lower ids first among equals; jit-able.

    Args:
      masses: exact block sums of attention weights, of all rows and columns of blocks.
      config: settings.
      tokens: of the sequence.

    Raises:
      ValueError: masses of another number of blocks.
    """
    at = spans(tokens, config)
    if masses.shape[2:] != (at.blocks, at.blocks):
        raise ValueError(
            f"masses of {masses.shape[2:]} blocks; {tokens} tokens in blocks of {config.block} have {at.blocks}"
        )
    counts = keep_counts(at.video, config.sparsity)
    rows = masses[:, :, at.first : at.last].astype(jnp.float32)
    best, ids = jax.lax.top_k(rows[..., at.first : at.last], counts.need)
    total = rows.sum((2, 3))
    sinks = total - rows[..., at.first : at.last].sum((2, 3))
    prefix = jnp.cumsum(best.sum(2), axis=-1)  # mass of the k best blocks of all rows, k = 1, ..., most

    def recalled(count: Any) -> Any:
        inside = jnp.take_along_axis(prefix, count[..., None] - 1, axis=-1)[..., 0]
        return (inside + sinks) / jnp.where(total > 0, total, 1.0)

    base = jnp.full(masses.shape[:2], counts.base, jnp.int32)
    usual = recalled(base)
    tier = jnp.zeros_like(base) if config.head_adaptive == "off" else tiers(usual, config.recall_threshold)
    table = jnp.array([counts.base, counts.spare, counts.need], jnp.int32)
    if config.head_adaptive == "guarded":
        better = recalled(table[tier]).sum(-1, keepdims=True) > usual.sum(-1, keepdims=True)
        tier = jnp.where(better, tier, 0)
    count = table[tier]  # -1 is the last
    return Selection(Chosen(ids.astype(jnp.int32), count), recalled(count), tier)


def block_mask(chosen: Chosen, config: AdaSpaConfig, tokens: int) -> BlockMask:
    """The lists that a kernel walks for the rows of video: the chosen blocks and all sinks, ascending; jit-able."""
    at = spans(tokens, config)
    ids, most = chosen.ids.astype(jnp.int32), chosen.ids.shape[-1]
    sinks = jnp.asarray([*range(at.first), *range(at.last, at.blocks)], jnp.int32)
    own = jnp.where(jnp.arange(most) < chosen.count[..., None, None], ids + at.first, at.blocks)
    every = jnp.concatenate([own, jnp.broadcast_to(sinks, (*ids.shape[:3], at.sinks))], axis=-1)
    count = jnp.broadcast_to((chosen.count + at.sinks)[..., None], ids.shape[:3]).astype(jnp.int32)
    rows = min(at.last * config.block, tokens) - at.first * config.block
    return BlockMask(pad_lists(jnp.sort(every, -1), count), count, None, None, config.block, config.block, rows, tokens)


def kept_flags(chosen: Chosen, config: AdaSpaConfig, tokens: int) -> Bool[Array, "batch heads rows nk"]:
    """The same as flags, one a block of every row of video."""
    return block_mask(chosen, config, tokens).to_dense()


def recall_of(
    masses: Float[Array, "batch heads nq nk"], chosen: Chosen, config: AdaSpaConfig, tokens: int
) -> Float[Array, "batch heads"]:
    """The share of these masses, over rows of video, that lies in chosen blocks and sinks (equation 9); jit-able."""
    at = spans(tokens, config)
    rows = masses[:, :, at.first : at.last].astype(jnp.float32)
    return jnp.sum(rows * kept_flags(chosen, config, tokens), (2, 3)) / jnp.sum(rows, (2, 3))
