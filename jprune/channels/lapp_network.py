"""LAPP inside a traced network: where the gates and bypasses sit, what they cost, and the sliced network.

The variables are {"params": {"network": the original ones, "bypass", "threshold", ..}, "batch_stats": {"network",
"bypass"}, other collections, "lapp": {"step" or "kept"}}. While filters are gated the network computes
m * BN(conv(x)) + B(x); the network that is sliced computes B(x).at[.., kept].add(BN(conv(x))) with `kept` a leaf, so
that removing filters is an ordinary `graph.compact` and the cost of soft widths an ordinary cost polynomial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.channels import bypass, lapp
from jprune.channels.lapp import LappConfig
from jprune.graph import Graph, trace
from jprune.surgery import graft as g
from jprune.surgery.graft import Site
from jprune.trace import cost
from jprune.trace.leafpaths import flatten
from jprune.training.forward import Forward, as_forward
from jprune.training.pruned import pruned_forward


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
      macs: multiply-accumulates of the original network for that batch.
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
    kernels = _prunable(evaluate, config)
    sites = g.select(evaluate, kernels), g.select(train, kernels)
    layers = _coupled(evaluate, sites[0], config) if config.couple else _local(sites[0], config)
    if not layers:
        raise ValueError("no convolution is prunable; prune_1x1=True and only=(..) choose others, and with couple=True "
                         "all producers of a group have to be prunable")  # fmt: skip
    used = [k for layer in layers.values() for k in layer.kernels]
    sites = {k: sites[0][k] for k in used}, {k: sites[1][k] for k in used}
    net = Network(config, forward, x, (evaluate, train), sites, layers, forward, evaluate,
                  int(evaluate.cost().macs), bare)  # fmt: skip
    if config.score == "bn":
        jax.eval_shape(lambda v: _scores(net, {"network": _params(net, v)}), variables)
    if config.couple:
        return net
    final = Forward(_in_training(net, placed_join), _in_evaluation(net, placed_join), casts=False)
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


def _prunable(graph: Graph, config: LappConfig) -> list[str]:
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


def _local(sites: Mapping[str, Site], config: LappConfig) -> dict[str, Layer]:
    out = {}
    for k, site in sites.items():
        kind = "dw" if config.bypass == "pw" and max(site.window, default=1) == 1 else config.bypass
        bypass.check(site, kind)
        out[layer_name(k)] = _layer((k,), "", site.width, [site], kind, config)
    return out


def _coupled(graph: Graph, sites: Mapping[str, Site], config: LappConfig) -> dict[str, Layer]:
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


# -- variables -------------------------------------------------------------------------------------------------------


def init(key: jax.Array, net: Network, variables: Any) -> dict[str, Any]:
    """The original variables with fresh bypasses and open thresholds around them."""
    params: dict[str, Any] = {"network": _params(net, variables), "bypass": {}, "threshold": {}}
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


def _params(net: Network, variables: Any) -> Any:
    return variables if net.bare else variables["params"]


# -- scores and gates ------------------------------------------------------------------------------------------------


def _scores(net: Network, params: Mapping[str, Any]) -> dict[str, jax.Array]:
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


def relative_path(net: Network, path: str) -> str:
    """A leaf's path within the parameters."""
    return path if net.bare else path.removeprefix("params/")


def _scale(net: Network, kernel: str) -> str:
    graph, site = net.traces[0], net.sites[0][kernel]
    scales = {u.leaf for u in graph.analysis.uses.values() if u.role == "scale" and graph.leaves[u.leaf].is_param}
    found = [p for p in site.norm if p in scales and np.prod(graph.leaves[p].shape) == site.width]
    if not found:
        raise ValueError(f"score='bn', but no normalisation scale follows {kernel!r}: use score='l1' or 'taylor'")
    return found[-1]


def scores(net: Network, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{layer: z (n,)}: standardised importance, averaged over the convolutions that share a threshold."""
    s = {k: lapp.standardise(v) for k, v in _scores(net, params).items()}
    z = {n: jnp.stack([s[k] for k in layer.kernels]).mean(axis=0) for n, layer in net.layers.items()}
    return z if net.config.score_grad else lax.stop_gradient(z)


def gates(net: Network, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{layer: m (n,)}: 0 or 1, with the surrogate's derivative in the thresholds."""
    z, t, c = scores(net, params), params["threshold"], net.config
    return {n: lapp.gate(z[n], t[n], c.tau, layer.min_keep) for n, layer in net.layers.items()}


def ratio(net: Network, widths: Mapping[str, Any]) -> Any:
    """Multiply-accumulates at these (soft) numbers of filters, bypasses included, over the original network's."""
    return cost.fraction(net.graph, {net.layers[n].group: w for n, w in widths.items()}, net.macs)


# -- the network in its two forms ------------------------------------------------------------------------------------


def gated_forward(net: Network, start: int, stop: int) -> Forward:
    """The network while it is pruned: from step `start` on masks are active, at step `stop` r(e) is the target.

    Its training mode adds the constraint as "losses" and logs "ratio", "budget" and "threshold_shift", the largest
    distance of a threshold from where it began.
    """
    c = net.config

    def gates_at(variables: Any) -> tuple[dict[str, Any], Any]:
        pruning = variables["lapp"]["step"] >= start
        return {n: jnp.where(pruning, m, 1.0) for n, m in gates(net, variables["params"]).items()}, pruning

    def join_of(variables: Any, task: Mapping[str, Any]) -> Any:
        soft: dict[str, Any] = {}
        if c.regrow == "dense":
            z, t = scores(net, variables["params"]), variables["params"]["threshold"]
            soft = {n: jnp.where(variables["lapp"]["step"] >= start, lapp.surrogate(z[n], t[n], c.tau), 1.0) for n in z}

        def join(site: Site, main: Any, beside: Any, name: str) -> Any:
            shape = [1] * main.ndim
            shape[site.channel] = site.width
            weight = soft[name].reshape(shape) if soft else None
            return lapp.gated(main, task[name].reshape(shape), weight) + beside

        return join

    def train(variables: Any, x: Any, key: Any) -> Any:
        m, pruning = gates_at(variables)
        step = variables["lapp"]["step"]
        budget = lapp.target_at(jnp.clip((step - start) / max(stop - start, 1), 0.0, 1.0), c.target, c.schedule)
        now = ratio(net, {n: v.sum() for n, v in m.items()})
        task = m if c.task_to_threshold else {n: lax.stop_gradient(v) for n, v in m.items()}
        logits, updates = _in_training(net, lambda net, v: join_of(v, task))(variables, x, key)
        moved = [jnp.abs(t - c.start) for t in variables["params"]["threshold"].values()]
        extra = {
            "lapp": {**variables["lapp"], "step": step + 1},
            "losses": {"constraint": jnp.where(pruning, lapp.hinge(now, budget, c.beta), 0.0)},
            "metrics": {"ratio": now, "budget": budget, "threshold_shift": jnp.stack(moved).max()},
        }
        return logits, {**updates, **extra}

    def evaluate(variables: Any, x: Any) -> Any:
        return _in_evaluation(net, lambda net, v: join_of(v, gates_at(v)[0]))(variables, x)

    return Forward(train, evaluate, casts=False)


def placed_join(net: Network, variables: Any) -> Any:
    """(site, main, beside, layer's name) -> the output, in the network that is sliced: filter i is added to channel kept[i]."""

    def join(site: Site, main: Any, beside: Any, name: str) -> Any:
        shape = list(main.shape)
        shape[site.channel] = site.width
        wide = jnp.broadcast_to(jnp.asarray(beside, main.dtype), shape)
        return wide.at[(slice(None),) * site.channel + (variables["lapp"]["kept"][name],)].add(main)

    return join


Joins = Callable[[Network, Any], Callable[[Site, Any, Any, str], Any]]


def _with_bypasses(net: Network, mode: int, variables: Any, joins: Joins, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """(outputs of the original function with bypasses, {layer: running statistics of its bypass})."""
    which = {k: (name, layer) for k, name, layer in net.named()}
    combine = joins(net, variables)
    params, stats = variables["params"]["bypass"], variables.get("batch_stats", {}).get("bypass", {})

    def join(site: Site, x: Any, main: Any, extra: Any) -> Any:
        name, layer = which[site.leaf]
        beside, new = bypass.apply(site, layer.bypass, params.get(name), stats.get(name), x, bool(mode))
        return combine(site, main, beside, name), new

    fn = g.graft(net.traces[mode], net.sites[mode], join)
    outs, states = fn(original(net, variables), {}, *inputs)
    return outs, {which[k][0]: s for k, s in states.items() if s}


def _in_evaluation(net: Network, joins: Joins) -> Callable[[Any, Any], Any]:
    return lambda variables, x: _with_bypasses(net, 0, variables, joins, (x,))[0]


def _in_training(net: Network, joins: Joins) -> Callable[[Any, Any, Any], Any]:
    def train(variables: Any, x: Any, key: Any) -> Any:
        (logits, updates), running = _with_bypasses(net, 1, variables, joins, (x, key))
        updates = dict(updates)
        stats = {"network": updates.pop("batch_stats")} if "batch_stats" in updates else {}
        stats |= {"bypass": running} if running else {}
        return logits, {**updates, **({"batch_stats": stats} if stats else {})}

    return train


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


# -- the decision ----------------------------------------------------------------------------------------------------


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
    return Sliced(forward, net.graph.compact(whole, groups, allow_empty=True), groups)
