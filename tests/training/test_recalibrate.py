"""Recalibrated BatchNorm statistics against the averages taken by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jprune.data import epoch_batches
from jprune.training import TrainConfig, evaluate, recalibrate, train


def test_statistics_are_the_means_over_the_batches(dataset):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.7)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.99)(2 * x + 1)

    variables = Normed().init(jax.random.key(0), dataset.test.images[:1])
    images = [epoch_batches(dataset.train, 32, seed=0, epoch=0)[i]["image"] for i in range(3)]
    for examples, used in ((8192, images), (64, images[:2]), (1, images[:1])):
        stats = recalibrate(Normed(), variables, dataset, examples=examples, batch_size=32)["batch_stats"]
        first, second = stats["BatchNorm_0"], stats["BatchNorm_1"]
        np.testing.assert_allclose(first["mean"], np.mean([x.mean((0, 1, 2)) for x in used], 0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(first["var"], np.mean([x.var((0, 1, 2)) for x in used], 0), rtol=1e-4)
        np.testing.assert_allclose(second["mean"], 1.0, rtol=1e-4)
        np.testing.assert_allclose(second["var"], 4.0, rtol=1e-3)


def test_it_repairs_a_network_whose_statistics_are_lost(model, variables, trained, dataset):
    lost = {**trained, "batch_stats": variables["batch_stats"]}
    repaired = recalibrate(model, lost, dataset)
    assert evaluate(model, lost, dataset).accuracy < 0.8 < evaluate(model, repaired, dataset).accuracy
    jax.tree.map(np.testing.assert_array_equal, repaired["params"], trained["params"])


def test_statistics_that_a_batch_does_not_move_stay(model, variables, dataset):
    frozen = recalibrate(lambda v, x: model.apply(v, x), variables, dataset)
    jax.tree.map(np.testing.assert_array_equal, frozen, variables)


def test_training_may_do_it_every_epoch(model, variables, dataset):
    config = TrainConfig(epochs=2, batch_size=32, recalibrate_examples=64)
    trained, _ = train(model, variables, dataset, config)
    again = recalibrate(model, trained, dataset, examples=64, batch_size=32, seed=0, epoch=1)
    jax.tree.map(np.testing.assert_array_equal, trained, again)


def test_without_the_collection_there_is_nothing_to_do(dataset):
    with pytest.raises(ValueError, match=r"no 'batch_stats'"):
        recalibrate(lambda v, x: x, {"params": jnp.ones(2)}, dataset)
