"""PreCropping, step 2: from the densities of weights to the widths of groups, and to a budget (ours).

A weight asks a share of its density of every width it lies between (`ratios`); one common factor and then single
channels meet the budget (`fit`). Which widths may change stands in `width_variables`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jprune.budget.target import Target
from jprune.graph import Graph
from jprune.importance.density import Densities
from jprune.methods.channels.precrop.free_widths import Block, WidthVariables, width_variables
from jprune.tracing import cost


@dataclasses.dataclass(frozen=True)
class WidthRule:
    """How densities become widths (`ratios`) and widths fit a budget (`fit`).

    Attributes:
      rule: "sqrt": a weight asks an equal share of its density of each side; "lsq": least squares, for comparison.
      stage_width: "keep" changes widths inside blocks only, "scale" changes every width; None: "keep" where the
        network has sums or concatenations, else "scale".
      tied: inside a block one ratio for all widths (a bottleneck's two stay equal).
      cap: largest ratio of a new to the original width; above 1 layers may grow.
      min_width, round_to: of every width; the original width is allowed whatever it divides by.
      count_bn: a budget on parameters counts all of them; False: only the weights that have a density.
    """

    rule: Literal["sqrt", "lsq"] = "sqrt"
    stage_width: Literal["keep", "scale"] | None = None
    tied: bool = True
    cap: float = 1.0
    min_width: int = 1
    round_to: int = 1
    count_bn: bool = True

    def __post_init__(self) -> None:
        if self.rule not in ("sqrt", "lsq") or self.stage_width not in ("keep", "scale", None):
            raise ValueError(f"rule is 'sqrt' or 'lsq' and stage_width 'keep', 'scale' or None; got {self}")
        if not 1 <= self.cap < np.inf or self.min_width < 1 or self.round_to < 1:
            raise ValueError(f"cap, min_width and round_to are at least 1; got {self}")


SQRT = WidthRule()  # the default


@dataclasses.dataclass(frozen=True)
class Cropped:
    """Widths and how they came about.

    Attributes:
      widths: {group: units} of every group that was free to change, for `graph.resize`.
      graph: the traced evaluation function.
      densities: {leaf path: d}. ratios: {group: new over original width} before the budget.
      asked, achieved: per budget quantity.
    """

    widths: dict[str, int]
    graph: Graph
    densities: Densities
    ratios: dict[str, float]
    asked: dict[str, float]
    achieved: dict[str, float]


def widths(graph: Graph, densities: Densities, budget: Target | Sequence[Target], rule: WidthRule = SQRT) -> Cropped:
    """Step 2: {group: units} from {leaf path: d}; raises ValueError for a budget out of reach."""
    budgets = (budget,) if isinstance(budget, Target) else tuple(budget)
    return fit(graph, ratios(graph, densities, rule), budgets, rule, densities)


def ratios(graph: Graph, densities: Densities, rule: WidthRule = SQRT) -> dict[str, float]:
    """{group: new over original width}, real-valued, before any budget; ours.

    A weight of density d between k groups that may change asks d^(1/k) of each; a group gets the geometric mean of what
    its weights ask ("sqrt"). A depthwise convolution asks nothing, a concatenated input asks the same of every piece,
    a squeeze-excite bottleneck takes the mean of its two densities. With stage_width "scale" that is all.

    With "keep", only groups inside blocks change (`width_variables`), each block by itself: these ratios, or one and
    the same where `tied`, are multiplied by the factor at which the block holds sum(d n) weights:

        basic block, MobileNetV2 and ShuffleNetV2 units   one width, all weights linear in it: sum(d n) / sum(n)
        bottleneck, tied                                  rho (n1 + n3) + rho^2 n2 = sum(d n)
        bottleneck, not tied                              r1 = sqrt(d1 sqrt(d2)), r2 = sqrt(d3 sqrt(d2)), rescaled
        ResNeXt                                           the same: in-group width changes, cardinality does not

    Least squares ("lsq") solves sum(log rho) = log d with a ridge of 0.1 towards "sqrt"; in a chain it zig-zags.

    Raises:
      ValueError: no group may change, or densities of leaves that are no weights.
    """
    free = width_variables(graph, rule.stage_width)
    for p in densities:
        if p not in free.factors:
            raise ValueError(f"{p!r} is no kernel or matrix of the function; densities are {{path: d}} of those")
    out: dict[str, float] = {}
    for block in free.blocks:
        log_rho = _asked(block, free, densities, rule)
        if free.keeps_stages:
            if rule.tied:
                log_rho = dict.fromkeys(log_rho, 0.0)
            log_rho = _matched(graph, block, log_rho, densities, rule)
        out.update({g: float(np.exp(min(r, np.log(rule.cap)))) for g, r in log_rho.items()})
    for g, paths in free.pooled.items():
        own = [densities[p] for p in paths if p in densities]
        out[g] = float(np.clip(np.mean(own), 1 / graph.groups[g].size, rule.cap)) if own else 1.0
    return out


def _asked(block: Block, free: WidthVariables, densities: Densities, rule: WidthRule) -> dict[str, float]:
    """log rho of a block's groups by the rule alone."""
    asks: dict[str, list[float]] = {g: [] for g in block.groups}
    rows, right = [], []
    for p in block.weights:
        if p not in densities or p in free.depthwise:
            continue
        sides = free.factors[p]
        log_d = float(np.log(max(densities[p], 1 / free.counts[p])))
        for side in sides:
            for g in side:
                asks[g].append(log_d / len(sides))
        rows.append({g: sum(1 / len(s) for s in sides if g in s) for s in sides for g in s})
        right.append(log_d)
    found = {g: float(np.mean(a)) for g, a in asks.items() if a}
    rest = float(np.mean(list(found.values()))) if found else 0.0
    log_rho = {g: found.get(g, rest) for g in asks}
    if rule.rule == "lsq" and rows:
        start = np.array(list(log_rho.values()))
        matrix = np.array([[row.get(g, 0.0) for g in log_rho] for row in rows])
        ridge = np.sqrt(0.1)
        left = np.concatenate([matrix, ridge * np.eye(len(start))])
        solved = np.linalg.lstsq(left, np.concatenate([right, ridge * start]), rcond=None)[0]
        log_rho = dict(zip(log_rho, map(float, solved), strict=True))
    return log_rho


def _matched(
    graph: Graph, block: Block, log_rho: dict[str, float], densities: Densities, rule: WidthRule
) -> dict[str, float]:
    """The log ratios plus one offset (and below the cap), so that the block has sum(d n) weights."""
    paths = [p for p in block.weights if p in densities]
    target = sum(densities[p] * np.prod(graph.leaves[p].shape) for p in paths)

    def at(offset: float) -> dict[str, float]:
        return {g: min(r + offset, float(np.log(rule.cap))) for g, r in log_rho.items()}

    def too_many(offset: float) -> bool:
        real = {g: graph.groups[g].size * np.exp(r) for g, r in at(offset).items()}
        return cost.entries(graph, real, paths) > target * (1 + 1e-12)

    return at(_largest(lambda o: not too_many(o), -50.0, 50.0)) if paths else log_rho


def _largest(holds: Any, low: float, high: float) -> float:
    """The largest number in [low, high] at which a falling condition holds; `low` if it never does."""
    if holds(high):
        return high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclasses.dataclass(frozen=True)
class Meter:
    """One budget: what it counts at given widths, and its limit."""

    name: str
    count: Any
    limit: float


def meters_of(graph: Graph, budgets: Sequence[Target], rule: WidthRule, weights: Sequence[str]) -> list[Meter]:
    """The budgets as numbers; `weights` are those counted without `count_bn`."""
    if not budgets:
        raise ValueError("give at least one budget, such as Target.params(0.2)")

    def count(b: Target, widths: Mapping[str, Any]) -> Any:
        if b.quantity == "params" and not rule.count_bn:
            return cost.entries(graph, widths, weights)
        return b.cost(graph, widths)

    return [Meter(b.quantity, functools.partial(count, b), b.limit(count(b, {}))) for b in budgets]


def fit(
    graph: Graph, rho: Mapping[str, float], budgets: Sequence[Target], rule: WidthRule, densities: Densities
) -> Cropped:
    """Integer widths near C rho exp(o), with the largest common offset o that fits, then channel by channel (ours).

    While one more step of some width fits, it goes to the width that lies furthest below its real value.

    Raises:
      ValueError: the budget is below what the smallest widths cost; says what is reachable.
    """
    free, sizes = width_variables(graph, rule.stage_width), {g: i.size for g, i in graph.groups.items()}
    meters = meters_of(graph, budgets, rule, tuple(densities))
    bundles = free.bundles(rule.tied)
    top = np.array([max(sizes[b[0]], int(rule.cap * sizes[b[0]] + 1e-9)) for b in bundles])
    low = np.minimum(rule.min_width, top)
    wish = np.array([np.mean([rho[g] for g in b]) * sizes[b[0]] for b in bundles])

    def named(w: Any) -> dict[str, int]:
        return {g: int(n) for b, n in zip(bundles, w, strict=True) for g in b}

    def fits(w: Any) -> bool:
        return all(m.count(named(w)) <= m.limit for m in meters)

    def ideal(offset: float) -> np.ndarray:
        return np.clip(wish * np.exp(offset), low, top)

    def rounded(offset: float) -> np.ndarray:
        steps = np.floor(ideal(offset) / rule.round_to + 0.5).astype(int) * rule.round_to
        return np.clip(steps, low, top)

    if not fits(rounded(-60.0)):
        least = {m.name: m.count(named(rounded(-60.0))) for m in meters}
        said = ", ".join(f"{m.limit:,.0f} {m.name} are asked for and {least[m.name]:,} is the least" for m in meters)
        raise ValueError(
            f"the budget is out of reach: {said} with stage_width={free.mode!r}; ask for more"
            + (", or let the widths between blocks change with stage_width='scale'" if free.keeps_stages else "")
        )
    offset = _largest(lambda o: fits(rounded(o)), -60.0, 60.0)
    w, real = rounded(offset), ideal(offset)
    open_ = set(range(len(bundles)))
    while open_ := {i for i in open_ if w[i] < top[i]}:
        i = max(open_, key=lambda i: (real[i] - w[i], -i))
        more = w.copy()
        more[i] = min((w[i] // rule.round_to + 1) * rule.round_to, top[i])
        if fits(more):
            w = more
        else:
            open_.discard(i)  # costs only rise, so it will not fit later either
    chosen = named(w)
    return Cropped(chosen, graph, dict(densities), dict(rho), {m.name: m.limit for m in meters},
                   {m.name: m.count(chosen) for m in meters})  # fmt: skip
