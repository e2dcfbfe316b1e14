"""Bias compensation: what the removed channels gave on average moves into the bias or BatchNorm mean that follows.

A removed channel whose activation is the constant c adds sum_k W[k, i, :] c to its consumer's result, away from
zero-padded borders; one that varies adds that on average, with c its mean. Used for channels that a vanished scale
has made constant, and for statistics-driven pruning in general.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune.surgery.decision import Keep, axis_index, decide, touched
from jprune.tracing import operand as moves
from jprune.tracing.flow import Flow
from jprune.tracing.paths import flatten, path_str
from jprune.tracing.primitives import DENSE_CONTRACTIONS
from jprune.tracing.structure import Tap

if TYPE_CHECKING:
    from jprune.graph import Graph


class Compensated(NamedTuple):
    """Dense parameters with moved biases, and why a consumer could not be compensated: {tap id: reason}."""

    params: Any
    skipped: dict[str, str]


def compensate(graph: Graph, params: Any, keep: Keep, means: Mapping[str, Any]) -> Compensated:
    """Add the mean contribution of the channels to be removed to the biases behind their consumers.

    Args:
      graph: the traced function.
      params: the dense parameters.
      keep: the decision; apply it to the returned parameters afterwards.
      means: {tap id: mean of each input feature}, as `graph.calibrate(params, batches, {"mean": taps.mean()})` gives
        under "mean".

    Returns:
      The edited dense parameters, and the consumers for which there is no bias to edit, with the reason.
    """
    decision = decide(graph, keep, True, True)
    values, flow = dict(flatten(params)), Flow(graph)
    skipped: dict[str, str] = {}
    for tap in graph.taps.values():
        if tap.primitive not in DENSE_CONTRACTIONS:
            continue
        gone = {
            a: axis_index(lay, decision.slots) for a, lay in enumerate(tap.in_layouts) if touched(lay, decision.keep)
        }
        if not gone:
            continue
        reason = _move(graph, flow, tap, gone, values, means)
        if reason:
            skipped[tap.id] = reason
    new = jax.tree_util.tree_map_with_path(lambda p, x: values[path_str(p)], params)
    return Compensated(new, skipped)


def _move(graph: Graph, flow: Flow, tap: Tap, kept: Mapping[int, Any], values: dict[str, Any], means: Any) -> str:
    """Move what one consumer loses into the bias behind it; why that cannot be done, or ""."""
    if tap.id not in means:
        return "no mean was given for it"
    if reason := moves.check(tap.use.moves, tap.layers):
        return reason
    product = flow.steps[tap.use.path]
    (result,) = product.outs
    readers = {s.path: s for s in flow.read_by(result) if not s.is_call}
    biases = [
        u
        for u in graph.analysis.uses.values()
        if u.path in readers and readers[u.path].ins[u.data_operand] is result
        if u.primitive == "add" or (u.primitive == "sub" and u.leaf_operand == 1)
    ]
    if len(biases) != 1 or len(readers) != 1:
        return "no bias or running mean follows it directly"
    (bias,) = biases
    layer_axis = graph.leaves[bias.leaf].layer_axis
    if (layer_axis is None) != (tap.layers is None):
        return f"{bias.leaf} is shared by layers whose weights are not, or the other way round"
    operand = product.ins[tap.use.data_operand]
    features = [operand.shape[a] for a in tap.use.data_features]
    constants = np.asarray(jax.device_get(means[tap.id]), np.float32).reshape(tap.layers or 1, *features)
    weights = moves.operand(tap.use.moves, jnp.asarray(values[tap.leaf], jnp.float32))
    shifts = []
    for layer, constant in enumerate(constants):
        lost = np.where(_stays(kept, features, layer), 0.0, constant)
        shifts.append(_contract(tap, operand.shape, lost, weights if tap.layers is None else weights[layer]))
    if any(s is None for s in shifts):
        return "a transposed convolution spreads a constant unevenly"
    old = values[bias.leaf]
    laid = old.astype(jnp.float32)
    rows = laid[None] if layer_axis is None else jnp.moveaxis(laid, layer_axis, 0)
    if shifts[0].size != rows[0].size:
        return f"{bias.leaf} has {rows[0].size} entries for {shifts[0].size} features"
    sign = 1.0 if bias.primitive == "add" else -1.0
    rows = rows + sign * jnp.stack([s.reshape(rows.shape[1:]) for s in shifts])
    values[bias.leaf] = (rows[0] if layer_axis is None else jnp.moveaxis(rows, 0, layer_axis)).astype(old.dtype)
    return ""


def _stays(kept: Mapping[int, Any], features: list[int], layer: int) -> np.ndarray:
    """Which input features of a consumer are kept in this layer."""
    inside = np.ones(features, bool)
    for axis, (index, valid) in kept.items():
        stays = np.zeros(features[axis], bool)
        row, ok = (x[layer] if np.ndim(x) == 2 else x for x in (index, valid))
        stays[row[ok]] = True
        inside &= stays.reshape([-1 if i == axis else 1 for i in range(len(features))])
    return inside


def _contract(tap: Tap, shape: tuple[int, ...], constant: np.ndarray, weights: Any) -> Any:
    """The consumer's result for an input that is this constant everywhere, by its own equation on one position."""
    eqn, features = tap.use.eqn, tap.use.data_features
    params = dict(eqn.params)
    position = [constant.shape[features.index(a)] if a in features else 1 for a in range(len(shape))]
    if tap.primitive == "conv_general_dilated":
        if any(d != 1 for d in params["lhs_dilation"]):
            return None
        numbers = params["dimension_numbers"]
        for k, (axis, kernel_axis) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True)):
            position[axis] = (weights.shape[kernel_axis] - 1) * params["rhs_dilation"][k] + 1
        spatial = len(numbers.lhs_spec) - 2
        params.update(padding=((0, 0),) * spatial, window_strides=(1,) * spatial)
    order = sorted(range(len(features)), key=lambda k: features[k])
    laid = np.transpose(constant, order).reshape([n if a in features else 1 for a, n in enumerate(position)])
    data = jnp.broadcast_to(jnp.asarray(laid, jnp.float32), position)
    operands = [data, weights] if tap.use.data_operand == 0 else [weights, data]
    params["preferred_element_type"] = jnp.dtype(jnp.float32)
    return eqn.primitive.bind(*operands, **params)
