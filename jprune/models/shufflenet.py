"""ShuffleNetV2 (Ma et al. 2018): channel split, two branches, concatenate, shuffle; every width free."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class Unit:
    """Widths of one unit.

    Attributes:
      passed: channels of a stride-1 unit that go past the branch (the first part of the split); 0 when downsampling.
      inner: width inside the branch.
      out: width the branch ends in.
      stride: 1, or 2 for a downsampling unit, whose left branch ends in `left` channels.
      left: output width of the left branch of a downsampling unit.
    """

    passed: int
    inner: int
    out: int
    stride: int = 1
    left: int = 0


@dataclasses.dataclass(frozen=True)
class ShuffleNetConfig:
    """Every width of a ShuffleNetV2."""

    stem: int
    stages: tuple[tuple[Unit, ...], ...]
    last: int
    num_classes: int
    stem_stride: int = 2
    stem_pool: bool = True


class ShuffleUnit(nn.Module):
    """Split (or two downsampling branches), convolve one side, concatenate, shuffle the two halves."""

    config: Unit

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels)."""
        c = self.config
        if c.stride == 1:
            left, y = x[..., : c.passed], x[..., c.passed :]
        else:
            y = x
            left = layers.conv(x.shape[-1], 3, c.stride, groups=x.shape[-1], name="left_depthwise_conv")(x)
            left = layers.norm(train, "left_depthwise_bn")(left)
            left = nn.relu(layers.norm(train, "left_bn")(layers.conv(c.left, 1, name="left_conv")(left)))
        y = nn.relu(layers.norm(train, "bn1")(layers.conv(c.inner, 1, name="conv1")(y)))
        y = layers.norm(train, "bn2")(layers.conv(c.inner, 3, c.stride, groups=c.inner, name="depthwise_conv")(y))
        y = nn.relu(layers.norm(train, "bn3")(layers.conv(c.out, 1, name="conv2")(y)))
        return shuffle(jnp.concatenate([left, y], axis=-1))


def shuffle(x: jax.Array) -> jax.Array:
    """Interleave the two halves of the channels."""
    *rest, channels = x.shape
    return jnp.swapaxes(jnp.reshape(x, (*rest, 2, channels // 2)), -1, -2).reshape(x.shape)


class ShuffleNetV2(nn.Module):
    """A ShuffleNetV2 with the widths of its config."""

    config: ShuffleNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> logits (batch, num_classes)."""
        c = self.config
        x = nn.relu(layers.norm(train, "stem_bn")(layers.conv(c.stem, 3, c.stem_stride, name="stem_conv")(x)))
        if c.stem_pool:
            x = layers.max_pool(x, 3, 2, 1)
        for i, stage in enumerate(c.stages):
            for j, unit in enumerate(stage):
                x = ShuffleUnit(unit, name=f"stage{i + 1}_unit{j + 1}")(x, train)
        x = nn.relu(layers.norm(train, "last_bn")(layers.conv(c.last, 1, name="last_conv")(x)))
        return nn.Dense(c.num_classes, name="head")(layers.global_average(x))


WIDTHS = {0.5: (24, (48, 96, 192), 1024), 1.0: (24, (116, 232, 464), 1024), 1.5: (24, (176, 352, 704), 1024)}


def shufflenet_v2(
    num_classes: int = 1000, multiplier: float = 1.0, small_images: bool = False, units: tuple[int, ...] = (4, 8, 4)
) -> ShuffleNetV2:
    """ShuffleNetV2 0.5x, 1x or 1.5x; `small_images`: stem at stride 1 without pooling."""
    if multiplier not in WIDTHS:
        raise ValueError(f"ShuffleNetV2 here comes in {sorted(WIDTHS)}, not {multiplier}")
    stem, widths, last = WIDTHS[multiplier]
    stages = tuple(
        (Unit(0, w // 2, w // 2, 2, w // 2), *(Unit(w // 2, w // 2, w // 2) for _ in range(n - 1)))
        for w, n in zip(widths, units, strict=True)
    )
    return ShuffleNetV2(ShuffleNetConfig(stem, stages, last, num_classes, *((1, False) if small_images else (2, True))))


def config_from_params(variables: Any, base: ShuffleNetConfig) -> ShuffleNetConfig:
    """The config whose widths are those of a (pruned) tree; where a unit splits is read from its branch's input width.

    Raises:
      ValueError: another model's tree.
    """
    p = layers.params_of(variables)
    stages = []
    for i, stage in enumerate(base.stages):
        units, stream = [], 0
        for j, unit in enumerate(stage):
            name = f"stage{i + 1}_unit{j + 1}"
            inner, out = layers.kernel_width(p, name, "conv1"), layers.kernel_width(p, name, "conv2")
            left = layers.kernel_width(p, name, "left_conv") if unit.stride > 1 else 0
            passed = stream - layers.shape_of(p, name, "conv1", "kernel")[2] if unit.stride == 1 else 0
            stream = out + (left if unit.stride > 1 else passed)
            units.append(Unit(passed, inner, out, unit.stride, left))
        stages.append(tuple(units))
    return dataclasses.replace(
        base,
        stem=layers.kernel_width(p, "stem_conv"),
        stages=tuple(stages),
        last=layers.kernel_width(p, "last_conv"),
        num_classes=layers.kernel_width(p, "head"),
    )
