"""What CFSP has to beat, at equal budgets: random, magnitude, Wanda-sp, FLAP and first-order Taylor scores.

A budget is always the parameters of a fraction `sparsity` of all FFN channels, so that methods that prune heads too
remove as many parameters as those that do not. Kept counts come from the same rounding and the same choice as CFSP's.

    random, magnitude       the same count in every layer
    wanda_sp                mean_k |Wd|_ki X_i; the same count in every layer, or one threshold over standardised scores
    wanda_sp_in_turn        the same, with layer l calibrated on what the pruned layers before it give
    flap                    Var(z_i) |Wd_:i|^2 of channels and heads, standardised per layer, one threshold by parameters;
                            what is removed moves into biases on average       (An et al. 2024, sections 3.1 to 3.3)
    taylor                  sum over a unit of |w dL/dw|, of channels or of channels and heads  (Ma et al. 2023, eq. 5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jprune import budget, importance
from jprune.budget.rounding import channel_counts
from jprune.graph import Graph
from jprune.importance.reduce import WEIGHTS, counted_members, leaf_values, traced_leaf
from jprune.language.blocks import Block, blocks, layers
from jprune.language.statistics import BlockStats, layerwise_stats
from jprune.methods.channels.decoder_channels import channel_scores, ffn_groups, select
from jprune.surgery.compensate import Compensated, compensate
from jprune.surgery.decision import Keep
from jprune.surgery.mask import mask
from jprune.surgery.products import product
from jprune.tracing import cost
from jprune.tracing.paths import flatten, with_leaves
from jprune.tracing.taps import in_weight_order

Keeps = dict[str, np.ndarray]


def random(graph: Graph, key: jax.Array, sparsity: float, *, multiple_of: int | None = None) -> Keeps:
    """Any channels, the same count in every layer."""
    return _even(graph, channel_scores(graph, None, None, kind="random", key=key), sparsity, multiple_of)


def magnitude(graph: Graph, params: Any, sparsity: float, *, multiple_of: int | None = None) -> Keeps:
    """The channels whose columns of the last product have the largest norm, the same count in every layer."""
    return _even(graph, channel_scores(graph, params, None, kind="magnitude"), sparsity, multiple_of)


def wanda_sp(
    graph: Graph,
    params: Any,
    stats: BlockStats,
    sparsity: float,
    scope: str = "layer",
    *,
    multiple_of: int | None = None,
) -> Keeps:
    """Wanda's score summed over the outputs of a channel, from the statistics of the unpruned model.

    Args:
      scope: "layer": the same count in every layer. "global": scores standardised in every layer (with n - 1 degrees of
        freedom), one threshold.

    Raises:
      ValueError: another scope.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope is 'layer' or 'global', not {scope!r}")
    found = blocks(graph)
    scores = channel_scores(graph, params, stats, found, "wanda")
    if scope == "layer":
        return _even(graph, scores, sparsity, multiple_of)
    rows = _rows(scores, found)
    every = np.concatenate([standardised(r) for r in rows])
    chosen = np.zeros(len(every), bool)
    chosen[np.argsort(-every, kind="stable")[: round(len(every) * (1 - sparsity))]] = True
    cuts = np.cumsum([len(r) for r in rows])[:-1]
    ratios = np.array([part.mean() for part in np.split(chosen, cuts)])
    counts = channel_counts(ratios, [len(r) for r in rows], multiple_of=multiple_of, exact_budget=True)
    return select(graph, scores, counts.tolist(), found)


def wanda_sp_in_turn(
    graph: Graph,
    embed: Callable[[Any], Any],
    block: Callable[..., Any] | Sequence[Callable[..., Any]],
    params: Iterable[Any],
    batches: Iterable[Any],
    sparsity: float,
    *,
    multiple_of: int | None = None,
) -> Keeps:
    """Wanda-sp as its authors run it: every layer is calibrated on the outputs of the pruned layers before it.

    Args:
      graph: of the whole decoder, whose keep set is wanted.
      embed, block, params, batches: the decoder in pieces (see `layerwise_stats`).
    """
    chosen: list[np.ndarray] = []

    def revise(i: int, part: Graph, own: Any, stats: BlockStats) -> Any:
        keep = _even(part, channel_scores(part, own, stats, kind="wanda"), sparsity, multiple_of)
        chosen.extend(keep.values())
        return mask(part, own, keep)

    layerwise_stats(embed, block, params, batches, revise)
    found = blocks(graph)
    keep = {g: np.ones(graph.groups[g].shape, bool) for g in ffn_groups(found)}
    for layer, k in zip(layers(found), chosen, strict=True):
        keep[layer.block.ffn][... if layer.row is None else layer.row] = k
    return keep


# -- heads against channels --------------------------------------------------------------------------------------------


def flap(
    graph: Graph, params: Any, stats: BlockStats, sparsity: float, *, heads: bool = True, multiple_of: int = 1
) -> Keeps:
    """Channels and key-value heads (with their queries) that fluctuate least, by one threshold (An et al., section 3.2).

    Scores are standardised per layer and kind; a head's is the mean over its features. Where the threshold lies follows
    from the parameters that channels and heads really have, which the authors approximate for LLaMA-7B.

    Args:
      heads: False prunes channels only.
      multiple_of: counts of channels are rounded up to multiples of this.
    """
    found = blocks(graph)
    values = leaf_values(params)
    scores: dict[str, Any] = {}
    norms = {t: _squares(graph, values, t) for b in found for t in (b.down, b.out if heads and b.kv else None) if t}
    for i, layer in enumerate(layers(found)):
        b, row, attention = layer.block, layer.row, stats.attention[i]
        own = norms[b.down] if row is None else norms[b.down][row]
        _put(scores, graph, b.ffn, row, standardised(own * stats.ffn[i].var))
        if b.out in norms and b.kv is not None and attention is not None:
            own = norms[b.out] if row is None else norms[b.out][row]
            features = standardised(own * in_weight_order(graph.taps[b.out], attention.var))
            lead = features if row is None else features[None]
            sums = np.asarray(product(graph, b.out).units("in", jnp.asarray(lead), b.kv), np.float64)
            _put(scores, graph, b.kv, row, sums.reshape(-1) * graph.groups[b.kv].size / len(features))
    target = budget.Target.params(_left(graph, found, sparsity))
    multiples = {b.ffn: multiple_of for b in found}
    return budget.ranked(graph, scores, target, per_layer="free", multiple_of=multiples).keep


def flap_biases(graph: Graph, params: Any, stats: BlockStats, keep: Keep) -> Compensated:
    """Parameters whose biases take up the mean contribution of what `keep` removes (An et al., section 3.3).

    The decoder needs biases behind both products (`jprune.models.llama.with_biases` adds them); what has none is named.
    """
    means: dict[str, Any] = {}
    for i, layer in enumerate(layers(blocks(graph))):
        for tap, m in ((layer.block.down, stats.ffn[i]), (layer.block.out, stats.attention[i])):
            if tap is not None and m is not None:
                means.setdefault(tap, []).append(m.mean)
    stacked = {t: np.stack(rows) if graph.taps[t].layers is not None else rows[0] for t, rows in means.items()}
    return compensate(graph, params, keep, stacked)


def taylor_gradients(
    graph: Graph,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    heads: bool = False,
) -> dict[str, Any]:
    """{leaf path: float32 gradient} of loss(params, batch), summed over the batches, of the leaves that `taylor` scores.

    Embeddings, norms and the head have no gradient here, and the sum is made in place: besides the parameters, two copies
    of what is scored is all that there is at a time.

    Raises:
      ValueError: no batches.
    """
    values = dict(flatten(params))
    own = {p: values[p] for p in _taylor_leaves(graph, heads)}
    total = {p: jnp.zeros(x.shape, jnp.float32, device=x.sharding) for p, x in own.items()}
    add = jax.jit(taylor_step(loss), donate_argnums=0)
    seen = False
    for batch in batches:
        total, seen = add(total, params, batch), True
    if not seen:
        raise ValueError("there are no batches to score on: give at least one")
    return total


def taylor_step(loss: Callable[[Any, Any], Any]) -> Callable[[dict[str, Any], Any, Any], dict[str, Any]]:
    """step(sums by leaf path, params, batch) -> sums: gradients of those leaves and of no others are added; to be jit-ed."""

    def step(total: dict[str, Any], params: Any, batch: Any) -> dict[str, Any]:
        values = dict(flatten(params))
        grads = jax.grad(lambda own: loss(with_leaves(params, own), batch))({p: values[p] for p in total})
        return {p: total[p] + g.astype(jnp.float32) for p, g in grads.items()}

    return step


def _taylor_leaves(graph: Graph, heads: bool) -> list[str]:
    members = [m for g in _taylor_groups(graph, heads) for m in counted_members(graph, graph.groups[g], WEIGHTS)]
    return sorted({m.path for m in members})


def _taylor_groups(graph: Graph, heads: bool) -> list[str]:
    found = blocks(graph)
    return [*ffn_groups(found), *(b.kv for b in found if heads and b.kv is not None)]


def taylor(
    graph: Graph, params: Any, grads: Any, sparsity: float, *, heads: bool = False, multiple_of: int = 1
) -> Keeps:
    """Units with the largest sum of |w dL/dw|, the same fraction of every layer (LLM-Pruner's first-order score).

    Args:
      grads: gradient of the loss on some text, of `taylor_gradients` or a tree like `params`.
      heads: prune key-value heads (with their queries) by the same fraction too.
      multiple_of: counts of channels are rounded up to multiples of this.
    """
    found = blocks(graph)
    groups = _taylor_groups(graph, heads)
    every = importance.taylor(graph, params, grads, reduce="sum", normalise="none", groups=groups)
    scores = {g: every[g] for g in groups}
    if not heads:
        return _even(graph, scores, sparsity, multiple_of)
    target = budget.Target.params(_left(graph, found, sparsity))
    multiples = {b.ffn: multiple_of for b in found}
    return budget.uniform(graph, scores, target, per_layer="free", multiple_of=multiples, even=True).keep


# -- parts -------------------------------------------------------------------------------------------------------------


def standardised(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Minus their mean, over their standard deviation with n - 1 degrees of freedom; zeros where all are equal."""
    x = np.asarray(x, np.float64)
    spread = x.std(ddof=1) if len(x) > 1 else 0.0
    return (x - x.mean()) / (spread or 1.0)


def _even(graph: Graph, scores: Mapping[str, Any], sparsity: float, multiple_of: int | None) -> Keeps:
    found = blocks(graph)
    widths = [graph.groups[layer.block.ffn].size for layer in layers(found)]
    counts = channel_counts(np.full(len(widths), 1.0 - sparsity), widths, multiple_of=multiple_of)
    return select(graph, scores, counts.tolist(), found)


def _rows(scores: Mapping[str, Any], found: Sequence[Block]) -> list[np.ndarray]:
    return [np.asarray(scores[x.block.ffn][... if x.row is None else x.row]) for x in layers(found)]


def _put(scores: dict[str, Any], graph: Graph, group: str, row: int | None, value: np.ndarray) -> None:
    scores.setdefault(group, np.zeros(graph.groups[group].shape))[... if row is None else row] = value


def _squares(graph: Graph, values: Mapping[str, Any], tap: str) -> Float[np.ndarray, "*layers features"]:
    """|W_:i|^2 per input feature of a product, in the order of its weights."""
    leaf = traced_leaf(graph, values, graph.taps[tap].leaf, "parameters")
    return np.asarray(product(graph, tap).map(lambda w: jnp.sum(w[0].astype(jnp.float32) ** 2, axis=0), [leaf]))


def _left(graph: Graph, found: Sequence[Block], sparsity: float) -> int:
    """Parameters when a fraction of the FFN channels is gone."""
    paths = [p for p, leaf in graph.leaves.items() if leaf.is_param]
    dense = cost.entries(graph, {}, paths)
    none = cost.entries(graph, {b.ffn: 0 for b in found}, paths)
    return dense - round(sparsity * (dense - none))
