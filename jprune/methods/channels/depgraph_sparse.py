"""DepGraph's sparse training: shrink whole groups, the weaker a unit the harder (Fang et al. 2023, section 3.3).

    gradient of every member weight w of unit i  +=  strength * 2^(alpha * (s_max - s_i) / (s_max - s_min)) * w,
    s_i = sqrt(sum of squares of everything the unit owns)

A baseline for methods that choose channels first; its scores are `importance.magnitude(p=2)`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jprune.graph import Graph
from jprune.importance.magnitude import magnitude
from jprune.importance.reduce import WEIGHTS, counted_members
from jprune.tracing.paths import path_str


class GroupSparsityState(NamedTuple):
    """The strength, float32 scalar."""

    strength: jax.Array


def shrinkage(scores: Float[Array, "*layers units"], alpha: float = 4.0) -> Float[Array, "*layers units"]:
    """2^(alpha (s_max - s) / (s_max - s_min)): 1 for the strongest unit, 2^alpha for the weakest."""
    s = jnp.sqrt(scores)
    low, high = jnp.min(s, -1, keepdims=True), jnp.max(s, -1, keepdims=True)
    return 2.0 ** (alpha * (high - s) / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny))


@functools.lru_cache(maxsize=16)
def group_sparsity(graph: Graph, strength: float, alpha: float = 4.0) -> optax.GradientTransformation:
    """Optimiser link that adds the group shrinkage; put it before the momentum, with no weight decay beside it.

    Args:
      graph: traced on the whole variables; the parameters given to updates may be their "params" collection alone.
      strength: 1e-4 to 5e-4 in long schedules.
      alpha: 4 in the paper.

    Raises:
      ValueError: a negative strength.
    """
    if not strength >= 0:
        raise ValueError(f"the strength of the group penalty is {strength}: it must be at least 0")

    def init(params: Any) -> GroupSparsityState:
        del params
        return GroupSparsityState(jnp.asarray(strength, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("group_sparsity needs the parameters: call update(updates, state, params)")
        wrapped = any(p.startswith("params/") for p in graph.leaves) and "params" not in params
        variables = {"params": params} if wrapped else params
        scores = magnitude(graph, variables, 2, reduce="sum", normalise="none")
        factors: dict[str, Any] = {}
        for gid, s in scores.items():
            for m in counted_members(graph, graph.groups[gid], WEIGHTS):
                leaf = graph.leaves[m.path]
                each = shrinkage(s, alpha)
                entry = jnp.zeros((*s.shape[:-1], leaf.shape[m.axis])).at[..., m.positions].set(each[..., None])
                shape = [n if i in (m.axis, m.layer_axis) else 1 for i, n in enumerate(leaf.shape)]
                if m.layer_axis is not None and m.layer_axis > m.axis:
                    entry = entry.T
                factors[m.path] = factors.get(m.path, 0.0) + entry.reshape(shape)

        def one(path: Any, grad: Any, w: Any) -> Any:
            name = ("params/" if wrapped else "") + path_str(path)
            if name not in factors:
                return grad
            added = state.strength * factors[name] * w.astype(jnp.float32)
            return (grad.astype(jnp.float32) + added).astype(grad.dtype)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(init, update)
