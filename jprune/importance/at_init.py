"""Scores of single weights before training: SNIP, GraSP, SynFlow, magnitude and chance; and the masks they make.

All of them look at a function `fn(variables, x) -> outputs` and at the leaves that `weight_leaves(graph)` names; which
weights those are is read from the traced function, not from names. Every score is an array of the weight's shape, and
the largest are kept. BatchNorm is scored in evaluation mode (at initialisation the identity) when `fn` is the
evaluation function, in training mode when it is the training one. Batches add: gradients are summed over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jprune.graph import Graph
from jprune.tracing.errors import suggest
from jprune.tracing.paths import flatten, path_str
from jprune.tracing.primitives import DENSE_CONTRACTIONS

Fn: TypeAlias = Callable[[Any, Any], Any]
Batches: TypeAlias = Iterable[tuple[Any, Any]]
OutputLoss: TypeAlias = Callable[[Any, Any], Any]
WeightScores: TypeAlias = dict[str, Any]


def weight_leaves(graph: Graph) -> tuple[str, ...]:
    """Paths of the parameters that multiply activations as kernels or matrices, in program order.

    Biases, normalisation scales, embeddings and the like only meet data element by element and are not among them.
    """
    used = [t.leaf for t in graph.taps.values() if t.primitive in DENSE_CONTRACTIONS]
    return tuple(p for p in dict.fromkeys(used) if graph.leaves[p].is_param)


def classification(outputs: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean cross-entropy in float32: the loss that SNIP and GraSP score with unless told otherwise."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), labels).mean()


def weights_of(variables: Any, weights: Sequence[str]) -> WeightScores:
    """{path: array} of the named leaves; raises ValueError for a path that is no leaf."""
    leaves = dict(flatten(variables))
    for p in weights:
        if p not in leaves:
            raise ValueError(f"the variables have no leaf {p!r}{suggest(p, leaves)}")
    return {p: leaves[p] for p in weights}


def with_weights(variables: Any, weights: Mapping[str, Any]) -> Any:
    """The variables with these leaves in place of their own."""
    return jax.tree_util.tree_map_with_path(lambda path, x: weights.get(path_str(path), x), variables)


def snip(
    fn: Fn, variables: Any, batches: Batches, weights: Sequence[str], loss: OutputLoss = classification
) -> WeightScores:
    """|w dL/dw| over its sum in all layers (SNIP, Lee et al. 2019, eq. 4 and 6); batches' gradients are summed.

    Args:
      fn: (variables, x) -> outputs.
      variables: all collections.
      batches: (x, y) pairs.
      weights: paths of the leaves to score, from `weight_leaves`.
      loss: (outputs, y) -> scalar.

    Raises:
      ValueError: no batches, or a path that is no leaf.
    """
    w = weights_of(variables, weights)
    total = _summed(_gradient(fn, variables, loss), w, batches)
    scores = {p: jnp.abs(x.astype(jnp.float32) * total[p]) for p, x in w.items()}
    norm = sum(jnp.sum(s) for s in scores.values())
    return {p: s / norm for p, s in scores.items()}


def grasp(
    fn: Fn,
    variables: Any,
    batches: Batches,
    weights: Sequence[str],
    loss: OutputLoss = classification,
    temperature: float = 200.0,
) -> WeightScores:
    """w * Hg over |sum of w * Hg| (GraSP, Wang et al. 2020, eq. 8, algorithm 1): the largest are kept.

    The paper's score is the negative of this and its largest are removed. g is the gradient of the loss of outputs
    over `temperature`, summed over the batches; Hg sums each batch's Hessian times that g, by forward-over-reverse
    differentiation, which needs no graph of the backward pass.

    Args and errors are those of `snip`.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}: it must be above 0")
    w, batches = weights_of(variables, weights), list(batches)
    gradient = _gradient(fn, variables, lambda out, y: loss(jax.tree.map(lambda o: o / temperature, out), y))
    g = _summed(gradient, w, batches)
    direction = {p: g[p].astype(x.dtype) for p, x in w.items()}

    @jax.jit
    def product(w: Any, x: Any, y: Any) -> Any:
        return jax.jvp(lambda w: gradient(w, x, y), (w,), (direction,))[1]

    hg = _summed(product, w, batches)
    scores = {p: x.astype(jnp.float32) * hg[p] for p, x in w.items()}
    norm = jnp.abs(sum(jnp.sum(s) for s in scores.values())) + 1e-10
    return {p: s / norm for p, s in scores.items()}


def xavier(variables: Any, matrices: Sequence[str], key: Array) -> Any:
    """The variables with these matrices drawn anew, Xavier-normal: GraSP's authors score so, then go back."""
    w = weights_of(variables, matrices)
    draw = jax.nn.initializers.xavier_normal()
    keys = jax.random.split(key, max(len(w), 1))
    return with_weights(variables, {p: draw(k, np.shape(v), v.dtype) for (p, v), k in zip(w.items(), keys)})


def _gradient(fn: Fn, variables: Any, loss: OutputLoss) -> Callable[[Any, Any, Any], Any]:
    @jax.jit
    def gradient(w: Any, x: Any, y: Any) -> Any:
        return jax.grad(lambda w: loss(fn(with_weights(variables, w), x), y))(w)

    return gradient


def _summed(of: Callable[[Any, Any, Any], Any], w: WeightScores, batches: Batches) -> WeightScores:
    """Float32 sum over the batches."""
    total = None
    for x, y in batches:
        new = jax.tree.map(lambda g: g.astype(jnp.float32), of(w, x, y))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None:
        raise ValueError("there are no batches to score on: give at least one (x, y)")
    return total


def synflow(
    fn: Fn,
    variables: Any,
    x: Any,
    weights: Sequence[str],
    keep: float,
    rounds: int = 100,
    schedule: Literal["exponential", "linear"] = "exponential",
    rescale: bool = False,
) -> dict[str, np.ndarray]:
    """|w dR/dw|, R the summed outputs for an all-ones input of the network of absolute weights (Tanaka et al. 2020).

    No data. Between rounds all but keep^(k/rounds) of the weights are masked and the rest is scored anew (algorithm
    1), so that no layer is emptied; masked weights score 0. Runs in float64, because R is about the product of all
    layers' column sums; the result is float64 numpy (host-side).

    Args:
      fn: the evaluation function; every array in `variables`, running means included, is replaced by its modulus.
      variables: all collections.
      x: an input batch (array or `ShapeDtypeStruct`) or several; only the shape of one sample is used.
      weights: paths of the leaves to score and prune.
      keep: final fraction kept, which the rounds approach.
      rounds: 1 scores once, as the other criteria do, and can empty layers.
      schedule: "exponential", or "linear": 1 - (1 - keep) k / rounds.
      rescale: divide every layer's weights so that their sum is the square root of their number. Without skips this
        changes all scores by one factor; with skips it changes the balance of the paths, so use it only where the
        plain scores overflow.

    Raises:
      ValueError: a keep ratio outside (0, 1], integer inputs, or scores that overflow or vanish.
    """
    _check_keep(keep)
    if rounds < 1 or schedule not in ("exponential", "linear"):
        raise ValueError(f"rounds is at least 1 and schedule 'exponential' or 'linear'; got {rounds}, {schedule!r}")
    w = weights_of(variables, weights)
    size = sum(int(np.size(v)) for v in w.values())
    k = np.arange(1, rounds + 1) / rounds
    ratio = keep**k if schedule == "exponential" else 1 - (1 - keep) * k
    removed = np.array([_removed(r, size) for r in ratio], np.int64)
    with jax.enable_x64(True):

        @jax.jit
        def scored(variables: Any) -> Any:
            base = jax.tree.map(modulus, variables)
            w = weights_of(base, weights)
            if rescale:
                w = {p: v / (jnp.sum(v) / np.sqrt(v.size)) for p, v in w.items()}
            ones = ones_like_one_sample(x)

            def score(masks: Any) -> Any:
                masked = jax.tree.map(jnp.multiply, w, masks)
                flow = jax.grad(lambda w: total_flow(fn, with_weights(base, w), ones))
                return jax.tree.map(lambda v, g: jnp.abs(v * g), masked, flow(masked))

            def round_(k: Any, masks: Any) -> Any:
                s = score(masks)
                cut = jnp.asarray(removed)[k]
                threshold = jnp.where(cut > 0, _smallest(list(s.values()), jnp.maximum(cut - 1, 0)), -1.0)
                return jax.tree.map(lambda v: (v > threshold).astype(jnp.float64), s)

            return score(lax.fori_loop(0, rounds - 1, round_, jax.tree.map(jnp.ones_like, w)))

        scores = {p: np.asarray(s) for p, s in jax.device_get(scored(variables)).items()}
    top = max((float(s.max(initial=0.0)) for s in scores.values()), default=0.0)
    if not all(np.isfinite(s).all() for s in scores.values()) or not 0 < top < np.inf:
        raise ValueError(
            f"SynFlow's scores overflow or vanish (the largest is {top}): the network is too deep for its numbers, or "
            "computes in a smaller dtype of its own; pass rescale=True"
        )
    return scores


def _smallest(arrays: Sequence[Any], k: Any) -> Any:
    """The entry with k smaller ones before it, in order, of float64 arrays without negative entries.

    Bit by bit: such numbers are ordered as their bits are. Counting 63 times takes a fraction of sorting.
    """
    bits = [lax.bitcast_convert_type(a, jnp.uint64) for a in arrays]

    def with_bit(i: Any, found: Any) -> Any:
        more = found | (jnp.uint64(1) << (62 - i).astype(jnp.uint64))
        below = sum(jnp.sum(b < more) for b in bits)
        return jnp.where(below <= k, more, found)

    return lax.bitcast_convert_type(lax.fori_loop(0, 63, with_bit, jnp.uint64(0)), jnp.float64)


def modulus(leaf: Any) -> Any:
    """|leaf| in float64 (under `jax.enable_x64`); integers and keys as they are."""
    return jnp.abs(jnp.asarray(leaf, jnp.float64)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def ones_like_one_sample(x: Any) -> Any:
    """An all-ones float64 input of one sample; raises ValueError for inputs that are indices."""
    for leaf in jax.tree.leaves(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"SynFlow feeds ones in place of data; an input of {leaf.dtype} is an index, not a number")
    return jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape[1:]), jnp.float64), x)


def total_flow(fn: Fn, variables: Any, x: Any) -> Any:
    """Sum of all outputs."""
    return sum(o.sum() for o in jax.tree.leaves(fn(variables, x)))


def weight_magnitude(variables: Any, weights: Sequence[str]) -> WeightScores:
    """|w|, in float32."""
    return {p: jnp.abs(w.astype(jnp.float32)) for p, w in weights_of(variables, weights).items()}


def weight_chance(variables: Any, weights: Sequence[str], key: Array) -> WeightScores:
    """Uniform scores: every layer keeps the same fraction, up to chance."""
    w = weights_of(variables, weights)
    return {p: jax.random.uniform(k, np.shape(v)) for (p, v), k in zip(w.items(), jax.random.split(key, len(w)))}


def weight_masks(scores: Mapping[str, Any], keep: float) -> dict[str, Bool[np.ndarray, ...]]:
    """{path: True where the weight stays}: scores above the k-th smallest of all, k = int((1 - keep) N); host-side.

    Ties at the threshold go.

    Raises:
      ValueError: a keep ratio outside (0, 1], or scores that are not finite.
    """
    _check_keep(keep)
    host = {p: np.asarray(s) for p, s in scores.items()}
    for p, s in host.items():
        if not np.isfinite(s).all():
            raise ValueError(f"the scores of {p!r} are not finite: look for NaN or infinity in its gradients")
    every = np.concatenate([s.ravel() for s in host.values()])
    k = _removed(keep, every.size)
    threshold = np.partition(every, k - 1)[k - 1] if k else -np.inf
    return {p: s > threshold for p, s in host.items()}


def shuffled_masks(masks: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Bool[np.ndarray, ...]]:
    """The same number of weights in every layer, at random positions."""
    return {p: rng.permutation(np.asarray(m).ravel()).reshape(np.shape(m)) for p, m in masks.items()}


def class_balanced_batches(
    images: np.ndarray, labels: Int[np.ndarray, " n"], per_class: int = 10, batch_size: int = 256
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(x, y) batches with the first `per_class` examples of every class that occurs, for SNIP and GraSP.

    Raises:
      ValueError: a class has fewer examples.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if per_class < 1 or counts.min() < per_class:
        scarce = classes[counts.argmin()]
        raise ValueError(f"class {scarce} has {counts.min()} examples, fewer than per_class={per_class}")
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes]))
    parts = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [(images[part], labels[part]) for part in parts]


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"the keep ratio is {keep}: it is the fraction of weights that stays, in (0, 1]")


def _removed(keep: float, size: int) -> int:
    """int((1 - keep) size), where (1 - 0.9) * 10 is 1."""
    return int((1 - keep) * size + 1e-6)
