"""LLaMA-family decoders (LLaMA 1 to 3, Mistral, Qwen2, Qwen3) as Flax linen, every width free, per layer.

One tree of parameters in two arrangements: unrolled (`layer0`, `layer1`, ...; the layers may differ in width) and
scanned (`layers`, a leading axis over equally wide layers; compiles once). `stack_layers` and `unstack_layers` convert.

    embed/embedding (vocab, stream)                 final_norm/scale (stream,)      lm_head/kernel unless tied
    layer{l}/input_norm/scale, post_norm/scale (stream,)
    layer{l}/attn/q/kernel (stream, heads, head)    k, v (stream, kv heads, head)   o (heads, head, stream)
    layer{l}/attn/q_norm/scale, k_norm/scale (head,)                                where qk_norm
    layer{l}/mlp/gate/kernel, up/kernel (stream, ffn)                               down (ffn, stream)

Heads are an axis of their own, so that a pruned tree shows how many there are. Weights may be bfloat16: norms, angles,
the softmax and the logits are float32 all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jprune.models import layers
from jprune.models.decoding import Cache
from jprune.models.rope import Rope, angles, rotate

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Every width of a decoder, and what else its function depends on.

    Attributes:
      vocab, stream: tokens, width of the residual stream.
      ffn, q_heads, kv_heads: per layer; query head n of a layer attends with key-value head n // (q / kv).
      head_dim: size of a query or key head, in all layers; its inverse root scales the attention.
      value_dim: per layer, the size of a value head where it is not `head_dim`.
      windows: per layer, how many positions attention looks back (the own one included); None: all of them.
      eps: of the RMS norms.
      rope: rotary positions.
      tied: the logits reuse the embedding.
      qkv_bias, o_bias, mlp_bias, qk_norm: which extra parameters there are; qk_norm is an RMS norm within each head.
      norm_width: divisor of the norms' mean square; the width of the stream before pruning. None: its width.
      family: whose `transformers` classes the model is written for: "llama", "mistral", "qwen2", "qwen3".
      max_positions: longest context it was trained for; nothing here depends on it.
      dtype: of freshly initialised parameters.
    """

    vocab: int
    stream: int
    ffn: tuple[int, ...]
    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: int
    value_dim: tuple[int, ...] | None = None
    windows: tuple[int | None, ...] | None = None
    eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_width: int | None = None
    family: str = "llama"
    max_positions: int = 2048
    dtype: str = "float32"

    def __post_init__(self):
        n = len(self.ffn)
        for name in ("q_heads", "kv_heads", "value_dim", "windows"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} lists {len(value)} layers, ffn {n}: give one entry per layer")
        for i, (q, kv) in enumerate(zip(self.q_heads, self.kv_heads, strict=True)):
            if kv < 1 or q < 1 or q % kv:
                raise ValueError(f"layer {i}: {q} query heads cannot be shared evenly among {kv} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of channels")
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown: choose among {', '.join(FAMILIES)}")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.ffn)

    @property
    def value_dims(self) -> tuple[int, ...]:
        """Size of a value head per layer."""
        return self.value_dim or (self.head_dim,) * self.depth

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return all(len(set(w)) <= 1 for w in (self.ffn, self.q_heads, self.kv_heads, self.value_dims))


def llama_config(
    vocab: int,
    stream: int,
    ffn: int,
    depth: int,
    q_heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    **rest: Any,
) -> LlamaConfig:
    """A config of uniform widths; `rest` are further fields of `LlamaConfig`.

    Raises:
      ValueError: heads that do not divide the stream, without an explicit head_dim.
    """
    if head_dim is None:
        if stream % q_heads:
            raise ValueError(f"{q_heads} heads do not divide the stream width {stream}: give head_dim")
        head_dim = stream // q_heads
    return LlamaConfig(
        vocab,
        stream,
        (ffn,) * depth,
        (q_heads,) * depth,
        (kv_heads or q_heads,) * depth,
        head_dim,
        windows=None if window is None else (window,) * depth,
        **rest,
    )


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


def context(config: LlamaConfig, tokens: int, mask: Any = None, cache: Cache | None = None) -> tuple[Context, Any]:
    """What the layers need to know of positions and padding, and the cache's (valid, length) after this pass.

    Args:
      config: of the model.
      tokens: how many each row has in this pass.
      mask: (batch, tokens), 0 at padding; None: all are real. Positions count real tokens only.
      cache: of earlier passes.

    Raises:
      ValueError: the mask has another number of tokens, or the cache is too short for this pass.
    """
    if mask is not None and mask.shape[1] != tokens:
        raise ValueError(f"the mask has {mask.shape[1]} tokens, the ids {tokens}")
    own = jnp.arange(tokens, dtype=jnp.int32)
    real = None if mask is None else jnp.asarray(mask).astype(bool)
    if cache is None:
        positions = own[None] if real is None else jnp.maximum(jnp.cumsum(real.astype(jnp.int32), 1) - 1, 0)
        return Context(*angles(config.rope, config.head_dim, positions), own[:, None] - own[None], real, None), None
    size = cache.valid.shape[1]
    if tokens > size:
        raise ValueError(f"{tokens} tokens do not fit a cache of {size}: make it with the length of prompt and answer")
    if real is None:
        real = jnp.ones((cache.valid.shape[0], tokens), bool)
    valid = jax.lax.dynamic_update_slice(cache.valid, real, (0, cache.length))
    seen = jnp.sum(cache.valid, 1, dtype=jnp.int32)[:, None]
    positions = jnp.maximum(seen + jnp.cumsum(real.astype(jnp.int32), 1) - 1, 0)
    back = (cache.length + own)[:, None] - jnp.arange(size, dtype=jnp.int32)[None]
    return (
        Context(*angles(config.rope, config.head_dim, positions), back, valid, cache.length),
        (valid, cache.length + tokens),
    )


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
    """Causal attention with grouped queries and rotary positions."""

    config: LlamaConfig
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array, at: Context, window: Any, cache: Any) -> tuple[jax.Array, Any]:
        """x: (batch, tokens, stream); cache: {"k": (batch, size, kv heads, head), "v": ...} or None."""
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
        weights = jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1).astype(x.dtype)
        y = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        y = jnp.reshape(y, (*y.shape[:2], heads, value))
        return Linear("bthd,hde->bte", (heads, value, d), (d,) if c.o_bias else None, c.dtype, name="o")(y), cache


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


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream.

    Stands alone too: `Block(config, l).apply({"params": params[f"layer{l}"]}, x, context(config, tokens)[0])[0]`.
    """

    config: LlamaConfig
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array, at: Context, window: Any = None, cache: Any = None) -> tuple[jax.Array, Any]:
        """x: (batch, tokens, stream) -> (x, the layer's new cache); `window` stands in for the config's."""
        c = self.config
        if window is None and c.windows is not None:
            window = c.windows[self.layer]
        norm = RMSNorm(c.eps, c.norm_width, c.dtype, name="input_norm")
        y, cache = Attention(c, self.layer, name="attn")(norm(x), at, window, cache)
        x = x + y
        norm = RMSNorm(c.eps, c.norm_width, c.dtype, name="post_norm")
        return x + MLP(c, self.layer, name="mlp")(norm(x)), cache


class Llama(nn.Module):
    """A decoder with the widths of its config.

    Attributes:
      config: widths.
      scanned: one scan over stacked layers; they must be equally wide.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    config: LlamaConfig
    scanned: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, mask: Any = None, cache: Cache | None = None) -> Any:
        """ids: (batch, tokens) int -> logits (batch, tokens, vocab) float32; with a cache (logits, new cache).

        Args:
          ids: token ids.
          mask: (batch, tokens), 0 at padding, which is ignored wherever it stands; None: no padding.
          cache: of earlier passes (`jprune.models.decoding.new_cache` makes an empty one); this pass appends to it.
            The caller sees to it that it is long enough: under jit nobody can check.

        Raises:
          ValueError: a scanned model of different layers, or one pass longer than the cache.
        """
        c = self.config
        at, after = context(c, ids.shape[1], mask, cache)
        table = Embedding(c.vocab, c.stream, c.dtype, name="embed")
        x = table(ids)
        block = nn.remat(Block) if self.remat else Block
        if self.scanned:
            x, saved = self._scan(block, x, at, cache)
        else:
            rows = []
            for i in range(c.depth):
                own = None if cache is None else {"k": cache.k[i], "v": cache.v[i]}
                x, own = block(c, i, name=f"layer{i}")(x, at, None, own)
                rows.append(own)
            saved = {} if cache is None else {name: tuple(row[name] for row in rows) for name in ("k", "v")}
        x = RMSNorm(c.eps, c.norm_width, c.dtype, name="final_norm")(x)
        if c.tied:
            logits = table.attend(x)
        else:
            logits = Linear("bte,ev->btv", (c.stream, c.vocab), None, c.dtype, precise=True, name="lm_head")(x)
        return logits if cache is None else (logits, Cache(saved["k"], saved["v"], *after))

    def _scan(self, block: Any, x: jax.Array, at: Context, cache: Cache | None) -> tuple[jax.Array, Any]:
        c = self.config
        if not c.uniform:
            raise ValueError("the layers have different widths and cannot be scanned: unstack_layers, scanned=False")
        window = None
        if c.windows is not None and len(set(c.windows)) > 1:  # a window of 2^30 is none
            window = jnp.asarray([2**30 if w is None else w for w in c.windows], jnp.int32)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
            length=c.depth,
        )
        own = None if cache is None else {"k": cache.k, "v": cache.v}
        return scan(c, 0, name="layers")(x, at, window, own)


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


def is_scanned(variables: Any) -> bool:
    """Whether a tree of variables (or of parameters) has its layers stacked."""
    return "layers" in layers.params_of(variables)


def unstack_layers(variables: Any) -> Any:
    """The unrolled form of a scanned tree: `layers` becomes `layer0`, `layer1`, ...; other forms stay as they are.

    Leaves may be arrays with a leading layer axis, `ShapeDtypeStruct`s, or the lists of one array per layer that
    `graph.compact(..., stacked="unstack")` makes where layers keep different widths.
    """
    params = layers.params_of(variables)
    if "layers" not in params:
        return variables
    stacked = params["layers"]
    out = {name: value for name, value in params.items() if name != "layers"}
    for i in range(_depth(stacked)):
        out[f"layer{i}"] = jax.tree.map(lambda x, i=i: _row(x, i), stacked, is_leaf=_is_list)
    return {**variables, "params": out} if "params" in variables else out


def stack_layers(variables: Any) -> Any:
    """The scanned form of an unrolled tree: one leading axis over the layers; other forms stay as they are.

    Raises:
      ValueError: layers of different widths, named by leaf.
    """
    params = layers.params_of(variables)
    names = layer_names(params)
    if not names:
        return variables
    first = params[names[0]]

    def stack(path: Any, *rows: Any) -> Any:
        shapes = [tuple(x.shape) for x in rows]
        if len(set(shapes)) > 1:
            i = next(i for i, s in enumerate(shapes) if s != shapes[0])
            leaf = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"leaf {leaf!r} has shape {shapes[0]} in layer 0 and {shapes[i]} in layer {i}: only equally wide "
                "layers can be stacked"
            )
        if isinstance(rows[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(rows), *shapes[0]), rows[0].dtype)
        return np.stack(rows) if all(isinstance(x, np.ndarray) for x in rows) else jnp.stack(rows)

    out = {name: value for name, value in params.items() if name not in names}
    out["layers"] = jax.tree_util.tree_map_with_path(stack, first, *(params[name] for name in names[1:]))
    return {**variables, "params": out} if "params" in variables else out


def layer_names(params: Mapping[str, Any]) -> list[str]:
    """`layer0`, `layer1`, ... as far as an unrolled tree has them; raises ValueError where one is missing."""
    found = sorted(int(n[5:]) for n in params if n.startswith("layer") and n[5:].isdigit())
    if found != list(range(len(found))):
        raise ValueError(f"the tree has layers {found}: one is missing in between")
    return [f"layer{i}" for i in found]


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def _depth(stacked: Any) -> int:
    leaf = jax.tree.leaves(stacked, is_leaf=_is_list)[0]
    return len(leaf) if isinstance(leaf, list) else leaf.shape[0]


def _row(x: Any, i: int) -> Any:
    if isinstance(x, list):  # each array has kept a layer axis of length one
        return _row(x[i], 0)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[i]


def config_from_params(variables: Any, base: LlamaConfig) -> LlamaConfig:
    """The config whose widths are those of a (pruned) tree, unrolled or scanned.

    The attention scale and the norms' divisor stay those of `base`, with which the weights were trained.

    Raises:
      ValueError: another model's tree, another number of layers, or pruned rotary pairs, which no config can say.
    """
    p = layers.params_of(variables)
    if is_scanned(p) and any(isinstance(x, list) for x in jax.tree.leaves(p["layers"], is_leaf=_is_list)):
        raise ValueError("the layers are lists of unequal arrays: bring the tree into form with unstack_layers first")
    scanned = is_scanned(p)
    names = ["layers"] * base.depth if scanned else layer_names(p)
    if len(names) != base.depth or (scanned and _depth(p["layers"]) != base.depth):
        found = _depth(p["layers"]) if scanned else len(names)
        raise ValueError(f"the tree has {found} layers, the config {base.depth}: they belong to different models")
    ffn, q_heads, kv_heads, value = [], [], [], []
    for name in names:
        heads, head = layers.shape_of(p, name, "attn", "q", "kernel")[-2:]
        if head != base.head_dim:
            raise ValueError(
                f"the query heads of {name!r} have {head} channels, the config {base.head_dim}: rotary pairs were "
                "pruned, and which ones no config can say; run the tree with graph.replay(keep)"
            )
        ffn.append(layers.kernel_width(p, name, "mlp", "gate"))
        q_heads.append(int(heads))
        kv_heads.append(int(layers.shape_of(p, name, "attn", "k", "kernel")[-2]))
        value.append(layers.kernel_width(p, name, "attn", "v"))
    vocab, stream = layers.shape_of(p, "embed", "embedding")
    return dataclasses.replace(
        base,
        vocab=int(vocab),
        stream=int(stream),
        ffn=tuple(ffn),
        q_heads=tuple(q_heads),
        kv_heads=tuple(kv_heads),
        value_dim=None if set(value) == {base.head_dim} else tuple(value),
        norm_width=None if int(stream) == (base.norm_width or base.stream) else base.norm_width or base.stream,
    )


def fold_norm_width(variables: Any, config: LlamaConfig) -> tuple[LlamaConfig, Any]:
    """The same function with norms that divide by the stream's own width: their scales and `eps` take up the ratio.

    x / sqrt(s/N + e) * w = x / sqrt(s/n + e N/n) * (w sqrt(N/n)) for the square sum s. Exact but for the rounding of
    the scales to their dtype. Other programs know no `norm_width`.
    """
    if config.norm_width in (None, config.stream):
        return dataclasses.replace(config, norm_width=None), variables
    ratio = config.norm_width / config.stream

    def scale(path: Any, x: Any) -> Any:
        keys = [str(getattr(k, "key", k)) for k in path]
        wide = keys[-2:-1] and keys[-2] in ("input_norm", "post_norm", "final_norm")
        return (x * np.sqrt(ratio)).astype(x.dtype) if wide else x

    folded = dataclasses.replace(config, norm_width=None, eps=config.eps * ratio)
    return folded, jax.tree_util.tree_map_with_path(scale, variables)
