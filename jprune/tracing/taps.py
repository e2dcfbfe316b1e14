"""Taps: statistics of the activations around any parameter, for any function, streamed and jitted.

JAX has no forward hooks. The traced equations are evaluated again and, at each tapped one, a reducer folds the
activation - seen as (samples, features), features being what the parameter indexes - into a running state. States
go through scans (one per layer where the parameter is stacked), branches and loops; sums over a sharded batch axis
are global, because they are ordinary jitted sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.progress import track

from jprune.tracing import layout as L
from jprune.tracing.errors import TraceError, suggest
from jprune.tracing.primitives import DENSE_CONTRACTIONS
from jprune.tracing.probes import Point, Probe, probed
from jprune.tracing.structure import Tap

if TYPE_CHECKING:
    from jprune.graph import Graph


@dataclasses.dataclass(frozen=True)
class Reducer:
    """A streamed statistic.

    Attributes:
      init: number of features -> state (a pytree of arrays).
      update: (state, activation (samples, features) float32) -> state; there is at least one sample.
      finish: state -> result; of a parameter stacked over a scan the states of all layers, on a leading axis.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, Float[Array, "samples features"]], Any]
    finish: Callable[[Any], Any] = lambda state: state


def sum_of_squares() -> Reducer:
    """Sum over all samples of x^2, per feature."""
    return Reducer(lambda n: jnp.zeros(n), lambda s, x: s + jnp.sum(x * x, axis=0))


def mean() -> Reducer:
    """Mean over all samples, per feature."""
    return Reducer(
        lambda n: (jnp.zeros(n), jnp.zeros(())),
        lambda s, x: (s[0] + jnp.sum(x, axis=0), s[1] + x.shape[0]),
        lambda s: s[0] / s[1][..., None],
    )


def variance() -> Reducer:
    """Population variance over all samples, per feature (batches merged pairwise, so that no large sums cancel)."""

    def update(s: Any, x: Any) -> Any:
        n, m, m2 = s
        k = x.shape[0]
        mean_x = jnp.mean(x, axis=0)
        delta = mean_x - m
        total = n + k
        m2 = m2 + jnp.sum((x - mean_x) ** 2, axis=0) + delta**2 * n * k / total
        return total, m + delta * k / total, m2

    return Reducer(lambda n: (jnp.zeros(()), jnp.zeros(n), jnp.zeros(n)), update, lambda s: s[2] / s[0][..., None])


def second_moment() -> Reducer:
    """Mean over all samples of x x^T, (features, features)."""
    return Reducer(
        lambda n: (jnp.zeros((n, n)), jnp.zeros(())),
        lambda s, x: (s[0] + jnp.einsum("si,sj->ij", x, x, precision="highest"), s[1] + x.shape[0]),
        lambda s: s[0] / s[1][..., None, None],
    )


def absolute_maximum() -> Reducer:
    """Largest |x| over all samples, per feature."""
    return Reducer(lambda n: jnp.zeros(n), lambda s, x: jnp.maximum(s, jnp.max(jnp.abs(x), axis=0)))


def quantiles(at: tuple[float, ...], accuracy: float = 0.02, smallest: float = 1e-6, largest: float = 1e6) -> Reducer:
    """Quantiles over all samples, per feature: (len(at), features), each within a factor 1 +- accuracy.

    Counts in geometric bins of |x| for each sign; magnitudes outside [smallest, largest] are clipped (to 0 below).
    A feature that was ever NaN has NaN quantiles.

    Raises:
      ValueError: a quantile outside [0, 1] or an accuracy outside (0, 1).
    """
    if not all(0 <= q <= 1 for q in at) or not 0 < accuracy < 1:
        raise ValueError(f"quantiles must be in [0, 1] and accuracy in (0, 1); got {at} and {accuracy}")
    step = float(np.log((1 + accuracy) / (1 - accuracy)))
    bins = int(np.ceil(np.log(largest / smallest) / step)) + 1
    # a bin [low, low (1 + a) / (1 - a)) is read as low (1 + a), which is 1 + a and 1 - a times its ends
    magnitude = smallest * np.exp(step * np.arange(bins)) * (1 + accuracy)
    values = jnp.asarray(np.concatenate([-magnitude[::-1], [0.0], magnitude]), jnp.float32)
    missing = 2 * bins + 1  # the last row counts NaN

    def update(s: Any, x: Any) -> Any:
        size = jnp.floor(jnp.log(jnp.clip(jnp.abs(x), smallest, largest) / smallest) / step)
        size = jnp.clip(jnp.nan_to_num(size), 0, bins - 1).astype(int)
        slot = jnp.where(jnp.abs(x) < smallest, bins, jnp.where(x > 0, bins + 1 + size, bins - 1 - size))
        slot = jnp.where(jnp.isnan(x), missing, slot)
        return s.at[slot, jnp.arange(x.shape[1])[None, :]].add(1)

    def finish(s: Any) -> Any:
        cumulative = jnp.cumsum(s[..., :missing, :], axis=-2)
        total = cumulative[..., -1:, :]
        rows = [jnp.sum(cumulative < jnp.maximum(q * total, 1), axis=-2) for q in at]
        found = jnp.stack([values[r] for r in rows], axis=-2)
        return jnp.where(s[..., missing:, :] > 0, jnp.nan, found)

    return Reducer(lambda n: jnp.zeros((missing + 1, n), jnp.int32), update, finish)


def calibrate(
    graph: Graph,
    params: Any,
    batches: Iterable[Any],
    reducers: Mapping[str, Reducer],
    taps: Iterable[str] | None,
    side: str,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Stream batches through the traced function and reduce the activations at each tap.

    NaN activations are not skipped: the statistics of the features they meet become NaN. Empty batches are skipped.

    Args:
      graph: the traced function.
      params: the (unpruned) parameters.
      batches: of inputs, each a tuple like the traced inputs, or the one array where there is one input.
      reducers: name -> reducer.
      taps: tap ids (leaf paths); default: every convolution and matrix product.
      side: "in" for the activation that meets the parameter, "out" for the result.
      progress: show a progress bar.

    Returns:
      {tap id: {reducer name: result}}; results have a leading layer axis for parameters stacked over a scan.

    Raises:
      TraceError: unknown taps, no batches or only empty ones, or batches that do not fit.
    """
    step, states = step_of(graph, reducers, taps, side)
    seen = skipped = 0
    for batch in track(batches, "calibrating", disable=not progress):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if is_empty(graph, inputs):
            skipped += 1
            continue
        states = step(states, params, inputs)
        seen += 1
    if not seen:
        all_empty = f": all {skipped} are empty" if skipped else ""
        raise TraceError(f"calibration got no batches{all_empty}; pass at least one with samples")
    return {t: {r: reducers[r].finish(s[r]) for r in s} for t, s in states.items()}


def is_empty(graph: Graph, inputs: tuple[Any, ...]) -> bool:
    """Whether an input has no entries that had some when it was traced."""
    given = [np.shape(x) for x in jax.tree.leaves(inputs)]
    if len(given) != len(graph.inputs.shapes):
        return False  # the step says what does not fit
    return any(0 in new and 0 not in old for new, old in zip(given, graph.inputs.shapes, strict=True))


def step_of(
    graph: Graph, reducers: Mapping[str, Reducer], taps: Iterable[str] | None = None, side: str = "in"
) -> tuple[Callable[[Any, Any, Any], Any], dict[str, dict[str, Any]]]:
    """One calibration step and its initial state, to jit, shard or compile ahead of time oneself.

    Args and errors are those of `calibrate`.

    Returns:
      (step, states): step(states, params, tuple of inputs) -> states, jitted; states are {tap id: {reducer: state}}.
    """
    chosen = _choose(graph, taps, side)
    run, states = probed(graph, {t.id: _probe(t, reducers, side) for t in chosen})

    @jax.jit
    def step(states: Any, params: Any, inputs: Any) -> Any:
        return run(states, params, *inputs)[1]

    return step, states


def _probe(tap: Tap, reducers: Mapping[str, Reducer], side: str) -> Probe:
    use, entering = tap.use, side == "in"
    layouts, axes = (tap.in_layouts, use.data_features) if entering else (tap.out_layouts, use.out_features)
    features = int(np.prod([L.full_size(a) for a in layouts], dtype=np.int64))

    def update(states: Any, value: Any) -> Any:
        x = _as_samples(value, axes)
        if not x.shape[0]:  # means and maxima of nothing are undefined
            return states
        return {r: reducers[r].update(states[r], x) for r in reducers}

    point = Point(use.path, use.data_operand if entering else 0, not entering)
    init = {r: reducers[r].init(features) for r in reducers}
    return Probe((point,), init, update, tap.scan_path, tap.layers)


def _choose(graph: Graph, taps: Iterable[str] | None, side: str) -> list[Tap]:
    if side not in ("in", "out"):
        raise TraceError(f"side must be 'in' or 'out', not {side!r}")
    if taps is None:
        names = [t for t, tap in graph.taps.items() if tap.primitive in DENSE_CONTRACTIONS]
    else:
        names = list(taps)
        for t in names:
            if t not in graph.taps:
                raise TraceError(f"there is no tap {t!r}{suggest(t, graph.taps)}")
    chosen = [graph.taps[t] for t in names]
    for tap in chosen:
        if not (tap.in_layouts if side == "in" else tap.out_layouts):
            raise TraceError(f"tap {tap.id!r} ({tap.primitive}) has no feature axes on its {side!r} side")
    return chosen


def _as_samples(x: Any, axes: tuple[int, ...]) -> Any:
    rest = [i for i in range(x.ndim) if i not in axes]
    features = int(np.prod([x.shape[i] for i in axes], dtype=np.int64))
    return jnp.transpose(x, (*rest, *axes)).reshape(-1, features).astype(jnp.float32)


def in_weight_order(tap: Tap, x: Float[np.ndarray, " features"]) -> Float[np.ndarray, " features"]:
    """A vector over the features that enter a matrix product, from the data's order (that of statistics) to the weights'.

    They differ where several axes are summed over: the heads and the channels of an attention's output.
    """
    contracted, _ = tap.use.eqn.params["dimension_numbers"]
    shape = tap.use.eqn.invars[tap.use.data_operand].aval.shape
    order = np.argsort(contracted[tap.use.leaf_operand])
    return x.reshape([shape[a] for a in tap.use.data_features]).transpose(order).reshape(-1)
