"""LoRAPrune as a method: heads and channels masked out while adapters train, then cut, the adapters merged."""

from __future__ import annotations

import dataclasses
import math

from jprune.language.lora import LoraConfig
from jprune.methods.channels.loraprune.run import LoraPruneConfig, finalize, loraprune, pruning_steps
from jprune.methods.contract import UNITS, DecoderTask, Method, Outcome, WidthConfig, check_least, cut
from jprune.training import TuningConfig
from jprune.training.decisions import Decided


def settings(task: DecoderTask, config: WidthConfig) -> LoraPruneConfig:
    """Of the whole method."""
    every = max(1, min(10, task.steps // 10))
    return LoraPruneConfig(sparsity=task.wanted.sparsity, every=every, multiple_of=config.multiple_of, criterion="lora",
                     lora=LoraConfig(rank=task.rank, alpha=2.0 * task.rank, dropout=0.05))  # fmt: skip


def check(task: DecoderTask, config: WidthConfig) -> None:
    """Refuse too few steps, and an amount that this model cannot lose."""
    if not task.steps:
        raise ValueError("method 'loraprune' prunes while it trains: give --recover STEPS, the steps it may take")
    pruning_steps(settings(task, config), task.steps)
    model, unit = task.model.config, config.multiple_of
    # heads and channels go in every layer at the same rate
    least = max(max(min(unit, n) / n, 1 / h) for n, h in zip(model.ffn, model.kv_heads, strict=True))
    check_least(task, least, unit)


def find(task: DecoderTask, config: WidthConfig) -> Outcome:
    """Train and prune, merge and cut."""
    options, sparsity = settings(task, config), task.wanted.sparsity
    said = ()
    most = max(task.model.config.kv_heads)
    if 0 < sparsity < 1 / most - 1e-6:  # as `pruned_units` rounds
        least = f"the first goes at --sparsity {math.ceil(1000 / most) / 1000:g}" if most > 1 else "it cannot go"
        said = (f"no head is removed, only channels: a layer has {most} key-value head{'s' * (most > 1)}, and the same share "
                f"of every layer's goes, rounded down; {least}",)  # fmt: skip
    folder = task.run.folder("loraprune")
    tuning = TuningConfig(task.steps, task.learning_rate, seed=task.seed)
    with task.run.counted("loraprune", task.steps) as on_step:
        result = loraprune(task.graph, task.variables, task.batch_of_step, options, tuning, out=folder,
                           resume=folder is not None, save_every=task.save_every, on_step=on_step)  # fmt: skip
    params, keep = finalize(task.graph, task.variables, result.lora, result.masks)
    notes = {"skipped": {"first": options.skip_first, "last": options.skip_last}}
    return cut(dataclasses.replace(task, variables=params), Decided(keep, notes, None, said))


METHODS = (
    Method("loraprune", "heads and channels by low-rank gradients, masked out while adapters train (LoRAPrune)",
           "decoders", find, WidthConfig, (UNITS,), check=check, trains=True),
)  # fmt: skip
