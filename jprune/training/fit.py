"""Training for a number of steps: any loss of any function's parameters, by AdamW or by an optimiser of your own.

    for each step:  gradients of the micro-batches, averaged -> clipped by their global norm -> optimiser at rate(step)

What is trained has gradients and optimiser states; what is frozen is an argument that is never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from jprune.training.checkpoints import fingerprint
from jprune.training.config import TuningConfig
from jprune.training.gradients import accumulated, clipped
from jprune.training.state import TrainState, descend, init_state, update_of
from jprune.training.steps import each_step, run_steps

Objective: TypeAlias = Callable[..., Any]  # (params, batch, key, *frozen, **rest) -> scalar or (scalar, {name: scalar})


def fit(
    loss: Objective,
    params: Any,
    batches: Callable[[int], Any],
    config: TuningConfig,
    *,
    frozen: Sequence[Any] = (),
    rest: Mapping[str, Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    recipe: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: bool | Progress = True,
    title: str = "fit",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Any, list[float]]:
    """Train the parameters of any function; a run that was killed is resumed with the same bits.

    Args:
      loss: (params, batch, key, *frozen, **rest) -> scalar, or (scalar, {name: scalar}) whose entries are logged. With
        `config.accumulate` it has to be a mean over the batch's rows, to be that of the whole batch. Calls with the same
        function share one compiled program.
      params: any pytree of arrays; left untouched, and trained where they lie.
      batches: step (0, 1, ..) -> batch, a pytree of arrays, always the same one for a step.
      config: steps, rates, clipping, micro-batches, seed of the keys.
      frozen: arrays that the loss needs besides: a teacher, an encoder, the weights below adapters.
      rest: {name: arrays} that the loss needs too and that belong to the run, such as masks: they are in its checkpoints,
        and a resumed run has those.
      optimizer: replaces AdamW and its rates; it receives `learning_rate` if it takes extra arguments.
      recipe: plain data that tells this run from others in the same folder.
      out: folder for metrics.jsonl and checkpoints.
      resume: go on from its last checkpoint, or start if there is none.
      save_every: steps between checkpoints; 0: only the last step's.
      progress: a bar (lines in a log), or a task on the caller's bars.
      title: of the bar.
      on_step: called with (steps done, {"loss", "gradient_norm", ..}), a little late.

    Returns:
      The trained parameters, and the loss of every step of this call.

    Raises:
      ValueError: a loss that is no scalar or not finite, rows that `config.accumulate` does not divide, or a folder with
        another run.

    >>> import jax.numpy as jnp, numpy as np
    >>> from jprune.training import TuningConfig, fit
    >>> x = np.linspace(-1, 1, 8, dtype=np.float32)
    >>> def loss(params, batch, key):
    ...     return jnp.mean((params["slope"] * batch - 3 * batch) ** 2)
    >>> config = TuningConfig(steps=60, learning_rate=0.2)
    >>> params, losses = fit(loss, {"slope": jnp.zeros(())}, lambda step: x, config, progress=False)
    >>> round(float(params["slope"]), 1), len(losses)
    (3.0, 60)
    """
    stages = config.stages if optimizer is None else (optimizer,)
    advance = _compiled(loss, tuple(map(update_of, stages)), config.accumulate, config.clip)
    state = init_state(params, rest or {}, stages)
    rates, key, frozen = config.rates, jax.random.key(config.seed), tuple(frozen)
    done = run_steps(
        state,
        lambda state, step, batch: advance(state, batch, key, rates[step], frozen),
        each_step(batches),
        config.steps,
        recipe={"tuning": dataclasses.asdict(config), **(recipe or {}), "state": fingerprint(state._asdict())},
        out=out,
        resume=resume,
        save_every=save_every,
        progress=progress,
        title=title,
        on_step=on_step,
    )
    return done.state.params, done.losses


def _compiled(*static: Any) -> Callable[..., Any]:
    try:
        return _cached(*static)
    except TypeError:  # a loss that does not hash still works, only the cache is lost
        return _cached.__wrapped__(*static)


@functools.lru_cache(maxsize=16)
def _cached(
    loss: Objective, stages: tuple[optax.GradientTransformation, ...], accumulate: int, clip: float
) -> Callable[..., Any]:
    """jit of (state, batch, key, rate, frozen) -> (state, metrics); the state is donated."""

    def objective(params: Any, part: Any, key: Any, frozen: Any, rest: Any) -> tuple[Any, Mapping[str, Any]]:
        out = loss(params, part, key, *frozen, **rest)
        value, metrics = out if isinstance(out, tuple) else (out, {})
        if np.shape(value) != ():
            raise ValueError(f"the loss has the shape {np.shape(value)}: it must be a scalar, such as a mean")
        return value, metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Any, key: Any, rate: Any, frozen: Any) -> tuple[TrainState, dict[str, Any]]:
        def of(part: Any, key: Any) -> Any:
            return jax.value_and_grad(objective, has_aux=True)(state.params, part, key, frozen, state.rest)

        (value, metrics), grads = accumulated(of, batch, accumulate, jax.random.fold_in(key, state.step))
        grads, norm = clipped(grads, clip)
        metrics = {"loss": value, "gradient_norm": norm, **metrics}
        return descend(stages, state, grads, rate), {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return step
