"""Vision transformers in timm's layout (Dosovitskiy et al. 2021), every width free, per block.

The fused query-key-value kernel is kept as (stream, 3, heads, head size): heads are an axis of their own, so that a
pruned tree shows how many there are. One kernel has one head size: to prune the sizes of query/key and of value heads
separately, `unfuse` the model before tracing it; then they are three leaves ("query", "key", "value") that may differ.
LayerNorm takes the variance in one pass (flax's default), so that pruning the stream is exact in replay; `norm_width`
remembers the divisor the statistics were trained with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models import layers


@dataclasses.dataclass(frozen=True)
class ViTBlock:
    """Widths of one block: heads, size of a query/key head, size of a value head, hidden width of the MLP.

    `scale_head` is the head size the attention scale 1/sqrt was trained with, where it is not `head`.
    """

    heads: int
    head: int
    value_head: int
    mlp: int
    scale_head: int | None = None


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Every width of a vision transformer.

    Attributes:
      patch: side of a patch in pixels.
      stream: width of the residual stream.
      blocks: widths per block.
      num_classes: outputs.
      pool: "token" (class token) or "mean" (average over patches, then the final norm).
      fused: whether query, key and value share one kernel (needs head == value_head).
      norm_width: divisor of LayerNorm's means; the width of the stream before pruning.
    """

    patch: int
    stream: int
    blocks: tuple[ViTBlock, ...]
    num_classes: int
    pool: str = "token"
    fused: bool = True
    norm_width: int | None = None


class OnePassLayerNorm(nn.Module):
    """LayerNorm with variance E[x^2] - E[x]^2 and a divisor that may stay that of the unpruned stream."""

    width: int | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., channels)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        n = self.width or x.shape[-1]
        mean = jnp.sum(wide, axis=-1, keepdims=True) / n
        square = jnp.sum(wide * wide, axis=-1, keepdims=True) / n
        variance = jnp.maximum(square - mean * mean, 0.0)
        return ((wide - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention."""

    config: ViTBlock
    fused: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, channels)."""
        c = self.config
        if self.fused and c.head != c.value_head:
            raise ValueError(
                f"query heads of {c.head} and value heads of {c.value_head} do not fit one kernel: use fused=False"
            )
        if self.fused:
            q, k, v = jnp.moveaxis(nn.DenseGeneral((3, c.heads, c.head), name="qkv")(x), -3, 0)
        else:
            q, k, v = (
                nn.DenseGeneral((c.heads, n), name=name)(x)
                for name, n in (("query", c.head), ("key", c.head), ("value", c.value_head))
            )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (c.scale_head or c.head) ** -0.5
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(x.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="proj")(y)


class ViT(nn.Module):
    """A vision transformer with the widths of its config."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (batch, height, width, channels) -> logits (batch, num_classes)."""
        c = self.config
        x = nn.Conv(c.stream, (c.patch,) * 2, (c.patch,) * 2, padding="VALID", name="patch_embed")(x)
        x = jnp.reshape(x, (x.shape[0], -1, x.shape[-1]))
        if c.pool == "token":
            token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, c.stream))
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.stream)).astype(x.dtype), x], axis=1)
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, x.shape[1], c.stream))
        for i, block in enumerate(c.blocks):
            name = f"block{i + 1}"
            y = OnePassLayerNorm(c.norm_width, name=f"{name}_norm1")(x)
            x = x + Attention(block, c.fused, name=f"{name}_attn")(y)
            y = nn.Dense(block.mlp, name=f"{name}_fc1")(OnePassLayerNorm(c.norm_width, name=f"{name}_norm2")(x))
            x = x + nn.Dense(c.stream, name=f"{name}_fc2")(nn.gelu(y, approximate=False))
        if c.pool == "mean":
            x = jnp.mean(x, axis=1)
        x = OnePassLayerNorm(c.norm_width, name="norm")(x)
        return nn.Dense(c.num_classes, name="head")(x[:, 0] if c.pool == "token" else x)


def vit(
    stream: int,
    depth: int,
    heads: int,
    patch: int,
    num_classes: int,
    mlp: int | None = None,
    pool: str = "token",
    fused: bool = True,
) -> ViT:
    """A vision transformer of uniform widths."""
    if stream % heads:
        raise ValueError(f"{heads} heads do not divide the stream width {stream}")
    if pool not in ("token", "mean"):
        raise ValueError(f"pool must be 'token' or 'mean', not {pool!r}")
    head = stream // heads
    return ViT(
        ViTConfig(patch, stream, (ViTBlock(heads, head, head, mlp or 4 * stream),) * depth, num_classes, pool, fused)
    )


def vit_base(num_classes: int = 1000, pool: str = "token") -> ViT:
    """ViT-B/16."""
    return vit(768, 12, 12, 16, num_classes, pool=pool)


def unfuse(module: ViT, variables: Any) -> tuple[ViT, Any]:
    """The same function with separate query, key and value kernels, whose head sizes can then be pruned separately.

    Raises:
      ValueError: another model's tree.
    """
    if not module.config.fused:
        return module, variables
    params = dict(layers.params_of(variables))
    for i in range(len(module.config.blocks)):
        attention = dict(layers.find(params, f"block{i + 1}_attn"))
        for leaf in ("kernel", "bias"):
            layers.shape_of(attention, "qkv", leaf)
        qkv = attention.pop("qkv")
        for k, name in enumerate(("query", "key", "value")):
            attention[name] = {"kernel": qkv["kernel"][:, k], "bias": qkv["bias"][k]}
        params[f"block{i + 1}_attn"] = attention
    split = {**variables, "params": params} if "params" in variables else params
    return module.clone(config=dataclasses.replace(module.config, fused=False)), split


def config_from_params(variables: Any, base: ViTConfig) -> ViTConfig:
    """The config whose widths are those of a (pruned) tree.

    The attention scale and LayerNorm's divisor stay those of `base`, with which the weights were trained.

    Raises:
      ValueError: another model's tree.
    """
    p = layers.params_of(variables)
    blocks = []
    for i, b in enumerate(base.blocks):
        attention = layers.find(p, f"block{i + 1}_attn")
        if base.fused:
            heads, head = layers.shape_of(attention, "qkv", "kernel")[-2:]
            value = head
        else:
            heads, head = layers.shape_of(attention, "query", "kernel")[-2:]
            value = layers.shape_of(attention, "value", "kernel")[-1]
        mlp = layers.kernel_width(p, f"block{i + 1}_fc1")
        blocks.append(ViTBlock(int(heads), int(head), int(value), mlp, b.scale_head or b.head))
    return dataclasses.replace(
        base,
        stream=layers.kernel_width(p, "patch_embed"),
        blocks=tuple(blocks),
        num_classes=layers.kernel_width(p, "head"),
        norm_width=base.norm_width or base.stream,
    )
