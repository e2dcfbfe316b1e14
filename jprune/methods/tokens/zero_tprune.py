"""Zero-TPrune (Wang, Dedhia and Jha, CVPR 2024): tokens of a trained vision transformer dropped after some of its blocks.

After such a block, from what its attention computed:
  1. a first ranking, one vote of the weighted PageRank, that prunes nothing                                     (stage I')
  2. `remove` near-duplicates are dropped from the less important half                                           (stage S)
  3. `iters` votes among those that are left, whose attention is normalised anew; the best are kept              (stage I)
Similarity comes before importance, because a large even background would otherwise vote for itself. Special tokens vote and are
voted for, and are never dropped. The block itself still has all its tokens: what is saved is saved in the next one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jprune.methods.tokens.pagerank import aggregate_heads, initial_signal, living_signal, wpr_scores
from jprune.methods.tokens.selection import best, pack, patches, places_of
from jprune.methods.tokens.similarity import (
    FEATURES,
    PARTITIONS,
    clipped,
    exponent,
    features,
    similar_alive,
    similarity_prune,
)
from jprune.models.token_hook import Seen, TokenReducer, Tokens, take

PAPER_VARIANCES = (0.01, 0.7)


@dataclasses.dataclass(frozen=True)
class PruneSpec:
    """What happens after one block.

    Attributes:
      layer: the block, from 0.
      remove: near-duplicates that stage S drops; 0: no stage I' and no stage S.
      keep: patches that stage I leaves; None: the share `rate` of those that S left, rounded down.
      rate: see `keep`.
      iters: votes of stage I.
      boost: whether special tokens vote sqrt(tokens) times as strongly at first.
      vhf: range of variances outside which a head's scores are not counted (the paper: 0.01 to 0.7); None: all heads count.
      temperature: of the attention that votes; 1: as the block computed it.
      mode: "rms" or "mean" over heads.
      partition, feature, metric, head_reduce: of stage S, see `jprune.methods.tokens.similarity`.
      threshold: where set, `keep` is a maximum, and only patches of at least this many times the mean score are kept.
    """

    layer: int
    remove: Any = 0
    keep: Any = None
    rate: float = 1.0
    iters: Any = 5
    boost: Any = True
    vhf: Any = None
    temperature: float = 1.0
    mode: str = "rms"
    partition: str = "seq_u"
    feature: str = "key"
    metric: str | float = "cosine"
    head_reduce: str = "concat"
    threshold: float | None = None

    def numbers(self, n: int) -> tuple[int, int]:
        """(near-duplicates to drop, patches to keep) of n patches."""
        remove = clipped(self.remove, n) if self.remove else 0
        left = n - remove
        # without the 1e-9, 0.29 of 100 would be 28
        return remove, min(left, math.floor(left * self.rate + 1e-9) if self.keep is None else self.keep)


def importance(
    attn: Float[Array, "batch heads tokens tokens"],
    spec: PruneSpec,
    special: int,
    alive: Bool[Array, "batch tokens"] | None = None,
    iters: Any = None,
) -> Float[Array, "batch tokens"]:
    """Score of every token, of special ones too, by the spec's votes (or `iters`) among living tokens."""
    if alive is None:
        init = initial_signal(attn.shape[-1], special, spec.boost)
    else:
        init = living_signal(alive, special, spec.boost)
    scores = wpr_scores(attn, spec.iters if iters is None else iters, init, spec.temperature, alive)
    return aggregate_heads(scores, spec.mode, spec.vhf, alive)


def without_duplicates(
    tokens: Tokens, seen: Seen, spec: PruneSpec, remove: Any, key: Any = None
) -> Bool[Array, "batch tokens"]:
    """Stages I' and S: which tokens are alive when `remove` near-duplicates are gone; `remove` may be traced."""
    assert seen.weights is not None
    first = importance(seen.weights, spec, seen.prefix, tokens.alive, iters=1)
    feats = features(seen, tokens.x, spec.feature, spec.head_reduce)
    options = (spec.partition, spec.metric, seen.prefix, key)
    if tokens.alive is not None or not isinstance(remove, int):
        alive = jnp.ones(first.shape, bool) if tokens.alive is None else tokens.alive
        return similar_alive(first, feats, remove, alive, *options)
    kept = similarity_prune(first, feats, remove, *options)
    return jnp.zeros(first.shape, bool).at[jnp.arange(len(kept))[:, None], kept].set(True)


def most_important(tokens: Tokens, seen: Seen, spec: PruneSpec, keep: Any) -> Bool[Array, "batch tokens"]:
    """Stage I: which tokens are alive when `keep` patches (and all special tokens) are left; `keep` may be traced."""
    assert seen.weights is not None
    score = importance(seen.weights, spec, seen.prefix, tokens.alive)
    patch = patches(tokens, seen.prefix)
    kept = best(score, keep, patch)
    if spec.threshold is not None:
        mean = jnp.where(patch, score, 0).sum(1, keepdims=True) / jnp.maximum(patch.sum(1, keepdims=True), 1)
        kept = kept & ((score >= spec.threshold * mean) | best(score, 1, patch))
    special = jnp.arange(score.shape[1]) < seen.prefix
    return kept | (special if tokens.alive is None else special & tokens.alive)


@dataclasses.dataclass(frozen=True)
class ZeroTPrune(TokenReducer):
    """Tokens dropped after the blocks that `specs` name, in the order of blocks.

    With `masked`, dropped tokens stay in the arrays and are hidden from attention: nothing is saved, and the living ones come
    out as they would without the others. For analysis, and to check that gathering does the same.

    Raises:
      ValueError: blocks named twice or out of order, or a setting out of range.
    """

    specs: tuple[PruneSpec, ...]
    masked: bool = False

    def __post_init__(self) -> None:
        layers = [s.layer for s in self.specs]
        if layers != sorted(set(layers)) or (layers and layers[0] < 0):
            raise ValueError(f"blocks to prune after are {layers}: name each once, in their order, from 0")
        for s in self.specs:
            where = f"after block {s.layer}"
            if not 0 < s.rate <= 1:
                raise ValueError(f"rate {where} is {s.rate}: it must be above 0 and at most 1")
            if s.keep is not None and s.keep < 1:
                raise ValueError(f"{s.keep} patches cannot be kept {where}: give 1 or more")
            if s.remove < 0:
                raise ValueError(f"{s.remove} tokens cannot be removed {where}: give 0 or more")
            if s.iters < 1:
                raise ValueError(f"{s.iters} votes {where} rank nothing: give 1 or more")
            if s.partition not in PARTITIONS or s.feature not in FEATURES:
                raise ValueError(
                    f"partition {s.partition!r} and feature {s.feature!r} {where}: partitions are "
                    f"{', '.join(PARTITIONS)}, features are {', '.join(FEATURES)}"
                )
            exponent(s.metric)

    def spec(self, layer: int) -> PruneSpec | None:
        """What happens after this block, if anything."""
        return next((s for s in self.specs if s.layer == layer), None)

    def reads_weights(self, layer: int) -> bool:
        return self.spec(layer) is not None

    def after(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        spec = self.spec(layer)
        if spec is None:
            return tokens
        n = tokens.x.shape[1] - seen.prefix
        if self.masked:  # the number that are left is that of the specs before
            for s in self.specs[: self.specs.index(spec)]:
                n = s.numbers(n)[1]
        remove, keep = spec.numbers(n)
        key = None if tokens.key is None else jax.random.fold_in(tokens.key, layer)
        left = tokens
        if remove:
            left = left._replace(alive=without_duplicates(left, seen, spec, remove, key))
        if keep < n - remove or spec.threshold is not None:
            left = left._replace(alive=most_important(left, seen, spec, keep))
        if left.alive is None or self.masked:
            return left
        length = seen.prefix + keep
        if tokens.alive is not None or spec.threshold is not None:  # images may have fewer than there are places
            return pack(tokens, left.alive, length)
        return take(tokens, places_of(left.alive, length))

    def overhead(self, layer: int, tokens: int, prefix: int, heads: int, head: int) -> int:
        spec = self.spec(layer)
        if spec is None:
            return 0
        n = tokens - prefix
        remove, keep = spec.numbers(n)
        width = head * (1 if spec.head_reduce == "mean" else heads)
        alike = heads * tokens**2 + (n // 2) * (n - n // 2) * width if remove else 0
        votes = spec.iters * heads * (tokens - remove) ** 2 if keep < n - remove else 0
        return alike + votes


def _after(layers: tuple[int, ...], removes: tuple[int, ...], rates: tuple[float, ...], **more: Any) -> ZeroTPrune:
    """Specs of these blocks; further settings are one for all, or a tuple with one each."""
    specs = []
    for i, (layer, remove, rate) in enumerate(zip(layers, removes, rates, strict=True)):
        own = {k: v[i] if k == "iters" and isinstance(v, tuple) else v for k, v in more.items()}
        specs.append(PruneSpec(layer, remove, rate=rate, **own))
    return ZeroTPrune(tuple(specs))


def _prototype(layers: tuple[int, ...], rates: tuple[float, ...]) -> ZeroTPrune:
    # importance alone, one vote, every token alike at first, attention sharpened before it votes
    return _after(layers, (0,) * len(layers), rates, iters=1, boost=False, temperature=0.5)


_LAYERS = (0, 2, 5, 8)
_PAPER = {"iters": (30, 5, 5, 1, 1), "vhf": PAPER_VARIANCES}
PRESETS: dict[str, tuple[str, ZeroTPrune]] = {
    "proto-T": ("tiny", _prototype((2, 5, 8), (0.9, 0.8, 0.7))),
    "proto-S": ("small", _prototype((2, 5, 8), (0.9, 0.8, 0.7))),
    "proto-B": ("base", _prototype((2, 5, 8), (0.9, 0.8, 0.7))),
    "proto-T6": ("tiny", _prototype((2, 5, 8, 9, 10, 11), (0.8, 0.8, 0.7, 0.7, 0.7, 0.7))),
    "proto-S-hard": ("small", _prototype((0, 3, 6, 9), (0.6, 0.42, 0.5, 0.5))),
    "table-3.08": ("small", _after((*_LAYERS, 10), (10, 10, 10, 10, 0), (1.0, 0.9, 0.8, 0.7, 1.0), **_PAPER)),
    "a-like": ("small", _after(_LAYERS, (8,) * 4, (1.0, 0.83, 0.78, 0.73), **_PAPER)),
    "b-like": ("small", _after(_LAYERS, (16,) * 4, (1.0, 0.81, 0.71, 0.61), **_PAPER)),
    "c-like": ("small", _after(_LAYERS, (5,) * 4, (1.0, 0.99, 0.94, 0.89), **_PAPER)),
}


def preset(name: str) -> ZeroTPrune:
    """A schedule for DeiT (12 blocks, 196 patches) by name; `jprune.methods.tokens.cost.preset_table` shows what each costs.

    "proto-*": importance alone, of the authors' earlier code; "table-3.08": of the paper's ablation; the paper's a, b and c were
    found by a search and are not public, "*-like" are schedules of the same cost.

    Raises:
      ValueError: another name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}: there are {', '.join(PRESETS)}")
    return PRESETS[name][1]
