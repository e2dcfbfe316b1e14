"""Residual branches: which matrix products end in a sum with the very value their branch started from.

A sum y = x + f(x) is known by its operands: one of them is an ancestor of the other. The matrix products with a
parameter that lie last in f close the branch. Sums of several branches that read the same value (attention and MLP
side by side) are understood too: x may be a summand of the other operand. Names and shapes are not needed.
"""

from __future__ import annotations

import dataclasses

from jprune.tracing.joins import CONTRACTIONS
from jprune.tracing.probes import Point
from jprune.tracing.rules.control_flow import CALLS
from jprune.tracing.structure import Structure, Tap
from jprune.tracing.walk import Path, Val

SUMS = ("add", "add_any")
SAME = ("convert_element_type", "copy", "reduce_precision", "stop_gradient", "optimization_barrier",
        "sharding_constraint")  # fmt: skip


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


class Flow:
    """Who makes and who reads the values of one traced function.

    Attributes:
      same: id of a value -> the value it is a copy, cast or placement of.
    """

    def __init__(self, graph: Structure):
        self.graph = graph
        self.same: dict[int, Val] = {}
        self._static: set[int] = set()
        self._made: dict[int, Path] = {}
        self._bits: dict[int, int] = {}
        self._needs: dict[int, int] = {}
        self._sums: list[tuple[Path, Val, tuple[Val, Val]]] = []
        self._where: dict[int, list[Point]] = {}
        records = graph.analysis.records
        for path, eqn in graph.analysis.eqns.items():
            ins, outs = records[path]
            for k, v in enumerate(ins):
                self._where.setdefault(id(v), []).append(Point(path, k, False))
            for k, v in enumerate(outs):
                self._where.setdefault(id(v), []).append(Point(path, k, True))
            name = eqn.primitive.name
            for k, v in enumerate(outs):
                if id(v) in self._made or any(v is x for x in ins):  # a result of a call is one of an equation inside
                    continue
                self._made[id(v)] = path
                if all(map(self.is_static, ins)):
                    self._static.add(id(v))
                elif name in SAME:
                    self.same[id(v)] = self.root(ins[k])
            data = [self.root(v) for v in ins if not self.is_static(v)]
            if name in SUMS and len(data) == 2 and len({v.shape for v in (*data, outs[0])}) == 1:
                self._sums.append((path, outs[0], (data[0], data[1])))
                for v in data:
                    self._mark(v)
            if name in CONTRACTIONS and data:
                self._mark(outs[0])
        for path in graph.analysis.eqns:
            ins, outs = records[path]
            for v in outs:
                if self._made.get(id(v)) == path:
                    self._needs[id(v)] = self._bits.get(id(v), 0)
                    for x in ins:
                        self._needs[id(v)] |= self.needs(x)

    def root(self, v: Val) -> Val:
        """The value behind copies, casts and placements."""
        return self.same.get(id(v), v)

    def is_static(self, v: Val) -> bool:
        """Whether a value depends on parameters and constants alone."""
        return v.leaf is not None or v.scalar is not None or v.const is not None or id(v) in self._static

    def needs(self, v: Val) -> int:
        """Bits of the marked values (operands of sums, results of products) that `v` is or depends on."""
        return self._needs.get(id(v), self._bits.get(id(v), 0))

    def depends(self, v: Val, on: Val) -> bool:
        """Whether `v` is, or is computed from, the marked value `on`."""
        return bool(self.needs(v) & self._bits.get(id(self.root(on)), 0))

    def _mark(self, v: Val) -> None:
        self._bits.setdefault(id(v), 1 << len(self._bits))

    def branches(self) -> tuple[Branch, ...]:
        """The products with parameters that close residual branches, in the order of the sums they end in."""
        analysis = self.graph.analysis
        taps = {t.use.path: t for t in self.graph.taps.values() if t.primitive == "dot_general"}
        results = {path: analysis.records[path][1][0] for path in taps}
        free = {path: analysis.records[path][1][0] for path, m in analysis.macs.items() if m.leaf is None}
        found: dict[int, list[tuple[Tap, Val, Val]]] = {}
        for path, tap in taps.items():
            r = results[path]
            for k, (_, _, operands) in enumerate(self._sums):
                for mine, other in (operands, operands[::-1]):
                    if self.depends(mine, r) and not self.depends(other, r):
                        start = self._read_by(r, other)
                        if start is not None:
                            found.setdefault(k, []).append((tap, r, start))
                if any(t is tap for t, _, _ in found.get(k, ())):
                    break
        out = []
        for k, ends in sorted(found.items()):
            for tap, r, start in ends:
                if any(u is not r and self.depends(u, r) for _, u, _ in ends):
                    continue
                between = tuple(p for p, v in free.items() if self.depends(r, v) and self.depends(v, start))
                out.append(Branch(tap.id, between, start, self._sums[k][1], k))
        return tuple(out)

    def _read_by(self, r: Val, other: Val) -> Val | None:
        """What `r` was computed from: the other operand of a sum, or one of its summands."""
        summands = {id(v): operands for _, v, operands in self._sums}
        waiting = [other]
        while waiting:
            v = waiting.pop()
            if self.depends(r, v):
                return v
            waiting.extend(summands.get(id(v), ()))
        return None

    def points(self, before: Val, after: Val) -> tuple[Point, Point] | None:
        """Where both values can be seen in one scope, `before` first; None where no scope has both."""
        order = {path: i for i, path in enumerate(self.graph.analysis.eqns)}
        pairs = [
            (a, b)
            for a in self._where.get(id(before), ())
            for b in self._where.get(id(after), ())
            if self.scope(a.path) == self.scope(b.path) and (order[a.path], a.after) < (order[b.path], b.after)
        ]
        return min(pairs, key=lambda ab: (order[ab[1].path], order[ab[0].path]), default=None)

    def scope(self, path: Path) -> Path:
        """The loop body, branch or rematerialised call an equation lies in: values pass only through its results."""
        eqns = self.graph.analysis.eqns
        for i in range(len(path) - 1, 0, -1):
            if isinstance(path[i], str) and path[:i] in eqns and eqns[path[:i]].primitive.name not in CALLS:
                return path[: i + 1]
        return ()
