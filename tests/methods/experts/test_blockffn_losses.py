"""BlockFFN's losses, the factor, the measures and fewer experts: closed forms, plain loops, and laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import normal

from jprune.methods.experts.fewer import prune_experts, reorder_experts, spread_by_load
from jprune.methods.experts.losses import (
    AdaptiveFactor,
    activation_locality,
    adaptive_factor,
    chunk_sparsification,
    factor_state,
    previous_tokens,
)
from jprune.methods.experts.sparsity import chunk_sparsity, dead_experts, reuse, token_sparsity, union_sparsity
from jprune.models.moe import ReluNorm, blockffn

PAIR = jnp.array([-1, 0])


@pytest.mark.parametrize(
    ("before", "after", "sharpness", "want"),
    [(0.0, 3.0, 1.0, np.log(2)), (1.0, 0.0, 1.0, 0.8132617), (0.1, 0.1, 100.0, 4.99378e-4), (0.1, -0.1, 100.0, 9.9995914)],
)  # fmt: skip
def test_locality_by_hand(before, after, sharpness, want):
    z = jnp.array([[before], [after]])
    assert float(activation_locality(z, PAIR, sharpness)) == pytest.approx(want, rel=1e-4)


def test_localitys_gradient_flows_through_both_sides():
    gradient = jax.grad(lambda z: activation_locality(z, PAIR, 1.0))(jnp.array([[1.0], [0.0]]))
    np.testing.assert_allclose(gradient[:, 0], [0.2310586, -0.25], rtol=1e-5)
    z = normal(0, 6, 3) / 50
    previous = previous_tokens(jnp.array([0, 0, 0, 1, 1, 2]), jnp.array([True] * 4 + [False, True]))
    assert previous.tolist() == [-1, 0, 1, -1, -1, -1]
    pairs = [(0, 1), (1, 2)]
    u = 100 * np.asarray(z, np.float64)
    want = np.mean([np.log1p(np.exp(u[a])) - u[a] / (1 + np.exp(-u[b])) for a, b in pairs])
    assert float(activation_locality(z, previous)) == pytest.approx(want, rel=1e-4)
    assert np.isfinite(jax.grad(lambda z: activation_locality(z, previous))(jnp.full((6, 3), 10.0))).all()


def test_chunks_by_hand():
    one, other = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    half = jnp.full((2, 2), 0.5)
    for unit, want in ((jnp.stack([one, one]), 0.49999), (jnp.stack([one, other]), 1.0), (half, 0.75)):
        assert float(chunk_sparsification(unit, chunk=2)) == pytest.approx(want, abs=3e-5)
    empty = chunk_sparsification(jnp.zeros((64, 4)))
    assert float(empty) == pytest.approx(1 - 1.00001**64, rel=2e-2)  # slightly below 0, as the authors' constant has it
    masked = chunk_sparsification(jnp.stack([one, other]), jnp.array([True, False]), chunk=2)
    assert float(masked) == pytest.approx(0.5, abs=3e-5)
    with pytest.raises(ValueError, match="no whole chunks of 64"):
        chunk_sparsification(jnp.zeros((65, 4)))


def test_the_chunk_loss_does_not_see_the_gain_nor_the_size_of_the_logits():
    z, gain = normal(0, 64, 8), normal(1, 8)

    def loss(gain, z):
        return chunk_sparsification(ReluNorm()(z, gain).unit)

    assert not np.asarray(jax.grad(loss)(gain, z)).any()
    assert abs(float(loss(gain, z) - loss(gain, 2 * z))) < 1e-3


def plainly(config, losses):
    """The rule of the paper's program, with lists."""
    base, ratio, k, length, before, now, out = config.start, 1.0, 0, config.stable, None, [], []
    for i, loss in enumerate(losses, 1):
        now.append(loss)
        m_prev, m_cur = before, np.mean(now)
        if i % config.adjust == 0:
            before, now = m_cur, []
        weight = base * (1 + (ratio - 1) * min(1, k / length))
        if i >= config.stable and i % config.adjust == 0:
            base, growth = weight, m_cur / m_prev
            growth = max(config.least, growth) if growth > 1 else growth
            ratio, k, length = min(config.cap * config.start / base, growth), 0, config.adjust
        k += 1
        out.append(weight)
    return out


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_the_factor_is_the_plain_rule(seed):
    config = AdaptiveFactor(0.1, stable=12, adjust=4)
    losses = np.random.default_rng(seed).uniform(0.2, 1.0, 60).astype(np.float32)
    state, got = factor_state(config), []

    @jax.jit
    def step(state, loss):
        return adaptive_factor(config, state, loss)

    for loss in losses:
        weight, state = step(state, loss)
        got.append(float(weight))
    np.testing.assert_allclose(got, plainly(config, losses.tolist()), rtol=2e-5)


def test_a_factor_of_a_constant_loss_stays_and_of_a_growing_one_ends_at_the_cap():
    config = AdaptiveFactor(0.1, stable=8, adjust=4)
    for losses, want in (([0.5] * 80, 0.1), (np.repeat(1.001 ** np.arange(100), 4), 0.4)):
        _, (_, weights) = jax.lax.scan(
            lambda s, x: ((adaptive_factor(config, s, x)[1]), (x, adaptive_factor(config, s, x)[0])),
            factor_state(config), jnp.asarray(losses, jnp.float32))  # fmt: skip
        assert float(weights[-1]) == pytest.approx(want, rel=1e-4)


def test_measures_by_hand():
    active = jnp.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]], bool)
    assert float(token_sparsity(active)) == pytest.approx(7 / 12)
    assert [chunk_sparsity(active, n) for n in (1, 2, 4)] == pytest.approx([7 / 12, 0.5, 0.0])
    assert reuse(active) == pytest.approx(2 / 3)
    assert union_sparsity(active, [[0, 1], [2, 3]]) == pytest.approx(0.5)
    valid = jnp.array([True, False, True, True])
    assert float(token_sparsity(active, valid)) == pytest.approx(6 / 9)
    assert chunk_sparsity(active, 2, valid) == pytest.approx(1 / 3)  # tokens 0 and 2
    assert chunk_sparsity(active, 1, segments=[0, 0, 1, 1]) == pytest.approx(7 / 12)
    assert dead_experts(active[:2]).tolist() == [2]
    with pytest.raises(ValueError, match="no whole window of 5"):
        chunk_sparsity(active, 5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5))
def test_longer_windows_are_never_sparser(seed, log):
    active = np.random.default_rng(seed).uniform(size=(64, 6)) < 0.2
    found = [chunk_sparsity(active, 2**k) for k in range(log + 2)]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(float(token_sparsity(active)), abs=1e-6)
    assert all(c >= 1 - 2**k * (1 - found[0]) - 1e-9 for k, c in enumerate(found))
    sets = [set(np.flatnonzero(a)) for a in active]
    want = [len(a & b) / len(a) for a, b in itertools.pairwise(sets) if a]
    assert reuse(active) == pytest.approx(np.mean(want) if want else 0.0)


def layer():
    return {
        "router": {"kernel": normal(0, 6, 8)}, "router_norm": {"scale": normal(1, 8)},
        "up": normal(2, 8, 6, 5), "down": normal(3, 8, 5, 6),
    }  # fmt: skip


def test_experts_that_never_run_go_exactly_and_only_with_the_gain_made_up():
    params, x = layer(), jnp.abs(normal(9, 20, 6))
    dead = jnp.array([1, 4, 5])
    params["router"]["kernel"] = params["router"]["kernel"].at[:, dead].set(-1.0)
    want, routed = blockffn(params, x)
    assert set(dead.tolist()) <= set(dead_experts(routed.active).tolist())
    keep = [0, 2, 3, 6, 7]
    few, router = prune_experts(params, keep)
    got, _ = blockffn(few, x, router)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    plain = {**few, "router_norm": {"scale": params["router_norm"]["scale"][jnp.array(keep)]}}
    assert np.abs(np.asarray(blockffn(plain, x)[0] - want)).max() > 1e-2
    for wrong in ([], [0, 0], [8]):
        with pytest.raises(ValueError, match="each once, from 0 to 7"):
            prune_experts(params, wrong)


def test_another_order_changes_nothing_and_loads_are_spread():
    params, x = layer(), normal(9, 20, 6)
    order, most = spread_by_load([9, 1, 1, 1, 5, 5, 1, 1], 2)
    assert sorted(order) == list(range(8)) and most == pytest.approx(12 / 12)
    turned = reorder_experts(params, order)
    np.testing.assert_allclose(blockffn(turned, x)[0], blockffn(params, x)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="an order of all of them"):
        reorder_experts(params, [0, 1])
    with pytest.raises(ValueError, match="do not divide 8 experts"):
        spread_by_load(np.ones(8), 3)
