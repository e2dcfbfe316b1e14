"""Gathers, scatters and dynamic slices, as vmap makes them: what is taken whole is followed, what data says is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, check_values, members, normal

import jprune

IDS = jnp.array([1, 2, 0, 3])
ROWS = jnp.array([2, 0])
X = normal(99, 2, 6)
OUT = normal(2, 8, 3)
TABLE = {"table": normal(0, 9, 8), "out": OUT}
DENSE = {"k": normal(0, 6, 8), "out": OUT}


def rows_of(p, ids, index):
    return jax.nn.relu(jax.vmap(lambda i: index(p["table"], i))(ids)) @ p["out"]


@pytest.mark.parametrize(
    "index",
    [
        lambda t, i: t[i],
        lambda t, i: jax.lax.dynamic_index_in_dim(t, i, keepdims=False),
        lambda t, i: jax.lax.dynamic_slice(t, (i, 0), (2, 8)).sum(0),
        lambda t, i: jax.vmap(lambda j: t[j])(jnp.stack([i, i + 1])).sum(0),
        lambda t, i: jnp.take(t, i[None], axis=0, mode="clip")[0],
    ],
    ids=["index", "dynamic_index", "dynamic_slice", "vmap twice", "take"],
)
def test_a_batched_lookup_takes_channels_whole(index):
    graph = check_values(functools.partial(rows_of, index=index), TABLE, (IDS,))
    assert members(graph, "table:1") == {("table", 1), ("out", 0)} and graph.groups["table:1"].exact
    assert graph.leaves["table"].frozen[0].code == "DATA_INDEXED"


def test_a_batched_table_is_looked_up_along_batching_dimensions():
    """vmap over both the operand and the index: heads of a table, each with an index of its own."""
    params = {"t": normal(0, 4, 5, 8), "out": normal(1, 4, 8, 3)}

    def f(p, ids):
        return jnp.einsum("hc,hco->o", jax.vmap(lambda t, i: jnp.tanh(t[i]))(p["t"], ids), p["out"])

    assert set(check_values(f, params, (IDS,)).groups) == {"t:2"}  # how many ids there are is the input's business
    params = {**params, "at": normal(2, 3, 4)}

    def g(p, x):
        at = jnp.argmax(jnp.stack([x @ p["at"], -(x @ p["at"])]), 0)
        return jnp.einsum("hc,hco->o", jax.vmap(lambda t, i: jnp.tanh(t[i]))(p["t"], at), p["out"])

    graph = check_values(g, params, (normal(3, 3),))
    assert members(graph, "at:1") == {("t", 0), ("out", 0), ("at", 1)}


@pytest.mark.parametrize("how", ["set", "add", "multiply", "max", "min", "subtract"])
@pytest.mark.parametrize("batched", [True, False])
def test_a_write_into_a_cache_takes_channels_whole(how, batched):
    def write(h, i):
        cache = jnp.full((5, 8), 0.0 if how != "multiply" else 1.0) + (0.1 if how == "multiply" else 0)
        return getattr(cache.at[i], how)(h)

    def f(p, x, at):
        h = jnp.tanh(x @ p["k"])
        made = jax.vmap(write)(h, at) if batched else write(h, at)
        return made.sum(-2) @ p["out"]

    graph = check_values(f, DENSE, (X, ROWS))
    assert members(graph, "k:1") == {("k", 1), ("out", 0)} and graph.groups["k:1"].exact
    # in the cache, what is multiplied with zeros was not zero before
    summed = jprune.trace(lambda p, x, at: jax.vmap(write)(x @ p["k"], at).sum(-1), DENSE, X, ROWS)
    assert summed.groups["k:1"].exact == (how != "multiply")


def test_a_batched_dynamic_update_slice():
    def f(p, x, at):
        def write(h, i):
            return jax.lax.dynamic_update_slice(jnp.zeros((5, 8)), h[None], (i, 0))

        return jax.vmap(write)(jax.nn.relu(x @ p["k"]), at).sum(1) @ p["out"]

    check_laws(f, DENSE, (X, ROWS))


def test_a_scatter_into_a_batch_of_channels():
    """Channels are the batch: each is written at a place of its own, and goes with its index."""
    params = {"k": normal(0, 6, 8), "at": normal(1, 6, 8), "out": OUT}

    def f(p, x):
        at = jnp.argmax(jnp.stack([x @ p["at"], -(x @ p["at"])]), 0)
        made = jax.vmap(lambda h, i: jnp.zeros(4).at[i].set(h))(x @ p["k"], at)
        return made.sum(-1) @ p["out"]

    graph = check_values(f, params, (X[0],))
    (group,) = graph.groups
    assert members(graph, group) == {("k", 1), ("at", 1), ("out", 0)} and graph.groups[group].exact


# -- what is filled in where an index points outside ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fill", "exact"), [(0.0, True), (1.0, False), (-2.5, False), (None, True), (np.nan, True)], ids=str
)
def test_rows_filled_with_something_else_than_zero_are_inexact(fill, exact):
    ids = jnp.array([0, 7, 1]) if fill is not None and fill == fill else jnp.array([0, 2, 1])

    def f(p, ids):
        return (p["table"][:3].at[ids].get(mode="fill", fill_value=fill) ** 2).sum(-1)

    graph = jprune.trace(f, TABLE, ids)
    assert graph.groups["table:1"].exact == exact
    if exact:
        check_values(f, TABLE, (ids,), graph=graph)
    # a product with a kernel that is cut as well is exact whatever is filled in
    check_values(lambda p, ids: p["table"].at[ids].get(mode="fill", fill_value=fill) @ p["out"], TABLE, (ids,))


def test_integers_are_filled_with_their_smallest_number():
    params = {"table": jnp.arange(24).reshape(3, 8)}
    graph = jprune.trace(lambda p, ids: p["table"].at[ids].get(mode="fill").sum(-1), params, jnp.array([0, 7]))
    assert not graph.groups["table:1"].exact
    kept = jprune.trace(lambda p, ids: p["table"].at[ids].get(mode="clip").sum(-1), params, jnp.array([0, 7]))
    assert kept.groups["table:1"].exact


def test_an_index_that_data_says_freezes_its_axis():
    def f(p, x, at):
        h = x @ p["k"]
        return jnp.take_along_axis(h, at[:, None], axis=1) * p["out"][0, 0]

    graph = jprune.trace(f, DENSE, X, ROWS)
    assert "k:1" not in graph.groups and graph.leaves["k"].frozen[1].code == "DATA_INDEXED"


# -- ragged_dot: experts whose rows are counted by data ---------------------------------------------------------------

TOKENS = normal(7, 9, 6)
SIZES = jnp.array([3, 4, 2], jnp.int32)
EXPERTS = {"up": normal(0, 3, 6, 8), "down": normal(1, 3, 8, 4), "head": normal(2, 4, 2)}


def experts(p, x, sizes):
    h = jax.nn.relu(jax.lax.ragged_dot(x, p["up"], sizes))
    return jax.lax.ragged_dot(h, p["down"], sizes) @ p["head"]


def test_hidden_channels_of_experts_are_units_and_experts_are_not():
    graph = check_laws(experts, EXPERTS, (TOKENS, SIZES))
    assert members(graph, "up:2") == {("up", 2), ("down", 1)} and members(graph, "down:2") == {("down", 2), ("head", 0)}
    assert graph.leaves["up"].frozen[0].code == "DATA_INDEXED" and "group_sizes" in graph.leaves["up"].frozen[0].detail
    # every row meets one expert
    assert graph.cost().macs == 9 * 6 * 8 + 9 * 8 * 4 + 9 * 4 * 2


def test_rows_of_a_ragged_product_may_change_from_call_to_call():
    keep = {"up:2": np.arange(8) < 5}
    graph = jprune.trace(experts, EXPERTS, TOKENS, SIZES)
    more, sizes = normal(8, 11, 6), jnp.array([1, 8, 2], jnp.int32)
    got = jax.jit(graph.replay(keep))(graph.compact(EXPERTS, keep), more, sizes)
    np.testing.assert_allclose(got, experts(graph.mask(EXPERTS, keep), more, sizes), rtol=1e-5, atol=1e-6)


def test_statistics_are_read_at_experts():
    from jprune.tracing import taps

    stats = jprune.trace(experts, EXPERTS, TOKENS, SIZES).calibrate(
        EXPERTS, [(TOKENS, SIZES)], {"squares": taps.sum_of_squares()}, ["down"]
    )
    want = jax.nn.relu(jax.lax.ragged_dot(TOKENS, EXPERTS["up"], SIZES))
    np.testing.assert_allclose(stats["down"]["squares"], (want**2).sum(0), rtol=1e-5)


def ragged(lhs, rhs, sizes, contract, batch, rows, groups):
    numbers = jax.lax.RaggedDotDimensionNumbers((contract, batch), rows, groups)
    return jax.lax.ragged_dot_general(lhs, rhs, sizes, numbers)


def test_a_ragged_sum_gives_one_product_per_group():
    """The gradient of experts: positions are summed in runs."""
    params = {"a": normal(0, 6, 8), "b": normal(1, 6, 5), "out": normal(2, 3, 8, 5)}

    def f(p, x, sizes):
        made = ragged(x @ p["a"], x @ p["b"], sizes, ((0,), (0,)), ((), ()), [0], [])
        return (jnp.tanh(made) * p["out"]).sum((1, 2))

    graph = check_values(f, params, (TOKENS, SIZES))
    assert members(graph, "a:1") == {("a", 1), ("out", 1)} and members(graph, "b:1") == {("b", 1), ("out", 2)}
    assert graph.cost().macs == 9 * 6 * 8 + 9 * 6 * 5 + 9 * 8 * 5


def test_a_ragged_batch():
    params = {"a": normal(0, 6, 8), "b": normal(1, 9, 8, 5), "out": normal(2, 5, 2)}

    def f(p, x, sizes):
        h = jnp.tanh(x @ p["a"])[:, None]
        return ragged(h, p["b"], sizes, ((2,), (1,)), ((0,), (0,)), [0], [])[:, 0] @ p["out"]

    graph = check_values(f, params, (TOKENS, SIZES))
    assert members(graph, "a:1") == {("a", 1), ("b", 1)} and members(graph, "b:2") == {("b", 2), ("out", 0)}
    assert graph.cost().macs == 9 * 6 * 8 + 9 * 8 * 5 + 9 * 5 * 2


# -- looking without touching -----------------------------------------------------------------------------------------


def test_looking_at_a_value_freezes_nothing_and_sees_the_pruned_one():
    seen = []

    def f(p, x):
        def layer(h, w):
            jax.debug.callback(lambda v: seen.append(v.shape), h)
            return jax.nn.relu(h), None

        h = jax.nn.relu(x @ p["k"])
        jax.debug.print("largest {}", h.max())
        h, _ = jax.lax.scan(layer, h, None, length=1)
        return h @ p["out"]

    graph = check_values(f, DENSE, (X,), keep={"k:1": np.arange(8) < 5})
    jax.effects_barrier()
    assert members(graph, "k:1") == {("k", 1), ("out", 0)} and graph.groups["k:1"].exact
    assert (2, 5) in seen and (2, 8) in seen
