"""What AdaSpa's schedule costs at HunyuanVideo's shape: arithmetic of a whole sample and lower bounds of its time.

python -m experiments.benchmarks.adaspa_roofline       # nothing is run: multiplies and adds are counted
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import RESULTS
from jprune.methods.attention.adaspa import Action, segments
from jprune.methods.attention.adaspa_select import AdaSpaConfig, keep_counts, spans
from pallas_kernels.common.attention_specs import HUNYUAN_VIDEO

CHIPS = {
    "H200": 989e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6e": 918e12,
}  # bfloat16, multiplies and adds a second


@dataclasses.dataclass(frozen=True)
class Hunyuan:
    """HunyuanVideo at 720p and 129 frames: 118,800 video tokens, 256 of text, 60 layers of 24 heads of 128."""

    tokens: int = HUNYUAN_VIDEO.tokens
    text: int = 256
    layers: int = 60
    heads: int = HUNYUAN_VIDEO.heads
    head: int = HUNYUAN_VIDEO.features
    steps: int = 50
    efficiency: float = 0.8


def roofline(s: Hunyuan, config: AdaSpaConfig) -> dict[str, Any]:
    """MACs of attention over a whole sample, dense and by schedule, and lower bounds of seconds per chip.

    Bounds are arithmetic alone at `efficiency` of the peak: a head's keys and values fit the fast memory of all four
    chips, or their shared cache, and are read once. A dense pass is two products, a search in the same pass adds none, a
    later search is one.
    """
    at = spans(s.tokens, config)
    width = keep_counts(at.video, config.sparsity).base + at.sinks
    kept = (at.video * width + at.sinks * at.blocks) / at.blocks**2
    one = 2 * s.tokens**2 * s.head * s.heads * s.layers  # a product of all tokens with all, multiply and add apart
    cost = {Action.DENSE: 2.0, Action.FUSED: 2.0, Action.SPARSE: 2 * kept, Action.RESEARCH: 1 + 2 * kept}
    number = {a.value: sum(n - m for b, m, n in segments(s.steps, config) if b is a) for a in Action}
    products = sum(cost[a] * number[a.value] for a in Action)
    out: dict[str, Any] = {"kept": kept, "steps": number, "dense_flops": 2.0 * one * s.steps, "flops": one * products,
                           "speed_up_of_attention": 2.0 * s.steps / products, "chips": {}}  # fmt: skip
    for chip, peak in CHIPS.items():
        second = s.efficiency * peak
        out["chips"][chip] = {"dense_seconds": 2.0 * one * s.steps / second, "seconds": one * products / second}
    return out


def main(out: Path = RESULTS / "adaspa-hunyuan.json") -> None:
    """Count, print and write it."""
    console, shape = Console(), Hunyuan()
    found = {
        f"{s:g}": roofline(shape, AdaSpaConfig(s, text_start=shape.tokens - shape.text, text_len=shape.text))
        for s in (0.7, 0.8, 0.9)
    }
    view = Table(title="attention of one HunyuanVideo sample, lower bounds: nothing of this was run")
    for column in ("sparsity", "kept", "PFLOP", "speed-up", *CHIPS):
        view.add_column(column)
    for s, r in found.items():
        view.add_row(s, f"{r['kept']:.3f}", f"{r['flops'] / 1e15:.0f} of {r['dense_flops'] / 1e15:.0f}",
                     f"{r['speed_up_of_attention']:.2f}",
                     *(f"{c['seconds']:,.0f} of {c['dense_seconds']:,.0f} s" for c in r["chips"].values()))  # fmt: skip
    Console(width=130 if not console.is_terminal else None).print(view)
    record.write(out, {"command": "python -m experiments.benchmarks.adaspa_roofline", "measured": False,
                       "shape": dataclasses.asdict(shape), "results": found})  # fmt: skip
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
