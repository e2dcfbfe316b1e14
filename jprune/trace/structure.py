"""What one trace of a function knows: leaves, dependency groups, layouts per call path, cost terms, uses."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from jprune.trace import layout as L
from jprune.trace import tags as T
from jprune.trace.analysis import DIVISOR, Analysis, Path, Rule, Use, Val, user_line
from jprune.trace.errors import TraceError
from jprune.trace.layout import Concat, Fixed, Layout, Unit
from jprune.trace.leafpaths import flatten, path_str
from jprune.trace.rules import BUILT_IN
from jprune.trace.tags import Frozen


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
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    layouts: tuple[Layout, ...]
    frozen: tuple[Frozen | None, ...]
    layer_axis: int | None
    is_param: bool
    used: bool


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
      where: the user's source line.
    """

    id: str
    leaf: str
    primitive: str
    layers: int | None
    in_layouts: tuple[Layout, ...]
    out_layouts: tuple[Layout, ...]
    where: str
    use: Use = dataclasses.field(repr=False, compare=False)
    scan_path: Path | None = dataclasses.field(repr=False, compare=False, default=None)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Multiply-accumulates of one equation: coefficient times the widths of the factors.

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


def to_layout(tag: T.Tag, names: Mapping[int, str], symbols: Mapping[int, str]) -> Layout:
    """The static layout of a settled tag, given the group ids and symbols of its atoms."""
    out: list[L.Dim] = []
    for d in T.norm(tag):
        if isinstance(d, T.Sum):
            out.append(Concat(tuple(to_layout(p, names, symbols) for p in d.parts), d.n))
        elif id(d) in names:
            out.append(Unit(names[id(d)], d.n))
        else:
            out.append(Fixed(d.n, symbols.get(id(d))))
    return tuple(out)


def _symbol(layout: Layout) -> str | None:
    return layout[0].symbol if len(layout) == 1 and isinstance(layout[0], Fixed) else None


class Structure:
    """The static result of a trace; hashable by identity, no arrays but folded constants.

    Attributes:
      groups: prunable groups by id.
      leaves: every leaf of the variables by path.
      taps: every place a leaf meets data, by tap id.
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
        names: Mapping[int, str],
        input_symbols: Mapping[int, str],
        scan_symbols: Mapping[Path, str],
        in_tree: Any,
        out_tree: Any,
        param_treedef: Any,
        used_invars: Sequence[bool],
        outputs: Sequence[Val],
        const_vals: Sequence[Val],
        inputs: Sequence[tuple[str, Val]],
    ):
        self.groups = dict(groups)
        self.leaves = dict(leaves)
        self.unsupported = {k: tuple(sorted(set(v))) for k, v in analysis.unsupported.items()}
        self.jaxpr = closed
        self.analysis = analysis
        self.scan_symbols = dict(scan_symbols)
        self.in_tree, self.out_tree, self.param_treedef = in_tree, out_tree, param_treedef
        self.used_invars = tuple(used_invars)
        self._names = names
        self._symbols = input_symbols
        self._layout_cache: dict[Path, Any] = {}
        self.const_vals = tuple(const_vals)
        self.rules = analysis.rules
        self.input_dims = [(path, [_symbol(to_layout(t, names, input_symbols)) for t in v.tags]) for path, v in inputs]
        self.input_shapes = [v.shape for _, v in inputs]
        self.output_layouts = tuple(tuple(self.layout(t) for t in v.tags) for v in outputs)
        self.loops_counted_once = tuple(sorted(self._while_lines(closed.jaxpr)))
        self.contractions = tuple(self._contractions())
        self.taps = self._taps()

    __hash__ = object.__hash__

    def layout(self, tag: T.Tag) -> Layout:
        """The static layout of a settled tag."""
        return to_layout(tag, self._names, self._symbols)

    def _axes(self, values: Sequence[Val]) -> list[tuple[Layout, ...]]:
        return [tuple(self.layout(t) for t in v.tags) for v in values]

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
        return [x if hasattr(x, "dtype") else jax.numpy.asarray(x) for _, x in flat], symbols

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
                )
            )
        return out

    def _taps(self) -> dict[str, Tap]:
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
                    use.where,
                    use,
                    scan_path,
                )
        return out

    def _while_lines(self, jaxpr: Any) -> set[str]:
        found = set()
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "while":
                found.add(user_line(eqn))
            for p in eqn.params.values():
                for sub in p if isinstance(p, tuple | list) else (p,):
                    if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                        found |= self._while_lines(getattr(sub, "jaxpr", sub))
        return found


def analyse(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    output_free: Sequence[tuple[str, int]] = (),
    rules: Mapping[str, Rule] | None = None,
    fold_constants: bool = False,
    is_param: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Trace `fn(params, *inputs)` and return the constructor arguments of `Structure`."""
    flat = flatten(params)
    if not flat:
        raise TraceError("the parameters have no leaves; pass the variables the function is to be pruned in")
    for path, x in flat:
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TraceError(f"leaf {path!r} is a {type(x).__name__}, not an array; partition static fields out first")
    paths = [p for p, _ in flat]
    if len(set(paths)) != len(paths):
        twice = [p for p, n in collections.Counter(paths).items() if n > 1]
        raise TraceError(f"two leaves share the path {twice[0]!r}; give them different keys")
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params), _input_structs(inputs)
    try:
        closed, out_shape = jax.make_jaxpr(lambda p, xs: fn(p, *xs), return_shape=True)(*structs)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.UnexpectedTracerError,
    ) as e:
        raise TraceError(
            "the function cannot be traced: it needs concrete values of its arguments "
            f"({str(e).splitlines()[0]}); close over static arguments instead of passing them"
        ) from e
    used_all = [True] * len(closed.jaxpr.outvars)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, used_all)
    closed = type(closed)(jaxpr, closed.consts)

    a = Analysis({**BUILT_IN, **USER_RULES, **(rules or {})}, fold_constants)
    leaf_vals = [
        Val(tuple(x.shape), x.dtype, tuple(a.fresh(n) for n in x.shape), (True,) * len(x.shape), leaf=p)
        for p, x in flat
    ]
    input_atoms: list[T.Atom] = []
    input_vals: list[tuple[str, Val]] = []
    for path, x in jax.tree_util.tree_flatten_with_path(structs[1])[0]:
        tags = []
        for axis, n in enumerate(x.shape):
            atom = T.Atom(n, Frozen("MODEL_INPUT", f"input {path_str(path)} axis {axis}"), input_dim=len(input_atoms))
            input_atoms.append(atom)
            tags.append((atom,) if n != 1 else ())  # a size of 1 broadcasts: it cannot stand for other sizes
        input_vals.append((path_str(path), Val(tuple(x.shape), x.dtype, tuple(tags), (False,) * len(tags))))
    every = [*leaf_vals, *(v for _, v in input_vals)]
    consts = [a.constant(c, sliceable=True) for c in closed.consts]
    outputs = a.run(closed.jaxpr, consts, [v for v, u in zip(every, used, strict=True) if u], ())
    a.eqn = None
    _settle_outputs(a, outputs, out_shape, [v for v, u in zip(leaf_vals, used, strict=False) if u], output_free)
    return _finish(
        a,
        closed,
        flat,
        leaf_vals,
        used,
        outputs,
        consts,
        input_vals,
        is_param,
        jax.tree.structure((params, tuple(inputs))),
        jax.tree.structure(out_shape),
        jax.tree.structure(params),
    )


def _input_structs(inputs: Sequence[Any]) -> Any:
    """Shapes and types of the inputs; plain numbers stay weakly typed."""

    def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        if isinstance(x, bool | int | float | complex):
            return jax.ShapeDtypeStruct((), jax.dtypes.result_type(x), weak_type=True)
        raise TraceError(
            f"input {path_str(path)} is a {type(x).__name__}, not an array or a number; close over it instead of "
            "passing it"
        )

    return jax.tree_util.tree_map_with_path(one, tuple(inputs))


def _settle_outputs(
    a: Analysis,
    outputs: Sequence[Val],
    out_shape: Any,
    leaf_vals: Sequence[Val],
    output_free: Sequence[tuple[str, int]],
) -> None:
    """Freeze what leaves the function, but for state that returns to its leaf and axes declared free.

    Only paths with a name in them can mean a leaf: a bare array or the second of a tuple matches by chance.
    """
    free = {(p, axis) for p, axis in output_free}
    by_path = {v.leaf: v for v in leaf_vals if any(k != "." and not k.isdigit() for k in str(v.leaf).split("/"))}
    named = flatten(out_shape)
    for (path, _), v in zip(named, outputs, strict=True):
        own = next((v for p, v in by_path.items() if path == p or path.endswith(f"/{p}")), None)
        if own is not None and own.shape == v.shape:
            for t, u in zip(v.tags, own.tags, strict=True):
                a.unify(t, u)
            continue
        for axis, t in enumerate(v.tags):
            key = (path, axis if (path, axis) in free else axis - len(v.tags))
            if key in free:
                free.discard(key)
            else:
                T.freeze(t, Frozen("MODEL_OUTPUT", f"output {path} axis {axis}"))
    if free:
        known = ", ".join(f"{p!r} with {len(v.shape)} axes" for (p, _), v in zip(named, outputs, strict=True))
        raise TraceError(f"output_free names {sorted(free)[0]}, but the outputs are {known}")


def _finish(
    a: Analysis,
    closed: Any,
    flat: Sequence[tuple[str, Any]],
    leaf_vals: Sequence[Val],
    used: Sequence[bool],
    outputs: Sequence[Val],
    consts: Sequence[Val],
    inputs: Sequence[tuple[str, Val]],
    is_param: Callable[[str], bool] | None,
    in_tree: Any,
    out_tree: Any,
    param_treedef: Any,
) -> dict[str, Any]:
    if is_param is None:
        collections_ = any(p.startswith("params/") for p, _ in flat)
        is_param = (lambda p: p.startswith("params/")) if collections_ else (lambda p: True)
    leaf_used = {v.leaf: u for v, u in zip(leaf_vals, used, strict=False)}
    # live atoms in the order the leaves present them
    owners: dict[int, list[tuple[str, int]]] = collections.OrderedDict()
    atom_of: dict[int, T.Atom] = {}
    for v in leaf_vals:
        if not leaf_used[v.leaf]:
            continue
        for axis, t in enumerate(v.tags):
            for atom in T.atoms(t):
                if atom.reason is None and atom.n > 0:
                    atom_of[id(atom)] = atom
                    where = owners.setdefault(id(atom), [])
                    if (v.leaf, axis) not in where:
                        where.append((str(v.leaf), axis))
                if atom.input_dim is not None:
                    atom.rigid = True  # a parameter axis has this size
    roles = _roles(a)
    names: dict[int, str] = {}
    taken: dict[str, list[int]] = {}
    for key, where in owners.items():
        best = min(where, key=lambda w: (PREFERENCE.index(roles.get((w[0], key), ("other", ""))[0]), where.index(w)))
        taken.setdefault(f"{best[0]}:{best[1]}", []).append(key)
    for base, keys in taken.items():
        for i, key in enumerate(keys):
            names[key] = base if len(keys) == 1 else f"{base}#{i}"
    symbols: dict[int, str] = {}
    for tag in (t for _, v in inputs for t in v.tags):
        settled = T.norm(tag)
        if (
            len(settled) == 1
            and isinstance(settled[0], T.Atom)
            and settled[0].input_dim is not None
            and not settled[0].rigid
        ):
            symbols[id(settled[0])] = f"@in{settled[0].input_dim}"
    scan_symbols = {}
    scan_index: dict[int, str] = {}
    lengths: dict[str, int] = {}
    for path, atom in a.scan_of.items():
        settled = T.norm((atom,))[0]
        scan_index.setdefault(id(settled), f"@scan{len(scan_index)}")
        scan_symbols[path] = symbols[id(settled)] = scan_index[id(settled)]
        lengths[scan_symbols[path]] = atom.n
    local = _body_local(a, set(owners), leaf_vals, scan_index, scan_symbols, outputs)

    leaves = {}
    for (path, x), v in zip(flat, leaf_vals, strict=True):
        layouts = tuple(to_layout(t, names, symbols) for t in v.tags)
        scans = [
            i
            for i, lay in enumerate(layouts)
            if len(lay) == 1 and isinstance(lay[0], Fixed) and lay[0].symbol and lay[0].symbol.startswith("@scan")
        ]
        frozen = tuple(next((atom.reason for atom in T.atoms(t) if atom.reason is not None), None) for t in v.tags)
        if not leaf_used[path]:
            frozen = tuple(Frozen("UNUSED", "no output depends on this leaf") for _ in v.tags)
            layouts = tuple((Fixed(n),) for n in x.shape)
        leaves[path] = Leaf(
            path,
            tuple(x.shape),
            x.dtype if jax.numpy.issubdtype(x.dtype, jax.dtypes.extended) else np.dtype(x.dtype),
            layouts,
            frozen,
            scans[0] if scans else None,
            is_param(path),
            leaf_used[path],
        )
    groups = {}
    for key, where in owners.items():
        atom, gid = atom_of[key], names[key]
        scan = local.get(key)
        members = []
        for path, axis in where:
            role, primitive = roles.get((path, key), ("other", ""))
            leaf = leaves[path]
            members.append(
                Member(path, axis, role, primitive, leaf.layer_axis if scan else None, leaf.layouts[axis], gid)
            )
        notes = tuple(sorted(atom.notes))
        hard = tuple(n for n in notes if not n.startswith(DIVISOR))
        groups[gid] = Group(
            gid, atom.n, tuple(members), not hard, not notes, notes, lengths[scan] if scan else None, scan
        )
    return {
        "closed": closed,
        "analysis": a,
        "leaves": leaves,
        "groups": groups,
        "names": names,
        "input_symbols": symbols,
        "scan_symbols": scan_symbols,
        "in_tree": in_tree,
        "out_tree": out_tree,
        "param_treedef": param_treedef,
        "used_invars": used,
        "outputs": outputs,
        "const_vals": consts,
        "inputs": inputs,
    }


PREFERENCE = ["out", "lookup", "scale", "shift", "other", "in"]


def _roles(a: Analysis) -> dict[tuple[str, int], tuple[str, str]]:
    """(leaf path, atom) -> (role, primitive) from how the leaf is used; producing beats consuming."""
    out: dict[tuple[str, int], tuple[str, str]] = {}
    for use in a.uses.values():
        contracted = {id(x) for t in use.contracted for x in T.atoms(t)}
        for t in use.leaf_tags:
            for atom in T.atoms(t):
                role = "in" if id(atom) in contracted else use.role
                key = (use.leaf, id(atom))
                if key not in out or PREFERENCE.index(role) < PREFERENCE.index(out[key][0]):
                    out[key] = (role, use.primitive)
    return out


def _body_local(
    a: Analysis,
    live: set[int],
    leaf_vals: Sequence[Val],
    scan_index: Mapping[int, str],
    scan_symbols: Mapping[Path, str],
    outputs: Sequence[Val],
) -> dict[int, str]:
    """Atoms that may be kept differently in every layer of a scan, with the symbol of that scan.

    An atom is local to a scan if every value outside the scan's body that contains it also has the layer axis.
    """
    if not scan_index:
        return {}

    def scans_of(v: Val) -> set[str]:
        found = set()
        for t in v.tags:
            t = T.norm(t)
            if len(t) == 1 and id(t[0]) in scan_index:
                found.add(scan_index[id(t[0])])
        return found

    candidates: dict[int, set[str]] = {}
    for v in leaf_vals:
        here = scans_of(v)
        for t in v.tags:
            for atom in T.atoms(t):
                if id(atom) in live:
                    candidates[id(atom)] = candidates.get(id(atom), here) & here
    candidates = {k: s for k, s in candidates.items() if s}

    def check(v: Val, inside: set[str]) -> None:
        ids = {id(x) for t in v.tags for x in T.atoms(t)} & candidates.keys()
        if ids:
            ok = scans_of(v) | inside
            for k in ids:
                candidates[k] = candidates[k] & ok

    for v in (*outputs, *(v for vals in a.folded.values() for v in vals)):
        check(v, set())  # a folded constant is one table for all layers, also where it was made inside the body
    for path, (ins, outs) in a.records.items():
        inside = {scan_symbols[path[:i]] for i in range(1, len(path)) if path[:i] in scan_symbols and path[i] == "body"}
        for v in (*ins, *outs):
            check(v, inside)
    return {k: min(s) for k, s in candidates.items() if s}


USER_RULES: dict[str, Rule] = {}


def register_rule(
    name: str,
    propagate: Callable[..., list[Val]],
    rewrite: Callable[..., dict[str, Any]] | None = None,
    evaluate: Callable[..., list[Any]] | None = None,
) -> None:
    """Teach the tracer a primitive (a custom call, one's own kernel); it applies to every later trace.

    Args:
      name: the primitive's name.
      propagate: (analysis, equation, operand values) -> result values; see `jprune.trace.analysis`.
      rewrite: (equation, sizes) -> equation parameters at the pruned sizes, where parameters hold sizes.
      evaluate: (evaluator, equation, operands, call path) -> results, where binding the primitive is not enough.
    """
    USER_RULES[name] = Rule(propagate, rewrite, evaluate)
