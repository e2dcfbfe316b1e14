"""Training adapters: gradients accumulated over micro-batches, clipped, AdamW; one compiled step, resumable to the bit.

    for each step:  gradients of the micro-batches, averaged -> clipped by their global norm -> AdamW at rate(step)

Only the adapters have gradients and optimiser states; what is frozen is an argument that is never differentiated. A step
depends on nothing but the state, the seed and `batches(step)`, so a run that was killed goes on from its last checkpoint
and ends with the same bits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32
from rich.progress import Progress

from jprune.language.lora import Lora, LoraConfig, adapted, init
from jprune.surgery.decision import Keep
from jprune.tracing.paths import flatten
from jprune.tracing.structure import Structure
from jprune.training.checkpoints import Checkpoints
from jprune.training.metrics import MetricsLog
from jprune.training.progress import bar
from jprune.training.state import TrainState

Loss: TypeAlias = Callable[[Any, Lora, Keep, Any, Any], Any]  # (params, adapters, masks, batch, key) -> scalar
Advance: TypeAlias = Callable[[TrainState, int, Any], tuple[TrainState, Mapping[str, Any]]]
ALOFT = 2  # steps whose metrics are not fetched yet: fetching each at once would leave the device idle in between


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How adapters are trained: AdamW with a linear warm-up (a share of the steps) and then a decay to zero.

    `accumulate` micro-batches make a step: batches have that many times the rows that are computed at once.
    """

    steps: int
    learning_rate: float = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self):
        rules = [
            ("steps", self.steps >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0 and math.isfinite(self.learning_rate), "positive and finite"),
            ("schedule", self.schedule in ("linear", "cosine", "constant"), "'linear', 'cosine' or 'constant'"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, in [0, 1)"),
            ("clip", self.clip > 0, "positive (infinity: no clipping)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"Tuning.{name} is {getattr(self, name)!r}: it must be {allowed}")

    @property
    def rates(self) -> Float32[np.ndarray, " steps"]:
        """The learning rate of every step; the first step after the warm-up has the full one."""
        t = np.arange(self.steps, dtype=np.float64)
        warm = math.ceil(self.warmup * self.steps)
        done = np.clip((t - warm) / max(self.steps - warm, 1), 0, 1)
        decay = {"linear": 1 - done, "cosine": 0.5 * (1 + np.cos(np.pi * done)), "constant": np.ones_like(done)}
        ramp = np.minimum((t + 1) / warm, 1.0) if warm else 1.0
        return np.asarray(self.learning_rate * decay[self.schedule] * ramp, np.float32)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW but for the learning rate."""
        return optax.chain(optax.scale_by_adam(*self.betas, self.eps), optax.add_decayed_weights(self.weight_decay))


def next_token(graph: Structure, dropout: float = 0.0) -> Loss:
    """The loss of a decoder with adapters: mean over all counted next tokens of -log p, in float32.

    A batch is the tuple of the traced inputs, token ids first (or the ids alone); one array more is a loss mask of the
    ids' shape, 0 at tokens that are not to be predicted.
    """
    run, n = adapted(graph, dropout), len(graph.input_dims)

    def loss(params: Any, lora: Lora, masks: Keep, batch: Any, key: Any) -> Float[Array, ""]:
        batch = batch if isinstance(batch, tuple | list) else (batch,)
        if not n <= len(batch) <= n + 1:
            raise ValueError(f"a batch has {len(batch)} arrays: give the function's {n} inputs, and a loss mask or not")
        ids, logits = batch[0], run(params, lora, *batch[:n], masks=masks, key=key)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
        counts = jnp.ones_like(nats) if len(batch) == n else batch[n][:, 1:].astype(jnp.float32)
        return jnp.sum(nats * counts) / jnp.maximum(jnp.sum(counts), 1)

    return loss


def accumulated(value_and_grad: Callable[..., Any], batch: Any, micro: int, key: Any) -> tuple[Any, Any]:
    """(mean value, mean gradients in float32) of value_and_grad(micro-batch, key) over `micro` parts of the rows.

    Raises:
      ValueError: they do not divide the rows.
    """

    def cut(x: Any) -> Any:
        if x.shape[0] % micro:
            raise ValueError(f"{x.shape[0]} rows cannot be cut into {micro} micro-batches: give a multiple")
        return jnp.reshape(x, (micro, x.shape[0] // micro, *x.shape[1:]))

    parts, keys = jax.tree.map(cut, batch), jax.random.split(key, micro)
    if micro == 1:
        return value_and_grad(*jax.tree.map(lambda x: x[0], (parts, keys)))
    shapes = jax.eval_shape(value_and_grad, *jax.tree.map(lambda x: x[0], (parts, keys)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, value_and_grad(*part)), None

    total, _ = jax.lax.scan(add, zeros, (parts, keys))
    return jax.tree.map(lambda x: x / micro, total)


def clipped(grads: Any, most: float) -> tuple[Any, Any]:
    """(gradients scaled down to a global norm of at most `most`, the norm they had)."""
    norm = optax.tree_utils.tree_norm(grads)
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-12)), grads), norm


def update(tuning: Tuning, state: TrainState, grads: Any, rate: Any) -> TrainState:
    """AdamW on the adapters."""
    directions, opt_state = tuning.optimiser.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), state.params, directions)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def fresh(tuning: Tuning, lora: Lora, rest: Mapping[str, Any]) -> TrainState:
    """The state before the first step; copies, since steps give their buffers away."""
    lora, rest = jax.tree.map(lambda x: jnp.array(x, copy=True), (lora, dict(rest)))
    return TrainState(lora, rest, tuning.optimiser.init(lora), jnp.zeros((), jnp.int32))


def recover(
    graph: Structure,
    params: Any,
    batches: Callable[[int], Any],
    tuning: Tuning,
    *,
    config: LoraConfig | None = None,
    lora: Lora | None = None,
    masks: Keep | None = None,
    loss: Loss | None = None,
    **running: Any,
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
      **running: of `loop`: out, resume, save_every, progress, title, on_step.

    Returns:
      The adapters, and the loss of every step of this call.

    Raises:
      ValueError: rows that `tuning.accumulate` does not divide, a loss that is not finite, or another run in `out`.
    """
    config = config or LoraConfig()
    objective = loss or next_token(graph, config.dropout)
    lora = init(jax.random.key(tuning.seed), graph, config) if lora is None else lora
    rates, key = tuning.rates, jax.random.key(tuning.seed)

    def step(state: TrainState, params: Any, batch: Any, rate: Any) -> Any:
        def of(part: Any, key: Any) -> Any:
            return jax.value_and_grad(lambda f: objective(params, f, state.rest["masks"], part, key))(state.params)

        value, grads = accumulated(of, batch, tuning.accumulate, jax.random.fold_in(key, state.step))
        grads, norm = clipped(grads, tuning.clip)
        return update(tuning, state, grads, rate), {"loss": value, "gradient_norm": norm}

    compiled = jax.jit(step, donate_argnums=0)
    state = fresh(tuning, lora, {"masks": {g: jnp.asarray(m, jnp.float32) for g, m in (masks or {}).items()}})
    recipe = {"tuning": dataclasses.asdict(tuning), "lora": dataclasses.asdict(config), "scales": dict(lora.scales)}
    state, losses = loop(state, lambda s, t, batch: compiled(s, params, batch, rates[t]), tuning.steps, batches,
                         recipe=recipe, **running)  # fmt: skip
    return state.params, losses


def loop(
    state: TrainState,
    advance: Advance,
    steps: int,
    batches: Callable[[int], Any],
    *,
    recipe: Mapping[str, Any],
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: bool | Progress = False,
    title: str = "tuning",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[TrainState, list[float]]:
    """advance(state, step, batches(step)) -> (state, {name: scalar}) from the state's step up to `steps`; host-side.

    Args:
      state: where to start, or what a checkpoint is restored into.
      advance: one step; it may give the old state's buffers away. Its metrics contain "loss".
      steps, batches: as in `recover`.
      recipe: plain data that tells this run from others.
      out: folder for metrics.jsonl and checkpoints; resume: go on from its last one, or start if there is none.
      save_every: steps between checkpoints; 0: only the last step's.
      progress: a bar on the terminal, or a task of the caller's.
      title: of the bar.
      on_step: called with (steps done, metrics), a little late.

    Raises:
      ValueError: a loss that is not finite, a folder that holds another run or, without `resume`, any.
    """
    if resume and out is None:
        raise ValueError("resume=True needs out=, the folder of the run to go on with")
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if out is not None:
            leaves = ";".join(f"{p} {x.dtype}{list(x.shape)}" for p, x in flatten(state._asdict()))
            digest = hashlib.sha256(leaves.encode()).hexdigest()[:16]
            checkpoints = Checkpoints(Path(out) / "checkpoints", {**recipe, "state": digest})
            stack.callback(checkpoints.close)
            if (latest := checkpoints.latest()) is not None:
                if not resume:
                    raise ValueError(f"{out} holds a run, up to step {latest}: give resume=True, or another folder")
                state, _ = checkpoints.restore(latest, state)
        step, losses = int(state.step), []
        log = stack.enter_context(MetricsLog(None if out is None else Path(out) / "metrics.jsonl", step))
        show = stack.enter_context(bar(progress, steps, title))
        flying: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()

        def land(aloft: int) -> None:
            while len(flying) > aloft:
                number, values = flying.popleft()
                metrics = {k: float(v) for k, v in values.items()}
                if not math.isfinite(metrics["loss"]):
                    raise ValueError(f"the loss is {metrics['loss']} at step {number}: lower the learning rate")
                losses.append(metrics["loss"])
                log.append({"kind": "step", "step": number, **metrics})
                if on_step is not None:
                    on_step(number, metrics)
                show(number, f"loss {metrics['loss']:.3f}")

        show(step, "")
        while step < steps:
            state, metrics = advance(state, step, batches(step))
            step += 1
            flying.append((step, metrics))
            land(ALOFT)
            if checkpoints is not None and (step == steps or (save_every and step % save_every == 0)):
                land(0)
                checkpoints.save(step, state, {})
        land(0)
        return state, losses
