"""Axis layouts: how one array axis is built from prunable groups.

An axis is a product (major to minor) of dims. A dim is a group's unit index (`Unit`), a size nothing may
prune (`Fixed`), or a concatenation of whole axes (`Concat`). Everything the library does with a decision -
masks, slices, sizes, cost - is a walk over these three cases, so a pruned array is rectangular by construction.
Widths are given per group: a number, or a vector of numbers (one per layer) for a group that lives in the body
of a scan; the walks below only use `+` and `*`, so integers stay exact and traced floats stay differentiable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True)
class Unit:
    """The unit index of group `group`, which has `size` units when nothing is pruned."""

    group: str
    size: int


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A size that no decision changes; `symbol` names the input dimension or scan length it stands for, if any."""

    size: int
    symbol: str | None = None


@dataclasses.dataclass(frozen=True)
class Concat:
    """Whole axes laid one after the other."""

    parts: tuple[Layout, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Reordered:
    """The positions of an axis in another order: position j is position `index[j]` of `inner`."""

    inner: Layout
    index: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.index)


Dim: TypeAlias = Unit | Fixed | Concat | Reordered
Layout: TypeAlias = tuple[Dim, ...]


def full_size(layout: Layout) -> int:
    """Size of the axis before any pruning."""
    return math.prod(d.size for d in layout)


def groups_in(layout: Layout) -> Iterator[str]:
    """Names of the groups an axis depends on, with repetition."""
    for d in layout:
        if isinstance(d, Unit):
            yield d.group
        elif isinstance(d, Concat):
            for part in d.parts:
                yield from groups_in(part)
        elif isinstance(d, Reordered):
            yield from groups_in(d.inner)


def width(layout: Layout, widths: Mapping[str, Any]) -> Any:
    """Size of the axis when group (or symbol) g has size `widths[g]` (absent: its full size)."""
    total: Any = 1
    for d in layout:
        if isinstance(d, Unit):
            w = widths.get(d.group, d.size)
        elif isinstance(d, Concat):
            w = 0
            for part in d.parts:
                w = w + width(part, widths)
        elif isinstance(d, Reordered):
            w = width(d.inner, widths)
        else:
            w = d.size if d.symbol is None else widths.get(d.symbol, d.size)
        total = w * total
    return total


def prefix(layout: Layout, position: int, widths: Mapping[str, Any]) -> int:
    """Number of kept positions before `position`; exact because the tracer cuts dims at every slice boundary."""
    if position == 0:
        return 0
    if position == full_size(layout):
        return width(layout, widths)
    major, rest = layout[0], layout[1:]
    index, inside = divmod(position, full_size(rest))
    if isinstance(major, Fixed):
        before = index
    elif isinstance(major, Concat):
        before = 0
        for part in major.parts:
            n = full_size(part)
            before += prefix(part, min(index, n), widths)
            index -= min(index, n)
    elif isinstance(major, Reordered):
        raise AssertionError(
            "in a reordered axis the units that stay say how many lie before a position, not the widths"
        )
    elif index in (0, major.size):
        before = width((major,), widths) if index else 0
    elif widths.get(major.group, major.size) == major.size:
        before = index
    else:  # a boundary inside a prunable unit index would make a slice ambiguous; the tracer never leaves one
        raise AssertionError(f"position {position} lies inside group {major.group!r}")
    return before * width(rest, widths) + (prefix(rest, inside, widths) if inside else 0)


def is_reordered(layout: Layout) -> bool:
    """Whether positions of the axis stand in another order than the units they belong to."""
    return any(
        isinstance(d, Reordered) or (isinstance(d, Concat) and any(is_reordered(p) for p in d.parts)) for d in layout
    )


def spread(layout: Layout, vectors: Mapping[str, Any], xp: Any = np, ones: Any = None) -> Any:
    """Per-position product of per-unit `vectors` ((n,), or (L, n) for per-layer groups): a mask from keep vectors.

    Groups absent from `vectors` count as ones. Returns (size,) or, where any vector is per layer, (L, size).
    """
    out = ones if ones is not None else xp.ones((1,), dtype=np.float32)
    for d in layout:
        if isinstance(d, Unit) and d.group in vectors:
            v = vectors[d.group]
        elif isinstance(d, Concat):
            parts = [spread(p, vectors, xp, xp.ones((1,), dtype=out.dtype)) for p in d.parts]
            lead = max((p.shape[:-1] for p in parts), key=len)
            v = xp.concatenate([xp.broadcast_to(p, (*lead, p.shape[-1])) for p in parts], axis=-1)
        elif isinstance(d, Reordered):
            v = spread(d.inner, vectors, xp, xp.ones((1,), dtype=out.dtype))[..., np.asarray(d.index)]
        else:
            v = xp.ones((d.size,), dtype=out.dtype)
        out = out[..., :, None] * v[..., None, :]
        out = out.reshape(*out.shape[:-2], -1)
    return out


def unit_positions(layout: Layout, group: str) -> np.ndarray | None:
    """(n, m) int32: the m axis positions that belong to each of the group's n units; None if it is not there."""
    pieces: list[np.ndarray] = []
    for i, d in enumerate(layout):
        inner = full_size(layout[i + 1 :])
        outer = full_size(layout[:i])
        if isinstance(d, Unit) and d.group == group:
            base = np.arange(d.size)[:, None]
        elif isinstance(d, Concat):
            found, offset = [], 0
            for part in d.parts:
                p = unit_positions(part, group)
                if p is not None:
                    found.append(p + offset)
                offset += full_size(part)
            if not found:
                continue
            base = np.concatenate(found, axis=1)
        elif isinstance(d, Reordered):
            found = unit_positions(d.inner, group)
            if found is None:
                continue
            base = np.argsort(d.index)[found]
        else:
            continue
        cells = base[:, :, None, None] * inner + np.arange(inner)[None, None, None, :]
        cells = cells + (np.arange(outer) * d.size * inner)[None, None, :, None]
        pieces.append(cells.reshape(base.shape[0], -1))
    if not pieces:
        return None
    return np.sort(np.concatenate(pieces, axis=1), axis=1).astype(np.int32)
