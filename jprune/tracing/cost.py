"""The cost polynomial: MACs, parameters and bytes as functions of the group widths.

Every term is a product of axis widths, so integer widths give exact Python integers and real-valued (traced) widths
give differentiable ones. A group that lives in a scan body may have one width per layer: its terms are summed over
the layers instead of multiplied by their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer

from jprune.tracing import layout as L
from jprune.tracing.layout import Fixed, Layout
from jprune.tracing.structure import loops_around
from jprune.tracing.walk import Path

if TYPE_CHECKING:
    from jprune.graph import Graph

Widths = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a function costs for one call at the traced input sizes.

    Attributes:
      macs: MACs of all convolutions and matrix products (padding positions counted).
      params: entries of the parameter leaves.
      state: entries of the other leaves (running statistics).
      bytes: bytes of all leaves.
      activation_bytes: bytes written by all convolutions and matrix products.
    """

    macs: Any
    params: Any
    state: Any
    bytes: Any
    activation_bytes: Any


def product(layouts: Iterable[Layout], widths: Widths, one: float = 1) -> Any:
    """Product of axis widths, summed over layers where a width is a vector with one entry per layer.

    `one` is 1.0 where a width is a jax float: Python integers beyond 32 bits cannot be multiplied with those.
    """
    return _summed(_per_layer(layouts, widths, one))


def _per_layer(layouts: Iterable[Layout], widths: Widths, one: float) -> Any:
    """`product`, as a vector over the layers where a width is one."""
    total: Any = one
    lengths: Any = 1
    for lay in layouts:
        if len(lay) == 1 and isinstance(lay[0], Fixed) and lay[0].symbol and lay[0].symbol.startswith("@scan"):
            lengths = lengths * widths.get(lay[0].symbol, lay[0].size)
        else:
            total = L.width(lay, widths) * total
    if getattr(total, "ndim", 0):
        return total if lengths == total.shape[0] else total * (lengths // total.shape[0])
    return lengths * total


def _summed(x: Any) -> Any:
    return x.sum() if getattr(x, "ndim", 0) else x


def total_of(graph: Graph, values: Mapping[str, Sequence[Any]], by: str) -> dict[str, Any]:
    """Sums over the contractions of numbers of each (or of vectors over layers); of a cond's branches one counts.

    That is the dearest by the sum of `values[by]` at these very numbers: where all layers of a scan choose for
    themselves, each layer's own dearest.

    Args:
      graph: whose contractions these are.
      values: {name: one value per contraction}.
      by: the name of those that say which branch is the dearest.
    """
    if not any(c.branches for c in graph.contractions):
        return {k: sum((_summed(x) for x in v), 0) for k, v in values.items()}
    rows = [({k: v[i] for k, v in values.items()}, c.branches) for i, c in enumerate(graph.contractions)]

    def add(rows: list[Any], depth: int, layers: int | None) -> dict[str, Any]:
        out: dict[str, Any] = dict.fromkeys(values, 0)
        conds: dict[Any, dict[int, list[Any]]] = {}
        for row, branches in rows:
            if len(branches) > depth:
                path, i = branches[depth]
                conds.setdefault(path, {}).setdefault(i, []).append((row, branches))
                continue
            for k, v in row.items():
                out[k] = _shared(v, layers) + out[k]
        for path, by_branch in conds.items():
            inside = _layers_around(graph, path)
            best: dict[str, Any] | None = None
            for i in sorted(by_branch):
                found = add(by_branch[i], depth + 1, inside)
                if best is None:
                    best = found
                    continue
                better = found[by] > best[by]
                best = {k: _where(better, found[k], best[k]) for k in values}
            for k, v in (best or {}).items():
                out[k] = _shared(v, layers) + out[k]
        return out

    return {k: _summed(v) for k, v in add(rows, 0, None).items()}


def _layers_around(graph: Graph, path: Path) -> int | None:
    """Number of layers of the innermost scan whose body holds the equation at a call path."""
    around = loops_around(path, graph.analysis, graph.scan_symbols)
    return L.full_size(around[-1]) if around else None


def _shared(v: Any, layers: int | None) -> Any:
    """A number for all layers as one per layer where each layer chooses a branch; else a sum over them."""
    if layers is None:
        return _summed(v)
    if getattr(v, "ndim", 0):
        return v if v.shape[0] == layers else _shared(v.sum(), layers)
    if isinstance(v, int):
        return np.full(layers, v // layers, object)
    return v / layers * (jax.numpy.ones(layers) if isinstance(v, jax.Array) else np.ones(layers))


def _where(better: Any, a: Any, b: Any) -> Any:
    if isinstance(better, jax.Array):
        return jax.numpy.where(better, a, b)
    return np.where(better, a, b) if np.ndim(better) else (a if better else b)


def evaluate(graph: Graph, widths: Widths) -> Cost:
    """Cost at these widths: {group id: number, or (layers,) vector}; absent groups are whole."""
    return Cost(**quantities(graph, widths, [f.name for f in dataclasses.fields(Cost)]))


def quantities(graph: Graph, widths: Widths, names: Sequence[str]) -> dict[str, Any]:
    """Some of the fields of `Cost`: allocation prices one quantity hundreds of times."""
    widths = {k: _exact(v) for k, v in widths.items()}
    one: float = 1.0 if any(isinstance(w, jax.Array) for w in widths.values()) else 1
    out: dict[str, Any] = dict.fromkeys(names, 0)
    terms = graph.contractions
    if {"macs", "activation_bytes"} & set(out):
        values = {"macs": [one * t.coefficient * _per_layer(t.factors, widths, one) for t in terms]}
        if "activation_bytes" in out:
            values["activation_bytes"] = [t.itemsize * _per_layer(t.out, widths, one) for t in terms]
        found = total_of(graph, values, "macs")
        out.update({k: found[k] for k in out if k in found})
    for leaf in graph.leaves.values() if {"params", "state", "bytes"} & set(out) else ():
        n = product(leaf.layouts, widths, one)
        if "bytes" in out:
            out["bytes"] = leaf.dtype.itemsize * n + out["bytes"]
        kind = "params" if leaf.is_param else "state"
        if kind in out:
            out[kind] = n + out[kind]
    return {name: _plain(x) for name, x in out.items()}


def entries(graph: Graph, widths: Widths, paths: Iterable[str]) -> Any:
    """Entries of these leaves together, at these widths: the part of `Cost.params` (or `state`) that is theirs."""
    widths = {k: _exact(v) for k, v in widths.items()}
    one: float = 1.0 if any(isinstance(w, jax.Array) for w in widths.values()) else 1
    return _plain(sum(product(graph.leaves[p].layouts, widths, one) for p in paths))


def fraction(graph: Graph, widths: Widths, total: float) -> Any:
    """MACs at these (traced, real) widths over `total`, exact to rounding in float32.

    Each term is divided before it is added: sums of whole MACs would lose integers above 2^24. This is
    the differentiable constraint of a loss term.
    """
    terms = graph.contractions
    values = {"macs": [t.coefficient / total * _per_layer(t.factors, widths, 1.0) for t in terms]}
    return total_of(graph, values, "macs")["macs"] + 0.0


def _exact(w: Any) -> Any:
    """Integer widths as Python integers (or vectors of them), so that products cannot overflow or round.

    Traced integers become floats: 32 bits hold no MACs.
    """
    if isinstance(w, bool | np.bool_):
        raise ValueError("a width is a number of units, not a truth value; pass keep sets to graph.cost(keep=...)")
    if isinstance(w, jax.Array) and np.issubdtype(w.dtype, np.integer):
        w = w.astype(float) if isinstance(w, Tracer) else np.asarray(w)
    if isinstance(w, int | np.integer):
        return int(w)
    if isinstance(w, np.ndarray) and np.issubdtype(w.dtype, np.integer):
        return int(w) if w.ndim == 0 else w.astype(object)
    return w


def _plain(x: Any) -> Any:
    return int(x) if isinstance(x, np.integer) else x


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One row of the per-layer table."""

    name: str
    primitive: str
    macs: int
    out_widths: tuple[int, ...]


def per_layer(graph: Graph, widths: Widths) -> list[LayerCost]:
    """Cost of every contraction, in program order; nothing for those in a branch of a cond that is not the dearest."""
    widths = {k: _exact(v) for k, v in widths.items()}
    terms = graph.contractions
    macs = [t.coefficient * _per_layer(t.factors, widths, 1) for t in terms]
    paid = {"macs": macs}
    if any(t.branches for t in terms):  # what each term adds to the whole
        paid |= {str(i): [m if i == k else 0 for k, m in enumerate(macs)] for i in range(len(terms))}
        total = total_of(graph, paid, "macs")
        macs = [total[str(i)] for i in range(len(terms))]
    rows = []
    for term, m in zip(terms, macs, strict=True):
        sizes = tuple(int(np.max(L.width(lay, widths))) for lay in term.out)
        rows.append(LayerCost(term.name, term.primitive, int(_summed(m)), sizes))
    return rows


def marginal(graph: Graph, widths: Widths) -> dict[str, dict[str, Any]]:
    """Per group, what its last unit costs (for a stacked group: one more unit in every layer)."""
    base = {g: widths.get(g, info.size) for g, info in graph.groups.items()}
    here = evaluate(graph, base)
    out = {}
    for g in graph.groups:
        less = evaluate(graph, {**base, g: base[g] - 1})
        out[g] = {f.name: getattr(here, f.name) - getattr(less, f.name) for f in dataclasses.fields(Cost)}
    return out
