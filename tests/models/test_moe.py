"""Routers and the BlockFFN layer: closed forms, plain loops in numpy, and what may not change the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import normal

from jprune.models.moe import BlockFFN, DSMoE, Grin, ReluNorm, ReMoE, TopK, blockffn
from jprune.models.moe.routers import _sampled, remoe_coefficient


def layer(seed=0, d=6, experts=8, f=5):
    return {
        "router": {"kernel": normal(seed, d, experts)},
        "router_norm": {"scale": normal(seed + 1, experts)},  # negative gains too
        "up": normal(seed + 2, experts, d, f),
        "down": normal(seed + 3, experts, f, d),
    }


def by_loops(params, x, eps=1e-5):
    """Token by token, expert by expert, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    y, active = np.zeros(x.shape), np.zeros((len(x), len(p["up"])), bool)
    for t, row in enumerate(np.asarray(x, np.float64)):
        r = np.maximum(row @ p["router"]["kernel"], 0)
        a = r / np.sqrt((r**2).mean() + eps) * p["router_norm"]["scale"]
        for e in np.flatnonzero(r > 0):
            h = row @ p["up"][e]
            y[t] += a[e] * (h / (1 + np.exp(-h))) @ p["down"][e]
            active[t, e] = True
    return y, active


def test_the_router_by_hand():
    z = jnp.array([[3.0, -1.0, 4.0, 0.0]])
    np.testing.assert_allclose(ReluNorm()(z, jnp.ones(4)).scores, [[1.1999990, 0, 1.5999987, 0]], atol=1e-6)
    turned = ReluNorm()(z, jnp.array([1.0, 1, -2, 1]))
    np.testing.assert_allclose(turned.scores[0, 2], -3.1999974, atol=1e-6)
    assert turned.active.tolist() == [[True, False, True, False]]


def test_the_layer_is_the_loop_over_tokens_and_experts():
    params, x = layer(), normal(9, 12, 6)
    y, routed = jax.jit(blockffn)(params, x)
    want, active = by_loops(params, x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(routed.active, active)
    assert (np.asarray(routed.scores) < 0).any()  # active all the same


def test_no_expert_gives_zeros_and_finite_gradients():
    params, x = layer(), jnp.abs(normal(9, 4, 6))
    params["router"]["kernel"] = -jnp.abs(params["router"]["kernel"])
    y, routed = blockffn(params, x)
    assert not np.asarray(y).any() and not np.asarray(routed.active).any()
    gradient = jax.grad(lambda p, x: jnp.sum(jnp.sin(blockffn(p, x)[0])), (0, 1))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_padding_uses_no_expert_and_changes_no_other_token():
    params, x = layer(), normal(9, 5, 6)
    valid = jnp.array([True, True, False, True, False])
    y, routed = blockffn(params, x, valid=valid)
    whole, _ = blockffn(params, x)
    np.testing.assert_array_equal(y[valid], whole[valid])
    assert not np.asarray(y[~valid]).any() and not np.asarray(routed.active[~valid]).any()


def test_the_module_is_the_function():
    x = normal(9, 2, 3, 6)
    module = BlockFFN(8, 5)
    variables = module.init(jax.random.key(0), x)
    assert {k: v.shape for k, v in variables["params"]["router"].items()} == {"kernel": (6, 8)}
    y, routed = module.apply(variables, x)
    want, _ = blockffn(variables["params"], x.reshape(6, 6))
    np.testing.assert_array_equal(y.reshape(6, 6), want)
    assert routed.scores.shape == (6, 8)
    topk = BlockFFN(8, 5, router=TopK(2))
    assert "router_norm" not in topk.init(jax.random.key(0), x)["params"]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_top_k_routers_choose_k(seed, k):
    z = normal(seed, 9, 7)
    routed = TopK(k)(z)
    p = np.asarray(jax.nn.softmax(z, -1), np.float64)
    for t in range(9):
        chosen = np.argsort(-p[t], kind="stable")[:k]
        want = np.zeros(7)
        want[chosen] = p[t, chosen] / p[t, chosen].sum()
        np.testing.assert_allclose(routed.scores[t], want, atol=1e-6)
    load = np.asarray(routed.active).mean(0) / k
    assert float(routed.balance) == pytest.approx(7 * (p.mean(0) * load).sum(), rel=1e-4)
    if k > 1:
        shared = DSMoE(k, shared=1)(z)
        assert (np.asarray(shared.active).sum(1) == k).all() and (np.asarray(shared.scores)[:, 0] == 1).all()
        np.testing.assert_allclose(shared.scores[:, 1:], TopK(k - 1)(z[:, 1:]).scores, atol=1e-6)


def test_remoe_and_its_coefficient():
    z = jnp.array([[1.0, -2.0, 3.0], [-1.0, -1.0, 2.0]])
    routed = ReMoE(2)(z)
    np.testing.assert_array_equal(routed.scores, np.maximum(z, 0))
    assert float(routed.balance) == pytest.approx(3 / (4 * 2) * (1 * 1 + 0 + 5 * 2))
    assert float(remoe_coefficient(2.0, 0.3, 0.2)) == pytest.approx(2.1)
    assert float(remoe_coefficient(2.0, 0.2, 0.2)) == pytest.approx(2 / 1.05)


def test_grin_takes_the_largest_afterwards_and_samples_among_the_near_in_training():
    z = jnp.array([[2.0, 1.9, 0.5, -1.0]])
    after = Grin(2)(z)
    near = np.exp([2.0, 1.9])
    np.testing.assert_allclose(after.scores, [[near[0] / near.sum(), 1.0, 0, 0]], rtol=1e-5)  # then 1.9 stands alone
    drawn = jax.vmap(lambda k: Grin(1)(z, k).scores[0])(jax.random.split(jax.random.key(0), 400))
    first, second = (np.asarray(drawn)[:, i] for i in (0, 1))
    assert 0.4 < (first > 0).mean() < 0.65 and not np.asarray(drawn)[:, 2:].any()
    q = near / near.sum()
    np.testing.assert_allclose(np.unique(second[second > 0].round(5)), np.sort([0.3333 * q[1], q[1]]), rtol=1e-3)
    # the gradient is that of the softmax entry, whatever the factor
    got = jax.grad(lambda a: _sampled(a, jnp.array([1]), jnp.array([0.3333]))[0])(z)
    want = jax.grad(lambda a: jax.nn.softmax(a, -1)[0, 1])(z)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "why"),
    [(lambda: TopK(9)(normal(0, 2, 8)), "at most all 8"), (lambda: DSMoE(2, 2)(normal(0, 2, 8)), "one that is chosen"),
     (lambda: blockffn(layer(), normal(0, 3, 7)), "do not fit")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, why):
    with pytest.raises(ValueError, match=why):
        call()
