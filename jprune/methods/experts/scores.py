"""What every expert of a decoder contributes to a text, and four scores made of it; REAP among them.

    stats = expert_stats(Llama(config), variables, batches)
    reap(stats)                       # (layers, experts)

Lasby and others (2025), "REAP": S_e is the mean over the tokens routed to e of g_e(x) |f_e(x)|, f_e without its weight g_e.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jprune.methods.experts.training import routed_layers
from jprune.models.layers import params_of

Gate: TypeAlias = Literal["combine", "official"]


class ExpertStats(NamedTuple):
    """Sums over the tokens that are routed to an expert, float64.

    Attributes:
      tokens: how many. weight: of |g|. output: of |g| |f(x)|. norm: of |f(x)|.
      seen: tokens of the text.
    """

    tokens: Float[np.ndarray, "layers experts"]
    weight: Float[np.ndarray, "layers experts"]
    output: Float[np.ndarray, "layers experts"]
    norm: Float[np.ndarray, "layers experts"]
    seen: int


def reap(stats: ExpertStats) -> Float[np.ndarray, "layers experts"]:
    """Mean of weight times norm of the output over an expert's tokens; 0 without any."""
    return stats.output / np.maximum(stats.tokens, 1)


def frequency(stats: ExpertStats) -> Float[np.ndarray, "layers experts"]:
    """How many tokens are routed to an expert."""
    return stats.tokens


def router_weight(stats: ExpertStats) -> Float[np.ndarray, "layers experts"]:
    """Sum of the weights that the router gives an expert."""
    return stats.weight


def expert_stats(module: Any, variables: Any, batches: Iterable[Any], gate: Gate = "combine") -> ExpertStats:
    """Sums over all tokens of the batches; host-side around compiled passes. An expert computes its own tokens alone.

    Args:
      module: a `jprune.models.llama.Llama` with experts, unrolled.
      variables: its parameters.
      batches: token ids (rows, tokens) without padding.
      gate: "combine": the weights that the model applies; "official": of a softmax over all experts, as the authors' program
        takes for routers whose config does not say that they are divided by their sum (Mixtral).

    Raises:
      ValueError: a model without experts, a scanned one, no batches.
    """
    if module.config.experts is None:
        raise ValueError("the model has no experts")
    if module.scanned:
        raise ValueError("the layers are stacked: give Llama(config) and unstack_layers(variables)")
    params, depth = params_of(variables), module.config.depth
    sums, seen = np.zeros((4, depth, module.config.experts.count)), 0
    for ids in batches:
        inputs, routed = _layer_inputs(module, variables, jnp.asarray(ids))
        seen += int(np.size(ids))
        for i, (x, r) in enumerate(zip(inputs, routed, strict=True)):
            weights = r.scores
            if gate == "official":
                weights = jnp.where(r.active, jax.nn.softmax(r.logits, axis=-1), 0.0)
            most = max(1, int(r.active.sum(0).max()))
            room = min(len(x), 1 << (most - 1).bit_length())  # a program for every power of two
            sums[:, i] += np.asarray(sums_of_layer(params[f"layer{i}"]["experts"], x, weights, r.active, room))
    if not seen:
        raise ValueError("there are no batches to look at")
    tokens, weight, output, norm = sums
    return ExpertStats(tokens, weight, output, norm, seen)


@functools.partial(jax.jit, static_argnums=0)
def _layer_inputs(module: Any, variables: Any, ids: Any) -> tuple[list[Any], list[Any]]:
    """What the experts of every layer read, (tokens, d), and what their routers decide."""
    _, state = module.apply(variables, ids, mutable=["routed", "intermediates"],
                            capture_intermediates=lambda m, _: m.name == "post_norm")  # fmt: skip
    found = [state["intermediates"][f"layer{i}"]["post_norm"]["__call__"][0] for i in range(module.config.depth)]
    return [x.reshape(-1, x.shape[-1]) for x in found], routed_layers(state)


@functools.partial(jax.jit, static_argnums=4)
def sums_of_layer(
    params: Mapping[str, Any],
    x: Float[Array, "tokens d"],
    weights: Float[Array, "tokens experts"],
    active: Bool[Array, "tokens experts"],
    room: int,
) -> Float[Array, "4 experts"]:
    """(tokens, |g|, |g| |f(x)|, |f(x)|), float32 sums over each expert's tokens, which are at most `room`."""

    def one(expert: Any) -> Any:
        own, g, here = expert
        (index,) = jnp.nonzero(here, size=room, fill_value=len(x))
        rows = x.at[index].get(mode="fill", fill_value=0)
        h = jnp.matmul(rows, own["up"], preferred_element_type=jnp.float32)
        if "gate" in own:
            h = jax.nn.silu(jnp.matmul(rows, own["gate"], preferred_element_type=jnp.float32)) * h
        else:
            h = jax.nn.silu(h)
        f = jnp.matmul(h.astype(x.dtype), own["down"], preferred_element_type=jnp.float32)
        norm = jnp.sqrt(jnp.sum(f * f, axis=-1))  # 0 where there is no token
        g = jnp.abs(g.at[index].get(mode="fill", fill_value=0))
        return jnp.stack([jnp.sum(here, dtype=jnp.float32), jnp.sum(g), jnp.sum(g * norm), jnp.sum(norm)])

    own = {name: params[name] for name in ("up", "down", "gate") if name in params}
    return jax.lax.map(one, (own, weights.astype(jnp.float32).T, active.T)).T
