"""metrics.jsonl: one JSON object a line, a line for each logged step and each epoch, never a step twice."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from jprune.files.json_files import Fields, parse_json


class Averages:
    """Means over the steps of an epoch; `sums` goes into checkpoints, so that a resumed epoch has the same means."""

    def __init__(self, sums: dict[str, float]) -> None:
        self.sums = dict(sums)

    def add(self, metrics: dict[str, float]) -> None:
        """Count one step."""
        for name, value in {**metrics, "steps": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The mean of every metric."""
        return {k: v / self.sums["steps"] for k, v in self.sums.items() if k != "steps"}


class MetricsLog:
    """Appends to `path`, if any; opening it at `step` drops what a killed run wrote after it, and a torn last line."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.history: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        kept = [r for r in _read(path) if r["step"] <= step] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_line(r) for r in kept))
        os.replace(temporary, path)
        self.history = [r for r in kept if r["kind"] == "epoch"]
        self._file = path.open("a")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system, which keeps it even if this process is killed."""
        if record["kind"] == "epoch":
            self.history.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()


def _line(record: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"  # JSON has no NaN


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            fields = Fields(record)
            fields.integer("step")
            fields.text("kind")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not a metrics record ({error}): remove the line") from error
        records.append(record)
    return records
