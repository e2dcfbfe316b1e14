"""A checked decision: which units of which groups stay, and the sizes and indices that follow from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.core import Tracer

from jprune.tracing import layout as L
from jprune.tracing.errors import KeepError, NotPrunable, suggest
from jprune.tracing.layout import Concat, Fixed, Layout, Reordered, Unit

if TYPE_CHECKING:
    from jprune.graph import Graph

Keep = Mapping[str, Any]
STACKED = ("pad", "bucket", "unstack")


def is_traced(keep: Keep) -> bool:
    """Whether any keep vector is a value that jax is tracing."""
    return any(isinstance(v, Tracer) for v in keep.values())


def check_names(graph: Graph, keep: Keep) -> None:
    """Raise for a key that is no group: NotPrunable with its reason if it is a frozen leaf axis, else KeepError."""
    for name in keep:
        if name in graph.groups:
            continue
        path, _, axis = str(name).rpartition(":")
        leaf = graph.leaves.get(path)
        if leaf is not None and axis.isdigit() and int(axis) < len(leaf.shape):
            own = sorted(set(L.groups_in(leaf.layouts[int(axis)])))
            if own:
                raise KeepError(f"{name!r} is cut into groups {own}; give keep sets for those")
            reason = leaf.frozen[int(axis)]
            raise NotPrunable(f"{name!r} may not be pruned: {reason if reason else 'its size is 1'}")
        raise KeepError(f"no group is called {name!r}{suggest(str(name), graph.groups)}")


def decide(
    graph: Graph,
    keep: Keep | Decision,
    allow_inexact: bool = False,
    allow_empty: bool = False,
    stacked: str = "pad",
) -> Decision:
    """Check a keep set ({group id: bool (size,) or (layers, size)}; absent groups stay whole); a decision stays as it is.

    Raises:
      KeepError: unknown group, wrong shape or type, an emptied group, layers with nothing kept, or a decision about
        another graph.
      NotPrunable: a frozen axis, or an inexact group without `allow_inexact`.
      ValueError: `stacked` is not one of STACKED.
    """
    if stacked not in STACKED:
        raise ValueError(f"stacked must be one of {STACKED}, not {stacked!r}")
    if isinstance(keep, Decision):
        if keep.graph is not graph:
            raise KeepError("this decision was made for another graph; make it with graph.decide(decision.keep)")
        return keep
    check_names(graph, keep)
    out: dict[str, np.ndarray] = {}
    for gid, value in keep.items():
        group = graph.groups[gid]
        k = np.asarray(value)
        if k.dtype != np.bool_:
            if not np.isin(k, (0, 1)).all():
                raise KeepError(
                    f"keep[{gid!r}] must be boolean (True = keep), not {k.dtype} with other values than 0 and 1"
                )
            k = k.astype(bool)
        if k.shape == (group.size,) and group.layers is not None:
            k = np.broadcast_to(k, group.shape)
        if k.shape != group.shape:
            raise KeepError(f"keep[{gid!r}] has shape {k.shape}; group {gid!r} wants {group.shape}")
        if k.all():
            continue
        if not allow_empty and not k.any(axis=-1).all():
            raise KeepError(
                f"keep[{gid!r}] removes every unit of group {gid!r}; keep at least one, or pass "
                "graph.decide(keep, allow_empty=True)"
            )
        if not group.exact and not allow_inexact:
            raise NotPrunable(
                f"group {gid!r} is inexact: {'; '.join(group.notes)}. Pass graph.decide(keep, "
                "allow_inexact=True) to prune it anyway"
            )
        out[gid] = k
    return Decision(graph, out, stacked)


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """Keep sets that fit a graph, with what else was decided; every method that takes a keep set takes it instead.

    Attributes:
      graph: the traced function.
      keep: the keep sets of the groups from which something is removed.
      stacked: what becomes of scan layers that keep different numbers of units: "pad" fills the narrower ones with
        zeros up to the widest, "bucket" makes a list with one array per run of equally wide layers, "unstack" a list with
        one array (of one layer) per layer.
    """

    graph: Graph
    keep: Mapping[str, np.ndarray]
    stacked: str = "pad"

    def widths(self, stacked: str | None = None) -> dict[str, Any]:
        """Widths of the pruned groups; layers of a stacked group share the largest ("pad") or keep their own."""
        stacked = self.stacked if stacked is None else stacked
        out: dict[str, Any] = {}
        for g, k in self.keep.items():
            n = k.sum(axis=-1)
            out[g] = int(n.max()) if stacked == "pad" else (int(n) if n.ndim == 0 else n)
        return out

    def uneven(self, group: str) -> bool:
        """Whether the layers of a stacked group keep different numbers of units."""
        n = np.atleast_1d(self.keep[group].sum(axis=-1))
        return bool((n != n[0]).any())

    @functools.cached_property
    def slots(self) -> dict[str, np.ndarray]:
        """Per group the kept unit indices, (k,) or (layers, k) with -1 where a layer keeps fewer than the widest."""
        return {g: slots_of(k) for g, k in self.keep.items()}

    @functools.cached_property
    def segments(self) -> dict[str, list[tuple[int, int, dict[str, int]]]]:
        """Per scan with uneven layers, unless they are padded: runs of layers of equal widths as (first, last + 1,
        widths), of one layer each where layers are unstacked."""
        out: dict[str, list[tuple[int, int, dict[str, int]]]] = {}
        if self.stacked == "pad":
            return out
        for symbol in {str(self.graph.groups[g].scan) for g in self.keep if self.uneven(g)}:
            mine = sorted(g for g in self.keep if self.graph.groups[g].scan == symbol)
            rows = np.stack([self.keep[g].sum(axis=-1) for g in mine], axis=1)
            new = (rows[1:] != rows[:-1]).any(axis=1) | (self.stacked == "unstack")
            cuts = [0, *(np.flatnonzero(new) + 1), len(rows)]
            out[symbol] = [
                (int(a), int(b), {g: int(w) for g, w in zip(mine, rows[a], strict=True)})
                for a, b in itertools.pairwise(cuts)
            ]
        return out


def slots_of(keep: np.ndarray) -> np.ndarray:
    """Kept indices of a keep vector, or of every row of a keep matrix padded with -1."""
    if keep.ndim == 1:
        return np.flatnonzero(keep)
    k = int(keep.sum(axis=1).max())
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(keep, order, axis=1), order, -1)


def axis_index(layout: Layout, slots: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(positions, valid) of what stays of an axis, in order; with a leading layer axis where a group has one."""
    index = np.zeros((1,), np.int64)
    valid = np.ones((1,), bool)
    for d in layout:
        if isinstance(d, Unit) and d.group in slots:
            s = slots[d.group]
            ok = s >= 0
            s = np.where(ok, s, 0)
        elif isinstance(d, Unit | Fixed):
            s = np.arange(d.size)
            ok = np.ones(d.size, bool)
        elif isinstance(d, Reordered):
            i, v = axis_index(d.inner, slots)
            assert i.ndim == 1 and v.all(), "which units stay is the same in all layers where an order matters"
            s = np.flatnonzero(np.isin(d.index, i))
            ok = np.ones(len(s), bool)
        else:
            assert isinstance(d, Concat)
            found, offset = [], 0
            for part in d.parts:
                i, v = axis_index(part, slots)
                found.append((i + offset, v))
                offset += L.full_size(part)
            lead = max((i.shape[:-1] for i, _ in found), key=len)
            s = np.concatenate([np.broadcast_to(i, (*lead, i.shape[-1])) for i, _ in found], axis=-1)
            ok = np.concatenate([np.broadcast_to(v, (*lead, v.shape[-1])) for _, v in found], axis=-1)
        index = index[..., :, None] * d.size + s[..., None, :]
        valid = valid[..., :, None] & ok[..., None, :]
        index = index.reshape(*index.shape[:-2], -1)
        valid = valid.reshape(*valid.shape[:-2], -1)
    return index, valid


def touched(layout: Layout, keep: Mapping[str, Any]) -> bool:
    """Whether a decision changes this axis."""
    return any(g in keep for g in L.groups_in(layout))
