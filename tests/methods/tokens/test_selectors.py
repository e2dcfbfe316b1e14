"""Every selector against loops in numpy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.methods.tokens import visual_selectors as selectors
from jprune.methods.tokens.divprune import divprune_select
from jprune.methods.tokens.visual_selectors import outlier_count, prumerge_attention
from jprune.models.token_hook import Aux

M, D, HEADS, HEAD = 40, 6, 2, 3
ATOL = 1e-5


@functools.cache
def scene(seed=0):
    """(features, aux) as numpy float32."""
    rng = np.random.default_rng(seed)
    attention = rng.dirichlet(np.full(M + 1, 0.3), HEADS)[:, 1:]

    def draw(*s):
        return rng.normal(size=s).astype(np.float32)

    aux = Aux(attention.astype(np.float32), draw(D), draw(HEADS, M, HEAD), 3 * draw(6), draw(6), draw(M, 6))
    return draw(M, D), aux


@functools.cache
def inputs(seed=0):
    features, aux = scene(seed)
    return jnp.asarray(features), Aux(*(None if a is None else jnp.asarray(a) for a in aux))


def test_controls():
    x, aux = scene()
    features, given = inputs()
    assert selectors.uniform_grid(features, given, 4).tolist() == [0, 10, 20, 30]
    assert selectors.uniform_grid(features, given, 7).tolist() == [0, 5, 11, 17, 22, 28, 34]
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(1))
    assert selectors.norm_topk(features, given, 9).tolist() == np.argsort(-norms)[:9].tolist()
    total = aux.cls_attention.astype(np.float64).sum(0)
    assert selectors.cls_attention(features, given, 9).tolist() == np.argsort(-total)[:9].tolist()
    np.testing.assert_array_equal(selectors.divprune(features, given, 5), divprune_select(features, 5).order)


def test_chance_is_uniform_and_repeatable():
    features, aux = inputs()
    keys = jax.random.split(jax.random.key(0), 400)
    draw = jax.jit(jax.vmap(lambda key: selectors.random(features, aux._replace(key=key), 10)))
    chosen = np.asarray(draw(keys))
    assert all(len(set(row)) == 10 for row in chosen.tolist())
    times = np.bincount(chosen.ravel(), minlength=M)
    assert times.sum() == 4000 and times.min() > 60 and times.max() < 150  # 100 each, deviation 9
    np.testing.assert_array_equal(chosen, draw(keys))


def zip_by_loop(x, aux, k, contextual):
    x, keys = x.astype(np.float64), aux.keys.astype(np.float64).mean(0)
    total = aux.cls_attention.astype(np.float64).sum(0)
    best = sorted(sorted(range(M), key=lambda i: -total[i])[: k - contextual - 1])
    out, index = [aux.cls_feature.astype(np.float64), *(x[i] for i in best)], [-1, *best]
    rest = [i for i in range(M) if i not in best]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    taken = {t: [] for t in targets}
    for i in rest:
        if i in targets:
            continue
        cosine = [keys[i] @ keys[t] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[t]) for t in targets]
        taken[targets[int(np.argmax(cosine))]].append(x[i])
    for t in targets:
        out.append(x[t] + (np.mean(taken[t], 0) if taken[t] else 0))
    return np.stack(out), index + targets


def together(select, *scenes):
    """The selector under jit and vmap, over several images."""
    batch = jax.tree.map(lambda *a: jnp.stack(a), *(inputs(s) for s in scenes))
    return jax.jit(jax.vmap(select))(*batch)


@pytest.mark.parametrize("k, contextual", [(16, 4), (41, 5)])
def test_visionzip(k, contextual):
    got = together(lambda f, a: selectors.visionzip(f, a, k, contextual), 1, 2)
    for b, seed in enumerate((1, 2)):
        want, index = zip_by_loop(*scene(seed), k, contextual)
        assert got.index[b].tolist() == index and got.features.shape == (2, k, D)
        np.testing.assert_allclose(got.features[b], want, atol=ATOL)


def test_visionzips_shares():
    """10 of 64 are merged: with none merged all tokens are the tower's own."""
    features, aux = inputs(1)
    zipped = jax.jit(selectors.visionzip, static_argnums=(2, 3))
    got = zipped(features, aux, 32)
    np.testing.assert_allclose(got.features, zip_by_loop(*scene(1), 32, 5)[0], atol=ATOL)
    plain = zipped(features, aux, 10, 0)
    np.testing.assert_array_equal(plain.features[0], aux.cls_feature)
    np.testing.assert_array_equal(plain.features[1:], features[plain.index[1:]])
    with pytest.raises(ValueError, match="cannot be had of 40 patches"):
        selectors.visionzip(features, aux, 45, 5)


def merge_by_loop(x, aux, kept, attention):
    x, keys = x.astype(np.float64), aux.last_keys.astype(np.float64)
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    out = []
    for i in kept:
        others = sorted((j for j in range(M) if j != i), key=lambda j: -(keys[i] @ keys[j]))[:32]
        out.append(x[i] + sum(attention[j] * x[j] for j in others))
    out.append(sum(attention[j] * x[j] for j in range(M) if j not in kept))
    return np.stack(out)


def attention_by_loop(aux):
    every = np.concatenate([aux.last_key[None], aux.last_keys]).astype(np.float64)
    weights = np.exp(every @ aux.last_query.astype(np.float64) / np.sqrt(6))
    return (weights / weights.sum())[1:]


def test_prumerge():
    count = outlier_count(attention_by_loop(scene(2)[1]))
    got = together(lambda f, a: (selectors.prumerge(f, a, count), prumerge_attention(a)), 1, 2)
    for b, seed in enumerate((1, 2)):
        attention = attention_by_loop(scene(seed)[1])
        np.testing.assert_allclose(got[1][b], attention, atol=1e-6)
        kept = sorted(np.argsort(-attention)[:count].tolist())
        assert got[0].index[b].tolist() == [*kept, -1]
        np.testing.assert_allclose(got[0].features[b], merge_by_loop(*scene(seed), kept, attention), atol=ATOL)


def test_prumerges_own_count_is_that_of_outliers():
    attention = attention_by_loop(scene(2)[1])
    a = np.sort(attention)[[9, 10, 29, 30]]
    low, high = a[0] + 0.75 * (a[1] - a[0]), a[2] + 0.25 * (a[3] - a[2])
    count = outlier_count(attention)
    assert count == sum(a > high + 1.5 * (high - low) for a in attention) and 1 < count < 12
    assert outlier_count(np.ones(8)) == 1


def test_prumerge_plus_adds_evenly_spaced_tokens():
    attention = attention_by_loop(scene(2)[1])
    got = jax.tree.map(lambda a: a[0], together(lambda f, a: selectors.prumerge_plus(f, a, 12, 5), 2))
    spaced = [0, 8, 16, 24, 32]
    best = [i for i in np.argsort(-attention).tolist() if i not in spaced][:7]
    kept = sorted(spaced + best)
    assert got.index.tolist() == [*kept, -1]
    np.testing.assert_allclose(got.features, merge_by_loop(*scene(2), kept, attention), atol=ATOL)
    halves = together(lambda f, a: selectors.prumerge_plus(f, a, 12), 2).index[0].tolist()
    assert {i * 40 // 6 for i in range(6)} <= set(halves)


def test_errors_name_what_is_missing():
    features, aux = inputs()
    for name, field in (
        ("random", "key"), ("cls_attention", "cls_attention"), ("visionzip", "cls_attention"), ("prumerge", "last_query"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} needs aux.{field}"):
            getattr(selectors, name)(features, Aux(), 4)
    for name in ("random", "uniform_grid", "norm_topk", "divprune", "prumerge", "prumerge_plus"):
        with pytest.raises(ValueError, match="1 to 40"):
            getattr(selectors, name)(features, aux._replace(key=jax.random.key(0)), 41)
    with pytest.raises(ValueError, match="0 to 4 can be evenly"):
        selectors.prumerge_plus(features, aux, 4, 5)
