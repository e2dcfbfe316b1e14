"""What every experiment writes: one JSON file with settings, machine, results per seed, means and deviations."""

from __future__ import annotations

import dataclasses
import json
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


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "std"}: sample standard deviation, 0 for one value."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def heading(program: str, config: str, seeds: Sequence[int], setting: Any) -> dict[str, Any]:
    """How a results file of several seeds begins: the command that makes it, the machine, the settings as plain data."""
    plain = json.loads(json.dumps(dataclasses.asdict(setting), default=str)) | {"model": config, "data": ""}
    command = f"python -m experiments.{program} --config {config} --seeds {' '.join(map(str, seeds))}"
    return {"command": command, "machine": machine(), "setting": plain}
