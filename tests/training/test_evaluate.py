"""Evaluation: every example once, whatever the batch size."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from jprune.training import evaluate


@pytest.fixture
def dataset(model, variables, dataset):
    """The last example, of which padding makes copies, is one that the model gets right."""
    dataset.test.labels[-1] = model.apply(variables, dataset.test.images[-1:]).argmax()
    return dataset


@pytest.fixture
def expected(model, variables, dataset):
    logits = np.asarray(jax.jit(model.apply)(variables, dataset.test.images), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = dataset.test.labels
    return (logits.argmax(1) == labels).mean(), -log_p[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("batch_size", [1, 7, 50, 256])
def test_ragged_batches_count_each_example_once(model, variables, dataset, expected, batch_size):
    np.testing.assert_allclose(evaluate(model, variables, dataset, batch_size), expected, rtol=1e-5)


def test_every_form_of_a_model_gives_the_same(model, variables, dataset, expected):
    forms = [model, model.apply, lambda v, x: model.apply(v, x), lambda v, x, train, mutable: model.apply(v, x)]
    for form in forms:
        np.testing.assert_allclose(evaluate(form, variables, dataset.test, 16), expected, rtol=1e-5)


def test_a_second_evaluation_does_not_compile_again(variables, dataset):
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(10)(x.reshape(len(x), -1))

    variables = Counting().init(jax.random.key(0), dataset.test.images[:1])
    traces.clear()
    for _ in range(3):
        evaluate(Counting(), variables, dataset, 16)
    assert len(traces) == 1


def test_outputs_that_are_not_logits_are_refused(variables, dataset):
    with pytest.raises(ValueError, match="needs logits"):
        evaluate(lambda v, x: x, variables, dataset)


def test_a_model_that_is_none_is_refused(variables, dataset):
    with pytest.raises(ValueError, match="give a linen module"):
        evaluate(3, variables, dataset)
