"""A three-layer network and a small data set for the training tests, also for those in processes of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jprune.data import ArraySplit, Dataset
from jprune.training import TrainConfig, train


class ToyCNN(nn.Module):
    """Three convolutions with BatchNorm and a classifier."""

    width: int = 8
    momentum: float = 0.8

    @nn.compact
    def __call__(self, x, train: bool = False):
        for width, stride in ((self.width, 1), (2 * self.width, 2), (2 * self.width, 1)):
            x = nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        return nn.Dense(10)(x.mean((1, 2)))


@functools.cache
def init(model=None):
    """Variables of the toy network."""
    return jax.jit((model or ToyCNN()).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def small_dataset(n_train=96, n_test=50):
    """Ten blurred patterns with noise: learnable in a few steps, drawn without scikit-learn."""
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((10, 8, 8, 1))

    def split(n, noise):
        labels = rng.integers(0, 10, n).astype(np.int32)
        images = patterns[labels] + 0.5 * rng.standard_normal((n, 8, 8, 1))
        return ArraySplit(images.astype(np.float32), labels, noise=noise)

    return Dataset(split(n_train, 0.1), split(n_test, 0.0), 10, (8, 8, 1), "patterns")


@functools.cache
def trained_network():
    """Variables of the toy network after so many steps that it knows the small data set."""
    return train(ToyCNN(), init(), small_dataset(), TrainConfig(epochs=12, batch_size=16), progress=False)[0]


@pytest.fixture
def trained():
    return jax.tree.map(lambda x: x, trained_network())


@pytest.fixture
def model():
    return ToyCNN()


@pytest.fixture
def variables(model):
    return jax.tree.map(lambda x: x, init())


@pytest.fixture
def dataset():
    return small_dataset()
