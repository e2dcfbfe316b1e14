"""Rotary positions against the formulas written out, and what rotations must leave alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jprune.models.rope import Rope, angles, frequencies, rotate


def by_hand(rope, head):
    out = []
    for j in range(head // 2):
        f = rope.theta ** (-2 * j / head)
        wave = 2 * np.pi / f
        if rope.kind == "linear":
            f /= rope.factor
        elif rope.kind == "llama3":
            if wave > rope.original / rope.low:
                f /= rope.factor
            elif wave >= rope.original / rope.high:
                t = (rope.original / wave - rope.low) / (rope.high - rope.low)
                f *= (1 - t) / rope.factor + t
        out.append(f)
    return np.array(out)


@pytest.mark.parametrize(
    "rope",
    [Rope(), Rope(5e5), Rope(1e4, "linear", 4.0), Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192), Rope(1e4, "llama3", 32.0)],
)
def test_frequencies(rope):
    got = np.asarray(frequencies(rope, 128))
    np.testing.assert_allclose(got, by_hand(rope, 128), rtol=2e-5)
    if rope.kind == "llama3":  # all three branches occur
        plain = by_hand(Rope(rope.theta), 128)
        ratio = got / plain
        assert np.isclose(ratio[0], 1) and np.isclose(ratio[-1], 1 / rope.factor)
        assert ((ratio < 0.99) & (ratio > 1.01 / rope.factor)).any()


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 300), st.integers(0, 9))
def test_products_depend_on_distances_only(i, j, shift, seed):
    q, k = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(seed).normal(size=(2, 1, 1, 1, 8)))

    def product(a, b):
        cos, sin = angles(Rope(), 8, jnp.array([[a, b]]))
        return float((rotate(q, cos[:, :1], sin[:, :1]) * rotate(k, cos[:, 1:], sin[:, 1:])).sum())

    assert abs(product(i, j) - product(i + shift, j + shift)) < 5e-3
    cos, sin = angles(Rope(), 8, jnp.array([[i]]))
    turned = rotate(q, cos, sin)
    assert np.isclose(float((turned**2).sum()), float((q**2).sum()), rtol=1e-5)


def test_a_pair_is_turned_by_its_angle():
    x = jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, 0].set(1.0)
    cos, sin = angles(Rope(), 4, jnp.array([[1]]))
    np.testing.assert_allclose(rotate(x, cos, sin)[0, 0, 0], [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_the_angles_are_float32_also_far_out_and_for_bfloat16():
    cos, sin = angles(Rope(), 8, jnp.array([[100_000]]))
    assert cos.dtype == jnp.float32
    assert abs(float(cos[0, 0, 0]) - np.cos(100_000)) < 1e-2
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    assert rotate(x, cos, sin).dtype == jnp.bfloat16


def test_what_is_refused():
    with pytest.raises(ValueError, match="'yarn' is not supported: only default, linear, llama3"):
        Rope(kind="yarn")
    with pytest.raises(ValueError, match="low < high"):
        Rope(kind="llama3", low=4.0, high=4.0)
