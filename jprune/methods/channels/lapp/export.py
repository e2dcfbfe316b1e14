"""LAPP for export: a bypass and the convolution it accompanies as one convolution, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jprune.graph import trace
from jprune.methods.channels.lapp import bypass
from jprune.methods.channels.lapp.forward import placed_join
from jprune.methods.channels.lapp.layers import Network, original, relative_path
from jprune.methods.channels.lapp.network import Sliced
from jprune.surgery.sites import Site, folded, graft
from jprune.tracing.paths import flatten, path_str


def merge_bypass(net: Network, small: Sliced, variables: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """(evaluation function, its variables): layers that kept all filters become one convolution with a bias.

    The bypass' kernel, zero-padded to the window, and the folded BatchNorms go into the convolution's own kernel. Only
    "pw" and "dw" bypasses are merged; other layers stay as they are, and the normalisation that a merged layer no
    longer reads stays in the tree.

    Args:
      variables: of the small network, as trained.
    """
    full = net.graph.expand(variables, small.keep)
    normal = folded(net.traces[0], net.sites[0], original(net, full), jnp.zeros(net.x.shape, net.x.dtype))
    params, stats = dict(full["params"]["bypass"]), dict(full.get("batch_stats", {}).get("bypass", {}))
    kernels, shifts = {}, {}
    for k, name, layer in net.named():
        if layer.bypass in ("pw", "dw") and bool(small.keep[layer.group].all()):
            site, (factor, shift) = net.sites[0][k], normal[k]
            beside, bias = bypass.as_kernel(site, layer.bypass, params.pop(name), stats.pop(name))
            shape = [1] * beside.ndim
            shape[site.kernel_out] = site.width
            w = dict(flatten(full["params"]["network"]))[relative_path(net, k)]
            kernels[relative_path(net, k)] = (w * factor.reshape(shape) + beside).astype(w.dtype)
            shifts[name] = shift + bias
    network = jax.tree_util.tree_map_with_path(
        lambda path, w: kernels.get(path_str(path), w), full["params"]["network"]
    )
    merged = {**full, "params": {"network": network, "bypass": params, "merged": shifts}}
    if "batch_stats" in full:
        merged["batch_stats"] = {**full["batch_stats"], "bypass": stats}
    which = {k: (name, layer) for k, name, layer in net.named()}

    def evaluate(variables: Any, x: Any) -> Any:
        own = dict(flatten(variables["params"]["network"]))
        placed = placed_join(net, variables)

        def join(site: Site, x: Any, main: Any, extra: Any) -> Any:
            name, layer = which[site.leaf]
            if name in shifts:
                shape = [1] * main.ndim
                shape[site.channel] = site.width
                y = bypass.convolve(site, x, own[relative_path(net, site.leaf)])
                return y + variables["params"]["merged"][name].reshape(shape), None
            own_params = variables["params"]["bypass"].get(name)
            own_stats = variables.get("batch_stats", {}).get("bypass", {}).get(name)
            beside, _ = bypass.apply(site, layer.bypass, own_params, own_stats, x, False)
            return placed(site, main, beside, name), None

        return graft(net.traces[0], net.sites[0], join)(original(net, variables), {}, x)[0]

    graph = trace(evaluate, merged, net.x)
    decision = graph.decide({gid: k for gid, k in small.keep.items() if not k.all()}, allow_empty=True)
    return graph.replay(decision), graph.compact(merged, decision)
