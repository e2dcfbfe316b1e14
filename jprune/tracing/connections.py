"""How groups are connected to the network around their weights: summed, concatenated, gated, or never nonlinear.

Widths inside a block can be chosen freely; those that a skip connection or a concatenation joins are shared by many
blocks, and a width no nonlinearity acts on is what one block hands to the next (a linear bottleneck). All of that is
seen in the traced equations; names and shapes of blocks are not needed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jprune.tracing import layout as L
from jprune.tracing.flow import Flow
from jprune.tracing.primitives import CONTRACTIONS, SAME, SUMS
from jprune.tracing.walk import Eqn, Path, Val

if TYPE_CHECKING:
    from jprune.graph import Graph

SIGNED_SUMS = (*SUMS, "sub")
LINEAR = {
    *SIGNED_SUMS, *SAME, *CONTRACTIONS, "neg", "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims",
    "concatenate", "split", "slice", "pad", "rev", "tile", "stack", "gather", "dynamic_slice", "dynamic_update_slice",
    "reduce_sum", "cumsum", "reduce_window_sum",
}  # fmt: skip
PRODUCTS = ("mul", "div")


@dataclasses.dataclass(frozen=True)
class Connections:
    """Facts about groups of one traced function.

    Attributes:
      summed: groups along which two activations are added: residual streams, gates of recurrent cells.
      concatenated: groups that are pieces of a concatenation of activations.
      nonlinear: groups on which some nonlinearity acts, products of two activations included.
      gates: leaves whose result, computed at fewer positions (pooled), scales other activations: squeeze-excite.
    """

    summed: frozenset[str]
    concatenated: frozenset[str]
    nonlinear: frozenset[str]
    gates: frozenset[str]


def connections(graph: Graph) -> Connections:
    """What the equations of a traced function (in evaluation mode) do to its groups."""
    summed, concatenated, nonlinear, gates = set[str](), set[str](), set[str](), set[str]()
    origin: dict[int, frozenset[tuple[str | None, Path, int]]] = {}  # contractions a value was made from: leaf, size
    macs, flow = graph.analysis.macs, Flow(graph)
    for path, step in flow.steps.items():
        ins, outs, name = step.ins, step.outs, step.name
        data = [k for k, v in enumerate(ins) if not flow.is_static(v)]
        if not data:
            continue
        if name in CONTRACTIONS:
            origin[id(outs[0])] = frozenset({(macs[path].leaf if path in macs else None, path, _size(outs[0]))})
            continue
        for v in outs:
            if id(v) not in origin:  # the results of calls are those of the equations inside
                origin[id(v)] = frozenset().union(*(origin.get(id(ins[k]), ()) for k in data))
        if step.is_call or _holds_equations(step.eqn):
            continue
        layouts = graph.layouts_at(path)
        groups = [{g for lay in axes for g in L.groups_in(lay)} for axes in layouts[0]]
        shared = set[str]().union(*(groups[a] & groups[b] for a in data for b in data if a < b))
        if name in SIGNED_SUMS:
            if len({origin.get(id(ins[k])) for k in data}) > 1:  # x - mean(x) connects nothing
                summed |= shared
        elif name == "concatenate" and len(data) > 1:
            concatenated.update(L.groups_in(layouts[1][0][step.eqn.params["dimension"]]))
        elif name in PRODUCTS:
            nonlinear |= shared
            if name == "mul" and len(data) > 1:
                made = [o for k in data for o in origin.get(id(ins[k]), ())]
                gates.update(leaf for leaf, _, n in made if leaf is not None and n < _size(outs[0]))
        elif name not in LINEAR:
            nonlinear |= set().union(*(groups[k] for k in data))
    return Connections(frozenset(summed), frozenset(concatenated), frozenset(nonlinear), frozenset(gates))


def _size(v: Val) -> int:
    n = 1
    for s in v.shape:
        n *= s
    return n


def _holds_equations(eqn: Eqn) -> bool:
    """Whether the equation evaluates others (a loop, a branch, a derivative rule), which are looked at themselves."""
    return any(hasattr(x, "eqns") or hasattr(x, "jaxpr") for p in eqn.params.values()
               for x in (p if isinstance(p, tuple | list) else (p,)))  # fmt: skip
