"""How many tokens each block of a vision transformer has under a reducer, and the MACs that this costs.

Token counts follow from shapes: the reducer runs on abstract arrays, block by block, and no model is needed. The rule of
Zero-TPrune's tables counts matrix products and LayerNorms (5 an element); not softmax, GELU, biases and the choice of tokens,
which `overhead` gives apart. For one width of heads and an MLP of 4 d it is 12 n d^2 + 2 n^2 d + 10 n d a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from jprune.methods.tokens.zero_tprune import PRESETS
from jprune.models.token_hook import Seen, TokenReducer, Tokens, all_tokens
from jprune.models.vit_config import ViTBlock, ViTConfig


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a vision transformer and of its images.

    Attributes:
      width: of the residual stream.
      blocks: widths per block.
      patches: of an image.
      prefix: special tokens before them.
      patch_inputs: numbers in a patch.
      classes: outputs; 0: no head.
    """

    width: int
    blocks: tuple[ViTBlock, ...]
    patches: int
    prefix: int = 1
    patch_inputs: int = 768
    classes: int = 1000

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def tokens(self) -> int:
        """Special tokens and patches."""
        return self.prefix + self.patches


class Counts(NamedTuple):
    """Tokens that go into a block's attention, and into its MLP; floats where they are means over images."""

    attention: float
    mlp: float


def uniform_dims(width: int, depth: int, heads: int, patches: int, mlp: int | None = None, **more: int) -> Dims:
    """Blocks of one size, an MLP of 4 times the width unless said otherwise; see `Dims` for the rest."""
    head = width // heads
    return Dims(width, (ViTBlock(heads, head, head, mlp or 4 * width),) * depth, patches, **more)


def dims_of(config: ViTConfig, image: Sequence[int]) -> Dims:
    """Sizes of a model of `jprune.models.vit` for images of (height, width, channels)."""
    height, width, channels = image
    patches = (height // config.patch) * (width // config.patch)
    inputs = config.patch**2 * channels
    return Dims(config.stream, config.blocks, patches, config.prefix, inputs, config.num_classes)


def deit(size: str) -> Dims:
    """DeiT "tiny", "small" or "base" for images of 224 x 224.

    Raises:
      ValueError: another size.
    """
    heads = {"tiny": 3, "small": 6, "base": 12}.get(size)
    if heads is None:
        raise ValueError(f"size must be 'tiny', 'small' or 'base', not {size!r}")
    return uniform_dims(64 * heads, 12, heads, 196)


def counts(reducer: TokenReducer, dims: Dims, batch: int = 1) -> tuple[tuple[Counts, ...], int]:
    """(tokens of each block, tokens after the last one). Hidden and empty places count: they are computed.

    `batch` is that of a reducer that holds places of particular images.
    """
    number = jax.ShapeDtypeStruct

    def shape(n: int) -> Tokens:
        return jax.eval_shape(
            all_tokens, number((batch, n, dims.width), jnp.float32), jax.eval_shape(jax.random.key, 0)
        )

    def width_of(t: Tokens) -> int:
        return t.x.shape[1]

    now = jax.eval_shape(lambda t: reducer.before(t, dims.prefix), shape(dims.tokens))
    found = []
    for i, b in enumerate(dims.blocks):
        entered = width_of(now)
        query, value = (number((batch, entered, b.heads, h), jnp.float32) for h in (b.head, b.value_head))
        weights = number((batch, b.heads, entered, entered), jnp.float32) if reducer.reads_weights(i) else None

        def seen(parts: tuple) -> Seen:
            return Seen(*parts, prefix=dims.prefix)

        parts = (weights, query, query, value)
        now = jax.eval_shape(lambda t, p, i=i: reducer.inside(i, t, seen(p)), now, parts)
        found.append(Counts(entered, width_of(now)))
        now = jax.eval_shape(lambda t, p, i=i: reducer.after(i, t, seen(p)), now, parts)
    return tuple(found), width_of(now)


def block_macs(block: ViTBlock, width: int, n: Counts) -> float:
    """MACs of one block; LayerNorms count 5 an element."""
    projections = block.heads * (2 * block.head + 2 * block.value_head) * width
    products = block.heads * (block.head + block.value_head)
    attention = n.attention * projections + n.attention**2 * products + 5 * n.attention * width
    return attention + n.mlp * (2 * width * block.mlp + 5 * width)


def blocks_macs(dims: Dims, found: Sequence[Counts]) -> float:
    """MACs of all blocks per image."""
    return sum(block_macs(b, dims.width, n) for b, n in zip(dims.blocks, found, strict=True))


def total_macs(dims: Dims, found: Sequence[Counts], last: float) -> float:
    """Blocks, patch embedding, last norm and head."""
    ends = dims.patches * dims.patch_inputs * dims.width + dims.classes * dims.width + 5 * last * dims.width
    return blocks_macs(dims, found) + ends


def overhead(reducer: TokenReducer, dims: Dims, batch: int = 1) -> int:
    """MACs of choosing tokens, per image."""
    return _choosing(reducer, dims, counts(reducer, dims, batch)[0])


def _choosing(reducer: TokenReducer, dims: Dims, found: Sequence[Counts]) -> int:
    first = dims.blocks[0]
    before = reducer.overhead(-1, dims.tokens, dims.prefix, first.heads, first.head)
    each = enumerate(zip(dims.blocks, found, strict=True))
    return before + sum(reducer.overhead(i, int(n.attention), dims.prefix, b.heads, b.head) for i, (b, n) in each)


def count_macs(reducer: TokenReducer, dims: Dims, batch: int = 1) -> dict[str, float]:
    """{"blocks", "total", "overhead"}: MACs per image; "fraction": of the unreduced model's blocks."""
    found, last = counts(reducer, dims, batch)
    blocks, whole = blocks_macs(dims, found), (Counts(dims.tokens, dims.tokens),) * dims.depth
    return {
        "blocks": blocks,
        "total": total_macs(dims, found, last),
        "overhead": _choosing(reducer, dims, found),
        "fraction": blocks / blocks_macs(dims, whole),
    }


def preset_table() -> Table:
    """What Zero-TPrune's presets cost on the DeiT each is for."""
    out = Table(title="tokens and MACs per image, in billions")
    for column in ("preset", "DeiT", "tokens of each block", "blocks", "total", "choosing", "share of blocks"):
        out.add_column(column)
    for name, (size, reducer) in PRESETS.items():
        dims = deit(size)
        found, _ = counts(reducer, dims)
        cost = count_macs(reducer, dims)
        numbers = (f"{cost[k] / 1e9:.3f}" for k in ("blocks", "total", "overhead"))
        each = " ".join(str(n.attention) for n in found)
        out.add_row(name, size, each, *numbers, f"{cost['fraction']:.1%}")
    return out
