"""LoRAPrune's schedule and masks: how many units are gone after which step, which they are, in which layers.

The share grows along a cubic; in every layer the units of lowest moving average go, and never come back. Masks are arrays
of one shape for the whole run and the number of units is traced, so nothing is compiled again while sparsity grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jprune.graph import Graph
from jprune.language.blocks import Block, blocks
from jprune.methods.channels.loraprune.loraprune import Scores

Unit: TypeAlias = Literal["auto", "kv_group", "head", "q_head_balanced"]


def cubic_sparsity(
    step: int, total: int, *, warmup: float = 0.1, cooldown: float = 0.1, init: float = 0.0, final: float = 0.5
) -> float:
    """Share to be pruned at a step of `total`: init, then along a cubic to final, which it has from (1 - cooldown) on."""
    first, last = warmup * total, total - cooldown * total
    if step <= first:
        return init
    if step > last:
        return final
    return final + (init - final) * (1 - (step - first) / (last - first)) ** 3


def update_masks(
    ema: Scores, masks: Scores, counts: Mapping[str, Any], rows: Mapping[str, np.ndarray] | None = None
) -> Scores:
    """Masks with `counts[g]` units gone per layer, those of lowest ema; whatever was gone stays so. Jit-able.

    Args:
      ema, masks: {group: (size,) or (layers, size)}; masks are 1 and 0.
      counts: {group: units to be gone, a number that may be traced}.
      rows: {group: which of its layers may lose units}; absent: all.

    Of equal scores the lowest index goes first.
    """
    out = {}
    for g, mask in masks.items():
        score = jnp.where(mask > 0, ema[g], -jnp.inf)
        rank = jnp.argsort(jnp.argsort(score, axis=-1, stable=True), axis=-1)
        new = mask * (rank >= counts[g])
        if rows is not None and g in rows and np.ndim(rows[g]):
            new = jnp.where(jnp.asarray(rows[g])[:, None], new, mask)
        out[g] = new
    return out


def pruned_units(size: int, sparsity: float, multiple_of: int = 1) -> int:
    """Units to remove for good: floor(size sparsity), so many fewer that a multiple stays, and at least one unit."""
    kept = max(size - math.floor(size * sparsity + 1e-6), 1)
    return size - min(-(-kept // multiple_of) * multiple_of, size)


def prunable(
    graph: Graph,
    *,
    unit: Unit = "auto",
    parts: Sequence[str] = ("attention", "mlp"),
    skip_first: float = 0.1,
    skip_last: float = 1,
) -> dict[str, Bool[np.ndarray, "*layers"]]:
    """{group: which of its layers may lose units} of a decoder's heads and MLP channels (sections 3.7, 3.8).

    Args:
      graph: of the decoder.
      unit: of attention. "kv_group": a key-value head with its query heads, which under multi-head attention is a
        "head"; "auto" is that. "q_head_balanced": one query head of every key-value head (the same position in each).
      parts: which of "attention" and "mlp".
      skip_first, skip_last: layers that stay whole; below 1 a share of them, rounded down.

    Raises:
      ValueError: a unit the attention does not have, unknown parts, or nothing left to prune.
    """
    found = blocks(graph)
    if unit not in ("auto", "kv_group", "head", "q_head_balanced") or not set(parts) <= {"attention", "mlp"}:
        raise ValueError(f"unit {unit!r} and parts {tuple(parts)}: choose among 'auto', 'kv_group', 'head', "
                         "'q_head_balanced' and among 'attention', 'mlp'")  # fmt: skip
    depth = sum(b.layers or 1 for b in found)
    first, last = (math.floor(s * depth) if s < 1 else int(s) for s in (skip_first, skip_last))
    open_layers = (np.arange(depth) >= first) & (np.arange(depth) < depth - last)
    out, at = {}, 0
    for b in found:
        n = b.layers or 1
        own = open_layers[at : at + n]
        at += n
        names = [b.ffn] if "mlp" in parts else []
        if "attention" in parts and b.out is not None:
            names.append(_heads(b, unit))
        if own.any():
            out |= {g: own if b.layers is not None else np.asarray(own[0]) for g in names}
    if not out:
        raise ValueError(
            f"of {depth} layers the first {first} and the last {last} are skipped: nothing is left to prune"
        )
    return out


def _heads(block: Block, unit: Unit) -> str:
    if unit == "head" and block.query is not None:
        raise ValueError(f"the queries of {block.out!r} share key-value heads: choose unit 'kv_group', or "
                         "'q_head_balanced' to keep all of those")  # fmt: skip
    if unit == "q_head_balanced":
        if block.query is None:
            raise ValueError(f"every query head of {block.out!r} has keys and values of its own: choose unit 'head'")
        return block.query
    if block.kv is None:
        raise ValueError(f"the attention of {block.out!r} has one key-value head: choose unit 'q_head_balanced'")
    return block.kv
