"""Residual branches: which matrix products end in a sum with the very value their branch started from.

A sum y = x + f(x) is known by its operands: one of them is an ancestor of the other. The matrix products with a
parameter that lie last in f close the branch. Sums of several branches that read the same value (attention and MLP
side by side) are understood too: x may be a summand of the other operand. Names and shapes are not needed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jprune.tracing.flow import Flow
from jprune.tracing.primitives import CONTRACTIONS, SUMS
from jprune.tracing.structure import Tap
from jprune.tracing.walk import Path, Val

if TYPE_CHECKING:
    from jprune.graph import Graph


@dataclasses.dataclass(frozen=True)
class Branch:
    """One product with a parameter that closes a residual branch.

    Attributes:
      tap: id of that product's tap.
      products: call paths of the products of two activations on the way (those of attention).
      start, end: the stream before and after: what the branch reads, and the sum it is added in.
      order: the sum's place in the program.
    """

    tap: str
    products: tuple[Path, ...]
    start: Val = dataclasses.field(repr=False)
    end: Val = dataclasses.field(repr=False)
    order: int


def branches(graph: Graph, flow: Flow) -> tuple[Branch, ...]:
    """The products with parameters that close residual branches, in the order of the sums they end in."""
    analysis, needs = graph.analysis, _Needs(flow)
    taps = {t.use.path: t for t in graph.taps.values() if t.primitive == "dot_general"}
    results = {path: flow.steps[path].outs[0] for path in taps}
    free = {path: flow.steps[path].outs[0] for path, m in analysis.macs.items() if m.leaf is None}
    found: dict[int, list[tuple[Tap, Val, Val]]] = {}
    for path, tap in taps.items():
        r = results[path]
        for k, (_, operands) in enumerate(needs.sums):
            for mine, other in (operands, operands[::-1]):
                if needs.depends(mine, r) and not needs.depends(other, r):
                    start = needs.read_by(r, other)
                    if start is not None:
                        found.setdefault(k, []).append((tap, r, start))
            if any(t is tap for t, _, _ in found.get(k, ())):
                break
    out = []
    for k, ends in sorted(found.items()):
        for tap, r, start in ends:
            if any(u is not r and needs.depends(u, r) for _, u, _ in ends):
                continue
            between = tuple(p for p, v in free.items() if needs.depends(r, v) and needs.depends(v, start))
            out.append(Branch(tap.id, between, start, needs.sums[k][0], k))
    return tuple(out)


class _Needs:
    """Which of the marked values (operands of sums, results of products) every value depends on, as bits of a number.

    Attributes:
      sums: (sum, its two operands), in the order of the program.
    """

    def __init__(self, flow: Flow):
        self._flow = flow
        self._bits: dict[int, int] = {}
        self._needs: dict[int, int] = {}
        self.sums: list[tuple[Val, tuple[Val, Val]]] = []
        for step in flow.steps.values():
            data = [flow.root(v) for v in step.ins if not flow.is_static(v)]
            out = step.outs[0] if step.outs else None
            if step.name in SUMS and len(data) == 2 and out and len({v.shape for v in (*data, out)}) == 1:
                self.sums.append((out, (data[0], data[1])))
                for v in data:
                    self._mark(v)
            if step.name in CONTRACTIONS and data and out:
                self._mark(out)
        for step in flow.steps.values():
            for v in step.outs:
                if flow.made_by(v) is step:
                    needs = self._bits.get(id(v), 0)
                    for x in step.ins:
                        needs |= self._of(x)
                    self._needs[id(v)] = needs

    def _mark(self, v: Val) -> None:
        self._bits.setdefault(id(v), 1 << len(self._bits))

    def _of(self, v: Val) -> int:
        return self._needs.get(id(v), self._bits.get(id(v), 0))

    def depends(self, v: Val, on: Val) -> bool:
        """Whether `v` is, or is computed from, the marked value `on`."""
        return bool(self._of(v) & self._bits.get(id(self._flow.root(on)), 0))

    def read_by(self, r: Val, other: Val) -> Val | None:
        """What `r` was computed from: the other operand of a sum, or one of its summands."""
        summands = {id(v): operands for v, operands in self.sums}
        waiting = [other]
        while waiting:
            v = waiting.pop()
            if self.depends(r, v):
                return v
            waiting.extend(summands.get(id(v), ()))
        return None
