"""What every way to a small model hands on to be measured and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.graph import Graph


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A small model beside the dense one.

    Attributes:
      graph: of the dense model, for two images; dense: its trained variables.
      model: the small model, whatever `jprune.training.as_forward` takes; small: its variables.
      widths: {group: (units before, units after)}.
      predicted: the quantity aimed at, as it was predicted for two images; the small model itself has to have it.
      metadata: what `load_pruned` needs to make the model again.
      keep: what stays of the dense model's groups, where the small one was cut out of it.
      figures: (caption, file name, draw(path)) beside widths and timeline.
      more: further entries of summary.json.
    """

    graph: Graph
    dense: Any
    model: Any
    small: Any
    widths: dict[str, tuple[int, int]]
    predicted: float
    metadata: dict[str, Any]
    keep: dict[str, np.ndarray] | None = None
    figures: tuple[tuple[str, str, Callable[[Path], None]], ...] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
