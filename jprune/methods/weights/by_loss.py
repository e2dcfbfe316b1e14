"""Methods for single weights that look at the loss of every sample: iCBS and the second-order ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jprune.budget.weights import choose
from jprune.graph import trace
from jprune.importance.at_init import weight_magnitude
from jprune.importance.weight_inputs import input_sums, squares
from jprune.methods.contract import ClassifierTask, DecoderTask, Outcome, Task, checked
from jprune.methods.weights import one_shot
from jprune.methods.weights.icbs.run import icbs
from jprune.methods.weights.icbs.steps import ICBSConfig, initial, orders_of
from jprune.methods.weights.second_order.stages import ALGORITHMS, second_order
from jprune.methods.weights.settings_and_outcome import WeightConfig, finished, leaves_of, sparsity_of
from jprune.models.llama import Llama
from jprune.models.llama_trees import is_scanned, stack_layers, unstack_layers
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import NM, Unstructured, apply
from jprune.surgery.patterns import pattern as pattern_of


@dataclasses.dataclass(frozen=True)
class BlockConfig(WeightConfig, ICBSConfig):
    """Settings of iCBS.

    Attributes:
      start: the mask that is improved, magnitude or wanda
    """

    start: str = "magnitude"

    def __post_init__(self) -> None:
        WeightConfig.__post_init__(self)
        ICBSConfig.__post_init__(self)
        checked(self, {
            "start": (self.start in ("magnitude", "wanda"), "magnitude or wanda"),
            "pattern": (isinstance(pattern_of(self.pattern), Unstructured), "unstructured, row, matrix, leaf or model: its "
                        "blocks move zeros freely, and would break N:M groups"),
        })  # fmt: skip


def sample_losses(task: Task) -> Callable[[Any, Any], Any]:
    """(variables, batch) -> the loss of every sample: the task's mean loss of batches of one."""

    def one(variables: Any, sample: Any) -> Any:
        return task.loss(task.model, variables, jax.tree.map(lambda x: x[None], sample))

    return jax.vmap(one, in_axes=(None, 0))


def batch_of(task: Task, step: int, samples: int) -> Any:
    """What a step looks at, always the same for a step."""
    if isinstance(task, DecoderTask):
        return task.batch_of_step(step)
    assert isinstance(task, ClassifierTask)
    train = task.data.train
    chosen = np.random.default_rng((task.seed, step)).choice(len(train), min(samples, len(train)), replace=False)
    batch = train.read(np.sort(chosen))
    return jnp.asarray(batch["image"]), jnp.asarray(batch["label"])


def of_stacked(task: Task, config: WeightConfig, find: Callable[[Task], one_shot.Pruned]) -> one_shot.Pruned:
    """What `find` makes of a decoder with equal layers stacked, layer by layer again: a program then serves a kind of
    matrix, not one matrix. Of other models, and where single leaves are named, `find` of the task as it is."""
    if (
        not isinstance(task, DecoderTask)
        or config.leaves
        or not task.model.config.uniform
        or is_scanned(task.variables)
    ):
        return find(task)
    model, variables = Llama(task.model.config, scanned=True), stack_layers(task.variables)
    graph = trace(model.apply, variables, *task.example)
    found = find(dataclasses.replace(task, model=model, variables=variables, graph=graph))
    loose = {}
    for p, m in found.masks.items():
        front, _, inner = p.partition("layers/")
        loose |= {f"{front}layer{i}/{inner}": m[i] for i in range(task.model.config.depth)}
    return one_shot.Pruned(unstack_layers(found.params), loose, found.notes)


# -- iCBS --------------------------------------------------------------------------------------------------------------


def icbs_of(task: Task, config: BlockConfig) -> Outcome:
    """A mask of the wanted density, then improved step by step."""
    return finished(task, config, of_stacked(task, config, functools.partial(_improved, config=config)))


def _improved(task: Task, config: BlockConfig) -> one_shot.Pruned:
    leaves = leaves_of(task, config.leaves)
    matrices = weight_matrices(task.graph, leaves)
    asked = one_shot.own_pattern(config.pattern, "matrix" if config.start == "magnitude" else "row")

    def by_wanda(variables: Any, inputs: Any) -> dict[str, Any]:
        x2 = input_sums(task.graph, variables, inputs, matrices, squares)
        return one_shot.wanda_scores(task.variables, matrices, x2)  # weights that are pruned now would score 0

    def now(variables: Any, batch: Any) -> dict[str, Any]:
        return by_wanda(variables, [batch[0] if isinstance(task, ClassifierTask) else batch])

    scores = (
        by_wanda(task.variables, task.inputs()) if config.start == "wanda" else weight_magnitude(task.variables, leaves)
    )
    masks = choose(scores, asked, sparsity_of(task, config), matrices)
    orders = orders_of(task.variables, leaves, matrices)
    rows = {p: matrices[p].shape[0] for p in leaves} if asked == Unstructured("row") else None
    own = ICBSConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ICBSConfig)})
    start = initial(scores, masks, own, orders, rows)
    folder = task.run.folder("icbs")
    with task.run.counted("icbs", own.steps) as on_step:
        trained = icbs(
            sample_losses(task), task.variables, start, lambda k: batch_of(task, k, own.samples), own, orders,
            importance=now if own.selection == "wanda" else None, seed=task.seed, out=folder, resume=folder is not None,
            save_every=max(1, own.steps // 10), progress=False if task.run.quiet else task.run.bars, on_step=on_step)  # fmt: skip
    found: Any = trained.state
    flipped = sum(int(jnp.sum(found.masks[p] != masks[p])) for p in leaves)
    return one_shot.Pruned(apply(task.variables, found.masks), dict(found.masks), {"changed_sides": flipped})


# -- by a quadratic model of the loss ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FisherConfig(WeightConfig):
    """Settings of the second-order methods; what else they have are settings of their functions.

    Attributes:
      samples: examples whose gradients make the Fisher matrix; their gradients of a leaf are held at once
      stages: gradients are taken anew after each; in between the sparsity grows along a cubic
      first_sparsity: of the first of several stages
      damp: added to the diagonal of the Fisher matrix (CHITA: its l2); else the method's own
      fisher_block: neighbouring weights that share a block of the Fisher matrix; else the method's own
    """

    samples: int = 200
    stages: int = 1
    first_sparsity: float = 0.3
    damp: float | None = None
    fisher_block: int | None = None

    groups: ClassVar[bool] = False  # whether the method follows N:M patterns

    def __post_init__(self) -> None:
        super().__post_init__()
        takes = "unstructured or leaf or model" + (" or N:M" if self.groups else "")
        asked = pattern_of(self.pattern)
        fits = asked in (Unstructured("leaf"), Unstructured("model")) or (self.groups and isinstance(asked, NM))
        checked(self, {
            "samples": (self.samples >= 1, "at least 1"), "stages": (self.stages >= 1, "at least 1"),
            "first_sparsity": (0 <= self.first_sparsity < 1, "in [0, 1)"),
            "pattern": (fits, f"{takes}, which this method can follow"),
        })  # fmt: skip

    def own(self, name: str) -> Any:
        """The settings that the named method's function takes."""
        settings = ALGORITHMS[name][1]
        damp = {} if self.damp is None else {"l2" if name == "chita" else "damp": self.damp}
        return settings(**damp, **({} if self.fisher_block is None else {"block": self.fisher_block}))


@dataclasses.dataclass(frozen=True)
class FisherTaylorConfig(FisherConfig):
    """Settings of WoodFisher.

    Attributes:
      taylor: use the mean gradient too (WoodTaylor)
    """

    taylor: bool = False

    def own(self, name: str) -> Any:
        """The settings that WoodFisher's function takes."""
        return dataclasses.replace(super().own(name), taylor=self.taylor)


@dataclasses.dataclass(frozen=True)
class FisherGroupsConfig(FisherConfig):
    """Settings of CAP, which follows N:M patterns too."""

    groups: ClassVar[bool] = True

    def own(self, name: str) -> Any:
        """The settings that CAP's function takes."""
        asked = pattern_of(self.pattern)
        return dataclasses.replace(super().own(name), pattern=asked if isinstance(asked, NM) else None)


def second_order_of(task: Task, config: FisherConfig, *, name: str) -> Outcome:
    """By the named method; of a language model, and with the pattern "leaf", every leaf by itself."""
    return finished(task, config, of_stacked(task, config, functools.partial(_by_fisher, config=config, name=name)))


def _by_fisher(task: Task, config: FisherConfig, *, name: str) -> one_shot.Pruned:
    leaves = leaves_of(task, config.leaves)
    own = config.own(name)
    asked = one_shot.own_pattern(config.pattern, "leaf" if isinstance(task, DecoderTask) else "model")
    per_leaf = asked != Unstructured("model")
    with task.run.counted(name, config.stages, parts=()) as on_step:
        found = second_order(name)(
            sample_losses(task), task.variables, leaves, samples_of(task, config.samples), sparsity_of(task, config), own,
            per_leaf=per_leaf, stages=config.stages, first=config.first_sparsity,
            views=weight_matrices(task.graph, leaves), on_step=on_step)  # fmt: skip
    usual = own.l2 if name == "chita" else own.damp
    raised = {p: d for p, d in found.damp.items() if d > 1.5 * usual * (config.samples if name == "chita" else 1)}
    return one_shot.Pruned(found.variables, found.masks, {"raised_damping": raised} if raised else {})


def samples_of(task: Task, samples: int) -> Any:
    """So many examples to take gradients of, always the same."""
    if not isinstance(task, DecoderTask):
        return batch_of(task, 0, samples)
    found, step = [], 0
    while sum(map(len, found)) < samples:
        found.append(jnp.asarray(task.batch_of_step(step)))
        step += 1
    return jnp.concatenate(found)[:samples]
