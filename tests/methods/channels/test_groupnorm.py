"""The group shrinkage against its formula, written out unit by unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.methods.channels.depgraph_sparse import group_sparsity, shrinkage


def test_the_weakest_unit_shrinks_sixteen_times_harder():
    np.testing.assert_allclose(shrinkage(jnp.array([1.0, 4.0, 9.0])), [16.0, 4.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(shrinkage(jnp.ones(3)), np.ones(3))


def test_every_member_weight_gets_its_units_shrinkage():
    rng = np.random.default_rng(0)
    p = {"a": rng.normal(size=(3, 4)), "bias": rng.normal(size=4), "b": rng.normal(size=(4, 2))}
    p = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), p)
    graph = jprune.trace(lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"], p, jnp.ones((2, 3)))
    tx = group_sparsity(graph, 0.1)
    zero = jax.tree.map(jnp.zeros_like, p)
    got, _ = tx.update(zero, tx.init(p), p)
    norm = [float(np.sqrt((p["a"][:, i] ** 2).sum() + (p["b"][i] ** 2).sum())) for i in range(4)]
    for i in range(4):
        factor = 0.1 * 2 ** (4 * (max(norm) - norm[i]) / (max(norm) - min(norm)))
        np.testing.assert_allclose(got["a"][:, i], factor * p["a"][:, i], rtol=1e-5)
        np.testing.assert_allclose(got["b"][i], factor * p["b"][i], rtol=1e-5)
    assert not np.asarray(got["bias"]).any()  # shifts carry no weight in the group norm


def test_the_parameters_may_come_without_their_collection():
    p = {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((3, 1))}}
    graph = jprune.trace(lambda v, x: jnp.tanh(x @ v["params"]["a"]) @ v["params"]["b"], p, jnp.ones((2, 2)))
    tx = group_sparsity(graph, 0.5)
    zero = jax.tree.map(jnp.zeros_like, p)
    whole = tx.update(zero, tx.init(p), p)[0]["params"]
    inner = tx.update(zero["params"], tx.init(p), p["params"])[0]
    jax.tree.map(np.testing.assert_array_equal, whole, inner)
    assert float(jnp.abs(inner["a"]).sum()) > 0
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(zero, tx.init(p))
    with pytest.raises(ValueError, match="at least 0"):
        group_sparsity(graph, -1.0)
