"""Where a codebase keeps a decoder's tensors, and the same logical matrices read from and written to any of them.

Every program that holds LLaMA-like weights names and shapes them its own way: transposed, heads split off or not,
layers stacked on some axis, gate and up fused. A `Layout` says so as data, one `Site` per logical tensor: a path and
what every axis is. The logical tensor itself is always the matrix (outputs, inputs) of the Hugging Face checkpoint, so
that code written once on logical matrices works on all trees. Only permutations, reshapes and slices happen here.

Roles of axes: d (stream), F (ffn channels), q_head, kv_head, q_in_group (a query head within its key-value head), h
(channels of a query or key head), E (experts), hv (of a value head), vocab, r (rank of a low-rank factor), layer, and fused:i
(position i of an axis that lays several logical tensors side by side). "q_head.h" is one axis that merges the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.tracing.paths import flatten, path_str

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
    **{f"{name}_lora_mask": (rows, ()) for name, (rows, _) in MATRICES.items()},  # 0 at rows that are pruned
    "q_norm": (("h",), ()),
    "k_norm": (("h",), ()),
    "router": (("E",), ("d",)),
    "expert_gate": (("E", "F"), ("d",)),
    "expert_up": (("E", "F"), ("d",)),
    "expert_down": (("d",), ("E", "F")),
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
