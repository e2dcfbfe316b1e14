"""Bytes a second of a trained BlockFFN decoder: all experts or the union of those in use, with and without speculation.

    python -m experiments.benchmarks.expert_decoding

A decoder with experts is trained on Python's standard library byte by byte, then continues held-back prompts: one byte a
pass or a chunk of guesses a pass, guessed by n-grams or by a trained layer (EAGLE). All programs take turns. Their answers are
compared with those of the first: another program rounds otherwise, and where the two likeliest bytes are nearly equal
the answers part.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from experiments.expert_decoder import Decoders, Setting, kinds
from experiments.study import Run
from jprune.methods.experts.eagle import Eagle, EagleHead, train_eagle
from jprune.methods.experts.speculative import ngram, speculate
from jprune.models.llama import Llama
from jprune.models.moe.blockffn import all_experts, union_experts

LARGER = Setting(stream=256, heads=8, experts=64, width=32, prompts=4, answer=128)
PROGRAMS = {  # name: (how experts are computed, bytes of a pass, drafter)
    "dense": (all_experts, 1, None), "union": (union_experts, 1, None), "dense, n-grams": (all_experts, 8, "n-grams"),
    "union, n-grams": (union_experts, 8, "n-grams"), "dense, trained drafter": (all_experts, 8, "trained"),
    "union, trained drafter": (union_experts, 8, "trained"),
}  # fmt: skip


def measure(s: Setting, drafter_steps: int, rounds: int, seed: int) -> dict[str, Any]:
    """Trains the model and the drafter, then times every program on every prompt."""
    with Progress() as bars:
        found = Decoders(s, Run(seed, None, bars))
        module, v = found.trained("BlockFFN", *kinds(s)["BlockFFN"])
        rows = found.batches[..., : s.tokens]
        head = EagleHead(module.config, 2 * s.stream)
        drafter = train_eagle(
            module, v, lambda k: rows[k % s.steps], drafter_steps, optax.chain(optax.clip(0.5), optax.adamw(1e-3)),
            width=head.width, seed=seed, progress=bars,
        ).state.params  # fmt: skip
    prompts = found.held[:: max(1, len(found.held) // s.prompts)][: s.prompts, :64]
    said: dict[str, list[Any]] = {name: [] for name in PROGRAMS}
    jobs = {}
    for name, (experts_fn, chunk, how) in PROGRAMS.items():
        own = Llama(module.config, experts_fn=experts_fn)
        guess: Any = {"n-grams": ngram, "trained": Eagle(own, v, head, drafter, 64 + s.answer, 8)}.get(how or "")
        run = functools.partial(speculate, own, v, drafter=guess, chunk=chunk)

        def job(run: Any = run, name: str = name) -> None:
            said[name] = [run(p[None], s.answer) for p in prompts]

        jobs[name] = job
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what does not pay: it is measured here
        times = in_turns(jobs, rounds, 1)
    seconds, first = medians(times), said["dense"]
    return {
        "loss": found.loss(module, v),
        "programs": {
            name: {
                "bytes_per_second": len(prompts) * s.answer / seconds[name],
                "over_dense": ratio(times, "dense", name),
                "bytes_per_pass": float(np.mean([a.per_pass for a in answers])),
                "experts_of_a_pass": float(np.mean([np.mean(a.used) for a in answers])),
                "predicted": float(np.mean([a.predicted for a in answers])),
                "equal_prompts": sum(bool((a.tokens == b.tokens).all()) for a, b in zip(answers, first, strict=True)),
            }
            for name, answers in said.items()
        },
        "rounds": times,
    }


def table(results: dict[str, Any], prompts: int) -> Table:
    """One line a program."""
    out = Table(title="decoding by one byte or by chunks of 8")
    for column in ("program", "bytes a second", "over dense", "bytes a pass", "experts of a pass", "equal answers"):
        out.add_column(column)
    for name, r in results["programs"].items():
        out.add_row(name, f"{r['bytes_per_second']:.0f}", f"{r['over_dense']:.2f}", f"{r['bytes_per_pass']:.2f}",
                    f"{r['experts_of_a_pass']:.2f}", f"{r['equal_prompts']} of {prompts}")  # fmt: skip
    return out


def main(
    setting: Setting = LARGER,
    drafter_steps: Annotated[int, tyro.conf.arg(help="of training the drafter")] = 200,
    rounds: Annotated[int, tyro.conf.arg(help="rounds that count")] = 5,
    seed: int = 0,
    out: Path = RESULTS / "expert-decoding.json",
) -> None:
    """Train a decoder with experts and time its decoding."""
    results = measure(setting, drafter_steps, rounds, seed)
    record.write(out, {
        "command": "python -m experiments.benchmarks.expert_decoding",
        "machine": record.machine(),
        "setting": dataclasses.asdict(setting) | {"drafter_steps": drafter_steps, "seed": seed},
        "note": DISTURBED,
        "results": results,
    })  # fmt: skip
    console = Console()
    Console(width=120 if not console.is_terminal else None).print(table(results, setting.prompts))
    console.print(f"{jax.devices()[0].device_kind}; written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
