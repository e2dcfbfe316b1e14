"""Tiny decoders of every family with weights that keep their signals alive, shared by the tests of language models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from laws import on_device

from jprune.models.llama import Llama, llama_config
from jprune.models.rope import Rope

LLAMA3 = Rope(500.0, "llama3", 8.0, 1.0, 4.0, 32)


def tiny(family="llama", **changes):
    """A config of three layers; `changes` are fields of LlamaConfig."""
    own = {
        "llama": {},
        "llama3": {"rope": LLAMA3, "tied": True, "head_dim": 16},
        "biased": {"rope": Rope(1e4, "linear", 2.0), "qkv_bias": True, "o_bias": True, "mlp_bias": True},
        "mistral": {"window": 4},
        "qwen2": {"qkv_bias": True, "windows": (None, 3, 3)},
        "qwen3": {"head_dim": 16, "tied": True, "qk_norm": True},
    }[family]
    name = {"llama3": "llama", "biased": "llama"}.get(family, family)
    own = {**own, "family": name, **changes}
    sizes = {"vocab": 50, "stream": 32, "ffn": 48, "depth": 3, "q_heads": 4, "kv_heads": 2}
    sizes |= {k: own.pop(k) for k in [*sizes, "head_dim", "window"] if k in own and not isinstance(own[k], tuple)}
    return dataclasses.replace(llama_config(**sizes), **own)


FAMILIES = ("llama", "llama3", "biased", "mistral", "qwen2", "qwen3")


def weights(config, seed=0, scanned=False):
    """Variables whose layers neither die nor explode; the same numbers in both arrangements."""
    from jprune.models.llama import stack_layers

    module = Llama(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = path[-1].key
        if name == "scale":
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif name == "bias":
            value = 0.4 * rng.normal(size=leaf.shape)
        elif name == "embedding":
            value = rng.normal(size=leaf.shape) / (np.sqrt(config.stream) if config.tied else 1)
        else:
            inputs = leaf.shape[:-1] if path[-2].key == "o" else leaf.shape[:1]
            value = rng.normal(size=leaf.shape) * np.sqrt(1.5 / np.prod(inputs))
        return on_device(value, leaf.dtype)

    tree = jax.tree_util.tree_map_with_path(one, shapes)
    return stack_layers(tree) if scanned else tree


def prompt(seed=0, rows=2, tokens=9, vocab=50):
    """(ids, mask): the second row is padded on the left."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, tokens), np.int32)
    mask[1:, :3] = 0
    return jnp.asarray(rng.integers(0, vocab, (rows, tokens)), jnp.int32), jnp.asarray(mask)
