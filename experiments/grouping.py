"""What dependency groups are worth: a residual network pruned by scores of whole groups, of one layer, and at random.

    python -m experiments.grouping                  # digits, ten seeds, about ten minutes on two cores

A channel of a residual stream is written by several convolutions and read by several others. A score that looks at all
of them ("group L2") knows more than one that looks at the first producer only ("first-member L1"). The trained network
loses 30 % of its multiply-accumulates in small steps, scored anew before each, and is tested right after: nothing is
trained again, so the accuracies compare the choice of channels alone. They differ by tens of points from one network to
the next, hence the many seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jprune
from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from jprune.budget import Target, ranked
from jprune.data import Dataset, load_digits
from jprune.importance import first_member, magnitude, random
from jprune.models import rebuild, resnet
from jprune.training import TrainConfig, evaluate, train

BLOCKS, WIDTHS = (1, 1, 1), (16, 32, 64)  # per stage
RECIPE = TrainConfig(epochs=15, batch_size=64, learning_rate=0.05, weight_decay=5e-4, eval_every_epochs=0)
STEP = 0.01  # of the dense multiply-accumulates, between two scorings
SHOWN = (0.9, 0.8, 0.7)  # fractions left at which the network is tested; the last one is what the checks are about
TIMED = 0.5

Criterion = Callable[[jprune.Graph, Any, jax.Array], dict[str, Any]]
CRITERIA: dict[str, Criterion] = {
    "group L2": lambda graph, variables, key: magnitude(graph, variables, 2, reduce="mean", normalise="mean"),
    "first-member L1": lambda graph, variables, key: first_member(graph, variables, 1, normalise="mean"),
    "first-member L1, not normalised": lambda graph, variables, key: first_member(graph, variables, 1),
    "random": lambda graph, variables, key: random(graph, key),
}


def pruned(
    model: Any, variables: Any, criterion: Criterion, seed: int, until: tuple[float, ...], step: float
) -> Iterator[tuple[float, Any, Any]]:
    """(fraction of the dense multiply-accumulates left, module, variables) each time one of `until` is reached.

    Before every step the scores are those of the network as it is then.
    """
    dense = None
    left = 1.0
    steps = 0
    for stop in until:
        while left > stop:
            x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
            graph = jprune.trace(model.apply, variables, x)
            dense = graph.cost().macs if dense is None else dense
            limit = max(left - step, stop)
            scores = criterion(graph, variables, jax.random.fold_in(jax.random.key(seed), steps))
            keep = ranked(graph, scores, Target.macs(int(limit * dense))).keep
            variables = graph.compact(variables, keep)
            model = rebuild(model, variables)
            left = graph.cost(keep).macs / dense
            steps += 1
        yield left, model, variables


def wall_clock(model: Any, variables: Any, step: float, rounds: int, batch: int = 256) -> dict[str, float]:
    """Time of the network with half its multiply-accumulates, chosen by group L2, beside that of the dense one."""
    left, small, weights = next(pruned(model, variables, CRITERIA["group L2"], 0, (TIMED,), step))
    x = jnp.ones((batch, 8, 8, 1), jnp.float32)
    dense_run, small_run = jax.jit(model.apply), jax.jit(small.apply)
    times = in_turns({"dense": lambda: dense_run(variables, x), "small": lambda: small_run(weights, x)}, rounds, 10)
    seconds = medians(times)
    return {
        "macs_fraction": left,
        "batch": batch,
        "dense_ms": 1e3 * seconds["dense"],
        "small_ms": 1e3 * seconds["small"],
        "time_fraction": ratio(times, "small", "dense"),
    }


def one_seed(dataset: Dataset, seed: int, recipe: TrainConfig, step: float, rounds: int, progress: Progress) -> Any:
    """Accuracies of the dense network and of every criterion at every fraction, and the wall clock."""
    model = resnet.small(BLOCKS, widths=WIDTHS)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((2, *dataset.image_shape), jnp.float32))
    recipe = dataclasses.replace(recipe, seed=seed)
    variables, _ = train(model, variables, dataset, recipe, progress=progress, title=f"seed {seed} dense")
    rows: dict[str, Any] = {}
    for name, criterion in CRITERIA.items():
        rows[name] = {}
        path = pruned(model, variables, criterion, seed, SHOWN, step)
        for stop, (left, small, weights) in zip(SHOWN, path, strict=True):
            rows[name][f"{stop:g}"] = {
                "accuracy": evaluate(small, weights, dataset).accuracy,
                "macs_fraction": left,
            }
    return {
        "dense": evaluate(model, variables, dataset).accuracy,
        "pruned": rows,
        "wall_clock": wall_clock(model, variables, step, rounds),
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the seeds."""
    spread = record.mean_and_spread
    return {
        "dense": spread([s["dense"] for s in seeds]),
        "pruned": {
            name: {
                at: {k: spread([s["pruned"][name][at][k] for s in seeds]) for k in numbers}
                for at, numbers in row.items()
            }
            for name, row in seeds[0]["pruned"].items()
        },
        "wall_clock": {k: spread([s["wall_clock"][k] for s in seeds]) for k in seeds[0]["wall_clock"]},
    }


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What the means over the seeds have to show."""
    last = f"{SHOWN[-1]:g}"
    accuracy = {name: row[last]["accuracy"]["mean"] for name, row in results["pruned"].items()}
    return {
        "group L2 is 8 points above random": accuracy["group L2"] >= accuracy["random"] + 0.08,
        **{
            f"group L2 is 10 points above {name}": accuracy["group L2"] >= accuracy[name] + 0.10
            for name in accuracy
            if name.startswith("first-member")
        },
        "half the MACs take at most 0.9 of the time": results["wall_clock"]["time_fraction"]["mean"] <= 0.9,
    }


def table(results: dict[str, Any]) -> Table:
    """Means and deviations as a table."""
    out = Table(title=f"test accuracy without fine-tuning; dense {results['dense']['mean']:.3f}")
    out.add_column("scores")
    for stop in SHOWN:
        out.add_column(f"{stop:.0%} of the MACs")
    for name, row in results["pruned"].items():
        out.add_row(name, *(f"{r['accuracy']['mean']:.3f} ± {r['accuracy']['std']:.3f}" for r in row.values()))
    return out


def main(
    seeds: tuple[int, ...] = tuple(range(10)),
    out: Path = RESULTS / "grouping.json",
    epochs: int = RECIPE.epochs,
    step: Annotated[float, tyro.conf.arg(help="fraction of the dense MACs removed between two scorings")] = STEP,
    rounds: Annotated[int, tyro.conf.arg(help="rounds of the wall clock")] = 50,
) -> None:
    """Prune a digits ResNet by group L2, by first-member L1 and at random, and test it without fine-tuning."""
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("seeds", total=len(seeds))
        for seed in seeds:
            per_seed.append(one_seed(load_digits(seed), seed, recipe, step, rounds, progress))
            progress.update(whole, advance=1)
    results = summary(per_seed)
    verdict = checks(results)
    record.write(out, {
        "command": f"python -m experiments.grouping --seeds {' '.join(map(str, seeds))} --epochs {epochs} "
                   f"--step {step:g} --rounds {rounds}",
        "machine": record.machine(),
        "note": DISTURBED,
        "setting": {"widths": WIDTHS, "blocks": BLOCKS, "recipe": json.loads(json.dumps(dataclasses.asdict(recipe)))},
        "checks": verdict,
        "results": results,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    })  # fmt: skip
    console.print(table(results))
    clock = results["wall_clock"]
    console.print(f"at {clock['macs_fraction']['mean']:.1%} of the MACs, batch {clock['batch']['mean']:.0f}: "
                  f"{clock['time_fraction']['mean']:.2f} of the dense time")  # fmt: skip
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
