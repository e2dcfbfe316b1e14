"""Probes: statistics of any values inside a traced function, of one or of several that are compared with each other.

A probe names points of the trace; when the last of them is reached, its update folds their values into a running state.
States go through scans (one per layer where the probe is stacked over one), branches, loops and rematerialised calls.
Taps (jprune.tracing.taps) are the probes around parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jprune.tracing.evaluate import Evaluator
from jprune.tracing.paths import flatten
from jprune.tracing.walk import Path

if TYPE_CHECKING:
    from jprune.graph import Graph


@dataclasses.dataclass(frozen=True)
class Point:
    """A value inside a traced function.

    Attributes:
      path: call path of an equation.
      index: which of its operands, or of its results.
      after: whether it is a result.
    """

    path: Path
    index: int
    after: bool


@dataclasses.dataclass(frozen=True)
class Probe:
    """A streamed statistic of the values at some points.

    Attributes:
      points: in program order, all in the same loop body, branch or rematerialised call.
      init: the state of no values (a pytree of arrays), of one layer.
      update: (state, value at each point) -> state.
      scan: call path of the scan over whose layers the states are stacked; None: one state.
      layers: how many these are.
    """

    points: tuple[Point, ...]
    init: Any
    update: Callable[..., Any]
    scan: Path | None = None
    layers: int | None = None


def probed(
    graph: Graph, probes: Mapping[str, Probe]
) -> tuple[Callable[..., tuple[Any, dict[str, Any]]], dict[str, Any]]:
    """(fn(states, params, *inputs) -> (outputs, states), states): the traced function, which feeds the probes.

    The states are {name of the probe: state}, stacked ones with a leading axis. An ordinary function: to be jitted by
    the caller, who may drop the outputs.
    """
    tap_paths: dict[str, tuple[Path, Path | None]] = {}
    at: dict[Path, list[tuple[str, int]]] = {}
    for name, probe in probes.items():
        for k, point in enumerate(probe.points):
            last = k == len(probe.points) - 1
            tap_paths[name if last else f"{name} {k}"] = (point.path, probe.scan)
            at.setdefault(point.path, []).append((name, k))
    folded = {path: [v.const for v in vals] for path, vals in graph.analysis.folded.items()}

    def start(probe: Probe) -> Any:
        if probe.layers is None:
            return probe.init
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (probe.layers, *jnp.shape(x))), probe.init)

    def run(states: Mapping[str, Any], params: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        flat, symbols = graph.inputs.bind(inputs)
        held: dict[tuple[str, int], Any] = {}

        def observe(path: Path, eqn: Any, ins: list[Any], outs: list[Any], states: dict[str, Any]) -> None:
            for name, k in at[path]:
                probe = probes[name]
                point = probe.points[k]
                value = (outs if point.after else ins)[point.index]
                if k < len(probe.points) - 1:
                    held[name, k] = value
                else:
                    states[name] = probe.update(states[name], *(held.pop((name, j)) for j in range(k)), value)

        ev = Evaluator(
            graph.rules,
            graph.layouts_at,
            folded,
            graph.analysis.jaxprs,
            symbols,
            None,
            graph.scan_symbols,
            observe,
            tap_paths,
            dict(states),
        )
        leaves = [x for _, x in flatten(params)]
        outs = ev.run(graph.jaxpr.jaxpr, graph.jaxpr.consts, graph.select_used(leaves, flat), ())
        return jax.tree.unflatten(graph.out_tree, outs), ev.states

    return run, {name: start(probe) for name, probe in probes.items()}
