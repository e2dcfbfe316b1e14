"""What results files say: the machine, settings as plain data, means and deviations over seeds."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jprune
from jprune.files.atomic import write_json


def machine() -> dict[str, Any]:
    """What ran this: device, versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"{_cpu()}, {os.cpu_count()} cores",
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jprune": jprune.__version__,
    }


def _cpu() -> str:
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("Model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.machine()


def write(path: Path, record: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def plain(value: Any) -> Any:
    """A setting as plain data; functions are left out, and of a path only its name is told."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(x) for name, x in fields.items() if not callable(x)}
    if isinstance(value, tuple | list):
        return [plain(x) for x in value]
    if isinstance(value, Mapping):
        return {str(k): plain(x) for k, x in value.items()}
    return value.name if isinstance(value, Path) else value


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "std"}: sample standard deviation, 0 for one value."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def over_seeds(parts: Sequence[Any]) -> Any:
    """Mean and deviation of every number, in the same places; a list of dicts holds repetitions, which are pooled.

    Other lists and texts are not summed up: they are left out.
    """
    first = parts[0]
    if isinstance(first, list) and first and isinstance(first[0], dict):
        return over_seeds([x for part in parts for x in part])
    if isinstance(first, dict):
        found = {k: over_seeds([p[k] for p in parts]) for k in first}
        return {k: x for k, x in found.items() if x not in (None, {})}
    if isinstance(first, bool) or not isinstance(first, int | float):
        return None
    return mean_and_spread(parts)
