"""A classifier of images and its data: what the rows of one seed train, prune and test."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jprune
from experiments.study import Run
from jprune.data import Dataset
from jprune.training import TrainConfig, evaluate, train


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
