"""MobileNetV2 (Sandler et al. 2018), every width free."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class InvertedResidual:
    """Widths of one block: expansion (0: none), output, stride, and whether the input is added back.

    `projection` puts a 1x1 convolution + BatchNorm on a stride-1 shortcut whose widths differ (a CIFAR variant).
    """

    expanded: int
    out: int
    stride: int
    residual: bool
    projection: bool = False


@dataclasses.dataclass(frozen=True)
class MobileNetConfig:
    """Every width of a MobileNetV2."""

    stem: int
    blocks: tuple[InvertedResidual, ...]
    last: int
    num_classes: int
    stem_stride: int = 2


class InvertedResidualBlock(nn.Module):
    """Expand (1x1), depthwise 3x3, project (1x1)."""

    config: InvertedResidual

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels)."""
        c = self.config
        y = x
        if c.expanded:
            y = _relu6(layers.norm(train, "expand_bn")(layers.conv(c.expanded, 1, name="expand_conv")(y)))
        width = y.shape[-1]
        y = layers.conv(width, 3, c.stride, groups=width, name="depthwise_conv")(y)
        y = _relu6(layers.norm(train, "depthwise_bn")(y))
        y = layers.norm(train, "project_bn")(layers.conv(c.out, 1, name="project_conv")(y))
        if c.projection:
            x = layers.norm(train, "shortcut_bn")(layers.conv(c.out, 1, name="shortcut_conv")(x))
        return x + y if c.residual else y


class MobileNetV2(nn.Module):
    """A MobileNetV2 with the widths of its config."""

    config: MobileNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> logits (batch, num_classes)."""
        c = self.config
        x = _relu6(layers.norm(train, "stem_bn")(layers.conv(c.stem, 3, c.stem_stride, name="stem_conv")(x)))
        for i, block in enumerate(c.blocks):
            x = InvertedResidualBlock(block, name=f"block{i + 1}")(x, train)
        x = _relu6(layers.norm(train, "last_bn")(layers.conv(c.last, 1, name="last_conv")(x)))
        return nn.Dense(c.num_classes, name="head")(layers.global_average(x))


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.minimum(nn.relu(x), 6.0)


STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(num_classes: int = 1000, small_images: bool = False, projection: bool = False) -> MobileNetV2:
    """MobileNetV2 1.0; `small_images`: stem and second stage at stride 1; `projection`: the variant with 1x1
    shortcuts wherever stride 1 changes the width, and an expansion convolution in every block."""
    blocks, stream = [], 32
    for i, (expansion, out, count, stride) in enumerate(STAGES):
        for j in range(count):
            s = 1 if j else (1 if small_images and i == 1 else stride)
            expanded = expansion * stream if expansion > 1 or projection else 0
            project = projection and s == 1 and stream != out
            blocks.append(InvertedResidual(expanded, out, s, s == 1 and (stream == out or project), project))
            stream = out
    return MobileNetV2(MobileNetConfig(32, tuple(blocks), 1280, num_classes, 1 if small_images else 2))


def config_from_params(variables: Any, base: MobileNetConfig) -> MobileNetConfig:
    """The config whose widths are those of a (pruned) tree; raises ValueError for another model's tree."""
    p = layers.params_of(variables)
    blocks = []
    for i, b in enumerate(base.blocks):
        name = f"block{i + 1}"
        expanded = layers.kernel_width(p, name, "expand_conv") if b.expanded else 0
        blocks.append(dataclasses.replace(b, expanded=expanded, out=layers.kernel_width(p, name, "project_conv")))
    return dataclasses.replace(
        base,
        stem=layers.kernel_width(p, "stem_conv"),
        blocks=tuple(blocks),
        last=layers.kernel_width(p, "last_conv"),
        num_classes=layers.kernel_width(p, "head"),
    )
