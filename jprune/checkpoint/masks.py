"""Masks of single weights in a safetensors file: a bit per weight, with the shape beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoint.tensors import load_safetensors, save_safetensors
from jprune.surgery.patterns import Masks, pack, unpack
from jprune.tracing.paths import flatten


def save_masks(file: str | Path, masks: Masks) -> None:
    """Write {leaf path: mask}."""
    tree: dict[str, Any] = {}
    for path, entry in pack(masks).items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = entry
    save_safetensors(file, tree, {"format": "jprune-masks-1"})


def load_masks(file: str | Path, params: Any = None) -> dict[str, np.ndarray]:
    """{leaf path: mask} of a file that `save_masks` wrote.

    Args:
      file: to read.
      params: the weights that they are for; with them, masks of other leaves and shapes are refused.

    Raises:
      ValueError: a damaged file, another one, or masks of other weights.
    """
    tree, metadata = load_safetensors(file)
    if metadata.get("format") != "jprune-masks-1":
        raise ValueError(f"{file} holds no masks of jprune: give the masks.safetensors of a run")
    found: dict[str, dict[str, Any]] = {}
    for name, x in flatten(tree):
        path, _, field = name.rpartition("/")
        found.setdefault(path, {})[field] = x
    leaves: Mapping[str, Any] | None = None if params is None else dict(flatten(params))
    return unpack(found, leaves)
