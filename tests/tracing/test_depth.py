"""Deep networks: nothing recurses along the depth, and the work grows with the size of the network, not faster."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def residual(n):
    def f(p, x):
        x = x @ p["in"]
        for i in range(n):
            x = x + jax.nn.relu(x @ p[f"up{i}"]) @ p[f"down{i}"]
        return x @ p["out"]

    layers = {f"up{i}": shape(4, 8) for i in range(n)} | {f"down{i}": shape(8, 4) for i in range(n)}
    return f, {"in": shape(3, 4), "out": shape(4, 2)} | layers, shape(5, 3)


def column_by_column(n):
    """Every step takes its own four columns out of one wide product."""

    def f(p, x):
        h = x @ p["in"]
        return sum(jax.nn.relu(h[:, 4 * t : 4 * t + 4]) @ p[f"out{t}"] for t in range(n))

    return f, {"in": shape(3, 4 * n)} | {f"out{t}": shape(4, 2) for t in range(n)}, shape(5, 3)


def plain(n):
    def f(p, x):
        for i in range(n):
            x = jax.nn.relu(x @ p[f"w{i}"])
        return x

    return f, {f"w{i}": shape(4, 4) for i in range(n)}, shape(5, 4)


def dense(n):
    def f(p, x):
        x = x @ p["in"]
        for i in range(n):
            x = jnp.concatenate([x, jax.nn.relu(x @ p[f"w{i}"])], -1)
        return x @ p["out"]

    return (
        f,
        {"in": shape(3, 4), "out": shape(4 + 4 * n, 2)} | {f"w{i}": shape(4 + 4 * i, 4) for i in range(n)},
        shape(5, 3),
    )


def test_a_stream_that_meets_a_thousand_leaves_is_one_group():
    def f(p, x):
        x = x @ p["in"]
        for i in range(1100):
            x = x + p[f"b{i}"]
        return x @ p["out"]

    graph = jprune.trace(
        f, {"in": shape(3, 4), "out": shape(4, 2)} | {f"b{i}": shape(4) for i in range(1100)}, shape(5, 3)
    )
    (group,) = graph.groups.values()
    assert group.exact and len(group.members) == 1102


@pytest.mark.slow
def test_a_residual_network_of_a_thousand_blocks():
    f, params, x = residual(1000)
    graph = jprune.trace(f, params, x)
    assert len(graph.groups) == 1001
    keep = {g: np.arange(info.size) > 0 for g, info in graph.groups.items()}
    assert graph.compact(params, keep)["up999"].shape == (3, 7)


def calls_in_jprune(work):
    """How many Python functions of the library are entered: what a clock would say, without its noise."""
    count = 0

    def seen(frame, event, _):
        nonlocal count
        if event == "call" and "/jprune/" in frame.f_code.co_filename:
            count += 1

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def trace_and_compact(network):
    f, params, x = network
    graph = jprune.trace(f, params, x)
    keep = {g: np.arange(info.size) > 0 for g, info in graph.groups.items() if info.size > 1}
    graph.compact(params, keep)
    graph.cost(keep)
    graph.explain()


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (plain, 2.1),
        pytest.param(column_by_column, 2.6, marks=pytest.mark.slow),
        pytest.param(dense, 3.6, marks=pytest.mark.slow),
    ],
)
def test_twice_the_layers_are_twice_the_work(make, most):
    """Where all earlier layers feed each later one there is four times as much to look at; never eight times."""
    small, large = (calls_in_jprune(lambda n=n: trace_and_compact(make(n))) for n in (20, 40))
    assert large <= most * small, (large, small)
