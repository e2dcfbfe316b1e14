"""Before and after, side by side: accuracy, parameters, MACs, latency, memory. Host-side."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
      accuracy: fraction of the test split; loss: mean cross-entropy.
      params, macs: parameters; MACs of one image.
      latency_ms: median milliseconds of one batch; images_per_second follows from it.
      param_bytes: bytes of all variables; peak_bytes: of arguments, results and temporaries of one batch, as the
        compiler plans them.
    """

    accuracy: float
    loss: float
    params: int
    macs: int
    latency_ms: float
    images_per_second: float
    param_bytes: int
    peak_bytes: int


def interleaved(programs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each compiled program, their rounds taking turns, so that a busy machine hits all alike."""
    seen: dict[str, list[float]] = {name: [] for name in programs}
    calls = {}
    # simulated devices share a CPU's threads: two programs in flight that exchange data may wait for each other for ever
    one_by_one = jax.default_backend() == "cpu" and jax.device_count() > 1
    for name, (fn, args) in programs.items():
        jax.block_until_ready(fn(*args))
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        calls[name] = max(1, int(0.02 / max(time.perf_counter() - start, 1e-6)))
    for _ in range(rounds):
        for name, (fn, args) in programs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                out = fn(*args)
                if one_by_one:
                    jax.block_until_ready(out)
            jax.block_until_ready(out)
            seen[name].append(1e3 * (time.perf_counter() - start) / calls[name])
    return {name: statistics.median(ms) for name, ms in seen.items()}


def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """(the compiled program, bytes it plans for arguments, results and temporaries)."""
    program = jax.jit(fn).lower(*args).compile()
    m: Any = program.memory_analysis()
    return program, int(m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes)


def row(name: str, before: float, after: float, form: str, unit: str = "") -> tuple[str, str, str, str]:
    """A row of a table before/after: both numbers in a format, and how they compare."""
    return name, f"{before:{form}}{unit}", f"{after:{form}}{unit}", f"{after / before:.2f}x"


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(int(x.nbytes) for x in jax.tree.leaves(tree))
