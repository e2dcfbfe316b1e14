"""Leaf paths: one string per leaf of a pytree ("params/conv1/kernel"), the same in plans, errors and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def path_str(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as '/'-joined plain keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "."


def flatten(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) pairs in jax's flattening order."""
    return [(path_str(p), x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with the leaves at these paths replaced."""
    return jax.tree_util.tree_map_with_path(lambda p, x: leaves.get(path_str(p), x), tree)
