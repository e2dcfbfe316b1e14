"""Mixtures of experts as published models have them: each shape is named once, for tests, compile checks and benchmarks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """One layer of a model; arrays are described, never made.

    Attributes:
      name, source: the model, and what makes the numbers.
      width, hidden, experts: of the layer. tokens: of a call. dtype: of tokens and weights.
    """

    name: str
    source: str
    width: int
    hidden: int
    experts: int
    tokens: int = 4096
    dtype: str = "bfloat16"

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of x, scores, active, up and down."""
        pairs, dtype = (self.tokens, self.experts), jnp.dtype(self.dtype)
        return (
            jax.ShapeDtypeStruct((self.tokens, self.width), dtype),
            jax.ShapeDtypeStruct(pairs, jnp.float32),
            jax.ShapeDtypeStruct(pairs, bool),
            jax.ShapeDtypeStruct((self.experts, self.width, self.hidden), dtype),
            jax.ShapeDtypeStruct((self.experts, self.hidden, self.width), dtype),
        )

    @property
    def weights(self) -> int:
        """Bytes of the layer's experts."""
        return 2 * self.experts * self.width * self.hidden * jnp.dtype(self.dtype).itemsize


BLOCKFFN_SMALL = MoESpec("BlockFFN Small", "0.1B parameters", 768, 64, 48)
BLOCKFFN_XLARGE = MoESpec("BlockFFN XLarge", "1.2B parameters", 1792, 128, 56)
BLOCKFFN_2_8B = MoESpec("BlockFFN 2.8B", "the model whose decoding is timed", 2048, 128, 128)
LARGE = MoESpec("large", "no published model: eight times BlockFFN 2.8B", 4096, 256, 256)
DEEPSEEK_MOE = MoESpec("DeepSeekMoE 16B", "the size of its experts, which have gates too", 2048, 1408, 64)

COMPILED = (BLOCKFFN_SMALL, BLOCKFFN_XLARGE, BLOCKFFN_2_8B)
