"""The loop over training steps, one for the whole library, resumable to the bit; it knows no model and no data set.

    for each step:           state, metrics <- advance(state, step, batch)
    at the end of an epoch:  what the caller does there, and a line with the means of the epoch
    now and then:            a checkpoint; the last step always has one

A step depends on nothing but the state, its number and its batch, and the batches of a step are always the same ones. So
a run that was killed goes on from its last checkpoint and ends with the same bits as one that was not (on GPUs under
XLA_FLAGS=--xla_gpu_deterministic_ops=true).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich.progress import Progress

from jprune.training.checkpoints import Checkpoints
from jprune.training.metrics import Averages, MetricsLog
from jprune.training.progress import bar
from jprune.training.state import TrainState

Advance: TypeAlias = Callable[[TrainState, int, Any], tuple[TrainState, Mapping[str, Any]]]
ALOFT = 2  # steps whose metrics are not fetched yet: fetching each at once would leave the device idle in between


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Steps in epochs of `length`; `total` epochs are said in the progress bar.

    end(state, epoch) -> (state, {name: value}): what is done after epoch 1, 2, ..; its entries join the means of the
    epoch's metrics in one record.
    """

    length: int
    total: int
    end: Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]]


class Trained(NamedTuple):
    """The last state, one record an epoch (also those before a resume), and the loss of every step of this call."""

    state: TrainState
    history: list[dict[str, Any]]
    losses: list[float]


def run_steps(
    state: TrainState,
    advance: Advance,
    batches: Callable[[int], Iterable[Any]],
    steps: int,
    *,
    recipe: Mapping[str, Any],
    epochs: Epochs | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    log_every: int = 1,
    progress: bool | Progress = False,
    title: str = "training",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """advance(state, step, batch) -> (state, {name: scalar}) from the state's step up to `steps`; host-side.

    Args:
      state: where to start, or what a checkpoint is restored into.
      advance: one step; it may give the old state's buffers away. Its metrics contain "loss".
      batches: start -> the batches of the steps from `start` on, always the same ones; see `each_step`.
      steps: number of the last one, counted from the beginning of the run.
      recipe: plain data that tells this run from others.
      epochs: what happens between epochs, if there are any.
      out: folder for metrics.jsonl and checkpoints.
      resume: go on from the folder's last checkpoint, or start if there is none.
      save_every: steps between checkpoints; 0: at the end of every epoch, without epochs only after the last step.
      log_every: steps between two lines of metrics.jsonl.
      progress: a bar (lines in a log), or a task on the caller's bars.
      title: of the bar.
      on_step: called with (steps done, metrics) for every step, a little late.

    Raises:
      ValueError: a loss that is not finite, batches that end too early, `out` is a file or holds another run or,
        without `resume`, any.
    """
    if resume and out is None:
        raise ValueError("resume=True needs out=, the folder of the run to go on with")
    out = None if out is None else Path(out)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: out= must name a folder")
    with contextlib.ExitStack() as stack:
        checkpoints, sums = None, {}
        if out is not None:
            checkpoints = Checkpoints(out / "checkpoints", dict(recipe))
            stack.callback(checkpoints.close)
            state, sums = _start(checkpoints, state, resume)
        step, losses = int(state.step), []
        log = stack.enter_context(MetricsLog(None if out is None else out / "metrics.jsonl", step))
        show = stack.enter_context(bar(progress, steps, title))
        averages = Averages(sums)
        flying: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()

        def land(aloft: int) -> None:
            while len(flying) > aloft:
                number, values = flying.popleft()
                metrics = {k: float(v) for k, v in values.items()}
                if not math.isfinite(metrics["loss"]):
                    raise ValueError(f"the loss is {metrics['loss']} at step {number}: lower the learning rate")
                losses.append(metrics["loss"])
                averages.add(metrics)
                if number % log_every == 0:
                    log.append({"kind": "step", "step": number, **metrics})
                if on_step is not None:
                    on_step(number, metrics)
                of = "" if epochs is None else f"epoch {-(-number // epochs.length)}/{epochs.total} "
                show(number, f"{of}loss {metrics['loss']:.3f}")

        show(step, "")
        source, began = iter(batches(step)), time.monotonic()
        while step < steps:
            try:
                batch = next(source)
            except StopIteration:
                raise ValueError(f"the batches end after step {step}, and {steps} are to be done") from None
            state, metrics = advance(state, step, batch)
            step += 1
            flying.append((step, metrics))
            land(ALOFT)
            over = epochs is not None and step % epochs.length == 0
            if epochs is not None and over:
                land(0)
                epoch = step // epochs.length
                state, found = epochs.end(state, epoch)
                record = {"kind": "epoch", "step": step, "epoch": epoch, **averages.means(), **found}
                log.append(record | {"seconds": round(time.monotonic() - began, 3)})
                averages, began = Averages({}), time.monotonic()
            due = step % save_every == 0 if save_every else over
            if checkpoints is not None and (due or step == steps):
                land(0)
                checkpoints.save(step, state, {} if epochs is None else dict(averages.sums))
        land(0)
        return Trained(state, log.history, losses)


def each_step(batch_of: Callable[[int], Any]) -> Callable[[int], Iterable[Any]]:
    """What `run_steps` iterates over, of a function from a step (0, 1, ..) to its batch."""
    return lambda start: map(batch_of, itertools.count(start))


def _start(checkpoints: Checkpoints, state: TrainState, resume: bool) -> tuple[TrainState, dict[str, float]]:
    latest = checkpoints.latest()
    if latest is None:
        return state, {}
    if not resume:
        raise ValueError(
            f"{checkpoints.folder} already holds a run, up to step {latest}: give resume=True, or another folder"
        )
    return checkpoints.restore(latest, state)
