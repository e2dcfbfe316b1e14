"""Samplers: exact where the model is, closed forms of their tables, pieces that join."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.models.samplers import DDIM, RectifiedFlow, sample

DATA, NOISE = np.array([1.0, -2.0, 0.5], np.float32), np.array([0.3, 0.1, -1.0], np.float32)


def test_straight_flow_ends_at_the_data():
    s = RectifiedFlow(7, shift=3.0)
    t = s.times()
    np.testing.assert_allclose(t[[0, -1]], [1, 0])
    np.testing.assert_allclose(t[3], 3 * (4 / 7) / (1 + 2 * 4 / 7), rtol=1e-6)
    x, seen = sample(lambda x, t, n: (jnp.asarray(NOISE - DATA), n + 1), jnp.asarray(NOISE), s, 0)
    np.testing.assert_allclose(x, DATA, atol=1e-6)
    assert seen == 7


def test_euler_is_first_order():
    """dx/dt = x has the solution x e^-1 from t = 1 to 0; halving the step halves the error."""
    x, _ = zip(*(sample(lambda x, t, n: (x, n), jnp.ones(1), RectifiedFlow(n)) for n in (100, 200)), strict=True)
    one, two = (abs(float(v[0]) - np.exp(-1)) for v in x)
    assert 1.8 < one / two < 2.2


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_ddim_with_a_perfect_model_stays_on_the_path(predicts):
    s = DDIM(10, predicts, zero_snr=predicts != "noise")
    a = s.signal()
    assert len(a) == 11 and a[-1] == 1 and (np.diff(a) > 0).all() and (a[0] == 0) == s.zero_snr
    x = jnp.asarray(np.sqrt(a[0]) * DATA + np.sqrt(1 - a[0]) * NOISE)
    for i in range(10):
        said = {"noise": NOISE, "data": DATA, "velocity": np.sqrt(a[i]) * NOISE - np.sqrt(1 - a[i]) * DATA}[predicts]
        x = s.step(i, x, jnp.asarray(said, jnp.float32))
        np.testing.assert_allclose(x, np.sqrt(a[i + 1]) * DATA + np.sqrt(1 - a[i + 1]) * NOISE, atol=2e-5)


def test_the_tables_of_ddim():
    s = DDIM(4, trained=8)
    assert s.levels().tolist() == [7, 5, 3, 1]
    np.testing.assert_allclose(s.times(), [1, 0.75, 0.5, 0.25, 0])
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 8) ** 2
    np.testing.assert_allclose(s.signal()[:-1], np.cumprod(1 - beta)[[7, 5, 3, 1]])
    assert (np.diff(DDIM(50).levels()) == -20).all()


@pytest.mark.parametrize("sampler", [RectifiedFlow(6, 2.0), DDIM(6, "velocity")])
def test_pieces_join_to_the_whole(sampler):
    def predict(x, t, n):
        return jnp.tanh(x) * t, n + t

    x = jnp.asarray(NOISE)
    whole = jax.jit(lambda x: sample(predict, x, sampler, 0.0))(x)
    part = sample(predict, *sample(predict, x, sampler, 0.0, 0, 2)[:1], sampler, 0.0, 2)
    np.testing.assert_allclose(part[0], whole[0], rtol=1e-6)
    assert sample(predict, x, sampler, 0.0, 3, 3)[0] is not None
    with pytest.raises(ValueError, match="not among"):
        sample(predict, x, sampler, 0.0, 2, 7)


def test_bfloat16_samples_stay_bfloat16():
    x = jnp.ones(3, jnp.bfloat16)
    for s in (RectifiedFlow(4), DDIM(4)):
        assert s.step(0, x, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "settings", "what"),
    [
        (RectifiedFlow, {"steps": 0}, "steps"),
        (RectifiedFlow, {"shift": 0.0}, "shift"),
        (DDIM, {"steps": 2000}, "2000"),
        (DDIM, {"predicts": "x"}, "predicts"),
        (DDIM, {"zero_snr": True}, "velocity"),
        (DDIM, {"start": 0.5, "end": 0.1}, "betas"),
    ],
)
def test_bad_settings_name_themselves(make, settings, what):
    with pytest.raises(ValueError, match=what):
        make(**settings)
