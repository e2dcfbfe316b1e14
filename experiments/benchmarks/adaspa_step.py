"""What a denoising step of a video transformer takes under each of AdaSpa's actions, on this device.

    python -m experiments.benchmarks.adaspa_step                # 4096 tokens of video, 64 of text, two blocks

The whole model runs, MLPs and all: that is what a sample waits for. Weights are random and the patterns are those that the
searches find on them, which changes nothing in the time. From the steps follows a sample of fifty: ten dense ones of which
the tenth searches, one more search, sparse ones otherwise. The dense step is the same model with our dense attention and,
for comparison, with `jax.nn.dot_product_attention`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from jprune.methods.attention.adaspa import Action, attention_of, init_state, segments
from jprune.methods.attention.adaspa_select import AdaSpaConfig
from jprune.models.dit import DiTBlock, DiTConfig, VideoDiT

SPARSITIES = (0.8, 0.9)
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Setting:
    """A video transformer with heads of 64."""

    frames: int = 16
    side: int = 32
    words: int = 64
    heads: int = 4
    layers: int = 2
    block: int = 64

    @property
    def tokens(self) -> int:
        return self.frames * (self.side // 2) ** 2 + self.words


def library(layer: int, q: Any, k: Any, v: Any, valid: Any, state: Any) -> tuple[Any, Any]:
    """Dense attention as jax has it."""
    return jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2), state


def measure(s: Setting, rounds: int) -> dict[str, Any]:
    """Seconds of every action's step, in turns, and the sample they make."""
    width = 64 * s.heads
    blocks = (DiTBlock("single", s.heads, 64, 4 * width),) * s.layers
    model = VideoDiT(DiTConfig(width, (1, 2, 2), 4, width, blocks, (12, 10, 10)))
    keys = jax.random.split(jax.random.key(0), 3)
    video = jax.random.normal(keys[0], (1, s.frames, s.side, s.side, 4))
    text, time = jax.random.normal(keys[1], (1, s.words, width)), jnp.full(1, 0.5)
    params = model.init(keys[2], video, time, text)

    def step(hook: Any) -> Any:
        return jax.jit(lambda states: model.apply(params, video, time, text, None, hook, states))

    jobs: dict[str, Any] = {}
    for sparsity in SPARSITIES:
        config = AdaSpaConfig(sparsity, s.block, text_start=s.tokens - s.words, text_len=s.words, min_tokens=0)
        states = (init_state(1, s.heads, s.tokens, config),) * s.layers
        _, found = step(attention_of(Action.FUSED, config))(states)
        for action in Action:
            if action in (Action.DENSE, Action.FUSED) and sparsity != SPARSITIES[0]:
                continue  # the same work whatever is kept
            name = action.value if action in (Action.DENSE, Action.FUSED) else f"{action.value} {sparsity}"
            jobs[name] = jax.tree_util.Partial(step(attention_of(action, config)), found)
    jobs["jax.nn"] = jax.tree_util.Partial(step(library), (None,) * s.layers)
    times = in_turns(jobs, rounds, 1)
    seconds = medians(times)
    out: dict[str, Any] = {"seconds": seconds, "samples": {}, "rounds": times}
    for sparsity in SPARSITIES:
        config = AdaSpaConfig(sparsity, s.block)
        number = {a: sum(n - m for b, m, n in segments(STEPS, config) if b is a) for a in Action}
        names = {a: a.value if a in (Action.DENSE, Action.FUSED) else f"{a.value} {sparsity}" for a in Action}
        sample = sum(number[a] * seconds[names[a]] for a in Action)
        out["samples"][str(sparsity)] = {
            "seconds": sample,
            "speed_up": STEPS * seconds["dense"] / sample,
            "over_jax_nn": STEPS * seconds["jax.nn"] / sample,
            "sparse_step": ratio(times, "dense", f"sparse {sparsity}"),
            "search_share": (number[Action.FUSED] * max(0.0, seconds["fused"] - seconds["dense"])
                             + number[Action.RESEARCH] * (seconds[f"research {sparsity}"] - seconds[f"sparse {sparsity}"]))
            / sample,
        }  # fmt: skip
    return out


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What is demanded: the search is a small part, and a sample takes less time than a dense one."""
    return {
        "a sample is faster than a dense one": all(r["speed_up"] > 1 for r in results["samples"].values()),
        "searching takes under 5 % of a sample": all(r["search_share"] < 0.05 for r in results["samples"].values()),
    }


def table(results: dict[str, Any]) -> Table:
    """Steps and samples."""
    out = Table(title="one step of the model, and a sample of fifty")
    for column in ("sparsity", "dense, ms", "fused", "research", "sparse", "sparse step", "sample", "over jax.nn",
                   "searching"):  # fmt: skip
        out.add_column(column)
    ms = {name: f"{1e3 * t:.0f}" for name, t in results["seconds"].items()}
    for s, r in results["samples"].items():
        out.add_row(s, ms["dense"], ms["fused"], ms[f"research {s}"], ms[f"sparse {s}"], f"{r['sparse_step']:.2f}x",
                    f"{r['speed_up']:.2f}x", f"{r['over_jax_nn']:.2f}x", f"{r['search_share']:.1%}")  # fmt: skip
    return out


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="rounds that count")] = 9,
    out: Path = RESULTS / "adaspa-step.json",
) -> None:
    """Time a video transformer's step under each action."""
    results = measure(setting, rounds)
    record.write(out, {
        "command": f"python -m experiments.benchmarks.adaspa_step --rounds {rounds}",
        "machine": record.machine(),
        "setting": dataclasses.asdict(setting),
        "note": DISTURBED,
        "checks": checks(results),
        "results": results,
    })  # fmt: skip
    console = Console()
    Console(width=120 if not console.is_terminal else None).print(table(results))
    for what, holds in checks(results).items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
