"""What one trace of a function knows: leaves, dependency groups, layouts per call path, cost terms, uses."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jprune.tracing import layout as L
from jprune.tracing import tags as T
from jprune.tracing.errors import TraceError
from jprune.tracing.layout import Concat, Fixed, Layout, Reordered, Unit
from jprune.tracing.paths import path_str
from jprune.tracing.polymorphism import difference
from jprune.tracing.tags import Frozen
from jprune.tracing.walk import Analysis, Path, Use, Val, user_line


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


def _symbol(layout: Layout) -> str | None:
    return layout[0].symbol if len(layout) == 1 and isinstance(layout[0], Fixed) else None


class Structure:
    """The static result of a trace; hashable by identity, no arrays but folded constants.

    Attributes:
      groups: prunable groups by id.
      leaves: every leaf of the variables by path.
      contractions: terms of the cost polynomial.
      output_layouts: layouts of each output's axes.
      unsupported: primitives without a rule -> source lines.
      loops_counted_once: lines of while loops (their trip count is unknown, so their cost is counted once).
    """

    def __init__(
        self,
        closed: Any,
        analysis: Analysis,
        leaves: Mapping[str, Leaf],
        groups: Mapping[str, Group],
        layout: Layouts,
        scan_symbols: Mapping[Path, str],
        in_tree: Any,
        out_tree: Any,
        param_treedef: Any,
        used_invars: Sequence[bool],
        outputs: Sequence[Val],
        const_vals: Sequence[Val],
        inputs: Sequence[tuple[str, Val]],
        again: Callable[[Sequence[Any]], Any],
    ):
        self.groups = dict(groups)
        self.leaves = dict(leaves)
        self.unsupported = {k: tuple(sorted(set(v))) for k, v in analysis.unsupported.items()}
        self.jaxpr = closed
        self.analysis = analysis
        self.scan_symbols = dict(scan_symbols)
        self.in_tree, self.out_tree, self.param_treedef = in_tree, out_tree, param_treedef
        self.used_invars = tuple(used_invars)
        self.layout = layout
        self._layout_cache: dict[Path, Any] = {}
        self.const_vals = tuple(const_vals)
        self.input_vals = tuple(v for _, v in inputs)
        self.output_vals = tuple(outputs)
        self.rules = analysis.rules
        self.input_dims = [(path, [_symbol(layout(t)) for t in v.tags]) for path, v in inputs]
        self.input_shapes = [v.shape for _, v in inputs]
        self._input_dtypes = [jax.dtypes.result_type(jax.ShapeDtypeStruct((), v.dtype)) for _, v in inputs]
        self._again = again
        self._differences: dict[tuple[tuple[str, int], ...], str | None] = {}
        self.output_layouts = tuple(tuple([self.layout(t) for t in v.tags]) for v in outputs)
        self.loops_counted_once = tuple(
            sorted({user_line(e) for e in analysis.eqns.values() if e.primitive.name == "while"})
        )
        self.contractions = tuple(self._contractions())

    __hash__ = object.__hash__

    def _axes(self, values: Sequence[Val]) -> list[tuple[Layout, ...]]:
        return [tuple([self.layout(t) for t in v.tags]) for v in values]

    def layouts_at(self, path: Path) -> tuple[list[tuple[Layout, ...]], list[tuple[Layout, ...]]]:
        """Axis layouts of the operands and results of the equation at a call path."""
        found = self._layout_cache.get(path)
        if found is None:
            ins, outs = self.analysis.records[path]
            found = (self._axes(ins), self._axes(outs))
            self._layout_cache[path] = found
        return found

    def bind_inputs(self, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, int]]:
        """Flattened inputs and the sizes of their free dimensions; TraceError where they do not fit the trace."""
        flat = jax.tree_util.tree_flatten_with_path(tuple(inputs))[0]
        symbols: dict[str, int] = {}
        if len(flat) != len(self.input_dims):
            raise TraceError(f"{len(flat)} input arrays given, {len(self.input_dims)} were traced")
        given, traced_paths = [path_str(p) for p, _ in flat], [p for p, _ in self.input_dims]
        if given != traced_paths:
            odd = next(p for p, q in zip(given, traced_paths, strict=True) if p != q)
            raise TraceError(f"input {odd} was not traced: the inputs traced with are {', '.join(traced_paths)}")
        for path, dtype, (_, x) in zip(traced_paths, self._input_dtypes, flat, strict=True):
            now = jax.dtypes.result_type(x)
            if now != dtype and not all(jax.numpy.issubdtype(t, np.inexact) for t in (now, dtype)):
                raise TraceError(
                    f"input {path} is {now}, but {dtype} was traced: a cast that did nothing then is not in the trace; "
                    "cast it, or trace again with this type"
                )
        for (path, dims), traced, (_, x) in zip(self.input_dims, self.input_shapes, flat, strict=True):
            if len(np.shape(x)) != len(traced):
                raise TraceError(f"input {path} has {len(np.shape(x))} axes, {len(traced)} were traced")
            for axis, (symbol, n, m) in enumerate(zip(dims, traced, np.shape(x), strict=True)):
                if symbol is None and n != m:
                    raise TraceError(
                        f"axis {axis} of input {path} has size {m}, but {n} was traced and the function "
                        "depends on it; trace again with the new size"
                    )
                if symbol is not None and symbols.setdefault(symbol, m) != m:
                    raise TraceError(f"axis {axis} of input {path} has size {m}; another input has {symbols[symbol]}")
        changed = self.difference_at(symbols)
        if changed is not None:
            sizes = ", ".join(f"axis {a} of input {p}: {n} instead of {m}" for p, a, n, m in self._changes(symbols))
            raise TraceError(
                f"the function was traced at other input sizes ({sizes}) and is another function at these: {changed}; "
                "trace again with the new sizes"
            )
        return [x if hasattr(x, "dtype") else jax.numpy.asarray(x) for _, x in flat], symbols

    def difference_at(self, symbols: Mapping[str, int]) -> str | None:
        """What the function does otherwise at these sizes of its inputs than the trace says; None: nothing.

        Python code can make a number of a size (a mean written by hand), which the trace then holds. The function is
        traced once more at each new set of sizes; of an empty batch there is nothing that could be wrong.
        """
        if not any(self._changes(symbols)) or 0 in symbols.values():
            return None
        key = tuple(sorted(symbols.items()))
        if key not in self._differences:
            leaves = iter(
                tuple(symbols.get(str(s), n) if s else n for s, n in zip(dims, shape, strict=True))
                for (_, dims), shape in zip(self.input_dims, self.input_shapes, strict=True)
            )
            second = self._again(list(leaves))
            self._differences[key] = difference(self.analysis, second, self.layouts_at, symbols)
        return self._differences[key]

    def _changes(self, symbols: Mapping[str, int]) -> Iterator[tuple[str, int, int, int]]:
        for (path, dims), shape in zip(self.input_dims, self.input_shapes, strict=True):
            for axis, (symbol, n) in enumerate(zip(dims, shape, strict=True)):
                if symbol is not None and symbols.get(symbol, n) != n:
                    yield path, axis, symbols[symbol], n

    def free_dimensions(self) -> list[tuple[str, int]]:
        """Input axes, as (input path, axis), at whose other sizes the function is the traced one; tried with twice it."""
        free = []
        tried: dict[str, bool] = {}
        for (path, dims), shape in zip(self.input_dims, self.input_shapes, strict=True):
            for axis, (symbol, n) in enumerate(zip(dims, shape, strict=True)):
                if symbol is None:
                    continue
                if symbol not in tried:
                    try:
                        tried[symbol] = self.difference_at({symbol: 2 * n}) is None
                    except Exception:  # whatever the function raises, it does not take this size
                        tried[symbol] = False
                if tried[symbol]:
                    free.append((path, axis))
        return free

    def select_used(self, leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The arguments of the traced jaxpr: those leaves and inputs that an output depends on."""
        return [x for x, used in zip([*leaves, *inputs], self.used_invars, strict=True) if used]

    def _loops(self, path: Path) -> list[Layout]:
        """Lengths of the scans around an equation, as factors."""
        out = []
        for i in range(1, len(path)):
            if path[:i] in self.analysis.scan_of and path[i] == "body":
                out.append((Fixed(self.analysis.scan_of[path[:i]].n, self.scan_symbols[path[:i]]),))
        return out

    def _contractions(self) -> list[Contraction]:
        out = []
        for path, term in self.analysis.macs.items():
            loops = self._loops(path)
            name = term.leaf or f"{term.primitive} at {term.where}"
            factors = [*loops, *(self.layout(t) for t in term.factors)]
            results = [*loops, *(self.layout(t) for t in term.out_tags)]
            summed = tuple(self.layout(t) for t in term.contracted)
            out.append(
                Contraction(
                    name,
                    term.primitive,
                    term.coefficient,
                    tuple(factors),
                    tuple(results),
                    summed,
                    term.itemsize,
                    path,
                    term.eqn,
                    tuple(
                        (path[:i], int(str(key).removeprefix("branch")))
                        for i, key in enumerate(path)
                        if str(key).startswith("branch")
                    ),
                )
            )
        return out

    def loop_around(self, path: Path) -> int | None:
        """Number of layers of the innermost scan whose body holds the equation at a call path."""
        around = self._loops(path)
        return L.full_size(around[-1]) if around else None

    @functools.cached_property
    def taps(self) -> dict[str, Tap]:
        """Every place a leaf meets data, by tap id."""
        by_leaf = collections.defaultdict(list)
        for use in self.analysis.uses.values():
            by_leaf[use.leaf].append(use)
        out = {}
        for leaf, uses in by_leaf.items():
            for k, use in enumerate(uses):
                ins, outs = self.layouts_at(use.path)
                scan_path = layers = None
                info = self.leaves[leaf]
                if info.layer_axis is not None:
                    symbol = info.layouts[info.layer_axis][0].symbol  # pyright: ignore[reportAttributeAccessIssue]
                    for i in range(len(use.path), 0, -1):
                        if self.scan_symbols.get(use.path[:i]) == symbol and use.path[:i] != use.path:
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
