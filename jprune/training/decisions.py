"""The decision of an interrupted run on disk: which units stay and what is said of it, and that nobody changed it since.

keep.npz      a boolean array per group
notes.json    the groups' names, what else was decided, and a digest of all of it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.files.atomic import whole_folder, write_json
from jprune.files.json_files import Fields, read_json, said_of
from jprune.files.npz import read_npz
from jprune.graph import Graph

ARRAYS, NOTES = "keep.npz", "notes.json"


@dataclasses.dataclass(frozen=True)
class Decided:
    """Which units stay, before anything is cut.

    Attributes:
      keep: {group id: bool per unit}.
      notes: what is said of it in summary.json.
      ranks: of low-rank training of what is left, one per layer.
      warnings: what a user would not expect of it.
    """

    keep: Mapping[str, np.ndarray]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ranks: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()


def remembered(folder: Path | None, graph: Graph, make: Callable[[], Decided]) -> Decided:
    """The decision that an interrupted run left in `folder`, else the one that `make` makes now, which is saved there.

    Raises:
      ValueError: what lies there is damaged, was changed, or decides on another model.
    """
    if folder is None:
        return make()
    found = load_decision(folder, {name: group.shape for name, group in graph.groups.items()})
    if found is None:
        found = make()
        save_decision(folder, found)
    return found


def save_decision(folder: Path, decided: Decided) -> None:
    """Write a decision, whole or not at all."""
    d = decided
    said = json.loads(
        json.dumps({"groups": list(d.keep), "notes": dict(d.notes), "ranks": d.ranks, "warnings": list(d.warnings)})
    )
    arrays = {str(k): np.asarray(v, bool) for k, v in enumerate(d.keep.values())}
    with whole_folder(folder, overwrite=True) as unfinished:
        np.savez(unfinished / ARRAYS, allow_pickle=False, **arrays)
        write_json(unfinished / NOTES, {**said, "digest": _digest(said, arrays)})


def load_decision(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Decided | None:
    """A decision as it was saved; None if none was.

    Args:
      folder: that `save_decision` wrote.
      shapes: {group id: shape of its keep vector} of the traced model.

    Raises:
      ValueError: a damaged or changed file, or the decision of another model.
    """
    if not folder.exists():
        return None
    remedy = f"remove {folder} to decide again"
    said, arrays = read_json(folder / NOTES, remedy), read_npz(folder / ARRAYS)
    with said_of(folder / NOTES):
        f = Fields({k: v for k, v in said.items() if k != "digest"})
        groups, ranks, warnings = f.texts("groups"), f.integers("ranks", None), f.texts("warnings")
        notes = dict(f.fields("notes"))
    if said.get("digest") != _digest(dict(f), arrays):
        raise ValueError(f"{folder} is damaged, or was changed since the run wrote it: {remedy}")
    keep = {g: arrays[str(k)] for k, g in enumerate(groups) if str(k) in arrays}
    for group in groups:
        if group not in keep or shapes.get(group) != keep[group].shape or keep[group].dtype != bool:
            raise ValueError(f"{folder} decides on group {group!r} of another model: {remedy}")
    return Decided(keep, notes, ranks, warnings)


def _digest(said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    out = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        x = arrays[name]
        out.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return out.hexdigest()
