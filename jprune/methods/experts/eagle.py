"""A drafter that is trained: one decoder layer guesses the model's own last hidden state, token after token (EAGLE).

    found = train_eagle(module, variables, batch_of_step, 2000, eagle_optimizer(2000))
    drafter = Eagle(module, variables, EagleHead(module.config, width), found.state.params)
    said = speculate(module, variables, ids, 200, drafter=drafter)

For position t the layer reads the embedding of token t + 1 and the hidden state at t, which is what the model's head reads;
it gives the hidden state at t + 1. The model's own head turns that into the guess of token t + 2, which is read next with
the guessed state, and so on: a chain. The model is not changed. Li and others (2024), "EAGLE".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jprune.methods.experts.speculative import cut_cache, hidden_states
from jprune.models.decoding import Cache
from jprune.models.layers import params_of
from jprune.models.llama import MLP, Attention, Linear, LlamaConfig, RMSNorm, context
from jprune.training.steps import Trained, each_step, run_steps


class EagleHead(nn.Module):
    """The layer: fc([norm(embedding), norm(hidden)]), then attention and an MLP, each added to the stream.

    Attributes:
      config: of the model that it guesses for; attention has the widths of its first layer.
      width: of the MLP.
    """

    config: LlamaConfig
    width: int

    @nn.compact
    def __call__(self, embedded: Any, hidden: Any, mask: Any = None, cache: Cache | None = None) -> tuple[Any, Any]:
        """embedded, hidden: (batch, tokens, stream) -> (guessed hidden states, cache)."""
        c = dataclasses.replace(self.config, experts=None, ffn=(self.width,) * self.config.depth)
        norms = {n: RMSNorm(c.eps, c.norm_width, c.dtype, name=n) for n in ("token_norm", "hidden_norm", "post_norm")}
        both = jnp.concatenate([norms["token_norm"](embedded), norms["hidden_norm"](hidden)], axis=-1)
        x = Linear("bte,ed->btd", (2 * c.stream, c.stream), None, c.dtype, name="fc")(both)
        at, after = context(c, x.shape[1], mask, cache)
        held = None if cache is None else {"k": cache.k[0], "v": cache.v[0]}
        y, held = Attention(c, 0, name="attn")(x, at, None, held)
        x = x + y
        x = x + MLP(c, 0, name="mlp")(norms["post_norm"](x))
        return x, None if cache is None else Cache((held["k"],), (held["v"],), *after)


def logits_of(
    config: LlamaConfig, variables: Any, hidden: Float[Array, "batch tokens d"]
) -> Float[Array, "batch tokens v"]:
    """What the model's own head makes of hidden states, float32."""
    params = params_of(variables)
    if config.tied:
        return jnp.einsum("bte,ve->btv", hidden, params["embed"]["embedding"], preferred_element_type=jnp.float32)
    return jnp.einsum("bte,ev->btv", hidden, params["lm_head"]["kernel"], preferred_element_type=jnp.float32)


def eagle_loss(
    head: EagleHead, params: Any, module: Any, variables: Any, ids: Int[Array, "batch tokens"], noise: Any = 0.0
) -> Float[Array, ""]:
    """SmoothL1(guessed, own hidden state) + 0.1 cross entropy(own, guessed next token), means over positions and channels.

    Args:
      head, params: the layer. module, variables: the model, through which no gradient goes.
      ids: rows of text.
      noise: (batch, tokens - 2, stream), added to the hidden states that the layer reads.
    """
    own = jax.lax.stop_gradient(hidden_states(module, variables, ids)[1])
    embedded = jax.lax.stop_gradient(params_of(variables)["embed"]["embedding"][ids[:, 1:-1]])
    guessed, _ = head.apply(params, embedded, own[:, :-2] + noise)
    wanted = own[:, 1:-1].astype(jnp.float32)
    apart = optax.huber_loss(guessed.astype(jnp.float32), wanted).mean()
    said, right = (logits_of(module.config, variables, h) for h in (guessed, own[:, 1:-1]))
    entropy = optax.softmax_cross_entropy(said, jax.lax.stop_gradient(jax.nn.softmax(right))).mean()
    return apart + 0.1 * entropy


def eagle_optimizer(steps: int, rate: float = 3e-5, warmup: int = 2000) -> optax.GradientTransformation:
    """AdamW with the authors' settings: gradients clipped at 0.5 each, `warmup` steps (at most a tenth of all)."""
    rates = optax.warmup_constant_schedule(0.0, rate, max(1, min(warmup, steps // 10)))
    return optax.chain(optax.clip(0.5), optax.adamw(rates, 0.9, 0.95, weight_decay=0.0))


class EagleState(NamedTuple):
    """All that changes: `params` of the layer, `optimizer`, `step`."""

    params: Any
    optimizer: Any
    step: Any


def train_eagle(
    module: Any,
    variables: Any,
    batch_of_step: Callable[[int], Any],
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    *,
    width: int | None = None,
    noise: float = 0.1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: Any = False,
    title: str = "drafter",
) -> Trained:
    """Train the layer on texts, while the model stays as it is; host-side. `state.params` of what it returns are its weights.

    Args:
      module, variables: the model, a `jprune.models.llama.Llama`.
      batch_of_step: step -> token ids (rows, tokens), always the same ones for a step.
      steps: of training.
      optimizer: None: `eagle_optimizer(steps)`.
      width: of the layer's MLP; None: four times the stream.
      noise: hidden states are disturbed evenly by at most noise * 512 / tokens, since guessed ones will be wrong too.
      seed: of the first weights and of the noise.
      out, resume, save_every, progress, title: as `jprune.training.steps.run_steps` has them.

    Raises:
      ValueError: rows of fewer than three tokens, and what `run_steps` refuses.
    """
    config: LlamaConfig = module.config
    head, tx = EagleHead(config, width or 4 * config.stream), optimizer or eagle_optimizer(steps)
    tokens = np.shape(batch_of_step(0))[1]
    if tokens < 3:
        raise ValueError(f"rows have {tokens} tokens: a guess needs two before it, so at least 3")
    first = jnp.zeros((1, 2, config.stream), config.dtype)
    params = jax.jit(head.init)(jax.random.key(seed), first, first)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: EagleState, variables: Any, ids: Any) -> tuple[EagleState, Any]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        most = noise * 512 / tokens
        own = jax.random.uniform(key, (*ids[:, :-2].shape, config.stream), jnp.float32, -most, most)
        loss, gradient = jax.value_and_grad(
            lambda p: eagle_loss(head, p, module, variables, ids, own.astype(config.dtype))
        )(state.params)
        updates, optimizer_state = tx.update(gradient, state.optimizer, state.params)
        return EagleState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1), {"loss": loss}

    start: Any = EagleState(params, jax.jit(tx.init)(params), jnp.zeros((), jnp.int32))
    recipe = {
        "method": "eagle",
        "steps": steps,
        "noise": noise,
        "seed": seed,
        "width": head.width,
        "config": repr(config),
    }
    return run_steps(
        start, lambda state, _, batch: update(state, variables, jnp.asarray(batch)), each_step(batch_of_step), steps,
        recipe=recipe, out=out, resume=resume, save_every=save_every, progress=progress, title=title,
    )  # fmt: skip


class Eagle:
    """The trained layer as a drafter of `speculate`: a chain of guesses, of one answer after another.

    It is told (`saw`) the hidden states of tokens that stand and the tokens behind them, and keeps keys and values of
    those; guesses leave no trace.
    """

    def __init__(self, module: Any, variables: Any, head: EagleHead, params: Any, size: int = 4096, chunk: int = 8):
        """size: most tokens of prompt and answer together. chunk: most tokens that a pass of `speculate` gives."""
        self._parts = module.config, head
        self._weights = variables, params
        self._size, self._chunk = size, chunk
        self.begin()

    def begin(self) -> None:
        """Forget what was seen: another prompt follows."""
        c, _ = self._parts
        shapes = [(1, self._size + self._chunk, c.kv_heads[0], n) for n in (c.head_dim, c.value_dims[0])]
        k, v = ((jnp.zeros(shape, c.dtype),) for shape in shapes)
        self._cache = Cache(k, v, jnp.zeros((1, self._size + self._chunk), bool), jnp.zeros((), jnp.int32))
        self._last: Any = None
        self._seen = 0

    def saw(self, hidden: Any, behind: Any) -> None:
        """hidden: (n, stream) of the next n positions; behind: (n,) the token after each of them.

        Raises:
          ValueError: more tokens than `size`.
        """
        self._seen += len(behind)
        if self._seen > self._size:
            raise ValueError(f"the drafter has room for {self._size} tokens: make it with size=")
        for i in range(0, len(behind), self._chunk):
            part = np.asarray(behind[i : i + self._chunk])
            n, room = len(part), self._chunk
            rows = jnp.zeros((1, room, hidden.shape[-1]), hidden.dtype).at[0, :n].set(hidden[i : i + n])
            ids = np.zeros((1, room), np.int32)
            ids[0, :n] = part
            self._last, self._cache = _read_pairs(self._parts, self._weights, rows, ids, jnp.int32(n), self._cache)

    def __call__(self, tokens: Any, count: int) -> Any:
        """The guesses; none before anything was seen."""
        if self._last is None:
            return np.zeros(0, np.int32)
        return np.asarray(_chain(self._parts, self._weights, self._last, self._cache, self._chunk))[:count]


@functools.partial(jax.jit, static_argnums=0)
def _read_pairs(parts: Any, weights: Any, hidden: Any, ids: Any, real: Any, cache: Cache) -> tuple[Any, Cache]:
    """(guessed hidden state behind the last of the real pairs (1, 1, stream), cache with these pairs)."""
    (_, head), (variables, params) = parts, weights
    mask = jnp.arange(ids.shape[1])[None] < real
    before = cache.length
    out, cache = head.apply(params, params_of(variables)["embed"]["embedding"][ids], hidden, mask, cache)
    return jax.lax.dynamic_slice_in_dim(out, real - 1, 1, axis=1), cut_cache(cache, before + real)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _chain(parts: Any, weights: Any, last: Any, cache: Cache, count: int) -> Any:
    """(count,) tokens, each the likeliest behind the ones before; the cache is not kept."""
    (config, head), (variables, params) = parts, weights

    def step(carry: Any, _: Any) -> tuple[Any, Any]:
        hidden, cache = carry
        token = jnp.argmax(logits_of(config, variables, hidden)[:, -1], axis=-1).astype(jnp.int32)
        embedded = params_of(variables)["embed"]["embedding"][token[:, None]]
        return head.apply(params, embedded, hidden, None, cache), token[0]

    return jax.lax.scan(step, (last, cache), None, length=count)[1]
