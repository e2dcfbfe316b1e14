"""Adapters of a decoder on disk as the PEFT library has them, with LoRAPrune's masks beside them.

A folder holds adapter_config.json and adapter_model.safetensors: `lora_A.weight` (rank, inputs) and `lora_B.weight`
(outputs, rank) of every module, scaled by alpha / rank. LoRAPrune's own checkpoints add a vector `lora_mask` per module, 0
at the outputs that are pruned. Names are those of the Hugging Face model; the layout says which leaf each one is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.checkpoint.tensors import load_safetensors, save_safetensors
from jprune.json_files import Fields, read_json, said_of
from jprune.language.blocks import blocks
from jprune.language.lora import Lora, LoraConfig, products
from jprune.models.layouts import LINEN, PEFT, Layout
from jprune.models.layouts.convert import canonical, native
from jprune.models.layouts.layout import matches, order, places
from jprune.surgery.adapt import Product
from jprune.trace import layout as L
from jprune.trace.structure import Structure
from jprune.whole_files import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"bias": ("none",), "use_rslora": (False,), "use_dora": (False,), "fan_in_fan_out": (False,),
         "modules_to_save": (None, [])}  # fmt: skip
Key = tuple[str, int]


def save_peft(
    folder: str | Path,
    graph: Structure,
    lora: Lora,
    config: LoraConfig,
    head_dim: int,
    *,
    layout: Layout = LINEN,
    masks: Mapping[str, Any] | None = None,
    base: str = "",
) -> None:
    """Write adapters, and masks where given, as a PEFT folder.

    Args:
      folder: to write into.
      graph: of the decoder, whose tree is in `layout`.
      lora: its adapters.
      config: ranks and scale.
      head_dim: of the decoder's queries and keys.
      layout: of the decoder's parameters.
      masks: {group id: 0 or 1 per unit} of heads and MLP channels.
      base: name of the model that the adapters belong to.

    Raises:
      ValueError: an adapter at a leaf that no Hugging Face model has.
    """
    folder, flat = Path(folder), {}
    ranks: dict[str, int] = {}
    for p in products(graph, list(lora)).values():
        own = np.asarray((config.ranks or {}).get(p.tap.id, config.rank))
        for name, layer, at in _places(p, layout):
            r = int(own if own.ndim == 0 else own[at])
            if r == 0:
                continue
            a, b = (np.asarray(jax.device_get(lora[p.tap.id][k]), np.float32)[at] for k in "ab")
            tensors = {f"{name}_lora_a": a[:r], f"{name}_lora_b": b[:, :r]}
            if masks is not None:
                tensors[f"{name}_lora_mask"] = _rows_of(p, masks)[at]
            for key, x in tensors.items():
                (site,) = PEFT.sites[key]
                flat[site.path.format(l=layer)] = canonical(key, x, layout, head_dim)
            ranks[_module(name, layer)] = r
    other = {m: r for m, r in ranks.items() if r != config.rank}
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({m.rsplit(".", 1)[1] for m in ranks}),
        "rank_pattern": other,
        "alpha_pattern": {m: config.scale * r for m, r in other.items()},
        "inference_mode": True,
        **{k: allowed[0] for k, allowed in PLAIN.items()},
    }
    save_safetensors(folder / WEIGHTS, flat, {"format": "pt"})
    write_json(folder / CONFIG, said)


def load_peft(
    folder: str | Path, graph: Structure, head_dim: int, *, layout: Layout = LINEN
) -> tuple[Lora, LoraConfig, dict[str, np.ndarray] | None]:
    """(adapters, their config, masks or None) of a PEFT folder for a traced decoder.

    Modules whose scale differs from alpha / r have it moved into B. Layers of a stack without an adapter have rank 0.

    Raises:
      ValueError: another kind of adapter, a tensor that the decoder has no place for, or masks that cut a unit in two or
        differ between the modules of one attention or MLP.
    """
    folder = Path(folder)
    with said_of(folder):
        return _load(folder, graph, head_dim, layout)


def _load(
    folder: Path, graph: Structure, head_dim: int, layout: Layout
) -> tuple[Lora, LoraConfig, dict[str, np.ndarray] | None]:
    said = Fields(read_json(folder / CONFIG, "give the folder of a PEFT adapter, or copy it again"))
    tensors = load_safetensors(folder / WEIGHTS)[0]
    if said.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds {said.get('peft_type')!r} adapters: only LORA ones can be read")
    for k, allowed in PLAIN.items():
        if said.get(k, allowed[0]) not in allowed:
            raise ValueError(
                f"{folder / CONFIG} says {k}={said[k]!r}: only adapters with {k}={allowed[0]!r} can be read"
            )
    rank, alpha = said.integer("r", least=1), said.number("lora_alpha", above=0)
    config = LoraConfig(rank, alpha, said.number("lora_dropout", 0.0, least=0, below=1))
    alphas = said.fields("alpha_pattern", {})
    found = {(p.name, p.layer): tensors[p.path] for p in places(tensors, PEFT).values()}
    if len(found) != len(tensors):
        known = {p.path for p in places(tensors, PEFT).values()}
        odd = sorted(set(tensors) - known) or sorted(tensors)
        raise ValueError(f"{folder / WEIGHTS} has the tensor {odd[0]!r}, which is none of a LLaMA, or is there twice")
    for (name, layer), x in found.items():
        if x.ndim != (1 if name.endswith("_mask") else 2) or 0 in x.shape or not np.isrealobj(x):
            raise ValueError(f"{folder / WEIGHTS}: {name} of layer {layer} has shape {x.shape}: another model's")
    ranks, masked = {}, {}
    lora: Lora = {}
    for p in products(graph, _linear(graph, layout)).values():
        rows: dict[int | None, tuple[Any, Any]] = {}
        for name, layer, at in _places(p, layout):
            a, b = (found.pop((f"{name}_lora_{k}", layer), None) for k in "ab")
            mask, module = found.pop((f"{name}_lora_mask", layer), None), _module(name, layer)
            if mask is not None:
                if mask.shape != (p.shape[0],):
                    raise ValueError(f"the mask of {module} has {len(mask)} entries, the matrix {p.shape[0]} rows")
                masked.setdefault(p.tap.id, {})[at] = np.asarray(mask, np.float32)
            if a is None and b is None:
                continue
            if a is None or b is None:
                raise ValueError(f"the adapter of {module} has only one of its two factors: copy the folder again")
            r = a.shape[0]
            if (b.shape[0], a.shape[1]) != p.shape or b.shape[1] != r:
                raise ValueError(
                    f"the adapter of {module} is {b.shape} x {a.shape}, the matrix {p.shape}: another model's"
                )
            own = alphas.number(module, alpha, above=0) / r
            rows[at] = a, native(f"{name}_lora_b", b, layout, head_dim) * np.float32(own / config.scale)
        if rows:
            lora[p.tap.id], ranks[p.tap.id] = _stacked(p, rows)
    if found:
        name, layer = next(iter(found))
        raise ValueError(f"{folder / WEIGHTS} has {name} of layer {layer}, which this decoder does not have")
    return lora, dataclasses.replace(config, ranks=ranks), _unit_masks(graph, masked) if masked else None


def _places(p: Product, layout: Layout) -> list[tuple[str, int, Any]]:
    """(logical name, layer, index of its factors in the stack) of every matrix that a product's leaf holds."""
    found = [(name, site, match) for name, _, site, match in matches(p.tap.leaf, layout)]
    if len(found) != 1 or found[0][1].fused is not None:
        raise ValueError(f"leaf {p.tap.leaf!r} is not one matrix of layout {layout.name}")
    name, site, match = found[0]
    permutation, rows = order(name, site)
    if any(list(part) != sorted(part) for part in (permutation[:rows], permutation[rows:])):
        raise ValueError(f"leaf {p.tap.leaf!r} keeps its rows or columns in another order than {name!r} has")
    if site.layer_axis is None:
        return [(name, int(match["l"]), ())]
    return [(name, l, l) for l in range(p.tap.layers or 0)]


def _linear(graph: Structure, layout: Layout) -> list[str]:
    """The products whose leaf is a matrix that a PEFT adapter may belong to."""
    named = {f"{name}_lora_a" for name in layout.sites} & set(PEFT.sites)
    return [t for t, tap in graph.taps.items() if tap.primitive == "dot_general"
            and any(f"{name}_lora_a" in named for name, *_ in matches(tap.leaf, layout))]  # fmt: skip


def _module(name: str, layer: int) -> str:
    (site,) = PEFT.sites[f"{name}_lora_mask"]
    return site.path.format(l=layer).removeprefix("base_model.model.").removesuffix(".lora_mask")


def _rows_of(p: Product, masks: Mapping[str, Any]) -> np.ndarray:
    """Masks as one number per row of the matrix, (layers, rows) or (rows,)."""
    made = tuple(d for layout in p.tap.out_layouts for d in layout)
    own = {g: np.asarray(jax.device_get(masks[g]), np.float32) for g in set(L.groups_in(made)) if g in masks}
    v = L.spread(made, own)
    return np.broadcast_to(v, (p.tap.layers, v.shape[-1])) if p.tap.layers is not None else v


def _stacked(p: Product, rows: Mapping[Any, tuple[Any, Any]]) -> tuple[dict[str, Any], Any]:
    """(factors, ranks) of one tap from those of its layers."""
    if p.tap.layers is None:
        ((a, b),) = rows.values()
        return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}, a.shape[0]
    most, (o, i) = max(a.shape[0] for a, _ in rows.values()), p.shape
    a, b = np.zeros((p.tap.layers, most, i), np.float32), np.zeros((p.tap.layers, o, most), np.float32)
    for l, (x, y) in rows.items():
        a[l, : x.shape[0]], b[l, :, : x.shape[0]] = x, y
    ranks = tuple(rows[l][0].shape[0] if l in rows else 0 for l in range(p.tap.layers))
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}, ranks


def _unit_masks(graph: Structure, masked: Mapping[str, Mapping[Any, np.ndarray]]) -> dict[str, np.ndarray]:
    """{group id: 0 or 1 per unit} from the row masks of the products that make each group's units."""
    out: dict[str, np.ndarray] = {}
    for g in (g for b in blocks(graph) for g in (b.ffn, b.kv) if g is not None):
        for p in products(graph, list(masked)).values():
            if not any(g in L.groups_in(layout) for layout in p.tap.out_layouts):
                continue
            whole = np.ones((*p.lead, p.shape[0]), np.float32)
            rows = whole.copy()
            for at, vector in masked[p.tap.id].items():
                rows[at] = vector
            units = np.asarray(p.units("out", jnp.asarray(rows), g) / p.units("out", jnp.asarray(whole), g))
            if not np.isin(units, (0, 1)).all():
                raise ValueError(
                    f"the mask of {p.tap.id!r} cuts through units of group {g!r}: it prunes part of a head"
                )
            if g in out and (out[g] != units).any():
                raise ValueError(f"the mask of {p.tap.id!r} removes other units of group {g!r} than its neighbours'")
            out[g] = units
    return out
