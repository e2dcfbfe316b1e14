"""PageRank of attention: closed forms, networkx, invariants; one score out of all heads and the filter of heads."""

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_zero_tprune import one_score, signal, votes
from quickly import quickly

from jprune.methods.tokens import pagerank
from jprune.methods.tokens.pagerank import living_signal, restrict

TOKENS = 7
wpr_scores = quickly(pagerank.wpr_scores, "iters", "temperature")
aggregate_heads = quickly(pagerank.aggregate_heads, "mode", "var_range")
initial_signal = quickly(pagerank.initial_signal, "tokens", "special", "boost")

TRACED = quickly(pagerank.wpr_scores)


def attention(seed, batch=1, heads=2, n=TOKENS, sharp=2.0):
    logits = np.random.default_rng(seed).normal(0, sharp, (batch, heads, n, n))
    e = np.exp(logits)
    return jnp.asarray(e / e.sum(-1, keepdims=True), jnp.float32)


def even(n=TOKENS):
    return initial_signal(n, 1, False)


@pytest.mark.smoke
def test_what_votes_weigh_at_first():
    np.testing.assert_allclose(initial_signal(9, 1), [3 / 11] + [1 / 11] * 8, rtol=1e-6)
    np.testing.assert_allclose(initial_signal(9, 2), [3 / 13] * 2 + [1 / 13] * 7, rtol=1e-6)
    np.testing.assert_allclose(initial_signal(9, 1, False), np.full(9, 1 / 9), rtol=1e-6)
    alive = jnp.array([[True] * 4 + [False] * 3, [True, False] * 3 + [True]])
    found = living_signal(alive, 1)
    np.testing.assert_allclose(found, [[0.4, 0.2, 0.2, 0.2, 0, 0, 0], [0.4, 0, 0.2, 0, 0.2, 0, 0.2]], rtol=1e-6)


@pytest.mark.parametrize("iters", [1, 5, 6, 30])
def test_closed_forms(iters):
    uniform = jnp.full((1, 1, 5, 5), 0.2)
    np.testing.assert_allclose(wpr_scores(uniform, iters, initial_signal(5)), np.ones((1, 1, 5)), atol=1e-5)
    rows = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3, 0.4]), (1, 1, 4, 4))
    for start in (initial_signal(4), initial_signal(4, 1, False), jnp.array([0.0, 0.0, 0.0, 1.0])):
        np.testing.assert_allclose(wpr_scores(rows, iters, start)[0, 0], [0.4, 0.8, 1.2, 1.6], rtol=1e-5)
    # each attends to its neighbour, and a little to all: nobody is more important than others
    cycle = 0.9 * np.roll(np.eye(6), 1, axis=1) + 0.1 / 6
    np.testing.assert_allclose(
        wpr_scores(jnp.asarray(cycle[None, None], jnp.float32), iters, even(6)), np.ones((1, 1, 6)), atol=1e-5
    )


def test_doubly_stochastic_attention_forgets_a_boosted_start():
    a = np.abs(np.random.default_rng(0).normal(size=(6, 6))) + 0.1
    a = a + a.T
    for _ in range(500):  # symmetric scaling to row and column sums of 1
        d = 1 / np.sqrt(a.sum(1))
        a = d[:, None] * a * d
    np.testing.assert_allclose(a.sum(0), 1, atol=1e-9)
    found = wpr_scores(jnp.asarray(a[None, None], jnp.float32), 60, initial_signal(6))
    np.testing.assert_allclose(found, np.ones((1, 1, 6)), atol=1e-4)


@pytest.mark.smoke
def test_voters_vote_for_what_they_attend_to():
    # with the wrong transpose a uniform start would stay uniform
    assert np.std(wpr_scores(attention(1), 1, even())) > 0.1
    one = jnp.asarray(np.broadcast_to([0.0, 0.0, 1.0], (1, 1, 3, 3)), jnp.float32)
    np.testing.assert_allclose(wpr_scores(one, 1, even(3))[0, 0], [0, 0, 3])


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 9]), st.booleans())
def test_against_plain_loops(seed, iters, boost):
    a = attention(seed, batch=2)
    found = wpr_scores(a, iters, initial_signal(TOKENS, 1, boost))
    np.testing.assert_allclose(np.sum(found, -1), TOKENS, rtol=1e-5)  # votes are neither made nor lost
    traced = TRACED(a, jnp.int32(iters), initial_signal(TOKENS, 1, boost))
    np.testing.assert_allclose(traced, found, rtol=1e-5)
    for image, one in zip(a, found, strict=True):
        np.testing.assert_allclose(one, votes(image, iters, signal(TOKENS, 1, boost)), rtol=2e-5)


def test_converges_to_pagerank_whatever_the_start():
    a = attention(3, sharp=1.0)
    for head in range(2):
        graph = networkx.DiGraph()
        graph.add_weighted_edges_from((i, j, float(a[0, head, i, j])) for i in range(TOKENS) for j in range(TOKENS))
        rank = networkx.pagerank(graph, alpha=1.0, weight="weight", tol=1e-12, max_iter=1000)
        expected = np.array([rank[i] for i in range(TOKENS)]) * TOKENS
        np.testing.assert_allclose(wpr_scores(a, 50, even())[0, head], expected, rtol=1e-5)
    np.testing.assert_allclose(
        wpr_scores(a, 50, even()), wpr_scores(a, 50, initial_signal(TOKENS)), rtol=1e-6, atol=1e-6
    )
    assert np.abs(np.subtract(wpr_scores(a, 1, even()), wpr_scores(a, 1, initial_signal(TOKENS)))).max() > 0.05


def test_one_boosted_vote_mixes_column_means_and_the_class_tokens_row():
    a = np.asarray(attention(4))
    blend = (a.sum(2) + (TOKENS**0.5 - 1) * a[:, :, 0]) / (TOKENS - 1 + TOKENS**0.5) * TOKENS
    np.testing.assert_allclose(wpr_scores(a, 1, initial_signal(TOKENS)), blend, rtol=1e-5)


def test_permuted_patches_have_permuted_scores():
    a, order = np.asarray(attention(5)), np.array([0, 4, 2, 6, 1, 5, 3])
    permuted = a[:, :, order][:, :, :, order]
    found = wpr_scores(permuted, 5, initial_signal(TOKENS))
    np.testing.assert_allclose(found, np.asarray(wpr_scores(a, 5, initial_signal(TOKENS)))[:, :, order], rtol=1e-5)


def test_hidden_tokens_are_as_absent_ones():
    a, alive = np.asarray(attention(6)), np.array([[True, True, False, True, False, True, True]])
    here = np.flatnonzero(alive[0])
    small = a[:, :, here][:, :, :, here]
    small = small / small.sum(-1, keepdims=True)
    hidden = np.asarray(wpr_scores(a, 4, quickly(living_signal)(alive), alive=alive))
    np.testing.assert_allclose(hidden[..., here], wpr_scores(small, 4, initial_signal(len(here))), rtol=1e-5)
    assert not hidden[0][:, ~alive[0]].any()
    np.testing.assert_allclose(np.sum(quickly(restrict)(a, alive), -1)[..., here], 1, rtol=1e-6)
    merged = np.asarray(aggregate_heads(hidden, var_range=(0.3, 0.5), alive=alive))[:, here]
    plain = aggregate_heads(hidden[..., here], var_range=(0.3, 0.5))
    np.testing.assert_allclose(merged, plain, rtol=1e-5)


def test_temperature_sharpens_attention():
    logits = np.random.default_rng(7).normal(size=(1, 2, TOKENS, TOKENS))
    soft, sharp = (jax.nn.softmax(jnp.asarray(logits, jnp.float32) / t, -1) for t in (1.0, 0.5))
    np.testing.assert_allclose(wpr_scores(soft, 1, even(), 0.5), wpr_scores(sharp, 1, even()), rtol=1e-4)


def test_half_precision_attention_is_summed_in_full_precision():
    a = attention(8, n=64).astype(jnp.bfloat16)
    found = wpr_scores(a, 1, even(64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, a.astype(jnp.float32).sum(2), rtol=1e-5)


def test_a_token_crucial_to_one_head_beats_one_mediocre_in_all():
    scores = jnp.array([[[1.0, 0.5], [0.0, 0.5]]])
    np.testing.assert_allclose(aggregate_heads(scores), [[0.5**0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(aggregate_heads(scores, "mean"), [[0.5, 0.5]])


def test_heads_that_vary_too_little_or_too_much_are_left_out():
    n = 197
    wave = 1 + 0.2**0.5 * np.where(np.arange(n) % 2, 1.0, -1.0)  # variance 0.2
    flat, single = np.ones(n), np.eye(n)[3] * n
    assert single.var() == pytest.approx(n - 1) and (single / n).var() < 0.01  # the wrong scale rejects all heads
    passing = np.stack([flat, wave, single])[None].astype(np.float32)
    np.testing.assert_allclose(aggregate_heads(passing, var_range=(0.01, 0.7)), wave[None], rtol=1e-5)
    none = np.stack([flat, single])[None].astype(np.float32)
    np.testing.assert_allclose(aggregate_heads(none, var_range=(0.01, 0.7)), aggregate_heads(none), rtol=1e-6)
    both = aggregate_heads(np.concatenate([passing, np.concatenate([none, none[:, :1]], 1)]), var_range=(0.01, 0.7))
    np.testing.assert_allclose(both[0], wave, rtol=1e-5)  # each image has its own heads
    np.testing.assert_allclose(both[1], aggregate_heads(np.concatenate([none, none[:, :1]], 1))[0], rtol=1e-5)
    np.testing.assert_allclose(aggregate_heads(passing, "mean", (0.01, 250.0)), passing[:, 1:].mean(1), rtol=1e-5)
    random = np.random.default_rng(0).gamma(1.0, size=(4, 9))
    np.testing.assert_allclose(
        aggregate_heads(jnp.asarray(random[None], jnp.float32), var_range=(0.5, 1.0))[0],
        one_score(random, (0.5, 1.0)), rtol=1e-5,
    )  # fmt: skip


def test_errors():
    with pytest.raises(ValueError, match="0 iterations"):
        wpr_scores(attention(0), 0, even())
    with pytest.raises(ValueError, match="temperature is 0"):
        wpr_scores(attention(0), 1, even(), 0.0)
    with pytest.raises(ValueError, match="'rms' or 'mean'"):
        aggregate_heads(jnp.ones((1, 2, 3)), "max")
