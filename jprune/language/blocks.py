"""The blocks of a decoder, read from its trace: which group is whose FFN channels or attention heads, in which order.

A block is one pass of the residual stream through an attention and an MLP. Both are residual branches
(jprune.tracing.flow); the one with products of activations is the attention. Methods for language models speak of
blocks and never of a model's names, so that they work on any function that is a decoder.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jprune.graph import Graph
from jprune.tracing import layout as L
from jprune.tracing.branches import Branch, branches
from jprune.tracing.flow import Flow
from jprune.tracing.layout import Unit
from jprune.tracing.probes import Point
from jprune.tracing.structure import Tap
from jprune.tracing.walk import Path


class BlockError(ValueError):
    """A function whose blocks cannot be told; says what was found and what is missing."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One layer of a decoder, or all layers of a scan.

    Attributes:
      ffn: group of the MLP's hidden channels.
      down: tap of the MLP's last product, whose input is these channels.
      kv: group whose units are key-value heads with their query heads; None where there is one such head only, and
        where the block has no attention.
      query: group of the query heads within each key-value head; None under plain multi-head attention.
      value: group of the channels of the value heads; None where they are fixed.
      out: tap of the attention's last product; None where the block has no attention.
      start, end: where the residual stream enters and leaves the block.
      features: the axes of these values that run over the stream's channels.
      layers: L where the block is the body of a scan over L layers, else None.
      scan: call path of that scan.
    """

    ffn: str
    down: str
    kv: str | None
    query: str | None
    value: str | None
    out: str | None
    start: Point
    end: Point
    features: tuple[int, ...]
    layers: int | None
    scan: Path | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a decoder: a block, and which of its layers where it is the body of a scan."""

    block: Block
    row: int | None


@dataclasses.dataclass(frozen=True)
class _Heads:
    kv: str | None
    query: str | None
    value: str | None


def blocks(graph: Graph) -> tuple[Block, ...]:
    """The blocks of a traced decoder, in program order.

    Works on any function of residual branches: layers unrolled, scanned or rematerialised, MLP behind the attention or
    beside it, heads as an axis of their own or flat, norms before or behind the branches.

    Raises:
      BlockError: there is no MLP whose channels form a group of their own, or branches that are neither an MLP nor an
        attention, or an attention that belongs to no MLP.
    """
    flow = Flow(graph)
    mlps: list[tuple[Branch, str]] = []
    attentions: list[tuple[Branch, _Heads]] = []
    for b in branches(graph, flow):
        tap = graph.taps[b.tap]
        if b.products:
            attentions.append((b, _heads(graph, tap, b.products)))
        else:
            mlps.append((b, _channels(graph, tap)))
    if not mlps:
        raise BlockError(
            "no residual branch of this function ends in an MLP's last product: blocks are found where a matrix "
            "product with a parameter is added to the value its branch started from"
        )
    seen: dict[int, str] = {}
    for b, _ in (*mlps, *attentions):
        if not b.products and seen.setdefault(id(b.end), b.tap) != b.tap:
            raise BlockError(f"{seen[id(b.end)]!r} and {b.tap!r} close one residual branch: only one MLP may")
    out = []
    for mlp, channels in mlps:
        own = [(a, h) for a, h in attentions if a.end is mlp.start or a.start is mlp.start]
        if len(own) > 1:
            raise BlockError(
                f"{', '.join(repr(a.tap) for a, _ in own)} all lead to the MLP of {mlp.tap!r}: one attention may"
            )
        attentions = [pair for pair in attentions if pair not in own]
        out.append(_block(graph, flow, mlp, channels, *(own[0] if own else (None, _Heads(None, None, None)))))
    if attentions:
        raise BlockError(
            f"the attention of {attentions[0][0].tap!r} leads to no MLP: a block is an attention and the MLP that "
            "reads the stream behind it, or beside it"
        )
    return tuple(out)


def layers(found: Sequence[Block]) -> tuple[Layer, ...]:
    """Every layer in the order they run: blocks that share the body of a scan take turns."""
    out: list[Layer] = []
    for _, group in itertools.groupby(enumerate(found), lambda ib: ib[1].scan or ib[0]):
        body = [b for _, b in group]
        rows = [None] if body[0].layers is None else range(body[0].layers)
        out += [Layer(b, row) for row in rows for b in body]
    return tuple(out)


def _block(graph: Graph, flow: Flow, mlp: Branch, channels: str, attention: Branch | None, heads: _Heads) -> Block:
    tap = graph.taps[mlp.tap]
    start, end = mlp.start, mlp.end
    if attention is not None:
        start = attention.start
        end = max(mlp, attention, key=lambda b: b.order).end
        if graph.taps[attention.tap].scan_path != tap.scan_path:
            raise BlockError(f"{attention.tap!r} and {mlp.tap!r} lie in different loops: no block holds both")
    points = flow.points(start, end)
    if points is None:
        raise BlockError(
            f"the stream before and behind the block of {mlp.tap!r} is never at hand in one place: it enters and "
            "leaves through different loops, branches or rematerialised calls"
        )
    return Block(channels, mlp.tap, heads.kv, heads.query, heads.value, attention.tap if attention else None,
                 *points, _features(graph, tap, points[1]), tap.layers, tap.scan_path)  # fmt: skip


def _features(graph: Graph, tap: Tap, at: Point) -> tuple[int, ...]:
    """The axes of the stream that are the features of the product that is added to it."""
    layouts = graph.layouts_at(at.path)[1 if at.after else 0][at.index]
    found = tuple(i for i, lay in enumerate(layouts) if lay in tap.out_layouts)
    if len(found) == len(tap.out_layouts):
        return found
    result = graph.analysis.records[tap.use.path][1][0].shape
    if result == tuple(L.full_size(lay) for lay in layouts):
        return tap.use.out_features
    raise BlockError(f"which axes of the stream behind {tap.id!r} ({tap.where}) are its channels cannot be told")


def _channels(graph: Graph, tap: Tap) -> str:
    """The group that alone is the input of an MLP's last product."""
    if len(tap.in_layouts) == 1 and len(tap.in_layouts[0]) == 1 and isinstance(tap.in_layouts[0][0], Unit):
        group = tap.in_layouts[0][0].group
        if group not in {g for lay in tap.out_layouts for g in L.groups_in(lay)}:
            return group
        raise BlockError(f"{tap.id!r} maps the stream to itself ({tap.where}): an MLP has channels of its own")
    axes = [axis for axis in range(len(graph.leaves[tap.leaf].shape)) if graph.leaves[tap.leaf].frozen[axis]]
    why = "; ".join(str(graph.leaves[tap.leaf].frozen[axis]) for axis in axes) or "they belong to several groups"
    raise BlockError(f"the channels that enter {tap.id!r} ({tap.where}) are no group of their own: {why}")


def _heads(graph: Graph, tap: Tap, products: Sequence[Path]) -> _Heads:
    """Which group of an attention's output features is which.

    Heads take part in the products of queries with keys and of weights with values; channels of values in the latter
    alone. A key-value head owns keys and values, a query head within it does not.
    """
    groups = sorted({g for lay in tap.in_layouts for g in L.groups_in(lay)})
    met = {g: sum(_meets(graph, path, g) for path in products) for g in groups}
    heads = [g for g in groups if met[g] > 1]
    values = [g for g in groups if met[g] == 1]
    if len(values) > 1 or len(heads) > 2 or not groups or any(n == 0 for n in met.values()):
        raise BlockError(
            f"the features that enter {tap.id!r} ({tap.where}) are those of groups {groups}: no attention over heads "
            "with keys, queries and values has these"
        )
    kv = [g for g in heads if all(_covers(graph, g, o) for o in groups)]
    if len(groups) == 1 and heads:
        raise BlockError(f"whether {groups[0]!r} holds query heads or key-value heads cannot be told: the channels of "
                         f"the values that enter {tap.id!r} are fixed")  # fmt: skip
    if len(heads) == 2 and len(kv) != 1:
        raise BlockError(f"none of {heads} owns the keys and values of the other's heads ({tap.where})")
    query = [g for g in heads if g not in kv]
    return _Heads(kv[0] if kv else None, query[0] if query else None, values[0] if values else None)


def _meets(graph: Graph, path: Path, group: str) -> bool:
    ins, outs = graph.layouts_at(path)
    return any(group in L.groups_in(lay) for axes in (*ins, *outs) for lay in axes)


def _covers(graph: Graph, group: str, other: str) -> bool:
    """Whether `group` owns positions in every leaf `other` has a part in, and all of its positions on common axes."""
    mine, theirs = ({(m.path, m.axis): m for m in graph.groups[g].members} for g in (group, other))
    leaves = {path for path, _ in mine}
    return all(
        path in leaves and ((path, axis) not in mine or np.isin(m.positions, mine[path, axis].positions).all())
        for (path, axis), m in theirs.items()
    )
