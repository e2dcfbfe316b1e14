"""The contract of every method that removes something: what it is called with, and what it gives back.

    outcome = method.find(task, config)

`task` is all that a method may see: a traced model, its weights, data to look at, and a way to train. `outcome` is a
smaller model. Whoever asks (the command line, an experiment, your own code) measures, writes and reports it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jprune.data import Dataset, steps_per_epoch
from jprune.graph import Graph
from jprune.models import rebuild
from jprune.tracing.cost import Cost
from jprune.training import TrainConfig, train
from jprune.training.decisions import Decided
from jprune.training.run_folder import RunFolder

UNITS = "units"  # the quantity of a target that counts the channels and heads themselves


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is to go: a share of one quantity.

    Attributes:
      keep: share that stays, in (0, 1]. sparsity: share that goes; one follows from the other, and both are exact.
      quantity: "macs", "params", "bytes", "latency" (all of the whole model) or "units" (of those the method removes).
    """

    keep: float
    sparsity: float
    quantity: str

    @staticmethod
    def of(quantity: str, *, keep: float | None = None, sparsity: float | None = None) -> Amount:
        """From either share.

            >>> Amount.of("macs", sparsity=0.3)
            Amount(keep=0.7, sparsity=0.3, quantity='macs')

        Raises:
          ValueError: both or neither is given, or a share is out of range.
        """
        if (keep is None) == (sparsity is None):
            raise ValueError("give either --sparsity, the share to remove, or --keep, the share to keep")
        given = sparsity if keep is None else keep
        other = math.nan if given is None or isinstance(given, bool) else round(1.0 - given, 12)
        if sparsity is not None:
            if not (0 <= sparsity < 1 and other > 0):
                raise ValueError(f"sparsity is {sparsity}: the share to remove is at least 0 and below 1")
            return Amount(other, float(sparsity), quantity)
        assert keep is not None
        if not (0 < keep <= 1 and other < 1):
            raise ValueError(f"keep is {keep}: the share to keep is above 0 and up to 1")
        return Amount(float(keep), other, quantity)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a method may see.

    Attributes:
      model: whatever `jprune.training.as_forward` takes.
      graph: of the model, traced with `example`.
      variables: its trained weights; only their shapes while a method checks what it is asked for.
      example: inputs of the model as shapes: two rows, so that the number of rows stays free.
      amount: how much is to go; None where the method finds that itself.
      inputs: batches of inputs to look at, anew with every call: what `graph.calibrate` takes.
      examples: batches that `loss` takes, anew with every call.
      loss: (model, variables, batch) -> the mean loss of a batch; of any model, as a method may have made a smaller one.
      run: shows and times phases, and has folders for what is to be gone on with.
      seed: of everything that is drawn.
    """

    model: Any
    graph: Graph
    variables: Any
    example: tuple[Any, ...]
    amount: Amount | None
    inputs: Callable[[], Iterable[Any]]
    examples: Callable[[], Iterable[Any]]
    loss: Callable[[Any, Any, Any], jax.Array]
    run: RunFolder = dataclasses.field(default_factory=RunFolder)
    seed: int = 0

    @property
    def wanted(self) -> Amount:
        """The amount, for methods that need one."""
        if self.amount is None:
            raise ValueError("this method needs to know how much is to go: give an amount")
        return self.amount


@dataclasses.dataclass(frozen=True)
class ClassifierTask(Task):
    """A classifier: what methods that train, or start from scratch, see besides.

    Attributes:
      fresh: the initialisation from which `variables` were trained.
      data: to train and test on.
      recipe: how the given model was trained.
    """

    fresh: Any = None
    data: Dataset = None  # pyright: ignore[reportAssignmentType]
    recipe: TrainConfig = TrainConfig()

    def trained_for(self, epochs: int, learning_rate: float | None = None) -> TrainConfig:
        """The recipe with other epochs and, if given, another learning rate."""
        rate = self.recipe.learning_rate if learning_rate is None else learning_rate
        return dataclasses.replace(self.recipe, epochs=epochs, learning_rate=rate)

    def fit(self, name: str, recipe: TrainConfig, model: Any, variables: Any, transform: Any = None) -> Any:
        """Train in a phase of its own, which is gone on with if it was interrupted; returns the variables."""
        steps = recipe.epochs * steps_per_epoch(self.data.train, recipe.batch_size)
        folder = self.run.folder(name)
        with self.run.counted(name, steps) as on_step:
            trained, _ = train(
                model, variables, self.data, recipe, transform=transform, out=folder, resume=folder is not None,
                progress=False if self.run.quiet else self.run.bars, title=name, on_step=on_step)  # fmt: skip
        return trained


@dataclasses.dataclass(frozen=True)
class DecoderTask(Task):
    """A language model: what methods that prune while they train see besides.

    Attributes:
      batch_of_step: step -> token ids to train on, always the same for a step.
      steps: of training that may be taken.
      learning_rate, rank: of low-rank training.
      save_every: steps between checkpoints.
    """

    batch_of_step: Callable[[int], Any] = lambda step: None
    steps: int = 0
    learning_rate: float = 1e-4
    rank: int = 8
    save_every: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A smaller model.

    Attributes:
      model: whatever `jprune.training.as_forward` takes. variables: its own.
      cost: what the method predicts it to cost for the task's example inputs; whoever asked counts it again.
      widths: {group: (units before, units after)}.
      keep: what stays of the groups of `graph`, where the model was cut out of the given one.
      graph: that `keep` belongs to.
      ranks: of low-rank training of what is left, one per layer; None: alike.
      metadata: what is needed to make the model again.
      notes: entries of summary.json.
      figures: (caption, file name without ending, draw(path)).
      warnings: what a user would not expect.
      masks: {leaf path: True where a weight stays}, where single weights went and all widths stay.
      units: {layer: which of its units stay, by number}, where neither groups of a graph were cut nor single weights went.
    """

    model: Any
    variables: Any
    cost: Cost
    widths: Mapping[str, tuple[int, int]]
    keep: Mapping[str, np.ndarray] | None = None
    graph: Graph | None = None
    ranks: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: tuple[tuple[str, str, Callable[[Path], None]], ...] = ()
    warnings: tuple[str, ...] = ()
    masks: Mapping[str, Any] | None = None
    units: Mapping[str, list[int]] | None = None


@dataclasses.dataclass(frozen=True)
class NoConfig:
    """The settings of a method that has none."""


@dataclasses.dataclass(frozen=True)
class WidthConfig:
    """The setting of methods that choose widths.

    Attributes:
      multiple_of: kept widths are multiples of this (8 or 128 suit accelerators)
    """

    multiple_of: int = 1

    def __post_init__(self) -> None:
        checked(self, {"multiple_of": (self.multiple_of >= 1, "at least 1")})


def checked(config: Any, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first setting that breaks its rule: {name: (holds, what it must be)}."""
    for name, (holds, allowed) in rules.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(config, name)!r}: it must be {allowed}")


def _nothing(task: Any, config: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Method:
    """One name, one implementation.

    Attributes:
      name: as it is asked for.
      about: one line.
      models: the kind of model that it is for, "classifiers" or "decoders".
      find: (task, config) -> `Outcome`.
      config: the frozen dataclass of its settings, which all have defaults.
      quantities: what an amount may count, the usual one first; none: it finds itself how much goes.
      optional: an amount need not be given.
      check: (task, config) -> None; refuses what cannot be done before anything long begins. `task.variables` are shapes.
      training: (task, config) -> steps of training that `find` will take.
      trains: it prunes while it trains; nothing is left to recover afterwards.
      even: it keeps equally much in every layer.
      removes: "channels" (and heads: it changes widths), "weights" (single ones) or "experts" (whole ones).
    """

    name: str
    about: str
    models: str
    find: Callable[[Any, Any], Outcome]
    config: type = NoConfig
    quantities: tuple[str, ...] = ("macs", "params", "bytes", "latency")
    optional: bool = False
    check: Callable[[Any, Any], None] = _nothing
    training: Callable[[Any, Any], int] = lambda task, config: 0
    trains: bool = False
    even: bool = False
    removes: Literal["channels", "weights", "experts"] = "channels"

    def amount(self, quantity: str | None, keep: float | None, sparsity: float | None, usual: float) -> Amount | None:
        """How much is to go, from what a user gave; `usual` is the share to remove where nothing was given.

        Raises:
          ValueError: a quantity that this method does not count, or what `Amount.of` refuses.
        """
        given = keep is not None or sparsity is not None
        if quantity is not None and quantity not in self.quantities:
            counted = " or ".join(self.quantities) or "nothing: it finds itself how much goes; leave --quantity out"
            raise ValueError(f"quantity is {quantity!r}: method {self.name!r} counts {counted}")
        if not given and self.optional:
            if quantity is not None:
                raise ValueError(f"quantity is {quantity!r}, and no share of it: give --sparsity or --keep too")
            return None
        if given and not self.quantities:
            raise ValueError(f"method {self.name!r} finds itself how much goes: leave --sparsity and --keep out")
        if not given:
            return Amount.of(quantity or self.quantities[0], sparsity=usual)
        return Amount.of(quantity or self.quantities[0], keep=keep, sparsity=sparsity)


def cut(task: Task, decided: Decided, **more: Any) -> Outcome:
    """The outcome of a decision: the task's weights compacted, in a module of these widths.

    Args:
      task: whose graph the decision belongs to.
      decided: which units stay.
      **more: further fields of the outcome.
    """
    keep = {g: np.asarray(k) for g, k in decided.keep.items()}
    small = task.graph.compact(task.variables, keep)
    return Outcome(
        rebuild(task.model, small), small, task.graph.cost(keep), widths(keep), keep, task.graph, decided.ranks,
        notes=decided.notes, warnings=decided.warnings, **more)  # fmt: skip


def check_least(task: Task, least: float, unit: int) -> None:
    """Raise ValueError for an amount of units above what can go.

    Args:
      task: whose amount it is.
      least: share of the units that has to stay.
      unit: what widths are multiples of.
    """
    if task.wanted.sparsity > 1 - least + 1e-9:
        raise ValueError(
            f"sparsity is {task.wanted.sparsity}, but every layer keeps a unit or a multiple of {unit} at least: with "
            f"these widths sparsity can be at most {1 - least:.3g}"
        )


def widths(keep: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """{group: (units before, units after)} of a keep set."""
    return {g: (int(k.size), int(k.sum())) for g, k in keep.items()}


def check_rebuilt(task: ClassifierTask, keep: Any, module: Any, small: Any) -> None:
    """The rebuilt module has to be the replayed function, on real images; raises ValueError if it is not."""
    images = task.data.test.read(np.arange(min(32, len(task.data.test))))["image"]
    replayed = task.graph.replay(keep)
    one, other = map(np.asarray, jax.jit(lambda v, x: (module.apply(v, x), replayed(v, x)))(small, images))
    error = float(np.abs(one - other).max() / np.abs(other).max())
    if not error <= 1e-3:
        raise ValueError(
            f"the rebuilt {type(module).__name__} differs from the replayed function by {error:.1e} of its scale"
        )
