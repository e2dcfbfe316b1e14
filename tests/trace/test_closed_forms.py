"""Exact partitions of small functions, derivable by hand."""

import jax
import jax.numpy as jnp
import numpy as np

import jprune


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


def members(graph: jprune.Graph, group: str) -> set[tuple[str, int]]:
    return {(m.path, m.axis) for m in graph.groups[group].members}


def test_two_layers_share_the_hidden_axis():
    params = {"W1": normal(0, 6, 8), "b1": normal(1, 8), "W2": normal(2, 8, 3)}
    x = normal(3, 5, 6)
    graph = jprune.trace(lambda p, x: jax.nn.relu(x @ p["W1"] + p["b1"]) @ p["W2"], params, x)
    assert list(graph.groups) == ["W1:1"]
    assert members(graph, "W1:1") == {("W1", 1), ("b1", 0), ("W2", 0)}
    keep = {"W1:1": np.arange(8) != 3}
    small = graph.compact(params, keep)
    want = jax.nn.relu(x @ np.delete(params["W1"], 3, 1) + np.delete(params["b1"], 3)) @ np.delete(params["W2"], 3, 0)
    np.testing.assert_allclose(graph.replay(keep)(small, x), want, rtol=1e-5, atol=1e-6)


def test_residual_stream_and_its_branch_are_two_groups():
    params = {"W0": normal(0, 6, 8), "W1": normal(1, 8, 5), "W2": normal(2, 5, 8), "W3": normal(3, 8, 2)}

    def f(p, x):
        h = jax.nn.relu(x @ p["W0"])
        return (h + jax.nn.relu(h @ p["W1"]) @ p["W2"]) @ p["W3"]

    graph = jprune.trace(f, params, jnp.ones((5, 6)))
    assert members(graph, "W0:1") == {("W0", 1), ("W1", 0), ("W2", 1), ("W3", 0)}
    assert members(graph, "W1:1") == {("W1", 1), ("W2", 0)}
