"""Experts spread by load over four simulated devices: the same layer, and the same training gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jprune.methods.experts.over_devices import experts_over, spread_experts
from jprune.models.moe import all_experts, blockffn

E, D, F, T = 8, 12, 6, 21


def layer():
    rng = np.random.default_rng(0)
    return {
        "router": {"kernel": rng.normal(size=(D, E)).astype(np.float32)},
        "router_norm": {"scale": rng.normal(size=E).astype(np.float32)},
        "up": rng.normal(size=(E, D, F)).astype(np.float32),
        "down": rng.normal(size=(E, F, D)).astype(np.float32),
    }, rng.normal(size=(T, D)).astype(np.float32)


def test_outputs_and_gradients_stay_when_experts_are_spread():
    params, x = layer()
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

    def trained(experts_fn):
        def run(params, x):
            y, routed = blockffn(params, x, experts_fn=experts_fn)
            return (y**2).sum(), (y, routed.active)

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))

    (_, (y, active)), (grads, dx) = trained(all_experts)(params, x)
    load = np.asarray(active).sum(0)
    spread, most = spread_experts(params, load, 2)
    order = [int(np.flatnonzero((params["up"] == u).all((1, 2)))[0]) for u in np.asarray(spread["up"])]
    shares = load[order].reshape(2, 4).sum(1)
    assert sorted(order) == list(range(E)) and order != sorted(order)
    assert (
        most == pytest.approx(shares.max() / shares.mean()) and most <= load.reshape(2, 4).sum(1).max() / shares.mean()
    )
    (_, (ours, _)), (got, dours) = trained(experts_over(mesh, data="data"))(spread, x)
    np.testing.assert_allclose(ours, y, atol=1e-4)
    wanted, _ = spread_experts(grads, load, 2)
    for a, b in zip(jax.tree.leaves((got, dours)), jax.tree.leaves((wanted, dx)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_loads_are_one_an_expert():
    with pytest.raises(ValueError, match="7 loads for 8 experts"):
        spread_experts(layer()[0], jnp.ones(7), 2)
