"""How groups take part in the network around their weights: which are summed, concatenated, gated, or never bent.

Widths inside a block can be chosen freely; those that a skip connection or a concatenation joins are shared by many
blocks, and a width no nonlinearity acts on is what one block hands to the next (a linear bottleneck). All of that is
seen in the traced equations; names and shapes of blocks are not needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jprune.tracing import layout as L
from jprune.tracing.structure import Structure
from jprune.tracing.walk import Path, Val

CONTRACTIONS = ("conv_general_dilated", "dot_general", "ragged_dot_general")
SUMS = ("add", "sub", "add_any")
LINEAR = {
    *SUMS, "neg", "copy", "convert_element_type", "reduce_precision", "stop_gradient", "optimization_barrier",
    "sharding_constraint", "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "concatenate", "split",
    "slice", "pad", "rev", "tile", "stack", "gather", "dynamic_slice", "dynamic_update_slice", "reduce_sum", "cumsum",
    "reduce_window_sum", *CONTRACTIONS,
}  # fmt: skip
PRODUCTS = ("mul", "div")


@dataclasses.dataclass(frozen=True)
class Joins:
    """Facts about groups of one traced function.

    Attributes:
      summed: groups along which two activations are added: residual streams, gates of recurrent cells.
      concatenated: groups that are pieces of a concatenation of activations.
      bent: groups on which some nonlinearity acts, products of two activations included.
      gates: leaves whose result, computed at fewer positions (pooled), scales other activations: squeeze-excite.
    """

    summed: frozenset[str]
    concatenated: frozenset[str]
    bent: frozenset[str]
    gates: frozenset[str]


def joins(structure: Structure) -> Joins:
    """What the equations of a traced function (in evaluation mode) do to its groups."""
    summed, concatenated, bent, gates = set[str](), set[str](), set[str](), set[str]()
    static: set[int] = set()  # values that depend on parameters and constants alone
    origin: dict[int, frozenset[tuple[str | None, Path, int]]] = {}  # contractions a value was made from: leaf, size
    macs, records = structure.analysis.macs, structure.analysis.records

    def is_static(v: Val) -> bool:
        return v.leaf is not None or v.scalar is not None or v.const is not None or id(v) in static

    for path, (ins, outs) in records.items():
        eqn = structure.analysis.eqns.get(path)
        if eqn is None:  # inside a derivative rule: what it does is not done by the function
            continue
        name = eqn.primitive.name
        if all(is_static(v) for v in ins):
            static.update(id(v) for v in outs)
            continue
        data = [k for k, v in enumerate(ins) if not is_static(v)]
        if name in CONTRACTIONS:
            origin[id(outs[0])] = frozenset({(macs[path].leaf if path in macs else None, path, _size(outs[0]))})
            continue
        for v in outs:
            if id(v) not in origin:  # the results of calls are those of the equations inside
                origin[id(v)] = frozenset().union(*(origin.get(id(ins[k]), ()) for k in data))
        if _calls(eqn):
            continue
        layouts = structure.layouts_at(path)
        groups = [{g for lay in axes for g in L.groups_in(lay)} for axes in layouts[0]]
        shared = set[str]().union(*(groups[a] & groups[b] for a in data for b in data if a < b))
        if name in SUMS:
            if len({origin.get(id(ins[k])) for k in data}) > 1:  # x - mean(x) joins nothing
                summed |= shared
        elif name == "concatenate" and len(data) > 1:
            concatenated.update(L.groups_in(layouts[1][0][eqn.params["dimension"]]))
        elif name in PRODUCTS:
            bent |= shared
            if name == "mul" and len(data) > 1:
                made = [o for k in data for o in origin.get(id(ins[k]), ())]
                gates.update(leaf for leaf, _, n in made if leaf is not None and n < _size(outs[0]))
        elif name not in LINEAR:
            bent |= set().union(*(groups[k] for k in data))
    return Joins(frozenset(summed), frozenset(concatenated), frozenset(bent), frozenset(gates))


def _size(v: Val) -> int:
    n = 1
    for s in v.shape:
        n *= s
    return n


def _calls(eqn: Any) -> bool:
    """Whether the equation only wraps other equations, which are looked at themselves."""
    return any(hasattr(x, "eqns") or hasattr(x, "jaxpr") for p in eqn.params.values()
               for x in (p if isinstance(p, tuple | list) else (p,)))  # fmt: skip
