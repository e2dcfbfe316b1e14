"""A traced network with LAPP's bypasses, in its two forms: gated while it is pruned, and the one that is sliced.

While filters are gated the network computes m * BN(conv(x)) + B(x); the network that is sliced computes
B(x).at[.., kept].add(BN(conv(x))) with `kept` a leaf, so that removing filters is an ordinary `graph.compact` and the
cost of soft widths an ordinary cost polynomial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from jprune.methods.channels.lapp import bypass, lapp
from jprune.methods.channels.lapp.gates import gates, ratio, scores
from jprune.methods.channels.lapp.layers import Network, original
from jprune.surgery import sites as g
from jprune.surgery.sites import Site
from jprune.training.forward import Forward


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
        logits, updates = in_training(net, lambda net, v: join_of(v, task))(variables, x, key)
        moved = [jnp.abs(t - c.start) for t in variables["params"]["threshold"].values()]
        extra = {
            "lapp": {**variables["lapp"], "step": step + 1},
            "losses": {"constraint": jnp.where(pruning, lapp.hinge(now, budget, c.beta), 0.0)},
            "metrics": {"ratio": now, "budget": budget, "threshold_shift": jnp.stack(moved).max()},
        }
        return logits, {**updates, **extra}

    def evaluate(variables: Any, x: Any) -> Any:
        return in_evaluation(net, lambda net, v: join_of(v, gates_at(v)[0]))(variables, x)

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


def in_evaluation(net: Network, joins: Joins) -> Callable[[Any, Any], Any]:
    """(variables, x) -> outputs of the original network with bypasses, main and bypass put together by `joins`."""
    return lambda variables, x: _with_bypasses(net, 0, variables, joins, (x,))[0]


def in_training(net: Network, joins: Joins) -> Callable[[Any, Any, Any], Any]:
    """(variables, x, key) -> (outputs, updates): the same in training mode, running statistics among the updates."""

    def train(variables: Any, x: Any, key: Any) -> Any:
        (logits, updates), running = _with_bypasses(net, 1, variables, joins, (x, key))
        updates = dict(updates)
        stats = {"network": updates.pop("batch_stats")} if "batch_stats" in updates else {}
        stats |= {"bypass": running} if running else {}
        return logits, {**updates, **({"batch_stats": stats} if stats else {})}

    return train
