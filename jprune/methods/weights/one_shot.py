"""Weights removed in one shot: by size, by chance, by Wanda's score, or by SparseGPT, which moves what stays.

    leaves = prunable(graph)
    pruned = wanda(graph, params, batches, leaves, 0.5)

One signature for all. Of a decoder that is larger than memory, `layer_by_layer` runs any of them one layer at a time, each
on inputs that have passed the pruned layers before it, as the authors of both papers do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import track

from jprune.budget.weights import choose, counts
from jprune.graph import Graph, trace
from jprune.importance.at_init import weight_chance, weight_leaves, weight_magnitude, weights_of
from jprune.importance.output_norm import output_norm_gradients
from jprune.importance.weight_inputs import gram, input_sums, squares
from jprune.methods.weights.elimination import SparseGPTConfig, eliminate
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import NM, Pattern, Unstructured, apply, pattern, placed_as
from jprune.surgery.products import Product
from jprune.surgery.views import View
from jprune.tracing.paths import with_leaves

Batches: TypeAlias = Iterable[Any]


class Pruned(NamedTuple):
    """Parameters with zeros.

    Attributes:
      params: of the given shapes, with zeros outside the masks.
      masks: {leaf path: True where a weight stays}; leaves that are absent are dense.
      notes: what else there is to say, as plain data.
    """

    params: Any
    masks: dict[str, Any]
    notes: dict[str, Any]


Prune: TypeAlias = Callable[..., Pruned]  # (graph, params, batches, leaves, sparsity, pattern) -> Pruned


def prunable(graph: Graph) -> tuple[str, ...]:
    """Paths of the kernels and matrices but for the last one, which makes the outputs (a head); in program order."""
    used = weight_leaves(graph)
    last = [c.name for c in graph.contractions if c.name in used][-1:]
    return tuple(p for p in used if p not in last)


def own_pattern(asked: Pattern | str, usual: str) -> Pattern:
    """The pattern asked for; the word "unstructured" compares what the method usually compares."""
    if isinstance(asked, str):
        return pattern(usual if asked.strip() == "unstructured" else asked)
    return asked


def magnitude(
    graph: Graph,
    params: Any,
    batches: Batches,
    leaves: Sequence[str],
    sparsity: float | None,
    pattern: Pattern | str = "unstructured",
) -> Pruned:
    """The largest |w| stay, each leaf's own share.

    Args:
      graph: of the function, traced with `params`.
      params: trained.
      batches: of inputs; not looked at.
      leaves: paths of what is pruned, from `prunable`.
      sparsity: share of these weights to remove, in [0, 1); None for an N:M pattern.
      pattern: which zeros are allowed.

    Raises:
      ValueError: what `jprune.budget.weights.choose` refuses.
    """
    return _by_scores(graph, params, weight_magnitude(params, leaves), sparsity, pattern)


def random(
    graph: Graph,
    params: Any,
    batches: Batches,
    leaves: Sequence[str],
    sparsity: float | None,
    pattern: Pattern | str = "unstructured",
    *,
    seed: int = 0,
) -> Pruned:
    """Chance decides: the baseline to beat; arguments as `magnitude` has them."""
    return _by_scores(graph, params, weight_chance(params, leaves, jax.random.key(seed)), sparsity, pattern)


def _by_scores(
    graph: Graph, params: Any, scores: Mapping[str, Any], sparsity: float | None, pattern: Pattern | str
) -> Pruned:
    """The largest scores stay; leaves are read as matrices only where the pattern is one of matrices."""
    views = weight_matrices(graph, scores) if own_pattern(pattern, "unstructured") != Unstructured() else None
    masks = choose(scores, pattern, sparsity, views)
    return Pruned(apply(params, masks), masks, {})


def wanda_scores(
    params: Any, matrices: Mapping[str, Product], x2: Mapping[str, Any], gradients: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """|W_oi| times the norm of input i over the calibration samples (Sun et al. 2024, equation 1), leaf by leaf.

    With `gradients` it is |W_oi| (norm of input i + gradient_oi), the score of Wanda++ (Yang et al. 2025).

    Args:
      params: trained.
      matrices: of the leaves to score.
      x2: {leaf path: sums of squares of the inputs}, from `input_sums(.., squares)`; a common factor changes nothing.
      gradients: {leaf path: not below 0, of the leaf's shape}, times their weight; beside them a factor of x2 does count.
    """
    out = {}
    for p, w in weights_of(params, list(matrices)).items():
        m = matrices[p]
        norm = jnp.sqrt(x2[p])[..., None, :]
        if gradients is not None:
            norm = norm + m.matrix(gradients[p])
        score = jnp.abs(m.matrix(w.astype(jnp.float32))) * norm
        out[p] = m.leaf_like(score, w.shape)
    return out


def shares_of_rows(scores: Mapping[str, Any], matrices: Mapping[str, View]) -> dict[str, Any]:
    """Of each weight, the share of its output's scores that it and all smaller ones of this output have: in [0, 1].

    Wanda's variant removes of every output the most weights whose scores add up to at most a share alpha of the output's
    sum, and looks for the alpha that gives the sparsity (`use_variant` of the authors' program, which bisects to 0.001).
    With these numbers as scores, compared over a matrix, the smallest ones are those weights, and their count is exact.

    >>> from jprune.surgery.views import conventional
    >>> shares_of_rows({"w": jnp.array([[1.0, 4.0, 3.0]])}, {"w": conventional((1, 3), 0, 1)})["w"].tolist()
    [[0.125, 1.0, 0.5]]

    Args:
      scores: {leaf path: numbers not below 0}.
      matrices: of these leaves; outputs are their rows.
    """
    out = {}
    for p, s in scores.items():
        own = matrices[p].matrix(s).astype(jnp.float32)
        order = jnp.argsort(own, axis=-1, stable=True)
        sums = lax.cummax(jnp.cumsum(jnp.take_along_axis(own, order, -1), -1), own.ndim - 1)  # rounding may not fall
        whole = sums[..., -1:]
        shares = jnp.where(whole > 0, sums / jnp.where(whole > 0, whole, 1.0), 0.0)
        back = jnp.argsort(order, axis=-1)
        out[p] = matrices[p].leaf_like(jnp.take_along_axis(shares, back, -1), s.shape)
    return out


def wanda(
    graph: Graph,
    params: Any,
    batches: Batches,
    leaves: Sequence[str],
    sparsity: float | None,
    pattern: Pattern | str = "unstructured",
    *,
    by_share: bool = False,
    gradient_weight: float = 0.0,
    progress: bool = False,
) -> Pruned:
    """|weight| times the norm of its input, compared within each output's weights (Wanda); weights are not changed.

    Arguments as `magnitude` has them; "unstructured" compares within each row. `by_share` is Wanda's variant: outputs keep
    different numbers, as `shares_of_rows` says, and "unstructured" compares within each matrix. `gradient_weight` is the
    alpha of Wanda++'s score, 100 in the paper: it adds alpha times the root mean square over samples of the gradient of
    the outputs' norm (`output_norm_gradients`) to the norm of the input; by `layer_by_layer` the outputs are a layer's.
    What Wanda++ does after it, training a layer on its dense outputs, is not done.

    Raises:
      ValueError: inputs that are not finite, a leaf that is used more than once, shares with a pattern that compares
        within rows or groups, a gradient weight below 0, and what `choose` refuses.
    """
    check_gradient_weight(gradient_weight)
    matrices = weight_matrices(graph, leaves)
    asked = own_pattern(pattern, "matrix" if by_share else "row")
    if by_share:
        check_shares(asked)
    batches = list(batches) if gradient_weight else batches
    x2, gradients = input_sums(graph, params, batches, matrices, squares, progress), None
    if gradient_weight:
        found = output_norm_gradients(graph, params, batches, leaves, progress)
        gradients = {p: gradient_weight * g for p, g in found.items()}
    scores = wanda_scores(params, matrices, x2, gradients)
    masks = choose(shares_of_rows(scores, matrices) if by_share else scores, asked, sparsity, matrices)
    return Pruned(apply(params, masks), masks, {})


def check_gradient_weight(weight: float) -> None:
    """Raise a ValueError for a number below 0 or one that is not finite."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"gradient_weight is {weight}: it weighs gradients beside inputs, 0 or more (Wanda++: 100)")


def check_shares(asked: Pattern) -> None:
    """Raise a ValueError for a pattern that says itself how many weights of an output stay, or adds up shares of several."""
    if not isinstance(asked, Unstructured) or asked.within in ("row", "column"):
        raise ValueError(f"Wanda by shares lets outputs keep different numbers of weights, and {asked} does not: take the "
                         "pattern unstructured, matrix or model, or leave the shares out")  # fmt: skip


def sparsegpt(
    graph: Graph,
    params: Any,
    batches: Batches,
    leaves: Sequence[str],
    sparsity: float | None,
    pattern: Pattern | str = "unstructured",
    *,
    config: SparseGPTConfig = SparseGPTConfig(),
    progress: bool = False,
) -> Pruned:
    """Column by column; the columns behind make up for what went (SparseGPT). Kept weights change.

    Arguments as `magnitude` has them. `notes` has the damping of the leaves where it had to be raised.

    Raises:
      ValueError: inputs that are not finite, a leaf that is used more than once, a pattern that it cannot follow.
    """
    matrices = weight_matrices(graph, leaves)
    asked = own_pattern(pattern, "unstructured")
    shapes = {p: np.shape(w) for p, w in weights_of(params, leaves).items()}
    if isinstance(asked, NM):
        choose({p: jnp.zeros(s) for p, s in shapes.items()}, asked, sparsity, matrices)  # refuses what does not fit
        kept = {p: math.prod(s) * asked.keep // asked.of for p, s in shapes.items()}
    else:
        kept = counts(shapes, 0.5 if sparsity is None else sparsity)
    hessians = input_sums(graph, params, batches, matrices, gram, progress)
    new, masks, raised = {}, {}, {}
    for p, w in track(weights_of(params, leaves).items(), "eliminating", disable=not progress):
        m = matrices[p]
        own, lead = m.matrix(w), math.prod(m.lead)
        h = hessians[p].reshape(lead, m.shape[1], m.shape[1])
        parts = np.diff(np.round(np.arange(lead + 1) * kept[p] / lead).astype(int))
        found = [eliminate(x, h[i], int(parts[i]), asked, config) for i, x in enumerate(own.reshape(lead, *m.shape))]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
        new[p] = placed_as(m.leaf_like(stacked.matrix.reshape(own.shape), w.shape), w)
        masks[p] = placed_as(m.leaf_like(stacked.mask.reshape(own.shape).astype(jnp.float32), w.shape) != 0, w)
        if (used := float(jnp.max(stacked.damping))) > config.damping * 1.5:
            raised[p] = used
        if not bool(jnp.isfinite(stacked.matrix).all()):
            raise ValueError(f"SparseGPT of {p!r} is not finite even with a damping of {used:g}: look at its inputs")
    return Pruned(with_leaves(params, new), masks, {"raised_damping": raised} if raised else {})


def in_turn(
    prune: Prune,
    graph: Graph,
    params: Any,
    batches: Batches,
    leaves: Sequence[str],
    sparsity: float | None,
    pattern: Pattern | str = "unstructured",
) -> Pruned:
    """`prune` of one leaf after the other in program order, each on inputs that have passed the pruned ones before it.

    The batches run through the whole function once for every leaf; of a deep decoder `layer_by_layer` is the cheaper way.
    Arguments as `magnitude` has them.

    Raises:
      ValueError: what `prune` refuses, and a pattern that compares the weights of the whole model.
    """
    if own_pattern(pattern, "unstructured") == Unstructured("model"):
        raise ValueError("leaves that are pruned one after the other cannot be compared over the whole model")
    batches, masks, notes = list(batches), {}, {}
    shares = _shares(params, leaves, sparsity)
    for leaf in leaves:
        found = prune(graph, params, batches, [leaf], shares[leaf], pattern)
        params, masks = found.params, masks | found.masks
        notes |= {leaf: found.notes} if found.notes else {}
    return Pruned(params, masks, {"leaves": notes} if notes else {})


def _shares(params: Any, leaves: Sequence[str], sparsity: float | None) -> dict[str, Any]:
    """Sparsities of single leaves that keep as many weights as all of them together would."""
    if sparsity is None:
        return dict.fromkeys(leaves)
    shapes = {p: np.shape(w) for p, w in weights_of(params, leaves).items()}
    return {p: 1 - k / math.prod(shapes[p]) for p, k in counts(shapes, sparsity).items()}


# -- one layer at a time -----------------------------------------------------------------------------------------------


def layer_by_layer(
    prune: Prune,
    pieces: tuple[Callable[[Any], Any], Sequence[Callable[..., Any]], Sequence[Any]],
    batches: Batches,
    sparsity: float | None,
    pattern: Pattern | str = "unstructured",
    *,
    hold: str = "device",
    progress: bool = False,
) -> list[Pruned]:
    """`prune` of every layer of a decoder in turn, on what the pruned layers before it make of the batches; host-side.

    One layer's weights and the streams of all batches are held at a time. A layer's matrices see the inputs of the dense
    layer; the next layer sees the pruned one's outputs.

    Args:
      prune: `magnitude`, `wanda` or `sparsegpt`.
      pieces: (embed, blocks, params), as `jprune.models.llama_blocks.pieces` cuts a decoder.
      batches: of token ids.
      sparsity, pattern: as for `prune`; all matrices of a layer are pruned.
      hold: where the streams wait, "device" or "host".
      progress: show a bar.

    Returns:
      One result per layer, with paths within the layer's own parameters.

    Raises:
      ValueError: no batches, another place to hold, and what `prune` refuses.
    """
    if hold not in ("device", "host"):
        raise ValueError(f"hold is 'device' or 'host', not {hold!r}")
    embed, blocks, params = pieces
    keep: Any = np.asarray if hold == "host" else jnp.asarray
    streams = [keep(embed(b)) for b in batches if 0 not in np.shape(b)]
    if not streams:
        raise ValueError("calibration got no batches, or only empty ones: pass at least one with tokens")
    out = []
    for fn, own in track(zip(blocks, params), "layers", total=len(params), disable=not progress):
        own = jax.device_put(own)
        graph, run = _layer(fn, jax.tree.structure(own), _shapes(own), _shapes(streams[0]))
        found = prune(graph, own, streams, weight_leaves(graph), sparsity, pattern)
        streams = [keep(run(found.params, h)) for h in streams]
        out.append(found)
    return out


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((np.shape(x), jax.dtypes.result_type(x)) for x in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=4)
def _layer(fn: Any, structure: Any, shapes: Any, stream: Any) -> tuple[Graph, Any]:
    """(graph, compiled function) of a layer; layers of the same function and shapes share them."""
    params = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*s) for s in shapes])
    return trace(fn, params, jax.ShapeDtypeStruct(*stream[0])), jax.jit(fn)
