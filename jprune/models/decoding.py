"""Decoding with a cache of fixed size: prefill and step are one function, generation is one scan under jit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: per layer (batch, size, kv heads, head), as a tuple; stacked on a leading axis for scanned models.
      valid: (batch, size) bool; False at padding and where nothing was written yet.
      length: () int32, how many of the `size` slots are written.
    """

    k: Any
    v: Any
    valid: jax.Array
    length: jax.Array


def new_cache(module: Any, batch: int, size: int, dtype: Any = None) -> Cache:
    """An empty cache for `size` tokens a row; `dtype` by default that of the config.

    Args:
      module: a `jprune.models.llama.Llama`.
      batch, size: rows, and tokens of prompt and answer together.
      dtype: of keys and values.
    """
    c = module.config
    if module.scanned:
        shapes = [(c.depth, batch, size, c.kv_heads[0], n) for n in (c.head_dim, c.value_dims[0])]
        k, v = (jnp.zeros(shape, dtype or c.dtype) for shape in shapes)
        return Cache(k, v, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32))
    return new_caches(module, batch, [(c.depth, size)], dtype)[0]


def new_caches(module: Any, batch: int, sizes: Sequence[tuple[int, int]], dtype: Any = None) -> tuple[Cache, ...]:
    """Empty caches of successive layers, for an unrolled model that drops tokens between them.

    Args:
      module, batch, dtype: as for `new_cache`.
      sizes: (layers up to which a cache reaches, tokens it has room for), ascending; the last reaches the model's depth.
    """
    c, out, first = module.config, [], 0
    for end, size in sizes:
        heads = list(zip(c.kv_heads[first:end], c.value_dims[first:end]))
        k = tuple(jnp.zeros((batch, size, n, c.head_dim), dtype or c.dtype) for n, _ in heads)
        v = tuple(jnp.zeros((batch, size, n, m), dtype or c.dtype) for n, m in heads)
        out.append(Cache(k, v, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32)))
        first = end
    return tuple(out)


def generate(
    module: nn.Module,
    variables: Any,
    ids: jax.Array,
    steps: int,
    *,
    mask: Any = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    stop: int | None = None,
) -> jax.Array:
    """Continue every row of `ids` by `steps` tokens: (batch, tokens) -> (batch, tokens + steps); jit-ed within.

    Args:
      module: a `jprune.models.llama.Llama`.
      variables: its parameters.
      ids: prompts, padded on the left.
      steps: tokens to add.
      mask: (batch, tokens), 0 at padding; None: no padding.
      temperature: 0 takes the likeliest token, otherwise logits / temperature are sampled from.
      key: PRNG key for sampling.
      stop: a token after which a row repeats that token only.

    Raises:
      ValueError: sampling without a key, nothing to do, or a mask whose last column is not all 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: ask for at least one token")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature {temperature} needs a key (or a temperature of 0, the likeliest token)")
    ids = jnp.asarray(ids)
    real = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if not bool(real[:, -1].all()):
        raise ValueError("a row of the mask ends with padding: pad prompts on the left")
    key = jax.random.key(0) if key is None else key  # never looked at without a temperature
    return _generate(module, steps, temperature > 0, stop, variables, ids, real, jnp.float32(temperature), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    module: nn.Module,
    steps: int,
    sample: bool,
    stop: int | None,
    variables: Any,
    ids: jax.Array,
    mask: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    dtype = jax.tree.leaves(variables)[0].dtype
    cache = new_cache(module, ids.shape[0], ids.shape[1] + steps, dtype)
    logits, cache = module.apply(variables, ids, mask, cache)

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        chosen = jax.random.categorical(key, logits / temperature) if sample else jnp.argmax(logits, -1)
        return chosen.astype(ids.dtype)

    new = _continue(module, variables, logits[:, -1], cache, choose, jax.random.split(key, steps), None, stop)
    return jnp.concatenate([ids, new], axis=1)


def continue_from(
    module: nn.Module, variables: Any, logits: jax.Array, cache: Any, position: jax.Array, steps: int, stop: int | None
) -> jax.Array:
    """The likeliest next tokens, (batch, steps) int32, behind a prompt that was read already; for use under jit.

    Args:
      module: a `jprune.models.llama.Llama`.
      variables: its parameters.
      logits: (batch, vocab) of the prompt's last token.
      cache: after the prompt, or several of successive layers; with room for steps - 1 more tokens.
      position: (batch,) int32 of the next token; tokens that were dropped count where positions are the original ones.
      steps: tokens to make.
      stop: a token after which a row repeats that token only; None: none.
    """

    def choose(logits: jax.Array, _: Any) -> jax.Array:
        return jnp.argmax(logits, -1).astype(jnp.int32)

    return _continue(module, variables, logits, cache, choose, jnp.arange(steps), position, stop)


def _continue(
    module: nn.Module,
    variables: Any,
    logits: jax.Array,
    cache: Any,
    choose: Callable[[jax.Array, Any], jax.Array],
    keys: jax.Array,
    position: Any,
    stop: int | None,
) -> jax.Array:
    def step(carry: Any, key: Any) -> Any:
        token, position, done, cache = carry
        at = None if position is None else position[:, None]
        logits, cache = module.apply(variables, token[:, None], None, cache, positions=at)
        new = choose(logits[:, -1], key)
        if stop is not None:
            new = jnp.where(done, stop, new)
            done = done | (new == stop)
        return (new, None if position is None else position + 1, done, cache), new

    first = choose(logits, keys[0])
    done = first == stop if stop is not None else jnp.zeros(first.shape, bool)
    _, rest = jax.lax.scan(step, (first, position, done, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)
