"""A classifier of images and its data: what the rows of one seed train, prune and test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jprune
from experiments.study import Run
from jprune.data import Dataset
from jprune.training import TrainConfig, as_forward, evaluate, mean_cross_entropy, sgd, train
from jprune.training.forward import split_variables
from jprune.training.placement import data_mesh
from jprune.training.state import Recipe, compiled_step, init_state, update_of


class Classifier:
    """A model, its initial variables and its data, for one seed.

    Attributes:
      model: linen module. data: what it is trained and tested on. run: the seed's turn.
      x: two images of zeros. variables: initial. batch: images of a test batch.
    """

    def __init__(self, model: Any, data: Dataset, run: Run, batch: int = 256):
        self.model, self.data, self.run, self.batch = model, data, run, batch
        self.x = jnp.zeros((2, *data.image_shape), jnp.float32)
        self.variables = self.initial(model, run.seed)

    @functools.cached_property
    def graph(self) -> jprune.Graph:
        """Of the model on two images."""
        return jprune.trace(self.model.apply, self.variables, self.x)

    def initial(self, model: Any, seed: int) -> Any:
        """Variables before training."""
        return jax.jit(model.init)(jax.random.key(seed), self.x)

    def fit(self, name: str, recipe: TrainConfig, variables: Any, transform: Any = None, model: Any = None) -> Any:
        """One phase of training; with a work folder it goes on where it was interrupted."""
        folder = None if self.run.work is None else self.run.work / name.replace(" ", "-")
        recipe = dataclasses.replace(recipe, seed=self.run.seed)
        return train(model or self.model, variables, self.data, recipe, transform=transform, out=folder,
                     resume=folder is not None, progress=self.run.progress,
                     title=f"seed {self.run.seed} {name}")[0]  # fmt: skip

    def accuracy(self, variables: Any, model: Any = None) -> float:
        """On the test split."""
        return evaluate(model or self.model, variables, self.data, self.batch).accuracy


def training_step(model: Any, variables: Any, batch: Any, recipe: TrainConfig, steps: int) -> Callable[[], Any]:
    """What does so many of the recipe's steps on one batch at each call, to be timed; compiled and warm."""
    params, rest = split_variables(variables)
    descent = sgd(recipe.weight_decay, recipe.momentum, recipe.nesterov)
    state = init_state(params, rest, (descent,), data_mesh(None))
    shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(state))
    step = compiled_step(
        Recipe(as_forward(model), (update_of(descent),), mean_cross_entropy(0.0), "float32", True, shardings)
    )
    batch, key, rate = jax.device_put(batch), jax.random.key(0), jnp.float32(1e-3)
    holder = [step(state, batch, key, rate)[0]]  # a step takes its state's buffers over

    def run() -> Any:
        for _ in range(steps):
            holder[0] = step(holder[0], batch, key, rate)[0]
        return holder[0]

    return run
