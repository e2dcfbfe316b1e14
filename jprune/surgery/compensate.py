"""Bias compensation: what the removed channels gave on average moves into the bias or BatchNorm mean that follows.

A removed channel whose activation is the constant c adds sum_k W[k, i, :] c to its consumer's result, away from
zero-padded borders; one that varies adds that on average, with c its mean. Used for channels that a vanished scale
has made constant, and for statistics-driven pruning in general.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune.surgery.compact import indices_of
from jprune.surgery.decision import Keep, decide
from jprune.trace.leafpaths import flatten, path_str
from jprune.trace.structure import Structure, Tap

CONTRACTIONS = ("dot_general", "conv_general_dilated")


class Compensated(NamedTuple):
    """Dense parameters with moved biases, and why a consumer could not be compensated: {tap id: reason}."""

    params: Any
    skipped: dict[str, str]


def compensate(structure: Structure, params: Any, keep: Keep, means: Mapping[str, Any]) -> Compensated:
    """Add the mean contribution of the channels to be removed to the biases behind their consumers.

    Args:
      structure: the graph.
      params: the dense parameters.
      keep: the decision; apply it to the returned parameters afterwards.
      means: {tap id: mean of each input feature}, as `graph.calibrate(params, batches, {"mean": taps.mean()})` gives
        under "mean".

    Returns:
      The edited dense parameters, and the consumers for which there is no bias to edit, with the reason.
    """
    decision = decide(structure, keep, True, True)
    values = dict(flatten(params))
    skipped: dict[str, str] = {}
    for tap in structure.taps.values():
        if tap.primitive not in CONTRACTIONS:
            continue
        gone = indices_of(tap.in_layouts, decision.slots, None)
        if not gone:
            continue
        reason = _move(structure, tap, {a: np.asarray(i[0]) for a, i in gone.items()}, values, means)
        if reason:
            skipped[tap.id] = reason
    new = jax.tree_util.tree_map_with_path(lambda p, x: values[path_str(p)], params)
    return Compensated(new, skipped)


def _move(structure: Structure, tap: Tap, kept: Mapping[int, np.ndarray], values: dict[str, Any], means: Any) -> str:
    if tap.layers is not None:
        return "its weights are stacked for a scan: unstack them first"
    if tap.id not in means:
        return "no mean was given for it"
    records = structure.analysis.records
    result = records[tap.use.path][1][0]
    readers = [(path, k) for path, (ins, _) in records.items() for k, v in enumerate(ins) if v is result]
    biases = [u for u in structure.analysis.uses.values() if (u.path, u.data_operand) in readers]
    biases = [u for u in biases if u.primitive == "add" or (u.primitive == "sub" and u.leaf_operand == 1)]
    if len(biases) != 1 or len({path for path, _ in readers}) != 1:
        return "no bias or running mean follows it directly"
    operand = records[tap.use.path][0][tap.use.data_operand]
    features = [operand.shape[a] for a in tap.use.data_features]
    constant = np.asarray(jax.device_get(means[tap.id]), np.float32).reshape(features)
    inside = np.ones(features, bool)
    for axis, index in kept.items():
        stays = np.zeros(features[axis], bool)
        stays[index.ravel()] = True
        inside &= stays.reshape([-1 if i == axis else 1 for i in range(len(features))])
    constant = np.where(inside, 0.0, constant)
    shift = _contract(tap, operand.shape, constant, values[tap.leaf])
    if shift is None:
        return "a transposed convolution spreads a constant unevenly"
    (bias,) = biases
    old = values[bias.leaf]
    sign = 1.0 if bias.primitive == "add" else -1.0
    if shift.size != old.size:
        return f"{bias.leaf} has {old.size} entries for {shift.size} features"
    values[bias.leaf] = (old.astype(jnp.float32) + sign * shift.reshape(old.shape)).astype(old.dtype)
    return ""


def _contract(tap: Tap, shape: tuple[int, ...], constant: np.ndarray, leaf: Any) -> Any:
    """The consumer's result for an input that is this constant everywhere, by its own equation on one position."""
    eqn, features = tap.use.eqn, tap.use.data_features
    params = dict(eqn.params)
    position = [constant.shape[features.index(a)] if a in features else 1 for a in range(len(shape))]
    if tap.primitive == "conv_general_dilated":
        if any(d != 1 for d in params["lhs_dilation"]):
            return None
        numbers = params["dimension_numbers"]
        for k, (axis, kernel_axis) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True)):
            position[axis] = (leaf.shape[kernel_axis] - 1) * params["rhs_dilation"][k] + 1
        spatial = len(numbers.lhs_spec) - 2
        params.update(padding=((0, 0),) * spatial, window_strides=(1,) * spatial)
    order = sorted(range(len(features)), key=lambda k: features[k])
    laid = np.transpose(constant, order).reshape([n if a in features else 1 for a, n in enumerate(position)])
    data = jnp.broadcast_to(jnp.asarray(laid, jnp.float32), position)
    operands = (
        [data, jnp.asarray(leaf, jnp.float32)] if tap.use.data_operand == 0 else [jnp.asarray(leaf, jnp.float32), data]
    )
    params["preferred_element_type"] = jnp.dtype(jnp.float32)
    return eqn.primitive.bind(*operands, **params)
