"""Diffusion transformers for video (Peebles and Xie 2023, adaLN) over joint video and text tokens, every width free.

Blocks are of three kinds, as the known models lay them out:

    double   text and video have weights of their own and meet in the attention           (HunyuanVideo's first blocks)
    single   one set of weights for all tokens, attention and MLP side by side            (HunyuanVideo's later blocks)
    expert   one set of weights, modulated separately for text and for video              (CogVideoX)

The attention is a hook: any function of queries, keys and values with a state of its own may stand in for the dense
one, so that sparse attention needs no other model. Video tokens have rotary positions in time, height and width; text
tokens have none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jprune.models import layers
from jprune.models.rope import rotate

KINDS = ("double", "single", "expert")
Attend = Callable[[int, Any, Any, Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class DiTBlock:
    """One block: its kind, heads, size of a head, hidden width of the MLP (of text's own in a double block), size of a value head
    where it is not `head`."""

    kind: str
    heads: int
    head: int
    mlp: int
    text_mlp: int | None = None
    value_head: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a block's kind is {', '.join(KINDS)}, not {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Every width of a diffusion transformer.

    Attributes:
      stream: width of the residual stream.
      patch: frames, height and width of a patch.
      channels: of the video.
      text_width: of a text token as it comes in.
      blocks: per block.
      pairs: rotated pairs of a head for time, height and width; together half a head.
      theta: base of the rotary frequencies.
      text_first: text tokens stand before the video's.
      gain: start of the learned factor on every head's queries.
      frequencies: of the embedding of time.
      time: widths of its two layers; None: the stream's.
      norm_width: divisor of LayerNorm's means; the width of the stream before pruning.
    """

    stream: int
    patch: tuple[int, int, int]
    channels: int
    text_width: int
    blocks: tuple[DiTBlock, ...]
    pairs: tuple[int, int, int]
    theta: float = 256.0
    text_first: bool = False
    gain: float = 1.0
    frequencies: int = 128
    time: tuple[int, int] | None = None
    norm_width: int | None = None

    def __post_init__(self) -> None:
        for i, b in enumerate(self.blocks):
            if 2 * sum(self.pairs) != b.head:
                raise ValueError(
                    f"block {i} has heads of {b.head}, pairs {self.pairs} rotate {2 * sum(self.pairs)}: they must agree"
                )


def dense_attention(
    layer: int,
    q: Float[Array, "batch heads tokens head"],
    k: Float[Array, "batch heads tokens head"],
    v: Float[Array, "batch heads tokens value"],
    valid: Bool[Array, "batch tokens"] | None,
    state: Any,
) -> tuple[Float[Array, "batch heads tokens value"], Any]:
    """Softmax attention over all valid tokens, float32 inside; the state passes through."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if valid is not None:
        logits = jnp.where(valid[:, None, None, :], logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v), state


class PlainLayerNorm(nn.Module):
    """LayerNorm without scale and shift (those come from the modulation), variance in one pass."""

    width: int | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., channels)."""
        wide = x.astype(jnp.float32)
        n = self.width or x.shape[-1]
        mean = jnp.sum(wide, axis=-1, keepdims=True) / n
        square = jnp.sum(wide * wide, axis=-1, keepdims=True) / n
        return ((wide - mean) * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.epsilon)).astype(x.dtype)


class Modulation(nn.Module):
    """`n` vectors of the stream's width from the condition, zero at first: (batch, 1, stream) each."""

    n: int
    stream: int

    @nn.compact
    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        """condition: (batch, width)."""
        init = nn.initializers.zeros
        made = nn.DenseGeneral((self.n, self.stream), kernel_init=init, bias_init=init, name="out")(
            jax.nn.silu(condition)
        )
        return [made[:, None, i] for i in range(self.n)]


class QKV(nn.Module):
    """Queries, keys and values of some tokens: (batch, tokens, heads, head) each, queries and keys normalised."""

    block: DiTBlock
    gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x: (batch, tokens, channels)."""
        b = self.block
        q, k = (nn.DenseGeneral((b.heads, b.head), name=name)(x) for name in ("q", "k"))
        v = nn.DenseGeneral((b.heads, b.value_head or b.head), name="v")(x)

        def normalised(z: jax.Array, name: str) -> jax.Array:
            scale = self.param(f"{name}_scale", nn.initializers.ones, (b.head,))
            wide = z.astype(jnp.float32)
            mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
            return (wide * jax.lax.rsqrt(mean + 1e-6) * scale).astype(z.dtype)

        gain = self.param("gain", nn.initializers.constant(self.gain), (b.heads,))
        return [normalised(q, "q") * gain[:, None].astype(q.dtype), normalised(k, "k"), v]


class MLP(nn.Module):
    """Two dense layers with a GELU between."""

    hidden: int
    stream: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, channels)."""
        return nn.Dense(self.stream, name="down")(nn.gelu(nn.Dense(self.hidden, name="up")(x)))


class VideoDiT(nn.Module):
    """A diffusion transformer with the widths of its config."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "batch frames height width channels"],
        time: Float[Array, " batch"],
        text: Float[Array, "batch words text_width"],
        valid: Bool[Array, "batch words"] | None = None,
        attention: Attend = dense_attention,
        states: Sequence[Any] | None = None,
    ) -> Any:
        """The prediction for a noisy video, in its shape; with states (prediction, new states).

        Args:
          video: what is denoised.
          time: of the noise, in [0, 1].
          text: embedded.
          valid: which words are words; None: all.
          attention: (layer, q, k, v, valid tokens or None, the layer's state) -> (result, the layer's new state), all
            (batch, heads, tokens, head).
          states: one per block.

        Raises:
          ValueError: the patch does not divide the video, or another number of states than blocks.
        """
        c = self.config
        if states is not None and len(states) != len(c.blocks):
            raise ValueError(f"{len(states)} attention states were given for {len(c.blocks)} blocks: one each")
        grid = grid_of(video.shape[1:4], c.patch)
        words, pixels = text.shape[1], math.prod(grid)
        x = nn.Dense(c.stream, name="patch_embed")(patchify(video, c.patch))
        t = nn.Dense(c.stream, name="text_embed")(text)
        hidden, width = c.time or (c.stream, c.stream)
        condition = nn.Dense(hidden, name="time_in")(waves(time, c.frequencies))
        condition = nn.Dense(width, name="time_out")(jax.nn.silu(condition))
        cos, sin = (jnp.asarray(a)[None] for a in rotary_table(grid, c.pairs, c.theta))
        known = None
        if valid is not None:
            parts = [valid, jnp.ones((video.shape[0], pixels), bool)]
            known = jnp.concatenate(parts if c.text_first else parts[::-1], axis=1)

        def attend(i: int, of_text: Sequence[Any], of_video: Sequence[Any], state: Any) -> tuple[Any, Any, Any]:
            """(text's result, video's result, new state) of joint attention."""
            q, k = (rotate(z, cos, sin) for z in of_video[:2])
            order = (of_text, (q, k, of_video[2])) if c.text_first else ((q, k, of_video[2]), of_text)
            qj, kj, vj = (jnp.swapaxes(jnp.concatenate(pair, axis=1), 1, 2) for pair in zip(*order, strict=True))
            y, state = attention(i, qj, kj, vj, known, state)
            y = jnp.swapaxes(y, 1, 2)
            one, two = jnp.split(y, [words if c.text_first else pixels], axis=1)
            return (one, two, state) if c.text_first else (two, one, state)

        after = []
        for i, b in enumerate(c.blocks):
            own = None if states is None else states[i]
            made: Any = {"double": Double, "single": Single, "expert": Expert}[b.kind]
            t, x, own = made(c, b, name=f"block{i + 1}")(t, x, condition, lambda p, q, s, i=i: attend(i, p, q, s), own)
            after.append(own)
        shift, scale = Modulation(2, c.stream, name="final_modulation")(condition)
        x = PlainLayerNorm(c.norm_width)(x) * (1 + scale) + shift
        size = math.prod(c.patch) * c.channels
        x = unpatchify(nn.Dense(size, kernel_init=nn.initializers.zeros, name="final")(x), grid, c.patch)
        return x if states is None else (x, tuple(after))


class Double(nn.Module):
    """Text and video with weights of their own, one attention."""

    config: DiTConfig
    block: DiTBlock

    @nn.compact
    def __call__(
        self, t: jax.Array, x: jax.Array, condition: jax.Array, attend: Any, state: Any
    ) -> tuple[Any, Any, Any]:
        """t, x: (batch, tokens, stream) of text and of video."""
        c, b = self.config, self.block
        norm, made, modulated = PlainLayerNorm(c.norm_width), {}, {}
        for name, z in (("text", t), ("video", x)):
            m = modulated[name] = Modulation(6, c.stream, name=f"{name}_modulation")(condition)
            made[name] = QKV(b, c.gain, name=f"{name}_qkv")(norm(z) * (1 + m[1]) + m[0])
        *mixed, state = attend(made["text"], made["video"], state)
        out = []
        for (name, z), y in zip((("text", t), ("video", x)), mixed, strict=True):
            proj = nn.DenseGeneral(c.stream, axis=(-2, -1), name=f"{name}_proj")
            hidden = b.text_mlp if name == "text" and b.text_mlp is not None else b.mlp
            out.append(_branches(z, y, modulated[name], norm, proj, MLP(hidden, c.stream, name=f"{name}_mlp")))
        return out[0], out[1], state


class Single(nn.Module):
    """One set of weights for all tokens, attention and MLP side by side."""

    config: DiTConfig
    block: DiTBlock

    @nn.compact
    def __call__(
        self, t: jax.Array, x: jax.Array, condition: jax.Array, attend: Any, state: Any
    ) -> tuple[Any, Any, Any]:
        """t, x: (batch, tokens, stream) of text and of video."""
        c, b = self.config, self.block
        shift, scale, gate = Modulation(3, c.stream, name="modulation")(condition)
        y = PlainLayerNorm(c.norm_width)(jnp.concatenate([t, x], axis=1)) * (1 + scale) + shift
        both = QKV(b, c.gain, name="qkv")(y)
        *mixed, state = attend([z[:, : t.shape[1]] for z in both], [z[:, t.shape[1] :] for z in both], state)
        mixed = nn.DenseGeneral(c.stream, axis=(-2, -1), name="proj")(jnp.concatenate(mixed, axis=1))
        added = gate * (mixed + MLP(b.mlp, c.stream, name="mlp")(y))
        return t + added[:, : t.shape[1]], x + added[:, t.shape[1] :], state


class Expert(nn.Module):
    """One set of weights, modulated separately for text and for video."""

    config: DiTConfig
    block: DiTBlock

    @nn.compact
    def __call__(
        self, t: jax.Array, x: jax.Array, condition: jax.Array, attend: Any, state: Any
    ) -> tuple[Any, Any, Any]:
        """t, x: (batch, tokens, stream) of text and of video."""
        c, b = self.config, self.block
        norm = PlainLayerNorm(c.norm_width)
        m = [Modulation(6, c.stream, name=f"{name}_modulation")(condition) for name in ("text", "video")]
        qkv = QKV(b, c.gain, name="qkv")
        *mixed, state = attend(*(qkv(norm(z) * (1 + n[1]) + n[0]) for z, n in zip((t, x), m, strict=True)), state)
        proj = nn.DenseGeneral(c.stream, axis=(-2, -1), name="proj")
        mlp = MLP(b.mlp, c.stream, name="mlp")
        t, x = (_branches(z, y, n, norm, proj, mlp) for z, y, n in zip((t, x), mixed, m, strict=True))
        return t, x, state


def _branches(z: jax.Array, y: jax.Array, m: Sequence[jax.Array], norm: Any, proj: Any, mlp: Any) -> jax.Array:
    """The stream with the attention's result and the MLP's added, gated and modulated by m[2:]."""
    z = z + m[2] * proj(y)
    return z + m[5] * mlp(norm(z) * (1 + m[4]) + m[3])


# -- video to tokens, time and places to numbers -----------------------------------------------------------------------


def grid_of(size: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Patches along frames, height and width; raises ValueError if they do not divide the video."""
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"patches of {tuple(patch)} do not divide a video of {tuple(size)} frames, rows and columns")
    t, h, w = (n // p for n, p in zip(size, patch, strict=True))
    return t, h, w


def patchify(
    video: Float[Array, "batch frames height width channels"], patch: Sequence[int]
) -> Float[Array, "batch tokens entries"]:
    """Patches as tokens, frames slowest."""
    b, *size, channels = video.shape
    t, h, w = grid_of(size, patch)
    x = jnp.reshape(video, (b, t, patch[0], h, patch[1], w, patch[2], channels))
    return jnp.reshape(jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6, 7)), (b, t * h * w, math.prod(patch) * channels))


def unpatchify(
    tokens: Float[Array, "batch tokens entries"], grid: Sequence[int], patch: Sequence[int]
) -> Float[Array, "batch frames height width channels"]:
    """The inverse of `patchify`."""
    b, _, entries = tokens.shape
    x = jnp.reshape(tokens, (b, *grid, *patch, entries // math.prod(patch)))
    x = jnp.transpose(x, (0, 1, 4, 2, 5, 3, 6, 7))
    return jnp.reshape(x, (b, *(g * p for g, p in zip(grid, patch, strict=True)), -1))


def waves(time: Float[Array, " batch"], n: int) -> Float[Array, "batch n"]:
    """Sines and cosines of time, in [0, 1], at `n` // 2 frequencies."""
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(n // 2) / (n // 2))
    angle = 1000.0 * time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rotary_table(grid: Sequence[int], pairs: Sequence[int], theta: float) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), (tokens, pairs) float32: pair j of an axis turns by its coordinate times theta^(-j / pairs there)."""
    places = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    angle = np.concatenate(
        [p.reshape(-1, 1) * theta ** (-np.arange(n) / max(n, 1)) for p, n in zip(places, pairs, strict=True)], axis=1
    )
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


# -- the known shapes, and the config of a pruned tree -------------------------------------------------------------------


def hunyuan_video(channels: int = 16, text_width: int = 4096) -> VideoDiT:
    """The shape of HunyuanVideo: 20 double and 40 single blocks of 24 heads of 128, text behind the video."""
    double, single = DiTBlock("double", 24, 128, 12288), DiTBlock("single", 24, 128, 12288)
    return VideoDiT(DiTConfig(3072, (1, 2, 2), channels, text_width, (double,) * 20 + (single,) * 40, (8, 28, 28)))


def cogvideox_5b(channels: int = 16, text_width: int = 4096) -> VideoDiT:
    """The shape of CogVideoX-5B: 42 expert blocks of 48 heads of 64, text before the video."""
    block = DiTBlock("expert", 48, 64, 12288)
    return VideoDiT(DiTConfig(3072, (1, 2, 2), channels, text_width, (block,) * 42, (8, 12, 12), 10000.0, True,
                              time=(512, 512)))  # fmt: skip


def config_from_params(variables: Any, base: DiTConfig) -> DiTConfig:
    """The config whose widths are those of a (pruned) tree.

    Raises:
      ValueError: another model's tree, or other rotary pairs.
    """
    p = layers.params_of(variables)
    blocks = []
    for i, b in enumerate(base.blocks):
        own = layers.find(p, f"block{i + 1}")
        sides = ("text_", "video_") if b.kind == "double" else ("",)
        heads, head = {layers.shape_of(own, f"{s}qkv", "q", "kernel")[-2:] for s in sides}.pop()
        value = {layers.shape_of(own, f"{s}qkv", "v", "kernel")[-1] for s in sides}.pop()
        text, video = (layers.kernel_width(own, f"{s}mlp", "up") for s in (sides[0], sides[-1]))
        if head != b.head:
            raise ValueError(f"block {i + 1} has heads of {head}, not {b.head}: rotary pairs were pruned")
        blocks.append(dataclasses.replace(b, heads=int(heads), mlp=video, text_mlp=None if text == video else text,
                                          value_head=None if value == head else int(value)))  # fmt: skip
    return dataclasses.replace(
        base,
        stream=layers.kernel_width(p, "patch_embed"),
        blocks=tuple(blocks),
        time=(layers.kernel_width(p, "time_in"), layers.kernel_width(p, "time_out")),
        norm_width=base.norm_width or base.stream,
    )
