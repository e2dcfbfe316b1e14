"""Masking: the same shapes with zeros (or soft gates) at the units to remove; jit-able, differentiable in the gates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.surgery.decision import Keep, check_names, touched
from jprune.tracing import layout as L
from jprune.tracing.errors import KeepError
from jprune.tracing.paths import path_str
from jprune.tracing.structure import Leaf

if TYPE_CHECKING:
    from jprune.graph import Graph


def leaf_mask(leaf: Leaf, keep: Keep, dtype: Any) -> Any:
    """Product of the keep vectors over a leaf's axes, broadcastable against it; None where nothing applies.

    A decision that lies in numpy makes a mask in numpy, without a compilation per shape.
    """
    mask = None
    xp = np if all(isinstance(v, np.ndarray) for v in keep.values()) else jnp
    for axis, lay in enumerate(leaf.layouts):
        if not touched(lay, keep):
            continue
        vectors = {g: xp.asarray(keep[g]).astype(dtype) for g in set(L.groups_in(lay)) if g in keep}
        v = L.spread(lay, vectors, xp, xp.ones((1,), dtype))
        shape = [1] * len(leaf.shape)
        shape[axis] = v.shape[-1]
        if v.ndim == 2:
            assert leaf.layer_axis is not None
            shape[leaf.layer_axis] = v.shape[0]
            if leaf.layer_axis > axis:
                v = v.T
        v = v.reshape(shape)
        mask = v if mask is None else mask * v
    return mask


def _masked(leaf: Leaf, x: Any, keep: Keep) -> Any:
    """One leaf that `keep` touches, in its dtype."""
    x = jnp.asarray(x)
    own = {g for layout in leaf.layouts for g in L.groups_in(layout) if g in keep}
    if all((v if hasattr(v, "dtype") else np.asarray(v)).dtype == np.bool_ for v in (keep[g] for g in own)):
        return jnp.where(leaf_mask(leaf, keep, jnp.bool_), x, jnp.zeros((), x.dtype))
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        gates = leaf_mask(leaf, keep, jnp.float32)
        if x.dtype == jnp.bool_:
            return x & (gates != 0)
        scaled = jnp.round(x.astype(jnp.float32) * gates).astype(x.dtype)
        return jnp.where(gates == 1, x, scaled)  # float32 does not hold every integer
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.dtype(jnp.float32)
    return gated(x.astype(wide), leaf_mask(leaf, keep, wide)).astype(x.dtype)


def gated(x: Any, gates: Any) -> Any:
    """x times gates of its dtype, where a gate of 0 also removes NaN and infinity; differentiable in both."""
    # Only what is not finite is replaced: for the rest a gate of 0 still has its gradient x.
    gone = (gates == 0) & ~jnp.isfinite(x)
    return jnp.where(gone, jnp.zeros((), x.dtype), x) * gates


def mask(graph: Graph, params: Any, keep: Keep) -> Any:
    """Multiply every member slice by its unit's keep value (bool, 0/1, or a soft gate in [0, 1]); shapes and dtypes
    unchanged.

    The gates may be traced: changing a decision costs no recompilation and gradients flow to soft gates. Groups absent
    from `keep` are untouched; inexact groups are allowed, because a mask is a statement about weights, not about sizes.
    What a gate of 0 or False removes is zero even where it was NaN or infinite, and what a gate of 1 or True keeps is the
    same to the bit, in every dtype. Products of soft gates and integers are rounded.

    Raises:
      KeepError: unknown group, or a keep set or leaf of the wrong shape.
    """
    check_names(graph, keep)
    for g, v in keep.items():
        group = graph.groups[g]
        if np.shape(v) not in (group.shape, (group.size,)):
            raise KeepError(f"keep[{g!r}] has shape {np.shape(v)}; group {g!r} wants {group.shape}")

    def one(path: Any, x: Any) -> Any:
        leaf = graph.leaves.get(path_str(path))
        if leaf is None:
            raise KeepError(f"leaf {path_str(path)!r} was not among the traced parameters")
        if np.shape(x) != leaf.shape:  # it could broadcast
            raise KeepError(f"leaf {leaf.path!r} has shape {np.shape(x)}, but {leaf.shape} was traced")
        if not any(touched(lay, keep) for lay in leaf.layouts):  # also random keys, which have no numeric type
            return x
        return _masked(leaf, x, keep)

    return jax.tree_util.tree_map_with_path(one, params)
