"""safetensors files: flat trees of named arrays, the form in which other libraries publish their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def save_safetensors(path: str | Path, tree: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write nested dicts of arrays to one file; names are the keys joined by '/', the metadata goes into its header.

    Raises ValueError for a tree that a flat file cannot hold: other containers, keys that are not plain strings.
    """
    path = Path(path)
    flat = {name: np.ascontiguousarray(leaf).reshape(np.shape(leaf)) for name, leaf in _leaves(tree, ())}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(flat, unfinished, metadata=dict(metadata) if metadata else None)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_safetensors(path: str | Path, *, separator: str = "/") -> tuple[dict[str, Any], dict[str, str]]:
    """(tree, metadata): nested dicts of numpy arrays, cut at `separator` ("." for files from PyTorch).

    Raises ValueError for a file that is missing, truncated or not in this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the path")
    try:
        with safe_open(path, framework="flax") as file:
            flat = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): download or copy it again"
        ) from error
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(separator)
        node: Any = tree
        for key in parents:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"{path}: the name {name!r} is both an array and a prefix of others: give another separator"
            )
        node[last] = leaf
    return tree, metadata


def _leaves(tree: Any, keys: tuple[str, ...]):
    where = "/".join(keys) or "the tree"
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, str) or not key or "/" in key:
                raise ValueError(f"key {key!r} of {where}: a name in a safetensors file is made of strings without '/'")
            yield from _leaves(value, (*keys, key))
    elif keys and hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield where, tree
    else:
        raise ValueError(
            f"{where} is a {type(tree).__name__}: a safetensors file holds dicts of arrays; use save instead"
        )
