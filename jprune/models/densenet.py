"""DenseNet-BC (Huang et al. 2017): every layer sees the concatenation of all before it; every width free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class DenseNetConfig:
    """Every width of a DenseNet-BC.

    Attributes:
      stem: width after the first convolution.
      blocks: per block, per layer: (bottleneck width, growth).
      transitions: output widths between blocks.
      num_classes: outputs.
      stem_kernel, stem_stride, stem_pool: (7, 2, True) for ImageNet, (3, 1, False) for small images.
    """

    stem: int
    blocks: tuple[tuple[tuple[int, int], ...], ...]
    transitions: tuple[int, ...]
    num_classes: int
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True


class DenseNet(nn.Module):
    """A DenseNet-BC with the widths of its config."""

    config: DenseNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> logits (batch, num_classes)."""
        c = self.config
        x = layers.conv(c.stem, c.stem_kernel, c.stem_stride, name="stem_conv")(x)
        if c.stem_pool:
            x = layers.max_pool(nn.relu(layers.norm(train, "stem_bn")(x)), 3, 2, 1)
        for i, block in enumerate(c.blocks):
            for j, (bottleneck, growth) in enumerate(block):
                name = f"block{i + 1}_layer{j + 1}"
                y = nn.relu(layers.norm(train, f"{name}_bn1")(x))
                y = nn.relu(layers.norm(train, f"{name}_bn2")(layers.conv(bottleneck, 1, name=f"{name}_conv1")(y)))
                x = jnp.concatenate([x, layers.conv(growth, 3, name=f"{name}_conv2")(y)], axis=-1)
            if i < len(c.transitions):
                x = nn.relu(layers.norm(train, f"transition{i + 1}_bn")(x))
                x = layers.conv(c.transitions[i], 1, name=f"transition{i + 1}_conv")(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(layers.norm(train, "last_bn")(x))
        return nn.Dense(c.num_classes, name="head")(layers.global_average(x))


def densenet(blocks: Sequence[int], growth: int, stem: int, num_classes: int, small_images: bool = False) -> DenseNet:
    """A DenseNet-BC with bottlenecks of 4 x growth and transitions that halve the width."""
    width, transitions = stem, []
    for count in blocks:
        width += count * growth
        transitions.append(width // 2)
        width //= 2
    stem_shape = (3, 1, False) if small_images else (7, 2, True)
    return DenseNet(
        DenseNetConfig(
            stem, tuple(((4 * growth, growth),) * n for n in blocks), tuple(transitions[:-1]), num_classes, *stem_shape
        )
    )


def densenet121(num_classes: int = 1000) -> DenseNet:
    """DenseNet-121."""
    return densenet((6, 12, 24, 16), 32, 64, num_classes)


def config_from_params(variables: Any, base: DenseNetConfig) -> DenseNetConfig:
    """The config whose widths are those of a (pruned) tree; raises ValueError for another model's tree."""
    p = layers.params_of(variables)
    blocks = tuple(
        tuple(
            (
                layers.kernel_width(p, f"block{i + 1}_layer{j + 1}_conv1"),
                layers.kernel_width(p, f"block{i + 1}_layer{j + 1}_conv2"),
            )
            for j in range(len(block))
        )
        for i, block in enumerate(base.blocks)
    )
    transitions = tuple(layers.kernel_width(p, f"transition{i + 1}_conv") for i in range(len(base.transitions)))
    return dataclasses.replace(
        base,
        stem=layers.kernel_width(p, "stem_conv"),
        blocks=blocks,
        transitions=transitions,
        num_classes=layers.kernel_width(p, "head"),
    )
