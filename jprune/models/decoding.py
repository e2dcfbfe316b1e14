"""Decoding with a cache of fixed size: prefill and step are one function, generation is one scan under jit."""

from __future__ import annotations

import functools
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
    dtype = jnp.dtype(dtype or c.dtype)
    shapes = [((batch, size, n, c.head_dim), (batch, size, n, m)) for n, m in zip(c.kv_heads, c.value_dims)]
    if module.scanned:
        k, v = (jnp.zeros((c.depth, *shape), dtype) for shape in shapes[0])
    else:
        k, v = (tuple(jnp.zeros(s[i], dtype) for s in shapes) for i in (0, 1))
    return Cache(k, v, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32))


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

    def step(carry: Any, key: jax.Array) -> Any:
        token, done, cache = carry
        logits, cache = module.apply(variables, token[:, None], None, cache)
        new = choose(logits[:, -1], key)
        if stop is not None:
            new = jnp.where(done, stop, new)
            done = done | (new == stop)
        return (new, done, cache), new

    keys = jax.random.split(key, steps)
    first = choose(logits[:, -1], keys[0])
    done = first == stop if stop is not None else jnp.zeros(first.shape, bool)
    _, rest = jax.lax.scan(step, (first, done, cache), keys[1:])
    return jnp.concatenate([ids, first[:, None], rest.T], axis=1)
