"""All methods that remove single weights, of classifiers and of language models, in the order in which they are listed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.budget.weights import choose
from jprune.graph import trace
from jprune.importance.at_init import weight_leaves, weight_magnitude
from jprune.importance.weight_inputs import input_sums, squares
from jprune.methods.contract import ClassifierTask, DecoderTask, Method, Outcome, Task, checked
from jprune.methods.weights import one_shot
from jprune.methods.weights.icbs.icbs import ICBSConfig, initial, orders_of
from jprune.methods.weights.icbs.run import icbs
from jprune.methods.weights.refit import refit
from jprune.methods.weights.sparsegpt import SparseGPTConfig
from jprune.models.llama import Llama
from jprune.models.llama_blocks import pieces
from jprune.models.llama_trees import is_scanned, stack_layers, unstack_layers
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import NM, Unstructured, apply, density, sparse_cost
from jprune.surgery.patterns import pattern as pattern_of
from jprune.tracing.errors import suggest

QUANTITY = "weights"  # what an amount counts: the weights that a method may remove
USUAL = 0.5  # share of them that goes where nothing is asked for


@dataclasses.dataclass(frozen=True)
class WeightConfig:
    """Settings of all methods for single weights.

    Attributes:
      pattern: which zeros are allowed: unstructured (what the method usually compares), row, matrix, leaf, model, 2:4, block:4x4
      leaves: globs of the weights to prune, with commas; else all kernels and matrices but for the last one
      refit_kept: refit the kept weights to the dense layers' outputs afterwards
    """

    pattern: str = "unstructured"
    leaves: str = ""
    refit_kept: bool = False

    def __post_init__(self) -> None:
        pattern_of(self.pattern)  # which says what is wrong with it


@dataclasses.dataclass(frozen=True)
class GPTConfig(WeightConfig, SparseGPTConfig):
    """Settings of SparseGPT.

    Attributes:
      damping: share of the Hessian's mean diagonal that is added to it
      block_size: columns whose mask is chosen at once
    """

    def __post_init__(self) -> None:
        WeightConfig.__post_init__(self)
        SparseGPTConfig.__post_init__(self)


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


def leaves_of(task: Task, globs: str) -> tuple[str, ...]:
    """Paths of the weights that these globs name, in program order.

    Raises:
      ValueError: a glob that fits none.
    """
    if not globs:
        return one_shot.prunable(task.graph)
    every = weight_leaves(task.graph)
    asked = [g.strip() for g in globs.split(",")]
    for g in asked:
        if not any(fnmatchcase(p, g) for p in every):
            raise ValueError(f"--leaves {g!r} fits none of the weights{suggest(g, every)}")
    return tuple(p for p in every if any(fnmatchcase(p, g) for g in asked))


def sparsity_of(task: Task, config: WeightConfig) -> float | None:
    """The share to remove; None for N:M where it says that itself.

    Raises:
      ValueError: an N:M pattern that removes another share than was asked for.
    """
    asked = pattern_of(config.pattern)
    if isinstance(asked, NM):
        if task.amount is not None and not math.isclose(task.amount.keep, asked.keep / asked.of, abs_tol=1e-9):
            raise ValueError(f"{asked} removes {1 - asked.keep / asked.of:g} of the weights, not "
                             f"{task.amount.sparsity:g}: leave --sparsity out")  # fmt: skip
        return None
    return USUAL if task.amount is None else task.amount.sparsity


def check(task: Task, config: WeightConfig, *, matrices: bool) -> None:
    """Refuse unknown leaves, a pattern that does not fit them, and weights that have no matrix of their own."""
    leaves = leaves_of(task, config.leaves)
    if not leaves:
        raise ValueError("the model has no kernel or matrix besides the last one: name what to prune with --leaves")
    sparsity_of(task, config)
    asked = pattern_of(config.pattern)
    views = weight_matrices(task.graph, leaves) if matrices or asked != Unstructured() else None
    if isinstance(asked, NM):
        shapes = {p: jax.ShapeDtypeStruct(task.graph.leaves[p].shape, jnp.float32) for p in leaves}
        jax.eval_shape(lambda s: choose(s, asked, None, views), shapes)
    if config.refit_kept:
        weight_matrices(task.graph, leaves)


def outcome(task: Task, params: Any, masks: Mapping[str, Any], notes: Mapping[str, Any], pattern: str) -> Outcome:
    """What a method gives back: the same model, its weights with zeros."""
    found, cost = density(masks), sparse_cost(task.graph, masks)
    said = {
        "weights": {
            "pattern": pattern, "kept": sum(found.kept.values()), "of": sum(found.size.values()), "density": found.total,
            "macs_of_kept": cost.macs, "params_kept": cost.params, "leaves": {p: [found.kept[p], found.size[p]] for p in masks},
        },
        **notes,
    }  # fmt: skip
    return Outcome(task.model, params, task.graph.cost(), {}, masks=dict(masks), notes=said)


def finished(task: Task, config: WeightConfig, found: one_shot.Pruned) -> Outcome:
    """The outcome, after refitting if that is asked for."""
    params = found.params
    if config.refit_kept:
        traced = [s.shape for s in jax.tree.leaves(task.graph.example_inputs)]
        batches = [b if isinstance(b, tuple) else (b,) for b in task.inputs()]
        graph = task.graph
        if batches and [np.shape(x) for x in jax.tree.leaves(batches[0])] != traced:
            graph = trace(task.model.apply, task.variables, *batches[0])
            batches = [b for b in batches if jax.tree.map(np.shape, b) == jax.tree.map(np.shape, batches[0])]
        params = refit(graph, task.variables, found.masks, batches)
    return outcome(task, params, found.masks, found.notes, config.pattern)


# -- in one shot -------------------------------------------------------------------------------------------------------


def _at_once(task: Task, config: WeightConfig, *, prune: one_shot.Prune) -> Outcome:
    """Of the whole function, on its dense inputs."""
    found = prune(task.graph, task.variables, task.inputs(), leaves_of(task, config.leaves), sparsity_of(task, config),
                  config.pattern)  # fmt: skip
    return finished(task, config, found)


def _in_turn(task: Task, config: WeightConfig, *, prune: one_shot.Prune) -> Outcome:
    """Of one leaf after the other, on what the pruned ones pass on; at once where all weights are compared."""
    if pattern_of(config.pattern) == Unstructured("model"):
        return _at_once(task, config, prune=prune)
    found = one_shot.in_turn(prune, task.graph, task.variables, task.inputs(), leaves_of(task, config.leaves),
                             sparsity_of(task, config), config.pattern)  # fmt: skip
    return finished(task, config, found)


def _layers(task: DecoderTask, config: WeightConfig, *, prune: one_shot.Prune) -> Outcome:
    """Of a decoder layer by layer, on what the pruned layers pass on; at once where only some leaves are asked for."""
    if config.leaves or is_scanned(task.variables):
        return _at_once(task, config, prune=prune)
    found = one_shot.layer_by_layer(prune, pieces(task.model.config, task.variables), task.inputs(),
                                    sparsity_of(task, config), config.pattern)  # fmt: skip
    wrapped = "params" in task.variables
    inner = dict(task.variables["params"] if wrapped else task.variables)
    masks, notes = {}, {}
    for i, layer in enumerate(found):
        inner[f"layer{i}"] = layer.params
        masks |= {f"{'params/' if wrapped else ''}layer{i}/{p}": m for p, m in layer.masks.items()}
        notes |= {f"layer{i}": layer.notes} if layer.notes else {}
    params = {**task.variables, "params": inner} if wrapped else inner
    return finished(task, config, one_shot.Pruned(params, masks, {"layers": notes} if notes else {}))


def _gpt(*args: Any, config: GPTConfig) -> one_shot.Pruned:
    return one_shot.sparsegpt(*args, config=SparseGPTConfig(config.damping, config.block_size))


def _sparsegpt(task: Task, config: GPTConfig) -> Outcome:
    prune = functools.partial(_gpt, config=config)
    return (_layers if isinstance(task, DecoderTask) else _in_turn)(task, config, prune=prune)  # pyright: ignore[reportArgumentType]


def _wanda(task: Task, config: WeightConfig) -> Outcome:
    return (_layers if isinstance(task, DecoderTask) else _in_turn)(task, config, prune=one_shot.wanda)  # pyright: ignore[reportArgumentType]


def _random(task: Task, config: WeightConfig) -> Outcome:
    return _at_once(task, config, prune=functools.partial(one_shot.random, seed=task.seed))


# -- iCBS --------------------------------------------------------------------------------------------------------------


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


def _icbs(task: Task, config: BlockConfig) -> Outcome:
    """A mask of the wanted density, then improved step by step."""
    params, masks, notes = _improved(task, config)
    return finished(task, config, one_shot.Pruned(params, masks, notes))


def _icbs_of_decoder(task: DecoderTask, config: BlockConfig) -> Outcome:
    """The same with equal layers stacked: a program then serves a kind of matrix, not one matrix."""
    if config.leaves or not task.model.config.uniform or is_scanned(task.variables):
        return _icbs(task, config)
    model, variables = Llama(task.model.config, scanned=True), stack_layers(task.variables)
    graph = trace(model.apply, variables, *task.example)
    params, masks, notes = _improved(dataclasses.replace(task, model=model, variables=variables, graph=graph), config)
    loose = {}
    for p, m in masks.items():
        front, _, inner = p.partition("layers/")
        loose |= {f"{front}layer{i}/{inner}": m[i] for i in range(task.model.config.depth)}
    return finished(task, config, one_shot.Pruned(unstack_layers(params), loose, notes))


def _improved(task: Task, config: BlockConfig) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(parameters, masks, what is said)"""
    leaves = leaves_of(task, config.leaves)
    matrices = weight_matrices(task.graph, leaves)
    asked = one_shot.own_pattern(config.pattern, "matrix" if config.start == "magnitude" else "row")
    if config.start == "wanda":
        x2 = input_sums(task.graph, task.variables, task.inputs(), matrices, squares)
        scores = one_shot.wanda_scores(task.variables, matrices, x2)
    else:
        scores = weight_magnitude(task.variables, leaves)
    masks = choose(scores, asked, sparsity_of(task, config), matrices)
    orders = orders_of(task.variables, leaves, matrices)
    rows = {p: matrices[p].shape[0] for p in leaves} if asked == Unstructured("row") else None
    own = ICBSConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ICBSConfig)})
    start = initial(scores, masks, own, orders, rows)
    folder = task.run.folder("icbs")
    with task.run.counted("icbs", own.steps) as on_step:
        trained = icbs(
            sample_losses(task), task.variables, start, lambda k: batch_of(task, k, own.samples), own, orders,
            seed=task.seed, out=folder, resume=folder is not None, save_every=max(1, own.steps // 10),
            progress=False if task.run.quiet else task.run.bars, on_step=on_step)  # fmt: skip
    found: Any = trained.state
    flipped = sum(int(jnp.sum(found.masks[p] != masks[p])) for p in leaves)
    return apply(task.variables, found.masks), dict(found.masks), {"changed_sides": flipped}


def _method(name: str, about: str, models: str, find: Any, config: type, matrices: bool, **more: Any) -> Method:
    checks = functools.partial(check, matrices=matrices)
    return Method(name, about, models, find, config, (QUANTITY,), optional=True, check=checks, even=True,
                  widths=False, **more)  # fmt: skip


def _all(models: str) -> tuple[Method, ...]:
    plain = functools.partial(_at_once, prune=one_shot.magnitude)
    return (
        _method("weight-magnitude", "single weights of least size", models, plain, WeightConfig, False),
        _method("wanda", "single weights: |weight| x norm of its input, within each output (Wanda)", models, _wanda,
                WeightConfig, True),
        _method("sparsegpt", "single weights, column by column, the rest makes up for them (SparseGPT)", models, _sparsegpt,
                GPTConfig, True),
        _method("icbs", "single weights: a mask improved block by block, each a binary quadratic problem (iCBS)", models,
                _icbs_of_decoder if models == "decoders" else _icbs, BlockConfig, True,
                training=lambda task, config: config.steps),
        _method("weight-random", "single weights by chance: the baseline to beat", models, _random, WeightConfig, False),
    )  # fmt: skip


FOR_CLASSIFIERS, FOR_DECODERS = _all("classifiers"), _all("decoders")
