"""A feed-forward layer of many small experts (BlockFFN, Song et al. 2025; gated as in Mixtral), plain and as a module.

    router/kernel (d, experts)    router_norm/scale (experts,)    up (experts, d, f)    down (experts, f, d)
    gate (experts, d, f), where experts are gated

How the experts are computed is a hook: `experts_fn(x, routed, up, down)`, by default all of them. `tile_experts` and
`union_experts` leave out what is not active, by the kernels of `pallas_kernels.sparse_moe`, with the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jprune.models.moe.routers import Grin, ReluNorm, Routed, Router
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.sparse_moe import permute_pairs, permuted_moe, tile_moe, union_moe
from pallas_kernels.sparse_moe.api import FEW

Experts: TypeAlias = Callable[..., Any]


def all_experts(
    x: Float[Array, "tokens d"],
    routed: Routed,
    up: Float[Array, "experts d f"],
    down: Float[Array, "experts f d"],
    gate: Float[Array, "experts d f"] | None = None,
) -> Float[Array, "tokens d"]:
    """y_t = sum_e score_te silu(x_t up_e) down_e, every expert for every token; sums in float32.

    With a gate it is silu(x_t gate_e) * (x_t up_e) in place of silu(x_t up_e).
    """
    h = jnp.einsum("td,edf->tef", x, up, preferred_element_type=jnp.float32)
    if gate is None:
        h = jax.nn.silu(h)
    else:
        h = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate, preferred_element_type=jnp.float32)) * h
    h = (h * routed.scores[:, :, None]).astype(x.dtype)
    return jnp.einsum("tef,efd->td", h, down, preferred_element_type=jnp.float32).astype(x.dtype)


def tile_experts(x: Any, routed: Routed, up: Any, down: Any, gate: Any = None) -> Any:
    """Only what is active, with gradients: for training, and for reading many tokens; raises ValueError with a gate."""
    refuse_gate(gate)
    return tile_moe(x, routed.scores, routed.active, up, down)


@functools.cache
def sorted_experts(k: int) -> Experts:
    """Of a router by which a token goes to k experts: each expert computes its own tokens alone, gated or not.

    Pairs of a token and an expert are sorted by expert for grouped products (`pallas_kernels`), with gradients. Where a token
    goes to more, all experts are computed: none is lost.
    """

    def run(x: Any, routed: Routed, up: Any, down: Any, gate: Any = None) -> Any:
        if k > routed.active.shape[1]:
            raise ValueError(f"k is {k}: there are {routed.active.shape[1]} experts")
        if gate is None:
            return permuted_moe(x, routed.scores, routed.active, up, down, capacity=k * len(x))
        pairs = permute_pairs(routed.active, routed.scores, k * len(x))

        def few(x: Any, up: Any, down: Any, gate: Any) -> Any:
            own, sizes = x[pairs.row_token], pairs.group_sizes
            h = grouped_matmul(own, up, sizes, row_scale=pairs.row_score)
            h = (grouped_matmul(own, gate, sizes, activation="silu") * h).astype(x.dtype)
            out = grouped_matmul(h, down, sizes, preferred_element_type=jnp.float32)
            return jax.ops.segment_sum(out, pairs.row_token, len(x)).astype(x.dtype)

        def all_of_them(x: Any, up: Any, down: Any, gate: Any) -> Any:
            return all_experts(x, routed, up, down, gate)

        return jax.lax.cond(pairs.overflow, all_of_them, few, x, up, down, gate)

    return run


def refuse_gate(gate: Any) -> None:
    """For hooks whose kernels are for experts without gates: raise ValueError where there is one."""
    if gate is not None:
        raise ValueError("these kernels are for experts without gates: take all_experts or sorted_experts(k)")


def union_experts(x: Any, routed: Routed, up: Any, down: Any, gate: Any = None) -> Any:
    """Only experts that some of at most 64 tokens use, without gradients: for decoding; more tokens by `tile_experts`.

    Raises ValueError with a gate.
    """
    refuse_gate(gate)
    if len(x) > FEW:
        return tile_experts(x, routed, up, down)
    return union_moe(x, routed.scores, routed.active, up, down)


def blockffn(
    params: Mapping[str, Any],
    x: Float[Array, "tokens d"],
    router: Router = ReluNorm(),
    *,
    experts_fn: Experts = all_experts,
    valid: Any = None,
    key: Any = None,
) -> tuple[Float[Array, "tokens d"], Routed]:
    """(y, what the router decided) of one layer; a token without an expert gets zeros.

    Args:
      params: the tree above; routers other than `ReluNorm` have no router_norm.
      x: tokens in their order.
      router: which experts run.
      experts_fn: how they are computed.
      valid: (tokens,) bool; False: padding, for which no expert runs.
      key: of `Grin` in training.

    Raises:
      ValueError: up, down, gate and the router are of different numbers of experts, or of another width than x.
    """
    kernel, up, down, gate = params["router"]["kernel"], params["up"], params["down"], params.get("gate")
    experts, d, f = up.shape
    if kernel.shape != (d, experts) or down.shape != (experts, f, d) or x.shape[-1:] != (d,):
        raise ValueError(
            f"x {x.shape}, router {kernel.shape}, up {up.shape} and down {down.shape} do not fit: they are (tokens, d), "
            "(d, experts), (experts, d, f) and (experts, f, d)"
        )
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"gate has shape {gate.shape}: it must be that of up, {up.shape}")
    logits = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision="highest")
    if isinstance(router, ReluNorm):
        routed = router(logits, params["router_norm"]["scale"])
    else:
        routed = router(logits, key) if isinstance(router, Grin) else router(logits)
    if valid is not None:
        routed = only(routed, valid)
    more = {} if gate is None else {"gate": gate}
    return experts_fn(x, routed, up, down, **more), routed


def only(routed: Routed, valid: Any) -> Routed:
    """The same with no expert for the tokens that are not valid."""
    there = valid[:, None]
    unit, scores = (jnp.where(there, v, 0.0) for v in (routed.unit, routed.scores))
    return routed._replace(unit=unit, scores=scores, active=routed.active & there)


class BlockFFN(nn.Module):
    """The layer as a module: x (..., d) -> (y, `Routed` of all tokens in a row).

    Attributes:
      experts: how many. width: f of each.
      router: which of them run.
      experts_fn: how they are computed.
      gated: whether they have gates.
      kernel_init: of all matrices.
    """

    experts: int
    width: int
    router: Router = ReluNorm()
    experts_fn: Experts = all_experts
    gated: bool = False
    kernel_init: Any = nn.initializers.normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, valid: Any = None, key: Any = None) -> tuple[jax.Array, Routed]:
        """valid: (...) bool; key: of `Grin` in training."""
        d, dtype = x.shape[-1], jnp.dtype(self.dtype)
        params: dict[str, Any] = {
            "router": _Leaf("kernel", self.kernel_init, (d, self.experts), name="router")(),
            "up": self.param("up", self.kernel_init, (self.experts, d, self.width), dtype),
            "down": self.param("down", self.kernel_init, (self.experts, self.width, d), dtype),
        }
        if self.gated:
            params["gate"] = self.param("gate", self.kernel_init, (self.experts, d, self.width), dtype)
        if isinstance(self.router, ReluNorm):
            params["router_norm"] = _Leaf("scale", nn.initializers.ones, (self.experts,), name="router_norm")()
        flat = None if valid is None else valid.reshape(-1)
        y, routed = blockffn(params, x.reshape(-1, d), self.router, experts_fn=self.experts_fn, valid=flat, key=key)
        return y.reshape(x.shape), routed


class _Leaf(nn.Module):
    """One float32 parameter under a name of its own."""

    leaf: str
    start: Any
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {self.leaf: self.param(self.leaf, self.start, self.shape, jnp.dtype("float32"))}
