"""Compacting: really smaller arrays; and expand, its inverse up to zeros. Indices are chosen on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from jprune.surgery.decision import Decision, axis_index, slots_of, touched
from jprune.tracing import layout as L
from jprune.tracing.errors import KeepError
from jprune.tracing.layout import Layout
from jprune.tracing.paths import flatten, path_str
from jprune.tracing.structure import Leaf


def compact(decision: Decision, params: Any) -> Any:
    """Remove every unit that is not kept from all leaves of `params`.

    Leaves may be jax arrays (shardings are kept), numpy arrays (stay numpy) or `ShapeDtypeStruct`s.

    Raises:
      KeepError: a leaf does not have the shape that was traced.
      ValueError: a sharded axis whose new size its mesh axes do not divide.
    """
    check_shapes(decision, params)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: compact_leaf(decision, decision.graph.leaves[path_str(path)], x), params
    )


def check_shapes(decision: Decision, params: Any) -> None:
    """Raise unless `params` is the tree that was traced."""
    seen = set()
    for path, x in flatten(params):
        leaf = decision.graph.leaves.get(path)
        if leaf is None:
            raise KeepError(f"leaf {path!r} was not among the traced parameters; use compact_like for other trees")
        if tuple(x.shape) != leaf.shape:
            raise KeepError(f"leaf {path!r} has shape {tuple(x.shape)}, but {leaf.shape} was traced")
        seen.add(path)
    for path in decision.graph.leaves:
        if path not in seen:
            raise KeepError(f"leaf {path!r} is missing from the parameters")


def compact_leaf(decision: Decision, leaf: Leaf, x: Any) -> Any:
    """One leaf, or the list of its runs of layers."""
    symbol = uneven_scan(decision, leaf)
    if symbol not in decision.segments:
        return take(x, leaf.path, indices_of(leaf.layouts, decision.slots, leaf.layer_axis))
    assert leaf.layer_axis is not None
    out = []
    for lo, hi, _ in decision.segments[symbol]:
        rows = {g: slots_of(k[lo:hi] if k.ndim == 2 else k) for g, k in decision.keep.items()}
        part = _slice_layers(x, lo, hi, leaf.layer_axis)
        out.append(take(part, leaf.path, indices_of(leaf.layouts, rows, leaf.layer_axis)))
    return out


def uneven_scan(decision: Decision, leaf: Leaf) -> str | None:
    """Symbol of the scan whose layers keep different numbers of this leaf's units, or None."""
    if leaf.layer_axis is None:
        return None
    for lay in leaf.layouts:
        for g in L.groups_in(lay):
            if g in decision.keep and decision.uneven(g):
                return decision.graph.groups[g].scan
    return None


Indices = dict[int, tuple[np.ndarray, np.ndarray]]  # axis -> (positions, valid), (k,) or (layers, k)


def indices_of(layouts: tuple[Layout, ...], slots: Mapping[str, np.ndarray], layer_axis: int | None) -> Indices:
    """Which positions of each cut axis stay, and which of those are real; per layer where layers keep different units."""
    out: Indices = {}
    for axis, lay in enumerate(layouts):
        if touched(lay, slots):
            index, valid = axis_index(lay, slots)
            if index.ndim == 2:
                assert layer_axis is not None
                if layer_axis > axis:
                    index, valid = index.T, valid.T
            out[axis] = (index, valid)
    if layer_axis is not None:
        out = {
            a: (i, v)
            if i.ndim == 1
            else (_align(i, a, layer_axis, len(layouts)), _align(v, a, layer_axis, len(layouts)))
            for a, (i, v) in out.items()
        }
    return out


def _align(m: np.ndarray, axis: int, layer_axis: int, rank: int) -> np.ndarray:
    """A per-layer index matrix with size 1 on every other axis of the leaf."""
    shape = [1] * rank
    lo, hi = sorted((axis, layer_axis))
    shape[lo], shape[hi] = m.shape
    return m.reshape(shape)


def _slice_layers(x: Any, lo: int, hi: int, axis: int) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*x.shape[:axis], hi - lo, *x.shape[axis + 1 :]), x.dtype)
    return x[(slice(None),) * axis + (slice(lo, hi),)]


def take(x: Any, path: str, indices: Indices) -> Any:
    """Gather the kept positions of each axis, zeros where a position is not valid; keeps shardings."""
    if not indices:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = [
            indices[a][0].shape[a if indices[a][0].ndim > 1 else 0] if a in indices else n
            for a, n in enumerate(x.shape)
        ]
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    def gather(x: Any) -> Any:
        xp = np if isinstance(x, np.ndarray) else jnp
        for axis, (index, valid) in indices.items():
            if index.ndim == 1:
                x = xp.take(x, index, axis=axis)
            else:
                x = xp.take_along_axis(x, index, axis=axis)
                if not valid.all():
                    x = xp.where(valid, x, xp.zeros((), x.dtype))
        return x

    return keep_sharding(x, path, gather)


def keep_sharding(x: Any, path: str, f: Callable[[Any], Any]) -> Any:
    """f(x) laid out over the mesh as x is."""
    sharding = None if isinstance(x, Tracer | np.ndarray) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not any(s is not None for s in sharding.spec):
        if sharding is not None and len(sharding.device_set) == 1 and next(iter(sharding.device_set)).platform == "cpu":
            # a CPU array is host memory already: numpy moves its entries without a compilation per shape
            small = f(np.asarray(x))
            # an array that was not committed stays so, free to move
            return jax.device_put(small, sharding if getattr(x, "committed", True) else None)
        return f(x)
    shape = jax.eval_shape(f, x).shape
    sizes = dict(sharding.mesh.shape)
    for axis, names in enumerate(sharding.spec):
        if names is None:
            continue
        names = (names,) if isinstance(names, str) else names
        parts = int(np.prod([sizes[n] for n in names]))
        if shape[axis] % parts:
            raise ValueError(
                f"axis {axis} of {path!r} would have size {shape[axis]}, which the {parts} devices along mesh "
                f"axes {names} do not divide; allocate with multiple_of={parts} (or a multiple of it)"
            )
    return jax.jit(f, out_shardings=sharding)(x)


def expand(decision: Decision, small: Any) -> Any:
    """Put compacted leaves back to their traced shapes, zeros at the removed positions.

    Raises:
      KeepError: a leaf is not what `compact` returned for this decision.
    """
    runs = is_run_list if decision.segments else None
    by_path = {path_str(p): x for p, x in jax.tree_util.tree_flatten_with_path(small, is_leaf=runs)[0]}
    out = []
    for path, leaf in decision.graph.leaves.items():
        if path not in by_path:
            raise KeepError(f"leaf {path!r} is missing from the compacted parameters")
        out.append(_expand_leaf(decision, leaf, by_path[path]))
    return jax.tree.unflatten(decision.graph.param_treedef, out)


def is_run_list(t: Any) -> bool:
    """Whether this is a leaf whose layers lie in runs of equal widths: a list of arrays."""
    return isinstance(t, list) and bool(t) and all(hasattr(x, "shape") for x in t)


def _expand_leaf(decision: Decision, leaf: Leaf, x: Any) -> Any:
    symbol = uneven_scan(decision, leaf)
    if symbol in decision.segments:
        assert leaf.layer_axis is not None
        parts = []
        for (lo, hi, _), part in zip(decision.segments[symbol], x, strict=True):
            rows = {g: slots_of(k[lo:hi] if k.ndim == 2 else k) for g, k in decision.keep.items()}
            parts.append(_scatter(part, leaf, indices_of(leaf.layouts, rows, leaf.layer_axis)))
        return jnp.concatenate(parts, axis=leaf.layer_axis)
    return _scatter(x, leaf, indices_of(leaf.layouts, decision.slots, leaf.layer_axis))


def _scatter(x: Any, leaf: Leaf, indices: Indices) -> Any:
    if not indices:  # also random keys, which numpy cannot hold
        return x

    def scatter(x: Any) -> Any:
        for axis, (index, valid) in indices.items():
            size = index.shape[axis if index.ndim > 1 else 0]
            if x.shape[axis] != size:
                raise KeepError(
                    f"axis {axis} of leaf {leaf.path!r} has size {x.shape[axis]}; this decision keeps {size}"
                )
            shape = (*x.shape[:axis], leaf.shape[axis], *x.shape[axis + 1 :])
            if isinstance(x, np.ndarray):
                x = _scatter_on_host(x, axis, index, valid, shape)
            elif index.ndim == 1:
                at = (slice(None),) * axis + (index,)
                x = jnp.zeros(shape, x.dtype).at[at].set(x)
            else:  # positions past the end are dropped, so that padding lands nowhere
                where = jnp.broadcast_to(np.where(valid, index, leaf.shape[axis]), x.shape)
                grid = list(jnp.indices(x.shape, sparse=True))
                grid[axis] = where
                x = jnp.zeros(shape, x.dtype).at[tuple(grid)].set(x, mode="drop")
        return x

    return keep_sharding(x, leaf.path, scatter)


def _scatter_on_host(x: np.ndarray, axis: int, index: np.ndarray, valid: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Zeros of `shape` with the entries of x at the positions of `axis` that are valid."""
    out = np.zeros((*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]), x.dtype)  # padding lands in the last place
    if index.ndim == 1:
        out[(slice(None),) * axis + (index,)] = x
    else:
        np.put_along_axis(out, np.broadcast_to(np.where(valid, index, shape[axis]), x.shape), x, axis)
    return out[(slice(None),) * axis + (slice(shape[axis]),)]
