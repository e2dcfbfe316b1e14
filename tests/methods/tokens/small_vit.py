"""A small vision transformer with lively weights, and programs of it under reducers, which tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from laws import lively
from quickly import quickly

from jprune.methods.tokens.cost import dims_of
from jprune.models import vit

BASE = vit.vit(12, 3, 3, 4, 5, mlp=20).config
VARIANTS = {
    "token": {},
    "mean": {"pool": "mean"},
    "distilled": {"distilled": True, "both_heads": True},
    "shallow": {"blocks": BASE.blocks[:2]},
    "deit": {"distilled": True, "registers": 3},
}
SHAPE = (16, 20, 3)  # 20 patches


@functools.cache
def case(name="token"):
    """(module, variables, two images)."""
    module = vit.ViT(dataclasses.replace(BASE, **VARIANTS[name]))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), jnp.float32)
    return module, lively(jax.eval_shape(module.init, jax.random.key(0), x), seed=3), x


def dims(name="token"):
    """Its sizes."""
    return dims_of(case(name)[0].config, SHAPE)


@functools.cache
def program(reducer, name="token"):
    """(images, key) -> (logits, trace), compiled once."""
    module, variables, _ = case(name)

    @quickly
    def run(x, key):
        return module.apply(variables, x, reducer=reducer, key=key, trace=True)

    return run


def run(reducer, name="token", x=None, seed=0):
    """(logits, trace) of the two images, or of x."""
    return program(reducer, name)(case(name)[2] if x is None else x, jax.random.key(seed))


@functools.cache
def seen(layer, name="token"):
    """(attention of a block, the block's output) without reducer."""
    module, variables, x = case(name)

    @quickly
    def watched(x):
        return module.apply(variables, x, layer=layer + 1, select="full", watch=layer, method="features")

    x, found = watched(x)
    return found._replace(prefix=module.config.prefix), x
