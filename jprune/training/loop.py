"""Training a classifier by epochs: the recipe, the data and the evaluation that `run_steps` knows nothing of.

    for each epoch, for each batch:  state <- step(state, batch)          one compiled program
        gradients (of micro-batches, averaged; clipped) -> `transform` -> weight decay -> momentum -> learning rate
    at the end of an epoch:          evaluate, write a line, checkpoint

A batch is a function of seed, epoch and step, so `run_steps` can go on with a killed run and end with the same bits.

On several devices every mean (of the loss, of BatchNorm's statistics) is that of the whole batch, so that a run differs
from one on a single device in the order of float32 sums only. A deep network carries such last bits far (ResNet-20 after an
epoch on the digits: weights 0.15 apart, two points of accuracy), on one device too if the weights' last bits are disturbed.
In float64 both are the same to 1e-12.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.progress import Progress

from jprune.data import Dataset, epoch_batches, steps_per_epoch, stream
from jprune.training.checkpoints import fingerprint
from jprune.training.config import TrainConfig, learning_rates, sgd
from jprune.training.evaluate import evaluate
from jprune.training.forward import Forward, as_forward, join_variables, split_variables
from jprune.training.loss import Loss, mean_cross_entropy
from jprune.training.placement import batch_sharding, data_mesh
from jprune.training.recalibrate import recalibrate
from jprune.training.state import Recipe, TrainState, compiled_step, init_state, update_of
from jprune.training.steps import Epochs, run_steps


def train(
    model: Any,
    variables: Any,
    dataset: Dataset,
    config: TrainConfig,
    *,
    transform: optax.GradientTransformation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None,
    epochs: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_epoch: Callable[[int, Any], dict[str, float]] | None = None,
    progress: bool | Progress = True,
    title: str = "train",
) -> tuple[Any, list[dict[str, Any]]]:
    """Train `variables`; returns the trained ones and the history, one record an epoch.

    model: whatever `as_forward` takes. variables: {"params": .., collections} or a bare parameter tree; left untouched.
    transform: put between the gradients and weight decay; its update receives the parameters and, if it is one with
        extra arguments, `learning_rate`. Two with the same `update` and different states share a compiled step.
    optimizer: replaces weight decay, momentum and learning rate.
    loss(logits, batch, params): a scalar, or (scalar, {name: scalar}) whose entries are logged.
    epochs: (first, last) of the recipe's epochs to run, counted from 0, last excluded: a network that changes on the
        way is trained in parts, under one learning-rate schedule and one order of the data.
    mesh: batches are split over its axis "data"; parameters that lie on it keep their sharding, others are replicated.
    out: folder for metrics.jsonl and checkpoints. resume: go on from its last checkpoint, or start if there is none.
    on_step(step, metrics) is called for every step, a little late; on_epoch(epoch, variables) after every epoch: what
        it returns joins the epoch's record; it must copy what it keeps, for the next step reuses the buffers.

    Raises ValueError for a recipe that does not fit, a folder with another run, or a loss that is no longer finite.
    """
    per_epoch = steps_per_epoch(dataset.train, config.batch_size)
    mesh = data_mesh(mesh)
    if config.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {mesh.shape['data']} devices: use a multiple"
        )
    first, final = epochs or (0, config.epochs)
    if not 0 <= first < final <= config.epochs:
        raise ValueError(
            f"epochs=({first}, {final}) must be a part of the recipe's {config.epochs}, at least one epoch"
        )
    forward = as_forward(model)
    if config.dtype != "float32" and not forward.casts:
        raise ValueError(
            f"a traced function computes in the dtypes it was traced with: trace it in {config.dtype} instead"
        )
    if loss is None:
        _check_logits(forward, variables, dataset, config.batch_size)
        loss = mean_cross_entropy(config.label_smoothing)
    descent = optimizer if optimizer is not None else sgd(config.weight_decay, config.momentum, config.nesterov)
    stages = (descent,) if transform is None else (transform, descent)

    params, rest = split_variables(variables)
    state = init_state(params, rest, stages, mesh)
    shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(state))
    wrapped, updates = params is not variables, tuple(map(update_of, stages))
    advance = compiled_step(
        Recipe(forward, updates, loss, config.dtype, wrapped, shardings, config.accumulate, config.clip)
    )
    rates = learning_rates(config, per_epoch)[: final * per_epoch]
    state = state._replace(step=jax.device_put(state.step + first * per_epoch, state.step.sharding))
    key = jax.random.key(config.seed)

    def batches(start: int) -> Iterator[Any]:
        epoch, skipped = divmod(start, per_epoch)
        while True:
            drawn = epoch_batches(dataset.train, config.batch_size, seed=config.seed, epoch=epoch)
            yield from (jax.device_put(batch, batch_sharding(mesh)) for batch in stream(drawn, start=skipped))
            epoch, skipped = epoch + 1, 0

    def end_of_epoch(state: TrainState, epoch: int) -> tuple[TrainState, dict[str, Any]]:
        record: dict[str, Any] = {"learning_rate": float(rates[epoch * per_epoch - 1])}  # the last step's, not the mean
        current = join_variables(variables, state.params, state.rest)
        if n := config.recalibrate_examples:
            where = {"batch_size": config.batch_size, "seed": config.seed, "epoch": epoch - 1, "mesh": mesh}
            current = recalibrate(forward, current, dataset, examples=n, **where)
            state = state._replace(rest=split_variables(current)[1])
        if epoch == final or (config.eval_every_epochs and epoch % config.eval_every_epochs == 0):
            result = evaluate(forward, current, dataset, config.batch_size, mesh=mesh)
            record |= {"test_accuracy": result.accuracy, "test_loss": result.loss}
        if on_epoch is not None:
            record |= on_epoch(epoch, current) or {}
        return state, record

    done = run_steps(
        state,
        lambda state, step, batch: advance(state, batch, key, rates[step]),
        batches,
        len(rates),
        recipe=_recipe(config, dataset, variables) | ({} if epochs is None else {"part": [first, final]}),
        epochs=Epochs(per_epoch, config.epochs, end_of_epoch),
        out=out,
        resume=resume,
        save_every=config.checkpoint_every_steps,
        log_every=config.log_every_steps,
        progress=progress,
        title=title,
        on_step=on_step,
    )
    return join_variables(variables, done.state.params, done.state.rest), done.history


# settings that a recipe names only where they differ from this, so that runs from before they existed can be resumed
_UNSAID = {"accumulate": 1, "clip": math.inf}


def _check_logits(forward: Forward, variables: Any, dataset: Dataset, batch_size: int) -> None:
    image = jax.ShapeDtypeStruct((batch_size, *dataset.image_shape), "float32")
    shape = jax.eval_shape(forward.evaluate, variables, image).shape
    if shape != (batch_size, dataset.num_classes):
        raise ValueError(
            f"the model gives {shape} for {batch_size} images and {dataset.name} has {dataset.num_classes} classes: "
            "build the model for that many classes, or give your own loss="
        )


def _recipe(config: TrainConfig, dataset: Dataset, variables: Any) -> dict[str, Any]:
    return {
        **{k: v for k, v in dataclasses.asdict(config).items() if v != _UNSAID.get(k)},
        "dataset": f"{dataset.name}, {len(dataset.train)} training images {list(dataset.image_shape)}",
        "model": f"{len(jax.tree.leaves(variables))} leaves, {fingerprint(variables)}",
    }
