"""PreCrop and PreConfig as methods: widths chosen at initialisation, then training as long as the baseline's."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import budget
from jprune.data import steps_per_epoch
from jprune.methods.channels.precrop.precrop import Scoring, WidthRule, precrop
from jprune.methods.contract import ClassifierTask, Method, Outcome, WidthConfig, checked
from jprune.models import rebuild

SAMPLES_PER_CLASS = 10  # training images that SNIP and GraSP look at
QUANTITIES = ("macs", "params")


@dataclasses.dataclass(frozen=True)
class Config(WidthConfig):
    """Settings.

    Attributes:
      min_units: units every group keeps
    """

    min_units: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self, {"min_units": (self.min_units >= 1, "at least 1")})


def check(task: ClassifierTask, config: Config, *, cap: float) -> None:
    """Refuse a target below what the widths that may change can reach."""
    precrop(task.model, task.variables, task.example[0], _target(task, cap), "uniform_width", rule=_rule(config, cap))


def training(task: ClassifierTask, config: Config) -> int:
    """The small network's."""
    return task.recipe.epochs * steps_per_epoch(task.data.train, task.recipe.batch_size)


def find(task: ClassifierTask, config: Config, *, criterion: Any, cap: float) -> Outcome:
    """Choose widths from the baseline's own initialisation, initialise afresh, train.

    Args:
      criterion: where the densities come from.
      cap: how many times wider a layer may become.
    """
    amount, graph = task.wanted, task.graph
    with task.run.phase("widths"):
        batches = _samples(task) if criterion in ("snip", "grasp") else ()
        scoring = Scoring() if amount.quantity == "params" else Scoring(keep=amount.keep)
        found = precrop(task.model, task.fresh, task.example[0], _target(task, cap), criterion, batches=batches,
                        key=jax.random.key(task.seed), rule=_rule(config, cap), scoring=scoring)  # fmt: skip
        module = rebuild(task.model, found.graph.resize(task.fresh, found.widths))
        images = jnp.zeros((2, *task.data.image_shape), jnp.float32)
        small = jax.jit(module.init)(jax.random.key(task.seed + 1), images)
    small = task.fit("from scratch", task.recipe, module, small)
    return Outcome(
        module, small, graph.cost(widths=found.widths),
        {g: (graph.groups[g].size, w) for g, w in found.widths.items()},
        metadata={"config": dataclasses.asdict(module.config)},  # pyright: ignore[reportAttributeAccessIssue]
        notes={"densities": {path: float(d) for path, d in found.densities.items()}},
    )  # fmt: skip


def _target(task: ClassifierTask, cap: float) -> list[budget.Target]:
    """The target; where layers may grow, the other quantity may not."""
    amount = task.wanted
    wanted = [budget.Target(amount.quantity, amount.keep)]
    if cap > 1:
        wanted.append(budget.Target(next(q for q in QUANTITIES if q != amount.quantity), 1.0))
    return wanted


def _rule(config: Config, cap: float) -> WidthRule:
    return WidthRule(cap=cap, min_width=config.min_units, round_to=config.multiple_of)


def _samples(task: ClassifierTask) -> list[tuple[jax.Array, jax.Array]]:
    """The first images of every class in the training split, as one batch."""
    train, rows = task.data.train, []
    left = dict.fromkeys(range(task.data.num_classes), SAMPLES_PER_CLASS)
    for at in np.array_split(np.arange(len(train)), max(1, len(train) // 1024)):
        for i, label in zip(at, train.read(at)["label"], strict=True):
            if left[int(label)]:
                left[int(label)] -= 1
                rows.append(int(i))
        if not any(left.values()):
            break
    batch = train.read(np.array(sorted(rows)))
    return [(jnp.asarray(batch["image"]), jnp.asarray(batch["label"]))]


def _method(name: str, about: str, criterion: str, cap: float = 1.0) -> Method:
    return Method(
        name, about, "classifiers", functools.partial(find, criterion=criterion, cap=cap), Config, QUANTITIES,
        check=functools.partial(check, cap=cap), training=training)  # fmt: skip


METHODS = (
    _method("precrop", "widths from SynFlow's densities at initialisation, trained from scratch (PreCrop)", "synflow"),
    _method("precrop-snip", "the same with SNIP's densities", "snip"),
    _method("precrop-grasp", "the same with GraSP's densities", "grasp"),
    _method("precrop-synexp", "the same with the densities that maximise SynFlow's expectation", "synexp"),
    _method("preconfig", "the same, and layers may also grow, up to four times (PreConfig)", "synexp", 4.0),
    _method("uniform-width", "one width factor for all layers, trained from scratch: the baseline", "uniform_width"),
)
