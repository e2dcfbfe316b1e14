"""Sparsity patterns of single weights and their masks: which zeros are allowed where, applied, checked, counted, stored.

Scores, masks and counts of weights are flat dicts {leaf path: value}, with the paths of `jprune.tracing.paths`. A leaf
that is absent is dense. A mask is a bool array of its leaf's shape, laid out over the devices as the leaf is; True stays.

Masks and structured pruning compose. `graph.compact_like(masks, keep)` cuts the masks as `graph.compact` cuts the
weights, so that weights may be masked before channels are cut or after.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool

from jprune.surgery.views import Conventional as Conventional
from jprune.surgery.views import View as View
from jprune.surgery.views import conventional as conventional
from jprune.tracing import cost as _cost
from jprune.tracing import operand as moves
from jprune.tracing.errors import suggest
from jprune.tracing.paths import flatten, path_str

if TYPE_CHECKING:
    from jprune.graph import Graph

Masks: TypeAlias = Mapping[str, Any]
Within: TypeAlias = Literal["leaf", "matrix", "row", "column", "model"]


class PatternError(ValueError):
    """Masks that do not fit their pattern, their leaves or each other; names the leaf and the place."""


# -- patterns --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere.

    Attributes:
      within: which weights are compared with each other: those of a whole "leaf", of each "matrix" of a leaf (of each
        layer, where layers are stacked), of each output ("row"), of each input ("column"), or of the whole "model".
    """

    within: Within = "leaf"

    def __post_init__(self) -> None:
        if self.within not in get_args(Within):
            raise ValueError(f"weights are compared within one of {get_args(Within)}, not {self.within!r}")

    def __str__(self) -> str:
        return "unstructured" if self.within == "leaf" else self.within


@dataclasses.dataclass(frozen=True)
class NM:
    """At most `keep` of `of` consecutive weights are not zero: NM(2, 4) is what sparse tensor cores multiply with.

    Groups lie within the innermost axis of the side they run along; for a convolution that is the channel axis, so that
    no group joins two positions of the kernel.

    Attributes:
      keep, of: weights that stay, per group.
      axis: "input" (the axis that is summed over, which hardware asks for) or "output".
      pad: whether an axis that `of` does not divide ends in a shorter group, as if zeros filled it up; otherwise it is
        refused.
    """

    keep: int
    of: int
    axis: Literal["input", "output"] = "input"
    pad: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise ValueError(f"N:M keeps N of M weights with 0 < N < M, not {self.keep} of {self.of}")
        if self.axis not in ("input", "output"):
            raise ValueError(f"N:M runs along the 'input' or the 'output' axis, not {self.axis!r}")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" + ("" if self.axis == "input" else " along outputs")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Whole blocks of the matrix (outputs, inputs) are zero, as block-sparse products want it.

    Blocks at the ends may be smaller; their score is the mean or the largest of the entries that there are.

    Attributes:
      shape: outputs and inputs of a block.
      pool: how the scores of a block's entries become one.
    """

    shape: tuple[int, int]
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"a block has two sizes of at least 1, outputs and inputs; got {self.shape}")
        if self.pool not in ("mean", "max"):
            raise ValueError(f"scores of a block are pooled by 'mean' or 'max', not {self.pool!r}")

    def __str__(self) -> str:
        return f"block:{self.shape[0]}x{self.shape[1]}"


Pattern: TypeAlias = Unstructured | NM | Blocks


def pattern(text: str) -> Pattern:
    """The pattern that a word names: "unstructured", "matrix", "row", "column", "model", "2:4" or "block:4x4".

    >>> pattern("2:4"), pattern("row")
    (NM(keep=2, of=4, axis='input', pad=False), Unstructured(within='row'))

    Raises:
      ValueError: another word, or sizes that make no pattern.
    """
    text = text.strip()
    if found := re.fullmatch(r"(\d{1,6}):(\d{1,6})", text):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block:(\d{1,6})x(\d{1,6})", text):
        return Blocks((int(found[1]), int(found[2])))
    if text == "unstructured":
        return Unstructured()
    if text in get_args(Within):
        return Unstructured(text)  # pyright: ignore[reportArgumentType]
    words = ["unstructured", *get_args(Within), "N:M (2:4)", "block:HxW (block:4x4)"]
    raise ValueError(
        f"{text!r} names no sparsity pattern{suggest(text, words)}; a pattern is one of {', '.join(words)}"
    )


def patterns_of(patterns: Pattern | str | Mapping[str, Pattern | str | None], paths: Any) -> dict[str, Pattern]:
    """The pattern of each leaf, from one for all or from {path or glob: pattern}; the first that fits counts.

    Leaves that nothing fits, or None, have no pattern: they are dense.

    Raises:
      ValueError: a path or glob that fits no leaf.
    """
    if isinstance(patterns, str):
        patterns = pattern(patterns)
    if not isinstance(patterns, Mapping):
        return dict.fromkeys(paths, patterns)
    found = by_glob(patterns, paths, "pattern")
    return {p: pattern(v) if isinstance(v, str) else v for p, v in found.items() if v is not None}


def by_glob(values: Mapping[str, Any], paths: Any, what: str) -> dict[str, Any]:
    """{path: value of the first key that is the path or a glob of it}; ValueError for a key that fits no leaf."""
    paths = list(paths)
    for glob in values:
        if not any(p == glob or fnmatchcase(p, glob) for p in paths):
            raise ValueError(f"the {what} for {glob!r} fits no leaf{suggest(glob, paths)}")
    every = {p: [v for glob, v in values.items() if p == glob or fnmatchcase(p, glob)] for p in paths}
    return {p: fits[0] for p, fits in every.items() if fits}


# -- leaves as matrices ----------------------------------------------------------------------------------------------


def view_of(path: str, shape: tuple[int, ...], views: Mapping[str, View] | None) -> View:
    """The leaf's own view, or the conventional one; PatternError if that shows no whole matrix."""
    if views is not None and path in views:
        view = views[path]
        if math.prod((*view.lead, *view.outputs, *view.inputs)) != math.prod(shape):
            raise PatternError(f"the view of {path!r} shows a part of the leaf only: a pattern is one of whole leaves")
        return view
    if len(shape) < 2:
        raise PatternError(f"leaf {path!r} of shape {shape} has no inputs and outputs: give it no pattern of a matrix")
    return conventional(shape)


def groups_of(path: str, nm: NM, view: View) -> tuple[int, int, int]:
    """(runs, length of a run, entries that pad it) along the side that an N:M pattern runs along.

    Raises:
      PatternError: M does not divide the innermost axis, and nothing pads it.
    """
    sizes = view.inputs if nm.axis == "input" else view.outputs
    length = sizes[-1] if sizes else 1
    missing = -length % nm.of
    if missing and not nm.pad:
        raise PatternError(
            f"{nm} does not fit leaf {path!r}: its innermost {nm.axis} axis has {length} entries, which {nm.of} does not "
            f"divide; give this leaf no pattern, or pad=True, which makes the last group {length % nm.of} long"
        )
    return math.prod(sizes[:-1]), length, missing


def grouped(x: Any, path: str, nm: NM, view: View, fill: Any) -> Any:
    """A leaf's matrices with the entries of each N:M group on the last axis; what pads them is `fill`."""
    runs, length, missing = groups_of(path, nm, view)
    m = view.matrix(x)
    m = m if nm.axis == "input" else m.swapaxes(-1, -2)
    m = m.reshape(*m.shape[:-1], runs, length)
    if missing:
        xp = np if isinstance(m, np.ndarray) else jnp
        m = xp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, missing)], constant_values=fill)
    return m.reshape(*m.shape[:-1], (length + missing) // nm.of, nm.of)


def ungrouped(m: Any, path: str, nm: NM, view: View, shape: tuple[int, ...]) -> Any:
    """The mask whose groups these are; without what padded them."""
    _, length, missing = groups_of(path, nm, view)
    m = m.reshape(*m.shape[:-2], length + missing)[..., :length]
    m = m.reshape(*m.shape[:-2], -1)
    return mask_like(m if nm.axis == "input" else m.swapaxes(-1, -2), view, shape)


def mask_like(matrix: Any, view: View, shape: tuple[int, ...]) -> Any:
    """The bool mask of the leaf whose matrices these masks are."""
    # layout changes of numbers can be undone by transposing them as linear maps, those of bools cannot
    return view.leaf_like(matrix.astype(jnp.float32), shape) != 0


# -- masks -----------------------------------------------------------------------------------------------------------


def placed_as(x: Any, like: Any) -> Any:
    """x on the devices, and laid out over them, as `like` is; within a traced function x as it is."""
    if isinstance(x, Tracer) or isinstance(like, Tracer) or not getattr(like, "committed", False):
        return x
    return jax.device_put(x, like.sharding)


def apply(params: Any, masks: Masks) -> Any:
    """The parameters with zeros where a mask is False, also where they were NaN or infinite; jit-able, differentiable.

    >>> apply({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]

    Raises:
      PatternError: a mask of no leaf, or of another shape or type.
    """
    leaves = dict(flatten(params))
    for path, mask in masks.items():
        if path not in leaves:
            raise PatternError(f"there is a mask for {path!r}, which is no leaf{suggest(path, leaves)}")
        _fits(path, mask, np.shape(leaves[path]))

    def one(path: Any, x: Any) -> Any:
        mask = masks.get(path_str(path))
        return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))

    return jax.tree_util.tree_map_with_path(one, params)


def _fits(path: str, mask: Any, shape: tuple[int, ...]) -> None:
    if getattr(mask, "dtype", None) != np.bool_ or np.shape(mask) != shape:
        what = f"{getattr(mask, 'dtype', type(mask).__name__)}{list(np.shape(mask))}"
        raise PatternError(f"the mask of {path!r} is {what}; a mask is bool{list(shape)}, as its leaf")


def check(
    masks: Masks, patterns: Pattern | str | Mapping[str, Pattern | str | None], views: Mapping[str, View] | None = None
) -> dict[str, str]:
    """What holds for each mask: {path: "2:4 holds"}; host-side.

    N:M: no group has more than N. Blocks: each is whole or gone. Rows and columns: their numbers of weights differ by at
    most one. Other unstructured patterns allow everything.

    Raises:
      PatternError: a pattern does not hold; names the leaf and the place in its matrix.
    """
    said = {}
    for path, p in patterns_of(patterns, masks).items():
        mask = np.asarray(masks[path])
        _fits(path, mask, mask.shape)
        if isinstance(p, NM):
            _check_groups(path, mask, p, view_of(path, mask.shape, views))
        elif isinstance(p, Blocks):
            _check_blocks(path, np.asarray(view_of(path, mask.shape, views).matrix(mask)), p)
        elif p.within in ("row", "column"):
            matrix = np.asarray(view_of(path, mask.shape, views).matrix(mask))
            n = matrix.sum(-1 if p.within == "row" else -2)
            if n.max(initial=0) - n.min(initial=matrix.size) > 1:
                most, least = (np.unravel_index(i, n.shape)[-1] for i in (n.argmax(), n.argmin()))
                raise PatternError(f"{p.within}s of {path!r} differ: {p.within} {most} keeps {n.max()} weights and "
                                   f"{p.within} {least} keeps {n.min()}")  # fmt: skip
        said[path] = f"{p} holds"
    return said


def _check_groups(path: str, mask: np.ndarray, p: NM, view: View) -> None:
    n = np.asarray(grouped(mask, path, p, view, False)).sum(-1)
    wrong = np.argwhere(n > p.keep)
    if len(wrong):
        *lead, line, run, group = map(int, wrong[0])
        side, first = ("output", "inputs") if p.axis == "input" else ("input", "outputs")
        start = run * groups_of(path, p, view)[1] + group * p.of
        matrix = f"matrix {tuple(lead)}, " * bool(lead)
        raise PatternError(f"{p} does not hold in {path!r}: {matrix}{side} {line} keeps {int(n[tuple(wrong[0])])} of the "
                           f"weights of {first} {start} to {start + p.of - 1}")  # fmt: skip


def _check_blocks(path: str, matrix: Bool[np.ndarray, "*lead out in"], p: Blocks) -> None:
    h, w = p.shape
    for i in range(0, matrix.shape[-2], h):
        band = matrix[..., i : i + h, :]
        full, some = np.all(band, axis=-2), np.any(band, axis=-2)
        for j in range(0, matrix.shape[-1], w):
            part = slice(j, j + w)
            if (full[..., part].all(-1) != some[..., part].any(-1)).any():
                raise PatternError(f"{p} does not hold in {path!r}: the block at output {i}, input {j} is kept in part")


@dataclasses.dataclass(frozen=True)
class Density:
    """Weights kept, as exact integers.

    Attributes:
      kept, size: {path: weights that stay}, {path: weights}.
    """

    kept: dict[str, int]
    size: dict[str, int]

    @property
    def of(self) -> dict[str, float]:
        """{path: share that stays}."""
        return {p: self.kept[p] / max(n, 1) for p, n in self.size.items()}

    @property
    def total(self) -> float:
        """Share of all weights with a mask that stays."""
        return sum(self.kept.values()) / max(sum(self.size.values()), 1)


def density(masks: Masks) -> Density:
    """How many weights each mask keeps; host-side, exact (a sharded mask is counted where it lies).

    >>> density({"w": jnp.array([True, False, True, True])}).kept
    {'w': 3}
    """
    return Density({p: _count(m) for p, m in masks.items()}, {p: int(np.size(m)) for p, m in masks.items()})


def _count(mask: Any) -> int:
    if isinstance(mask, np.ndarray):
        return int(np.count_nonzero(mask))
    # rows are counted in 32 bits, and their sums as Python's integers
    return sum(map(int, np.ravel(jnp.sum(mask, axis=-1, dtype=jnp.uint32)))) if mask.ndim else int(mask)


def pack(masks: Masks) -> dict[str, dict[str, np.ndarray]]:
    """Masks as bits: {path: {"bits": uint8, "shape": int64}}, an eighth of a byte per weight; host-side.

    >>> pack({"w": np.ones((2, 4), bool)})["w"]["bits"].tolist()
    [255]
    """
    host = {p: np.asarray(m) for p, m in masks.items()}
    for p, m in host.items():
        _fits(p, m, m.shape)
    return {p: {"bits": np.packbits(m), "shape": np.array(m.shape, np.int64)} for p, m in host.items()}


def unpack(packed: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> dict[str, Bool[np.ndarray, ...]]:
    """The masks that `pack` stored; host-side.

    Args:
      packed: what `pack` made, perhaps by way of a file that others have written.
      like: {path: array or shape dtype}: the leaves that the masks are for.

    Raises:
      PatternError: fields, types, sizes or padding that `pack` does not write, or leaves that `like` does not have.
    """
    out = {}
    for path, entry in packed.items():
        if not isinstance(entry, Mapping) or set(entry) != {"bits", "shape"}:
            raise PatternError(f"the stored mask of {path!r} must have 'bits' and 'shape' and nothing else")
        bits, shape = np.asarray(entry["bits"]), np.asarray(entry["shape"])
        if bits.dtype != np.uint8 or bits.ndim != 1 or shape.dtype.kind not in "iu" or shape.ndim != 1:
            raise PatternError(f"the stored mask of {path!r} must be a list of bytes with a list of sizes")
        sizes = tuple(int(n) for n in shape)
        entries = math.prod(sizes)
        if len(sizes) > 32 or any(n < 0 for n in sizes) or -(-entries // 8) != len(bits):
            raise PatternError(
                f"the stored mask of {path!r} has {len(bits)} bytes, which do not hold a mask of {sizes}"
            )
        if entries % 8 and bits[-1] & (0xFF >> entries % 8):
            raise PatternError(f"the stored mask of {path!r} has bits set behind its last weight: it is damaged")
        if like is not None and (path not in like or tuple(like[path].shape) != sizes):
            wanted = f"has shape {tuple(like[path].shape)}" if path in like else f"is no leaf{suggest(path, like)}"
            raise PatternError(f"the stored mask of {path!r} has shape {sizes}, but {path!r} {wanted}")
        out[path] = np.unpackbits(bits, count=entries).astype(bool).reshape(sizes)
    return out


@dataclasses.dataclass(frozen=True)
class SparseCost:
    """What is left to compute and to store if zeros cost nothing; exact integers.

    Attributes:
      macs: MACs with weights that stay, and those of products without weights.
      params: entries of the parameters that stay.
    """

    macs: int
    params: int


def sparse_cost(graph: Graph, masks: Masks) -> SparseCost:
    """MACs and parameters that are left under masks; host-side.

    A weight that is computed from its leaf by more than changes of layout counts as dense: its zeros may not be zeros.
    For a smaller network trace that one and give `graph.compact_like(masks, keep)`.

    Raises:
      PatternError: a mask of no leaf, or of another shape.
    """
    for path, mask in masks.items():
        if path not in graph.leaves:
            raise PatternError(f"there is a mask for {path!r}, which is no leaf{suggest(path, graph.leaves)}")
        _fits(path, mask, graph.leaves[path].shape)
    used = {t.use.path: t for t in graph.taps.values() if t.leaf in masks}
    macs = 0
    for term, row in zip(graph.contractions, _cost.per_layer(graph, {}), strict=True):
        tap = used.get(term.path)
        if tap is None or moves.check(tap.use.moves, tap.layers):
            macs += row.macs
        else:
            own = moves.operand(tap.use.moves, masks[tap.leaf])
            macs += row.macs * _count(own) // max(int(np.size(own)), 1)
    found = density(masks)
    removed = sum(n - found.kept[p] for p, n in found.size.items() if graph.leaves[p].is_param)
    return SparseCost(macs, graph.cost().params - removed)
