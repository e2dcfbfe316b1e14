"""Plans: a decision as plain JSON (leaf path, axis, kept indices), to repeat it on any copy of the weights."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np

from jprune.surgery.compact import indices_of, take
from jprune.surgery.decision import Decision
from jprune.trace.errors import KeepError
from jprune.trace.leafpaths import path_str
from jprune.version import __version__
from jprune.whole_files import write_json

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Kept indices per leaf axis and per group; needs no graph to be applied.

    Attributes:
      leaves: leaf path -> {"shape": traced shape, "axes": {axis: kept indices, or one list per layer (-1 = padding)},
        "layer_axis": int or None}.
      groups: group id -> kept unit indices (one list per layer for stacked groups).
      version: of the jprune that made it.
    """

    leaves: dict[str, dict[str, Any]]
    groups: dict[str, list[Any]]
    version: str = __version__

    def widths(self) -> dict[str, int | list[int]]:
        """Units kept per group (per layer for stacked groups)."""
        return {g: [len(r) for r in k] if k and isinstance(k[0], list) else len(k) for g, k in self.groups.items()}

    def apply(self, params: Any) -> Any:
        """Slice a tree with the traced paths and shapes.

        Raises:
          KeepError: a planned leaf is missing or has another shape.
        """
        import jax

        seen = set()

        def one(path: Any, x: Any) -> Any:
            name = path_str(path)
            entry = self.leaves.get(name)
            if entry is None:
                return x
            seen.add(name)
            if list(x.shape) != list(entry["shape"]):
                raise KeepError(
                    f"leaf {name!r} has shape {tuple(x.shape)}, but the plan was made for {tuple(entry['shape'])}"
                )
            return take(x, name, _planned(entry))

        out = jax.tree_util.tree_map_with_path(one, params)
        missing = sorted(set(self.leaves) - seen)
        if missing:
            raise KeepError(f"the plan slices leaf {missing[0]!r}, which these parameters lack")
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        data = {"format": FORMAT, "jprune": self.version, "groups": self.groups, "leaves": self.leaves}
        write_json(path, data, indent=None)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
          ValueError: the file is no plan, or one of a newer format.
        """
        try:
            with open(path) as f:
                data = json.load(f)
            known = data["format"]
            plan = Plan(data["leaves"], data["groups"], data["jprune"]) if known == FORMAT else None
            if plan is not None:
                _check(plan)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{os.fspath(path)!r} is not a pruning plan ({e!r}); write one with plan.save") from e
        if plan is None:
            raise ValueError(f"{os.fspath(path)!r} has plan format {known}; this version reads {FORMAT}: update jprune")
        return plan


def _check(plan: Plan) -> None:
    """Raise (ValueError, LookupError, TypeError or AttributeError) unless the plan could have come from `plan_of`."""
    plan.widths()
    for path, entry in plan.leaves.items():
        shape, layer = entry["shape"], entry["layer_axis"]
        for axis, rows in entry["axes"].items():
            index, size = np.asarray(rows), shape[int(axis)]
            if index.size and index.dtype.kind != "i":
                raise ValueError(f"leaf {path!r} axis {axis}: indices are not integers")
            per_layer = index.ndim == 2
            if index.ndim != 1 and not (per_layer and layer != int(axis) and len(index) == shape[layer]):
                raise ValueError(f"leaf {path!r} axis {axis}: indices of shape {index.shape} do not fit {shape}")
            for row in index if per_layer else index[None]:
                kept = row[row >= 0] if per_layer else row  # layers are padded with -1
                if (row < -1).any() or (kept < 0).any() or (kept >= size).any() or (np.diff(kept) <= 0).any():
                    raise ValueError(f"leaf {path!r} axis {axis}: indices must increase within 0..{size - 1}")


def _planned(entry: dict[str, Any]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    out = {}
    rank, layer = len(entry["shape"]), entry["layer_axis"]
    for axis, rows in entry["axes"].items():
        index = np.asarray(rows, np.int64)
        if index.ndim == 2:
            shape = [1] * rank
            shape[layer], shape[int(axis)] = index.shape
            index = (index if layer < int(axis) else index.T).reshape(shape)
        out[int(axis)] = (np.maximum(index, 0), index >= 0)
    return out


def plan_of(decision: Decision) -> Plan:
    """The plan of a checked decision."""
    leaves = {}
    for leaf in decision.structure.leaves.values():
        indices = indices_of(leaf.layouts, decision.slots, leaf.layer_axis)
        if not indices:
            continue
        axes = {}
        for axis, (index, valid) in indices.items():
            index = np.where(valid, index, -1)
            if index.ndim > 1:
                assert leaf.layer_axis is not None
                index = np.moveaxis(index, (leaf.layer_axis, axis), (0, 1)).reshape(
                    len(index.ravel()) // index.shape[axis], -1
                )
            axes[str(axis)] = index.tolist()
        leaves[leaf.path] = {"shape": list(leaf.shape), "axes": axes, "layer_axis": leaf.layer_axis}
    groups = {
        g: np.flatnonzero(k).tolist() if k.ndim == 1 else [np.flatnonzero(r).tolist() for r in k]
        for g, k in decision.keep.items()
    }
    return Plan(leaves, groups)
