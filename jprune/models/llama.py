"""LLaMA-family decoders (LLaMA 1 to 3, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE) as Flax linen, every width free, per layer.

One tree of parameters in two arrangements: unrolled (`layer0`, `layer1`, ...; the layers may differ in width) and
scanned (`layers`, a leading axis over equally wide layers; compiles once). `stack_layers` and `unstack_layers` convert.

    embed/embedding (vocab, stream)                 final_norm/scale (stream,)      lm_head/kernel unless tied
    layer{l}/input_norm/scale, post_norm/scale (stream,)
    layer{l}/attn/q/kernel (stream, heads, head)    k, v (stream, kv heads, head)   o (heads, head, stream)
    layer{l}/attn/q_norm/scale, k_norm/scale (head,)                                where qk_norm
    layer{l}/mlp/gate/kernel, up/kernel (stream, ffn)                               down (ffn, stream)
    layer{l}/experts, as `jprune.models.moe.blockffn` has them                      in place of mlp, where config.experts

Heads are an axis of their own, so that a pruned tree shows how many there are. Weights may be bfloat16: norms, angles,
the softmax and the logits are float32 all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jprune.models.decoding import Cache
from jprune.models.llama_config import FAMILIES, LlamaConfig, llama_config
from jprune.models.llama_trees import (
    config_from_params,
    fold_norm_width,
    is_scanned,
    stack_layers,
    unstack_layers,
    with_biases,
)
from jprune.models.moe.blockffn import BlockFFN, all_experts
from jprune.models.rope import angles, rotate
from jprune.models.token_drops import Drop, dropped, ends_of


class Context(NamedTuple):
    """What all layers share in one pass.

    Attributes:
      cos, sin: (batch or 1, tokens, head / 2) float32.
      back: (tokens, keys) int32, how many positions a key lies behind a query; negative ones are in the future.
      valid: (batch, keys) bool, False at padding; None: no padding.
      start: where in the cache this pass writes; None without a cache.
    """

    cos: jax.Array
    sin: jax.Array
    back: jax.Array
    valid: jax.Array | None
    start: jax.Array | None


def token_positions(tokens: int, mask: Any = None, cache: Cache | None = None) -> jax.Array:
    """(batch or 1, tokens) int32: how many real tokens stand before each one, in this pass and in the cache."""
    own = jnp.arange(tokens, dtype=jnp.int32)[None]
    if mask is None and cache is None:
        return own
    if mask is not None:
        own = jnp.cumsum(jnp.asarray(mask).astype(jnp.int32), 1) - 1
    if cache is not None:
        own = own + jnp.sum(cache.valid, 1, dtype=jnp.int32)[:, None]
    return jnp.maximum(own, 0)


def context(
    config: LlamaConfig, tokens: int, mask: Any = None, cache: Cache | None = None, positions: Any = None
) -> tuple[Context, Any]:
    """What the layers need to know of positions and padding, and the cache's (valid, length) after this pass.

    Args:
      config: of the model.
      tokens: how many each row has in this pass.
      mask: (batch, tokens), 0 at padding; None: all are real.
      cache: of earlier passes.
      positions: (batch or 1, tokens) that rotate queries and keys; None: `token_positions`. Who sees whom depends on the order
        of the tokens alone.

    Raises:
      ValueError: the mask or the positions have another number of tokens, or the cache is too short for this pass.
    """
    if mask is not None and mask.shape[1] != tokens:
        raise ValueError(f"the mask has {mask.shape[1]} tokens, the ids {tokens}")
    if positions is not None and positions.shape[1] != tokens:
        raise ValueError(f"there are {positions.shape[1]} positions of {tokens} tokens")
    if positions is None:
        positions = token_positions(tokens, mask, cache)
    own = jnp.arange(tokens, dtype=jnp.int32)
    real = None if mask is None else jnp.asarray(mask).astype(bool)
    turned = angles(config.rope, config.head_dim, positions)
    if cache is None:
        return Context(*turned, own[:, None] - own[None], real, None), None
    size = cache.valid.shape[1]
    if tokens > size:
        raise ValueError(f"{tokens} tokens do not fit a cache of {size}: make it with the length of prompt and answer")
    if real is None:
        real = jnp.ones((cache.valid.shape[0], tokens), bool)
    valid = jax.lax.dynamic_update_slice(cache.valid, real, (0, cache.length))
    back = (cache.length + own)[:, None] - jnp.arange(size, dtype=jnp.int32)[None]
    return Context(*turned, back, valid, cache.length), (valid, cache.length + tokens)


def own_tokens(at: Context, tokens: int) -> Any:
    """(batch, tokens) bool, which tokens of this pass are real; None: all."""
    if at.valid is None or at.start is None:
        return at.valid
    return jax.lax.dynamic_slice_in_dim(at.valid, at.start, tokens, axis=1)


class RMSNorm(nn.Module):
    """x / root mean square over the last axis, times a scale; the mean's divisor may stay that of the whole stream."""

    eps: float
    width: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., channels)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.dtype))
        wide = x.astype(jnp.float32)
        square = jnp.sum(wide * wide, axis=-1, keepdims=True) / (self.width or x.shape[-1])
        return (scale * (wide * jax.lax.rsqrt(square + self.eps)).astype(x.dtype)).astype(x.dtype)


class Linear(nn.Module):
    """A kernel that meets the data by an einsum, and a bias where it has one."""

    equation: str
    kernel: tuple[int, ...]
    bias: tuple[int, ...] | None
    dtype: str
    precise: bool = False  # float32 results also of bfloat16 operands

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: as the equation says."""
        dtype = jnp.dtype(self.dtype)
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.kernel, dtype)
        y = jnp.einsum(self.equation, x, kernel, preferred_element_type=jnp.float32 if self.precise else None)
        if self.bias is not None:
            y = y + self.param("bias", nn.initializers.zeros, self.bias, dtype)
        return y


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions; `tells`: also what the last token attends to."""

    config: LlamaConfig
    layer: int
    tells: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, at: Context, window: Any, cache: Any) -> tuple[Any, ...]:
        """x: (batch, tokens, stream); cache: {"k": (batch, size, kv heads, head), "v": ...} or None.

        Returns (y, the new cache) and, if it `tells`, (batch, heads, tokens) float32 over the tokens of this pass.
        """
        c, d = self.config, x.shape[-1]
        heads, kv, h, value = c.q_heads[self.layer], c.kv_heads[self.layer], c.head_dim, c.value_dims[self.layer]

        def project(name: str, n: int, size: int) -> jax.Array:
            bias = (n, size) if c.qkv_bias else None
            return Linear("bte,ehd->bthd", (d, n, size), bias, c.dtype, name=name)(x)

        q, k, v = project("q", heads, h), project("k", kv, h), project("v", kv, value)
        if c.qk_norm:
            q, k = (RMSNorm(c.eps, h, c.dtype, name=f"{name}_norm")(z) for name, z in (("q", q), ("k", k)))
        q, k = rotate(q, at.cos, at.sin), rotate(k, at.cos, at.sin)
        if cache is not None and at.start is not None:
            cache = {
                name: jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), (0, at.start, 0, 0))
                for name, new in (("k", k), ("v", v))
            }
            k, v = (cache[name].astype(x.dtype) for name in ("k", "v"))
        q = jnp.reshape(q, (*q.shape[:2], kv, heads // kv, h))
        logits = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * h**-0.5
        visible = at.back >= 0 if window is None else (at.back >= 0) & (at.back < window)
        if at.valid is not None:
            visible = visible & at.valid[:, None, None, None, :]
        # finite, so that a row of padding, which sees nothing, gives numbers and not NaN
        weights = jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1)
        y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(x.dtype), v)
        y = jnp.reshape(y, (*y.shape[:2], heads, value))
        y = Linear("bthd,hde->bte", (heads, value, d), (d,) if c.o_bias else None, c.dtype, name="o")(y)
        if not self.tells:
            return y, cache
        last = jnp.reshape(weights[:, :, :, -1], (x.shape[0], heads, -1))
        start = 0 if at.start is None else at.start
        return y, cache, jax.lax.dynamic_slice_in_dim(last, start, x.shape[1], axis=-1)


class MLP(nn.Module):
    """(silu(x gate) * (x up)) down."""

    config: LlamaConfig
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, stream)."""
        c, d, f = self.config, x.shape[-1], self.config.ffn[self.layer]
        gate, up = (
            Linear("bte,ef->btf", (d, f), (f,) if c.mlp_bias else None, c.dtype, name=name)(x)
            for name in ("gate", "up")
        )
        down = Linear("btf,fe->bte", (f, d), (d,) if c.mlp_bias else None, c.dtype, name="down")
        return down(jax.nn.silu(gate) * up)


def _newest(_: Any, new: Any) -> Any:
    return new


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream.

    Stands alone too: `Block(config, l).apply({"params": params[f"layer{l}"]}, x, context(config, tokens)[0])[0]`.
    """

    config: LlamaConfig
    layer: int
    tells: bool = False
    experts_fn: Any = all_experts

    @nn.compact
    def __call__(self, x: jax.Array, at: Context, window: Any = None, cache: Any = None) -> tuple[Any, ...]:
        """x: (batch, tokens, stream) -> (x, the layer's new cache); `window` stands in for the config's.

        If it `tells`, there is a third: what the last token attends to, as `Attention` has it.
        What a router decides is read with mutable=["routed"].
        """
        c = self.config
        if window is None and c.windows is not None:
            window = c.windows[self.layer]
        norm = RMSNorm(c.eps, c.norm_width, c.dtype, name="input_norm")
        y, *rest = Attention(c, self.layer, self.tells, name="attn")(norm(x), at, window, cache)
        x = x + y
        norm = RMSNorm(c.eps, c.norm_width, c.dtype, name="post_norm")
        if c.experts is None:
            return x + MLP(c, self.layer, name="mlp")(norm(x)), *rest
        layer = BlockFFN(
            c.experts.count, c.ffn[self.layer], c.experts.router, self.experts_fn, c.experts.gated, dtype=c.dtype,
            name="experts",
        )  # fmt: skip
        y, routed = layer(norm(x), own_tokens(at, x.shape[1]))
        if not self.is_initializing():  # which would make it a part of the variables
            self.sow("routed", "layer", routed, reduce_fn=_newest)
        return x + y, *rest


class Llama(nn.Module):
    """A decoder with the widths of its config.

    Attributes:
      config: widths.
      scanned: one scan over stacked layers; they must be equally wide.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      experts_fn: how experts are computed, where there are any (`jprune.models.moe.blockffn`).
    """

    config: LlamaConfig
    scanned: bool = False
    remat: bool = False
    experts_fn: Any = all_experts

    def setup(self) -> None:
        self.embed = Embedding(self.config.vocab, self.config.stream, self.config.dtype)

    def embeddings(self, ids: jax.Array) -> jax.Array:
        """ids: (batch, tokens) -> what the first layer reads, (batch, tokens, stream)."""
        return self.embed(ids)

    @nn.compact
    def __call__(
        self,
        ids: Any = None,
        mask: Any = None,
        cache: Any = None,
        *,
        embeddings: Any = None,
        positions: Any = None,
        drops: Sequence[Drop] = (),
    ) -> Any:
        """ids: (batch, tokens) int -> logits (batch, tokens, vocab) float32; with a cache (logits, new cache).

        Args:
          ids: token ids.
          mask: (batch, tokens), 0 at padding, which is ignored wherever it stands; None: no padding.
          cache: of earlier passes (`jprune.models.decoding.new_cache` makes an empty one); this pass appends to it.
            The caller sees to it that it is long enough: under jit nobody can check. Several, as a tuple, each of the layers
            that follow those of the one before: where tokens were dropped between layers, the later ones hold fewer.
          embeddings: (batch, tokens, stream), instead of ids.
          positions: (batch or 1, tokens) int; None: real tokens are counted.
          drops: where fewer tokens go on, by ascending layers; logits are of those that reach the end, at their positions.

        Raises:
          ValueError: a scanned model of different layers or with drops, one pass longer than the cache, both ids and embeddings,
            caches that do not divide the layers where the drops do.
        """
        c = self.config
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings")
        x = self.embed(ids) if embeddings is None else embeddings
        block = nn.remat(Block) if self.remat else Block
        one = cache is None or isinstance(cache, Cache)
        new: Any = None
        caches: Any = (cache,) if one else cache
        if self.scanned:
            if drops or not one:
                raise ValueError("tokens cannot be dropped between scanned layers: unstack_layers, scanned=False")
            at, after = context(c, x.shape[1], mask, cache, positions)
            x, saved = self._scan(block, x, at, cache)
            new = None if cache is None else Cache(saved["k"], saved["v"], *after)
        else:
            x, new = self._unrolled(block, x, mask, caches, positions, drops)
            new = new[0] if one else new
        x = RMSNorm(c.eps, c.norm_width, c.dtype, name="final_norm")(x)
        if c.tied:
            logits = self.embed.attend(x)
        else:
            logits = Linear("bte,ev->btv", (c.stream, c.vocab), None, c.dtype, precise=True, name="lm_head")(x)
        return logits if cache is None else (logits, new)

    def _unrolled(
        self, block: Any, x: jax.Array, mask: Any, caches: Sequence[Any], positions: Any, drops: Sequence[Drop]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Layer by layer, in stretches that end where tokens are dropped or where the next cache begins."""
        c, out, first = self.config, [], 0
        ends = ends_of(c.depth, caches, drops)
        caches = caches if len(caches) == len(ends) else (None,) * len(ends)
        for end, cache in zip(ends, caches, strict=True):
            if positions is None:
                positions = token_positions(x.shape[1], mask, cache)
            at, after = context(c, x.shape[1], mask, cache, positions)
            drop = next((d for d in drops if d.layer == end), None)
            rows, last = [], None
            for i in range(first, end):
                own = None if cache is None else {name: getattr(cache, name)[i - first] for name in ("k", "v")}
                tells = drop is not None and drop.reads_attention and i == end - 1
                x, own, *told = block(c, i, tells, self.experts_fn, name=f"layer{i}")(x, at, None, own)
                rows.append(own)
                last = told[0] if told else None
            saved = {} if cache is None else {name: tuple(row[name] for row in rows) for name in ("k", "v")}
            out.append(None if cache is None else Cache(saved["k"], saved["v"], *after))
            if drop is not None:
                x, mask, positions, index = dropped(drop, x, last, mask, positions)
                self.sow("drops", f"behind{end}", index, reduce_fn=_newest)  # read with mutable=["drops"]
            first = end
        return x, tuple(out)

    def _scan(self, block: Any, x: jax.Array, at: Context, cache: Cache | None) -> tuple[jax.Array, Any]:
        c = self.config
        if not c.uniform:
            raise ValueError("the layers have different widths and cannot be scanned: unstack_layers, scanned=False")
        window = None
        if c.windows is not None and len(set(c.windows)) > 1:  # a window of 2^30 is none
            window = jnp.asarray([2**30 if w is None else w for w in c.windows], jnp.int32)
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "routed": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
            length=c.depth,
        )
        own = None if cache is None else {"k": cache.k, "v": cache.v}
        return scan(c, 0, experts_fn=self.experts_fn, name="layers")(x, at, window, own)


class Embedding(nn.Module):
    """A table of vectors, looked up by id; `attend` gives its products with x."""

    rows: int
    width: int
    dtype: str

    def setup(self):
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (self.rows, self.width), jnp.dtype(self.dtype)
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: (batch, tokens) -> (batch, tokens, width)."""
        return self.embedding[ids]

    def attend(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, width) -> (batch, tokens, rows) float32."""
        return jnp.einsum("bte,ve->btv", x, self.embedding, preferred_element_type=jnp.float32)


__all__ = [
    "FAMILIES",
    "Block",
    "Context",
    "Drop",
    "Llama",
    "LlamaConfig",
    "config_from_params",
    "context",
    "fold_norm_width",
    "is_scanned",
    "llama_config",
    "own_tokens",
    "stack_layers",
    "token_positions",
    "unstack_layers",
    "with_biases",
]
