"""A pruned function replayed from its trace is fine-tuned by the same loop as any model."""

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from jprune.training import TrainConfig, evaluate, train


def test_a_replayed_function_is_evaluated_and_fine_tuned(tmp_path, model, trained, dataset):
    graph = jprune.trace(lambda v, x: model.apply(v, x), trained, jnp.zeros((4, 8, 8, 1)))
    keep = {name: np.arange(group.size) % 2 == 0 for name, group in graph.groups.items()}
    small, fn = graph.compact(trained, keep), graph.replay(keep)
    assert small["params"]["Conv_1"]["kernel"].shape == (3, 3, 4, 8)
    before = evaluate(fn, small, dataset)
    np.testing.assert_allclose(before, evaluate(model, graph.mask(trained, keep), dataset), rtol=1e-5)

    tuned, _ = train(fn, small, dataset, TrainConfig(epochs=8, batch_size=16), out=tmp_path)
    assert evaluate(fn, tuned, dataset).loss < before.loss / 4
    jax.tree.map(np.testing.assert_array_equal, tuned["batch_stats"], small["batch_stats"])
