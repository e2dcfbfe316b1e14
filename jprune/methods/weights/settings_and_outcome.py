"""What all methods for single weights share as methods of a task: settings, which leaves, checks, the outcome."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.budget.weights import choose
from jprune.graph import trace
from jprune.importance.at_init import weight_leaves
from jprune.methods.contract import Outcome, Task
from jprune.methods.weights import one_shot
from jprune.methods.weights.least_squares import refit
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import NM, Unstructured, density, sparse_cost
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
