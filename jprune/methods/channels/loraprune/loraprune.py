"""LoRAPrune: which heads and MLP channels matter, told by low-rank adapters and their gradients alone.

Zhang et al., LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning (ACL Findings 2024).

    G = gB A + B gA - gB gA        what a gradient step on A and B does to B A, in place of dL/dW
    S = |G (W + s B A)|            first-order change of the loss, per weight
    I = sum over products of S summed over a unit, each product's vector divided by its norm
    ema <- 0.9 ema + 0.1 I         every step; NaN skips the update
    masks: on a cubic schedule the units of lowest ema go, the same share of every layer

G stands for a projection of the true gradient D: with gB = s D A^T and gA = s B^T D it is s (D A^T A + B B^T D) minus a
term of second order, which makes importance depend on the gradient's scale; gradients are clipped to norm 1 before.
Of W's shape nothing is formed but a block of rows at a time. Schedule and masks are in loraprune_masks, the loop is in
loraprune_run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jprune.graph import Graph
from jprune.language.lora import Lora, own_scales, products
from jprune.tracing import layout as L
from jprune.tracing.paths import flatten
from jprune.tracing.structure import Tap

Criterion: TypeAlias = Literal["lora", "grad", "magnitude", "random"]
Side: TypeAlias = Literal["out", "in"]
Scores: TypeAlias = dict[str, Any]
CRITERIA = ("lora", "grad", "magnitude", "random")


# -- one matrix ------------------------------------------------------------------------------------------------------


def lora_sensitivity(
    w: Float[Array, "o i"],
    a: Float[Array, "r i"],
    b: Float[Array, "o r"],
    ga: Float[Array, "r i"],
    gb: Float[Array, "o r"],
    *,
    scale: Any,
    side: Side,
    cross_term: bool = True,
    power: int = 1,
    chunk: int = 1024,
) -> Float32[Array, " n"]:
    """S = |G (W + s B A)|^power summed over every row (side "out") or column ("in") of W; section 3.2 of the paper.

    Args:
      w: the frozen matrix, in any dtype.
      a, b, ga, gb: the adapter and its gradients.
      scale: s.
      side: what the units own.
      cross_term: with - gB gA, as in the published code.
      power: 1 as in the published code, 2 as in the paper's equation.
      chunk: rows of W that are looked at at once, in float32.
    """
    left = jnp.concatenate([gb, b], axis=1)
    right = jnp.concatenate([a - ga if cross_term else a, ga], axis=0)

    def element(w: Any, left: Any, b: Any) -> Any:
        return jnp.abs(_dot(left, right) * (w + scale * _dot(b, a))) ** power

    return row_or_column_sums(element, side, chunk, w, left, b)


def weight_sensitivity(
    weights: Sequence[Float[Array, "o i"]],
    a: Float[Array, "r i"],
    b: Float[Array, "o r"],
    *,
    scale: Any,
    side: Side,
    power: int = 1,
    chunk: int = 1024,
) -> Float32[Array, " n"]:
    """|D (W + s B A)|^power per row or column, for weights (W, D) with the true gradient D; |W + s B A|^power for (W,)."""

    def element(b: Any, w: Any, d: Any = 1.0) -> Any:
        return jnp.abs(d * (w + scale * _dot(b, a))) ** power

    return row_or_column_sums(element, side, chunk, b, *weights)


def row_or_column_sums(
    element: Callable[..., Any], side: Side, chunk: int, *arrays: Float[Array, "o _"]
) -> Float32[Array, " n"]:
    """element(rows of each array, float32) -> (rows, i), summed per row or per column over all rows, block by block."""
    o = arrays[0].shape[0]
    c = min(chunk, o)
    shape = jax.eval_shape(element, *(jax.ShapeDtypeStruct((c, x.shape[1]), jnp.float32) for x in arrays)).shape

    def body(k: Any, total: Any) -> Any:
        start = jnp.minimum(k * c, o - c)  # the last block reaches back into the one before
        s = element(*(lax.dynamic_slice_in_dim(x, start, c).astype(jnp.float32) for x in arrays))
        if side == "out":
            return lax.dynamic_update_slice_in_dim(total, jnp.sum(s, axis=1), start, 0)
        fresh = start + jnp.arange(c) >= k * c
        return total + jnp.sum(jnp.where(fresh[:, None], s, 0), axis=0)

    return lax.fori_loop(0, -(-o // c), body, jnp.zeros(o if side == "out" else shape[1], jnp.float32))


def _dot(x: Any, y: Any) -> Any:
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision=lax.Precision.HIGHEST)


# -- groups ----------------------------------------------------------------------------------------------------------


def group_importance(
    graph: Graph,
    params: Any,
    lora: Lora,
    grads: Lora,
    groups: Sequence[str],
    *,
    criterion: Criterion = "lora",
    weight_grads: Mapping[str, Any] | None = None,
    key: Any = None,
    cross_term: bool = True,
    power: int = 1,
    normalize: bool = True,
    chunk: int = 1024,
    eps: float = 1e-8,
) -> Scores:
    """{group: I, (size,) or (layers, size)} from the adapted products around each group; section 3.3. Jit-able.

    Products that make a unit (q, k, v, gate, up) are summed over its rows, those that consume it (o, down) over its
    columns; each vector is divided by its norm over the units, and they are added.

    Args:
      graph: of the function.
      params: the frozen parameters.
      lora, grads: adapters and their gradients: accumulated, unscaled, clipped.
      groups: to score; any that an adapted product touches.
      criterion: "lora"; "grad": G = dL/dW from `weight_grads` {leaf path: gradient}; "magnitude": G = 1; "random".
      weight_grads, key: what "grad" and "random" need.
      cross_term, power, chunk: as in `lora_sensitivity`.
      normalize: divide each product's vector by its norm plus `eps`.

    Raises:
      ValueError: an unknown criterion or what it needs is missing; a group without an adapted product.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, not {criterion!r}")
    if criterion == "random":
        if key is None:
            raise ValueError("criterion 'random' needs a key")
        keys = jax.random.split(key, len(groups))
        return {g: jax.random.uniform(k, graph.groups[g].shape) for g, k in zip(groups, keys, strict=True)}
    if (criterion == "grad") != (weight_grads is not None):
        raise ValueError("criterion 'grad', and no other, takes weight_grads, the gradients of the frozen matrices")
    values = dict(flatten(params))
    known = {"power": power, "chunk": chunk}
    out: Scores = {}
    for p in products(graph, list(own_scales(lora))).values():
        f, df, path = lora[p.tap.id], grads[p.tap.id], p.tap.leaf
        s = lora.scale(p.tap)
        s = jnp.broadcast_to(s.reshape(*s.shape, *[1] * (len(p.lead) - s.ndim)), p.lead)
        for g, side in _touched(p.tap, groups):
            if criterion == "lora":
                score = functools.partial(_lora, side=side, cross_term=cross_term, **known)
                v = p.map(score, [values[path]], s, f["a"], f["b"], df["a"], df["b"])
            else:
                leaves = [values[path]] if weight_grads is None else [values[path], weight_grads[path]]
                v = p.map(functools.partial(_weight, side=side, **known), leaves, s, f["a"], f["b"])
            v = p.units(side, v, g)
            if normalize:
                v = v / (jnp.linalg.norm(v, axis=-1, keepdims=True) + eps)
            out[g] = out[g] + v if g in out else v
    if missing := [g for g in groups if g not in out]:
        raise ValueError(f"no adapted product makes or consumes the units of {missing[0]!r}: adapt one that does")
    return {g: out[g] for g in groups}


def _lora(weights: Sequence[Any], scale: Any, *factors: Any, **how: Any) -> Any:
    return lora_sensitivity(weights[0], *factors, scale=scale, **how)


def _weight(weights: Sequence[Any], scale: Any, *factors: Any, **how: Any) -> Any:
    return weight_sensitivity(weights, *factors, scale=scale, **how)


def _touched(tap: Tap, groups: Sequence[str]) -> list[tuple[str, Side]]:
    """The groups among those given that a product makes ("out") or consumes ("in")."""
    made, used = (
        {g for layout in layouts for g in L.groups_in(layout)} for layouts in (tap.out_layouts, tap.in_layouts)
    )
    return [(g, "out" if g in made else "in") for g in groups if g in made | used]


def ema_update(ema: Scores, importance: Scores, decay: float = 0.9) -> Scores:
    """decay ema + (1 - decay) I; unchanged everywhere if any score is NaN (section 3.4)."""
    broken = jnp.any(jnp.stack([jnp.any(jnp.isnan(v)) for v in importance.values()]))
    return {g: jnp.where(broken, e, decay * e + (1 - decay) * importance[g]) for g, e in ema.items()}
