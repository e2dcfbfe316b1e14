"""ResNets for CIFAR-sized and ImageNet-sized images (He et al. 2016), every width free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class Block:
    """Widths of one residual block.

    Attributes:
      inner: widths between the convolutions: (w,) for a basic block, (w1, w2) for a bottleneck.
      out: width of the residual stream after the block.
      stride: of the block.
      shortcut: "identity", "projection" (1x1 convolution + BatchNorm, option B) or "pad" (zero channels, option A).
      pad: for "pad": zero channels (before, after) the carried ones.
    """

    inner: tuple[int, ...]
    out: int
    stride: int = 1
    shortcut: str = "identity"
    pad: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Every width of a ResNet.

    Attributes:
      stem: width after the first convolution.
      stages: blocks of each stage.
      num_classes: outputs.
      stem_kernel, stem_stride, stem_pool: (7, 2, True) for ImageNet, (3, 1, False) for CIFAR.
      zero_last_scale: start the last BatchNorm scale of each block at zero.
    """

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    num_classes: int
    stem_kernel: int = 3
    stem_stride: int = 1
    stem_pool: bool = False
    zero_last_scale: bool = False


class ResidualBlock(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    config: Block
    zero_last_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels)."""
        c = self.config
        bottleneck = len(c.inner) == 2
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = (*c.inner, c.out)
        strided = 1 if bottleneck else 0  # torchvision puts the stride on the 3x3
        y = x
        for i, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
            last = i == len(widths) - 1
            y = layers.conv(width, kernel, c.stride if i == strided else 1, name=f"conv{i + 1}")(y)
            y = layers.norm(train, f"bn{i + 1}", self.zero_last_scale and last)(y)
            y = y if last else nn.relu(y)
        if c.shortcut == "projection":
            x = layers.norm(train, "shortcut_bn")(layers.conv(c.out, 1, c.stride, name="shortcut_conv")(x))
        elif c.shortcut == "pad":
            x = jnp.pad(x[:, :: c.stride, :: c.stride], ((0, 0), (0, 0), (0, 0), c.pad))
        return nn.relu(y + x)


class ResNet(nn.Module):
    """A ResNet with the widths of its config."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> logits (batch, num_classes)."""
        c = self.config
        x = layers.conv(c.stem, c.stem_kernel, c.stem_stride, name="stem_conv")(x)
        x = nn.relu(layers.norm(train, "stem_bn")(x))
        if c.stem_pool:
            x = layers.max_pool(x, 3, 2, 1)
        for i, stage in enumerate(c.stages):
            for j, block in enumerate(stage):
                x = ResidualBlock(block, c.zero_last_scale, name=f"stage{i + 1}_block{j + 1}")(x, train)
        return nn.Dense(c.num_classes, name="head")(layers.global_average(x))


def cifar(
    depth: int, num_classes: int = 10, shortcut: str = "projection", widths: Sequence[int] = (16, 32, 64)
) -> ResNet:
    """ResNet-20/32/44/56/110 (depth = 6n + 2) for small images; shortcut "projection" (B) or "pad" (A)."""
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (20, 32, 44, 56, 110), not {depth}")
    return small((n,) * 3, num_classes, shortcut, widths)


def small(
    blocks: Sequence[int], num_classes: int = 10, shortcut: str = "projection", widths: Sequence[int] = (16, 32, 64)
) -> ResNet:
    """A basic-block ResNet with a 3x3 stem and any number of blocks and widths per stage."""
    if shortcut not in ("projection", "pad"):
        raise ValueError(f"shortcut must be 'projection' or 'pad', not {shortcut!r}")
    stages, stream = [], widths[0]
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        stage = []
        for j in range(count):
            changes = j == 0 and i > 0
            extra = width - stream
            stage.append(
                Block(
                    (width,),
                    width,
                    2 if changes else 1,
                    shortcut if changes else "identity",
                    (extra // 2, extra - extra // 2) if changes and shortcut == "pad" else (0, 0),
                )
            )
            stream = width
        stages.append(tuple(stage))
    return ResNet(ResNetConfig(widths[0], tuple(stages), num_classes))


def imagenet(depth: int, num_classes: int = 1000, small_stem: bool = False) -> ResNet:
    """ResNet-18/34/50 as torchvision lays them out; `small_stem` for 32x32 images (3x3, stride 1, no pooling)."""
    counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}.get(depth)
    if counts is None:
        raise ValueError(f"ImageNet ResNets here have depth 18, 34 or 50, not {depth}")
    stages, stream = [], 64
    for i, count in enumerate(counts):
        width = 64 * 2**i
        out = width * 4 if depth == 50 else width
        stage = []
        for j in range(count):
            stride = 2 if j == 0 and i > 0 else 1
            stage.append(
                Block(
                    (width, width) if depth == 50 else (width,),
                    out,
                    stride,
                    "projection" if stride > 1 or stream != out else "identity",
                )
            )
            stream = out
        stages.append(tuple(stage))
    stem = (3, 1, False) if small_stem else (7, 2, True)
    return ResNet(ResNetConfig(64, tuple(stages), num_classes, *stem))


def config_from_params(variables: Any, base: ResNetConfig) -> ResNetConfig:
    """The config whose widths are those of a (pruned) tree.

    Raises:
      ValueError: another model's tree, or pad shortcuts, whose channel counts no array shows.
    """
    p = layers.params_of(variables)
    stages = []
    for i, stage in enumerate(base.stages):
        blocks = []
        for j, block in enumerate(stage):
            name = f"stage{i + 1}_block{j + 1}"
            widths = [layers.kernel_width(p, name, f"conv{k + 1}") for k in range(len(block.inner) + 1)]
            if block.shortcut == "pad":
                stream = layers.shape_of(p, name, "conv1", "kernel")[2]
                if stream + sum(block.pad) != widths[-1]:
                    raise ValueError(
                        f"{name} pads {stream} channels to {widths[-1]}, but how many go before and after "
                        "cannot be read from the arrays; use graph.replay, or build with shortcut='projection'"
                    )
            blocks.append(dataclasses.replace(block, inner=tuple(widths[:-1]), out=widths[-1]))
        stages.append(tuple(blocks))
    return dataclasses.replace(
        base, stem=layers.kernel_width(p, "stem_conv"), stages=tuple(stages), num_classes=layers.kernel_width(p, "head")
    )
