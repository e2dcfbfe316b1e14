"""Every width of a LLaMA-family decoder, per layer, and what else its function depends on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jprune.models.moe.routers import Experts
from jprune.models.rope import Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
WITH_EXPERTS = ("qwen3_moe", "mixtral")


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
      family: whose `transformers` classes the model is written for: "llama", "mistral", "qwen2", "qwen3",
        "qwen3_moe", "mixtral".
      max_positions: longest context it was trained for; nothing here depends on it.
      dtype: of freshly initialised parameters.
      experts: how many experts stand in place of each MLP, each `ffn` wide, and their router; None: MLPs.
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
    experts: Experts | None = None

    def __post_init__(self):
        n = len(self.ffn)
        for name in ("q_heads", "kv_heads", "value_dim", "windows"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} lists {len(value)} layers, ffn {n}: give one entry per layer")
        widths = {name: getattr(self, name) or () for name in ("ffn", "q_heads", "kv_heads", "value_dim")}
        widths |= {name: (getattr(self, name),) for name in ("vocab", "stream", "head_dim", "max_positions")}
        widths |= {"windows": tuple(w for w in self.windows or () if w is not None)}
        widths |= {"norm_width": () if self.norm_width is None else (self.norm_width,)}
        for name, found in widths.items():
            least = 0 if name in ("ffn", "value_dim") else 1
            if wrong := [w for w in found if not w >= least]:
                raise ValueError(f"{name} is {wrong[0]}: it must be at least {least}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps is {self.eps}: it must be positive and finite")
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
