"""A small U-Net (Ronneberger et al. 2015): BatchNorm or GroupNorm, transposed convolution or resize, skip concat."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Every width of a U-Net.

    Attributes:
      down: per level (first width, second width) on the way down; the last level is the bottom.
      up: per level on the way up, from the bottom: (width after upsampling, first width, second width).
      out: output channels.
      norm: "batch" or "group".
      norm_groups: groups of GroupNorm.
      upsample: "transpose" (2x2 transposed convolution) or "nearest" (resize, then 1x1 convolution).
    """

    down: tuple[tuple[int, int], ...]
    up: tuple[tuple[int, int, int], ...]
    out: int
    norm: str = "batch"
    norm_groups: int = 4
    upsample: str = "transpose"


class UNet(nn.Module):
    """A U-Net with the widths of its config."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> (batch, height, width, out); sides divisible by 2^(levels - 1)."""
        c = self.config
        skips = []
        for i, widths in enumerate(c.down):
            if i:
                x = layers.max_pool(x, 2, 2, 0)
            x = self._pair(x, widths, f"down{i + 1}", train)
            skips.append(x)
        skips.pop()
        for i, (raised, *widths) in enumerate(c.up):
            if c.upsample == "transpose":
                x = nn.ConvTranspose(raised, (2, 2), (2, 2), padding="VALID", name=f"up{i + 1}_raise")(x)
            else:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = nn.Conv(raised, (1, 1), name=f"up{i + 1}_raise")(x)
            x = self._pair(jnp.concatenate([skips.pop(), x], axis=-1), widths, f"up{i + 1}", train)
        return nn.Conv(c.out, (1, 1), name="head")(x)

    def _pair(self, x: jax.Array, widths: Any, name: str, train: bool) -> jax.Array:
        for k, width in enumerate(widths):
            x = layers.conv(width, 3, name=f"{name}_conv{k + 1}")(x)
            if self.config.norm == "batch":
                x = layers.norm(train, f"{name}_norm{k + 1}")(x)
            else:
                x = nn.GroupNorm(self.config.norm_groups, name=f"{name}_norm{k + 1}")(x)
            x = nn.relu(x)
        return x


def unet(
    width: int = 8,
    levels: int = 3,
    out: int = 1,
    norm: str = "batch",
    upsample: str = "transpose",
    norm_groups: int = 4,
) -> UNet:
    """A U-Net whose width doubles at every level."""
    if norm not in ("batch", "group") or upsample not in ("transpose", "nearest"):
        raise ValueError(
            f"norm is 'batch' or 'group' and upsample 'transpose' or 'nearest'; got {norm!r}, {upsample!r}"
        )
    down = tuple((width * 2**i,) * 2 for i in range(levels))
    up = tuple((width * 2**i,) * 3 for i in reversed(range(levels - 1)))
    return UNet(UNetConfig(down, up, out, norm, norm_groups, upsample))


def config_from_params(variables: Any, base: UNetConfig) -> UNetConfig:
    """The config whose widths are those of a (pruned) tree.

    Raises:
      ValueError: another model's tree, or one that lost channels before a GroupNorm (which only replay can run).
    """
    p = layers.params_of(variables)
    down = tuple(
        (layers.kernel_width(p, f"down{i + 1}_conv1"), layers.kernel_width(p, f"down{i + 1}_conv2"))
        for i in range(len(base.down))
    )
    up = tuple(
        (
            layers.kernel_width(p, f"up{i + 1}_raise"),
            layers.kernel_width(p, f"up{i + 1}_conv1"),
            layers.kernel_width(p, f"up{i + 1}_conv2"),
        )
        for i in range(len(base.up))
    )
    if base.norm == "group":
        for way, new, old in (("down", down, base.down), ("up", [u[1:] for u in up], [u[1:] for u in base.up])):
            for i, (widths, before) in enumerate(zip(new, old, strict=True)):
                for k, (w, full) in enumerate(zip(widths, before, strict=True)):
                    if w != full:
                        raise ValueError(
                            f"the GroupNorm {way}{i + 1}_norm{k + 1} was pruned from {full} channels to {w}: whether "
                            "whole norm groups went, or channels of each, no array shows, and the statistics keep "
                            "their old divisor; use graph.replay(keep), or build with norm='batch'"
                        )
    return dataclasses.replace(base, down=down, up=up, out=layers.kernel_width(p, "head"))
