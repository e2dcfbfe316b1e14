"""FFN channels of a decoder: their scores from activations and weights, the best of each layer, what goes with the rest.

Shared by the methods that prune the channels of MLPs. Weights are found through the roles of a group's members: "in" is
the last product, which consumes the channels, "out" are the products that make them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jprune import importance
from jprune.graph import Graph
from jprune.importance.reduce import counted_members, leaf_values, traced_leaf, unit_matrices
from jprune.language.blocks import Block, blocks, layers
from jprune.language.statistics import BlockStats
from jprune.surgery.decision import Keep
from jprune.tracing import cost

FINE = ("official", "eq8", "relative3", "wanda", "magnitude", "random")


def channel_scores(
    graph: Graph,
    params: Any,
    stats: BlockStats | None,
    found: Sequence[Block] | None = None,
    kind: str = "official",
    *,
    b: float = 1.0,
    c: float = 1.0,
    key: jax.Array | None = None,
) -> dict[str, Float[np.ndarray, "*layers units"]]:
    """Scores of all FFN channels, {group: (F,) or (layers, F)}; comparable within a block only.

    With X_i the root of the sum of squares of channel i, Wd the last product, W every product (three where gated):

        official    mean_k [ sum over W of U_ki / sum_k U_ki ] X_i^c,  U = |Wd| X^b and |Wu|, |Wg|   = (3 / d) X_i^c
        eq8         sum_k |Wd|_ki X_i / (sum_i |Wd|_ki sum_i X_i)  +  1 for each of up and gate            (eq. 8)
        relative3   X_i sum over W of sum_k |W|_ki / sum_i |W|_ki                                              (ours)
        wanda       mean_k |Wd|_ki X_i
        magnitude   |Wd_:i|_2
        random      a uniform number, from `key`

    A channel with a column of zeros in a normaliser scores 0. One layer's weights are on the device at a time.

    Raises:
      ValueError: an unknown kind, "random" without a key, scores of activations without statistics, or channels that
        several products read.
    """
    if kind not in FINE:
        raise ValueError(f"kind must be one of {FINE}, not {kind!r}")
    found = blocks(graph) if found is None else found
    groups = ffn_groups(found)
    if kind == "random":
        if key is None:
            raise ValueError("random scores need key=jax.random.key(...)")
        drawn = importance.random(graph, key)
        return {g: np.asarray(drawn[g]) for g in groups}
    if stats is None and kind != "magnitude":
        raise ValueError(f"{kind!r} weighs activations: give the statistics of block_stats")
    values = leaf_values(params)
    out = {g: np.zeros(graph.groups[g].shape, np.float32) for g in groups}
    for i, layer in enumerate(layers(found)):
        group = graph.groups[layer.block.ffn]
        matrices: dict[str, list[Any]] = {"in": [], "out": []}
        for m in counted_members(graph, group, ("in", "out")):
            leaf = traced_leaf(graph, values, m.path, "parameters")
            matrices[m.role] += unit_matrices(m, leaf, layer.row)
        x = np.zeros(group.size) if stats is None else np.sqrt(stats.x2[i])
        if len(matrices["in"]) != 1:
            raise ValueError(f"{group.id!r} is read by {len(matrices['in'])} products: channel scores weigh one")
        (down,) = matrices["in"]
        own = np.asarray(
            _fine(kind, down, matrices["out"], jnp.asarray(x, jnp.float32), jnp.float32(b), jnp.float32(c))
        )
        out[group.id][... if layer.row is None else layer.row] = own
    return out


@functools.partial(jax.jit, static_argnums=0)
def _fine(
    kind: str,
    down: Float[Array, "units stream"],
    producers: list[Float[Array, "units inputs"]],
    x: Float[Array, " units"],
    b: Float[Array, ""],
    c: Float[Array, ""],
) -> Float[Array, " units"]:
    down, *producers = (jnp.abs(w.astype(jnp.float32)) for w in (down, *producers))
    if kind == "official":
        weighted = (down * (x**b)[:, None], *producers)
        whole = [jnp.sum(u, axis=1, keepdims=True) for u in weighted]
        relative = sum(jnp.mean(u / jnp.where(n == 0, 1.0, n), axis=1) for u, n in zip(weighted, whole, strict=True))
        return jnp.where(functools.reduce(jnp.logical_or, [n[:, 0] == 0 for n in whole]), 0.0, relative * x**c)
    if kind == "eq8":
        total = jnp.sum(x)
        ones = sum(jnp.sum(w, axis=1) > 0 for w in producers)
        return x / jnp.where(total == 0, 1.0, total) * _across(down) + ones
    if kind == "relative3":
        return x * sum(_across(w) for w in (down, *producers))
    if kind == "wanda":
        return jnp.mean(down, axis=1) * x
    return jnp.linalg.norm(down, axis=1)


def _across(w: Float[Array, "units entries"]) -> Float[Array, " units"]:
    """Sum of weights, each relative to those of all channels in its place."""
    whole = jnp.sum(w, axis=0)
    return jnp.sum(w / jnp.where(whole == 0, 1.0, whole), axis=1)


def ffn_groups(found: Sequence[Block]) -> list[str]:
    """The blocks' FFN groups; ValueError where blocks share one."""
    groups = [b.ffn for b in found]
    if len(set(groups)) < len(groups):
        shared = next(g for g in groups if groups.count(g) > 1)
        raise ValueError(f"several blocks share the channels {shared!r}: what one may lose another needs")
    return groups


def select(
    graph: Graph, scores: Mapping[str, Any], counts: Sequence[int], found: Sequence[Block] | None = None
) -> dict[str, np.ndarray]:
    """The keep set with the `counts` largest scores of every layer, ties to the lowest index (host-side).

    Raises:
      KeepError: scores of other groups or shapes. ValueError: NaN scores.
    """
    found = blocks(graph) if found is None else found
    checked = importance.check_scores(graph, {g: scores[g] for g in ffn_groups(found)})
    keep = {g: np.zeros(s.shape, bool) for g, s in checked.items()}
    for layer, n in zip(layers(found), counts, strict=True):
        row = ... if layer.row is None else layer.row
        order = np.argsort(-checked[layer.block.ffn][row], kind="stable")
        chosen = np.zeros(len(order), bool)
        chosen[order[:n]] = True
        keep[layer.block.ffn][row] = chosen
    return keep


def removed(graph: Graph, keep: Keep, found: Sequence[Block] | None = None) -> dict[str, float]:
    """Sparsity counted three ways: FFN channels, weights of the blocks' products, all parameters."""
    found = blocks(graph) if found is None else found
    widths = {g: np.asarray(k).sum(-1) for g, k in keep.items()}
    own = {g for b in found for g in (b.ffn, b.kv, b.query, b.value) if g is not None}
    linear = {
        m.path for g in own for m in graph.groups[g].members if m.role in ("in", "out") and m.primitive == "dot_general"
    }
    every = [p for p, leaf in graph.leaves.items() if leaf.is_param]
    channels = sum(int(np.prod(graph.groups[b.ffn].shape)) for b in found)
    left = sum(int(np.sum(keep[b.ffn])) if b.ffn in keep else int(np.prod(graph.groups[b.ffn].shape)) for b in found)
    shares = {
        name: float(1 - cost.entries(graph, widths, paths) / cost.entries(graph, {}, paths))
        for name, paths in (("block_linear_weights", linear), ("parameters", every))
    }
    return {"ffn_channels": 1 - left / channels, **shares}
