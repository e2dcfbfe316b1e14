"""The same decoder from one codebase's tree to another's: permutations, scales and stacking; nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune.checkpoint.layouts.layout import Layout, Site, from_logical, views
from jprune.models.llama_config import LlamaConfig


def sizes(config: LlamaConfig, layer: int | None) -> dict[str, int]:
    """Size of every role in one layer of a model (those of all layers only, for None)."""
    out = {"d": config.stream, "h": config.head_dim, "vocab": config.vocab}
    if layer is not None:
        q, kv = config.q_heads[layer], config.kv_heads[layer]
        out |= {"F": config.ffn[layer], "q_head": q, "kv_head": kv, "q_in_group": q // kv}
        out["hv"] = config.value_dims[layer]
        if config.experts is not None:
            out["E"] = config.experts.count
    return out


def shape_in(site: Site, size: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a site's array without its layer and fused axes."""
    own = [axis for axis in site.axes if axis != "layer" and not axis.startswith("fused:")]
    return tuple(math.prod(size[r] for r in axis.split(".")) for axis in own)


def canonical(name: str, x: Any, layout: Layout, head: int) -> Any:
    """A logical tensor as the Hugging Face checkpoint has it: heads in halves, queries unscaled, plain norm scales."""
    if layout.interleaved and name in _ROTATED:
        x = _permute(x, head, inverse=True)
    if layout.scaled_query and name in _QUERY:
        x = x * head**0.5
    if layout.norm_offset and name.endswith("_norm"):
        x = x + layout.norm_offset
    return x


def native(name: str, x: Any, layout: Layout, head: int) -> Any:
    """The inverse of `canonical`."""
    if layout.interleaved and name in _ROTATED:
        x = _permute(x, head, inverse=False)
    if layout.scaled_query and name in _QUERY:
        x = x * head**-0.5
    if layout.norm_offset and name.endswith("_norm"):
        x = x - layout.norm_offset
    return x


_QUERY = ("q", "q_bias", "q_lora_b")
_ROTATED = (*_QUERY, "k", "k_bias", "k_lora_b", "q_norm", "k_norm")


def _permute(x: Any, head: int, inverse: bool) -> Any:
    """Rows of every head from (half, pair) order to (pair, half) order, or back."""
    split = (-1, head // 2, 2) if inverse else (-1, 2, head // 2)
    return x.reshape(*split, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def convert(
    tree: Any, source: Layout, target: Layout, config: LlamaConfig, read: Callable[[Any], Any] = lambda x: x
) -> dict[str, Any]:
    """The same model as another codebase keeps it: nested dicts (flat ones where paths have no '/').

    Args:
      tree: in the source layout.
      source, target: layouts.
      config: its widths; `jprune.models.llama.LlamaConfig` holds them all.
      read: applied to every logical tensor before it is placed, one at a time (`numpy.asarray`: make numpy arrays).

    Raises:
      ValueError: a tensor that the target has no place for, or layers of different widths for a stacked target.
    """
    found = views(tree, source)
    out: dict[str, Any] = {}
    pieces: dict[str, dict[tuple[int, int], Any]] = {}
    stacked: dict[str, Site] = {}
    for name, layer in found:
        if name not in target.sites:
            raise ValueError(f"layout {target.name} has no place for {name!r}")
        site = _site_for(target, name, config, layer)
        x = native(name, canonical(name, read(found[name, layer]), source, config.head_dim), target, config.head_dim)
        if name.endswith(("_lora_a", "_lora_b")):
            size = {**sizes(config, layer), "r": x.shape[0] if name.endswith("_a") else x.shape[1]}
        else:
            size = sizes(config, layer)
        try:
            part = from_logical(name, site, x, shape_in(site, size))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{(name, layer)} of shape {tuple(x.shape)} is not of this config's widths") from error
        path = site.path.replace("{l}", str(layer))
        if site.layer_axis is None and site.fused is None:
            out[path] = part
        else:
            row = layer if site.layer_axis is not None and layer is not None else 0
            pieces.setdefault(path, {})[row, site.fused[1] if site.fused else 0] = part
            stacked[path] = site
    for path, parts in pieces.items():
        out[path] = _assemble(path, stacked[path], parts)
    return _nest({f"{target.prefix}/{p}" if target.prefix else p: x for p, x in out.items()})


def _site_for(layout: Layout, name: str, config: LlamaConfig, layer: int | None) -> Site:
    """The site to write to: the first that fits; query, key and value share an array only in equal numbers."""
    sites = [s for s in layout.sites[name] if not s.regex]
    if not sites:
        raise ValueError(f"layout {layout.name} finds {name!r} by a regular expression: it can be read only")
    if layer is not None and config.q_heads[layer] != config.kv_heads[layer]:
        shared = {s.path for s in layout.sites.get("q", ())} & {s.path for s in layout.sites.get("k", ())}
        sites = [s for s in sites if s.path not in shared] or sites
    return sites[0]


def _assemble(path: str, site: Site, parts: Mapping[tuple[int, int], Any]) -> Any:
    """Stack the pieces of one leaf along its fused and layer axes."""
    shapes = {tuple(x.shape) for x in parts.values()}
    rows, columns = (sorted({key[i] for key in parts}) for i in (0, 1))
    if len(shapes) > 1 or len(parts) != len(rows) * len(columns):
        raise ValueError(
            f"{path!r} stacks arrays of shapes {sorted(shapes)}: give all layers the same widths, or choose a layout "
            "that does not stack"
        )
    first = next(iter(parts.values()))
    xp = np if isinstance(first, np.ndarray) else jnp
    fused = site.fused[0] if site.fused else None
    layer = site.layer_axis
    layers = []
    for r in rows:
        if fused is None:
            layers.append(parts[r, 0])
        else:
            axis = fused - (layer is not None and layer < fused)
            layers.append(xp.stack([parts[r, c] for c in columns], axis=axis))
    return layers[0] if layer is None else xp.stack(layers, axis=layer)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, x in flat.items():
        *parents, last = path.split("/")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = x
    return out
