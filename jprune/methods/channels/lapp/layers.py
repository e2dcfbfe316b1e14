"""What LAPP decides about in a traced network, and the variables around the original ones.

The variables are {"params": {"network": the original ones, "bypass", "threshold", ..}, "batch_stats": {"network",
"bypass"}, other collections, "lapp": {"step" or "kept"}}: a step while filters are gated, kept indices once sliced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune.graph import Graph
from jprune.methods.channels.lapp import bypass
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.surgery import sites as g
from jprune.surgery.sites import Site
from jprune.training.forward import Forward


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one threshold decides about.

    Attributes:
      kernels: paths in the original variables (several only where coupled).
      group: in the network's `graph`. size: filters. bypass: its kind. min_keep: filters that stay.
    """

    kernels: tuple[str, ...]
    group: str
    size: int
    bypass: str
    min_keep: int


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A traced network, its sites, and the network that can be sliced.

    Attributes:
      config: settings. forward: the original network. x: an example batch.
      traces, sites: in evaluation and in training mode. layers: by name.
      final, graph: the network that is sliced, and the trace of its evaluation (coupled: of the original).
      macs: MACs of the original network for that batch.
      bare: the original variables are parameters alone, not {"params": ..}.
    """

    config: LappConfig
    forward: Forward
    x: Any
    traces: tuple[Graph, Graph]
    sites: tuple[dict[str, Site], dict[str, Site]]
    layers: dict[str, Layer]
    final: Forward
    graph: Graph
    macs: int
    bare: bool

    def named(self) -> list[tuple[str, str, Layer]]:
        """(kernel, layer's name, layer) of every site."""
        return [(k, name, layer) for name, layer in self.layers.items() for k in layer.kernels]


def prunable(graph: Graph, config: LappConfig) -> list[str]:
    """Kernels wider than 1x1 (or all) but for stems, shortcuts and, unless coupled, grouped convolutions."""
    found, refused = g.sites(graph)
    eqns = {u.leaf: u.eqn for u in graph.analysis.uses.values() if u.primitive == "conv_general_dilated"}
    out = []
    for leaf in g.matching([*found, *refused], config.only):
        p, shape = eqns[leaf].params, eqns[leaf].invars[1].aval.shape
        wide = any(shape[i] > 1 for i in p["dimension_numbers"].rhs_spec[2:])
        stays = leaf in found and (found[leaf].stem or found[leaf].shortcut)
        if (wide or config.prune_1x1) and not stays and (config.couple or p["feature_group_count"] == 1):
            out.append(leaf)
    return out


def _layer(kernels: tuple[str, ...], group: str, size: int, sites: list[Site], kind: str, config: LappConfig) -> Layer:
    free = kind != "none" or all(s.bypassed for s in sites)
    least = config.min_keep if config.min_keep is not None else 0 if free else 1
    return Layer(kernels, group, size, kind, min(least, size))


def local_layers(sites: Mapping[str, Site], config: LappConfig) -> dict[str, Layer]:
    """One layer per convolution; its filters go from itself alone, because the bypass keeps the full width."""
    out = {}
    for k, site in sites.items():
        kind = "dw" if config.bypass == "pw" and max(site.window, default=1) == 1 else config.bypass
        bypass.check(site, kind)
        out[layer_name(k)] = _layer((k,), "", site.width, [site], kind, config)
    return out


def coupled_layers(graph: Graph, sites: Mapping[str, Site], config: LappConfig) -> dict[str, Layer]:
    """One layer per group of the original graph that prunable convolutions alone produce, one channel a unit."""
    out = {}
    for gid, info in graph.groups.items():
        made = [m for m in info.members if m.role in ("out", "lookup")]
        mine = [m for m in made if m.path in sites and m.axis == sites[m.path].kernel_out]
        if info.exact and mine and len(mine) == len(made) and all(m.positions.shape == (info.size, 1) for m in mine):
            kernels = tuple(m.path for m in mine)
            out[layer_name(kernels[0])] = _layer(kernels, gid, info.size, [sites[k] for k in kernels], "none", config)
    return out


def layer_name(kernel: str) -> str:
    """A kernel's path as the name of its layer."""
    return kernel.removeprefix("params/").replace("/", ".")


def init(key: jax.Array, net: Network, variables: Any) -> dict[str, Any]:
    """The original variables with fresh bypasses and open thresholds around them."""
    params: dict[str, Any] = {"network": params_of(net, variables), "bypass": {}, "threshold": {}}
    rest = {} if net.bare else {k: v for k, v in variables.items() if k != "params"}
    stats: dict[str, Any] = {"network": rest.pop("batch_stats")} if "batch_stats" in rest else {}
    for i, (k, name, layer) in enumerate(net.named()):
        made, running = bypass.init(jax.random.fold_in(key, i), net.sites[0][k], layer.bypass, net.config.bypass_scale)
        if made:
            params["bypass"][name] = made
            stats.setdefault("bypass", {})[name] = running
        params["threshold"][name] = jnp.asarray(net.config.start, jnp.float32)
    if net.config.score == "taylor":
        params["importance"] = {layer_name(k): jnp.zeros(net.sites[0][k].width) for k, _, _ in net.named()}
    return {"params": params, **rest, **({"batch_stats": stats} if stats else {}),
            "lapp": {"step": jnp.zeros((), jnp.int32)}}  # fmt: skip


def original(net: Network, variables: Mapping[str, Any]) -> Any:
    """The original network's variables."""
    if net.bare:
        return variables["params"]["network"]
    rest = {k: v for k, v in variables.items() if k not in ("params", "lapp", "batch_stats")}
    stats = variables.get("batch_stats", {})
    rest |= {"batch_stats": stats["network"]} if "network" in stats else {}
    return {"params": variables["params"]["network"], **rest}


def sliceable(net: Network, variables: Mapping[str, Any]) -> Any:
    """The variables of `net.final`: thresholds dropped, every filter at its own place (coupled: the original's)."""
    if net.config.couple:
        return original(net, variables)
    params = {k: v for k, v in variables["params"].items() if k in ("network", "bypass")}
    kept = {name: jnp.arange(layer.size, dtype=jnp.int32) for name, layer in net.layers.items()}
    return {**variables, "params": params, "lapp": {"kept": kept}}


def params_of(net: Network, variables: Any) -> Any:
    """The parameters among the original variables."""
    return variables if net.bare else variables["params"]


def relative_path(net: Network, path: str) -> str:
    """A leaf's path within the parameters."""
    return path if net.bare else path.removeprefix("params/")
