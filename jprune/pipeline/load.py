"""What a finished run left: the pruned model, ready to apply, and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jprune import checkpoint
from jprune.models import build, rebuild
from jprune.surgery.plan import Plan


def load_pruned(folder: str | Path) -> tuple[Any, Any, dict[str, Any]]:
    """(model, variables, metadata) of a run's folder.

    The model is a linen module; a network that LAPP made, whose bypasses no module of the zoo has, is a
    `jprune.training.Forward`: call its `evaluate(variables, x)`.

    Raises:
      ValueError: the folder holds no finished run, or a damaged one.
    """
    variables, metadata = checkpoint.load(Path(folder) / "checkpoint")
    if not {"model", "num_classes"} <= metadata.keys():
        raise ValueError(f"{folder} holds a checkpoint that no pruning run wrote: load it with jprune.checkpoint.load")
    if "lapp" in metadata:
        from jprune.pipeline.gradual import load

        return load(metadata), variables, metadata
    return rebuild(build(metadata["model"], metadata["num_classes"]), variables), variables, metadata


def load_plan(folder: str | Path) -> Plan:
    """The plan of a run's folder; raises ValueError if there is none: not every method removes from a dense network."""
    file = Path(folder) / "plan.json"
    if not file.is_file():
        raise ValueError(
            f"there is no {file}: the run is not finished, or its method removes nothing from a dense network"
        )
    return Plan.load(file)
