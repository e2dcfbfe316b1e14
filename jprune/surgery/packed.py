"""Sparse weights in less memory: coordinates (BCOO), two of four with their positions, whole blocks; and back to dense.

    stored = two_of_four(params, masks)
    params = with_leaves(params, to_dense(stored))

Each form holds the weights that stay, bit for bit, in arrays that can be saved, moved and given to a compiled function,
which makes dense leaves of them where it needs them. Which weights stay is read from the masks on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Int32, Shaped, UInt8

from jprune.surgery.patterns import NM, Blocks, Masks, apply, check, grouped, groups_of, view_of
from jprune.surgery.views import View
from jprune.tracing.paths import flatten

FILLERS = (0, 1, 3, 2)  # a group that keeps fewer than two stores zeros as well: that at position 2, else 3, first


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "positions"], meta_fields=["shape", "form", "view"]
)
@dataclasses.dataclass(frozen=True)
class TwoOfFour:
    """A leaf's matrices (outputs, inputs) with two values of each four inputs.

    Groups follow each other along the inputs, as `NM(2, 4)` has them. A byte holds the positions of two groups, the first
    in its low half; a half holds the smaller position in its low two bits and the larger one in its high two bits. Four
    groups read as a little-endian 16-bit number are one entry of the metadata that CUTLASS and PyTorch
    (`torch.sparse.SparseSemiStructuredTensor`) make of a float16 or bfloat16 matrix, before they reorder its entries for
    the registers of a device; cuSPARSELt's own layout is not published. A group that keeps fewer than two stores zeros.

    Attributes:
      values: what stays, in the leaf's dtype; half as many columns as there are inputs (padded ones included).
      positions: 2-bit positions within the groups, a byte for two groups.
      shape: of the leaf.
      form: the pattern, which says whether a last short group is padded.
      view: how the leaf is a matrix.
    """

    values: Shaped[Array, "*lead out half"]
    positions: UInt8[Array, "*lead out bytes"]
    shape: tuple[int, ...]
    form: NM
    view: View

    def dense(self) -> Array:
        """The leaf, with zeros; jit-able."""
        pairs = self.values.reshape(*self.values.shape[:-1], -1, 2)
        halves = jnp.stack([self.positions & 15, self.positions >> 4], -1)
        halves = halves.reshape(*self.positions.shape[:-1], -1)[..., : pairs.shape[-2], None]
        at = jnp.arange(4, dtype=jnp.uint8)
        groups = jnp.where(at == halves >> 2, pairs[..., 1:], jnp.zeros((), pairs.dtype))
        groups = jnp.where(at == halves & 3, pairs[..., :1], groups)
        runs, length, _ = groups_of("", self.form, self.view)
        columns = groups.reshape(*groups.shape[:-2], runs, -1)[..., :length]
        return self.view.leaf_like(columns.reshape(*groups.shape[:-2], runs * length), self.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks", "places"], meta_fields=["shape", "view"])
@dataclasses.dataclass(frozen=True)
class WholeBlocks:
    """A leaf's matrices (outputs, inputs) as the blocks of them that are not gone.

    Attributes:
      blocks: (how many, outputs, inputs of a block), in the leaf's dtype; what stands out over the end is zero.
      places: of each block: the matrix (where a leaf has several), the row of blocks, the column of blocks; in order.
      shape: of the leaf.
      view: how the leaf is a matrix.
    """

    blocks: Shaped[Array, "kept height width"]
    places: Int32[Array, "kept axes"]
    shape: tuple[int, ...]
    view: View

    def dense(self) -> Array:
        """The leaf, with zeros; jit-able."""
        (h, w), lead = self.blocks.shape[1:], self.view.lead
        rows, columns = math.prod(self.view.outputs), math.prod(self.view.inputs)
        grid = jnp.zeros((*lead, -(-rows // h), -(-columns // w), h, w), self.blocks.dtype)
        grid = grid.at[tuple(self.places.T)].set(self.blocks).swapaxes(-2, -3)
        matrix = grid.reshape(*lead, -(-rows // h) * h, -(-columns // w) * w)[..., :rows, :columns]
        return self.view.leaf_like(matrix, self.shape)


Stored: TypeAlias = BCOO | TwoOfFour | WholeBlocks


def bcoo(params: Any, masks: Masks) -> dict[str, BCOO]:
    """The leaves that have a mask as `jax.experimental.sparse.BCOO`: {path: values and their indices}; host-side.

    All entries that a mask keeps are stored, zeros too; indices are sorted. A BCOO multiplies with dense arrays by `@`.

    >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 2.0], [5.0, 7.0]])}
    >>> w = bcoo(params, {"w": params["w"] != 0})["w"]
    >>> w.nse, (jnp.ones((1, 3)) @ w).tolist()
    (4, [[8.0, 9.0]])

    Raises:
      PatternError: a mask of no leaf, or of another shape or type.
    """
    out = {}
    for path, w, mask in _masked(params, masks):
        at = np.nonzero(mask)
        indices = jnp.asarray(np.stack(at, -1).astype(np.int32))
        out[path] = BCOO((w[at], indices), shape=w.shape, indices_sorted=True, unique_indices=True)
    return out


def two_of_four(
    params: Any, masks: Masks, views: Mapping[str, View] | None = None, *, pad: bool = False
) -> dict[str, TwoOfFour]:
    """The leaves that have a mask as halves of their weights with 2-bit positions: {path: TwoOfFour}; host-side.

    >>> params = {"w": jnp.array([[1.0, 0.0, 0.0, 4.0]]).T}  # four inputs, one output
    >>> w = two_of_four(params, {"w": params["w"] != 0})["w"]
    >>> w.values.tolist(), [f"{byte:04b}" for byte in w.positions[0].tolist()]
    ([[1.0, 4.0]], ['1100'])

    Args:
      params: with these leaves.
      masks: 2:4 along the inputs.
      views: leaves as matrices, where convention (outputs last, inputs before them) does not hold.
      pad: whether inputs that 4 does not divide end in a shorter group; otherwise they are refused.

    Raises:
      PatternError: a group that keeps more than two, with its leaf and place; inputs that 4 does not divide; a mask of no
        leaf, or of another shape or type.
    """
    form, out = NM(2, 4, pad=pad), {}
    check(masks, form, views)
    for path, w, mask in _masked(params, masks):
        view = view_of(path, w.shape, views)
        groups, kept = grouped(w, path, form, view, 0), grouped(mask, path, form, view, False)
        order = np.argsort(np.where(kept, 4, 0) + np.array(FILLERS), -1)
        first, second = np.moveaxis(np.sort(order[..., -2:], -1).astype(np.uint8), -1, 0)
        pairs = jnp.take_along_axis(groups, jnp.asarray(np.stack([first, second], -1), jnp.int32), -1)
        halves = (first | second << 2).reshape(*kept.shape[:-3], -1)
        halves = np.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, halves.shape[-1] % 2)])
        bytes_ = halves[..., ::2] | halves[..., 1::2] << 4
        out[path] = TwoOfFour(pairs.reshape(*kept.shape[:-3], -1), jnp.asarray(bytes_), w.shape, form, view)
    return out


def whole_blocks(
    params: Any, masks: Masks, block: tuple[int, int], views: Mapping[str, View] | None = None
) -> dict[str, WholeBlocks]:
    """The leaves that have a mask as the blocks that stay, with their places: {path: WholeBlocks}; host-side.

    >>> params = {"w": jnp.kron(jnp.array([[1.0, 0.0]]), jnp.ones((2, 2)))}
    >>> w = whole_blocks(params, {"w": params["w"] != 0}, (2, 2))["w"]
    >>> w.blocks.shape, w.places.tolist()
    ((1, 2, 2), [[0, 0]])

    Args:
      params: with these leaves.
      masks: of whole blocks; those at the ends may be smaller.
      block: outputs and inputs of a block.
      views: leaves as matrices, where convention (outputs last, inputs before them) does not hold.

    Raises:
      PatternError: a block that is kept in part, with its leaf and place; a mask of no leaf, or of another shape or type.
      ValueError: a block without entries.
    """
    form, out = Blocks(block), {}
    check(masks, form, views)
    for path, w, mask in _masked(params, masks):
        view = view_of(path, w.shape, views)
        kept = _cut(np, np.asarray(view.matrix(mask)), block).any((-1, -2))
        places = np.nonzero(kept)
        blocks = _cut(jnp, view.matrix(w), block)[places]
        out[path] = WholeBlocks(blocks, jnp.asarray(np.stack(places, -1).astype(np.int32)), w.shape, view)
    return out


def to_dense(stored: Mapping[str, Stored]) -> dict[str, Array]:
    """The leaves that were stored, with zeros elsewhere: {path: array}, bit for bit; jit-able."""
    return {p: _scattered(x) if isinstance(x, BCOO) else x.dense() for p, x in stored.items()}


def stored_bytes(stored: Mapping[str, Stored]) -> dict[str, int]:
    """Bytes of each leaf as it is stored, positions included: {path: bytes}.

    >>> w = {"w": jnp.tile(jnp.array([[1.0, 0.0]], jnp.bfloat16), (8, 4)).T}  # 8 x 8, half of it zeros
    >>> w["w"].nbytes, stored_bytes(two_of_four(w, {"w": w["w"] != 0}))["w"], stored_bytes(bcoo(w, {"w": w["w"] != 0}))["w"]
    (128, 72, 320)
    """
    return {p: sum(int(x.nbytes) for x in jax.tree.leaves(s)) for p, s in stored.items()}


def _masked(params: Any, masks: Masks) -> list[tuple[str, Any, np.ndarray]]:
    """(path, weights with zeros where they are masked, mask) of each leaf with a mask."""
    leaves = dict(flatten(apply({p: x for p, x in flatten(params) if p in masks}, masks)))
    return [(p, jnp.asarray(leaves[p]), np.asarray(m)) for p, m in masks.items()]


def _scattered(x: BCOO) -> Array:
    """Set, not added to zeros, which would turn -0.0 to 0.0."""
    return jnp.zeros(x.shape, x.dtype).at[tuple(x.indices.T)].set(x.data)


def _cut(xp: Any, matrix: Any, block: tuple[int, int]) -> Any:
    """(*lead, rows of blocks, columns of blocks, height, width); ends filled up with zeros."""
    (h, w), (rows, columns) = block, matrix.shape[-2:]
    m = xp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, -rows % h), (0, -columns % w)])
    return m.reshape(*m.shape[:-2], m.shape[-2] // h, h, m.shape[-1] // w, w).swapaxes(-2, -3)
