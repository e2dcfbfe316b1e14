"""Adapters of a decoder on disk as the PEFT library has them, with LoRAPrune's masks beside them.

A folder holds adapter_config.json and adapter_model.safetensors: `lora_A.weight` (rank, inputs) and `lora_B.weight`
(outputs, rank) of every module, scaled by alpha / rank (rank-stabilised: by its root), where the configuration may name
other alphas for some modules. LoRAPrune's own checkpoints add a vector `lora_mask` per module, 0
at the outputs that are pruned. Names are those of the Hugging Face model; the layout says which leaf each one is.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.checkpoint.layouts import LINEN, PEFT, Layout
from jprune.checkpoint.layouts.convert import canonical, native
from jprune.checkpoint.layouts.layout import matches, order, places
from jprune.checkpoint.tensors import load_safetensors, save_safetensors
from jprune.files.atomic import write_json
from jprune.files.json_files import Fields, read_json, said_of
from jprune.graph import Graph
from jprune.language.blocks import blocks
from jprune.language.lora import Lora, LoraConfig, own_scales, products
from jprune.surgery.products import Product
from jprune.tracing import layout as L

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,),
         "modules_to_save": (None, []), "layer_replication": (None, [])}  # fmt: skip
Key = tuple[str, int]


def save_peft(
    folder: str | Path,
    graph: Graph,
    lora: Lora,
    head_dim: int,
    *,
    dropout: float = 0.0,
    layout: Layout = LINEN,
    masks: Mapping[str, Any] | None = None,
    base: str = "",
) -> None:
    """Write adapters, and masks where given, as a PEFT folder.

    Args:
      folder: to write into.
      graph: of the decoder, whose tree is in `layout`.
      lora: its adapters; what is zero in A and B at the end of a padded rank is left out.
      head_dim: of the decoder's queries and keys.
      dropout: what the configuration says of their training.
      layout: of the decoder's parameters.
      masks: {group id: 0 or 1 per unit} of heads and MLP channels.
      base: name of the model that the adapters belong to.

    Raises:
      ValueError: an adapter at a leaf that no Hugging Face model has.
    """
    folder, flat = Path(folder), {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for p in products(graph, list(own_scales(lora))).values():
        whole = [np.asarray(jax.device_get(lora[p.tap.id][k]), np.float32) for k in "ab"]
        scale = np.asarray(lora.scales[p.tap.id], np.float64)
        for name, layer, at in _places(p, layout):
            a, b = (x[at] for x in whole)
            used = np.flatnonzero(a.any(axis=1) | b.any(axis=0))
            if not len(used):
                continue
            r = int(used[-1]) + 1
            tensors = {f"{name}_lora_a": a[:r], f"{name}_lora_b": b[:, :r]}
            if masks is not None:
                tensors[f"{name}_lora_mask"] = _rows_of(p, masks)[at]
            for key, x in tensors.items():
                (site,) = PEFT.sites[key]
                flat[site.path.format(l=layer)] = canonical(key, x, layout, head_dim)
            module = _module(name, layer)
            ranks[module], alphas[module] = r, float(scale[at] if scale.ndim else scale) * r
    rank, alpha = (_most(list(of.values())) for of in (ranks, alphas))
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": False,
        "target_modules": sorted({m.rsplit(".", 1)[1] for m in ranks}),
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "inference_mode": True,
        **{k: allowed[0] for k, allowed in PLAIN.items()},
    }
    save_safetensors(folder / WEIGHTS, flat, {"format": "pt"})
    write_json(folder / CONFIG, said)


def load_peft(
    folder: str | Path, graph: Graph, head_dim: int, *, layout: Layout = LINEN
) -> tuple[Lora, LoraConfig, dict[str, np.ndarray] | None]:
    """(adapters with their scales, their config, masks or None) of a PEFT folder for a traced decoder.

    The config says how more such adapters would be made; what counts for these are their own scales. Layers of a stack
    without an adapter have rank 0.

    Raises:
      ValueError: another kind of adapter, an alpha that is no number, a tensor that the decoder has no place for, or masks
        that cut a unit in two or differ between the modules of one attention or MLP.
    """
    folder = Path(folder)
    with said_of(folder):
        return _load(folder, graph, head_dim, layout)


def _load(
    folder: Path, graph: Graph, head_dim: int, layout: Layout
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
    rank = said.integer("r", least=1)
    config = LoraConfig(rank, rank * _scale(said, "", rank), said.number("lora_dropout", 0.0, least=0, below=1))
    found = {(p.name, p.layer): tensors[p.path] for p in places(tensors, PEFT).values()}
    if len(found) != len(tensors):
        known = {p.path for p in places(tensors, PEFT).values()}
        odd = sorted(set(tensors) - known) or sorted(tensors)
        raise ValueError(f"{folder / WEIGHTS} has the tensor {odd[0]!r}, which is none of a LLaMA, or is there twice")
    for (name, layer), x in found.items():
        if x.ndim != (1 if name.endswith("_mask") else 2) or 0 in x.shape or not np.isrealobj(x):
            raise ValueError(f"{folder / WEIGHTS}: {name} of layer {layer} has shape {x.shape}: another model's")
    factors: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    masked: dict[str, Any] = {}
    for p in products(graph, _linear(graph, layout)).values():
        rows: dict[Any, tuple[Any, Any]] = {}
        own: dict[Any, float] = {}
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
            own[at] = _scale(said, module, r)
            rows[at] = a, native(f"{name}_lora_b", b, layout, head_dim)
        if rows:
            factors[p.tap.id], ranks[p.tap.id] = _stacked(p, rows)
            same = len(set(own.values())) == 1
            scales[p.tap.id] = (
                next(iter(own.values())) if same else tuple(own.get(l, 1.0) for l in range(p.tap.layers or 0))
            )
    if found:
        name, layer = next(iter(found))
        raise ValueError(f"{folder / WEIGHTS} has {name} of layer {layer}, which this decoder does not have")
    return (
        Lora(factors, scales),
        dataclasses.replace(config, ranks=ranks),
        _unit_masks(graph, masked) if masked else None,
    )


def _most(values: list[Any]) -> Any:
    """The value that occurs most, the smallest of several such; 1 of none."""
    return min(collections.Counter(values).items(), key=lambda kv: (-kv[1], kv[0]))[0] if values else 1


def _scale(said: Fields, module: str, rank: int) -> float:
    """s of a module: its alpha over its rank or, rank-stabilised, over the root of it; patterns are matched as PEFT does."""
    alpha, alphas = said.number("lora_alpha", above=0), said.fields("alpha_pattern", {})
    for pattern in alphas:
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise ValueError(f"alpha_pattern has {pattern!r}, which is no regular expression") from error
        if found:
            alpha = alphas.number(pattern, above=0)
            break
    return alpha / (math.sqrt(rank) if said.flag("use_rslora", False) else rank)


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


def _linear(graph: Graph, layout: Layout) -> list[str]:
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


def _unit_masks(graph: Graph, masked: Mapping[str, Mapping[Any, np.ndarray]]) -> dict[str, np.ndarray]:
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
