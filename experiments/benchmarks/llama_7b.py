"""A decoder of Llama-2-7B's shape, traced and pruned to half its parameters without a single weight in memory.

    python -m experiments.benchmarks.llama_7b

`jprune.models.llama` with 32 layers, as a Python loop over trees of their own and as one scan over stacked leaves.
Everything from the first line of tracing to the shapes of the pruned tree is timed: trace, allocate (random scores, equal
fractions of all groups), plan, compact (of shapes). Peak memory shows that no weight was made.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import jprune
from experiments import record
from experiments.benchmarks import RESULTS
from jprune.budget import Target, uniform
from jprune.models.llama import Llama, llama_config

SECONDS, MEGABYTES = 20.0, 1024  # the checks: time of one layout, growth of the peak; the weights are 13 GB


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int = 32
    embed: int = 4096
    heads: int = 32
    hidden: int = 11008
    vocab: int = 32000
    tokens: int = 128


def decoder(s: Shape, scanned: bool) -> Llama:
    """The model of that shape, in bfloat16; the layers as trees of their own, or stacked on a leading axis."""
    return Llama(llama_config(s.vocab, s.embed, s.hidden, s.layers, s.heads, eps=1e-5, dtype="bfloat16"), scanned)


def peak_megabytes() -> float:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(shape: Shape, scanned: bool, keep_params: float = 0.5) -> dict[str, Any]:
    """Seconds of every part, what was found, and what the pruned tree has."""
    before = peak_megabytes()
    model = decoder(shape, scanned)
    tokens = jax.ShapeDtypeStruct((2, shape.tokens), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    clock = [time.perf_counter()]
    graph = jprune.trace(model.apply, params, tokens)
    clock.append(time.perf_counter())
    rng = np.random.default_rng(0)
    scores = {g: rng.random(info.shape) for g, info in graph.groups.items() if info.exact}
    chosen = uniform(graph, scores, Target.params(keep_params))
    clock.append(time.perf_counter())
    plan = graph.plan(chosen.keep)
    clock.append(time.perf_counter())
    small = graph.compact(params, chosen.keep)  # its check of the shapes replays the whole function
    clock.append(time.perf_counter())
    made = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(small))
    if made != chosen.achieved or plan.apply(params) != small:
        raise AssertionError(f"compact made {made} parameters, the allocation counted {chosen.achieved}")
    return {
        "params": graph.cost().params,
        "params_fraction": made / graph.cost().params,
        "groups": len(graph.groups),
        "units": sum(int(np.prod(i.shape)) for i in graph.groups.values()),
        "seconds": dict(zip(("trace", "allocate", "plan", "compact"), np.diff(clock).tolist(), strict=True)),
        "total_seconds": clock[-1] - clock[0],
        "peak_growth_megabytes": peak_megabytes() - before,
    }


def main(out: Path = RESULTS / "llama-7b.json", layers: int = 32) -> None:
    """Time a spec of half the parameters for both layouts of the layers."""
    shape = Shape(layers=layers)
    results = {name: measure(shape, name == "scanned") for name in ("unrolled", "scanned")}
    verdict = {
        f"{name}: {what}": bool(holds)
        for name, r in results.items()
        for what, holds in (
            (f"below {SECONDS:.0f} s", r["total_seconds"] < SECONDS),
            ("no weights in memory", r["peak_growth_megabytes"] < MEGABYTES),
        )
    }
    record.write(out, {
        "command": f"python -m experiments.benchmarks.llama_7b --layers {layers}",
        "machine": record.machine(),
        "setting": dataclasses.asdict(shape),
        "checks": verdict,
        "results": results,
    })  # fmt: skip
    console = Console()
    for name, r in results.items():
        parts = ", ".join(f"{k} {v:.2f}" for k, v in r["seconds"].items())
        console.print(f"{name}: {r['total_seconds']:.2f} s ({parts}); {r['groups']} groups, {r['units']:,} units; "
                      f"{r['params']:,} parameters, {r['params_fraction']:.2%} left; "
                      f"peak memory +{r['peak_growth_megabytes']:.0f} MB")  # fmt: skip
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
