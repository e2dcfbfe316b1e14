"""What a finished run left: the pruned model, ready to apply, and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jprune import checkpoint
from jprune.files.json_files import Fields, said_of
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
    with said_of(Path(folder) / "checkpoint" / "metadata.json"):
        return _rebuilt(folder, variables, metadata)


def _rebuilt(folder: str | Path, variables: Any, metadata: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    if not {"model", "num_classes"} <= metadata.keys():
        raise ValueError(f"{folder} holds a checkpoint that no pruning run wrote: load it with jprune.checkpoint.load")
    if "lapp" in metadata:
        from jprune.methods.channels.lapp.method import load

        return load(metadata), variables, metadata
    f = Fields(metadata)
    return rebuild(build(f.text("model"), f.integer("num_classes", least=1)), variables), variables, metadata


def load_plan(folder: str | Path) -> Plan:
    """The plan of a run's folder; raises ValueError if there is none: not every method removes from a dense network."""
    file = Path(folder) / "plan.json"
    if not file.is_file():
        raise ValueError(
            f"there is no {file}: the run is not finished, or its method removes nothing from a dense network"
        )
    return Plan.load(file)
