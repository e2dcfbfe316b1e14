"""Attention as published models run it: each shape is named once here, for tests, compile checks and benchmarks.

The `arg_specs` of an operation chooses from these. Arrays are described, never made: a test or benchmark draws its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.block_mask import BlockMask


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One call of self-attention in a model.

    Attributes:
      name, source: the model, and what makes the numbers.
      batch, heads, kv_heads, tokens, features: of queries (batch, heads, tokens, features) and of keys and values, whose
        heads are shared. dtype: of all three.
      block_q, block_k: tokens of a block. kept: the part of a query block's key blocks that is active.
      causal: whether a query sees only tokens up to its own.
    """

    name: str
    source: str
    heads: int
    kv_heads: int
    tokens: int
    features: int
    batch: int = 1
    dtype: str = "bfloat16"
    block_q: int = 128
    block_k: int = 128
    kept: float = 0.2
    causal: bool = False

    def with_blocks(self, block: int) -> AttentionSpec:
        """The same in square blocks of another size."""
        return dataclasses.replace(self, block_q=block, block_k=block)

    def of_one_head(self) -> AttentionSpec:
        """One head of one batch element."""
        return dataclasses.replace(self, batch=1, heads=1, kv_heads=1)

    @property
    def blocks(self) -> dict[str, int]:
        """The sizes that every constructor of a `BlockMask` takes."""
        return {"block_q": self.block_q, "block_k": self.block_k, "q_size": self.tokens, "kv_size": self.tokens}

    @property
    def width(self) -> int:
        """Key blocks of a query block that are active."""
        return max(1, round(self.kept * -(-self.tokens // self.block_k)))

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of queries, keys and values."""
        q, k = (
            jax.ShapeDtypeStruct((self.batch, heads, self.tokens, self.features), jnp.dtype(self.dtype))
            for heads in (self.heads, self.kv_heads)
        )
        return q, k, k

    @property
    def lse(self) -> jax.ShapeDtypeStruct:
        """Shape of the log-sum-exps."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.tokens), jnp.float32)

    @property
    def segments(self) -> jax.ShapeDtypeStruct:
        """Shape of a segment id a token."""
        return jax.ShapeDtypeStruct((self.batch, self.tokens), jnp.int32)

    def mask(self, transposed_width: int | None = None) -> Any:
        """Shapes of a mask with lists for every head, and of its transposed lists; those have room for all by default."""
        nq, nk = -(-self.tokens // self.block_q), -(-self.tokens // self.block_k)
        return jax.eval_shape(
            lambda a: BlockMask.pack(a, self.width, **self.blocks)[0].transposed(transposed_width or nq)[0],
            jax.ShapeDtypeStruct((self.batch, self.heads, nq, nk), bool),
        )


SAM_VIT_B = AttentionSpec("SAM ViT-B", "global attention of the image encoder: 64 x 64 patches", 12, 12, 4096, 64)
SAM_VIT_H = AttentionSpec("SAM ViT-H", "global attention of the image encoder: 64 x 64 patches", 16, 16, 4096, 80)
PHI_3_MINI = AttentionSpec("Phi-3-mini", "prefill of 8,192 tokens", 32, 32, 8192, 96, causal=True)
GEMMA_3_4B = AttentionSpec("Gemma 3 4B", "prefill of 32,768 tokens, a global layer", 8, 4, 32768, 256, causal=True)
LLAMA_3_1_8B = AttentionSpec("Llama 3.1 8B", "prefill of its longest context", 32, 8, 131072, 128, causal=True)
COGVIDEOX_1_5 = AttentionSpec(
    "CogVideoX1.5 5B", "161 frames at 720p: 21 x 45 x 80 tokens of video, 176 of text", 48, 48, 75776, 64
)
WAN_2_1_14B = AttentionSpec("Wan2.1 14B", "81 frames at 720p: 21 x 45 x 80 tokens of video", 40, 40, 75600, 128)
HUNYUAN_VIDEO = AttentionSpec(
    "HunyuanVideo", "129 frames at 720p: 33 x 45 x 80 tokens of video, 256 of text", 24, 24, 119056, 128
)

HEAD_SIZES = (COGVIDEOX_1_5, SAM_VIT_H, PHI_3_MINI, HUNYUAN_VIDEO, GEMMA_3_4B)  # one a number of features
