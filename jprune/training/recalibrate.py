"""BatchNorm statistics measured anew: plain averages over training batches instead of a moving average.

After pruning, or after few steps of training, the moving averages describe another network. A layer's update is
new = m * old + (1 - m) * s, where s are the batch's own statistics; two updates, from old = 0 and old = 1, give m and
hence s for any layer that averages in this way, whatever it is called and whatever its momentum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jprune.data import Dataset, Split, epoch_batches, stream
from jprune.training.forward import Forward, as_forward
from jprune.training.placement import batch_sharding, data_mesh, place_variables


def recalibrate(
    model: Any,
    variables: Any,
    data: Dataset | Split,
    *,
    examples: int = 8192,
    batch_size: int = 256,
    seed: int = 0,
    epoch: int = 0,
    collection: str = "batch_stats",
    mesh: Mesh | None = None,
) -> Any:
    """The variables with `collection` replaced by its mean over about `examples` training examples.

    At most one pass over the split (of a Dataset: its training split), in full batches, augmented as in training.
    Statistics that a batch does not move are left as they are.

    Raises ValueError if the variables have no such collection.
    """
    if collection not in variables:
        raise ValueError(f"the variables have {sorted(variables)}, no {collection!r}: there is nothing to recalibrate")
    split = data.train if isinstance(data, Dataset) else data
    mesh = data_mesh(mesh)
    batch_size = min(batch_size, len(split))
    batch_size = max(batch_size - batch_size % mesh.shape["data"], mesh.shape["data"])
    batches = epoch_batches(split, batch_size, seed=seed, epoch=epoch)
    count = min(len(batches), max(1, round(examples / batch_size)))
    add = _compiled(as_forward(model), collection)
    placed = place_variables(dict(variables), mesh)
    total = None
    for batch in stream(batches.slice(slice(0, count))):
        total = add(placed, jax.device_put(batch["image"], batch_sharding(mesh)), total)
        jax.block_until_ready(total)
    mean = jax.tree.map(
        lambda old, t: jax.device_put((t / count).astype(old.dtype), old.sharding), placed[collection], total
    )
    return {**placed, collection: mean}


@functools.lru_cache(maxsize=16)
def _compiled(forward: Forward, collection: str):
    @jax.jit
    def add(variables, images, total):
        old = variables[collection]

        def updated(fill):
            start = jax.tree.map(lambda x: jnp.full_like(x, fill), old)
            updates = forward.train({**variables, collection: start}, images, jax.random.key(0))[1]
            return updates.get(collection, start)

        def statistics(current, from_zero, from_one):
            share = 1.0 - (from_one - from_zero).astype(jnp.float32)  # 1 - m
            own = from_zero.astype(jnp.float32) / jnp.where(share == 0, 1.0, share)
            return jnp.where(share == 0, current.astype(jnp.float32), own)

        now = jax.tree.map(statistics, old, updated(0.0), updated(1.0))
        return now if total is None else jax.tree.map(jnp.add, total, now)

    return add
