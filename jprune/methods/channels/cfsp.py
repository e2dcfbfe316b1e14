"""CFSP: FFN channels of a decoder pruned after one pass over calibration text (Wang et al., COLING 2025, 2409.13199).

    coarse      importance of a block = mean angle over pi by which it turns the residual stream        (section 3.1)
    budget      keep ratio of a block ~ sigmoid(a kappa (importance - mean importance)), mean 1 - p
    fine        score of a channel from its activation norm X_i = |z_i| and its weights                  (eq. 8)
    counts      keep ratio times width, rounded to multiples that the hardware likes
    select      in every block the channels with the largest scores
    recover     LoRA whose rank per block follows the coarse importance

One pass gives the statistics (jprune.language.statistics) for every sparsity, allocation and score below.

The score of the authors' code, `official`, sums three relative weights that are each normalised over the very axis it
then averages: |W|_ki / sum_k |W|_ki. All weights cancel, and what is left is (3 / d) X_i^c: the activation norm alone.
The equation of the paper (`eq8`) normalises the down projection across channels instead, and its terms for up and gate
cancel to 1. `relative3` is ours: all three matrices relative to the other channels. Published numbers may be of either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jprune.budget.rounding import channel_counts, proportional_ranks
from jprune.graph import Graph
from jprune.language.blocks import Block, blocks, layers
from jprune.language.statistics import METRICS, BlockStats, block_stats
from jprune.methods.channels.decoder_channels import FINE, channel_scores, removed, select

KAPPA = 131072 / 1e4  # the authors' sum over 128 x 1024 tokens divided by 1e4, as a mean over tokens
COARSE = (*METRICS, "uniform")


@dataclasses.dataclass(frozen=True)
class CFSPConfig:
    """How CFSP decides.

    Attributes:
      coarse: importance of a block: "angular", "cosine", "mse", "mae" or "uniform" (all alike). `a` suits the angle; the
        others need one of their own.
      a, kappa: steepness of the sigmoid, and its unit: importances are means over tokens.
      slack: how far below everything the widest block stays where the sigmoid asks for more; above 1.
      min_keep: least fraction a block keeps.
      fine: score of a channel, one of `FINE`.
      b, c: exponents of X inside and behind the relative weights of "official"; b changes nothing.
      multiple_of: counts are multiples of this (128 suits accelerators; times the devices of tensor parallelism); None
        or 1: any count.
      official_counts: without multiples, one channel more per block, as the authors' threshold keeps.
      exact_budget: move multiples between blocks until the total is as near to the budget as it can be.
      uniform_width: the same count in every block, whatever its importance, so that a scan stays a scan.
      seed: of "random".
    """

    coarse: str = "angular"
    a: float = 1.0
    kappa: float = KAPPA
    slack: float = 1.05
    min_keep: float | None = None
    fine: str = "official"
    b: float = 1.0
    c: float = 1.0
    multiple_of: int | None = 128
    official_counts: bool = False
    exact_budget: bool = False
    uniform_width: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for value, known, what in ((self.coarse, COARSE, "coarse"), (self.fine, FINE, "fine")):
            if value not in known:
                raise ValueError(f"{what} must be one of {known}, not {value!r}")
        if not (self.a > 0 and self.kappa > 0 and self.slack > 1 and self.c >= 0):
            raise ValueError(f"a and kappa must be above 0, slack above 1 and c at least 0; got {self}")


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What was decided, per layer in the order they run.

    Attributes:
      importance: of the blocks.
      keep_ratios: asked fractions of channels.
      counts: channels kept; widths: channels there were.
      drift: kept fraction of all channels minus the asked one.
      removed: fractions of "ffn_channels", "block_linear_weights" and "parameters" that go.
    """

    importance: tuple[float, ...]
    keep_ratios: tuple[float, ...]
    counts: tuple[int, ...]
    widths: tuple[int, ...]
    drift: float
    removed: dict[str, float]


# -- coarse: how much each block keeps ---------------------------------------------------------------------------------


def sigmoids(
    importance: Float[np.ndarray, " layers"], a: float = 1.0, kappa: float = KAPPA
) -> Float[np.ndarray, " layers"]:
    """1 / (1 + exp(-a kappa (importance - its mean))), importances being means over tokens.

    Raises:
      ValueError: NaN or infinite importance.
    """
    m = np.asarray(importance, np.float64)
    if not np.isfinite(m).all():
        raise ValueError(
            f"the importance of layer {int(np.argmin(np.isfinite(m)))} is not finite: look at the activations"
        )
    return np.exp(-np.logaddexp(0.0, -a * kappa * (m - m.mean())))


def allocate_keep_ratios(
    importance: Float[np.ndarray, " layers"],
    sparsity: float,
    *,
    a: float = 1.0,
    kappa: float = KAPPA,
    slack: float = 1.05,
    min_keep: float | None = None,
) -> Float[np.ndarray, " layers"]:
    """Fractions of channels that the blocks keep, their mean exactly 1 - sparsity (section 3.1; host-side).

    Where the sigmoids would ask a block for more than all of its channels they are shrunk towards their mean.

    Raises:
      ValueError: a sparsity outside [0, 1), or a floor above the mean.
    """
    _check_sparsity(sparsity)
    s = sigmoids(importance, a, kappa)
    mean, top = s.mean(), s.max()
    if top > mean and top / mean * (1 - sparsity) >= 1:
        s = mean + mean * (1 / (1 - sparsity) - 1) / (top - mean) / slack * (s - mean)
        mean = s.mean()
    keep = s / mean * (1 - sparsity)
    if min_keep is None:
        return keep
    if not 0 <= min_keep <= 1 - sparsity:
        raise ValueError(f"min_keep is {min_keep}, but all blocks together keep {1 - sparsity:.4g}: give at most that")
    above = np.maximum(keep - min_keep, 0.0)
    return min_keep + above * (1 - sparsity - min_keep) / (above.mean() or 1.0)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it is the fraction of FFN channels to remove, in [0, 1)")


# -- the whole ---------------------------------------------------------------------------------------------------------


def cfsp(
    graph: Graph, params: Any, batches: Iterable[Any], sparsity: float, options: CFSPConfig = CFSPConfig()
) -> tuple[dict[str, np.ndarray], PruneReport]:
    """Calibrate and decide: (keep set, report).

    Args:
      graph: of a decoder.
      params: its parameters.
      batches: of calibration text (see `block_stats`); 128 windows of 1024 tokens in the paper.
      sparsity: fraction of FFN channels to remove.
      options: see there.
    """
    found = blocks(graph)
    return cfsp_keep(graph, params, block_stats(graph, params, batches, found), sparsity, options, found)


def cfsp_keep(
    graph: Graph,
    params: Any,
    stats: BlockStats,
    sparsity: float,
    options: CFSPConfig = CFSPConfig(),
    found: Sequence[Block] | None = None,
) -> tuple[dict[str, np.ndarray], PruneReport]:
    """The decision from statistics that are at hand, so that one pass serves many sparsities and scores."""
    found = blocks(graph) if found is None else found
    o = options
    widths = [graph.groups[layer.block.ffn].size for layer in layers(found)]
    alike = o.coarse == "uniform"
    m = np.zeros(len(widths)) if alike else stats.change[o.coarse]
    even = np.zeros_like(m) if o.uniform_width else m
    ratios = allocate_keep_ratios(even, sparsity, a=o.a, kappa=o.kappa, slack=o.slack, min_keep=o.min_keep)
    counts = channel_counts(ratios, widths, multiple_of=o.multiple_of, official_counts=o.official_counts,
                            exact_budget=o.exact_budget and not o.uniform_width)  # fmt: skip
    scores = channel_scores(graph, params, stats, found, o.fine, b=o.b, c=o.c, key=jax.random.key(o.seed))
    keep = select(graph, scores, counts.tolist(), found)
    report = PruneReport(tuple(m.tolist()), tuple(ratios.tolist()), tuple(counts.tolist()), tuple(widths),
                         float(counts.sum() / sum(widths) - ratios @ widths / sum(widths)),
                         removed(graph, keep, found))  # fmt: skip
    return keep, report


# -- recovery ----------------------------------------------------------------------------------------------------------


def lora_ranks(
    importance: Float[np.ndarray, " layers"],
    r_avg: int = 8,
    *,
    direction: str = "important",
    r_min: int = 2,
    r_max: int = 32,
    a: float = 1.0,
    kappa: float = KAPPA,
) -> Int[np.ndarray, " layers"]:
    """LoRA ranks that follow the coarse importance, r_avg on average; with alpha = 2 r the scale is the same everywhere.

    The paper publishes neither the formula nor code; this one is ours. "important" blocks, which also keep more channels,
    get more rank; with "damaged" those that lose most do.

    Raises:
      ValueError: another direction, or limits that exclude the average.
    """
    if direction not in ("important", "damaged"):
        raise ValueError(f"direction is 'important' or 'damaged', not {direction!r}")
    s = sigmoids(importance, a, kappa)
    return proportional_ranks(s if direction == "important" else 1 / s, r_avg, r_min=r_min, r_max=r_max)
