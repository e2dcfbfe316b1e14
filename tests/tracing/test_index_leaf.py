"""Scatter-add by an index that is itself a leaf: its entries and the rows it places are one group, removed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import check_laws, members, normal

import jprune

X = normal(99, 5, 6)


def placed(p, x):
    """A narrow branch added to chosen columns of a wide one."""
    main = (x @ p["main"]) * p["scale"]
    wide = (x @ p["wide"]).at[..., p["kept"]].add(main)
    return jax.nn.relu(wide) @ p["out"]


def weights(rows=8, columns=12, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "main": normal(seed, 6, rows),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, rows), jnp.float32),
        "kept": jnp.asarray(rng.permutation(columns)[:rows], jnp.int32),
        "wide": normal(seed + 1, 6, columns),
        "out": normal(seed + 2, columns, 3),
    }


@pytest.mark.smoke
def test_the_index_is_cut_with_the_rows_and_the_operand_stays():
    graph = check_laws(placed, weights(), (X,), gradients=False)
    assert set(graph.groups) == {"main:1"} and graph.groups["main:1"].exact
    assert members(graph, "main:1") == {("main", 1), ("scale", 0), ("kept", 0)}
    for leaf, axis in (("wide", 1), ("out", 0)):
        assert graph.leaves[leaf].frozen[axis].code == "DATA_INDEXED"
    keep = {"main:1": np.asarray([True, False] * 4)}
    small = graph.compact(weights(), keep)
    np.testing.assert_array_equal(small["kept"], weights()["kept"][::2])
    assert small["kept"].dtype == jnp.int32 and small["wide"].shape == (6, 12)


def test_all_rows_may_go():
    graph = jprune.trace(placed, weights(), X)
    keep = {"main:1": np.zeros(8, bool)}
    small = graph.compact(weights(), graph.decide(keep, allow_empty=True))
    assert small["kept"].shape == (0,)
    run = graph.replay(graph.decide(keep, allow_empty=True))
    p = weights()
    np.testing.assert_allclose(run(small, X), jax.nn.relu(X @ p["wide"]) @ p["out"], rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(1, 12),
    where=st.sampled_from(["last", "first", "middle"]),
    seed=st.integers(0, 99),
)
def test_any_axis_any_index_repeated_entries_too(rows, columns, where, seed):
    """Against a sum written out by hand, over indices that may repeat and be negative."""
    rng = np.random.default_rng(seed)
    axis = {"last": 2, "first": 0, "middle": 1}[where]
    p = {
        "w": normal(seed, 6, rows),
        "kept": jnp.asarray(rng.integers(-columns, columns, rows), jnp.int32),
    }

    def fn(p, x):
        main = jnp.moveaxis(jnp.stack([x @ p["w"], jnp.tanh(x @ p["w"])]), -1, axis)
        shape = [*main.shape]
        shape[axis] = columns
        return jnp.zeros(shape).at[(slice(None),) * axis + (p["kept"],)].add(main)

    graph = jprune.trace(fn, p, X)
    assert members(graph, "w:1") == {("w", 1), ("kept", 0)} and graph.groups["w:1"].exact
    keep = {"w:1": rng.random(rows) < 0.6}
    small = graph.compact(p, graph.decide(keep, allow_empty=True))
    got = np.moveaxis(graph.replay(graph.decide(keep, allow_empty=True))(small, X), axis, -1)
    want = np.zeros((2, 5, columns))
    for i in np.flatnonzero(keep["w:1"]):
        column = np.asarray(X @ p["w"])[:, i]
        want[:, :, int(p["kept"][i])] += np.stack([column, np.tanh(column)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_zero_when_masked_are_inexact():
    """exp(0) = 1: masking adds ones where removing adds nothing."""
    graph = jprune.trace(lambda p, x: jnp.zeros((5, 12)).at[:, p["kept"]].add(jnp.exp(x @ p["main"])),
                         {k: weights()[k] for k in ("main", "kept")}, X)  # fmt: skip
    assert not graph.groups["main:1"].exact and "scatter-add" in graph.groups["main:1"].notes[0]


@pytest.mark.parametrize("method", ["set", "multiply", "max", "min"])
def test_other_scatters_stay_frozen(method):
    """Removing a row that is written, multiplied or compared is not the same as a zero row."""

    def fn(p, x):
        return getattr((x @ p["wide"]).at[..., p["kept"]], method)((x @ p["main"]) * p["scale"]) @ p["out"]

    graph = jprune.trace(fn, weights(), X)
    assert "main:1" not in graph.groups
    assert graph.leaves["kept"].frozen[0].code == graph.leaves["main"].frozen[1].code == "DATA_INDEXED"


def test_an_index_from_the_data_frees_its_batch_but_no_parameter():
    def pooled(p, x, segment):
        return jnp.zeros((4, 8)).at[segment].add(x @ p["main"]) @ p["out"][:8]

    graph = jprune.trace(pooled, weights(), X, jnp.zeros(5, jnp.int32))
    np.testing.assert_allclose(
        graph.dense(weights(), X[:3], jnp.asarray([0, 1, 1])),
        pooled(weights(), X[:3], jnp.asarray([0, 1, 1])), rtol=1e-6, atol=1e-6)  # fmt: skip
