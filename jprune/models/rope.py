"""Rotary positions (Su et al. 2021) in the half-split convention of LLaMA checkpoints on the Hugging Face hub.

Entry j of the first half of a head is rotated with entry j of the second half by position * frequency_j. The table is
made inside the traced function, so that by default the axis over a head's query and key channels is frozen with that
reason; `jprune.trace(..., fold_constants=True)` sees through it and makes each rotated pair one unit.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
      theta: base of the frequencies theta^(-2j/h).
      kind: "default"; "linear": all frequencies divided by `factor`; "llama3": only the slow ones, those whose
        wavelength exceeds `original` / `low` positions, with a ramp down to `original` / `high`.
      factor, low, high, original: of the scaling.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope type {self.kind!r} is not supported: only {', '.join(KINDS)}")
        for name in ("theta", "factor", "low", "high", "original"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rope's {name} is {getattr(self, name)}: it must be positive and finite")
        if self.kind == "llama3" and not self.low < self.high:
            raise ValueError(f"rope scaling llama3 needs low < high frequency factors, not {self.low} and {self.high}")


def frequencies(rope: Rope, head: int) -> Float32[Array, " half"]:
    """Angle per position of each rotated pair of a head of size `head`."""
    inverse = rope.theta ** (-jnp.arange(0, head, 2, dtype=jnp.float32) / head)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        turns = rope.original * inverse / (2 * jnp.pi)  # how often a pair turned within the original context
        ramp = jnp.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        return inverse * ((1 - ramp) / rope.factor + ramp)
    return inverse


def angles(
    rope: Rope, head: int, positions: Int[Array, "batch tokens"]
) -> tuple[Float32[Array, "batch tokens half"], Float32[Array, "batch tokens half"]]:
    """(cos, sin) of every position and pair, in float32."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(rope, head)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "batch tokens heads head"],
    cos: Float32[Array, "#batch tokens half"],
    sin: Float32[Array, "#batch tokens half"],
) -> jax.Array:
    """Queries or keys turned to their positions, computed in float32; same shape and dtype as x."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
