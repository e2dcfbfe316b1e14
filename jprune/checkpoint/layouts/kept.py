"""What stays of a decoder, per layer: ffn channels, query heads, key-value heads; and slicing any codebase's tree by it.

`graph.compact` cuts the groups that a trace found, where a group of query heads is the same position in every
key-value group. A `Kept` can also keep other query heads in each of them, as long as they are equally many; and it
speaks of no leaf, so that it applies to the same model in another codebase, and can be stored beside the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jprune.checkpoint.layouts.layout import Layout, Site, matches, views
from jprune.models.llama_config import LlamaConfig
from jprune.surgery.compact import take
from jprune.surgery.plan import Plan
from jprune.tracing.paths import path_str

FIELDS = {"ffn": "F", "q_heads": "q_head", "kv_heads": "kv_head"}
Rows = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Sorted kept indices per layer; None where nothing is removed.

    Attributes:
      ffn: channels of the MLP.
      q_heads: query heads; None with `kv_heads` given: all those of the kept key-value heads.
      kv_heads: key-value heads.
    """

    ffn: Rows | None = None
    q_heads: Rows | None = None
    kv_heads: Rows | None = None

    @staticmethod
    def of(config: LlamaConfig, ffn: Any = None, q_heads: Any = None, kv_heads: Any = None) -> Kept:
        """Checked against the dense model's config; each argument a sequence of indices (or bool masks) per layer.

        Raises:
          ValueError: indices out of range, an emptied layer, or query heads not equally many per key-value head.
        """
        named = {"ffn": ffn, "q_heads": q_heads, "kv_heads": kv_heads}
        rows = {}
        for name, value in named.items():
            if value is None:
                continue
            if len(value) != config.depth:
                raise ValueError(f"{name} has {len(value)} layers, the model {config.depth}")
            rows[name] = tuple(
                _indices(v, n, f"{name} of layer {i}")
                for i, (v, n) in enumerate(zip(value, getattr(config, name), strict=True))
            )
        if "kv_heads" in rows and "q_heads" not in rows:
            rows["q_heads"] = tuple(
                tuple(g * (q // kv) + j for g in kept for j in range(q // kv))
                for kept, q, kv in zip(rows["kv_heads"], config.q_heads, config.kv_heads, strict=True)
            )
        if "q_heads" in rows:
            _check_groups(config, rows["q_heads"], rows.get("kv_heads"))
        return Kept(**rows)

    def config(self, dense: LlamaConfig) -> LlamaConfig:
        """The pruned model's config."""
        widths = {n: tuple(len(r) for r in rows) for n in FIELDS if (rows := getattr(self, n)) is not None}
        return dataclasses.replace(dense, **widths)

    def to_json(self) -> dict[str, list[list[int]] | None]:
        """Plain lists."""
        return {n: None if (rows := getattr(self, n)) is None else [list(r) for r in rows] for n in FIELDS}

    @staticmethod
    def from_json(data: Mapping[str, Any], config: LlamaConfig) -> Kept:
        """The inverse of `to_json`, checked against the dense model's config."""
        return Kept.of(config, **{n: data.get(n) for n in FIELDS})


def _indices(value: Any, n: int, what: str) -> tuple[int, ...]:
    x = np.asarray(value)
    if x.dtype == np.bool_:
        if x.shape != (n,):
            raise ValueError(f"{what}: a mask of shape {x.shape} for {n} units")
        x = np.flatnonzero(x)
    x = np.sort(x.astype(np.int64)) if x.size else x.astype(np.int64)
    if not x.size or x[0] < 0 or x[-1] >= n or (np.diff(x) == 0).any():
        raise ValueError(f"{what}: keep at least one of the {n} units, each once (given: {x[:4].tolist()}, ...)")
    return tuple(x.tolist())


def _check_groups(config: LlamaConfig, q_heads: Rows, kv_heads: Rows | None) -> None:
    for i, kept in enumerate(q_heads):
        q, kv = config.q_heads[i], config.kv_heads[i]
        count = np.bincount(np.asarray(kept) // (q // kv), minlength=kv)
        groups = np.arange(kv) if kv_heads is None else np.asarray(kv_heads[i])
        if len(set(count[groups])) != 1 or count.sum() != count[groups].sum():
            raise ValueError(
                f"layer {i}: the kept query heads are {count.tolist()} per key-value head, of which {groups.tolist()} "
                "stay: keep equally many for every kept key-value head and none for the others"
            )


def kept_of_plan(plan: Plan, layout: Layout, config: LlamaConfig) -> Kept:
    """What a graph's decision (`graph.plan(keep)`) keeps of a traced tree in this layout.

    Raises:
      ValueError: the plan cuts something else too, such as the residual stream.
    """
    rows: dict[str, dict[int, list[int]]] = {name: {} for name in FIELDS}
    field_of = {role: name for name, role in FIELDS.items()}
    depth = config.depth
    for path, entry in plan.leaves.items():
        for _, _, site, match in matches(path, layout):
            for axis, index in entry["axes"].items():
                role, *inner = site.axes[int(axis)].split(".")
                if role not in field_of or "q_in_group" in site.axes:
                    raise ValueError(
                        f"the plan cuts axis {axis} of {path!r} ({site.axes[int(axis)]}): only ffn channels and heads "
                        "can be said per layer; keep the plan itself (plan.save)"
                    )
                per_layer = index if index and isinstance(index[0], list) else [index] * depth
                own = range(depth) if site.layer_axis is not None else [int(match["l"])]
                for i in own:
                    found = [p for p in per_layer[i] if p >= 0]
                    if inner:
                        size = entry["shape"][int(axis)] // getattr(config, field_of[role])[i]
                        found = sorted({p // size for p in found})
                    rows[field_of[role]][i] = found
            break
        else:
            raise ValueError(f"the plan cuts {path!r}, which layout {layout.name} does not know")
    whole = {name: [rows[name].get(i, range(getattr(config, name)[i])) for i in range(depth)] for name in FIELDS}
    return Kept.of(config, **{name: whole[name] if rows[name] else None for name in FIELDS})


def slice_kept(tree: Any, layout: Layout, kept: Kept, config: LlamaConfig, *, pad: bool = False) -> Any:
    """The tree with only the kept units: rows of q, k, v, gate, up (and biases, adapters), columns of o and down.

    Shardings, numpy arrays and `ShapeDtypeStruct`s stay what they are. Norms and embeddings are not touched. Equal to
    the dense model with the removed columns of o and down set to zero.

    Args:
      tree: the dense tree in this layout.
      layout: of the tree.
      kept: what stays.
      config: the dense model's.
      pad: fill the narrower layers of a stacked leaf with zeros up to the widest, which computes the same.

    Raises:
      ValueError: stacked layers that keep different numbers without `pad`, or a tree of other widths.
    """
    views(tree, layout)  # raises if the tree is not of this layout
    after = kept.config(config)
    if pad and len({q // kv for q, kv in zip(after.q_heads, after.kv_heads, strict=True)}) > 1:
        raise ValueError(
            "the layers keep different numbers of query heads per key-value head: zero heads at the end would shift "
            "queries to other keys; use a layout that does not stack layers"
        )
    by_role = {role: getattr(kept, name) for name, role in FIELDS.items() if getattr(kept, name) is not None}
    dense = {role: getattr(config, name) for name, role in FIELDS.items()}

    def one(path: Any, x: Any) -> Any:
        name = path_str(path)
        found = list(matches(name, layout))
        if not found:
            return x
        rows = [_leaf_rows(site, match, by_role) for _, _, site, match in found]
        if any(r != rows[0] for r in rows[1:]):
            raise ValueError(f"leaf {name!r} holds query and key-value heads together: keep the same of both")
        return _slice_leaf(name, x, found[0][2], rows[0], dense, pad)

    return jax.tree_util.tree_map_with_path(one, tree)


def _leaf_rows(site: Site, match: Any, by_role: Mapping[str, Rows]) -> dict[int, Rows]:
    """{axis: kept units, one row per layer of the leaf} of the axes to be cut."""
    out = {}
    for axis, text in enumerate(site.axes):
        role = text.split(".")[0]
        if "q_in_group" in site.axes and role in ("kv_head", "q_in_group"):
            role = "q_head" if role == "kv_head" else ""  # both axes are cut at once, at the first
        if role in by_role:
            rows = by_role[role]
            out[axis] = rows if site.layer_axis is not None else (rows[int(match["l"])],)
    return out


def _slice_leaf(
    path: str, x: Any, site: Site, rows: Mapping[int, Rows], dense: Mapping[str, Sequence[int]], pad: bool
) -> Any:
    for axis, kept in rows.items():
        widths = {len(r) for r in kept}
        if len(widths) > 1 and not pad:
            raise ValueError(
                f"the layers of {path!r} would keep {sorted(widths)} units: give all the same number, pad=True, or use "
                "a layout that does not stack layers"
            )
        role, *inner = site.axes[axis].split(".")
        merged = "q_in_group" in site.axes
        if merged and site.axes[axis + 1] != "q_in_group":
            raise ValueError(f"leaf {path!r}: axis q_in_group has to follow kv_head")
        units = dense["q_head" if merged else role][0]
        have = x.shape[axis] * (x.shape[axis + 1] if merged else 1)
        size = have // units
        if size * units != have or (not inner and size != 1):
            raise ValueError(f"axis {axis} of {path!r} has {have} entries: not those of a model with {units} {role}s")
        if merged:
            kv, group = x.shape[axis], x.shape[axis + 1]
            left = {len({q // group for q in r}) for r in kept}
            if len(left) > 1:
                raise ValueError(f"the layers of {path!r} keep {sorted(left)} key-value heads, which cannot be padded")
            x = _reshape(x, (*x.shape[:axis], kv * group, *x.shape[axis + 2 :]))
        most = max(widths)
        index = np.zeros((len(kept), most), np.int64)
        valid = np.zeros((len(kept), most), bool)
        for i, r in enumerate(kept):
            index[i, : len(r)], valid[i, : len(r)] = r, True
        index = (index[:, :, None] * size + np.arange(size)).reshape(len(kept), -1)
        valid = np.repeat(valid, size, axis=1)
        if len(kept) == 1 and site.layer_axis is None:
            x = take(x, path, {axis: (index[0], valid[0])})
        else:
            layer = site.layer_axis
            assert layer is not None
            if merged and layer > axis:
                layer -= 1
            shape = [1] * len(x.shape)
            shape[layer], shape[axis] = index.shape
            if layer > axis:
                index, valid = index.T, valid.T
            x = take(x, path, {axis: (index.reshape(shape), valid.reshape(shape))})
        if merged:
            (groups,) = left
            x = _reshape(x, (*x.shape[:axis], groups, most // groups, *x.shape[axis + 1 :]))
    return x


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)
