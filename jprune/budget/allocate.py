"""Allocation: which units stay, so that a cost target is met from below and no single further unit fits.

Units compete inside classes: all groups together (ranked), each group by itself at one common fraction (uniform),
or groups of the same shape of use (isomorphic; Fang et al. 2024, section 3.2). One number, the fraction removed from
every class, orders all decisions into a nested chain; the chain is bisected, then units are given back while any fits.
Host-side: sizes have to be numbers.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jprune.budget.target import Target
from jprune.graph import Graph
from jprune.importance.reduce import check_scores
from jprune.tracing.errors import NotPrunable, suggest
from jprune.tracing.structure import Group


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A decision that meets a target.

    Attributes:
      keep: {group id: bool (size,) or (layers, size)}, one entry per scored group.
      widths: units kept per group.
      quantity: what was counted.
      dense, limit, achieved: cost of the dense function, largest allowed, and of this decision.
      gap: limit - achieved, at least 0.
      next_unit: cost of the cheapest unit (or multiple) that could still be given back; above the gap, or None if
        nothing was removed.
    """

    keep: dict[str, np.ndarray]
    widths: dict[str, Any]
    quantity: str
    dense: float
    limit: float
    achieved: float
    gap: float
    next_unit: float | None

    def __str__(self) -> str:
        return (
            f"{self.quantity}: {self.achieved:,.6g} of {self.dense:,.6g} ({self.achieved / self.dense:.2%}), "
            f"{self.gap:,.6g} below the limit {self.limit:,.6g}"
            + (f"; one more unit would cost {self.next_unit:,.6g}" if self.next_unit is not None else "")
        )


def ranked(graph: Graph, scores: Mapping[str, Any], target: Target, **options: Any) -> Allocation:
    """All groups in one ranking (global); see `allocate` for the options."""
    return allocate(graph, scores, target, "global", **options)


def uniform(graph: Graph, scores: Mapping[str, Any], target: Target, **options: Any) -> Allocation:
    """The same fraction of every group; see `allocate` for the options."""
    return allocate(graph, scores, target, "uniform", **options)


def isomorphic(graph: Graph, scores: Mapping[str, Any], target: Target, **options: Any) -> Allocation:
    """The same fraction of every class of groups that are used alike; see `allocate` for the options."""
    return allocate(graph, scores, target, "isomorphic", **options)


def isomorphism_class(graph: Graph, group: Group) -> tuple[Any, ...]:
    """What makes two groups comparable: the multiset of (leaf rank, axis, primitive) of their members."""
    return tuple(sorted((len(graph.leaves[m.path].shape), m.axis, m.primitive) for m in group.members))


def allocate(
    graph: Graph,
    scores: Mapping[str, Any],
    target: Target,
    scope: str | Callable[[Group], Any] = "global",
    *,
    min_keep: int | Mapping[str, int] = 1,
    max_sparsity: float | Mapping[str, float] = 1.0,
    multiple_of: int | Mapping[str, int] = 1,
    frozen: Sequence[str] = (),
    allow_inexact: bool = False,
    per_layer: str = "equal",
    even: bool = False,
) -> Allocation:
    """Choose the units to keep.

    Args:
      graph: the traced function.
      scores: {group id: score per unit}; groups without scores stay whole. Lowest go first, ties by lowest index.
      target: what to meet.
      scope: "global", "uniform", "isomorphic", or a function from group to class key.
      min_keep: units every group keeps at least (a number, or {pattern of group ids: number}).
      max_sparsity: largest fraction removed from any group, in [0, 1] (number or by pattern).
      multiple_of: kept counts are rounded up to multiples of this (number or by pattern; 8 or 128 suit accelerators).
      frozen: patterns of group ids to leave whole.
      allow_inexact: also prune groups whose removal is not the same as zeroing them.
      per_layer: for stacked groups, "equal" keeps the same number in every layer, "free" lets layers compete.
      even: with scope "uniform": groups and layers of one size, use and limits keep the same number. Units then come
        back to all of them or to none, and the gap is below the cost of such a step instead of a single unit's.

    Raises:
      ValueError: NaN scores, options out of range, or a target that cannot be reached (with the reachable range).
      NotPrunable: an inexact group is scored without `allow_inexact`.
    """
    checked = check_scores(graph, scores)
    for pattern in frozen:
        if not fnmatch.filter(graph.groups, pattern):
            raise ValueError(f"frozen={pattern!r} matches no group{suggest(pattern, graph.groups)}")
    names = [g for g in checked if not any(fnmatch.fnmatch(g, p) for p in frozen)]
    for g in names:
        if not graph.groups[g].exact and not allow_inexact:
            raise NotPrunable(
                f"group {g!r} is inexact ({'; '.join(graph.groups[g].notes)}); "
                "leave its scores out, freeze it, or pass allow_inexact=True"
            )
    if even and scope != "uniform":
        raise ValueError(f"even=True goes with scope 'uniform', not {scope!r}")
    if per_layer not in ("equal", "free"):
        raise ValueError(f"per_layer must be 'equal' or 'free', not {per_layer!r}")
    queues = [
        _Queue(
            graph.groups[g],
            row,
            checked[g],
            per_layer,
            _option(min_keep, g, 1),
            _option(max_sparsity, g, 1.0),
            _option(multiple_of, g, 1),
        )
        for g in names
        for row in _rows(graph.groups[g], per_layer)
    ]
    classes: dict[Any, list[_Queue]] = {}
    for q in queues:
        classes.setdefault(_class_key(graph, q, scope), []).append(q)
    chains = [_chain(qs) for qs in classes.values()]
    breaks = np.unique(np.concatenate([[0.0], *(np.arange(1, len(c) + 1) / len(c) for c in chains if len(c))]))

    def counts(t: float) -> None:
        for qs, chain in zip(classes.values(), chains, strict=True):
            cut = np.bincount(chain[: int(np.floor(t * len(chain) + 1e-9))], minlength=len(qs))
            for q, n in zip(qs, cut, strict=True):
                q.removed = int(n)

    def price() -> float:
        return target.cost(graph, _widths(graph, queues))

    counts(0.0)
    dense = target.cost(graph, {})
    limit = target.limit(dense)
    counts(1.0)
    least = price()
    if least > limit:
        reachable = math.ceil(1e4 * least / dense) / 1e4  # rounded up, so that the number given can be met
        raise ValueError(
            f"the target {target} is {limit:,.6g}, but {least:,.6g} is the least these groups, limits and "
            f"multiples can reach; choose a fraction in [{reachable:.4f}, 1]"
        )
    lo, hi = 0, len(breaks) - 1
    while lo < hi:
        mid = (lo + hi) // 2
        counts(breaks[mid])
        if price() <= limit:
            hi = mid
        else:
            lo = mid + 1
    counts(breaks[lo])
    steps: dict[Any, list[_Queue]] = {}  # what gains a unit together
    for i, q in enumerate(queues):
        alike = (isomorphism_class(graph, q.group), q.group.size, q.most, q.multiple)
        steps.setdefault(alike if even else i, []).append(q)
    achieved, next_unit = _give_back(list(classes.values()), list(steps.values()), price, limit)
    keep = {g: np.ones(graph.groups[g].shape, bool) for g in checked}
    for q in queues:
        q.write(keep[q.group.id])
    widths = {g: info.size for g, info in graph.groups.items()} | _widths(graph, queues)
    return Allocation(keep, widths, target.quantity, dense, limit, achieved, limit - achieved, next_unit)


class _Queue:
    """Units of one group (or of one layer of it) in the order they would go, with the limits applied."""

    def __init__(
        self,
        group: Group,
        row: int | None,
        scores: np.ndarray,
        per_layer: str,
        min_keep: int,
        max_sparsity: float,
        multiple_of: int,
    ):
        if min_keep < 0 or multiple_of < 1 or not 0 <= max_sparsity <= 1:
            raise ValueError(
                f"group {group.id!r}: min_keep must be >= 0, multiple_of >= 1 and max_sparsity in [0, 1]; "
                f"got {min_keep}, {multiple_of}, {max_sparsity}"
            )
        self.group, self.row, self.multiple = group, row, multiple_of
        mine = scores if row is None else scores[row]
        self.order = np.argsort(mine, axis=-1, kind="stable")
        ranked_scores = np.take_along_axis(mine, self.order, axis=-1)
        # a stacked group with equal counts removes the r-th lowest unit of every layer together
        self.values = ranked_scores if ranked_scores.ndim == 1 else ranked_scores.mean(axis=0)
        floor = max(min_keep, int(np.ceil(group.size * (1 - max_sparsity) - 1e-9)), 1)
        self.most = max(group.size - floor, 0)
        self.removed = 0

    def kept(self, removed: int | None = None) -> int:
        """Units kept after rounding up to the multiple."""
        n = self.group.size - (self.removed if removed is None else removed)
        return min(self.group.size, -(-n // self.multiple) * self.multiple)

    def write(self, keep: np.ndarray) -> None:
        gone = self.group.size - self.kept()
        if self.row is not None:
            keep[self.row, self.order[:gone]] = False
        elif keep.ndim == 1:
            keep[self.order[:gone]] = False
        else:
            np.put_along_axis(keep, self.order[:, :gone], False, axis=1)


def _rows(group: Group, per_layer: str) -> list[int | None]:
    return list(range(group.layers)) if group.layers is not None and per_layer == "free" else [None]


def _class_key(graph: Graph, q: _Queue, scope: str | Callable[[Group], Any]) -> Any:
    if callable(scope):
        return scope(q.group)
    if scope == "global":
        return None
    if scope == "uniform":
        return q.group.id, q.row
    if scope == "isomorphic":
        return isomorphism_class(graph, q.group)
    raise ValueError(f"scope must be 'global', 'uniform', 'isomorphic' or a function, not {scope!r}")


def _chain(queues: list[_Queue]) -> np.ndarray:
    """Index of the queue that loses its next unit, in the order the class gives units up."""
    values = np.concatenate([q.values[: q.most] for q in queues]) if queues else np.zeros(0)
    owner = np.concatenate([np.full(q.most, i) for i, q in enumerate(queues)]) if queues else np.zeros(0, int)
    return owner[np.argsort(values, kind="stable")].astype(int)


def _widths(graph: Graph, queues: Sequence[_Queue]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for q in queues:
        if q.row is None:
            out[q.group.id] = q.kept()
        else:
            out.setdefault(q.group.id, np.full(q.group.layers or 0, q.group.size))[q.row] = q.kept()
    return out


def _give_back(
    classes: Sequence[list[_Queue]], steps: Sequence[list[_Queue]], price: Callable[[], float], limit: float
) -> tuple[float, float | None]:
    """Return units while any fits; (cost, cheapest unit that does not fit). Queues of one step gain a unit together.

    The class that lost the largest fraction comes first, so that classes stay even and never see each other's scores;
    inside it, the most important unit.
    """
    achieved = price()
    class_of = {id(q): c for c, qs in enumerate(classes) for q in qs}
    waiting = [(class_of[id(qs[0])], qs) for qs in steps if qs[0].kept() < qs[0].group.size]
    cheapest: float | None = None

    def lost(q: _Queue) -> int:  # rounding to multiples keeps some of what the queue removed
        return q.group.size - q.kept()

    def gain(qs: list[_Queue]) -> Callable[[], None]:
        before = [q.removed for q in qs]
        for q in qs:
            now = q.kept()
            while q.kept() == now:
                q.removed -= 1

        def undo() -> None:
            for q, n in zip(qs, before, strict=True):
                q.removed = n

        return undo

    while waiting:
        fraction = [sum(map(lost, qs)) / max(sum(q.most for q in qs), 1) for qs in classes]
        waiting.sort(key=lambda cq: (fraction[cq[0]], -cq[0], cq[1][0].values[lost(cq[1][0]) - 1]))
        c, qs = waiting.pop()
        undo = gain(qs)
        cost = price()
        if cost <= limit:
            achieved = cost
            if qs[0].kept() < qs[0].group.size:
                waiting.append((c, qs))
        else:
            undo()
            # the cost of a unit only grows while others come back, so this queue need not be tried again
            cheapest = cost - achieved if cheapest is None else min(cheapest, cost - achieved)
    if cheapest is not None:  # what did not fit, priced at the final widths
        prices = []
        for qs in steps:
            if qs[0].kept() < qs[0].group.size:
                undo = gain(qs)
                prices.append(price() - achieved)
                undo()
        cheapest = min(prices) if prices else None
    return achieved, cheapest


def _option(value: Any, group: str, default: Any) -> Any:
    """A per-group option: the number itself, or that of the first matching pattern."""
    if not isinstance(value, Mapping):
        return value
    return next((v for pattern, v in value.items() if fnmatch.fnmatch(group, pattern)), default)
