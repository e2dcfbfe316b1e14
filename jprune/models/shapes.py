"""Which arrays a module of the zoo holds, from its config alone; and whether a tree is such a tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jprune.models import densenet, dit, layers, llama, unet, vgg, vit
from jprune.tracing.paths import flatten

FIRST = {vgg.VGG: "block1_conv1", vit.ViT: "patch_embed", unet.UNet: "down1_conv1"}  # elsewhere: "stem_conv"


def first_layer(module: nn.Module) -> str:
    """Name of the layer that reads the image."""
    return FIRST.get(type(module), "stem_conv")


def shapes_of(module: nn.Module, channels: int, tokens: int | None = None) -> Any:
    """The variables of a module of the zoo, as `ShapeDtypeStruct`s; nothing is computed.

    Args:
      module: of the zoo.
      channels: of its images.
      tokens: of a vision transformer: the rows of its position embedding (the class token is one of them, as a rule).
        A decoder (`jprune.models.llama`) and a `VideoDiT` need neither.

    Raises:
      ValueError: the config's widths do not fit each other.
    """
    c: Any = getattr(module, "config", None)
    height = width = 32
    if isinstance(module, vgg.VGG):
        height = width = c.pool_to * 2 ** len(c.pools)
    elif isinstance(module, unet.UNet):
        height = width = 2 ** (len(c.down) - 1)
    elif isinstance(module, densenet.DenseNet):
        height = width = 2 ** (len(c.blocks) + 2)
    elif isinstance(module, vit.ViT):
        if not tokens or tokens <= c.embedded:
            raise ValueError(f"a position embedding of {tokens} tokens leaves none for the image's patches")
        height, width = c.image or (c.patch, c.patch * (tokens - c.embedded))
    shapes = [(1, height, width, channels)]
    if isinstance(module, llama.Llama):
        shapes = [(1, 2)]
    elif isinstance(module, dit.VideoDiT):
        shapes = [(1, *c.patch, c.channels), (1,), (1, 1, c.text_width)]
    dtype = jnp.int32 if isinstance(module, llama.Llama) else jnp.float32
    try:
        return jax.eval_shape(module.init, jax.random.key(0), *(jax.ShapeDtypeStruct(s, dtype) for s in shapes))
    except (TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"the widths of this {type(module).__name__} do not fit each other: {first}") from error


def check_tree(module: nn.Module, variables: Any) -> None:
    """Raise ValueError, naming a leaf, unless a tree (all collections, or the parameters) is one of `module`."""
    params = layers.params_of(variables)
    for path, leaf in flatten(params):
        if 0 in leaf.shape:
            raise ValueError(f"leaf {path!r} has no elements left: only graph.replay(keep) can run this tree")
    no_image = isinstance(module, llama.Llama | dit.VideoDiT)
    channels = 0 if no_image else layers.shape_of(params, first_layer(module), "kernel")[-2]
    tokens = layers.shape_of(params, "pos_embed")[1] if isinstance(module, vit.ViT) else None
    expected = shapes_of(module, channels, tokens)
    whole = "params" in variables
    given = {k: v for k, v in variables.items() if k in expected} if whole else params
    wanted = dict(flatten({k: v for k, v in expected.items() if k in variables} if whole else expected["params"]))
    kind = type(module).__name__
    for path, leaf in flatten(given):
        if path not in wanted:
            raise ValueError(f"leaf {path!r} is none of this {kind}: the tree belongs to another model or config")
        shape = tuple(wanted.pop(path).shape)
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"leaf {path!r} has shape {tuple(leaf.shape)}, but in a {kind} of the other leaves' widths {shape}: "
                "the tree belongs to another model or config, or only graph.replay(keep) can run it"
            )
    if wanted:
        raise ValueError(f"the tree has no leaf {min(wanted)!r}: it belongs to another model or config")
