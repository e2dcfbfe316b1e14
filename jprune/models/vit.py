"""Vision transformers (Dosovitskiy et al. 2021; Touvron et al. 2021; the towers of CLIP), every width free, per block.

The fused query-key-value kernel is kept as (stream, 3, heads, head size): heads are an axis of their own, so that a
pruned tree shows how many there are. One kernel has one head size: to prune the sizes of query/key and of value heads
separately, `unfuse` the model before tracing it; then they are three leaves ("query", "key", "value") that may differ.
LayerNorm takes the variance in one pass (flax's default), so that pruning the stream is exact in replay; `norm_width`
remembers the divisor the statistics were trained with.

The same module can be run on fewer tokens: `apply(variables, images, reducer=...)` calls a reducer of `jprune.methods.tokens`
around its blocks. Parameters are untouched by that; a model may be pruned in its widths and in its tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jprune.models import layers
from jprune.models.token_hook import Seen, TokenReducer, Tokens, all_tokens, key_bias, pooled
from jprune.models.vit_config import ViTBlock, ViTConfig


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation OpenAI trained CLIP with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}


class Trace(NamedTuple):
    """Which tokens went where.

    Attributes:
      index: per block, the original index of the tokens that entered it, and at the end of those that are left:
        depth + 1 arrays (batch, tokens); -1 is a token that was none of the originals.
      mlp: per block, that of the tokens that entered its MLP.
      size, alive: as `index`, what `Tokens` says of them.
    """

    index: tuple[Int[Array, "batch _"], ...]
    mlp: tuple[Int[Array, "batch _"], ...]
    size: tuple[Float[Array, "batch _"] | None, ...]
    alive: tuple[Bool[Array, "batch _"] | None, ...]


class Features(NamedTuple):
    """Tokens of an image from inside the model.

    Attributes:
      x: (batch, tokens, width).
      seen: what the attention of the watched block computed, over all its tokens, the special ones included; None
        unless one was watched.
    """

    x: Float[Array, "batch tokens width"]
    seen: Seen | None


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
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, key_bias: jax.Array | None = None) -> tuple[jax.Array, Seen]:
        """x: (batch, tokens, channels); key_bias: added to the logits, (batch, 1, 1, tokens)."""
        c = self.config
        if self.fused and c.head != c.value_head:
            raise ValueError(
                f"query heads of {c.head} and value heads of {c.value_head} do not fit one kernel: use fused=False"
            )
        if self.fused:
            qkv = nn.DenseGeneral((3, c.heads, c.head), use_bias=self.bias, name="qkv")(x)
            q, k, v = jnp.moveaxis(qkv, -3, 0)
        else:
            q, k, v = (
                nn.DenseGeneral((c.heads, n), use_bias=self.bias, name=name)(x)
                for name, n in (("query", c.head), ("key", c.head), ("value", c.value_head))
            )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits * (c.scale_head or c.head) ** -0.5
        weights = jax.nn.softmax(logits if key_bias is None else logits + key_bias, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(x.dtype), v)
        y = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="proj")(y)
        return y, Seen(weights, q, k, v, 0)


class ViT(nn.Module):
    """A vision transformer with the widths of its config."""

    config: ViTConfig

    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        *,
        reducer: TokenReducer | None = None,
        key: Any = None,
        trace: bool = False,
    ) -> Any:
        """x: (batch, height, width, channels) -> logits (batch, num_classes), and a `Trace` if one is asked for.

        Args:
          x: images.
          train: there is no difference.
          reducer: of `jprune.methods.tokens`; static: it decides how many tokens each block computes with.
          key: for reducers that draw.
          trace: also return which tokens each block saw.

        Raises:
          ValueError: images of another size than the positions are for; a reducer that this model has no token for.
        """
        logits, _, _, passed = self._run(x, reducer=reducer, key=key)
        return (logits, passed) if trace else logits

    def features(
        self,
        x: jax.Array,
        layer: int = -2,
        select: str = "default",
        *,
        watch: int | None = None,
        reducer: TokenReducer | None = None,
        key: Any = None,
    ) -> Features:
        """The tokens as they leave a block; `apply(variables, images, method="features")`. Later blocks are not run.

        Args:
          x: images (batch, height, width, channels).
          layer: 0 is the input of the first block, i the output of the i-th, -1 of the last, -2 of the one before.
          select: "full", or "default" without the special tokens.
          watch: a block, counted from 0 or from the end, whose attention weights, queries and keys are returned.
          reducer, key: as in a call.

        Raises:
          ValueError: no such layer, block or `select`.
        """
        c, depth = self.config, len(self.config.blocks)
        if select not in ("default", "full"):
            raise ValueError(f"select is {select!r}: use 'default' (no special tokens) or 'full'")
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"there is no layer {layer}: {depth} blocks have the layers 0 to {depth}, -1 is the last")
        if watch is not None and not -depth <= watch < depth:
            raise ValueError(f"there is no block {watch} to watch: there are {depth}, -1 is the last")
        stop = layer % (depth + 1)
        block = None if watch is None else watch % depth
        _, states, seen, _ = self._run(x, reducer=reducer, key=key, stop=stop, watch=block)
        states = states[:, c.prefix :] if select == "default" else states
        return Features(states, seen)

    @nn.compact
    def _run(
        self,
        x: jax.Array,
        *,
        reducer: TokenReducer | None,
        key: Any,
        stop: int | None = None,
        watch: int | None = None,
    ) -> tuple[Any, Any, Seen | None, Trace]:
        """(answer, tokens after `stop` blocks, the watched attention, trace); no answer if it stops."""
        c = self.config
        tokens = all_tokens(self._embed(x), key)
        if reducer is not None:
            if reducer.needs_class_token and "cls_token" not in c.special:
                raise ValueError(
                    f"{type(reducer).__name__} looks at the class token, and this ViT (pool {c.pool!r}, special "
                    f"tokens: {', '.join(c.special) or 'none'}) has none: use a reducer that does not, or another model"
                )
            tokens = reducer.before(tokens, c.prefix)
        states = tokens.x if stop == 0 else None
        watched = None
        entered, in_mlp = [tokens], []
        act = ACTIVATIONS[c.activation]
        norm = partial(OnePassLayerNorm, c.norm_width, c.epsilon)
        for i, block in enumerate(c.blocks):
            if stop is not None and i >= max(stop, -1 if watch is None else watch + 1):
                break
            name = f"block{i + 1}"
            y = norm(name=f"{name}_norm1")(tokens.x)
            attention = Attention(block, c.fused, c.qkv_bias, name=f"{name}_attn")
            y, seen = attention(y, None if reducer is None else key_bias(tokens, reducer.proportional))
            seen = seen._replace(prefix=c.prefix)
            watched = seen if i == watch else watched
            tokens = tokens._replace(x=tokens.x + self._scaled(y, f"{name}_scale1"))
            if reducer is not None:
                seen = seen if reducer.reads_weights(i) else seen._replace(weights=None)
                tokens = reducer.inside(i, tokens, seen)
            in_mlp.append(tokens.index)
            y = nn.Dense(block.mlp, name=f"{name}_fc1")(norm(name=f"{name}_norm2")(tokens.x))
            y = nn.Dense(c.stream, name=f"{name}_fc2")(act(y))
            tokens = tokens._replace(x=tokens.x + self._scaled(y, f"{name}_scale2"))
            if reducer is not None:
                tokens = reducer.after(i, tokens, seen)
            entered.append(tokens)
            states = tokens.x if stop == i + 1 else states
        answer = None if stop is not None else self._answer(tokens, norm)
        passed = Trace(
            tuple(t.index for t in entered),
            tuple(in_mlp),
            tuple(t.size for t in entered),
            tuple(t.alive for t in entered),
        )
        return answer, states, watched, passed

    def _embed(self, x: jax.Array) -> jax.Array:
        """Images as tokens (batch, tokens, stream): special ones, then patches row by row, with their positions."""
        c = self.config
        self._check_size(x)
        patches = nn.Conv(
            c.stream, (c.patch,) * 2, (c.patch,) * 2, padding="VALID", use_bias=c.patch_bias, name="patch_embed"
        )(x)
        x = jnp.reshape(patches, (x.shape[0], -1, patches.shape[-1]))
        if c.positions == "patches":
            x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, x.shape[1], c.stream))
        special = [self.param(name, nn.initializers.normal(0.02), (1, n, c.stream)) for name, n in c.special.items()]
        if special:
            rows = [jnp.broadcast_to(t, (x.shape[0], *t.shape[1:])).astype(x.dtype) for t in special]
            x = jnp.concatenate([*rows, x], axis=1)
        if c.positions == "all":
            x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, x.shape[1], c.stream))
        if c.pre_norm:
            x = OnePassLayerNorm(c.norm_width, c.epsilon, name="pre_norm")(x)
        return x

    def _scaled(self, y: jax.Array, name: str) -> jax.Array:
        if not self.config.layer_scale:
            return y
        return y * self.param(name, nn.initializers.ones, (self.config.stream,))

    def _answer(self, tokens: Tokens, norm: Any) -> jax.Array:
        c, final = self.config, norm(name="norm")
        if c.pool == "mean":
            x = final(tokens.x) if c.norm_first else tokens.x
            if tokens.size is None and tokens.alive is None:
                x = jnp.mean(x[:, c.prefix :] if c.prefix else x, axis=1)
            else:
                x = pooled(tokens._replace(x=x), c.prefix)
            read = [x if c.norm_first else final(x)]
        else:
            x = final(tokens.x)
            read = [x[:, 0], x[:, 1]] if c.both_heads else [x[:, 0]]
        if c.num_classes:
            names = ("head", "head_dist")
            read = [nn.Dense(c.num_classes, use_bias=c.head_bias, name=n)(r) for n, r in zip(names, read)]
        return read[0] if len(read) == 1 else (read[0] + read[1]) / 2

    def _check_size(self, x: jax.Array) -> None:
        """Raise ValueError unless images of this size have as many patches as there are positions."""
        c = self.config
        height, width = x.shape[1:3]
        size = f"images of {height}x{width} pixels"
        if c.image is not None and (height, width) != c.image:
            raise ValueError(f"{size} are not what this ViT was trained on: resize them to {c.image[0]}x{c.image[1]}")
        if c.image is None and (height % c.patch or width % c.patch or not height or not width):
            near = [max(1, round(n / c.patch)) * c.patch for n in (height, width)]
            raise ValueError(
                f"{size} cannot be cut into patches of {c.patch}x{c.patch}: resize them, to {near[0]}x{near[1]} say"
            )
        if self.has_variable("params", "pos_embed"):
            places = self.get_variable("params", "pos_embed").shape[1] - c.embedded
            patches = (height // c.patch) * (width // c.patch)
            if patches != places:
                side = round(places**0.5)
                remedy = f"resize them to {side * c.patch}x{side * c.patch}" if side * side == places else "resize them"
                raise ValueError(
                    f"{size} have {patches} patches of {c.patch}x{c.patch}, and this ViT has positions for {places}: "
                    f"{remedy}"
                )


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
        leaves = {"kernel": 1, "bias": 0} if module.config.qkv_bias else {"kernel": 1}
        for leaf in leaves:
            layers.shape_of(attention, "qkv", leaf)
        qkv = attention.pop("qkv")
        for k, name in enumerate(("query", "key", "value")):
            attention[name] = {leaf: qkv[leaf][(slice(None),) * axis + (k,)] for leaf, axis in leaves.items()}
        params[f"block{i + 1}_attn"] = attention
    split = {**variables, "params": params} if "params" in variables else params
    return module.clone(config=dataclasses.replace(module.config, fused=False)), split


def fuse(module: ViT, variables: Any) -> tuple[ViT, Any]:
    """The same function with one kernel for query, key and value.

    Raises:
      ValueError: another model's tree, or heads whose sizes differ.
    """
    if module.config.fused:
        return module, variables
    params = dict(layers.params_of(variables))
    for i, block in enumerate(module.config.blocks):
        if block.head != block.value_head:
            raise ValueError(
                f"block{i + 1} has query heads of {block.head} and value heads of {block.value_head}: they fit no "
                "common kernel"
            )
        attention = dict(layers.find(params, f"block{i + 1}_attn"))
        parts = [layers.find(attention, name) for name in ("query", "key", "value")]
        attention = {name: leaf for name, leaf in attention.items() if name not in ("query", "key", "value")}
        attention["qkv"] = {leaf: jnp.stack([p[leaf] for p in parts], axis=-3) for leaf in parts[0]}
        params[f"block{i + 1}_attn"] = attention
    joined = {**variables, "params": params} if "params" in variables else params
    return module.clone(config=dataclasses.replace(module.config, fused=True)), joined


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
        num_classes=layers.kernel_width(p, "head") if base.num_classes else 0,
        norm_width=base.norm_width or base.stream,
    )
