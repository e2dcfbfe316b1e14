"""A measured latency table: milliseconds of a function as a function of its group widths, from timings on this device.

Every convolution and matrix product is timed by itself on a grid of widths (contracted axes x free axes, equal shapes
once), bilinearly interpolated in between. What the whole function takes beyond that (everything element-wise) scales
with the bytes the contractions write; where fusion makes the whole faster than its parts, the parts are scaled down.
Host-side: it runs programs and reads a clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.progress import track

from jprune.files.atomic import write_json
from jprune.files.json_files import Fields, read_json
from jprune.graph import Graph
from jprune.tracing import cost
from jprune.tracing import layout as L
from jprune.tracing.evaluate import Sizes
from jprune.tracing.layout import Fixed, Layout
from jprune.tracing.structure import Contraction

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
FORMAT = 1

Clock = Callable[[Callable[..., Any], Sequence[Any]], float]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Timings of one contraction: `ms[i][j]` at contracted width ratio `contracted[i]` and free ratio `free[j]`."""

    name: str
    contracted: tuple[float, ...]
    free: tuple[float, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, contracted: Any, free: Any) -> Any:
        """Bilinear interpolation, clamped to the measured range; scalars or vectors."""
        table = np.asarray(self.ms)
        i, u = _cell(self.contracted, contracted)
        j, v = _cell(self.free, free)
        i2, j2 = np.minimum(i + 1, len(self.contracted) - 1), np.minimum(j + 1, len(self.free) - 1)
        low = (1 - v) * table[i, j] + v * table[i, j2]
        high = (1 - v) * table[i2, j] + v * table[i2, j2]
        return (1 - u) * low + u * high


def _cell(points: Sequence[float], x: Any) -> tuple[Any, Any]:
    grid = np.asarray(points)
    x = np.clip(np.asarray(x, np.float64), grid[0], grid[-1])
    i = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, max(len(grid) - 2, 0))
    step = grid[np.minimum(i + 1, len(grid) - 1)] - grid[i]
    return i, np.where(step > 0, (x - grid[i]) / np.where(step > 0, step, 1.0), 0.0)


def _grid(f: Fields) -> Grid:
    contracted, free = (f.numbers(k) for k in ("contracted", "free"))
    for points in (contracted, free):
        if not points or min(points) < 0 or any(a >= b for a, b in itertools.pairwise(points)):
            raise ValueError(f"{f.name} has widths that do not increase")
    rows = f["ms"] if isinstance(f.get("ms"), list) else []
    if len(rows) != len(contracted):
        raise ValueError(f"{f.name}.ms has {len(rows)} rows for {len(contracted)} widths")
    cells = Fields({str(i): row for i, row in enumerate(rows)}, f"{f.name}.ms")
    ms = tuple(cells.numbers(str(i), count=len(free)) for i in range(len(rows)))
    if any(x < 0 for row in ms for x in row):
        raise ValueError(f"{f.name}.ms has negative times")
    return Grid(f.text("name"), contracted, free, ms)


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Callable: widths -> milliseconds; give it to `Target.latency`.

    Attributes:
      graph: whose widths it takes.
      grids: one per contraction, in program order.
      whole: measured milliseconds of the dense function.
      scale: factor on the parts, at most 1.
      rest: milliseconds of the dense function that no contraction accounts for.
      device: on which it was measured.
    """

    graph: Graph
    grids: tuple[Grid, ...]
    whole: float
    scale: float
    rest: float
    device: str

    def __call__(self, widths: Mapping[str, Any]) -> float:
        """Milliseconds of one call at the traced input sizes."""
        parts = []
        for term, grid in zip(self.graph.contractions, self.grids, strict=True):
            ms = grid.at(*_ratios(term, widths))
            parts.append(ms * (_loops(term) / max(np.size(ms), 1)))
        total = float(cost.total_of(self.graph, {"ms": parts}, "ms")["ms"])
        now, full = (float(cost.evaluate(self.graph, w).activation_bytes) for w in (widths, {}))
        return self.scale * total + self.rest * now / full

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        data = {
            "format": FORMAT,
            "grids": [dataclasses.asdict(g) for g in self.grids],
            **{k: getattr(self, k) for k in ("whole", "scale", "rest", "device")},
        }
        write_json(path, data, indent=None)

    @staticmethod
    def load(path: str | os.PathLike[str], graph: Graph) -> LatencyTable:
        """Read a table for this graph.

        Raises:
          ValueError: no table, or one of another function.
        """
        try:
            data = Fields(read_json(path))
            found = data.integer("format")
            if found == FORMAT:
                entries = data["grids"] if isinstance(data.get("grids"), list) else [data.get("grids")]
                grids = tuple(_grid(Fields(g, f"grids[{i}]")) for i, g in enumerate(entries))
                rest: dict[str, Any] = {k: data.number(k, least=0) for k in ("whole", "scale", "rest")}
                rest["device"] = data.text("device")
        except ValueError as e:
            raise ValueError(
                f"{os.fspath(path)!r} is not a latency table ({e}): measure one with measure_latency"
            ) from e
        if found != FORMAT:
            raise ValueError(f"{os.fspath(path)!r} has latency table format {found}, not {FORMAT}: measure again")
        names = [t.name for t in graph.contractions]
        if [g.name for g in grids] != names:
            odd = next((g.name for g, n in zip(grids, names, strict=False) if g.name != n), f"{len(grids)} layers")
            raise ValueError(
                f"{os.fspath(path)!r} was measured for another function: it has {odd!r}, the graph {len(names)} layers"
            )
        return LatencyTable(graph, grids, **rest)


def clock(fn: Callable[..., Any], args: Sequence[Any], rounds: int = 5, least: float = 2e-3) -> float:
    """Median milliseconds of a compiled function over rounds of at least `least` seconds."""
    compiled = jax.jit(fn).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    calls = max(1, int(np.ceil(least / max(time.perf_counter() - start, 1e-7))))
    seen = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*args)
        jax.block_until_ready(out)
        seen.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(seen)


def measure_latency(
    graph: Graph,
    fn: Callable[..., Any],
    args: Sequence[Any],
    fractions: Sequence[float] = FRACTIONS,
    *,
    timer: Clock = clock,
    progress: bool = True,
) -> LatencyTable:
    """Time every contraction of `graph` on the default device.

    Args:
      graph: trace it at the batch size that matters: time is not linear in it.
      fn, args: the function and its arguments (arrays), timed as a whole.
      fractions: of the widths, increasing, the last 1.
      timer: (function, arguments) -> milliseconds.
      progress: show a bar.

    Raises:
      ValueError: fractions that do not increase to 1.
    """
    points = tuple(float(f) for f in fractions)
    if not points or points[-1] != 1.0 or points[0] <= 0 or any(a >= b for a, b in itertools.pairwise(points)):
        raise ValueError(f"fractions must increase from above 0 to 1, not {points}")
    seen: dict[Any, float] = {}
    terms: Iterable[Contraction] = graph.contractions
    grids = [_measure(graph, t, points, timer, seen) for t in track(list(terms), "measuring", disable=not progress)]
    whole = timer(fn, args)
    draft = LatencyTable(graph, tuple(grids), whole, 1.0, 0.0, jax.devices()[0].device_kind)
    parts = draft({})
    return dataclasses.replace(draft, scale=min(1.0, whole / parts), rest=max(0.0, whole - parts))


def _measure(graph: Graph, term: Contraction, points: tuple[float, ...], timer: Clock, seen: dict[Any, float]) -> Grid:
    summed = {g for lay in term.contracted for g in L.groups_in(lay)}
    free = {g for lay in term.factors for g in L.groups_in(lay)} - summed

    def sizes(groups: set[str], f: float) -> dict[str, int]:
        return {g: max(1, round(f * graph.groups[g].size)) for g in sorted(groups)}

    rows: dict[float, dict[float, float]] = {}
    for f in points if summed else (1.0,):
        for h in points if free else (1.0,):
            widths = {**sizes(summed, f), **sizes(free, h)}
            a, b = _ratios(term, widths)
            # one width comes out of different products, which differ in their last bits
            rows.setdefault(round(float(a), 9), {})[round(float(b), 9)] = _time(graph, term, widths, timer, seen)
    contracted = tuple(sorted(rows))
    others = tuple(sorted(rows[contracted[0]]))
    return Grid(term.name, contracted, others, tuple(tuple(rows[a][b] for b in others) for a in contracted))


def _time(graph: Graph, term: Contraction, widths: Mapping[str, int], timer: Clock, seen: dict[Any, float]) -> float:
    layouts = graph.layouts_at(term.path)
    shapes = [tuple(int(L.width(lay, widths)) for lay in axes) for axes in layouts[0]]
    args = [np.ones(s, v.aval.dtype) for s, v in zip(shapes, term.eqn.invars, strict=True)]
    rewrite = graph.rules[term.primitive].rewrite
    params = term.eqn.params
    if rewrite is not None:
        params = rewrite(term.eqn, Sizes(layouts, widths, args, term.eqn))
    key = (term.primitive, tuple(shapes), str(params))
    if key not in seen:
        seen[key] = timer(lambda *xs: term.eqn.primitive.bind(*xs, **params), jax.device_put(args))
    return seen[key]


def _is_loop(lay: Layout) -> bool:
    return (
        len(lay) == 1 and isinstance(lay[0], Fixed) and bool(lay[0].symbol) and str(lay[0].symbol).startswith("@scan")
    )


def _loops(term: Contraction) -> int:
    return int(np.prod([L.full_size(lay) for lay in term.factors if _is_loop(lay)], dtype=np.int64))


def _ratios(term: Contraction, widths: Mapping[str, Any]) -> tuple[Any, Any]:
    """Widths of the contracted and of the free axes relative to full; vectors where widths are per layer."""
    full = {k: v for k, v in widths.items() if not k.startswith("@")}
    whole = _relative([lay for lay in term.factors if not _is_loop(lay)], full)
    summed = _relative(term.contracted, full)
    return summed, whole / summed


def _relative(layouts: Sequence[Layout], widths: Mapping[str, Any]) -> Any:
    """Product of widths over product of full sizes."""
    out: Any = 1.0
    for lay in layouts:
        out = out * (np.asarray(L.width(lay, widths), np.float64) / L.full_size(lay))
    return out
