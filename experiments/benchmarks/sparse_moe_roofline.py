"""What mixtures of experts could take on chips, counted from bytes and MACs: lower bounds, nothing is run.

    python -m experiments.benchmarks.sparse_moe_roofline

A bound is the longer of two times: that of the arithmetic at the chip's peak and that of the bytes at its bandwidth, for a kernel
that keeps between its steps what `pallas_kernels.sparse_moe` keeps; making its lists is not counted, and for the H100 there are
no such kernels yet. Speed-ups are of bounds: a dense layer that moves its weights, inputs and outputs once, over the sparse one.
What a kernel should reach of the speed-up, 70 %, is a prediction too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import RESULTS
from pallas_kernels.sparse_moe import arg_specs
from pallas_kernels.sparse_moe.arg_specs import MoESpec

REACHED = 0.7  # of a speed-up
ITEM = 2  # bytes of a number: bfloat16
TILES = {"v5e": 256, "v5p": 256, "v6e": 512, "H100": 128}  # tokens that share a fetch of weights


class Chip(NamedTuple):
    """Published peaks: bfloat16 MACs and bytes a second."""

    macs: float
    bandwidth: float


CHIPS = {
    "v5e": Chip(197e12 / 2, 820e9),
    "v5p": Chip(459e12 / 2, 2765e9),
    "v6e": Chip(918e12 / 2, 1640e9),
    "H100": Chip(989e12 / 2, 3350e9),
}


@dataclasses.dataclass(frozen=True)
class Use:
    """Which experts the tokens of a layer use: shares of all.

    Attributes:
      token: of one token. part: of 128 tokens in a row, who are computed together. tile: of those that share a weight's fetch.
      few: of the 32 tokens of a chunk that is verified.
    """

    token: float
    part: float
    tile: float
    few: float


# What training with BlockFFN's losses reaches in its paper, but for a tile's share, which is assumed; and six of 64, alone.
LAYERS = {
    arg_specs.BLOCKFFN_XLARGE: Use(0.2, 0.4, 0.5, 0.3),
    arg_specs.BLOCKFFN_2_8B: Use(0.125, 0.4, 0.5, 0.3),
    arg_specs.LARGE: Use(0.125, 0.4, 0.5, 0.3),
    arg_specs.DEEPSEEK_MOE: Use(6 / 64, 1.0, 1.0, 1 - (1 - 6 / 64) ** 32),
}


class Cost(NamedTuple):
    """MACs and bytes of one layer."""

    macs: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """The bound."""
        return max(self.macs / chip.macs, self.bytes / chip.bandwidth)


def one_product(s: MoESpec, tokens: float) -> float:
    """MACs of one product of all experts."""
    return tokens * s.experts * s.width * s.hidden


def rows(s: MoESpec, tokens: float) -> float:
    """Bytes of as many tokens."""
    return tokens * s.width * ITEM


def dense(s: MoESpec, tokens: int, gradients: bool = False) -> Cost:
    """All experts; with gradients twice as many products again, the weights read once more and their gradients written."""
    macs, moved = 2 * one_product(s, tokens), s.weights + 2 * rows(s, tokens)
    if gradients:
        macs, moved = 3 * macs, moved + 2 * s.weights + 3 * rows(s, tokens)
    return Cost(macs, moved)


def union(s: MoESpec, tokens: int, share: float) -> Cost:
    """A decoding step, which reads a share of the weights."""
    return Cost(share * 2 * one_product(s, tokens), share * s.weights + 2 * rows(s, tokens))


def tiles(s: MoESpec, tokens: int, use: Use, tile: int, gradients: bool = False) -> Cost:
    """`tile_moe`: weights pass by once a tile; the backward pass computes h and the hidden gradient twice, which makes seven."""
    one, passes = use.part * one_product(s, tokens), -(-tokens // tile) * use.tile
    scores = 4 * tokens * s.experts
    macs, moved = 2 * one, passes * s.weights + 2 * rows(s, tokens) + scores
    if gradients:  # to every expert come the tiles that use it, and the gradients of their outputs
        walks = use.tile * s.experts * 2 * rows(s, tokens)
        macs, moved = (
            macs + 7 * one,
            moved + passes * s.weights + 3 * rows(s, tokens) + 2 * scores + walks + 2 * s.weights,
        )
    return Cost(macs, moved)


def sorted_pairs(s: MoESpec, tokens: int, use: Use, gradients: bool = False) -> Cost:
    """`permuted_moe`: a pair's row is gathered, read, written and summed; hidden numbers wait in memory between products."""
    pairs = use.token * tokens * s.experts
    one, hidden = pairs * s.width * s.hidden, pairs * s.hidden
    macs, moved = 2 * one, 5 * rows(s, pairs) + 2 * hidden * ITEM + s.weights + 2 * rows(s, tokens)
    if (
        gradients
    ):  # h and the hidden gradient are float32; two rows are gathered, read twice each, one is written and summed
        macs, moved = (
            macs + 5 * one,
            moved + 10 * rows(s, pairs) + hidden * (16 + 5 * ITEM) + 3 * s.weights + 2 * rows(s, tokens),
        )
    return Cost(macs, moved)


def roofline(s: MoESpec, use: Use, chip: str) -> dict[str, dict[str, float]]:
    """{what: MACs, bytes, microseconds, the dense layer's, the speed-up, the one to reach} of a layer on a chip."""
    tile, t = TILES[chip], s.tokens
    costs = {
        "one token": (union(s, 1, use.token), dense(s, 1)),
        "32 tokens": (union(s, 32, use.few), dense(s, 32)),
        "tiles, forward": (tiles(s, t, use, tile), dense(s, t)),
        "tiles, with gradients": (tiles(s, t, use, tile, True), dense(s, t, True)),
        "sorted, forward": (sorted_pairs(s, t, use), dense(s, t)),
        "sorted, with gradients": (sorted_pairs(s, t, use, True), dense(s, t, True)),
    }
    out = {}
    for name, (ours, whole) in costs.items():
        seconds, theirs = ours.seconds(CHIPS[chip]), whole.seconds(CHIPS[chip])
        out[name] = {"macs": ours.macs, "bytes": ours.bytes, "microseconds": 1e6 * seconds, "dense_microseconds": 1e6 * theirs,
                     "speed_up": theirs / seconds, "to_reach": REACHED * theirs / seconds}  # fmt: skip
    return out


def table(name: str, chips: dict[str, dict[str, dict[str, float]]]) -> Table:
    """One layer: microseconds and speed-ups on all chips."""
    out = Table(title=f"{name}: least microseconds (times faster than dense; to reach)")
    for column in ("", "GMACs", *chips):
        out.add_column(column)
    for what, first in next(iter(chips.values())).items():
        own = (
            f"{r['microseconds']:,.1f} ({r['speed_up']:.2f}; {r['to_reach']:.2f})"
            for r in (c[what] for c in chips.values())
        )
        out.add_row(what, f"{first['macs'] / 1e9:.2f}", *own)
    return out


def main(out: Path = RESULTS / "sparse-moe-roofline.json") -> None:
    """Count, print and write it."""
    console = Console()
    found = {s.name: {chip: roofline(s, use, chip) for chip in CHIPS} for s, use in LAYERS.items()}
    for name, chips in found.items():
        Console(width=130 if not console.is_terminal else None).print(table(name, chips))
    record.write(out, {
        "command": "python -m experiments.benchmarks.sparse_moe_roofline", "measured": False,
        "note": "bounds of bytes and MACs at published peaks; speed-ups and the part of them to reach are predictions",
        "layers": {s.name: {**record.plain(s), "use": record.plain(use)} for s, use in LAYERS.items()}, "results": found,
    })  # fmt: skip
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
