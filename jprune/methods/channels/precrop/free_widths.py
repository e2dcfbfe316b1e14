"""Which widths of a network may be chosen before training: those inside its blocks, or all; read from the graph.

A width stays, where stages keep theirs, if its group is summed or concatenated (a residual stream), carries the stem's
output or the classifier's input, or meets no nonlinearity (a linear bottleneck: what one block hands to the next). What
is left lies inside blocks. Depthwise kernels follow their group; the cardinality of grouped convolutions stays.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

from jprune.graph import Graph
from jprune.importance.at_init import weight_leaves
from jprune.tracing import layout as L
from jprune.tracing.connections import connections
from jprune.tracing.layout import Fixed, Unit

SPATIAL = ("KERNEL_SPATIAL", "CONV_SPATIAL")  # axes other than channels


@dataclasses.dataclass(frozen=True)
class Block:
    """Groups that are chosen together, and the weights that depend on them."""

    groups: tuple[str, ...]
    weights: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WidthVariables:
    """The widths that may change.

    Attributes:
      mode: "keep" or "scale".
      blocks: with "keep" groups connected through weights, else one block of everything.
      pooled: bottlenecks of squeeze-excite gates and their weights.
      factors: per weight and factor of its axes the free groups in it: a matrix between two has two.
      depthwise: kernels with a single input channel per group.
      counts: entries of every weight.
      sizes: of the free groups.
    """

    mode: str
    blocks: tuple[Block, ...]
    pooled: dict[str, tuple[str, ...]]
    factors: dict[str, tuple[tuple[str, ...], ...]]
    depthwise: frozenset[str]
    counts: dict[str, int]
    sizes: dict[str, int]

    @property
    def keeps_stages(self) -> bool:
        """Whether only widths inside blocks change."""
        return self.mode == "keep"

    @property
    def groups(self) -> tuple[str, ...]:
        """Every group that may change."""
        return (*(g for b in self.blocks for g in b.groups), *self.pooled)

    def bundles(self, tied: bool) -> list[tuple[str, ...]]:
        """Groups that share one width: the equally wide ones of a block if `tied`, otherwise each by itself."""
        if not (tied and self.keeps_stages):
            return [(g,) for g in self.groups]
        out: list[tuple[str, ...]] = []
        for block in self.blocks:
            alike = collections.defaultdict(list)
            for g in block.groups:
                alike[self.sizes[g]].append(g)
            out += [tuple(gs) for gs in alike.values()]
        return [*out, *((g,) for g in self.pooled)]


@functools.lru_cache(maxsize=64)
def width_variables(graph: Graph, stage_width: str | None = None) -> WidthVariables:
    """The free widths; `stage_width` None means "keep" where anything is summed or concatenated, else "scale".

    Raises:
      ValueError: nothing may change.
    """
    weights = weight_leaves(graph)
    own = {p: {g for lay in graph.leaves[p].layouts for g in L.groups_in(lay)} for p in weights}
    summed_over, depthwise, cardinality = _contracted(graph, set(weights))
    facts = connections(graph)
    between = facts.summed | facts.concatenated
    mode = stage_width or ("keep" if between else "scale")
    touching = {g: tuple(p for p in weights if g in own[p]) for g in graph.groups}

    gated = {g for p in facts.gates & own.keys() for g in summed_over[p]} - between
    pooled = {g: touching[g] for g in gated if all(p in facts.gates or g not in summed_over[p] for p in touching[g])}
    squeezing = {p for paths in pooled.values() for p in paths}

    stay = set(cardinality)
    if mode == "keep":
        stay |= between | (graph.groups.keys() - facts.nonlinear)
        for p in weights:
            codes = {f.code for f in graph.leaves[p].frozen if f is not None}
            reads_input = not summed_over[p] and codes <= {"MODEL_INPUT", *SPATIAL}
            gives_output = own[p] <= summed_over[p] and codes <= {"MODEL_OUTPUT", *SPATIAL}
            if p not in depthwise and (reads_input or gives_output):
                stay |= own[p]
    free = [g for g in graph.groups if touching[g] and g not in stay and g not in pooled]
    if not free and not pooled:
        raise ValueError(
            "no width may change: the network has none inside blocks; pass stage_width='scale'"
            if mode == "keep"
            else "no width may change: every one is fixed by the inputs or outputs"
        )
    plain = [p for p in weights if p not in squeezing]
    factors = {
        p: tuple(
            side
            for lay in graph.leaves[p].layouts
            for dim in lay
            if (side := tuple(dict.fromkeys(g for g in _in(dim) if g in free)))
        )
        for p in weights
    }
    if mode == "scale":
        blocks = [Block(tuple(free), tuple(p for p in plain if own[p] & set(free)))]
    else:
        blocks = _connected(free, plain, own)
    counts = {p: math.prod(graph.leaves[p].shape) for p in weights}
    sizes = {g: graph.groups[g].size for g in (*free, *pooled)}
    return WidthVariables(mode, tuple(blocks), pooled, factors, frozenset(depthwise), counts, sizes)


def _in(dim: L.Dim) -> list[str]:
    return [] if isinstance(dim, Fixed) else list(L.groups_in((dim,)))


def _connected(free: list[str], weights: list[str], own: dict[str, set[str]]) -> list[Block]:
    """Free groups that share a weight, directly or through others, in program order."""
    left, out = dict.fromkeys(free), []
    while left:
        found = [next(iter(left))]
        for g in found:
            left.pop(g, None)
            near = {h for p in weights if g in own[p] for h in own[p]}
            found += [h for h in left if h in near and h not in found]
        mine = tuple(g for g in free if g in found)
        out.append(Block(mine, tuple(p for p in weights if own[p] & set(mine))))
    return out


def _contracted(graph: Graph, weights: set[str]) -> tuple[dict[str, set[str]], set[str], set[str]]:
    """Per weight the groups summed over in its uses; the depthwise kernels; the cardinalities of grouped ones."""
    summed_over: dict[str, set[str]] = {p: set() for p in weights}
    depthwise, cardinality = set[str](), set[str]()
    for c in graph.contractions:
        if c.name not in weights:
            continue
        summed_over[c.name] |= {g for lay in c.contracted for g in L.groups_in(lay)}
        if c.primitive == "conv_general_dilated" and c.eqn.params["feature_group_count"] > 1:
            out, into = c.eqn.params["dimension_numbers"].rhs_spec[:2]
            if c.eqn.invars[1].aval.shape[into] == 1:
                depthwise.add(c.name)
            else:
                axis = graph.layouts_at(c.path)[0][1][out]
                cardinality |= {axis[0].group} if isinstance(axis[0], Unit) else set()
    return summed_over, depthwise, cardinality
