"""Benchmarks against peers, and the one way all of them take times: in turns, so that a busy machine slows every side."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

# OpenMP threads that wait by spinning make torch ten times slower as soon as anything else runs on the machine. Read when
# torch is imported, so set before; processes started from here inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RESULTS = Path(__file__).parents[1] / "results"
DISTURBED = "times are medians over rounds that take turns; the machine was shared, so read ratios rather than seconds"


def in_turns(
    jobs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every job in every round: {name: [seconds]}, after `warm_up` rounds that do not count.

    Every round runs all jobs once, every other round in reverse order. jax arrays that a job returns are waited for. With
    `time.process_time` as the clock they are seconds of this process on all processors, without those of other work.
    """
    out: dict[str, list[float]] = {name: [] for name in jobs}
    for k in range(warm_up + rounds):
        for name in list(jobs) if k % 2 == 0 else reversed(list(jobs)):
            began = clock()
            jax.block_until_ready(jobs[name]())
            if k >= warm_up:
                out[name].append(clock() - began)
    return out


def ratio(times: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over rounds of one job's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of every job."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}
