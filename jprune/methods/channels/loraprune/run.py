"""LoRAPrune's loop: adapters are trained while heads and MLP channels are masked out, then merged and sliced.

for each step:  gradients of the adapters, accumulated and clipped -> importance -> moving average
                at a pruning step: masks            (a second small program; they change the next step's pass)
                AdamW on the adapters
at the end:     W + s B A, sliced by the masks

result = loraprune(graph, params, batches, LoraPruneConfig(), TuningConfig(300))
merged, keep = finalize(graph, params, result.lora, result.masks)
small = graph.compact(merged, keep)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from rich.progress import Progress

from jprune.graph import Graph
from jprune.language.blocks import blocks
from jprune.language.finetune import Loss, next_token
from jprune.language.lora import Lora, LoraConfig, init, merge, products
from jprune.methods.channels.loraprune.loraprune import CRITERIA, Criterion, Scores, ema_update, group_importance
from jprune.methods.channels.loraprune.masks import Unit, cubic_sparsity, prunable, pruned_units, update_masks
from jprune.surgery.decision import decide
from jprune.tracing.paths import flatten, with_leaves
from jprune.training.checkpoints import fingerprint
from jprune.training.config import TuningConfig, check_settings
from jprune.training.gradients import accumulated, clipped
from jprune.training.state import TrainState, descend, init_state
from jprune.training.steps import each_step, run_steps

Dequantize: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class LoraPruneConfig:
    """What is pruned, when, and by which scores.

    Attributes:
      sparsity: share of the units of every prunable layer that goes in the end.
      initial: share that is gone from the first pruning step on.
      warmup, cooldown: shares of the steps before the schedule leaves `initial` and after it has reached `sparsity`.
      every: steps between pruning steps.
      final_exact: one more pruning step where the schedule reaches `sparsity`. The published loop has none and stops just
        below, which the rounding down turns into one unit less.
      unit, parts, skip_first, skip_last: see `jprune.methods.channels.loraprune.masks.prunable`.
      multiple_of: what the kept MLP channels are rounded up to in the end.
      criterion, cross_term, power, chunk: see `jprune.methods.channels.loraprune.loraprune.group_importance`.
      ema: what the moving average keeps of itself in a step.
      lora: of the adapters.
    """

    sparsity: float = 0.5
    initial: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    every: int = 10
    final_exact: bool = True
    unit: Unit = "auto"
    parts: tuple[str, ...] = ("attention", "mlp")
    skip_first: float = 0.1
    skip_last: float = 1
    multiple_of: int = 1
    criterion: Criterion = "lora"
    cross_term: bool = True
    power: int = 1
    chunk: int = 1024
    ema: float = 0.9
    lora: LoraConfig = LoraConfig(dropout=0.05)

    def __post_init__(self):
        rules = [
            ("sparsity", 0 <= self.initial <= self.sparsity < 1, "at least `initial`, and below 1"),
            ("warmup", self.warmup >= 0 and self.warmup + self.cooldown < 1, "at least 0, below 1 with the cooldown"),
            ("cooldown", self.cooldown >= 0, "at least 0"),
            ("every", self.every >= 1, "at least 1"),
            ("multiple_of", self.multiple_of >= 1, "at least 1"),
            ("criterion", self.criterion in CRITERIA, f"one of {CRITERIA}"),
            ("power", self.power >= 1, "at least 1"),
            ("chunk", self.chunk >= 1, "at least 1"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
        ]
        check_settings(self, rules)


class Result(NamedTuple):
    """Adapters, masks and moving averages {group: (size,) or (layers, size)}, and the loss of every step run."""

    lora: Lora
    masks: Scores
    ema: Scores
    losses: list[float]


def pruning_steps(options: LoraPruneConfig, steps: int) -> dict[int, float]:
    """{step: share pruned from there on}: every so many steps while the schedule rises, and where it has risen.

    Raises:
      ValueError: there is none, so nothing would be pruned.
    """
    o = options
    at = {t: cubic_sparsity(t, steps, warmup=o.warmup, cooldown=o.cooldown, init=o.initial, final=o.sparsity)
          for t in range(steps)}  # fmt: skip
    out = {t: s for t, s in at.items() if t % o.every == 0 and o.initial < s < o.sparsity}
    full = [t for t, s in at.items() if s >= o.sparsity]
    if o.final_exact and o.sparsity > 0 and (full or out):
        out[full[0] if full else steps - 1] = o.sparsity  # a cooldown of less than one step begins behind the last
    if not out and o.sparsity > 0:
        raise ValueError(
            f"none of {steps} steps is a pruning step (every {o.every}, the schedule rises between {o.warmup:.0%} and "
            f"{1 - o.cooldown:.0%} of them): give more steps, or a smaller `every`"
        )
    return out


def unit_counts(graph: Graph, options: LoraPruneConfig, groups: Iterable[str], sparsity: float) -> dict[str, np.int32]:
    """{group: units to be gone per layer} at a share: rounded down, and never more than in the end."""
    channels = {b.ffn for b in blocks(graph)}
    out = {}
    for g in groups:
        size = graph.groups[g].size
        last = pruned_units(size, options.sparsity, options.multiple_of if g in channels else 1)
        out[g] = np.int32(last if sparsity >= options.sparsity else min(math.floor(size * sparsity), last))
    return out


def gradient(graph: Graph, options: LoraPruneConfig, lora: Lora, loss: Loss) -> Callable[..., Any]:
    """of(params, lora, masks, batch, key) -> (loss, (adapters' gradients, {leaf path: gradient})).

    The second is empty but for criterion "grad", which needs the gradients of the frozen matrices as well.
    """
    paths = [p.tap.leaf for p in products(graph, list(lora)).values()] if options.criterion == "grad" else []

    def of(params: Any, lora: Lora, masks: Scores, batch: Any, key: Any) -> Any:
        values = dict(flatten(params))

        def value(lora: Lora, leaves: Any) -> Any:
            return loss(with_leaves(params, leaves), lora, masks, batch, key)

        return jax.value_and_grad(value, argnums=(0, 1))(lora, {p: values[p] for p in paths})

    return of


def step_of(
    graph: Graph,
    options: LoraPruneConfig,
    tuning: TuningConfig,
    lora: Lora,
    loss: Loss,
    dequantize: Dequantize | None = None,
) -> Callable[..., Any]:
    """step(state, params, batch, rate) -> (state, metrics): one optimiser step, to jit, shard or compile ahead oneself.

    `state.params` are the adapters, `state.rest` has "ema" and "masks", of the groups to be scored.
    """
    of, key = gradient(graph, options, lora, loss), jax.random.key(tuning.seed)
    whole = dequantize or _as_they_are

    def step(state: TrainState, params: Any, batch: Any, rate: Any) -> tuple[TrainState, dict[str, Any]]:
        lora, masks, ema = state.params, state.rest["masks"], state.rest["ema"]
        own, scoring = jax.random.split(jax.random.fold_in(key, state.step))
        value, (grads, weight_grads) = accumulated(
            lambda part, k: of(whole(params), lora, masks, part, k), batch, tuning.accumulate, own
        )
        grads, norm = clipped(grads, tuning.clip)
        importance = group_importance(
            graph, whole(params), lora, grads, list(ema), criterion=options.criterion,
            weight_grads=weight_grads or None, key=scoring, cross_term=options.cross_term, power=options.power,
            chunk=options.chunk,
        )  # fmt: skip
        rest = {"masks": masks, "ema": ema_update(ema, importance, options.ema)}
        kept = sum(jnp.sum(m) for m in masks.values()) / sum(m.size for m in masks.values())
        return descend(tuning.stages, state, grads, rate, rest), {
            "loss": value,
            "gradient_norm": norm,
            "kept": kept,
        }

    return step


def _as_they_are(params: Any) -> Any:
    return params


def loraprune(
    graph: Graph,
    params: Any,
    batches: Callable[[int], Any],
    options: LoraPruneConfig,
    tuning: TuningConfig,
    *,
    lora: Lora | None = None,
    loss: Loss | None = None,
    dequantize: Dequantize | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: bool | Progress = False,
    title: str = "tuning",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Result:
    """Train adapters and prune on the way; `finalize` makes weights and a keep set of the result. Two programs compile.

    Args:
      graph: of the dense decoder.
      params: its parameters, which stay as they are.
      batches: step -> batch, always the same one for a step.
      options: what is pruned, when, by which scores.
      tuning: the adapters' training.
      lora: adapters to start from, with their own scale; by default `init(jax.random.key(tuning.seed), graph, options.lora)`.
      loss: (params, adapters, masks, batch, key) -> scalar; by default `next_token(graph, options.lora.dropout)`. A forward
        pass of your own has to apply the masks.
      dequantize: from what `params` holds (8-bit weights and their scales, say) to the traced parameters.
      out, resume, save_every, progress, title, on_step: as in `jprune.training.fit`.

    Raises:
      ValueError: a schedule without pruning steps, units the decoder does not have, or what `recover` raises.
    """
    rows = prunable(graph, unit=options.unit, parts=options.parts, skip_first=options.skip_first,
                    skip_last=options.skip_last)  # fmt: skip
    due, rates = pruning_steps(options, tuning.steps), tuning.rates
    lora = init(jax.random.key(tuning.seed), graph, options.lora) if lora is None else lora
    step = jax.jit(
        step_of(graph, options, tuning, lora, loss or next_token(graph, options.lora.dropout), dequantize),
        donate_argnums=0,
    )

    @jax.jit
    def prune(rest: Any, counts: Any) -> Any:
        return {**rest, "masks": update_masks(rest["ema"], rest["masks"], counts, rows)}

    def advance(state: TrainState, t: int, batch: Any) -> tuple[TrainState, Any]:
        state, metrics = step(state, params, batch, rates[t])
        if t in due:
            state = state._replace(rest=prune(state.rest, unit_counts(graph, options, rows, due[t])))
        return state, metrics

    shapes = {g: graph.groups[g].shape for g in rows}
    rest = {"masks": {g: jnp.ones(s) for g, s in shapes.items()}, "ema": {g: jnp.zeros(s) for g, s in shapes.items()}}
    state = init_state(lora, rest, tuning.stages)
    done = run_steps(
        state,
        advance,
        each_step(batches),
        tuning.steps,
        recipe={
            "tuning": dataclasses.asdict(tuning),
            "loraprune": dataclasses.asdict(options),
            "scales": dict(lora.scales),
            "state": fingerprint(state._asdict()),
        },
        out=out,
        resume=resume,
        save_every=save_every,
        progress=progress,
        title=title,
        on_step=on_step,
    )
    return Result(done.state.params, done.state.rest["masks"], done.state.rest["ema"], done.losses)


def finalize(graph: Graph, params: Any, lora: Lora, masks: Scores) -> tuple[Any, dict[str, Bool[np.ndarray, ...]]]:
    """(dense parameters with the adapters merged in float32, keep set), for `graph.compact(params, keep)`; host-side.

    Raises:
      KeepError, NotPrunable: masks that are no keep set of this graph.
    """
    keep = {g: np.asarray(jax.device_get(m)) > 0.5 for g, m in masks.items()}
    decide(graph, keep)
    return jax.jit(functools.partial(merge, graph))(params, lora), keep
