"""Who makes and who reads the values of a traced function: the one index of its dataflow.

A value that passes into a call, or out of one, is the same value inside: jitted and rematerialised parts of a function
are read as if they were written in place. What passes into a loop, a branch or a derivative rule gets a new name there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jprune.tracing.primitives import CALLS, REMAT, SAME
from jprune.tracing.probes import Point
from jprune.tracing.walk import Eqn, Path, Val

if TYPE_CHECKING:
    from jprune.graph import Graph


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """One equation that the function evaluates.

    Attributes:
      path: its call path.
      eqn: the equation.
      ins, outs: its operands and results.
      scope: the loop body, branch or derivative rule that it lies in; () at the top.
      remat: call path of the innermost rematerialised call around it within that scope, if any.
      is_call: it only evaluates other equations, which are steps themselves.
    """

    path: Path
    eqn: Eqn
    ins: list[Val]
    outs: list[Val]
    scope: Path
    remat: Path | None
    is_call: bool

    @property
    def name(self) -> str:
        """Its primitive."""
        return self.eqn.primitive.name

    @property
    def room(self) -> tuple[Path, Path | None]:
        """Where its values can be seen: they pass out of a rematerialised call only through its results."""
        return self.scope, self.remat


class Flow:
    """The dataflow of one traced function.

    Attributes:
      steps: every equation by its call path, in the order in which results are there: calls after what they evaluate.
      inputs, outputs: values of the inputs that are no leaves, and of what the function returns.
    """

    def __init__(self, graph: Graph):
        analysis = graph.analysis
        self.inputs, self.outputs = graph.inputs.values, graph.output_vals
        self.steps: dict[Path, Step] = {}
        self._makers: dict[int, list[Step]] = {}
        self._readers: dict[int, list[Step]] = {}
        self._returned = {id(v) for v in graph.output_vals}
        self._static: set[int] = set()
        self._same: dict[int, Val] = {}
        rooms: dict[Path, tuple[Path, Path | None]] = {}
        for path, eqn in analysis.eqns.items():
            ins, outs = analysis.records[path]
            if path[:-1] not in rooms:
                rooms[path[:-1]] = self._room(path, analysis.eqns)
            step = Step(path, eqn, ins, outs, *rooms[path[:-1]], eqn.primitive.name in (*CALLS, *REMAT))
            self.steps[path] = step
            for v in ins:
                self._readers.setdefault(id(v), []).append(step)
            fixed = all([self.is_static(v) for v in ins])
            for k, v in enumerate(outs):
                if any([v is x for x in ins]):  # a call that hands its argument on
                    continue
                if id(v) not in self._makers:
                    if fixed:
                        self._static.add(id(v))
                    elif step.name in SAME:
                        self._same[id(v)] = self.root(ins[k])
                self._makers.setdefault(id(v), []).append(step)

    @staticmethod
    def _room(path: Path, eqns: dict[Path, Eqn]) -> tuple[Path, Path | None]:
        remat = None
        for i in range(len(path) - 1, 0, -1):
            if isinstance(path[i], str) and path[:i] in eqns:
                name = eqns[path[:i]].primitive.name
                if name in REMAT:
                    remat = remat or path[:i]
                elif name not in CALLS:
                    return path[: i + 1], remat
        return (), remat

    def made_by(self, v: Val, scope: Path | None = None) -> Step | None:
        """The innermost equation whose result a value is (None: it is an argument or a constant), or that in a scope."""
        for step in self._makers.get(id(v), ()):
            if scope is None or (step.scope == scope and not step.is_call):
                return step
        return None

    def read_by(self, v: Val, scope: Path | None = None) -> list[Step]:
        """The equations that take a value, as often as they do; or those in a scope, calls left out."""
        found = self._readers.get(id(v), [])
        return found if scope is None else [s for s in found if s.scope == scope and not s.is_call]

    def is_output(self, v: Val) -> bool:
        """Whether the function returns this value."""
        return id(v) in self._returned

    def is_static(self, v: Val) -> bool:
        """Whether a value depends on parameters and constants alone."""
        return v.leaf is not None or v.scalar is not None or v.const is not None or id(v) in self._static

    def root(self, v: Val) -> Val:
        """The value behind copies, casts and placements."""
        return self._same.get(id(v), v)

    def within(self, scope: Path) -> Iterator[Step]:
        """The equations of one scope in order, calls left out."""
        return (s for s in self.steps.values() if s.scope == scope and not s.is_call)

    def points(self, before: Val, after: Val) -> tuple[Point, Point] | None:
        """Where both values can be seen in one room, `before` first; None where no room has both."""
        order = {path: i for i, path in enumerate(self.steps)}
        pairs = [
            (a, b)
            for a in self._points(before)
            for b in self._points(after)
            if self.steps[a.path].room == self.steps[b.path].room
            and (order[a.path], a.after) < (order[b.path], b.after)
        ]
        return min(pairs, key=lambda ab: (order[ab[1].path], order[ab[0].path]), default=None)

    def _points(self, v: Val) -> list[Point]:
        seen = {s.path: s for s in (*self._readers.get(id(v), ()), *self._makers.get(id(v), ()))}
        return [
            Point(path, k, after)
            for path, s in seen.items()
            for after, vals in ((False, s.ins), (True, s.outs))
            for k, x in enumerate(vals)
            if x is v
        ]
