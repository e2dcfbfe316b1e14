"""Bias compensation: exact for constant channels without padding, on average for the others; honest where it cannot."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jprune
from jprune.surgery.compensate import compensate
from jprune.tracing import taps


class Network(nn.Module):
    """Convolutions without padding, one with BatchNorm behind it, one with a bias, one grouped; then heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), padding="VALID", name="first")(x))
        x = nn.Conv(6, (3, 3), padding="VALID", use_bias=False, strides=2, name="second")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.relu(nn.Conv(4, (1, 1), feature_group_count=2, name="grouped")(x))
        return nn.DenseGeneral((2, 3), name="heads")(x.mean((1, 2)))


def setup():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 9, 9, 2)), jnp.float32)
    net = Network()
    variables = jax.jit(net.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.asarray(v + 0.3 * rng.normal(size=v.shape) ** 2, jnp.float32), variables)
    return net, variables, x, jprune.trace(net.apply, variables, x)


def means(graph, variables, x):
    return {t: s["mean"] for t, s in graph.calibrate(variables, [x], {"mean": taps.mean()}).items()}


def test_constant_channels_move_exactly():
    net, variables, x, graph = setup()
    keep = {
        "params/first/kernel:3": np.array([1, 0, 1, 1, 0, 1, 1, 1], bool),
        "params/second/kernel:3": np.array([1, 0, 1], bool),
    }
    assert keep.keys() <= graph.groups.keys(), sorted(graph.groups)
    for name, gone in (("first", [1, 4]), ("norm", [1, 4])):  # channels that emit relu(bias) whatever comes in
        layer = variables["params"][name]
        key = "kernel" if name == "first" else "scale"
        layer[key] = layer[key].at[..., np.array(gone)].set(0)
    out = compensate(graph, variables, keep, means(graph, variables, x))
    assert not out.skipped
    dense = jax.jit(net.apply)(variables, x)
    small = graph.replay(keep)
    repaired = small(graph.compact(out.params, keep), x)
    plain = small(graph.compact(variables, keep), x)
    np.testing.assert_allclose(repaired, dense, atol=2e-6 * float(np.abs(dense).max()))
    assert np.abs(plain - dense).max() > 0.02 * np.abs(dense).max()


def test_varying_channels_move_on_average():
    def f(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] + p["c"]

    rng = np.random.default_rng(1)
    p = {"a": rng.normal(size=(5, 6)), "b": rng.normal(size=(6, 3)), "c": rng.normal(size=3)}
    p = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), p)
    x = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    graph = jprune.trace(f, p, x)
    keep = {"a:1": np.array([1, 1, 0, 1, 0, 0], bool)}
    out = compensate(graph, p, keep, means(graph, p, x))
    small = jax.jit(graph.replay(keep))(graph.compact(out.params, keep), x)
    np.testing.assert_allclose(small.mean(0), f(p, x).mean(0), atol=1e-5)


def test_consumers_without_a_bias_are_named():
    def f(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    p = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}
    graph = jprune.trace(f, p, jnp.ones((2, 2)))
    keep = {"a:1": np.array([1, 1, 0, 1], bool)}
    out = compensate(graph, p, keep, means(graph, p, jnp.ones((2, 2))))
    assert out.skipped == {"b": "no bias or running mean follows it directly"}
    assert compensate(graph, p, keep, {}).skipped == {"b": "no mean was given for it"}


def test_stacked_layers_and_kernels_stored_the_other_way_round():
    """Every layer of a scan loses channels of its own; weights are (outputs, inputs), the layer axis is the second."""

    def f(p, x):
        def layer(x, w):
            return x + (jax.nn.relu(x @ w["a"].T) @ w["b"].T + w["c"]), None

        stacked = {"a": p["a"].transpose(1, 0, 2), "b": p["b"].transpose(1, 0, 2), "c": p["c"]}
        return jax.lax.scan(layer, x, stacked)[0]

    rng = np.random.default_rng(2)
    p = {"a": rng.normal(size=(6, 3, 6)), "b": rng.normal(size=(6, 3, 6)), "c": rng.normal(size=(3, 6))}
    p = jax.tree.map(lambda v: jnp.asarray(v / 3, jnp.float32), p)
    x = jnp.asarray(rng.normal(size=(64, 6)), jnp.float32)
    graph = jprune.trace(f, p, x)
    keep = {"a:0": np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)}
    assert graph.groups["a:0"].layers == 3
    found = graph.calibrate(p, [x], {"mean": taps.mean()}, ["b"])
    out = compensate(graph, p, keep, {"b": found["b"]["mean"]})
    assert not out.skipped
    mean = np.asarray(found["b"]["mean"])
    for layer in range(3):
        lost = np.where(keep["a:0"][layer], 0, mean[layer]) @ np.asarray(p["b"])[:, layer].T
        np.testing.assert_allclose(out.params["c"][layer] - p["c"][layer], lost, atol=1e-6)
    assert np.abs(out.params["c"][0] - p["c"][0]).max() > 0.02
