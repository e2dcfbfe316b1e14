"""A decoder in pieces: the embedding, one function per layer and the layers' parameters, to run one layer at a time.

A model that does not fit the device runs through it layer by layer, while its parameters stay in host memory (or in
memory-mapped files): `jprune.language.statistics.layerwise_stats(*pieces(config, params), batches)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jprune.models import layers
from jprune.models.llama import Block, LlamaConfig, context
from jprune.models.llama_trees import is_scanned


def pieces(
    config: LlamaConfig, variables: Any
) -> tuple[Callable[[Any], jax.Array], tuple[Callable[..., jax.Array], ...], Sequence[Any]]:
    """(embed, blocks, layers) of a decoder.

    Args:
      config: of the model.
      variables: its tree, unrolled or scanned; numpy arrays stay in host memory until a layer is asked for.

    Returns:
      embed(ids (batch, tokens)) -> stream (batch, tokens, stream); one function per layer, (its parameters, stream) ->
      stream, the same object for layers that work alike; and the parameters of every layer.
    """
    params = layers.params_of(variables)
    table = params["embed"]["embedding"]

    def embed(ids: Any) -> jax.Array:
        return jnp.asarray(table[ids])

    like = {kind: i for i, kind in reversed(list(enumerate(_kinds(config))))}
    return embed, tuple(_block(config, like[kind]) for kind in _kinds(config)), _Layers(params, config.depth)


def _kinds(config: LlamaConfig) -> list[tuple[Any, ...]]:
    """What layers that are the same function have in common."""
    windows = config.windows or (None,) * config.depth
    return list(zip(windows, config.ffn, config.q_heads, config.kv_heads, config.value_dims, strict=True))


@functools.cache
def _block(config: LlamaConfig, layer: int) -> Callable[..., jax.Array]:
    module = Block(config, layer)

    def run(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x, context(config, x.shape[1])[0])[0]  # pyright: ignore[reportIndexIssue]

    return run


class _Layers(Sequence[Any]):
    """The parameters of single layers, cut out of a stacked tree when they are asked for."""

    def __init__(self, params: Any, depth: int):
        self._params, self._depth, self._scanned = params, depth, is_scanned(params)

    def __len__(self) -> int:
        return self._depth

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._depth:
            raise IndexError(f"layer {i} of {self._depth}")
        if self._scanned:
            return jax.tree.map(lambda x: x[i], self._params["layers"])
        return self._params[f"layer{i}"]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._depth))
