"""Resizing: the shapes of every leaf at any widths of the groups, larger ones too, for models that start anew."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jprune.surgery.compact import check_shapes
from jprune.surgery.decision import Decision, check_names
from jprune.tracing import layout as L
from jprune.tracing.errors import KeepError
from jprune.tracing.paths import path_str

if TYPE_CHECKING:
    from jprune.graph import Graph


def resize(graph: Graph, shapes: Any, widths: Mapping[str, Any]) -> Any:
    """The tree as `ShapeDtypeStruct`s whose groups have these widths; nothing says which units stay, so no values.

    Args:
      graph: the traced function.
      shapes: the traced tree, as arrays or `ShapeDtypeStruct`s; its dtypes are taken over.
      widths: {group id: units}, smaller or larger than traced; absent groups stay as they are. All layers of a group
        that lives in a scan get the same width. Inexact groups are allowed: there are no values to be inexact about.

    Raises:
      KeepError: an unknown group, a width that is no integer above 0, or one width per layer.
      NotPrunable: a frozen axis in place of a group.
    """
    check_names(graph, widths)
    whole = {g: _checked(g, w) for g, w in widths.items()}
    check_shapes(Decision(graph, {}), shapes)

    def one(path: Any, x: Any) -> Any:
        leaf = graph.leaves[path_str(path)]
        return jax.ShapeDtypeStruct(tuple(int(L.width(axis, whole)) for axis in leaf.layouts), x.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _checked(group: str, width: Any) -> int:
    if np.ndim(width):
        raise KeepError(
            f"widths[{group!r}] has one width per layer; stacked layers are one array, so give the width of all"
        )
    if isinstance(width, bool | np.bool_) or not hasattr(width, "__index__"):
        raise KeepError(f"widths[{group!r}] is {width!r}; a width is a whole number of units")
    if operator.index(width) < 1:
        raise KeepError(f"widths[{group!r}] is {width}; a group has at least one unit")
    return operator.index(width)
