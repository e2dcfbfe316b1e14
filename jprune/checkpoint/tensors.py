"""safetensors files: flat trees of named arrays, the form in which other libraries publish their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jprune.files.atomic import writing
from jprune.files.json_files import parse_json

LONGEST = 10**8  # bytes of a header, by the format's definition


def save_safetensors(path: str | Path, tree: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write nested dicts of arrays to one file; names are the keys joined by '/', the metadata goes into its header.

    Raises ValueError for a tree that a flat file cannot hold: other containers, keys that are not plain strings.
    """
    path = Path(path)
    flat = {name: np.ascontiguousarray(leaf).reshape(np.shape(leaf)) for name, leaf in _leaves(tree, ())}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            save_file(flat, unfinished, metadata=dict(metadata) if metadata else None)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class Entry(NamedTuple):
    """A tensor of a file: the format's name of its dtype, its shape, and its bytes [first, last) in the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def read_header(path: str | Path) -> dict[str, Entry]:
    """{name: entry} of a safetensors file, whose tensors fill it without gaps, overlaps or bytes left over.

    The package safetensors checks the header; a name that is there twice, of which it takes the last, is refused first.

    Raises:
      ValueError: a file that is missing, truncated, damaged or not in this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the path")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(path.stat().st_size - 8, LONGEST):
                raise ValueError(f"its header of {length} bytes ends after it, or is too long")
            header = parse_json(file.read(length))
        with safe_open(
            path, framework="numpy"
        ):  # it raises unless dtypes, shapes and offsets fit each other and the file
            pass
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): download or copy it again"
        ) from error
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: Entry(x["dtype"], tuple(x["shape"]), *(start + offset for offset in x["data_offsets"]))
        for name, x in header.items()
    }


def load_safetensors(path: str | Path, *, separator: str = "/") -> tuple[dict[str, Any], dict[str, str]]:
    """(tree, metadata): nested dicts of numpy arrays, cut at `separator` ("." for files from PyTorch).

    Raises ValueError for a file that is missing, truncated or not in this format.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="flax") as file:
            flat = {name: np.asarray(file.get_tensor(name)) for name in header}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:  # the last three: a dtype jax does not have
        kinds = ", ".join(sorted({entry.dtype for entry in header.values()}))
        raise ValueError(f"{path} cannot be read ({error}); its dtypes are {kinds}: convert it to floats") from error
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
