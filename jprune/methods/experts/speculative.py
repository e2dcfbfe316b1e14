"""Speculative decoding, exact: a drafter guesses some tokens, one pass of the model checks them all at once.

    said = speculate(Llama(config), variables, ids, 200, chunk=8)

The pass reads the last token and the guesses; a guess stands if it is the model's own likeliest token behind what stands
before it. So the answer is that of decoding token by token, however bad the guesses are; every pass gives at least one
token. Tokens that do not stand are taken out of the cache. Rows of a pass that hold no guess run no experts.

Exact to the bit against passes of the same program with one token each (`drafter=None`): a row of a pass does not depend on
the other rows. Another program (`jprune.models.decoding.generate`) rounds otherwise, and may choose otherwise where the
two likeliest tokens are nearly equal.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jprune.models.decoding import Cache, new_cache
from jprune.tracing.paths import flatten

Drafter: TypeAlias = Callable[[Int[np.ndarray, " n"], int], Any]
"""(tokens so far, how many to guess) -> at most so many tokens that may follow.

One with the methods `begin()` and `saw(hidden, behind)` is also told, before it guesses, what the model's head read at the
next tokens that stand, (n, stream), and the tokens behind them, (n,); `jprune.methods.experts.eagle` has one.
"""


class Speculated(NamedTuple):
    """An answer and how it came about.

    Attributes:
      tokens: prompt and answer.
      accepted: tokens that each pass gave, one of them the model's own behind the guesses that stood.
      drafted: guesses that each pass checked.
      used: for models with experts, (layers,) for every pass: the share of experts that its tokens used together.
      used_by_one: the same for its first token alone.
      seconds: {"draft": of all guessing, "passes": of all passes but the first two, which compile}.
      predicted: times as fast as decoding token by token where reading weights is what takes time (`gain_of_bytes`).
    """

    tokens: Int[np.ndarray, " n"]
    accepted: list[int]
    drafted: list[int]
    used: list[np.ndarray]
    used_by_one: list[np.ndarray]
    seconds: dict[str, float]
    predicted: float

    @property
    def per_pass(self) -> float:
        """Mean number of tokens that a pass gave."""
        return float(np.mean(self.accepted))


def ngram(tokens: Int[np.ndarray, " n"], count: int, longest: int = 4) -> Int[np.ndarray, " m"]:
    """What followed the last time that the text ended as it does now: a drafter that needs no training.

    The longest ending of at most `longest` tokens that occurs before is looked for, the latest occurrence is taken.

        >>> ngram(np.array([1, 2, 3, 9, 1, 2]), 3).tolist()
        [3, 9, 1]
    """
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        rows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        found = np.flatnonzero((rows == tokens[-size:]).all(axis=1))
        if len(found):
            start = found[-1] + size
            return tokens[start : start + count]
    return tokens[:0]


def speculate(
    module: Any,
    variables: Any,
    ids: Int[np.ndarray, "rows tokens"],
    steps: int,
    *,
    drafter: Drafter | None = ngram,
    chunk: int = 8,
    stop: int | None = None,
    temperature: float = 0.0,
) -> Speculated:
    """Continue one prompt by `steps` of its likeliest tokens; host-side around one compiled pass.

    Args:
      module: a `jprune.models.llama.Llama`, with experts or without.
      variables: its parameters.
      ids: the prompt.
      steps: tokens to add; fewer if `stop` comes first.
      drafter: guesses; None: none, which is decoding token by token with the same program.
      chunk: tokens of a pass: the last one and at most chunk - 1 guesses.
      stop: the token that ends the answer.
      temperature: 0: sampling is not offered.

    Warns:
      UserWarning: at the end, if the passes read more weights for each token than decoding token by token does.

    Raises:
      ValueError: several prompts, nothing to do, sampling, or a drafter that guesses tokens which the model has not.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
        raise ValueError(f"the prompt has shape {ids.shape}: give one row with at least one token, (1, tokens)")
    if steps < 1 or chunk < 1:
        raise ValueError(f"steps is {steps} and chunk {chunk}: both are at least 1")
    if temperature:
        raise ValueError(f"the temperature is {temperature}: guesses are checked against the likeliest token; "
                         "sample with jprune.models.decoding.generate")  # fmt: skip
    vocab, length = module.config.vocab, ids.shape[1]
    dtype = jax.tree.leaves(variables)[0].dtype
    cache = new_cache(module, 1, length + steps + chunk, dtype)
    watcher: Any = drafter if hasattr(drafter, "saw") else None
    watches = watcher is not None
    if watches:
        watcher.begin()
    if length > 1:  # the last token of the prompt is the first of the first pass
        cache, hidden = _read(module, watches, variables, jnp.asarray(ids[:, :-1]), cache)
        if watches:
            watcher.saw(hidden, ids[0, 1:])
    text, end = ids[0].tolist(), length + steps
    accepted, drafted, used, alone, seconds = [], [], [], [], {"draft": 0.0, "passes": 0.0}
    while len(text) < end and not (len(text) > length and text[-1] == stop):
        start = time.perf_counter()
        room = min(chunk, end - len(text)) - 1
        guesses = [] if drafter is None or room < 1 else _guessed(drafter, text, room, vocab)
        seconds["draft"] += time.perf_counter() - start
        row = np.zeros((1, chunk), ids.dtype)
        row[0, : 1 + len(guesses)] = text[-1], *guesses
        start = time.perf_counter()
        real = jnp.int32(1 + len(guesses))
        best, cache, active, hidden = _pass(module, watches, variables, jnp.asarray(row), real, cache)
        best = np.asarray(best)
        if len(accepted) > 1:
            seconds["passes"] += time.perf_counter() - start
        stands = 0
        while stands < len(guesses) and guesses[stands] == best[stands]:
            stands += 1
        new = best[: stands + 1].tolist()
        if stop in new:
            new = new[: new.index(stop) + 1]
        text += new
        cache = cut_cache(cache, jnp.int32(len(text) - 1))
        if watches:
            watcher.saw(hidden[: len(new)], np.asarray(new))
        accepted.append(len(new))
        drafted.append(len(guesses))
        if active is not None:
            active = np.asarray(active)[:, : 1 + len(guesses)]
            used.append(active.any(1).mean(-1))
            alone.append(active[:, 0].mean(-1))
    predicted = gain_of_bytes(float(np.mean(accepted)), *bytes_of(variables), used, alone)
    if drafter is not None and predicted < 1:
        warnings.warn(
            f"speculation cannot pay here: a pass gives {np.mean(accepted):.2f} tokens and reads "
            f"{np.mean(accepted) / predicted:.2f} times the weights of a token; take a smaller chunk, a better drafter, or none",
            stacklevel=2,
        )
    return Speculated(np.asarray(text, ids.dtype), accepted, drafted, used, alone, seconds, predicted)


def bytes_of(variables: Any) -> tuple[int, int]:
    """(bytes that every pass reads, bytes of all experts) of a decoder's parameters, as arrays or shapes.

    Of a table of tokens a pass reads its rows only, unless it is the head too.
    """
    always = experts = 0
    paths = {flat: leaf for flat, leaf in flatten(variables)}
    tied = not any("lm_head" in path for path in paths)
    for path, leaf in paths.items():
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if path.split("/")[-2:-1] == ["experts"]:
            experts += size
        elif tied or "embed/" not in path:
            always += size
    return always, experts


def gain_of_bytes(
    per_pass: float, always: float, experts: float, used: Sequence[Any] = (), used_by_one: Sequence[Any] = ()
) -> float:
    """How many times as fast as decoding token by token, if time is bytes read; below 1 speculation cannot pay.

        per_pass (always + used_by_one experts) / (always + used experts)

    >>> gain_of_bytes(2.0, always=100, experts=800, used=[0.5], used_by_one=[0.125])
    0.8

    Args:
      per_pass: tokens that a pass gives.
      always, experts: bytes that every pass reads, and of all experts (`bytes_of`).
      used, used_by_one: shares of the experts of each pass, and of its first token alone; none: a model without experts.
    """
    if not len(used):
        return per_pass
    return per_pass * (always + float(np.mean(used_by_one)) * experts) / (always + float(np.mean(used)) * experts)


def gain(per_pass: float, one: float, chunk: float, draft: float = 0.0) -> float:
    """How many times as fast as decoding token by token; below 1 speculation does not pay.

    >>> gain(per_pass=2.4, one=10.0, chunk=15.0, draft=1.0)
    1.5

    Args:
      per_pass: tokens that a pass gives.
      one, chunk, draft: seconds of a pass of one token, of a pass of a chunk, and of guessing it.
    """
    return per_pass * one / (chunk + draft)


def _guessed(drafter: Drafter, text: list[int], room: int, vocab: int) -> list[int]:
    guesses = np.asarray(drafter(np.asarray(text), room)).tolist()
    if len(guesses) > room or any(not 0 <= g < vocab for g in guesses):
        raise ValueError(f"the drafter gave {guesses}: it was asked for at most {room} tokens, each below the model's "
                         f"vocabulary of {vocab}")  # fmt: skip
    return guesses


def hidden_states(module: Any, variables: Any, ids: Any, mask: Any = None, cache: Any = None) -> tuple[Any, Any, Any]:
    """(what the model returns, what its head reads (batch, tokens, stream), what its routers decided)."""
    out, state = module.apply(variables, ids, mask, cache, mutable=["routed", "intermediates"],
                              capture_intermediates=lambda m, _: m.name == "final_norm")  # fmt: skip
    return out, state["intermediates"]["final_norm"]["__call__"][0], {"routed": state.get("routed", {})}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(module: Any, watches: bool, variables: Any, ids: Any, cache: Cache) -> tuple[Cache, Any]:
    """(cache, (tokens, stream) what the head reads or None)."""
    if not watches:
        return module.apply(variables, ids, None, cache)[1], None
    (_, cache), hidden, _ = hidden_states(module, variables, ids, None, cache)
    return cache, hidden[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass(module: Any, watches: bool, variables: Any, ids: Any, real: Any, cache: Cache) -> tuple[Any, Cache, Any, Any]:
    """(likeliest token behind each of the chunk's, cache, (layers, chunk, experts) which run or None, what the head reads)."""
    mask = jnp.arange(ids.shape[1])[None] < real
    (logits, cache), hidden, state = hidden_states(module, variables, ids, mask, cache)
    found = [leaf.active for leaf in jax.tree.leaves(state, is_leaf=_is_routed) if _is_routed(leaf)]
    active = jnp.concatenate([a.reshape(-1, *a.shape[-2:]) for a in found]) if found else None
    return jnp.argmax(logits[0], axis=-1), cache, active, hidden[0] if watches else None


def _is_routed(x: Any) -> bool:
    return hasattr(x, "active")


@jax.jit
def cut_cache(cache: Cache, length: Any) -> Cache:
    """The cache with its first tokens alone; what lies behind them is written over."""
    return cache._replace(valid=cache.valid & (jnp.arange(cache.valid.shape[1]) < length), length=length)
