"""A run of iCBS: all its steps, shown, written down and gone on with like any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jprune.methods.weights.icbs.steps import ICBSConfig, Importance, Losses, Orders, State, schedule, step
from jprune.training.steps import Trained, each_step, run_steps


def icbs(
    losses: Losses,
    params: Any,
    state: State,
    batch_of_step: Callable[[int], Any],
    config: ICBSConfig,
    orders: Orders,
    *,
    importance: Importance | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: Any = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """All steps from `state` on; host-side. A run that was interrupted ends with the masks of one that was not.

    Args:
      losses: (params, batch) -> loss of every sample.
      params: the trained ones.
      state: from `jprune.methods.weights.icbs.steps.initial`.
      batch_of_step: step -> batch, always the same one for a step; another one every step, or the mask fits a few.
      config: settings.
      orders: from `orders_of`.
      importance: what `step` needs for selection="wanda".
      seed: of the schedule and the solver.
      out: folder for metrics.jsonl (loss before the step, E, predicted change, flips) and checkpoints.
      resume, save_every, progress, on_step: as `jprune.training.steps.run_steps` has them.

    Returns:
      What `run_steps` returns; its `state` has the masks.

    Raises:
      ValueError: what `step` and `run_steps` refuse.
    """
    parts = schedule(orders, config.steps, config.parts_per_step, seed)
    key = jax.random.key(seed)

    def advance(now: Any, k: int, batch: Any) -> Any:
        new, info = step(jax.random.fold_in(key, k), losses, params, now, parts[k], batch, config, orders, importance)
        summed = {name: sum(v.sum() for v in getattr(info, name).values()) for name in ("energy", "predicted", "flips")}
        return new, {"loss": info.loss, **summed}

    recipe = {"method": "icbs", "seed": seed, **dataclasses.asdict(config)}
    state_: Any = state
    return run_steps(state_, advance, each_step(batch_of_step), config.steps, recipe=recipe, out=out, resume=resume,
                     save_every=save_every, progress=progress, title="icbs", on_step=on_step)  # fmt: skip
