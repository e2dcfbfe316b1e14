"""The recipe: what it refuses, its schedule and its optimiser against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.training import TrainConfig, TuningConfig, cross_entropy, learning_rates, sgd


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", float("nan")),
        ("schedule", "linear"),
        ("decay", 0.0),
        ("warmup_epochs", 15),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("label_smoothing", 1.0),
        ("dtype", "float16"),
        ("checkpoint_every_steps", -1),
        ("clip", 0.0),
        ("accumulate", 0),
        ("accumulate", 3),
        ("milestones", (3,)),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("learning_rate", float("inf")),
        ("schedule", "step"),
        ("warmup", 1.0),
        ("clip", 0.0),
        ("weight_decay", -1.0),
        ("betas", (0.9, 1.0)),
        ("eps", -1.0),
        ("accumulate", 0),
        ("seed", -1),
    ],
)
def test_bad_values_of_a_recipe_by_steps_are_named(field, value):
    with pytest.raises(ValueError, match=rf"TuningConfig\.{field} is"):
        TuningConfig(**{"steps": 3, field: value})


def test_rates_of_a_recipe_by_steps():
    np.testing.assert_allclose(TuningConfig(4, 1.0).rates, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(TuningConfig(4, 2.0, "cosine").rates, [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(TuningConfig(6, 1.0, warmup=0.33).rates, [0.5, 1, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(TuningConfig(3, 0.1, "constant").rates, 0.1, rtol=1e-6)


def test_a_warm_up_that_fills_the_run_ends_at_the_full_rate():
    np.testing.assert_allclose(
        learning_rates(TrainConfig(epochs=1, learning_rate=1.0, warmup_epochs=0.9), 4), [0.25, 0.5, 0.75, 1]
    )
    np.testing.assert_allclose(TuningConfig(3, 1.0, warmup=0.9).rates, [1 / 3, 2 / 3, 1], rtol=1e-6)


def test_milestones_must_increase_and_lists_become_hashable():
    with pytest.raises(ValueError, match="increasing"):
        TrainConfig(schedule="step", milestones=(4, 2))
    assert hash(TrainConfig(schedule="step", milestones=[2, 4])) == hash(
        TrainConfig(schedule="step", milestones=(2, 4))
    )


def test_cosine_starts_at_the_rate_is_half_in_the_middle_and_ends_near_zero():
    rates = learning_rates(TrainConfig(epochs=4, learning_rate=0.2), 25)
    assert rates.shape == (100,) and rates.dtype == np.float32
    np.testing.assert_allclose(rates[[0, 50]], [0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rates[99], 0.1 * (1 + np.cos(0.99 * np.pi)), rtol=1e-4)
    np.testing.assert_allclose(rates.mean(), 0.1, rtol=0.02)


def test_steps_fall_at_the_first_step_of_a_milestone():
    rates = learning_rates(TrainConfig(epochs=5, learning_rate=1.0, schedule="step", milestones=(1, 3)), 2)
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01], rtol=1e-6)


def test_warm_up_is_linear_and_the_cosine_begins_after_it():
    rates = learning_rates(TrainConfig(epochs=3, learning_rate=1.0, warmup_epochs=1), 4)
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[8], 0.5, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_the_momentum_recurrence(nesterov):
    rng = np.random.default_rng(1)
    w, v, rate = rng.standard_normal(5), np.zeros(5), 0.1
    tx = sgd(1e-2, 0.9, nesterov)
    params = jnp.asarray(w, jnp.float32)
    state = tx.init(params)
    for t in range(6):
        g = rng.standard_normal(5)
        updates, state = tx.update(
            jnp.asarray(g, jnp.float32), state, params, learning_rate=jnp.float32(rate / (t + 1))
        )
        params = params + updates
        g = g + 1e-2 * w
        v = 0.9 * v + g
        w = w - rate / (t + 1) * (g + 0.9 * v if nesterov else v)
    np.testing.assert_allclose(params, w, rtol=1e-5, atol=1e-6)


def test_equal_settings_share_the_optimiser_so_phases_share_a_compiled_step():
    assert all(
        a is b for a, b in zip(TuningConfig(3).stages, TuningConfig(5, 0.1, betas=[0.9, 0.999]).stages, strict=True)
    )
    assert sgd(1e-4, 0.9, True) is sgd(1e-4, 0.9, True)
    assert dataclasses.replace(TrainConfig(), seed=3) != TrainConfig()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_against_the_explicit_distribution(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((7, 5)), rng.integers(0, 5, 7)
    target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    got = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(got, -(target * log_p).sum(1), rtol=1e-5)


def test_cross_entropy_accumulates_in_float32():
    logits = jax.random.normal(jax.random.key(0), (4, 1000), jnp.bfloat16)
    got = cross_entropy(logits, jnp.arange(4), 0.1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, cross_entropy(logits.astype(jnp.float32), jnp.arange(4), 0.1), rtol=1e-6)
