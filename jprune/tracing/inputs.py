"""The inputs a function was traced with, and which of their sizes may be others when it is evaluated again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jprune.tracing.errors import TraceError
from jprune.tracing.layout import Fixed, Layout
from jprune.tracing.paths import path_str
from jprune.tracing.structure import Layouts
from jprune.tracing.walk import Val


class Inputs:
    """The traced inputs.

    Args:
      values: (path, value) of each.
      layout: of a tag.
      differs: (shapes of all inputs, sizes by symbol) -> what the function does otherwise at these than the trace says.

    Attributes:
      values, paths, shapes: of each input, as traced.
      symbols: per input and axis, the name under which its size may change; None: it may not.
    """

    def __init__(
        self,
        values: Sequence[tuple[str, Val]],
        layout: Layouts,
        differs: Callable[[Sequence[tuple[int, ...]], Mapping[str, int]], str | None],
    ):
        self.values = tuple(v for _, v in values)
        self.paths = [path for path, _ in values]
        self.shapes = [v.shape for v in self.values]
        self.symbols = [[_symbol(layout(t)) for t in v.tags] for v in self.values]
        self._dtypes = [jax.dtypes.result_type(jax.ShapeDtypeStruct((), v.dtype)) for v in self.values]
        self._differs = differs
        self._differences: dict[tuple[tuple[str, int], ...], str | None] = {}

    def bind(self, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, int]]:
        """Flattened inputs and the sizes of their free dimensions; TraceError where they do not fit the trace."""
        flat = jax.tree_util.tree_flatten_with_path(tuple(inputs))[0]
        symbols: dict[str, int] = {}
        if len(flat) != len(self.paths):
            raise TraceError(f"{len(flat)} input arrays given, {len(self.paths)} were traced")
        given = [path_str(p) for p, _ in flat]
        if given != self.paths:
            odd = next(p for p, q in zip(given, self.paths, strict=True) if p != q)
            raise TraceError(f"input {odd} was not traced: the inputs traced with are {', '.join(self.paths)}")
        for path, dtype, (_, x) in zip(self.paths, self._dtypes, flat, strict=True):
            now = jax.dtypes.result_type(x)
            if now != dtype and not all(jax.numpy.issubdtype(t, np.inexact) for t in (now, dtype)):
                raise TraceError(
                    f"input {path} is {now}, but {dtype} was traced: a cast that did nothing then is not in the trace; "
                    "cast it, or trace again with this type"
                )
        for path, dims, traced, (_, x) in zip(self.paths, self.symbols, self.shapes, flat, strict=True):
            if len(np.shape(x)) != len(traced):
                raise TraceError(f"input {path} has {len(np.shape(x))} axes, {len(traced)} were traced")
            for axis, (symbol, n, m) in enumerate(zip(dims, traced, np.shape(x), strict=True)):
                if symbol is None and n != m:
                    raise TraceError(
                        f"axis {axis} of input {path} has size {m}, but {n} was traced and the function "
                        "depends on it; trace again with the new size"
                    )
                if symbol is not None and symbols.setdefault(symbol, m) != m:
                    raise TraceError(f"axis {axis} of input {path} has size {m}; another input has {symbols[symbol]}")
        changed = self.difference_at(symbols)
        if changed is not None:
            sizes = ", ".join(f"axis {a} of input {p}: {n} instead of {m}" for p, a, n, m in self._changes(symbols))
            raise TraceError(
                f"the function was traced at other input sizes ({sizes}) and is another function at these: {changed}; "
                "trace again with the new sizes"
            )
        return [x if hasattr(x, "dtype") else jax.numpy.asarray(x) for _, x in flat], symbols

    def difference_at(self, symbols: Mapping[str, int]) -> str | None:
        """What the function does otherwise at these sizes of its inputs than the trace says; None: nothing.

        Python code can make a number of a size (a mean written by hand), which the trace then holds. The function is
        traced once more at each new set of sizes; of an empty batch there is nothing that could be wrong.
        """
        if not any(self._changes(symbols)) or 0 in symbols.values():
            return None
        key = tuple(sorted(symbols.items()))
        if key not in self._differences:
            shapes = [
                tuple(symbols.get(s, n) if s else n for s, n in zip(dims, shape, strict=True))
                for dims, shape in zip(self.symbols, self.shapes, strict=True)
            ]
            self._differences[key] = self._differs(shapes, symbols)
        return self._differences[key]

    def _changes(self, symbols: Mapping[str, int]) -> Iterator[tuple[str, int, int, int]]:
        for path, dims, shape in zip(self.paths, self.symbols, self.shapes, strict=True):
            for axis, (symbol, n) in enumerate(zip(dims, shape, strict=True)):
                if symbol is not None and symbols.get(symbol, n) != n:
                    yield path, axis, symbols[symbol], n

    def free_dimensions(self) -> list[tuple[str, int]]:
        """Input axes, as (input path, axis), at whose other sizes the function is the traced one; tried with twice it."""
        free = []
        tried: dict[str, bool] = {}
        for path, dims, shape in zip(self.paths, self.symbols, self.shapes, strict=True):
            for axis, (symbol, n) in enumerate(zip(dims, shape, strict=True)):
                if symbol is None:
                    continue
                if symbol not in tried:
                    try:
                        tried[symbol] = self.difference_at({symbol: 2 * n}) is None
                    except Exception:  # whatever the function raises, it does not take this size
                        tried[symbol] = False
                if tried[symbol]:
                    free.append((path, axis))
        return free


def _symbol(layout: Layout) -> str | None:
    return layout[0].symbol if len(layout) == 1 and isinstance(layout[0], Fixed) else None
