"""How the structure of a function is found: trace it, run the rules over its jaxpr, settle and name what is free."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jprune.tracing import tags as T
from jprune.tracing.errors import TraceError
from jprune.tracing.jaxpr import jaxpr_of
from jprune.tracing.layout import Fixed
from jprune.tracing.paths import flatten, path_str
from jprune.tracing.rules import BUILT_IN, USER_RULES
from jprune.tracing.state import mirrored_leaf, updated_leaf
from jprune.tracing.structure import Group, Layouts, Leaf, Member
from jprune.tracing.tags import Frozen
from jprune.tracing.walk import DIVISOR, Analysis, Path, Rule, Val

if TYPE_CHECKING:
    pass


def analyse(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    output_free: Sequence[tuple[str, int]] = (),
    rules: Mapping[str, Rule] | None = None,
    fold_constants: bool = False,
    is_param: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Trace `fn(params, *inputs)` and return the constructor arguments of `Graph`."""
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
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    every = {**BUILT_IN, **USER_RULES, **(rules or {})}
    given = _input_structs(inputs)

    def at(structs: Any) -> tuple[_Walk, Any]:
        with _no_collection():
            closed, used, out_shape = jaxpr_of(fn, shapes, structs)
            return _walk(closed, used, flat, structs, Analysis(every, fold_constants)), out_shape

    def again(sizes: Sequence[tuple[int, ...]]) -> Analysis:
        it = iter(sizes)
        return at(jax.tree.map(lambda x: jax.ShapeDtypeStruct(next(it), x.dtype, weak_type=x.weak_type), given))[
            0
        ].analysis

    walk, out_shape = at(given)
    with _no_collection():
        written = _settle_outputs(walk, out_shape, output_free)
        return _finish(walk, flat, is_param, params, inputs, out_shape, written, again)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: all that a walk makes stays, and to look for garbage in it takes as long as the walk."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One walk over the whole function: the values of its leaves, inputs, constants and outputs."""

    closed: Any
    used: Sequence[bool]
    analysis: Analysis
    leaves: Sequence[Val]
    inputs: Sequence[tuple[str, Val]]
    consts: Sequence[Val]
    outputs: Sequence[Val]


def _walk(closed: Any, used: Sequence[bool], flat: Sequence[tuple[str, Any]], inputs: Any, a: Analysis) -> _Walk:
    leaf_vals = [
        Val(tuple(x.shape), x.dtype, tuple(a.fresh(n) for n in x.shape), (True,) * len(x.shape), leaf=p)
        for p, x in flat
    ]
    count = 0
    input_vals: list[tuple[str, Val]] = []
    for path, x in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        tags = []
        for axis, n in enumerate(x.shape):
            atom = T.Atom(n, Frozen("MODEL_INPUT", f"input {path_str(path)} axis {axis}"), input_dim=count)
            count += 1
            tags.append((atom,) if n != 1 else ())  # a size of 1 broadcasts: it cannot stand for other sizes
        input_vals.append((path_str(path), Val(tuple(x.shape), x.dtype, tuple(tags), (False,) * len(tags))))
    every = [*leaf_vals, *(v for _, v in input_vals)]
    consts = [a.constant(c, sliceable=True) for c in closed.consts]
    outputs = a.run(closed.jaxpr, consts, [v for v, u in zip(every, used, strict=True) if u], ())
    a.bodies[()] = (closed.jaxpr, closed.consts)
    a.eqn = None
    return _Walk(closed, used, a, leaf_vals, input_vals, consts, outputs)


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


def _settle_outputs(walk: _Walk, out_shape: Any, output_free: Sequence[tuple[str, int]]) -> set[str]:
    """Freeze what leaves the function, but for new values of leaves and axes declared free; returns the written leaves.

    Only paths with a name in them can mean a leaf: a bare array or the second of a tuple matches by chance.
    """
    free = {(p, axis) for p, axis in output_free}
    read = {str(v.leaf) for v, u in zip(walk.leaves, walk.used, strict=False) if u}
    named = flatten(out_shape)
    paths = [p for p, _ in named]
    owns = [updated_leaf(p, v, paths, walk.leaves, read) for p, v in zip(paths, walk.outputs, strict=True)]
    for path, v, own in zip(paths, walk.outputs, owns, strict=True):
        if own is not None:
            for t, u in zip(v.tags, own.tags, strict=True):
                walk.analysis.unify(t, u)
            continue
        for axis, t in enumerate(v.tags):
            key = (path, axis if (path, axis) in free else axis - len(v.tags))
            if key in free:
                free.discard(key)
            else:
                T.freeze(t, Frozen("MODEL_OUTPUT", f"output {path} axis {axis}"))
    if free:
        known = ", ".join(f"{p!r} with {len(v.shape)} axes" for p, v in zip(paths, walk.outputs, strict=True))
        raise TraceError(f"output_free names {sorted(free)[0]}, but the outputs are {known}")
    return {str(own.leaf) for own in owns if own is not None}


def _settle_unread(walk: _Walk, written: set[str], is_param: Callable[[str], bool] | None) -> dict[str, str]:
    """{leaf that the function neither reads nor writes: the leaf it is cut along with}, their axes tied.

    A parameter that is not read has nothing to go by; in a tree without collections nothing tells it from state.
    """
    known = [v for v, u in zip(walk.leaves, walk.used, strict=False) if u or v.leaf in written]
    found = {}
    for v, u in zip(walk.leaves, walk.used, strict=False):
        if u or v.leaf in written or (is_param is not None and is_param(str(v.leaf))):
            continue
        mirror = mirrored_leaf(v, known, is_param is not None)
        if mirror is not None:
            found[str(v.leaf)] = str(mirror.leaf)
            for t, own in zip(v.tags, mirror.tags, strict=True):
                walk.analysis.unify(t, own)
    return found


def _finish(
    walk: _Walk,
    flat: Sequence[tuple[str, Any]],
    is_param: Callable[[str], bool] | None,
    params: Any,
    inputs: Sequence[Any],
    out_shape: Any,
    written: set[str],
    again: Callable[[Sequence[tuple[int, ...]]], Analysis],
) -> dict[str, Any]:
    a, leaf_vals, used = walk.analysis, walk.leaves, walk.used
    if is_param is None and any(p.startswith("params/") for p, _ in flat):
        is_param = _under_params
    mirrors = _settle_unread(walk, written, is_param)
    is_param = is_param or (lambda p: True)
    leaf_used = {v.leaf: u for v, u in zip(leaf_vals, used, strict=False)}
    # live atoms in the order the leaves present them
    owners: dict[int, dict[tuple[str, int], None]] = {}
    atom_of: dict[int, T.Atom] = {}
    known = [v for v in leaf_vals if leaf_used[v.leaf]]
    made_of = {v.leaf: [T.atoms(t) for t in v.tags] for v in leaf_vals}
    unread = [v for v in leaf_vals if v.leaf in written or v.leaf in mirrors]
    for v in (*known, *(v for v in unread if not leaf_used[v.leaf])):  # groups are named after leaves that are read
        for axis, found in enumerate(made_of[v.leaf]):
            for atom in found:
                if atom.reason is None and atom.n > 0:
                    atom_of[id(atom)] = atom
                    owners.setdefault(id(atom), {})[str(v.leaf), axis] = None
                if atom.input_dim is not None:
                    atom.rigid = True  # a parameter axis has this size
    roles = _roles(a)
    names: dict[int, str] = {}
    taken: dict[str, list[int]] = {}
    for key, where in owners.items():
        path, axis = min(where, key=lambda w: (not leaf_used[w[0]], RANK[roles.get((w[0], key), OTHER)[0]]))
        taken.setdefault(f"{path}:{axis}", []).append(key)
    for base, keys in taken.items():
        for i, key in enumerate(keys):
            names[key] = base if len(keys) == 1 else f"{base}#{i}"
    symbols: dict[int, str] = {}
    for tag in (t for _, v in walk.inputs for t in v.tags):
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
    local = _body_local(a, set(owners), leaf_vals, scan_index, scan_symbols, walk.outputs)

    layout = Layouts(names, symbols)
    leaves = {}
    for (path, x), v in zip(flat, leaf_vals, strict=True):
        layouts = tuple([layout(t) for t in v.tags])
        scans = [
            i
            for i, lay in enumerate(layouts)
            if len(lay) == 1 and isinstance(lay[0], Fixed) and lay[0].symbol and lay[0].symbol.startswith("@scan")
        ]
        frozen = tuple([_why(found, n) for found, n in zip(made_of[path], x.shape, strict=True)])
        if not leaf_used[path] and path not in written and path not in mirrors:
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
            mirrors.get(path),
        )
    groups = {}
    for key, where in owners.items():
        atom, gid = atom_of[key], names[key]
        scan = local.get(key)
        members = []
        for path, axis in where:
            role, primitive = roles.get((path, key), OTHER)
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
        "closed": walk.closed,
        "analysis": a,
        "leaves": leaves,
        "groups": groups,
        "layout": layout,
        "scan_symbols": scan_symbols,
        "in_tree": jax.tree.structure((params, tuple(inputs))),
        "out_tree": jax.tree.structure(out_shape),
        "param_treedef": jax.tree.structure(params),
        "used_invars": used,
        "outputs": walk.outputs,
        "const_vals": walk.consts,
        "inputs": walk.inputs,
        "again": again,
    }


def _under_params(path: str) -> bool:
    return path.startswith("params/")


def _why(found: Sequence[T.Atom], n: int) -> Frozen | None:
    """Why an axis, or part of it, is unprunable; single positions laid together have no atom that says it."""
    for atom in found:
        if atom.reason is not None:
            return atom.reason
    return Frozen(T.SINGLE_INDEX) if n > 1 and not found else None


RANK = {role: k for k, role in enumerate(("out", "lookup", "scale", "shift", "other", "in"))}  # groups are named by it
OTHER = ("other", "")


def _roles(a: Analysis) -> dict[tuple[str, int], tuple[str, str]]:
    """(leaf path, atom) -> (role, primitive) from how the leaf is used; producing beats consuming."""
    out: dict[tuple[str, int], tuple[str, str]] = {}
    for use in a.uses.values():
        contracted = {id(x) for t in use.contracted for x in T.atoms(t)}
        for t in use.leaf_tags:
            for atom in T.atoms(t):
                role = "in" if id(atom) in contracted else use.role
                key = (use.leaf, id(atom))
                if key not in out or RANK[role] < RANK[out[key][0]]:
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

    An atom is local to a scan if every value outside the scan's body that contains it also has the layer axis, and
    nothing reorders or mixes that axis.
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
    for v in (*leaf_vals, *(v for ins, outs in a.records.values() for v in (*ins, *outs))):
        for t in v.tags:
            for atom in T.reordered(t):  # an index written for the units that stay is one for all layers
                candidates.pop(id(atom), None)

    def check(v: Val, inside: set[str], ordered: bool = True) -> None:
        ids = {id(x) for t in v.tags for x in T.atoms(t)} & candidates.keys()
        if ids:
            ok = scans_of(v) | inside if ordered else inside
            for k in ids:
                candidates[k] = candidates[k] & ok

    for v in (*outputs, *(v for vals in a.folded.values() for v in vals)):
        check(v, set())  # a folded constant is one table for all layers, also where it was made inside the body
    for path, (ins, outs) in a.records.items():
        inside = {scan_symbols[path[:i]] for i in range(1, len(path)) if path[:i] in scan_symbols and path[i] == "body"}
        for v in (*ins, *outs):
            check(v, inside, path not in a.mixes_layers)
    return {k: min(s) for k, s in candidates.items() if s}
