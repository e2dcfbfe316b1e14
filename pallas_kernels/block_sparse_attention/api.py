"""The public function: checks, choice of an implementation, and the derivative that all of them share."""

from __future__ import annotations

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.common.attention_arguments import (
    LAYOUTS,
    AttentionError,
    check_heads,
    default_scale,
    to_bhld,
    whole_blocks,
)
from pallas_kernels.common.attention_problem import KernelConfig, Static, Tokens
from pallas_kernels.common.backends import Operation, compare, no_derivative
from pallas_kernels.common.block_mask import BlockMask


@no_type_check  # at run time: what it says of wrong arguments is its own
def block_sparse_attention(
    q: Float[Array, "b m n d"],
    k: Float[Array, "b s t d"],
    v: Float[Array, "b s t e"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | Int[Array, "*batch"] = 0,
    q_len: int | Int[Array, "*batch"] | None = None,
    kv_len: int | Int[Array, "*batch"] | None = None,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b t"] | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    layout: str = "bhld",
    impl: str = "auto",
    config: KernelConfig | None = None,
    interpret: Any = False,
) -> Any:
    """Softmax attention over the pairs of tokens whose blocks are active in `mask` and which the token rules allow.

    A query that sees no key gives out 0, log-sum-exp -inf and no gradient. Work and memory follow the active blocks. Sums
    are kept in float32. Differentiable once in q, k and v (with `impl="reference"` any number of times); the gradient of k
    and v walks the transposed lists: `mask.with_transpose()` beforehand saves building them in every step.

    Args:
      q, k, v: one dtype; key heads divide query heads, which share them in order (head h reads h // (H / Hkv)).
      scale: of the products, 1 / sqrt(d) by default. soft_cap: c * tanh(logit / c) instead of the logit.
      causal: only keys at or before query + `q_offset`, the position of the first query among the keys.
      q_len, kv_len: tokens that count, one number or one a batch element; the rest may hold anything.
      q_segment_ids, kv_segment_ids: only keys with the query's id.
      return_lse: also return the natural log-sum-exp of each query's logits, (batch, heads, queries) whatever the layout.
      layout: "bhld" is (batch, heads, tokens, features), "blhd" is (batch, tokens, heads, features).
      impl: "xla", "tpu", "mosaic_gpu" (Hopper GPUs), "reference" (dense), or "auto": the fastest that takes the problem.
        All mean the same.
      config: what trades speed for memory.
      interpret: run a kernel on another device: True or `pltpu.InterpretParams` for those of TPUs, jax's parameters for
        interpreting GPU kernels for those of GPUs.

    Returns:
      out like q with v's features, or (out, lse) in float32.

    Raises:
      AttentionError: arguments that contradict each other or the mask.
      BackendError: an unknown `impl`, or one that cannot take the problem.
      MiscompilationError: on the first use of the Hopper kernels, if a small problem does not come out right.
      DerivativeError: a second derivative, other than of the reference.
    """
    q, k, v = (to_bhld(x, layout) for x in (q, k, v))
    check_heads(q, k, v)
    sizes = (mask.q_size, mask.kv_size)
    if (q.shape[2], k.shape[2]) != sizes:
        raise AttentionError(
            f"{q.shape[2]} queries and {k.shape[2]} keys, but the mask is of {sizes[0]} and {sizes[1]}"
        )
    if any(n not in (1, m) for n, m in zip(mask.kv_cnt.shape, q.shape[:2])):
        raise AttentionError(f"the mask has lists for {mask.kv_cnt.shape[:2]} (batch, heads), the queries are of "
                             f"{q.shape[:2]}: either equal or 1")  # fmt: skip
    mask.check()
    static = Static(default_scale(q, scale), soft_cap, mask.block_q, mask.block_k, config or KernelConfig(), interpret)
    problem = whole_blocks(static, q, k, v, causal=causal, q_offset=q_offset, q_len=q_len, kv_len=kv_len,
                           q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids)  # fmt: skip
    q, k, v = problem.arrays
    chosen = OPERATION.choose(impl, static, q, k, v, problem.tokens, interpret=interpret)
    out, lse = attend(chosen, static, q, k, v, mask, problem.tokens)
    out, lse = problem.live(out, 0), problem.live(lse[..., None], -jnp.inf)[..., 0]
    out = out.transpose(LAYOUTS[layout])
    return (out, lse) if return_lse else out


@functools.cache
def prove(name: str) -> None:
    """Compare a small causal problem and its gradients with the dense ones on this device: some releases of ptxas compile
    branches like those of these kernels wrongly, which nothing but the numbers tells. Host-side, once a process.

    Raises:
      MiscompilationError: naming what differs.
    """  # fmt: skip
    draw = np.random.default_rng(0)
    shapes = [(1, 2, 256, 64), (1, 1, 256, 64), (1, 1, 256, 64), (1, 2, 256, 64)]
    with jax.ensure_compile_time_eval():
        drawn = [jnp.asarray(draw.normal(size=s), jnp.bfloat16) for s in shapes]
        compare(name, _proof(name, *drawn), _proof("reference", *drawn))


@functools.partial(jax.jit, static_argnums=0)
def _proof(name: str, q: Any, k: Any, v: Any, dout: Any) -> dict[str, Any]:
    mask = BlockMask.window(None, 0, block_q=64, block_k=64, q_size=256, kv_size=256).with_transpose()
    static, tokens = Static(0.125, None, 64, 64), Tokens(q_offset=jnp.zeros(1, jnp.int32))
    (out, lse), back = jax.vjp(lambda q, k, v: attend(name, static, q, k, v, mask, tokens), q, k, v)
    dq, dk, dv = back((dout, jnp.zeros_like(lse)))
    return {"values": out, "log-sum-exps": lse, "dq": dq, "dk": dk, "dv": dv}


OPERATION = Operation("block-sparse attention", "pallas_kernels.block_sparse_attention", prove)
_reference = jax.jit(reference.attention, static_argnums=0)


def attend(name: str, static: Static, q: Any, k: Any, v: Any, mask: BlockMask, tokens: Tokens) -> tuple[Any, Any]:
    """(out, log-sum-exp) of a problem of whole blocks by a chosen implementation."""
    if name == "reference":
        return _reference(static, mask.to_dense(), q, k, v, tokens)
    return tuple(_attend(name, static, q, k, v, mask, tokens))


_only_first = no_derivative("block-sparse attention has first derivatives only: use impl='reference' for higher ones")


@_only_first
def _forward(name: str, static: Static, arrays: Any) -> Any:
    return OPERATION.implementation(name).forward(static, *arrays)


@_only_first
def _backward(name: str, static: Static, arrays: Any) -> Any:
    q, k, v, mask, tokens, out, lse, dout, dlse = arrays
    dead = jnp.isneginf(lse)
    dout = jnp.where(dead[..., None], 0, dout)  # whatever a loss makes of such rows, they have no gradient
    delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1) - jnp.where(dead, 0, dlse)
    problem = (static, q, k, v, dout, lse, delta, mask, tokens)
    module = OPERATION.implementation(name)
    return module.query_gradient(*problem), *module.key_gradients(*problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(name: str, static: Static, q: Any, k: Any, v: Any, mask: BlockMask, tokens: Tokens) -> Any:
    return _forward(name, static, (q, k, v, mask, tokens))


def _attend_forward(name: str, static: Static, *arrays: Any) -> Any:
    out, lse = _forward(name, static, arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_backward(name: str, static: Static, saved: Any, cotangents: Any) -> Any:
    q, k, v, mask, *rest = saved
    if mask.q_idx is None:
        mask = mask.with_transpose()
    return *_backward(name, static, (q, k, v, mask, *rest, *cotangents)), None, None


_attend.defvjp(_attend_forward, _attend_backward)
