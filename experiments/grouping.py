"""What dependency groups are worth: a residual network pruned by scores of whole groups, of one layer, and at random.

    python -m experiments.grouping                  # digits, ten seeds, about ten minutes on two cores

A channel of a residual stream is written by several convolutions and read by several others. A score that looks at all
of them ("group L2") knows more than one that looks at the first producer only ("first-member L1"). The trained network
loses 30 % of its MACs in small steps, scored anew before each, and is tested right after: nothing is
trained again, so the accuracies compare the choice of channels alone. They differ by tens of points from one network to
the next, hence the many seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jprune
from experiments.benchmarks import DISTURBED, in_turns, medians, ratio
from experiments.classifier import Classifier
from experiments.figures import spread, table
from experiments.study import Demand, Key, Run, Study, at_least, at_most
from jprune.budget import Target, ranked
from jprune.data import load_digits
from jprune.importance import first_member, magnitude, random
from jprune.models import rebuild, resnet
from jprune.training import TrainConfig, evaluate

Criterion = Callable[[jprune.Graph, Any, jax.Array], dict[str, Any]]
CRITERIA: dict[str, Criterion] = {
    "group L2": lambda graph, variables, key: magnitude(graph, variables, 2, reduce="mean", normalise="mean"),
    "first-member L1": lambda graph, variables, key: first_member(graph, variables, 1, normalise="mean"),
    "first-member L1, not normalised": lambda graph, variables, key: first_member(graph, variables, 1),
    "random": lambda graph, variables, key: random(graph, key),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Network, training and budgets.

    Attributes:
      blocks, widths: of every stage.
      recipe: of the dense network.
      step: fraction of the dense MACs removed between two scorings.
      shown: fractions of the MACs left at which the network is tested; demands are about the last.
      timed: fraction left of the network whose time is taken; rounds: of the clock; batch: images at a time.
    """

    blocks: tuple[int, ...] = (1, 1, 1)
    widths: tuple[int, ...] = (16, 32, 64)
    recipe: TrainConfig = TrainConfig(
        epochs=15, batch_size=64, learning_rate=0.05, weight_decay=5e-4, eval_every_epochs=0
    )
    step: float = 0.01
    shown: tuple[float, ...] = (0.9, 0.8, 0.7)
    timed: float = 0.5
    rounds: int = 50
    batch: int = 256


class Trained:
    """The dense network of one seed."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.seed = s, run.seed
        self.net = Classifier(resnet.small(s.blocks, widths=s.widths), load_digits(run.seed), run)
        self.variables = self.net.fit("dense", s.recipe, self.net.variables)

    def pruned(self, criterion: Criterion, stops: tuple[float, ...], seed: int) -> Iterator[tuple[float, Any, Any]]:
        """(fraction of the dense MACs left, module, variables) each time one of `stops` is reached."""
        module, variables, left, steps = self.net.model, self.variables, 1.0, 0
        x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
        dense = jprune.trace(module.apply, variables, x).cost().macs
        for stop in stops:
            while left > stop:
                graph = jprune.trace(module.apply, variables, x)
                limit = max(left - self.s.step, stop)
                scores = criterion(graph, variables, jax.random.fold_in(jax.random.key(seed), steps))
                keep = ranked(graph, scores, Target.macs(int(limit * dense))).keep
                variables = graph.compact(variables, keep)
                module = rebuild(module, variables)
                left = graph.cost(keep).macs / dense
                steps += 1
            yield left, module, variables

    def row(self, name: str) -> dict[str, Any]:
        """Accuracy at every budget."""
        path = self.pruned(CRITERIA[name], self.s.shown, self.seed)
        return {
            f"{stop:g}": {"accuracy": evaluate(small, weights, self.net.data).accuracy, "macs_fraction": left}
            for stop, (left, small, weights) in zip(self.s.shown, path, strict=True)
        }

    def wall_clock(self) -> dict[str, float]:
        """Time of the network with half its MACs, chosen by group L2, beside that of the dense one."""
        left, small, weights = next(self.pruned(CRITERIA["group L2"], (self.s.timed,), 0))
        x = jnp.ones((self.s.batch, 8, 8, 1), jnp.float32)
        dense_run, small_run = jax.jit(self.net.model.apply), jax.jit(small.apply)
        jobs = {"dense": lambda: dense_run(self.variables, x), "small": lambda: small_run(weights, x)}
        times = in_turns(jobs, self.s.rounds, 10)
        ms = {f"{name}_ms": 1e3 * seconds for name, seconds in medians(times).items()}
        return {"macs_fraction": left, "batch": self.s.batch, **ms, "time_fraction": ratio(times, "small", "dense")}


def rows(s: Setting) -> dict[Key, Callable[[Trained], Any]]:
    """The dense network, every criterion, the clock."""
    criteria = {("pruned", name): functools.partial(lambda one, name: one.row(name), name=name) for name in CRITERIA}
    return {("dense",): lambda one: one.net.accuracy(one.variables), **criteria, ("wall_clock",): Trained.wall_clock}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds, at the smallest budget."""
    results = stored["results"]
    left = {name: list(row.values())[-1]["accuracy"]["mean"] for name, row in results["pruned"].items()}
    ours, firsts = left["group L2"], [name for name in left if name.startswith("first-member")]
    return {
        "group L2 is 8 points above random": at_least(ours, left["random"] + 0.08),
        **{f"group L2 is 10 points above {name}": at_least(ours, left[name] + 0.10) for name in firsts},
        "half the MACs take at most 0.9 of the time": at_most(results["wall_clock"]["time_fraction"]["mean"], 0.9),
    }


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Accuracies, and the clock."""
    r = stored["results"]
    shown, clock = next(iter(r["pruned"].values())), {k: x["mean"] for k, x in r["wall_clock"].items()}
    title = f"test accuracy without fine-tuning; dense {r['dense']['mean']:.3f}"
    lines = [[name, *(spread(x["accuracy"]) for x in row.values())] for name, row in r["pruned"].items()]
    said = (f"at {clock['macs_fraction']:.1%} of the MACs, batch {clock['batch']:.0f}: "
            f"{clock['time_fraction']:.2f} of the dense time")  # fmt: skip
    return [table(title, ["scores", *(f"{float(f):.0%} of the MACs" for f in shown)], lines), said]


STUDY = Study(
    "grouping", __doc__, {"digits": Setting()}, Trained, rows, demands, tables,
    once={"note": lambda s: DISTURBED}, seeds=tuple(range(10)),
)  # fmt: skip

if __name__ == "__main__":
    STUDY.main()
