"""A LLaVA of two blocks and two layers with random weights, shared by tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jprune.models.llama_config import llama_config
from jprune.models.llava import Llava, LlavaConfig
from jprune.models.vit_config import ViTBlock, ViTConfig

IMAGE, VOCAB, SIDE, PATCH = 40, 41, 12, 4


def config(**more):
    block = ViTBlock(2, 6, 6, 24)
    vision = ViTConfig(PATCH, 12, (block,) * 2, 0, fused=False, class_token=True, pre_norm=True, patch_bias=False,
                       head_bias=False, activation="quick_gelu", epsilon=1e-5, image=(SIDE, SIDE))  # fmt: skip
    return LlavaConfig(vision, llama_config(VOCAB, 16, 24, 2, 4, 2, eps=1e-5), IMAGE, **more)


@functools.cache
def model():
    """(module, variables) whose tokens differ and matter."""
    module = Llava(config())
    shapes = jax.eval_shape(module.init, jax.random.key(0), *(a[:1] for a in prompt()[:2]))
    rng = np.random.default_rng(0)

    def one(path, leaf):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan = max(int(np.prod(leaf.shape[:-1])), 1) if path[-1].key == "kernel" else 1
        return jnp.asarray(rng.normal(size=leaf.shape) * (2 / fan) ** 0.5, leaf.dtype)

    with jax.ensure_compile_time_eval():  # kept for later tests, also if the first asks while tracing
        return module, jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def prompt(images=2):
    """(ids, images, mask): two rows of different lengths, each with the same number of images at its own places."""
    rng = np.random.default_rng(1)
    m = (SIDE // PATCH) ** 2
    rows = []
    for before, between, behind in ((2, 1, 3), (1, 2, 1)):
        parts = [rng.integers(0, IMAGE, before)]
        for i in range(images):
            parts += [np.full(m, IMAGE), rng.integers(0, IMAGE, between if i < images - 1 else behind)]
        rows.append(np.concatenate(parts))
    tokens = max(map(len, rows))
    ids = np.stack([np.pad(r, (tokens - len(r), 0)) for r in rows]).astype(np.int32)
    mask = np.stack([np.arange(tokens) >= tokens - len(r) for r in rows])
    pixels = rng.normal(size=(2, images, SIDE, SIDE, 3)).astype(np.float32)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(ids), jnp.asarray(pixels), jnp.asarray(mask)
