"""Farthest-first selection: closed forms, laws, a float64 loop, and the optimum by brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.methods.tokens.divprune import (
    cosine_distance_matrix,
    cover_radius,
    distances,
    divprune_select,
    farthest_first,
    mmdp_bruteforce,
    mmdp_value,
    retained_count,
)

M, D = 12, 5  # one shape and k for the properties: one compilation
seeds = st.integers(0, 2**31)


def cloud(seed, m=M, d=D):
    return np.random.default_rng(seed).normal(size=(m, d)).astype(np.float32)


def by_loop(x, k, apart=None):
    """Farthest first in float64, scalar by scalar."""
    x = np.asarray(x, np.float64)
    if apart is None:
        length = np.sqrt((x * x).sum(1))
        apart = 1 - (x @ x.T) / np.outer(length, length)
    near = [min(apart[i, j] for j in range(len(x)) if j != i) for i in range(len(x))]
    order = [int(np.argmax(near))]
    trace = [max(near)]
    while len(order) < k:
        left = {i: min(apart[i, j] for j in order) for i in range(len(x)) if i not in order}
        best = max(left, key=lambda i: (left[i], -i))
        order.append(best)
        trace.append(left[best])
    return order, trace


def test_counts_round_halves_to_even():
    table = [(25, 0.5, 12), (27, 0.5, 14), (10, 0.25, 2), (576, 0.098, 56), (1152, 0.1, 115), (2880, 0.098, 282)]
    assert [retained_count(m, r) for m, r, _ in table] == [k for *_, k in table]
    assert retained_count(3, 0.01) == 1 and retained_count(7, 1.0) == 7
    for bad in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            retained_count(10, bad)
    with pytest.raises(ValueError, match="nothing to keep"):
        retained_count(0, 0.5)


@pytest.mark.smoke
def test_five_directions_in_the_plane():
    angle = np.array([0, 0.1, np.pi / 2, np.pi, 2.0])
    x = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)
    for k, order in ((1, [3]), (2, [3, 0]), (5, [3, 0, 2, 4, 1])):
        assert divprune_select(x, k).order.tolist() == order
    np.testing.assert_allclose(divprune_select(x, 5).trace, [0.584, 2.0, 1.0, 0.091, 0.005], atol=1e-3)


def test_among_equals_the_lowest_index():
    assert divprune_select(jnp.eye(6), 3).order.tolist() == [0, 1, 2]


@pytest.mark.smoke
def test_duplicates_are_chosen_once():
    five = np.eye(5, dtype=np.float32)
    order, trace = divprune_select(jnp.asarray(np.concatenate([five] * 3)), 9)
    assert len(set(order.tolist())) == 9
    assert {i % 5 for i in order.tolist()[:5]} == set(range(5))
    np.testing.assert_allclose(trace, [0, 1, 1, 1, 1, 0, 0, 0, 0], atol=1e-6)


def test_a_token_of_zeros_is_at_distance_one():
    x = np.concatenate([np.zeros((1, 3), np.float32), np.eye(3, dtype=np.float32)[:2], [[1, 1, 0]]]).astype(np.float32)
    np.testing.assert_allclose(cosine_distance_matrix(jnp.asarray(x))[0], np.ones(4))
    order, trace = divprune_select(jnp.asarray(x), 4)
    assert order.tolist() == [0, 1, 2, 3] and np.isfinite(trace).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_tokens_have_directions_too(scale):
    x = cloud(0)
    np.testing.assert_array_equal(divprune_select(jnp.asarray(x * np.float32(scale)), 6).order, by_loop(x, 6)[0])


@given(seeds)
@settings(max_examples=15)
def test_the_float64_loop(seed):
    x = cloud(seed)
    got = divprune_select(jnp.asarray(x), M)
    order, trace = by_loop(x, M)
    np.testing.assert_array_equal(got.order, order)
    np.testing.assert_allclose(got.trace, trace, atol=1e-5)


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_other_metrics(metric):
    x = cloud(1)
    wide = x.astype(np.float64)
    apart = np.linalg.norm(wide[:, None] - wide[None], ord={"l1": 1, "l2": 2}[metric], axis=-1)
    np.testing.assert_allclose(distances(jnp.asarray(x), jnp.asarray(x), metric), apart, atol=1e-5)
    for on_demand in (False, True):
        got = divprune_select(jnp.asarray(x), 7, metric=metric, on_demand=on_demand)
        order, trace = by_loop(x, 7, apart)
        np.testing.assert_array_equal(got.order, order)
        np.testing.assert_allclose(got.trace, trace, rtol=1e-5)


def test_any_distances_from_any_token():
    x = jnp.asarray(cloud(2))
    apart = cosine_distance_matrix(x)
    whole = divprune_select(x, 6)
    got = farthest_first(apart, 6, whole.order[0])
    np.testing.assert_array_equal(got.order, whole.order)
    np.testing.assert_allclose(got.trace, whole.trace, atol=1e-6)
    assert farthest_first(apart, 3, 4, jnp.arange(M) != 7).order[0] == 4


def test_other_first_tokens():
    x = jnp.asarray(cloud(2))
    apart = np.asarray(cosine_distance_matrix(x))
    assert divprune_select(x, 4, first="index0").order[0] == 0
    medoid = int(apart.sum(1).argmin())
    got = divprune_select(x, 4, first="medoid")
    assert got.order[0] == medoid
    np.testing.assert_allclose(got.trace[0], np.delete(apart[medoid], medoid).min(), atol=1e-6)
    valid = jnp.arange(M) >= 3
    assert divprune_select(x, 4, valid, first="index0").order[0] == 3


@given(seeds)
@settings(max_examples=15)
def test_laws(seed):
    """Scale, rotation, permutation, prefix, trace, maximality, distinctness."""
    x, k = cloud(seed), 6
    rng = np.random.default_rng(seed)
    order, trace = (np.asarray(a) for a in divprune_select(jnp.asarray(x), k))
    scaled = x * rng.uniform(0.1, 10, (M, 1)).astype(np.float32)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    np.testing.assert_array_equal(divprune_select(jnp.asarray(scaled), k).order, order)
    np.testing.assert_array_equal(divprune_select(jnp.asarray(x @ turn), k).order, order)
    near = np.sort(np.asarray(cosine_distance_matrix(jnp.asarray(x)) + 9 * jnp.eye(M)).min(1))
    if (
        near[-1] - near[-2] > 1e-6
    ):  # two that are each other's nearest may both be the first choice: then the index decides
        p = rng.permutation(M)
        np.testing.assert_array_equal(p[np.asarray(divprune_select(jnp.asarray(x[p]), k).order)], order)
    whole = divprune_select(jnp.asarray(x), M)
    np.testing.assert_array_equal(whole.order[:k], order)
    np.testing.assert_allclose(whole.trace[:k], trace, atol=1e-6)
    assert sorted(whole.order.tolist()) == list(range(M))
    assert (np.diff(trace[1:]) <= 0).all() and len(set(order.tolist())) == k
    np.testing.assert_allclose(trace[-1], mmdp_value(jnp.asarray(x), jnp.asarray(order)), atol=1e-6)
    assert cover_radius(jnp.asarray(x), jnp.asarray(order)) <= trace[-1] + 1e-6


@given(seeds, st.integers(1, M))
@settings(max_examples=15)
def test_padding_is_never_chosen(seed, count):
    x, k = cloud(seed), 6
    rng = np.random.default_rng(seed)
    valid = np.zeros(M, bool)
    places = np.sort(rng.permutation(M)[:count])
    valid[places] = True
    order, trace = (np.asarray(a) for a in divprune_select(jnp.asarray(x), k, jnp.asarray(valid)))
    some = min(k, count)
    if count > 1:
        np.testing.assert_array_equal(order[:some], places[by_loop(x[places], some)[0]])
    else:
        assert order[0] == places[0]
    assert (order[some:] == M).all() and (trace[some:] == -np.inf).all()
    matrix = np.asarray(cosine_distance_matrix(jnp.asarray(x), jnp.asarray(valid)))
    assert np.isfinite(matrix[np.ix_(valid, valid)]).all() and np.isinf(matrix[~valid]).all()


def test_no_valid_token_at_all():
    order, trace = divprune_select(jnp.ones((3, 2)), 2, jnp.zeros(3, bool))
    assert order.tolist() == [3, 3] and (trace == -jnp.inf).all()


def test_batches_and_without_jit():
    x = jnp.asarray(np.stack([cloud(s) for s in range(4)]))
    valid = jnp.asarray(np.random.default_rng(0).random((4, M)) < 0.8)
    together = jax.vmap(functools.partial(divprune_select, k=5))(x, valid=valid)
    for b in range(4):
        alone = divprune_select(x[b], 5, valid[b])
        np.testing.assert_array_equal(together.order[b], alone.order)
        np.testing.assert_allclose(together.trace[b], alone.trace, atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_array_equal(divprune_select(x[0], 3, valid[0]).order, together.order[0, :3])


def test_rows_on_demand_choose_the_same(monkeypatch):
    from jprune.methods.tokens import divprune as diverse

    monkeypatch.setattr(diverse, "BLOCK", 4)  # three blocks, the last one padded
    x = jnp.asarray(cloud(5, 11, 3))
    valid = jnp.arange(11) != 4
    a, b = (divprune_select(x, 7, valid, on_demand=o) for o in (False, True))
    np.testing.assert_array_equal(a.order, b.order)
    np.testing.assert_allclose(a.trace, b.trace, atol=1e-6)


def test_half_precision_is_compared_in_float32():
    x = jnp.asarray(cloud(3, 40, 16)).astype(jnp.bfloat16)
    order, trace = divprune_select(x, 10)
    want = by_loop(np.asarray(x, np.float64), 10)
    np.testing.assert_array_equal(order, want[0])
    np.testing.assert_allclose(trace, want[1], atol=1e-5)


def test_at_least_half_of_the_best_chord():
    """The chord is a metric, in which farthest first is never worse than half of the optimum, and sometimes is it."""
    rng = np.random.default_rng(0)
    worst, exact = 1.0, 0
    for m in (6, 10):
        x = rng.normal(size=(40, m, 3)).astype(np.float32)
        order, trace = jax.vmap(functools.partial(divprune_select, k=4))(jnp.asarray(x))
        for b, k in itertools.product(range(40), (2, 3, 4)):  # shorter runs are prefixes of the longest
            optimum, best = mmdp_bruteforce(x[b], k)
            worst = min(worst, (float(trace[b, k - 1]) / best) ** 0.5)
            exact += set(optimum) == set(order[b, :k].tolist())
    assert 0.5 <= worst < 0.9 and exact > 20


def test_brute_force_on_a_square():
    square = np.array([[1, 0], [0.99, 0.1], [0, 1], [-1, 0]])
    assert mmdp_bruteforce(square, 2) == ((0, 3), 2.0)
    with pytest.raises(ValueError, match="2 to 4"):
        mmdp_bruteforce(square, 5)


def test_errors_name_what_is_allowed():
    x = jnp.ones((3, 2))
    for call, said in (
        (lambda: divprune_select(x, 4), "1 to 3"),
        (lambda: divprune_select(x, 0), "1 to 3"),
        (lambda: divprune_select(x, 2, first="farthest"), "max_nn, index0, medoid"),
        (lambda: divprune_select(x, 2, metric="dot"), "cosine, l2, l1"),
        (lambda: distances(x, x, "dot"), "cosine, l2, l1"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
