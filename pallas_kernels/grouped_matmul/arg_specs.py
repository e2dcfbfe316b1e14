"""Grouped products as published mixtures of experts have them: each shape is named once, for all that needs one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """The first product of the experts of one layer; arrays are described, never made.

    Attributes:
      name, source: the model, and what makes the numbers.
      rows: pairs of a token and an expert. width, hidden, groups: of the experts. dtype: of rows and matrices.
    """

    name: str
    source: str
    rows: int
    width: int
    hidden: int
    groups: int
    dtype: str = "bfloat16"

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of lhs, rhs, group_sizes and row_scale."""
        dtype = jnp.dtype(self.dtype)
        return (
            jax.ShapeDtypeStruct((self.rows, self.width), dtype),
            jax.ShapeDtypeStruct((self.groups, self.width, self.hidden), dtype),
            jax.ShapeDtypeStruct((self.groups,), jnp.int32),
            jax.ShapeDtypeStruct((self.rows,), jnp.float32),
        )


MIXTRAL = GroupSpec("Mixtral 8x7B", "2048 tokens of 2 experts", 4096, 4096, 14336, 8)
DEEPSEEK_MOE = GroupSpec("DeepSeekMoE 16B", "1024 tokens of 6 experts, without the shared ones", 6144, 2048, 1408, 64)
BLOCKFFN_XLARGE = GroupSpec("BlockFFN XLarge", "1024 tokens of 11 experts", 11264, 1792, 128, 56)

COMPILED = (MIXTRAL, DEEPSEEK_MOE, BLOCKFFN_XLARGE)
