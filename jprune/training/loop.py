"""The training loop: one for the whole library, one device or many, resumable to the bit.

    for each epoch, for each batch:  state <- step(state, batch)          one compiled program
        gradients -> `transform` -> weight decay -> momentum -> learning rate
    at the end of an epoch:          evaluate, write a line, checkpoint

A step depends on nothing but the state, the batch (a function of seed, epoch, step) and the seed; so a run that was
killed goes on from its last checkpoint and ends with the same bits as one that was not (on GPUs under
XLA_FLAGS=--xla_gpu_deterministic_ops=true).

On several devices every mean (of the loss, of BatchNorm's statistics) is that of the whole batch, so that a run differs
from one on a single device in the order of float32 sums only. A deep network carries such last bits far (ResNet-20 after an
epoch on the digits: weights 0.15 apart, two points of accuracy), on one device too if the weights' last bits are disturbed.
In float64 both are the same to 1e-12.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.progress import Progress

from jprune.data import Dataset, epoch_batches, steps_per_epoch, stream
from jprune.tracing.paths import flatten
from jprune.training.checkpoints import Checkpoints
from jprune.training.config import TrainConfig, learning_rates, sgd
from jprune.training.evaluate import evaluate
from jprune.training.forward import Forward, as_forward, join_variables, split_variables
from jprune.training.loss import Loss, mean_cross_entropy
from jprune.training.metrics import Averages, MetricsLog
from jprune.training.placement import batch_sharding, data_mesh
from jprune.training.progress import bar
from jprune.training.recalibrate import recalibrate
from jprune.training.state import Recipe, TrainState, compiled_step, init_state, update_of

ALOFT = 2  # steps whose metrics are not fetched yet: fetching each at once would leave the device idle in between


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
    if resume and out is None:
        raise ValueError("resume=True needs out=, the folder of the run to go on with")
    out = None if out is None else Path(out)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: out= must name a folder")
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
    advance = compiled_step(
        Recipe(forward, tuple(map(update_of, stages)), loss, config.dtype, params is not variables, shardings)
    )
    first, final = epochs or (0, config.epochs)
    if not 0 <= first < final <= config.epochs:
        raise ValueError(
            f"epochs=({first}, {final}) must be a part of the recipe's {config.epochs}, at least one epoch"
        )
    rates = learning_rates(config, per_epoch)[: final * per_epoch]
    state = state._replace(step=jax.device_put(state.step + first * per_epoch, state.step.sharding))
    key = jax.random.key(config.seed)

    with contextlib.ExitStack() as stack:
        checkpoints, sums = None, {}
        if out is not None:
            recipe = _recipe(config, dataset, variables) | ({} if epochs is None else {"part": [first, final]})
            checkpoints = Checkpoints(out / "checkpoints", recipe)
            stack.callback(checkpoints.close)
            state, sums = _start(checkpoints, state, resume)
        step = int(state.step)
        log = stack.enter_context(MetricsLog(None if out is None else out / "metrics.jsonl", step))
        update = stack.enter_context(bar(progress, len(rates), title))
        averages = Averages(sums)
        flying: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

        def land(aloft: int) -> None:
            while len(flying) > aloft:
                number, values = flying.popleft()
                metrics = {k: float(v) for k, v in values.items()}
                if not math.isfinite(metrics["loss"]):
                    raise ValueError(f"the loss is {metrics['loss']} at step {number}: lower the learning rate")
                averages.add(metrics)
                if number % config.log_every_steps == 0:
                    log.append({"kind": "step", "step": number, **metrics})
                if on_step is not None:
                    on_step(number, metrics)
                update(number, f"epoch {-(-number // per_epoch)}/{config.epochs} loss {metrics['loss']:.3f}")

        update(step, "")
        while step < len(rates):
            epoch, began = step // per_epoch, time.monotonic()
            batches = epoch_batches(dataset.train, config.batch_size, seed=config.seed, epoch=epoch)
            for batch in stream(batches, start=step % per_epoch):
                state, metrics = advance(state, jax.device_put(batch, batch_sharding(mesh)), key, rates[step])
                step += 1
                flying.append((step, metrics))
                land(ALOFT)
                if checkpoints is not None and _every(config.checkpoint_every_steps, step) and step % per_epoch:
                    land(0)
                    checkpoints.save(step, state, dict(averages.sums))
            land(0)
            record = {"kind": "epoch", "step": step, "epoch": epoch + 1, **averages.means()}
            averages = Averages({})
            record["learning_rate"] = float(rates[step - 1])  # of the last step, not the mean
            current = join_variables(variables, state.params, state.rest)
            if n := config.recalibrate_examples:
                where = {"batch_size": config.batch_size, "seed": config.seed, "epoch": epoch, "mesh": mesh}
                current = recalibrate(forward, current, dataset, examples=n, **where)
                state = state._replace(rest=split_variables(current)[1])
            last = step == len(rates)
            if last or _every(config.eval_every_epochs, epoch + 1):
                result = evaluate(forward, current, dataset, config.batch_size, mesh=mesh)
                record |= {"test_accuracy": result.accuracy, "test_loss": result.loss}
            if on_epoch is not None:
                record |= on_epoch(epoch + 1, current) or {}
            log.append(record | {"seconds": round(time.monotonic() - began, 3)})
            if checkpoints is not None and (last or _every(config.checkpoint_every_steps or step, step)):
                checkpoints.save(step, state, {})
        return join_variables(variables, state.params, state.rest), log.history


def _every(interval: int, count: int) -> bool:
    return interval > 0 and count % interval == 0


def _check_logits(forward: Forward, variables: Any, dataset: Dataset, batch_size: int) -> None:
    image = jax.ShapeDtypeStruct((batch_size, *dataset.image_shape), "float32")
    shape = jax.eval_shape(forward.evaluate, variables, image).shape
    if shape != (batch_size, dataset.num_classes):
        raise ValueError(
            f"the model gives {shape} for {batch_size} images and {dataset.name} has {dataset.num_classes} classes: "
            "build the model for that many classes, or give your own loss="
        )


def _recipe(config: TrainConfig, dataset: Dataset, variables: Any) -> dict[str, Any]:
    leaves = [f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten(variables)]
    return {
        **dataclasses.asdict(config),
        "dataset": f"{dataset.name}, {len(dataset.train)} training images {list(dataset.image_shape)}",
        "model": f"{len(leaves)} leaves, {hashlib.sha256(';'.join(leaves).encode()).hexdigest()[:16]}",
    }


def _start(checkpoints: Checkpoints, state: TrainState, resume: bool) -> tuple[TrainState, dict[str, float]]:
    latest = checkpoints.latest()
    if latest is None:
        return state, {}
    if not resume:
        raise ValueError(
            f"{checkpoints.folder} already holds a run, up to step {latest}: give resume=True, or another folder"
        )
    return checkpoints.restore(latest, state)
