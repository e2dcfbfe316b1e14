"""Plans: a decision as plain JSON (leaf path, axis, kept indices), to repeat it on any copy of the weights."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from jprune.files.atomic import write_json
from jprune.files.json_files import Fields, is_integer, read_json
from jprune.surgery.compact import Indices, indices_of, take
from jprune.surgery.decision import Decision
from jprune.tracing import layout as L
from jprune.tracing.errors import KeepError
from jprune.tracing.layout import Concat, Dim, Fixed, Layout, Reordered, Unit
from jprune.tracing.paths import path_str
from jprune.version import __version__

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Kept indices per leaf axis and per group; needs no graph to be applied.

    Attributes:
      leaves: leaf path -> {"shape": traced shape, "axes": {axis: kept indices, or one list per layer (-1 = padding)},
        "layer_axis": int or None, "made_of": {axis: the groups and sizes whose product it is}}.
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
        data["members"] = _members(self.leaves)
        write_json(path, data, indent=None)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
          ValueError: the file is no plan, one of another format, or one that cuts an axis otherwise than its groups.
        """
        try:
            data = Fields(read_json(path))
            known = data.integer("format")
            if known == FORMAT:
                leaves, groups = data.fields("leaves"), data.fields("groups")
                plan = Plan(dict(leaves), dict(groups), data.text("jprune"))
                _check(plan, leaves)
                found, said = _members(plan.leaves), data.fields("members")
                for group in {**found, **said}:
                    if found.get(group) != said.get(group):
                        raise ValueError(f"group {group!r} cuts {found.get(group)}, and should cut {said.get(group)}")
                return plan
        except ValueError as e:
            raise ValueError(f"{os.fspath(path)!r} is not a pruning plan ({e}); write one with plan.save") from e
        remedy = "update jprune" if known > FORMAT else "make it again with graph.plan(keep).save"
        raise ValueError(f"{os.fspath(path)!r} has plan format {known}; this version reads {FORMAT}: {remedy}")


def _check(plan: Plan, leaves: Fields) -> None:
    """Raise ValueError unless the plan could have come from `plan_of`: every axis is cut as its groups say."""
    slots, layers = {}, {}
    for group, kept in plan.groups.items():
        rows = kept if isinstance(kept, list) and kept and isinstance(kept[0], list) else [kept]
        if not all(_increases(row) for row in rows):
            raise ValueError(f"group {group!r}: its kept indices must be whole numbers that increase from 0")
        table = np.full((len(rows), max(map(len, rows))), -1, np.int64)
        for row, of in zip(rows, table, strict=True):
            of[: len(row)] = row
        slots[group], layers[group] = (table, len(rows)) if rows is kept else (table[0], None)
    for path in leaves:
        f = leaves.fields(path)
        shape, rank = f.integers("shape", least=1), len(f["shape"])
        layer = f.integer("layer_axis", None, most=rank - 1)
        axes, made = f.fields("axes"), f.fields("made_of")
        if "layer_axis" not in f:
            raise ValueError(f"leaf {path!r} has no layer_axis")
        if set(axes) != set(made) or not set(axes) <= set(map(str, range(rank))) - {str(layer)}:
            raise ValueError(f"leaf {path!r} of shape {list(shape)} is cut along the axes {sorted(axes)}")
        layouts: list[Layout] = [()] * rank
        for axis in axes:
            where = f"leaf {path!r} axis {axis}"
            layouts[int(axis)] = made_of = _layout(made[axis], where)
            if L.full_size(made_of) != shape[int(axis)]:
                raise ValueError(f"{where} has size {shape[int(axis)]}, and what it is made of {L.full_size(made_of)}")
            for unit in _units(made_of):
                if unit.group not in slots:
                    raise ValueError(f"{where} is made of group {unit.group!r}, of which the plan says nothing")
                n = layers[unit.group]
                if slots[unit.group].max(initial=-1) >= unit.size or n not in (
                    None,
                    None if layer is None else shape[layer],
                ):
                    raise ValueError(
                        f"{where}: group {unit.group!r} does not have the kept indices or the layers for it"
                    )
        wanted = _axes(indices_of(tuple(layouts), slots, layer), layer)
        for axis in axes:
            if axes[axis] != wanted.get(axis) or not _whole(axes[axis]):
                raise ValueError(f"leaf {path!r} axis {axis} is cut in another way than its groups say")


def _members(leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """{group: "leaf:axis" of all that it cuts}."""
    out: dict[str, list[str]] = {}
    for path, entry in leaves.items():
        for axis, made in entry["made_of"].items():
            for group in dict.fromkeys(unit.group for unit in _units(_layout(made, path))):
                out.setdefault(group, []).append(f"{path}:{axis}")
    return out


def _increases(row: Any) -> bool:
    return isinstance(row, list) and all(map(is_integer, row)) and all(a < b for a, b in itertools.pairwise(row))


def _whole(rows: list[Any]) -> bool:
    """Whether all entries are whole numbers, which `true` and 1.0 equal."""
    return all(_whole(x) if isinstance(x, list) else is_integer(x, -1) for x in rows)


def _units(layout: Layout) -> Iterator[Unit]:
    for d in layout:
        if isinstance(d, Unit):
            yield d
        elif isinstance(d, Concat):
            for part in d.parts:
                yield from _units(part)
        elif isinstance(d, Reordered):
            yield from _units(d.inner)


def _to_json(layout: Layout, cut: Container[str]) -> list[Any]:
    """An axis's dims, major to minor: [group that is cut, size], a size that stays, {"concat": [axis, ...]}, or
    {"order": positions, "of": axis}."""
    return [
        {"concat": [_to_json(part, cut) for part in d.parts]} if isinstance(d, Concat)
        else {"order": list(d.index), "of": _to_json(d.inner, cut)} if isinstance(d, Reordered)
        else [d.group, d.size] if isinstance(d, Unit) and d.group in cut else d.size
        for d in layout
    ]  # fmt: skip


def _layout(data: Any, where: str) -> Layout:
    """The inverse of `_to_json`."""
    out: list[Dim] = []
    for d in data if isinstance(data, list) else [None]:
        if isinstance(d, int) and is_integer(d, 1):
            out.append(Fixed(d))
        elif isinstance(d, list) and len(d) == 2 and isinstance(d[0], str) and is_integer(d[1], 1):
            out.append(Unit(*d))
        elif isinstance(d, dict) and set(d) == {"concat"} and isinstance(d["concat"], list) and d["concat"]:
            parts = tuple(_layout(part, where) for part in d["concat"])
            out.append(Concat(parts, sum(map(L.full_size, parts))))
        elif isinstance(d, dict) and set(d) == {"order", "of"} and isinstance(d["order"], list):
            inner = _layout(d["of"], where)
            if not _whole(d["order"]) or sorted(d["order"]) != list(range(L.full_size(inner))):
                raise ValueError(f"{where}: made_of has an order that does not name each of its positions once")
            out.append(Reordered(inner, tuple(d["order"])))
        else:
            raise ValueError(
                f"{where}: made_of has {d!r}, which is no group with its size, no size, no concat and no order"
            )
    return tuple(out)


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


def _axes(indices: Indices, layer_axis: int | None) -> dict[str, list[Any]]:
    """{axis: kept indices, or one list per layer, -1 where a layer has fewer} of a leaf."""
    axes = {}
    for axis, (index, valid) in indices.items():
        index = np.where(valid, index, -1)
        if index.ndim > 1:
            assert layer_axis is not None
            index = np.moveaxis(index, (layer_axis, axis), (0, 1))
            index = index.reshape(index.shape[:2])  # sizes 1 elsewhere
        axes[str(axis)] = index.tolist()
    return axes


def plan_of(decision: Decision) -> Plan:
    """The plan of a checked decision."""
    leaves = {}
    for leaf in decision.graph.leaves.values():
        indices = indices_of(leaf.layouts, decision.slots, leaf.layer_axis)
        if not indices:
            continue
        leaves[leaf.path] = {
            "shape": list(leaf.shape),
            "axes": _axes(indices, leaf.layer_axis),
            "layer_axis": leaf.layer_axis,
            "made_of": {str(axis): _to_json(leaf.layouts[axis], decision.keep) for axis in indices},
        }
    groups = {
        g: np.flatnonzero(k).tolist() if k.ndim == 1 else [np.flatnonzero(r).tolist() for r in k]
        for g, k in decision.keep.items()
    }
    return Plan(leaves, groups)
