"""Where a codebase keeps a decoder's tensors, and the same logical matrices read from and written to any of them.

Every program that holds LLaMA-like weights names and shapes them its own way: transposed, heads split off or not,
layers stacked on some axis, gate and up fused. A `Layout` says so as data, one `Site` per logical tensor: a path and
what every axis is. The logical tensor itself is always the matrix (outputs, inputs) of the Hugging Face checkpoint, so
that code written once on logical matrices works on all trees. Only permutations, reshapes and slices happen here.

Roles of axes: d (stream), F (ffn channels), q_head, kv_head, q_in_group (a query head within its key-value head), h
(channels of a query or key head), hv (of a value head), vocab, r (rank of a low-rank factor), layer, and fused:i
(position i of an axis that lays several logical tensors side by side). "q_head.h" is one axis that merges the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.models.llama import LlamaConfig
from jprune.trace.leafpaths import flatten, path_str

MATRICES = {
    "q": (("q_head", "h"), ("d",)),
    "k": (("kv_head", "h"), ("d",)),
    "v": (("kv_head", "hv"), ("d",)),
    "o": (("d",), ("q_head", "hv")),
    "gate": (("F",), ("d",)),
    "up": (("F",), ("d",)),
    "down": (("d",), ("F",)),
}
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # logical name: roles of the rows, of the columns
    **MATRICES,
    **{f"{name}_bias": (rows, ()) for name, (rows, _) in MATRICES.items()},
    **{f"{name}_lora_a": (("r",), columns) for name, (_, columns) in MATRICES.items()},
    **{f"{name}_lora_b": (rows, ("r",)) for name, (rows, _) in MATRICES.items()},
    "q_norm": (("h",), ()),
    "k_norm": (("h",), ()),
    "input_norm": (("d",), ()),
    "post_norm": (("d",), ()),
    "embed": (("vocab",), ("d",)),
    "final_norm": (("d",), ()),
    "lm_head": (("vocab",), ("d",)),
}
GLOBAL = ("embed", "final_norm", "lm_head")  # once per model; everything else once per layer
WRAPPERS = r"(?:/(?:value|array|raw_value|0))?"  # what nnx variables and named arrays add to the path of their array


@dataclasses.dataclass(frozen=True)
class Site:
    """Where one logical tensor is kept.

    Attributes:
      path: '/'-joined keys with "{l}" for the layer's number, or (with `regex`) a regular expression with a group `l`.
      axes: the role of every axis.
      regex: how `path` is to be read.
    """

    path: str
    axes: tuple[str, ...]
    regex: bool = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """What a leaf's path has to match."""
        text = self.path if self.regex else re.escape(self.path).replace(r"\{l\}", r"(?P<l>\d+)")
        return re.compile(f"(?:params/)?{text}{WRAPPERS}")

    @property
    def layer_axis(self) -> int | None:
        """The axis over stacked layers."""
        return self.axes.index("layer") if "layer" in self.axes else None

    @property
    def fused(self) -> tuple[int, int] | None:
        """(axis, position) in an axis of several logical tensors."""
        return next(((i, int(a[6:])) for i, a in enumerate(self.axes) if a.startswith("fused:")), None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one codebase keeps a decoder.

    Attributes:
      name: of the codebase.
      sites: logical name -> where it may be kept; the first site that a tree has counts.
      prefix: keys in front of all paths when a tree is made ("params"); trees are read with and without it.
      interleaved: rotary positions turn neighbouring channels (2j, 2j + 1) instead of (j, j + half): the rows of q and
        k are permuted within every head.
      scaled_query: the query weights contain the attention's 1 / sqrt(head size).
      norm_offset: what is added to a norm's stored scale.
    """

    name: str
    sites: Mapping[str, tuple[Site, ...]]
    prefix: str = ""
    interleaved: bool = False
    scaled_query: bool = False
    norm_offset: float = 0.0

    def __post_init__(self):
        for name, sites in self.sites.items():
            if name not in ROLES:
                raise ValueError(f"layout {self.name}: {name!r} is no logical tensor; there are {', '.join(ROLES)}")
            for site in sites:
                order(name, site)  # raises if the axes do not fit


@functools.cache
def order(name: str, site: Site) -> tuple[tuple[int, ...], int]:
    """(permutation of a site's own axes to logical order, how many of them are rows).

    Raises:
      ValueError: the axes are not those of this logical tensor.
    """
    rows, columns = ROLES[name]
    own = [axis.split(".") for axis in site.axes if axis != "layer" and not axis.startswith("fused:")]
    grouped = any("q_in_group" in axis for axis in own)

    def expand(roles: tuple[str, ...]) -> list[str]:
        return [r for role in roles for r in (("kv_head", "q_in_group") if role == "q_head" and grouped else (role,))]

    wanted = expand(rows) + expand(columns)
    given = [r for axis in own for r in axis]
    if sorted(wanted) != sorted(given):
        raise ValueError(f"site {site.path!r} of {name!r} has axes {site.axes}; it needs the roles {wanted}")
    permutation = tuple(sorted(range(len(own)), key=lambda i: wanted.index(own[i][0])))
    if [r for i in permutation for r in own[i]] != wanted:
        raise ValueError(
            f"site {site.path!r} of {name!r}: axis {site.axes} merges roles in another order than {wanted}"
        )
    return permutation, sum(own[i][0] in expand(rows) for i in permutation)


def to_logical(name: str, site: Site, x: Any) -> Any:
    """The (outputs, inputs) matrix, or vector, of an array without its layer and fused axes."""
    permutation, rows = order(name, site)
    x = x.transpose(permutation)
    shape = (math.prod(x.shape[:rows]), math.prod(x.shape[rows:]))
    return x.reshape(shape if ROLES[name][1] else shape[:1])


def from_logical(name: str, site: Site, x: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `to_logical`; `shape` is that of the array without its layer and fused axes."""
    permutation, _ = order(name, site)
    return x.reshape([shape[i] for i in permutation]).transpose(np.argsort(permutation))


@dataclasses.dataclass(frozen=True)
class Place:
    """One logical tensor of one tree.

    Attributes:
      name, layer: which (layer None for the tensors of the whole model).
      path: of the leaf.
      site: how it is kept there.
      row: its index on a layer axis, if the leaf has one.
    """

    name: str
    layer: int | None
    path: str
    site: Site
    row: int | None

    def index(self, rank: int) -> tuple[Any, ...]:
        """Where in the leaf it lies."""
        at: list[Any] = [slice(None)] * rank
        if self.row is not None:
            at[self.site.axes.index("layer")] = self.row
        if self.site.fused is not None:
            at[self.site.fused[0]] = self.site.fused[1]
        return tuple(at)


def places(tree: Any, layout: Layout) -> dict[tuple[str, int | None], Place]:
    """Every logical tensor of a tree, by (name, layer).

    Raises:
      ValueError: none is found, or a leaf has another number of axes than the layout says.
    """
    out: dict[tuple[str, int | None], Place] = {}
    rank: dict[tuple[str, int | None], int] = {}
    for path, x in flatten(tree):
        for name, k, site, match in matches(path, layout):
            if len(x.shape) != len(site.axes):
                raise ValueError(
                    f"leaf {path!r} has {len(x.shape)} axes, layout {layout.name} says {site.axes}: another layout?"
                )
            axis = site.layer_axis
            if name in GLOBAL:
                found = [(None, None)]
            elif axis is not None:
                found = [(i, i) for i in range(x.shape[axis])]
            else:
                found = [(int(match["l"]), None)]
            for layer, row in found:
                if rank.get((name, layer), k + 1) > k:
                    rank[name, layer] = k
                    out[name, layer] = Place(name, layer, path, site, row)
    if not out:
        raise ValueError(
            f"no leaf of this tree is one of layout {layout.name}: it has {[p for p, _ in flatten(tree)][:3]}"
        )
    return out


def matches(path: str, layout: Layout) -> Iterator[tuple[str, int, Site, re.Match[str]]]:
    """(logical name, number of the site, site, match) of every logical tensor that the leaf at this path holds."""
    for name, sites in layout.sites.items():
        for k, site in enumerate(sites):
            match = site.pattern.fullmatch(path)
            if match:
                yield name, k, site, match


class Views(Mapping[tuple[str, int | None], Any]):
    """The logical tensors of a tree, read on demand: `views(tree, layout)["gate", 3]` is (F, d)."""

    def __init__(self, tree: Any, layout: Layout):
        self.places = places(tree, layout)
        self._leaves = dict(flatten(tree))

    def __getitem__(self, key: tuple[str, int | None]) -> Any:
        place = self.places[key]
        x = self._leaves[place.path]
        return to_logical(place.name, place.site, x[place.index(len(x.shape))])

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return 1 + max((layer for _, layer in self.places if layer is not None), default=-1)


def views(tree: Any, layout: Layout) -> Views:
    """The logical tensors of a tree by (name, layer); layer is None for embed, final_norm and lm_head. jit-able."""
    return Views(tree, layout)


def view(tree: Any, layout: Layout, name: str, layer: int | None = None) -> Any:
    """One logical tensor: (outputs, inputs), or a vector; as it is kept, `interleaved` and `scaled_query` included."""
    return Views(tree, layout)[name, layer]


def update(tree: Any, layout: Layout, new: Mapping[tuple[str, int | None], Any]) -> Any:
    """The tree with these logical tensors replaced by others of the same shapes; jit-able.

    Raises:
      ValueError: the tree has no such tensor, or its shape is another.
    """
    found = places(tree, layout)
    by_path: dict[str, list[tuple[Place, Any]]] = {}
    for key, value in new.items():
        if key not in found:
            raise ValueError(f"this {layout.name} tree has no {key}")
        by_path.setdefault(found[key].path, []).append((found[key], value))

    def one(path: Any, x: Any) -> Any:
        for place, value in by_path.get(path_str(path), ()):
            at = place.index(len(x.shape))
            shape = tuple(n for n, i in zip(x.shape, at, strict=True) if isinstance(i, slice))
            if math.prod(value.shape) != math.prod(shape):
                raise ValueError(f"{(place.name, place.layer)} is kept as {shape}; {tuple(value.shape)} does not fit")
            part = from_logical(place.name, place.site, value, shape).astype(x.dtype)
            if isinstance(x, np.ndarray) and isinstance(part, np.ndarray):
                x = x.copy()
                x[at] = part
            else:
                x = jnp.asarray(x).at[at].set(part)
        return x

    return jax.tree_util.tree_map_with_path(one, tree)


# -- from one codebase to another ------------------------------------------------------------------------------------


def sizes(config: LlamaConfig, layer: int | None) -> dict[str, int]:
    """Size of every role in one layer of a model (those of all layers only, for None)."""
    out = {"d": config.stream, "h": config.head_dim, "vocab": config.vocab}
    if layer is not None:
        q, kv = config.q_heads[layer], config.kv_heads[layer]
        out |= {"F": config.ffn[layer], "q_head": q, "kv_head": kv, "q_in_group": q // kv}
        out["hv"] = config.value_dims[layer]
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
