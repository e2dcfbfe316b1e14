"""What a vision transformer is: its widths per block, and which of the customary variants."""

from __future__ import annotations

import dataclasses


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
    """Every width of a vision transformer, and which of the customary variants it is.

    Attributes:
      patch: side of a patch in pixels.
      stream: width of the residual stream.
      blocks: widths per block.
      num_classes: outputs; 0: no head, the answer is what the head would read.
      pool: what the head reads: "token" (class token) or "mean" (average over patches, then the final norm).
      fused: whether query, key and value share one kernel (needs head == value_head).
      norm_width: divisor of LayerNorm's means; the width of the stream before pruning.
      class_token: whether there is one; None: if `pool` is "token".
      distilled: a distillation token follows the class token.
      both_heads: the distillation token has a head of its own, if there are any, and the answer is the mean of both.
      registers: number of register tokens after these.
      positions: "all" tokens have a position embedding, or the "patches" only.
      norm_first: with pool "mean", the final norm comes before the average.
      pre_norm: a norm before the first block (CLIP).
      layer_scale: a learned factor per channel on each residual branch.
      patch_bias, qkv_bias, head_bias: whether these layers have a bias.
      activation: of the MLPs, one of ACTIVATIONS.
      epsilon: of every norm.
      image: (height, width) in pixels the positions are meant for; None: any with as many patches. Pixels on the right
        and below that are left over by the patches are not looked at; without `image` they are an error.
    """

    patch: int
    stream: int
    blocks: tuple[ViTBlock, ...]
    num_classes: int
    pool: str = "token"
    fused: bool = True
    norm_width: int | None = None
    class_token: bool | None = None
    distilled: bool = False
    both_heads: bool = False
    registers: int = 0
    positions: str = "all"
    norm_first: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    head_bias: bool = True
    activation: str = "gelu"
    epsilon: float = 1e-6
    image: tuple[int, int] | None = None

    @property
    def special(self) -> dict[str, int]:
        """{parameter: number of tokens} of those in front of the patches."""
        has = self.pool == "token" if self.class_token is None else self.class_token
        counts = {"cls_token": int(has), "dist_token": int(self.distilled), "reg_token": self.registers}
        return {name: n for name, n in counts.items() if n}

    @property
    def prefix(self) -> int:
        """How many tokens stand in front of the patches."""
        return sum(self.special.values())

    @property
    def embedded(self) -> int:
        """How many of these have a position embedding."""
        return self.prefix if self.positions == "all" else 0
