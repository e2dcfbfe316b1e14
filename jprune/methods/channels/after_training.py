"""The usual way: score the trained network, allocate, compact, fine-tune; in one step or several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jprune import budget, importance
from jprune.data import steps_per_epoch
from jprune.graph import trace
from jprune.importance.reduce import Scores
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.contract import Amount, ClassifierTask, Method, Outcome, check_rebuilt, checked, widths
from jprune.models import rebuild
from jprune.report import plots
from jprune.training import evaluate, learning_rates
from jprune.training.forward import as_forward

CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

Score = Callable[[ClassifierTask], Scores]


@dataclasses.dataclass(frozen=True)
class AfterTrainingConfig:
    """How units are chosen by their scores, and what follows.

    Attributes:
      scope: which units compete: all, those of one layer, or those of layers that are used alike
      steps: prune in so many steps, fine-tuning after each
      schedule: the way there, over --steps
      multiple_of: kept widths are multiples of this (8 or 128 suit accelerators)
      min_units: units every group keeps
      finetune_epochs: after pruning, over all steps
      finetune_learning_rate: of these epochs
    """

    scope: Literal["global", "uniform", "isomorphic"] = "global"
    steps: int = 1
    schedule: Literal["one_shot", "linear", "cubic"] = "linear"
    multiple_of: int = 1
    min_units: int = 1
    finetune_epochs: int = 15
    finetune_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        checked(self, {
            "scope": (self.scope in ("global", "uniform", "isomorphic"), "global, uniform or isomorphic"),
            "schedule": (self.schedule in ("one_shot", "linear", "cubic"), "one_shot, linear or cubic"),
            "steps": (self.steps >= 1, "at least 1"),
            "multiple_of": (self.multiple_of >= 1, "at least 1"),
            "min_units": (self.min_units >= 1, "at least 1"),
            "finetune_epochs": (self.finetune_epochs >= 0, "at least 0"),
            "finetune_learning_rate": (self.finetune_learning_rate > 0, "above 0"),
        })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SlimmingConfig(AfterTrainingConfig):
    """The same, after one more training with a penalty.

    Attributes:
      strength: of the penalty on the scales; 0: what the schedule needs
    """

    strength: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self, {"strength": (self.strength >= 0, "at least 0")})


def method(name: str, about: str, score: Score, *, penalty: bool = False) -> Method:
    """A method of this kind.

    Args:
      name, about: as of `Method`.
      score: task -> scores of its network's units.
      penalty: train once more first, with a penalty on all scales (network slimming).
    """
    config = SlimmingConfig if penalty else AfterTrainingConfig

    def training(task: ClassifierTask, config: AfterTrainingConfig) -> int:
        epochs = config.finetune_epochs + (task.recipe.epochs if penalty else 0)
        return epochs * steps_per_epoch(task.data.train, task.recipe.batch_size)

    return Method(
        name, about, "classifiers", functools.partial(find, score=score, penalty=penalty), config,
        check=functools.partial(check, score=score), training=training)  # fmt: skip


def check(task: ClassifierTask, config: AfterTrainingConfig, *, score: Score) -> None:
    """Refuse a target that no keep set of the scored groups can meet."""
    scored = jax.eval_shape(lambda v: score(dataclasses.replace(task, variables=v)), task.variables)
    scores = {g: np.zeros(s.shape) for g, s in scored.items() if task.graph.groups[g].exact}
    _allocate(task, config, scores, target(task))


def find(task: ClassifierTask, config: AfterTrainingConfig, *, score: Score, penalty: bool = False) -> Outcome:
    """Prune the trained network and fine-tune what is left.

    Raises:
      ValueError: a target out of reach (with what is in reach).
    """
    keep_tables(task)
    with task.run.phase("score"):
        if penalty:
            assert isinstance(config, SlimmingConfig)
            task = dataclasses.replace(task, variables=_slim(task, config))
        scores = _exact(task, score)
        fractions, accuracy = _curve(task, config, scores)
    small, keep = _prune(task, config, scores, score)
    module = rebuild(task.model, small)
    check_rebuilt(task, keep, module, small)
    cost = task.graph.cost(keep)
    at = cost.macs / task.graph.cost().macs

    def curve(path: Path) -> None:
        tuned = evaluate(module, small, task.data).accuracy
        plots.curve(path, fractions, accuracy, {"after fine-tuning": (at, tuned)})

    return Outcome(
        module, small, cost, widths(keep), keep, task.graph,
        metadata={"config": dataclasses.asdict(module.config)},  # pyright: ignore[reportAttributeAccessIssue]
        notes={"curve": {"macs_fraction": fractions, "accuracy": accuracy}},
        figures=(
            ("Sparsity and accuracy", "curve", curve),
            ("Importance", "importance", lambda p: plots.histograms(p, scores, keep)),
        ),
    )  # fmt: skip


# -- scores that need more than the weights --------------------------------------------------------------------------


def taylor(task: ClassifierTask) -> Scores:
    """|weight x gradient| of the loss of the examples."""
    (batch,) = task.examples()
    grads = jax.jit(jax.grad(functools.partial(task.loss, task.model)))(task.variables, batch)
    return importance.taylor(task.graph, task.variables, grads)


def fisher(task: ClassifierTask) -> Scores:
    """weight^2 x mean squared gradient of single examples."""
    (batch,) = task.examples()

    def loss(variables: Any, sample: Any) -> jax.Array:
        return task.loss(task.model, variables, jax.tree.map(lambda x: x[None], sample))

    squares = jax.jit(lambda v, b: importance.mean_squared_gradients(loss, v, b))(task.variables, batch)
    return importance.fisher(task.graph, task.variables, squares)


# -- steps -----------------------------------------------------------------------------------------------------------


def _slim(task: ClassifierTask, config: SlimmingConfig) -> Any:
    """Weights after one more training with a penalty on all scales."""
    recipe = task.recipe
    rates = learning_rates(recipe, steps_per_epoch(task.data.train, recipe.batch_size))
    # on all scales at once a penalty that takes them surely to zero would take the network with them
    gentle = config.strength or ms.suggest_s(rates, recipe.momentum, safety=1.0)
    everywhere = ms.masked_penalty(ms.all_masked(task.graph, ms.listed_scales(task.graph)), gentle)
    return task.fit("global penalty", recipe, task.model, task.variables, everywhere)


def _exact(task: ClassifierTask, score: Score) -> dict[str, np.ndarray]:
    return {g: np.asarray(s) for g, s in score(task).items() if task.graph.groups[g].exact}


def _allocate(
    task: ClassifierTask, config: AfterTrainingConfig, scores: Any, wanted: budget.Target
) -> budget.Allocation:
    return budget.allocate(
        task.graph, scores, wanted, config.scope, min_keep=config.min_units, multiple_of=config.multiple_of
    )


def _curve(task: ClassifierTask, config: AfterTrainingConfig, scores: Any) -> tuple[list[float], list[float]]:
    """Accuracy at several fractions of the MACs, in one step, by masking: one compiled program."""
    fractions, accuracy = [1.0], [evaluate(task.model, task.variables, task.data).accuracy]
    for f in CURVE:
        try:
            found = budget.allocate(task.graph, scores, budget.Target.macs(f), config.scope, min_keep=config.min_units)
        except ValueError:  # out of reach of the scored groups
            break
        fractions.append(found.achieved / found.dense)
        accuracy.append(evaluate(task.model, task.graph.mask(task.variables, found.keep), task.data).accuracy)
    return fractions, accuracy


def _prune(
    task: ClassifierTask, config: AfterTrainingConfig, scores: Any, score: Score
) -> tuple[Any, dict[str, np.ndarray]]:
    """Compact and fine-tune, step by step; returns the small variables and the keep set of all steps together."""
    c, amount = config, task.wanted
    schedule = list(budget.Schedule("one_shot" if c.steps == 1 else c.schedule, c.steps, amount.keep))
    whole = {g: np.ones(task.graph.groups[g].size, bool) for g in scores}
    now, dense = task, target(task).cost(task.graph, {})
    for k in range(c.steps):
        if k:
            graph = trace(now.model.apply, now.variables, *task.example)
            now = dataclasses.replace(now, graph=graph)
            scores = _exact(now, score)
        wanted = target(now, schedule[k] * dense, f"latency {k + 1}") if k else target(now, keep=schedule[k])
        keep_tables(now)
        keep = _allocate(now, c, scores, wanted).keep
        small = now.graph.compact(now.variables, keep)
        for g, kept in keep.items():
            whole[g][np.flatnonzero(whole[g])] = kept
        model = rebuild(task.model, small)
        n = c.finetune_epochs // c.steps + (1 if k >= c.steps - c.finetune_epochs % c.steps else 0)
        if n:
            name = "fine-tune" if c.steps == 1 else f"fine-tune {k + 1}"
            small = task.fit(name, task.trained_for(n, c.finetune_learning_rate), model, small)
        now = dataclasses.replace(now, model=model, variables=small)
    return now.variables, whole


# -- targets ---------------------------------------------------------------------------------------------------------


def target(
    task: ClassifierTask, absolute: float | None = None, name: str = "latency", *, keep: float | None = None
) -> budget.Target:
    """What is asked of the task's graph: the task's share, `keep` of it, or an absolute amount of its quantity."""
    amount: Amount = task.wanted
    share = amount.keep if keep is None else keep
    if amount.quantity == "latency":
        table = latency_table(task, name)
        return budget.Target.latency(table, share if absolute is None else absolute, absolute is not None)
    return budget.Target(amount.quantity, share if absolute is None else int(absolute))


def latency_table(task: ClassifierTask, name: str = "latency") -> budget.LatencyTable:
    """Milliseconds of a batch of the recipe's size by widths, measured on this device once for a run."""
    if name in task.run.kept:
        return task.run.kept[name]
    images = jnp.zeros((task.recipe.batch_size, *task.data.image_shape), jnp.float32)
    evaluate_ = as_forward(task.model).evaluate
    graph = trace(evaluate_, task.variables, images)
    folder = task.run.folder(name)
    file = None if folder is None else folder / "table.json"
    if file is not None and file.is_file():
        table = budget.LatencyTable.load(file, graph)
    else:
        zeros = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), task.variables))
        table = budget.measure_latency(graph, evaluate_, (zeros, images), progress=not task.run.quiet)
    task.run.kept[name] = table
    return table


def keep_tables(task: ClassifierTask) -> None:
    """Write the tables that were measured, so that a run that is gone on with decides alike."""
    for name, table in task.run.kept.items():
        folder = task.run.folder(name)
        if folder is not None and isinstance(table, budget.LatencyTable) and not (folder / "table.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            table.save(folder / "table.json")
