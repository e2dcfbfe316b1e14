"""Recovering a decoder: adapters trained on next tokens while its own weights stay frozen.

`fit` of `jprune.training` does the training. Only the adapters have gradients and optimiser states.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from rich.progress import Progress

from jprune.graph import Graph
from jprune.language.lora import Lora, LoraConfig, adapted, init
from jprune.surgery.decision import Keep
from jprune.training.config import TuningConfig
from jprune.training.fit import Objective, fit

Loss: TypeAlias = Callable[[Any, Lora, Keep, Any, Any], Any]  # (params, adapters, masks, batch, key) -> scalar


@functools.lru_cache(maxsize=8)
def next_token(graph: Graph, dropout: float = 0.0) -> Loss:
    """The loss of a decoder with adapters: mean over all counted next tokens of -log p, in float32.

    A batch is the tuple of the traced inputs, token ids first (or the ids alone); one array more is a loss mask of the
    ids' shape, 0 at tokens that are not to be predicted.
    """
    run, n = adapted(graph, dropout), len(graph.inputs.paths)

    def loss(params: Any, lora: Lora, masks: Keep, batch: Any, key: Any) -> Float[Array, ""]:
        batch = batch if isinstance(batch, tuple | list) else (batch,)
        if not n <= len(batch) <= n + 1:
            raise ValueError(f"a batch has {len(batch)} arrays: give the function's {n} inputs, and a loss mask or not")
        ids, logits = batch[0], run(params, lora, *batch[:n], masks=masks, key=key)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
        counts = jnp.ones_like(nats) if len(batch) == n else batch[n][:, 1:].astype(jnp.float32)
        return jnp.sum(nats * counts) / jnp.maximum(jnp.sum(counts), 1)

    return loss


def recover(
    graph: Graph,
    params: Any,
    batches: Callable[[int], Any],
    tuning: TuningConfig,
    *,
    config: LoraConfig | None = None,
    lora: Lora | None = None,
    masks: Keep | None = None,
    loss: Loss | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: bool | Progress = False,
    title: str = "tuning",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Lora, list[float]]:
    """Train adapters of a (pruned) function; `merge(graph, params, lora)` puts them into the weights.

    Args:
      graph: of the function to tune.
      params: its parameters, which stay as they are.
      batches: step -> batch, always the same one for a step.
      tuning: steps, rates.
      config: of new adapters, and their dropout in training.
      lora: to start from, with their own scale; by default `init(jax.random.key(tuning.seed), graph, config)`.
      masks: {group id: 0 or 1 per unit}: tune as if these units were gone.
      loss: by default `next_token(graph, config.dropout)`.
      out, resume, save_every, progress, title, on_step: as in `fit`.

    Returns:
      The adapters, and the loss of every step of this call.

    Raises:
      ValueError: rows that `tuning.accumulate` does not divide, a loss that is not finite, or another run in `out`.
    """
    config = config or LoraConfig()
    lora = init(jax.random.key(tuning.seed), graph, config) if lora is None else lora
    return fit(
        _of_adapters(loss or next_token(graph, config.dropout)),
        lora,
        batches,
        tuning,
        frozen=(params,),
        rest={"masks": {g: jnp.asarray(m, jnp.float32) for g, m in (masks or {}).items()}},
        recipe={"lora": dataclasses.asdict(config), "scales": dict(lora.scales)},
        out=out,
        resume=resume,
        save_every=save_every,
        progress=progress,
        title=title,
        on_step=on_step,
    )


@functools.lru_cache(maxsize=16)
def _of_adapters(loss: Loss) -> Objective:
    """The same loss with the arguments in the order of `fit`: equal losses give the same function, compiled once."""
    return lambda lora, batch, key, params, masks: loss(params, lora, masks, batch, key)
