"""How good and how fast a language model is: perplexity over windows of tokens, tokens a second.

    perplexity = exp(mean over windows of (mean over their next tokens of -log p))

Every window stands alone: its first token is only context. Logits may be bfloat16, losses are float32.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Float32, Int, Integer
from rich.progress import Progress

from jprune.models.decoding import Cache, new_cache
from jprune.training import as_forward
from jprune.training.progress import bar


def next_token_loss(logits: Float[Array, "b t v"], ids: Integer[Array, "b t"]) -> Float32[Array, " b"]:
    """Mean of -log p(token t + 1 | tokens up to t) in every row."""
    wide = logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, ids[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(wide, axis=-1) - chosen).mean(axis=-1)


def window_losses(
    model: Any,
    params: Any,
    windows: Integer[np.ndarray, "n t"],
    batch_size: int = 8,
    *,
    sharding: Sharding | None = None,
    progress: bool | Progress = False,
) -> Float32[np.ndarray, " n"]:
    """The mean next-token loss of every window, in batches of one compiled program.

    Args:
      model: apply(params, ids (b, t)) -> logits (b, t, vocab); a linen module and its `apply` will do.
      params: what it takes.
      windows: token ids, at least two a window.
      batch_size: windows at a time.
      sharding: of a batch of ids, where the parameters lie on a mesh; None: wherever the parameters are.
      progress: show it, or a rich Progress to draw on.

    Raises:
      ValueError: no windows or windows of one token.
    """
    n, t = windows.shape
    if n < 1 or t < 2 or batch_size < 1:
        raise ValueError(f"{n} windows of {t} tokens, {batch_size} at a time: one window, two tokens, one at least")
    batch_size = min(batch_size, n)
    step, out = _compiled(as_forward(model).evaluate), []
    with bar(progress, n, "windows") as update:
        for start in range(0, n, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), n - 1)  # the last batch repeats the last window
            ids = windows[rows] if sharding is None else jax.device_put(windows[rows], sharding)
            out.append(step(params, ids))
            jax.block_until_ready(out[-3:-2])  # else a slow device would collect the batches of a fast host
            update(min(start + batch_size, n), "")
    return np.concatenate([np.asarray(x) for x in out])[:n]


@functools.lru_cache(maxsize=64)
def _compiled(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, ids: next_token_loss(apply(params, ids), ids))


def perplexity(
    model: Any,
    params: Any,
    windows: Integer[np.ndarray, "n t"],
    batch_size: int = 8,
    *,
    sharding: Sharding | None = None,
    progress: bool | Progress = False,
) -> float:
    """exp of the mean of `window_losses`; raises what that raises."""
    losses = window_losses(model, params, windows, batch_size, sharding=sharding, progress=progress)
    return float(np.exp(losses.astype(np.float64).mean()))


class Speed(NamedTuple):
    """Tokens a second, medians: of prompts read in one pass, and of answers written one token after the other."""

    prefill: float
    decode: float


def speed(
    module: Any,
    variables: Any,
    *,
    batch: int = 1,
    prompt: int = 128,
    steps: int = 32,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """How fast a decoder reads prompts and continues them with a cache on this device (host-side).

    Args:
      module: a `jprune.models.llama.Llama`.
      variables: its parameters.
      batch: rows.
      prompt, steps: tokens read and written in a row.
      rounds: after one that does not count.
      clock: seconds.

    Raises:
      ValueError: nothing to time.
    """
    one = {"": (module, variables)}
    return speeds(one, batch=batch, prompt=prompt, steps=steps, rounds=rounds, clock=clock)[""]


def speeds(
    models: Mapping[str, tuple[Any, Any]],
    *,
    batch: int = 1,
    prompt: int = 128,
    steps: int = 32,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """`speed` of several models whose rounds take turns, so that a busy machine hits all alike; all are held at once.

    Args:
      models: {name: (module, variables)}.
      batch, prompt, steps, rounds, clock: as for `speed`.

    Raises:
      ValueError: nothing to time.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: a median needs at least one")
    runs = {name: Runs(module, variables, batch, prompt, steps) for name, (module, variables) in models.items()}
    jobs = [(name, job) for job in ("prefill", "decode") for name in runs]
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for k in range(1 + rounds):
        for name, job in jobs:
            began = clock()
            jax.block_until_ready(getattr(runs[name], job)())
            if k:
                seconds[name, job].append(clock() - began)
    return {
        name: Speed(*(run.tokens[job] / statistics.median(seconds[name, job]) for job in ("prefill", "decode")))
        for name, run in runs.items()
    }


class Runs:
    """Prefill and decoding of one model as two jobs without arguments, for timing: each does the same work each time.

    Attributes:
      tokens: {"prefill": ..., "decode": ...}, how many tokens a call reads or writes.
    """

    def __init__(self, module: Any, variables: Any, batch: int, prompt: int, steps: int) -> None:
        if min(batch, prompt, steps) < 1:
            raise ValueError(f"batch {batch}, prompt {prompt}, steps {steps}: each must be at least 1")
        self.tokens = {"prefill": batch * prompt, "decode": batch * steps}
        self._module, self._steps, self._variables = module, steps, variables
        dtype = jax.tree.leaves(variables)[0].dtype
        rng = np.random.default_rng(0)
        self._ids = jnp.asarray(rng.integers(0, module.config.vocab, (batch, prompt)), jnp.int32)
        self._empty = new_cache(module, batch, prompt + steps, dtype)
        self._token, self._cache = self.prefill()

    def prefill(self) -> tuple[Int[Array, " b"], Cache]:
        """Read the prompts: (next token, cache)."""
        return _prefill(self._module, self._variables, self._ids, self._empty)

    def decode(self) -> Int[Array, "steps b"]:
        """Write `steps` tokens."""
        return _decode(self._module, self._steps, self._variables, self._token, self._cache)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(module: Any, variables: Any, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    logits, cache = module.apply(variables, ids, None, cache)
    return jnp.argmax(logits[:, -1], -1).astype(ids.dtype), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(module: Any, steps: int, variables: Any, token: jax.Array, cache: Cache) -> jax.Array:
    def step(carry: Any, _: None) -> Any:
        token, cache = carry
        logits, cache = module.apply(variables, token[:, None], None, cache)
        token = jnp.argmax(logits[:, -1], -1).astype(token.dtype)
        return (token, cache), token

    return jax.lax.scan(step, (token, cache), None, length=steps)[1]
