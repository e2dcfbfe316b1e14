"""What a graph is made of: leaves, dependency groups, places to read activations, terms of the cost, layouts of axes."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jprune.tracing import layout as L
from jprune.tracing import tags as T
from jprune.tracing.layout import Concat, Fixed, Layout, Reordered, Unit
from jprune.tracing.tags import Frozen
from jprune.tracing.walk import Analysis, Path, Use


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the variables.

    Attributes:
      path: '/'-joined keys.
      shape, dtype: before pruning.
      layouts: one per axis.
      frozen: per axis, why (part of) it is unprunable, or None.
      layer_axis: the axis over the layers of a scan, if it is stacked.
      is_param: counts as a parameter (rather than as state such as running statistics).
      used: whether any output depends on it.
      follows: the leaf that it is cut along with, where the function neither reads nor returns it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    layouts: tuple[Layout, ...]
    frozen: tuple[Frozen | None, ...]
    layer_axis: int | None
    is_param: bool
    used: bool
    follows: str | None = None


@dataclasses.dataclass(frozen=True)
class Member:
    """One leaf axis that a group's units own positions of.

    Attributes:
      path, axis: the leaf and its axis.
      role: "out" (produces the channel), "in" (consumes it), "scale", "shift", "lookup" or "other".
      primitive: the primitive that uses the leaf this way.
      layer_axis: the leaf's axis over layers, if it is stacked.
      layout: of that axis.
      group: the group's id.
    """

    path: str
    axis: int
    role: str
    primitive: str
    layer_axis: int | None
    layout: Layout
    group: str

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """(size, m) int32: the m positions on this axis that each unit owns."""
        p = L.unit_positions(self.layout, self.group)
        assert p is not None
        return p


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes that must be cut together; its `size` units are what pruning decides about.

    Attributes:
      id: "leaf path:axis" of the axis that produces it (with "#k" where several groups share that axis).
      size: number of units.
      members: every leaf axis involved.
      exact: removing units equals zeroing them, to rounding.
      reconfigure_exact: so does re-running the model's Python code at the new width.
      notes: where exactness is lost.
      layers: L where the group lives in the body of a scan over L stacked layers, else None; keep sets and scores
        then have shape (L, size).
      scan: symbol of that scan.
    """

    id: str
    size: int
    members: tuple[Member, ...]
    exact: bool
    reconfigure_exact: bool
    notes: tuple[str, ...]
    layers: int | None
    scan: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its scores and keep sets."""
        return (self.size,) if self.layers is None else (self.layers, self.size)


@dataclasses.dataclass(frozen=True)
class Tap:
    """A place to read activations: one use of one leaf.

    Attributes:
      id: the leaf's path (with "#k" where the leaf is used several times).
      leaf: the leaf's path.
      primitive: dot_general, conv_general_dilated, mul, add, gather, ...
      layers: L where the use is in the body of a scan over stacked leaves, else None.
      in_layouts, out_layouts: layouts of the feature axes of the activation that enters and of the result.
    """

    id: str
    leaf: str
    primitive: str
    layers: int | None
    in_layouts: tuple[Layout, ...]
    out_layouts: tuple[Layout, ...]
    use: Use = dataclasses.field(repr=False, compare=False)
    scan_path: Path | None = dataclasses.field(repr=False, compare=False, default=None)

    @property
    def where(self) -> str:
        """The user's source line."""
        return self.use.where


@dataclasses.dataclass(frozen=True)
class Contraction:
    """MACs of one equation: coefficient times the widths of the factors.

    Attributes:
      name: the leaf it multiplies with, or the primitive and line for products of activations.
      primitive: dot_general or conv_general_dilated.
      coefficient: the sizes nothing can prune.
      factors: layouts whose widths multiply (a stacked layer axis or a loop length is a `Fixed` with a symbol).
      out: layouts of the result's axes, loop lengths included.
      contracted: layouts of the axes that are summed over.
      itemsize: bytes per entry of the result.
      path: call path of the equation.
      eqn: the equation.
      branches: (call path of a cond, which of its branches) for each around it, outermost first; one branch runs.
    """

    name: str
    primitive: str
    coefficient: int
    factors: tuple[Layout, ...]
    out: tuple[Layout, ...]
    contracted: tuple[Layout, ...]
    itemsize: int
    path: Path = dataclasses.field(repr=False, compare=False)
    eqn: Any = dataclasses.field(repr=False, compare=False)
    branches: tuple[tuple[Path, int], ...] = ()


class Layouts:
    """The static layouts of settled tags, given the group ids and symbols of their atoms.

    Thousands of values share a few hundred dims, so each dim is translated once.
    """

    def __init__(self, names: Mapping[int, str], symbols: Mapping[int, str]):
        self._names = names
        self._symbols = symbols
        self._of_dim: dict[int, tuple[T.Dim, L.Dim]] = {}  # by identity; the dim is held, so that its id stays its own
        self._of_tag: dict[int, tuple[T.Tag, Layout]] = {}

    def __call__(self, tag: T.Tag) -> Layout:
        """The layout of one axis."""
        found = self._of_tag.get(id(tag))
        if found is None:
            found = self._of_tag[id(tag)] = (tag, tuple([self._dim(d) for d in T.norm(tag)]))
        return found[1]

    def _dim(self, d: T.Dim) -> L.Dim:
        found = self._of_dim.get(id(d))
        if found is None:
            found = self._of_dim[id(d)] = (d, self._translated(d))
        return found[1]

    def _translated(self, d: T.Dim) -> L.Dim:
        if isinstance(d, T.Sum):
            return Concat(tuple([self(p) for p in d.parts]), d.n)
        if isinstance(d, T.Order):
            return Reordered(self(d.inner), tuple(d.index.tolist()))
        name = self._names.get(id(d))
        return Fixed(d.n, self._symbols.get(id(d))) if name is None else Unit(name, d.n)


def loops_around(path: Path, analysis: Analysis, scan_symbols: Mapping[Path, str]) -> list[Layout]:
    """Lengths of the scans around an equation, as factors."""
    return [
        (Fixed(analysis.scan_of[path[:i]].n, scan_symbols[path[:i]]),)
        for i in range(1, len(path))
        if path[:i] in analysis.scan_of and path[i] == "body"
    ]


def contractions_of(analysis: Analysis, layout: Layouts, scan_symbols: Mapping[Path, str]) -> Iterator[Contraction]:
    """The terms of the cost polynomial, in program order."""
    for path, term in analysis.macs.items():
        loops = loops_around(path, analysis, scan_symbols)
        yield Contraction(
            term.leaf or f"{term.primitive} at {term.where}",
            term.primitive,
            term.coefficient,
            (*loops, *[layout(t) for t in term.factors]),
            (*loops, *[layout(t) for t in term.out_tags]),
            tuple([layout(t) for t in term.contracted]),
            term.itemsize,
            path,
            term.eqn,
            tuple(
                (path[:i], int(str(key).removeprefix("branch")))
                for i, key in enumerate(path)
                if str(key).startswith("branch")
            ),
        )


def taps_of(
    analysis: Analysis, leaves: Mapping[str, Leaf], layouts_at: Callable[[Path], Any], scan_symbols: Mapping[Path, str]
) -> dict[str, Tap]:
    """Every place a leaf meets data, by tap id."""
    by_leaf = collections.defaultdict(list)
    for use in analysis.uses.values():
        by_leaf[use.leaf].append(use)
    out = {}
    for leaf, uses in by_leaf.items():
        for k, use in enumerate(uses):
            ins, outs = layouts_at(use.path)
            scan_path = layers = None
            info = leaves[leaf]
            if info.layer_axis is not None:
                symbol = info.layouts[info.layer_axis][0].symbol  # pyright: ignore[reportAttributeAccessIssue]
                for i in range(len(use.path), 0, -1):
                    if scan_symbols.get(use.path[:i]) == symbol and use.path[:i] != use.path:
                        scan_path, layers = use.path[:i], info.shape[info.layer_axis]
                        break
            key = leaf if len(uses) == 1 else f"{leaf}#{k}"
            out[key] = Tap(
                key,
                leaf,
                use.primitive,
                layers,
                tuple(ins[use.data_operand][i] for i in use.data_features),
                tuple(outs[0][i] for i in use.out_features),
                use,
                scan_path,
            )
    return out
