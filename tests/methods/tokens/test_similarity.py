"""Near-duplicates: who is compared with whom, by what, and which tokens go; the masked form against the gathering one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_zero_tprune import duplicates, order_of
from quickly import quickly

from jprune.methods.tokens import similarity as of
from jprune.methods.tokens.similarity import PARTITIONS, features
from jprune.models.token_hook import Seen

N, WIDTH = 10, 4
partition_tokens = quickly(of.partition_tokens, "mode", "special")
similarity = quickly(of.similarity, "metric")
similarity_prune = quickly(of.similarity_prune, "r", "partition", "metric", "special")
similar_alive = quickly(of.similar_alive, "partition", "metric", "special")


def example(seed, batch=2, n=N):
    rng = np.random.default_rng(seed)
    score, feats = rng.uniform(size=(batch, n)), rng.normal(size=(batch, n, WIDTH))
    return jnp.asarray(score, jnp.float32), jnp.asarray(feats, jnp.float32)


def test_parts_by_importance():
    score = jnp.array([[9.0, 1.0, 5.0, 3.0, 4.0, 2.0]])  # order of the patches: 2 4 3 5 1
    parts = {
        mode: tuple(p[0].tolist() for p in partition_tokens(score, mode)) for mode in PARTITIONS if mode != "random"
    }
    assert parts == {
        "seq_u": ([5, 1], [2, 4, 3]),
        "seq_i": ([2, 4], [3, 5, 1]),
        "alternate": ([4, 5], [2, 3, 1]),
        "full": ([2, 4, 3, 5, 1],) * 2,
    }
    first, second = partition_tokens(score, "random", 2, jax.random.key(0))
    assert sorted([*first[0].tolist(), *second[0].tolist()]) == [2, 3, 4, 5] and first.shape == (1, 2)
    again = [partition_tokens(score, "random", 2, jax.random.key(k))[0][0].tolist() for k in range(6)]
    assert len({tuple(sorted(a)) for a in again}) > 1
    equal = partition_tokens(jnp.ones((1, 5)), "seq_u")
    assert [p[0].tolist() for p in equal] == [[3, 4], [1, 2]]  # of equals the first is the more important one


def test_planted_duplicates_go_first_and_scale_does_not_matter():
    score, feats = example(0, 1)
    order = order_of(np.asarray(score[0]), 1)
    twins = order[-1], order[-3]  # of the less important half
    feats = np.array(feats)
    feats[0, twins[0]], feats[0, twins[1]] = 7 * feats[0, order[0]], 0.1 * feats[0, order[1]]
    kept = similarity_prune(score, feats, 2)
    assert sorted(set(range(N)) - set(kept[0].tolist())) == sorted(twins)
    scale = np.linspace(0.1, 9, N, dtype=np.float32)[None, :, None]
    for r in (1, 2, 4):
        assert similarity_prune(score, scale * feats, r).tolist() == similarity_prune(score, feats, r).tolist()


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([1, 4]), st.sampled_from([0, 1]))
def test_against_plain_loops_and_masked(seed, r, special):
    score, feats = example(seed)
    kept = similarity_prune(score, feats, r, special=special)
    assert kept.shape == (2, N - r)
    for i in range(2):
        gone = duplicates(np.asarray(score[i]), np.asarray(feats[i], np.float64), r, special)
        assert sorted(set(range(N)) - set(kept[i].tolist())) == sorted(gone)
        important, n = order_of(np.asarray(score[i]), special), N - special
        assert not set(gone) & {*range(special), *important[: n - n // 2]}


@pytest.mark.parametrize("partition", PARTITIONS)
def test_masked_form_drops_the_same(partition):
    score, feats = example(3)
    key, everyone = jax.random.key(1), jnp.ones((2, N), bool)
    for r in (0, 3):
        kept = similarity_prune(score, feats, r, partition, key=key)
        alive = similar_alive(score, feats, r, everyone, partition, key=key)
        assert [np.flatnonzero(a).tolist() for a in alive] == kept.tolist()
    if partition == "random":
        return  # what is drawn depends on how many there are
    # the dead are as absent ones: the third image has six patches, and half of them at most go
    score, feats = np.asarray(score), np.asarray(feats)
    alive = np.array([[True] * 3 + [False] * 3 + [True] * 4])
    here = np.flatnonzero(alive[0])
    for r in (2, 5):
        left = similar_alive(score[:1], feats[:1], r, alive, partition)
        kept = similarity_prune(score[:1, here], feats[:1, here], min(r, 3), partition)
        assert np.flatnonzero(left[0]).tolist() == here[np.asarray(kept[0])].tolist()


def test_measures():
    a, b = (jnp.asarray(np.random.default_rng(k).normal(size=(1, 3 + k, WIDTH)), jnp.float32) for k in (0, 1))
    difference = np.abs(np.asarray(a)[:, :, None] - np.asarray(b)[:, None])
    np.testing.assert_allclose(similarity(a, b, "l1"), -difference.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(similarity(a, b, "l2"), -((difference**2).sum(-1) ** 0.5), rtol=1e-5)
    np.testing.assert_allclose(similarity(a, b, 3.0), -((difference**3).sum(-1) ** (1 / 3)), rtol=1e-5)
    np.testing.assert_allclose(similarity(a, b, "linf"), -difference.max(-1), rtol=1e-5)
    inner = np.einsum("bnc,bmc->bnm", a, b)
    np.testing.assert_allclose(similarity(a, b, "dot"), inner, rtol=1e-5, atol=1e-6)
    lengths = np.linalg.norm(a, axis=-1)[:, :, None] * np.linalg.norm(b, axis=-1)[:, None]
    np.testing.assert_allclose(similarity(a, b), inner / lengths, rtol=1e-4, atol=1e-6)
    assert np.isfinite(similarity(jnp.zeros((1, 2, 3)), b[..., :3])).all()


def test_what_tokens_are_compared_by():
    q, k, v = (jnp.arange(24.0).reshape(1, 3, 2, 4) + 100 * i for i in range(3))
    seen, x = Seen(None, q, k, v, 1), jnp.ones((1, 3, 5))
    assert features(seen, x).tolist() == k.reshape(1, 3, 8).tolist()
    assert features(seen, x, "query", "mean").tolist() == q.mean(2).tolist()
    assert features(seen, x, "value").tolist() == v.reshape(1, 3, 8).tolist()
    assert features(seen, x, "x") is x


def test_errors():
    score, feats = example(0)
    with pytest.warns(UserWarning, match="half of 9 patches can be removed as duplicates: 7 becomes 4"):
        assert similarity_prune(score, feats, 7).shape == (2, N - 4)
    with pytest.raises(ValueError, match="-1 tokens"):
        similarity_prune(score, feats, -1)
    with pytest.raises(ValueError, match="partition must be one of seq_u"):
        similarity_prune(score, feats, 1, "halves")
    with pytest.raises(ValueError, match="needs a key"):
        similarity_prune(score, feats, 1, "random")
    for metric in ("euclid", 0.5):
        with pytest.raises(ValueError, match="metric must be"):
            similarity(feats, feats, metric)
    seen = Seen(None, feats[:, :, None], feats[:, :, None], feats[:, :, None], 1)
    with pytest.raises(ValueError, match="feature must be"):
        features(seen, feats, "keys")
    with pytest.raises(ValueError, match="head_reduce must be"):
        features(seen, feats, "key", "sum")
