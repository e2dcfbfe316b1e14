"""Taps: statistics of activations against activations computed by hand, in every control flow, on any split of a batch."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_devices import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import normal

import jprune
from jprune.tracing import taps

LAYERS = 3
PARAMS = {
    "conv": normal(0, 3, 3, 2, 4),
    "bias": normal(1, 4),
    "rows": normal(2, 16, 6),
    "up": normal(3, LAYERS, 6, 8),
    "down": normal(4, LAYERS, 8, 6),
    "head": normal(5, 6, 2),
}
X = normal(9, 12, 2, 2, 2)


def conv(x, k):
    return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def plain(p, x):
    """Convolution, flattening, a loop over stacked layers, a head; with the activations at every product."""
    seen = {"conv": (x, conv(x, p["conv"]))}
    h = jax.nn.relu(seen["conv"][1] + p["bias"]).reshape(x.shape[0], -1)
    seen["rows"] = (h, h @ p["rows"])
    h = seen["rows"][1]
    ups, downs = [], []
    for up, down in zip(p["up"], p["down"], strict=True):
        ups.append((h, h @ up))
        hidden = jax.nn.relu(ups[-1][1])
        downs.append((hidden, hidden @ down))
        h = h + downs[-1][1]
    seen["up"], seen["down"] = ups, downs
    seen["head"] = (h, h @ p["head"])
    return seen["head"][1], seen


def scanned(p, x):
    h = jax.nn.relu(conv(x, p["conv"]) + p["bias"]).reshape(x.shape[0], -1) @ p["rows"]

    def layer(h, w):
        return h + jax.nn.relu(h @ w[0]) @ w[1], None

    return jax.lax.scan(layer, h, (p["up"], p["down"]))[0] @ p["head"]


def rematerialised(p, x):
    h = jax.jit(lambda k, b, x: jax.nn.relu(conv(x, k) + b))(p["conv"], p["bias"], x)
    h = jax.checkpoint(lambda h, r: h.reshape(h.shape[0], -1) @ r)(h, p["rows"])

    @jax.checkpoint
    def layer(h, w):
        return h + jax.jit(lambda h, w: jax.nn.relu(h @ w[0]) @ w[1])(h, w), None

    return jax.lax.scan(layer, h, (p["up"], p["down"]))[0] @ p["head"]


SEEN = plain(PARAMS, X)[1]
GRAPH = jprune.trace(scanned, PARAMS, X[:4])


def samples(tap, side, layer=None):
    """(samples, features) of an activation computed by hand, in double precision."""
    pair = SEEN[tap] if layer is None else SEEN[tap][layer]
    value = np.asarray(pair[side == "out"], np.float64)
    return value.reshape(-1, value.shape[-1])


HAND = {
    "squares": lambda a: (a**2).sum(0),
    "mean": lambda a: a.mean(0),
    "variance": lambda a: a.var(0),
    "moment": lambda a: a.T @ a / len(a),
    "largest": lambda a: np.abs(a).max(0),
    # a reducer of the user's: share of positive entries, kept as a dict
    "active": lambda a: (a > 0).mean(0),
}
REDUCERS = {
    "squares": taps.sum_of_squares(),
    "mean": taps.mean(),
    "variance": taps.variance(),
    "moment": taps.second_moment(),
    "largest": taps.absolute_maximum(),
    "active": taps.Reducer(
        lambda n: {"on": jnp.zeros(n), "seen": jnp.zeros(())},
        lambda s, a: {"on": s["on"] + (a > 0).sum(0), "seen": s["seen"] + a.shape[0]},
        lambda s: s["on"] / s["seen"][..., None],
    ),
}
STACKED = ("up", "down")


def by_hand(tap, side, name):
    if tap in STACKED:
        return np.stack([HAND[name](samples(tap, side, layer)) for layer in range(LAYERS)])
    return HAND[name](samples(tap, side))


def assert_statistics(found, side, rtol=2e-5):
    assert set(found) == set(SEEN)
    for tap, results in found.items():
        assert set(results) == set(REDUCERS)
        for name, value in results.items():
            want = by_hand(tap, side, name)
            scale = np.abs(want).max()
            np.testing.assert_allclose(value, want, rtol=rtol, atol=rtol * scale, err_msg=f"{tap} {side} {name}")


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("fn", [scanned, rematerialised])
def test_statistics_are_those_of_activations_computed_by_hand(fn, side):
    graph = jprune.trace(fn, PARAMS, X[:4])
    assert_statistics(graph.calibrate(PARAMS, [X], REDUCERS, side=side), side)


def test_a_stream_of_different_batches_is_one_large_batch():
    pieces = [X[:1], X[1:6], X[6:7], X[7:]]
    assert_statistics(GRAPH.calibrate(PARAMS, pieces, REDUCERS), "in")
    assert_statistics(GRAPH.calibrate(PARAMS, iter([(x,) for x in pieces]), REDUCERS), "in")  # tuples of inputs


def test_empty_batches_of_a_stream_change_nothing():
    reducers = {**REDUCERS, "median": taps.quantiles((0.5,))}
    found = GRAPH.calibrate(PARAMS, [X[:0], X[:6], X[6:6], X[6:], X[12:]], reducers)
    want = GRAPH.calibrate(PARAMS, [X[:6], X[6:]], reducers)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    step, states = taps.step_of(GRAPH, reducers)  # and where the steps are the caller's own
    jax.tree.map(np.testing.assert_array_equal, step(states, PARAMS, (X[:0],)), states)
    with pytest.raises(jprune.TraceError, match="no batches: all 2 are empty; pass at least one with samples"):
        GRAPH.calibrate(PARAMS, [X[:0], X[:0]], reducers)


def test_one_compilation_per_batch_shape():
    traces = []

    def update(s, a):
        traces.append(a.shape)  # runs while tracing only
        return s + a.sum(0)

    counting = {"sum": taps.Reducer(jnp.zeros, update)}
    GRAPH.calibrate(PARAMS, [X[i : i + 4] for i in (0, 4, 8)] * 3, counting, ["rows", "head"])
    assert traces == [(4, 16), (4, 6)]
    traces.clear()
    GRAPH.calibrate(PARAMS, [X[:4], X[4:6], X[6:8], X[8:]], counting, ["rows"])
    assert sorted(traces) == [(2, 16), (4, 16)]


def test_only_the_taps_asked_for():
    found = GRAPH.calibrate(PARAMS, [X], {"mean": taps.mean()}, ["bias", "down"])
    assert set(found) == {"bias", "down"}
    np.testing.assert_allclose(found["bias"]["mean"], by_hand("conv", "out", "mean"), rtol=1e-4, atol=1e-6)
    with pytest.raises(jprune.TraceError, match=r"no tap 'dwon'; did you mean 'down'"):
        GRAPH.calibrate(PARAMS, [X], {}, ["dwon"])
    with pytest.raises(jprune.TraceError, match="side must be 'in' or 'out', not 'both'"):
        GRAPH.calibrate(PARAMS, [X], {}, side="both")
    with pytest.raises(jprune.TraceError, match="no batches"):
        GRAPH.calibrate(PARAMS, [], {"mean": taps.mean()})
    with pytest.raises(jprune.TraceError, match="axis 1 of input"):
        GRAPH.calibrate(PARAMS, [jnp.ones((4, 3, 3, 2))], {"mean": taps.mean()})


def test_a_leaf_that_is_used_twice_has_two_taps():
    p = {"w": normal(0, 5, 5)}
    x = normal(1, 7, 5)
    graph = jprune.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], p, x)
    assert set(graph.taps) == {"w#0", "w#1"}
    found = graph.calibrate(p, [x], {"mean": taps.mean()})
    np.testing.assert_allclose(found["w#0"]["mean"], np.mean(x, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["w#1"]["mean"], np.tanh(x @ p["w"]).mean(0), rtol=1e-5, atol=1e-6)


def test_a_shared_leaf_adds_up_over_a_loop():
    p, x = {"w": 0.5 * normal(0, 5, 5)}, normal(1, 7, 5)

    def f(p, x):
        return jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["w"]), x)

    def g(p, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=4)[0]

    h, rows = np.asarray(x, np.float64), []
    for _ in range(4):
        rows.append(h)
        h = np.tanh(h @ np.asarray(p["w"], np.float64))
    rows = np.concatenate(rows)
    for fn in (f, g):
        found = jprune.trace(fn, p, x).calibrate(p, [x], {k: REDUCERS[k] for k in ("mean", "squares")})["w"]
        np.testing.assert_allclose(found["mean"], rows.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["squares"], (rows**2).sum(0), rtol=1e-4)


def test_stacked_layers_inside_a_repeated_loop():
    p, x = {"w": 0.5 * normal(0, 3, 5, 5)}, normal(1, 7, 5)

    def layers(p, h):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["w"])[0]

    graph = jprune.trace(lambda p, x: jax.lax.fori_loop(0, 2, lambda i, h: layers(p, h), x), p, x)
    h, seen = np.asarray(x, np.float64), [[], [], []]
    for _ in range(2):
        for k in range(3):
            seen[k].append(h)
            h = np.tanh(h @ np.asarray(p["w"][k], np.float64))
    want = np.stack([np.concatenate(s).mean(0) for s in seen])
    np.testing.assert_allclose(graph.calibrate(p, [x], {"m": taps.mean()})["w"]["m"], want, rtol=1e-4, atol=1e-6)


def test_branches_count_what_ran():
    p, x = {"a": normal(0, 5, 4), "b": normal(1, 5, 4)}, normal(2, 6, 5)

    def f(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: x @ p["b"])

    graph = jprune.trace(f, p, x)
    batches = [jnp.abs(x), -jnp.abs(x), 2 * jnp.abs(x)]
    found = graph.calibrate(p, batches, {"squares": taps.sum_of_squares()})
    squares = np.asarray(x**2).sum(0)
    np.testing.assert_allclose(found["a"]["squares"], 5 * squares, rtol=1e-5)
    np.testing.assert_allclose(found["b"]["squares"], squares, rtol=1e-5)


def test_half_precision_activations_add_up_in_single_precision():
    p = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    x = jnp.ones((1000, 2), jnp.bfloat16)
    found = jprune.trace(lambda p, x: x @ p["w"], p, x).calibrate(p, [x], REDUCERS)["w"]
    assert all(v.dtype == jnp.float32 for v in found.values())
    np.testing.assert_array_equal(found["squares"], [1000, 1000])  # bfloat16 would stop at 256


def test_variance_survives_a_large_mean():
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(1e4 + rng.normal(size=(64, 3)), jnp.float32) for _ in range(8)]
    p = {"w": jnp.ones((3, 2))}
    found = jprune.trace(lambda p, x: x @ p["w"], p, batches[0]).calibrate(p, batches, {"v": taps.variance()})
    np.testing.assert_allclose(found["w"]["v"], np.concatenate(batches).astype(np.float64).var(0), rtol=1e-2)


QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@functools.cache
def compiled_quantiles(accuracy, **limits):
    """Quantiles of a list of batches; compiled once per accuracy and shapes."""
    reducer = taps.quantiles(QUANTILES, accuracy, **limits)

    def run(batches):
        state = reducer.init(batches[0].shape[1])
        for b in batches:
            state = reducer.update(state, b)
        return reducer.finish(state)

    return jax.jit(run)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    count=st.sampled_from([1, 40]),
    accuracy=st.sampled_from([0.02, 0.3]),
    spread=st.floats(0.1, 4.0),
)
def test_quantiles_are_within_their_accuracy(seed, count, accuracy, spread):
    rng = np.random.default_rng(seed)
    a = (np.exp(spread * rng.normal(size=(count, 3))) * rng.choice([-1, 0, 1], (count, 3))).astype(np.float32)
    got = compiled_quantiles(accuracy)([a[: count // 2], a[count // 2 :]] if count > 1 else [a])
    want = np.quantile(a, QUANTILES, axis=0, method="inverted_cdf")
    assert got.shape == want.shape == (5, 3)
    assert (np.abs(got - want) <= (accuracy + 1e-4) * np.abs(want)).all()


def test_quantiles_through_a_scan():
    found = GRAPH.calibrate(PARAMS, [X[:5], X[5:]], {"q": taps.quantiles((0.25, 0.75), 0.01)}, ["up"])["up"]["q"]
    assert found.shape == (LAYERS, 2, 6)
    for layer in range(LAYERS):
        want = np.quantile(samples("up", "in", layer), (0.25, 0.75), axis=0, method="inverted_cdf")
        np.testing.assert_allclose(found[layer], want, rtol=0.011)


def test_quantiles_clip_and_refuse():
    run = compiled_quantiles(0.02, smallest=1e-2, largest=1e2)
    got = np.asarray(run([np.asarray([[-1e9], [1e-5], [np.inf]], np.float32)]))
    assert got[2, 0] == 0 and got[0, 0] == -got[4, 0] and got[4, 0] == pytest.approx(1e2, rel=0.021)
    for at, accuracy in (((1.5,), 0.1), ((0.5,), 0.0), ((float("nan"),), 0.1)):
        with pytest.raises(ValueError, match="quantiles must be in"):
            taps.quantiles(at, accuracy)


@pytest.mark.parametrize("name", [*(n for n in REDUCERS if n != "active"), "quantiles"])
def test_nan_activations_are_not_hidden(name):
    reducer = taps.quantiles((0.5,)) if name == "quantiles" else REDUCERS[name]
    x = X.at[5, 0, 0, 1].set(jnp.nan)
    params = {k: PARAMS[k] for k in ("conv",)}
    graph = jprune.trace(lambda p, x: conv(x, p["conv"]), params, X)
    value = np.asarray(graph.calibrate(params, [x[:4], x[4:]], {"r": reducer})["conv"]["r"])
    assert np.isnan(value[..., 1]).all()
    assert np.isfinite(value.ravel()[0])  # the other feature is not touched


def test_reducers_are_plain_data():
    assert [f.name for f in dataclasses.fields(taps.Reducer)] == ["init", "update", "finish"]
    last = taps.Reducer(lambda n: jnp.zeros(n), lambda s, a: a[-1])  # no finish: the state is the result
    np.testing.assert_array_equal(GRAPH.calibrate(PARAMS, [X], {"last": last}, ["conv"])["conv"]["last"], X[-1, -1, -1])


SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import test_taps as t
from jprune.tracing import taps

assert jax.device_count() == 4
mesh = Mesh(np.array(jax.devices()), ("data",))
reducers = {"moment": taps.second_moment(), "quantiles": taps.quantiles((0.1, 0.5, 0.9))}
places = ["conv", "up", "head"]
params = jax.device_put(t.PARAMS, NamedSharding(mesh, P()))
batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (t.X[:4], t.X[4:])]
assert len(batches[0].sharding.device_set) == 4
four = t.GRAPH.calibrate(params, batches, reducers, places)
split = dict(params, up=jax.device_put(t.PARAMS["up"], NamedSharding(mesh, P(None, None, "data"))))
split["down"] = jax.device_put(t.PARAMS["down"], NamedSharding(mesh, P(None, "data")))
model = t.GRAPH.calibrate(split, batches, reducers, places)
one = t.GRAPH.calibrate(t.PARAMS, [t.X[:4], t.X[4:]], reducers, places)

def apart(a, b):
    return max(
        float(np.abs(np.asarray(u, np.float64) - np.asarray(v, np.float64)).max() / max(np.abs(np.asarray(v)).max(), 1e-9))
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

print(json.dumps({"data": apart(four, one), "model": apart(model, one), "leaves": len(jax.tree.leaves(one))}))
"""


def test_four_devices_see_what_one_sees():
    here = Path(__file__).parent
    result = run_script(SCRIPT, here, here.parent)
    assert result["leaves"] == 3 * 2
    assert result["data"] <= 2e-5 and result["model"] <= 2e-5, result
