"""LAPP's scores and gates in a traced network, the cost of soft widths, and the thresholds' own updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.methods.channels.lapp import lapp
from jprune.methods.channels.lapp.layers import Network, layer_name, relative_path
from jprune.tracing import cost
from jprune.tracing.paths import flatten


def raw_scores(net: Network, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{kernel: importance of its filters}, float32."""
    leaves = dict(flatten(params["network"]))
    out = {}
    for k, _, _ in net.named():
        site = net.sites[0][k]
        if net.config.score == "taylor":
            out[k] = params["importance"][layer_name(k)]
        elif net.config.score == "bn":
            out[k] = jnp.abs(leaves[relative_path(net, _scale(net, k))].astype(jnp.float32)).reshape(-1)
        else:
            w = jnp.moveaxis(leaves[relative_path(net, k)].astype(jnp.float32), site.kernel_out, 0)
            out[k] = jnp.abs(w).reshape(site.width, -1).mean(axis=1)
    return out


def _scale(net: Network, kernel: str) -> str:
    graph, site = net.traces[0], net.sites[0][kernel]
    scales = {u.leaf for u in graph.analysis.uses.values() if u.role == "scale" and graph.leaves[u.leaf].is_param}
    found = [p for p in site.norm if p in scales and np.prod(graph.leaves[p].shape) == site.width]
    if not found:
        raise ValueError(f"score='bn', but no normalisation scale follows {kernel!r}: use score='l1' or 'taylor'")
    return found[-1]


def scores(net: Network, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{layer: z (n,)}: standardised importance, averaged over the convolutions that share a threshold."""
    s = {k: lapp.standardise(v) for k, v in raw_scores(net, params).items()}
    z = {n: jnp.stack([s[k] for k in layer.kernels]).mean(axis=0) for n, layer in net.layers.items()}
    return z if net.config.score_grad else lax.stop_gradient(z)


def gates(net: Network, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{layer: m (n,)}: 0 or 1, with the surrogate's derivative in the thresholds."""
    z, t, c = scores(net, params), params["threshold"], net.config
    return {n: lapp.gate(z[n], t[n], c.tau, layer.min_keep) for n, layer in net.layers.items()}


def ratio(net: Network, widths: Mapping[str, Any]) -> Any:
    """MACs at these (soft) numbers of filters, bypasses included, over the original network's."""
    return cost.fraction(net.graph, {net.layers[n].group: w for n, w in widths.items()}, net.macs)


def update_rules(net: Network) -> dict[str, Callable[[Any, Any], Any]]:
    """For `with_own_updates`: the thresholds' gradient descent and, with score="taylor", the moving averages."""
    c = net.config

    def thresholds(grads: Any, params: Any) -> Any:
        return {
            n: lapp.threshold_step(t, grads["threshold"][n], c.threshold_rate, c.bound)
            for n, t in params["threshold"].items()
        }

    def importance(grads: Any, params: Any) -> Any:
        w, d = dict(flatten(params["network"])), dict(flatten(grads["network"]))
        out = {}
        for k, _, _ in net.named():
            site, path = net.sites[0][k], relative_path(net, k)
            product = jnp.moveaxis(w[path].astype(jnp.float32) * d[path].astype(jnp.float32), site.kernel_out, 0)
            now = jnp.abs(product.reshape(site.width, -1).sum(axis=1))
            out[layer_name(k)] = (1 - c.memory) * (now - params["importance"][layer_name(k)])
        return out

    return {"threshold": thresholds} | ({"importance": importance} if c.score == "taylor" else {})
