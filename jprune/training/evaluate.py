"""Accuracy and loss of a model on a split, every example counted exactly once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jprune.data import Dataset, Split, eval_batches, stream
from jprune.training.forward import Forward, as_forward
from jprune.training.loss import cross_entropy
from jprune.training.placement import batch_sharding, data_mesh, place_variables


class Evaluation(NamedTuple):
    """Fraction of examples classified correctly and their mean cross-entropy."""

    accuracy: float
    loss: float


def evaluate(
    model: Any, variables: Any, data: Dataset | Split, batch_size: int = 256, *, mesh: Mesh | None = None
) -> Evaluation:
    """Accuracy and mean cross-entropy over a split (of a Dataset: its test split), in evaluation mode.

    `model` is whatever `as_forward` takes. The last batch is padded with examples of weight zero, so one compiled
    program serves all batches; batch_size is rounded up to a multiple of the mesh's "data" axis.
    """
    split = data.test if isinstance(data, Dataset) else data
    mesh = data_mesh(mesh)
    batch_size = min(batch_size, len(split))
    batch_size += -batch_size % mesh.shape["data"]
    step = _compiled(as_forward(model))
    variables = place_variables(variables, mesh)
    totals: list[tuple[jax.Array, ...]] = []
    for batch in stream(eval_batches(split, batch_size)):
        totals.append(step(variables, jax.device_put(batch, batch_sharding(mesh))))
        jax.block_until_ready(totals[-3:-2])  # else a slow device would collect the batches of a fast host
    correct, loss, weight = (sum(float(t[i]) for t in totals) for i in range(3))
    return Evaluation(correct / weight, loss / weight)


@functools.lru_cache(maxsize=64)
def _compiled(forward: Forward):
    @jax.jit
    def step(variables, batch):
        logits = forward.evaluate(variables, batch["image"])
        if logits.ndim != 2:
            raise ValueError(f"the model's output has shape {logits.shape}: evaluation needs logits (batch, classes)")
        w = batch["weight"]
        right = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
        return (w * right).sum(), (w * cross_entropy(logits, batch["label"])).sum(), w.sum()

    return step
