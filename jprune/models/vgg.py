"""VGG with BatchNorm (Simonyan and Zisserman 2015), CIFAR and ImageNet heads, every width free."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """Every width of a VGG.

    Attributes:
      features: per block the widths of its convolutions; `pools` says which end in 2x2 max pooling.
      hidden: widths of the hidden dense layers of the head.
      num_classes: outputs.
      bias: whether convolutions have biases.
      pool_to: 1 averages the last feature map; otherwise its side, flattened into the head (7 for ImageNet).
      pools: which blocks (from 1) end in pooling (small images allow fewer).
    """

    features: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]
    num_classes: int
    bias: bool = True
    pool_to: int = 1
    pools: tuple[int, ...] = (1, 2, 3, 4, 5)


class VGG(nn.Module):
    """A VGG with the widths of its config."""

    config: VGGConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> logits (batch, num_classes)."""
        c = self.config
        for i, block in enumerate(c.features):
            for j, width in enumerate(block):
                x = layers.conv(width, 3, bias=c.bias, name=f"block{i + 1}_conv{j + 1}")(x)
                x = nn.relu(layers.norm(train, f"block{i + 1}_bn{j + 1}")(x))
            if i + 1 in c.pools:
                x = layers.max_pool(x, 2, 2, 0)
        if c.pool_to == 1:
            x = layers.global_average(x)
        elif x.shape[1] != c.pool_to:
            raise ValueError(
                f"the last feature map is {x.shape[1]} wide, this head wants {c.pool_to}: use images of "
                f"{c.pool_to * 2 ** len(c.pools)} pixels"
            )
        x = jnp.reshape(x, (x.shape[0], -1))
        for i, width in enumerate(c.hidden):
            x = nn.relu(nn.Dense(width, name=f"dense{i + 1}")(x))
        return nn.Dense(c.num_classes, name="head")(x)


BLOCKS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    depth: int,
    num_classes: int = 10,
    imagenet: bool = False,
    bias: bool | None = None,
    pools: tuple[int, ...] = (1, 2, 3, 4, 5),
) -> VGG:
    """VGG-16/19 with BatchNorm: a single dense layer for small images, torchvision's three for ImageNet."""
    if depth not in BLOCKS:
        raise ValueError(f"VGG here has depth 16 or 19, not {depth}")
    features = tuple((w,) * n for w, n in zip((64, 128, 256, 512, 512), BLOCKS[depth], strict=True))
    head = ((4096, 4096), 7) if imagenet else ((), 1)
    return VGG(VGGConfig(features, head[0], num_classes, bias if bias is not None else imagenet, head[1], pools))


def config_from_params(variables: Any, base: VGGConfig) -> VGGConfig:
    """The config whose widths are those of a (pruned) tree; raises ValueError for another model's tree."""
    p = layers.params_of(variables)
    features = tuple(
        tuple(layers.kernel_width(p, f"block{i + 1}_conv{j + 1}") for j in range(len(block)))
        for i, block in enumerate(base.features)
    )
    hidden = tuple(layers.kernel_width(p, f"dense{i + 1}") for i in range(len(base.hidden)))
    return dataclasses.replace(base, features=features, hidden=hidden, num_classes=layers.kernel_width(p, "head"))
