"""The dense layer with the meaning all implementations share, differentiable to any order; for small sizes and for checks.

Every token passes through every expert: memory is (tokens x experts x expert width). What lies in experts that no token uses
(even not-a-number) reaches nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.xla import accumulator


def moe(
    x: Float[Array, "T d"],
    scores: Float[Array, "T E"],
    active: Bool[Array, "T E"],
    up: Float[Array, "E d f"],
    down: Float[Array, "E f d"],
) -> Float[Array, "T d"]:
    """sum_e (scores[:, e] * silu(x @ up[e])) @ down[e] over the active pairs, summed in float32 or wider."""
    dtype = accumulator(x, up, down)
    used = active.any(0)[:, None, None]
    up, down = (jnp.where(used, w, 0).astype(dtype) for w in (up, down))
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x.astype(dtype), up, precision="highest"))
    weighted = jnp.where(active[..., None], hidden * scores[..., None].astype(dtype), 0)
    return jnp.einsum("tef,efd->td", weighted, down, precision="highest").astype(x.dtype)
