"""Axis algebra: while a function is traced, every array axis carries a tag, and tags are refined until they agree.

A tag is a product (major to minor) of dims; a dim is an `Atom` (an index nobody has cut yet), a `Sum` (axes
concatenated along this one) or an `Order` (the positions of another axis in another order). Refining substitutes: an
atom that turns out to be a product or a concatenation is replaced by it everywhere at once (jprune.tracing.refine), so
atoms only ever get finer and the process ends. Here is what a tag is, its normal form, and what is known of its atoms.
Why not one label per index: a head axis split from a kernel axis must stay prunable as heads and as head dims, with the
choice made later.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Why an axis may not be pruned: a reason code, what it concerns, and the user's source line."""

    code: str
    detail: str = ""
    where: str = ""

    def __str__(self) -> str:
        head = f"{self.code}({self.detail})" if self.detail else self.code
        return f"{head} at {self.where}" if self.where else head


class Misaligned(Exception):
    """Two axes cannot be cut into common pieces; the rule that met them freezes both."""


class Atom:
    """An index of size `n` that nothing has refined; frozen once it has a `reason`."""

    __slots__ = ("input_dim", "n", "notes", "reason", "rigid", "scan", "subst")

    def __init__(self, n: int, reason: Frozen | None = None, input_dim: int | None = None, scan: int | None = None):
        self.n = n
        self.reason = reason
        self.subst: Tag | None = None
        self.notes: set[str] = set()
        self.input_dim = input_dim  # which run-time input dimension this is, for atoms made from the inputs
        self.rigid = False  # an input dimension whose traced size something depends on
        self.scan = scan  # the scan whose layer axis this is

    def piece(self, n: int) -> Atom:
        """A new atom of size n that inherits what is known of this one."""
        new = Atom(n, self.reason)
        new.notes = set(self.notes)
        return new


class Sum:
    """Axes laid one after the other along one dim."""

    __slots__ = ("n", "parts")

    def __init__(self, parts: tuple[Tag, ...]):
        self.parts = parts
        self.n = sum(size(p) for p in parts)


class Order:
    """The positions of an axis in another order: position j is position `index[j]` of `inner`."""

    __slots__ = ("index", "inner", "n")

    def __init__(self, inner: Tag, index: np.ndarray):
        self.inner = inner
        self.index = index
        self.n = len(index)


Dim: TypeAlias = Atom | Sum | Order
Tag: TypeAlias = tuple[Dim, ...]

SINGLE_INDEX, SEGMENT_AXIS, MISALIGNED_SLICE = "SINGLE_INDEX", "SEGMENT_AXIS", "MISALIGNED_SLICE"
INNOCENT = ("MODEL_INPUT", "MODEL_OUTPUT")  # reasons that leave an input dimension free to change at run time


def size(tag: Tag) -> int:
    """Number of positions of the axis."""
    return math.prod(d.n for d in tag)


def norm(tag: Tag) -> Tag:
    """The tag with all substitutions resolved, nested products spliced and nested sums flattened."""
    for d in tag:  # most are normal already, concatenations of hundreds of layers among them
        if type(d) is Atom:
            if d.subst is not None:
                break
        elif type(d) is not Sum or not _is_flat(d):
            break
    else:
        return tag
    if len(tag) == 1 and isinstance(tag[0], Atom):
        return _resolved(tag[0])
    out: list[Dim] = []
    for d in tag:
        if isinstance(d, Atom):
            out.extend(_resolved(d))
            continue
        if isinstance(d, Order):
            out.extend(ordered(norm(d.inner), d.index, d))
            continue
        parts: list[Tag] = []
        for p in d.parts:
            p = norm(p)
            if len(p) == 1 and isinstance(p[0], Sum):
                parts.extend(p[0].parts)
            else:
                parts.append(p)
        if len(parts) == 1:
            out.extend(parts[0])
        elif len(parts) == len(d.parts) and all(a is b for a, b in zip(parts, d.parts, strict=True)):
            out.append(d)
        else:
            out.append(Sum(tuple(parts)))
    return tuple(out)


def _is_flat(d: Sum) -> bool:
    """Whether a concatenation holds several axes made of atoms that nothing has refined."""
    for part in d.parts:
        for e in part:
            if type(e) is not Atom or e.subst is not None:
                return False
    return len(d.parts) != 1


def _resolved(atom: Atom) -> Tag:
    """What an atom stands for; a residual stream makes chains of substitutions too long for recursion."""
    chain: list[Atom] = []
    tag: Tag = (atom,)
    while len(tag) == 1 and isinstance(tag[0], Atom) and tag[0].subst is not None:
        chain.append(tag[0])
        tag = tag[0].subst
    if chain:
        tag = norm(tag)
        for a in chain:
            a.subst = tag
    return tag


def ordered(inner: Tag, index: np.ndarray, like: Order | None = None) -> Tag:
    """The positions `index` (each once) of an axis; dims in front and behind that keep their order are left outside."""
    if len(inner) == 1 and isinstance(inner[0], Order):
        inner, index = inner[0].inner, inner[0].index[index]
    if (index == np.arange(len(index))).all():
        return inner
    for i in range(1, len(inner)):
        front = whole_blocks(index, size(inner[i:]))
        if front is not None:
            return (*ordered(inner[:i], front), *inner[i:])
        back = same_in_blocks(index, size(inner[:-i]), size(inner[-i:]))
        if back is not None:
            return (*inner[:-i], *ordered(inner[-i:], back))
    unchanged = like is not None and like.index is index and len(inner) == len(like.inner)
    if like is not None and unchanged and all(a is b for a, b in zip(inner, like.inner, strict=True)):
        return (like,)
    return (Order(inner, index),)


def whole_blocks(index: np.ndarray, m: int) -> np.ndarray | None:
    """Which blocks of m positions an index takes, if it takes whole ones in order."""
    if len(index) % m:
        return None
    rows = index.reshape(-1, m)
    whole = (rows[:, 0] % m == 0).all() and (rows == rows[:, :1] + np.arange(m)).all()
    return rows[:, 0] // m if whole else None


def same_in_blocks(index: np.ndarray, n: int, m: int) -> np.ndarray | None:
    """What an index takes from each of n blocks of m positions, if it takes the same from all of them in order."""
    if len(index) % n:
        return None
    rows = index.reshape(n, -1) - np.arange(n)[:, None] * m
    return rows[0] if (rows == rows[0]).all() and (rows >= 0).all() and (rows < m).all() else None


def reordered(tag: Tag) -> Iterator[Atom]:
    """Every atom of the axis that stands in another order than its own: which units stay decides about indices."""
    for d in norm(tag):
        if isinstance(d, Order):
            yield from atoms(d.inner)
        elif isinstance(d, Sum):
            for p in d.parts:
                yield from reordered(p)


def atoms(tag: Tag) -> list[Atom]:
    """Every unsubstituted atom of the axis, with repetition."""
    out: list[Atom] = []
    _collect(norm(tag), out)
    return out


def _collect(tag: Tag, out: list[Atom]) -> None:
    """Append the atoms of a normal tag."""
    for d in tag:
        if isinstance(d, Atom):
            out.append(d)
        elif isinstance(d, Sum):
            for p in d.parts:
                _collect(p, out)
        else:
            _collect(norm(d.inner), out)


def is_live(tag: Tag) -> bool:
    """Whether any part of the axis is still prunable."""
    return any(a.reason is None for a in atoms(tag))


def freeze(tag: Tag, reason: Frozen) -> None:
    """Make every atom below unprunable; the first reason wins."""
    for a in atoms(tag):
        if reason.code not in INNOCENT:
            a.rigid = True
        if a.reason is None:
            a.reason = reason


def stiffen(tag: Tag) -> None:
    """Record that a traced size depends on this axis, so that an input dimension in it may not change."""
    for a in atoms(tag):
        a.rigid = True


def note(tag: Tag, text: str) -> None:
    """Record why pruning the live part of this axis changes more than it removes."""
    for a in atoms(tag):
        if a.reason is None:
            a.notes.add(text)


def substitute(atom: Atom, tag: Tag) -> None:
    """Replace a live atom by a tag of equal size everywhere."""
    if atom.notes or atom.rigid:
        for a in atoms(tag):
            a.notes |= atom.notes
            a.rigid |= atom.rigid
    atom.subst = tag
