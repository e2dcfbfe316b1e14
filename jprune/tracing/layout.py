"""Axis layouts: how one array axis is built from prunable groups.

An axis is a product (major to minor) of dims. A dim is a group's unit index (`Unit`), a size nothing may
prune (`Fixed`), or a concatenation of whole axes (`Concat`). Everything the library does with a decision -
masks, slices, sizes, cost - is a walk over these three cases, so a pruned array is rectangular by construction.
Widths are given per group: a number, or a vector of numbers (one per layer) for a group that lives in the body
of a scan; the walks below only use `+` and `*`, so integers stay exact and traced floats stay differentiable.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
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

    def __hash__(self) -> int:  # asked for once per group on the axis, of which there may be hundreds
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.parts, self.size))

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each part starts, and last where the axis ends."""
        return tuple(itertools.accumulate((full_size(p) for p in self.parts), initial=0))


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
        last = bisect.bisect_right(major.offsets, index) - 1
        before = sum(width(part, widths) for part in major.parts[:last])
        if index > major.offsets[last]:
            before += prefix(major.parts[last], index - major.offsets[last], widths)
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
    return _cached_positions(layout).get(group)


@functools.lru_cache(maxsize=1024)
def _cached_positions(layout: Layout) -> dict[str, np.ndarray]:
    return _positions(layout)


def _positions(layout: Layout) -> dict[str, np.ndarray]:
    """`unit_positions` of every group on the axis, in one walk: a concatenation may hold hundreds of them."""
    pieces: dict[str, list[np.ndarray]] = {}
    total, outer = full_size(layout), 1
    for d in layout:
        if d.size == 0:
            return {}
        inner = total // (outer * d.size)
        found: dict[str, list[np.ndarray]] = {}
        if isinstance(d, Unit):
            found[d.group] = [np.arange(d.size)[:, None]]
        elif isinstance(d, Concat):
            for part, offset in zip(d.parts, d.offsets, strict=False):
                for g, p in _positions(part).items():
                    found.setdefault(g, []).append(p + offset)
        elif isinstance(d, Reordered):
            at = np.argsort(d.index)
            found = {g: [at[p]] for g, p in _positions(d.inner).items()}
        for g, bases in found.items():
            base = np.concatenate(bases, axis=1) if len(bases) > 1 else bases[0]
            cells = base[:, :, None, None] * inner + np.arange(inner)[None, None, None, :]
            cells = cells + (np.arange(outer) * d.size * inner)[None, None, :, None]
            pieces.setdefault(g, []).append(cells.reshape(base.shape[0], -1))
        outer *= d.size
    return {g: np.sort(np.concatenate(p, axis=1), axis=1).astype(np.int32) for g, p in pieces.items()}
