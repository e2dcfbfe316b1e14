"""Layers of a scan that keep different numbers of units: one arrangement turned into another, and what padding costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import normal

import jprune
from jprune.tracing.paths import flatten

LAYERS, WIDTH, HIDDEN = 4, 6, 10
PARAMS = {"up": normal(0, LAYERS, WIDTH, HIDDEN), "down": normal(1, LAYERS, HIDDEN, WIDTH), "head": normal(2, WIDTH, 3)}
X = normal(3, 5, WIDTH)


def model(p, x):
    def layer(x, w):
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, {"up": p["up"], "down": p["down"]})[0] @ p["head"]


GRAPH = jprune.trace(model, PARAMS, X)
KEPT = (2, 2, 7, 5)
(HIDDEN_GROUP,) = [g for g, i in GRAPH.groups.items() if i.layers is not None]
KEEP = {HIDDEN_GROUP: np.stack([np.random.default_rng(i).permutation(HIDDEN) < k for i, k in enumerate(KEPT)])}
MODES = ("pad", "bucket", "unstack")


@pytest.mark.parametrize("source", MODES)
@pytest.mark.parametrize("target", MODES)
def test_one_arrangement_becomes_another(source, target):
    small = GRAPH.compact(PARAMS, GRAPH.decide(KEEP, stacked=source))
    got = flatten(GRAPH.restack(small, KEEP, source=source, target=target))
    want = flatten(GRAPH.compact(PARAMS, GRAPH.decide(KEEP, stacked=target)))
    assert [p for p, _ in got] == [p for p, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_runs_of_equal_layers_share_a_bucket():
    small = GRAPH.compact(PARAMS, GRAPH.decide(KEEP, stacked="bucket"))
    assert [x.shape for x in small["up"]] == [(2, WIDTH, 2), (1, WIDTH, 7), (1, WIDTH, 5)]
    assert GRAPH.compact(PARAMS, GRAPH.decide(KEEP, stacked="pad"))["up"].shape == (LAYERS, WIDTH, max(KEPT))


def test_waste_is_what_padding_multiplies_by_zero():
    useful, padded = (2 * 5 * WIDTH * n for n in (sum(KEPT), LAYERS * max(KEPT)))
    head = 5 * WIDTH * 3
    assert GRAPH.padding_waste(KEEP) == pytest.approx((padded - useful) / (padded + head))
    even = {HIDDEN_GROUP: jnp.arange(HIDDEN) < 4}
    assert GRAPH.padding_waste(even) == GRAPH.padding_waste({}) == 0
