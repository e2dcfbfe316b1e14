"""LAPP around a network: prepare it, decide which filters stay, slice it.

`lapp_layers` says what is decided about, `lapp_gates` by which gates, `lapp_forward` what the network computes meanwhile;
`lapp_run` trains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jprune.graph import trace
from jprune.methods.channels.lapp import lapp
from jprune.methods.channels.lapp.forward import gated_forward, in_evaluation, in_training, placed_join
from jprune.methods.channels.lapp.gates import raw_scores, scores, update_rules
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.methods.channels.lapp.layers import (
    Network,
    coupled_layers,
    init,
    local_layers,
    params_of,
    prunable,
    sliceable,
)
from jprune.surgery import sites as g
from jprune.training.forward import Forward, as_forward
from jprune.training.pruned import pruned_forward


def prepare(model: Any, variables: Any, x: Any, config: LappConfig) -> Network:
    """Trace a network in both modes and find what is prunable in it; host-side, computes nothing.

    Args:
      model: whatever `jprune.training.as_forward` takes. variables: its variables, or their shapes.
      x: a batch of the size that training will use, or its shape.

    Raises:
      SiteError: a convolution that nothing can be grafted onto; exclude it by `config.only`.
      ValueError: nothing to prune, or a bypass or score that does not fit a layer.
    """
    forward = as_forward(model)
    bare = not (isinstance(variables, Mapping) and "params" in variables)
    if not bare and "lapp" in variables:
        raise ValueError("the variables have a collection 'lapp' already: give those of the plain network")
    evaluate = trace(forward.evaluate, variables, x)
    train = trace(forward.train, variables, x, jax.eval_shape(lambda: jax.random.key(0)))
    kernels = prunable(evaluate, config)
    sites = g.select(evaluate, kernels), g.select(train, kernels)
    layers = coupled_layers(evaluate, sites[0], config) if config.couple else local_layers(sites[0], config)
    if not layers:
        raise ValueError("no convolution is prunable; prune_1x1=True and only=(..) choose others, and with couple=True "
                         "all producers of a group have to be prunable")  # fmt: skip
    used = [k for layer in layers.values() for k in layer.kernels]
    sites = {k: sites[0][k] for k in used}, {k: sites[1][k] for k in used}
    net = Network(config, forward, x, (evaluate, train), sites, layers, forward, evaluate,
                  int(evaluate.cost().macs), bare)  # fmt: skip
    if config.score == "bn":
        jax.eval_shape(lambda v: raw_scores(net, {"network": params_of(net, v)}), variables)
    if config.couple:
        return net
    final = Forward(in_training(net, placed_join), in_evaluation(net, placed_join), casts=False)
    shapes = jax.eval_shape(lambda v: sliceable(net, init(jax.random.key(0), net, v)), variables)
    graph = trace(final.evaluate, shapes, x)
    group_of = {m.path: gid for gid, info in graph.groups.items() for m in info.members if m.role == "out"}
    located = {}
    for k, name, layer in net.named():
        path = k if bare else k.removeprefix("params/")
        path = f"params/network/{path}"
        if path not in group_of:
            why = graph.leaves[path].frozen[sites[0][k].kernel_out]
            raise ValueError(f"the filters of {k!r} cannot be removed: {why}; exclude it by only=(..)")
        located[name] = dataclasses.replace(layer, group=group_of[path])
    return dataclasses.replace(net, layers=located, final=final, graph=graph)


def finalise(
    net: Network, variables: Any, thresholds: Mapping[str, Any] | None = None, nearest: bool = False
) -> lapp.Offset:
    """Which filters stay ({layer: bool}) under the common offset that meets the target; host-side.

    Args:
      thresholds: others than the learned ones (baselines).
      nearest: see `common_offset`.

    Raises:
      Infeasible: the target cannot be reached.
      ValueError: thresholds are not finite, or devices disagree about them.
    """
    chosen: Mapping[str, Any] = variables["params"]["threshold"] if thresholds is None else thresholds
    for name, t in chosen.items():
        copies = {float(np.asarray(s.data)) for s in getattr(t, "addressable_shards", ())}
        if len(copies) > 1 and not any(np.isnan(v) for v in copies):
            raise ValueError(f"devices hold different thresholds of layer {name!r}: {sorted(copies)}")
    z = {n: np.asarray(v) for n, v in jax.jit(lambda p: scores(net, p))(variables["params"]).items()}

    def exact(keep: Mapping[str, Any]) -> float:
        return net.graph.cost({net.layers[n].group: k for n, k in keep.items()}).macs / net.macs

    least = {n: layer.min_keep for n, layer in net.layers.items()}
    return lapp.common_offset(z, chosen, exact, net.config.target, least, nearest)


class Sliced(NamedTuple):
    """The small network, its variables and the keep sets by group of `net.graph`."""

    forward: Forward
    variables: Any
    keep: dict[str, np.ndarray]


def slice_lapp(net: Network, variables: Any, keep: Mapping[str, Any]) -> Sliced:
    """Remove the filters that are not kept: an ordinary compacted network, which trains and can be traced again.

    Args:
      keep: {layer: bool (n,)}.
    """
    groups = {net.layers[n].group: np.asarray(k, bool) for n, k in keep.items()}
    whole = sliceable(net, variables)
    forward = pruned_forward(net.final, whole, net.x, groups, allow_empty=True)
    return Sliced(forward, net.graph.compact(whole, net.graph.decide(groups, allow_empty=True)), groups)


__all__ = ["Network", "Sliced", "finalise", "gated_forward", "init", "prepare", "slice_lapp", "update_rules"]
