"""From numbers per weight to one score per unit: sum inside each member, reduce over members, normalise.

Every criterion is a local score per entry of every member leaf; what they share is here. A leaf counts once per
(leaf, axis) member. Sums run in float32 whatever the leaf's dtype. All of it is jit-able: the graph is static. Outside
jit, weights that lie in host memory are scored by numpy: a model has hundreds of shapes, and every operation on each of
them would be compiled for a single use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jprune.graph import Graph
from jprune.tracing.errors import KeepError, suggest
from jprune.tracing.paths import flatten
from jprune.tracing.structure import Group, Member

Scores: TypeAlias = dict[str, Array]
Values: TypeAlias = Array | np.ndarray
WEIGHTS = ("out", "in", "lookup", "scale")  # biases and shifts say little about a channel; pass roles= to count them
ROLES = (*WEIGHTS, "shift", "other")
REDUCTIONS = ("mean", "sum", "max", "prod", "first")
NORMALISERS = ("none", "mean", "sum", "max", "standard", "gaussian", "lamp")


def counted_members(graph: Graph, group: Group, roles: Sequence[str]) -> list[Member]:
    """Members whose weights count: parameters (not state) that are used in one of these roles."""
    return [m for m in group.members if m.role in roles and graph.leaves[m.path].is_param]


def per_unit(member: Member, entries: Float[Values, ...]) -> Float[Values, "... units"]:
    """Sum of a leaf's per-entry values over everything each unit owns: (size,), or (layers, size) where stacked."""
    stay = {member.axis} if member.layer_axis is None else {member.axis, member.layer_axis}
    v = _sum(entries, tuple(i for i in range(entries.ndim) if i not in stay))
    if member.layer_axis is not None and member.layer_axis > member.axis:
        v = v.T
    return _sum(v[..., member.positions], (-1,))


def unit_matrices(member: Member, leaf: Any, layer: int | None = None) -> list[Float[Values, "units entries"]]:
    """A leaf as matrices with one row per unit: one for each position a unit owns, fused matrices being apart.

    Args:
      member: where the group's units are in the leaf.
      leaf: its value.
      layer: which layer of a stacked leaf.
    """
    if (layer is None) != (member.layer_axis is None):
        raise ValueError(f"leaf {member.path!r} {'is' if layer is None else 'is not'} stacked over layers")
    axis = member.axis
    if layer is not None and member.layer_axis is not None:
        leaf = leaf[(slice(None),) * member.layer_axis + (layer,)]
        axis -= member.layer_axis < axis
    order = (axis, *(i for i in range(leaf.ndim) if i != axis))
    rows = leaf.transpose(order).reshape(leaf.shape[axis], -1)
    return [rows[member.positions[:, j]] for j in range(member.positions.shape[1])]


def _sum(x: Any, axes: tuple[int, ...]) -> Any:
    if isinstance(x, np.ndarray):  # in double precision: numpy adds rows one after the other, jax pairwise
        return np.sum(x, axis=axes, dtype=np.float64).astype(np.float32)
    return jnp.sum(x, axis=axes, dtype=jnp.float32)


def group_scores(
    graph: Graph,
    values: Mapping[str, Any],
    local: Callable[[Member, Any], Any],
    *,
    reduce: str = "mean",
    normalise: str = "mean",
    roles: Sequence[str] = WEIGHTS,
    groups: Sequence[str] | None = None,
) -> Scores:
    """Scores of all groups, or of those named: `local(member, leaf value) -> (size,) or (layers, size)`, reduced and normalised.

    Groups without a counted member are left out of the result: there is nothing to judge them by.

    Raises:
      ValueError: unknown reduction, normaliser or role, or leaves that are not those that were traced.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {REDUCTIONS}, not {reduce!r}")
    if isinstance(roles, str) or not set(roles) <= set(ROLES):
        raise ValueError(f"roles must be among {ROLES}, not {roles!r}")
    out = {}
    for gid, group in graph.groups.items():
        if groups is not None and gid not in groups:
            continue
        rows = [
            local(m, traced_leaf(graph, values, m.path, "parameters")) for m in counted_members(graph, group, roles)
        ]
        if rows:
            stacked = np.stack(rows) if all(isinstance(r, np.ndarray) for r in rows) else jnp.stack(rows)
            out[gid] = jnp.asarray(normalised(_reduce(stacked, reduce), normalise))
    return out


def _on_host(x: Any) -> Any:
    """A concrete CPU array as a numpy view of its memory; anything else (traced, on an accelerator) as it is."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or not x.is_fully_addressable:
        return x
    return np.asarray(x) if all(d.platform == "cpu" for d in x.devices()) else x


def traced_leaf(graph: Graph, values: Mapping[str, Any], path: str, what: str) -> Any:
    """The leaf at `path`; ValueError if it is missing or has not its traced shape (indexing would clamp silently)."""
    if path not in values:
        raise ValueError(f"the {what} lack leaf {path!r}; give a tree like the traced parameters")
    if np.shape(values[path]) != graph.leaves[path].shape:
        raise ValueError(
            f"leaf {path!r} of the {what} has shape {np.shape(values[path])}, "
            f"but {graph.leaves[path].shape} was traced; trace the pruned function to score it"
        )
    return values[path]


def _reduce(rows: Float[Values, "members *layers units"], how: str) -> Float[Values, "*layers units"]:
    if how == "first":
        return rows[0]
    return getattr(np if isinstance(rows, np.ndarray) else jnp, how)(rows, axis=0)


def normalised(s: Float[Values, "*layers units"], how: str) -> Float[Values, "*layers units"]:
    """Scores made comparable between groups; every layer of a stacked group is normalised by itself.

    "mean", "sum", "max": divided by that; "standard": (s - min) / (max - min); "gaussian": (s - mean) / std;
    "lamp": divided by the sum of the scores that are not smaller (LAMP, Lee et al. 2021, eq. 3); "none": as they are.
    """
    if how not in NORMALISERS:
        raise ValueError(f"normalise must be one of {NORMALISERS}, not {how!r}")
    xp: Any = np if isinstance(s, np.ndarray) else jnp
    tiny = np.finfo(np.float32).tiny
    if how == "none":
        return s
    if how == "lamp":
        order = xp.argsort(s, axis=-1, stable=True)
        ranked = xp.take_along_axis(s, order, axis=-1)
        tail = xp.flip(xp.cumsum(xp.flip(ranked, -1), axis=-1), -1)
        return xp.take_along_axis(ranked / xp.maximum(tail, tiny), xp.argsort(order, axis=-1), axis=-1)
    if how == "standard":
        low = xp.min(s, axis=-1, keepdims=True)
        return (s - low) / xp.maximum(xp.max(s, axis=-1, keepdims=True) - low, tiny)
    if how == "gaussian":
        spread = xp.std(s, axis=-1, keepdims=True)
        return (s - xp.mean(s, axis=-1, keepdims=True)) / xp.maximum(spread, tiny)
    by = getattr(xp, how)(s, axis=-1, keepdims=True)
    return s / xp.where(by == 0, 1.0, by)


def leaf_values(tree: Any) -> dict[str, Any]:
    """{leaf path: array} of a tree like the traced parameters; numpy views of those in host memory."""
    return {path: _on_host(x) for path, x in flatten(tree)}


def check_scores(graph: Graph, scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores as float64 numpy arrays (host-side), after checking names, shapes and finiteness.

    Raises:
      KeepError: unknown group or wrong shape.
      ValueError: NaN or infinity, naming the group, its first bad unit and its leaves.
    """
    out = {}
    for gid, s in scores.items():
        if gid not in graph.groups:
            raise KeepError(f"no group is called {gid!r}{suggest(gid, graph.groups)}")
        group = graph.groups[gid]
        a = np.asarray(jax.device_get(s), np.float64)
        if a.shape != group.shape:
            raise KeepError(f"scores[{gid!r}] has shape {a.shape}; group {gid!r} wants {group.shape}")
        if not np.isfinite(a).all():
            unit = tuple(int(i) for i in np.argwhere(~np.isfinite(a))[0])
            leaves = ", ".join(sorted({m.path for m in group.members}))
            raise ValueError(
                f"scores[{gid!r}] is {a[unit]} at unit {unit}; look for NaN or infinity in {leaves} "
                "or in their gradients"
            )
        out[gid] = a
    return out
