"""The public functions: checks, whole blocks and choice of an implementation, as in block-sparse attention."""

from __future__ import annotations

from typing import Any, no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.api import prove
from pallas_kernels.common.attention_arguments import (
    LAYOUTS,
    AttentionError,
    check_heads,
    default_scale,
    to_bhld,
    whole_blocks,
)
from pallas_kernels.common.attention_problem import KernelConfig, Static
from pallas_kernels.common.backends import Operation, no_derivative
from pallas_kernels.common.xla import padded

# The proof is the attention's: its kernels run in a search, and those here are built of the same parts.
OPERATION = Operation("a search of blocks", "pallas_kernels.block_score", prove)


@no_type_check  # at run time: what it says of wrong arguments is its own
def block_scores(
    q: Float[Array, "b m n d"],
    k: Float[Array, "b s t d"],
    lse: Float[Array, "b h queries"] | None = None,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | Int[Array, "*batch"] = 0,
    q_len: int | Int[Array, "*batch"] | None = None,
    kv_len: int | Int[Array, "*batch"] | None = None,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b t"] | None = None,
    soft_cap: float | None = None,
    layout: str = "bhld",
    impl: str = "auto",
    config: KernelConfig | None = None,
    interpret: Any = False,
) -> Float[Array, "b h nq nk"]:
    """Sum of exp(logit - lse) over the pairs of tokens of every (query block, key block), float32.

    Without `lse` the exact one is found on the way, and the masses of a query block sum to its queries that see a key.
    With an older one (a cache) they are those masses up to a factor of each query. Arguments otherwise as in
    `block_sparse_attention`; one product of queries and keys, no derivative.

    Raises:
      AttentionError: arguments that contradict each other.
      BackendError: an unknown `impl`, or one that cannot take the problem.
      DerivativeError: differentiation.
    """
    q, k = to_bhld(q, layout), to_bhld(k, layout)
    check_heads(q, k, k)
    if lse is not None and jnp.shape(lse) != q.shape[:3]:
        raise AttentionError(f"lse has shape {jnp.shape(lse)}: wanted {q.shape[:3]} (batch, heads, queries)")
    rules = dict(causal=causal, q_offset=q_offset, q_len=q_len, kv_len=kv_len, q_segment_ids=q_segment_ids,
                 kv_segment_ids=kv_segment_ids)  # fmt: skip
    static = Static(default_scale(q, scale), soft_cap, block_q, block_k, config or KernelConfig(), interpret)
    return _run(static, impl, q, k, None, lse, rules)[2]


@no_type_check  # at run time: what it says of wrong arguments is its own
def search_attention(
    q: Float[Array, "b m n d"],
    k: Float[Array, "b s t d"],
    v: Float[Array, "b s t e"],
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | Int[Array, "*batch"] = 0,
    q_len: int | Int[Array, "*batch"] | None = None,
    kv_len: int | Int[Array, "*batch"] | None = None,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b t"] | None = None,
    soft_cap: float | None = None,
    layout: str = "bhld",
    impl: str = "auto",
    config: KernelConfig | None = None,
    interpret: Any = False,
) -> tuple[Any, Float[Array, "b h queries"], Float[Array, "b h nq nk"]]:
    """(out, log-sum-exp, block masses) of dense attention in one pass over the keys; arguments as in `block_scores`.

    A query block keeps the log-sum-exp of each query in every key block, (block_q, nk) numbers, until the whole is known.

    Raises:
      AttentionError: arguments that contradict each other.
      BackendError: an unknown `impl`, or one that cannot take the problem.
      DerivativeError: differentiation.
    """
    q, k, v = (to_bhld(x, layout) for x in (q, k, v))
    check_heads(q, k, v)
    rules = dict(causal=causal, q_offset=q_offset, q_len=q_len, kv_len=kv_len, q_segment_ids=q_segment_ids,
                 kv_segment_ids=kv_segment_ids)  # fmt: skip
    static = Static(default_scale(q, scale), soft_cap, block_q, block_k, config or KernelConfig(), interpret)
    out, lse, masses = _run(static, impl, q, k, v, None, rules)
    return out.transpose(LAYOUTS[layout]), lse, masses


def _run(static: Static, impl: str, q: Any, k: Any, v: Any, lse: Any, rules: dict[str, Any]) -> tuple[Any, Any, Any]:
    problem = whole_blocks(static, q, k, v, **rules)
    q, k, *values = problem.arrays
    value = values[0] if values else None
    chosen = OPERATION.choose(impl, static, q, k, value, problem.tokens, interpret=static.interpret)
    live = jnp.full(q.shape[0], problem.queries, jnp.int32)
    if problem.q_len is not None:
        live = jnp.minimum(live, problem.q_len)
    if lse is not None:
        lse = padded(lse, 2, static.block_q, -jnp.inf)
        lse = jnp.where(jnp.arange(q.shape[2]) < live[:, None, None], lse, -jnp.inf)
        masses = _scores(chosen, static, (q, k, lse, problem.tokens))
        return None, lse, masses
    out, lse, masses = _search(chosen, static, (q, k, *values, live, problem.tokens))
    lse = problem.live(lse[..., None], -jnp.inf)[..., 0]
    return (problem.live(out, 0) if values else None), lse, masses


@no_derivative("block masses have no derivative: pass their arguments through jax.lax.stop_gradient")
def _scores(name: str, static: Static, arrays: Any) -> Any:
    q, k, lse, tokens = arrays
    return OPERATION.implementation(name).scores(static, q, k, lse, tokens)


@no_derivative(
    "a search has no derivative: pass its arguments through jax.lax.stop_gradient, or attend with a dense mask"
)
def _search(name: str, static: Static, arrays: Any) -> Any:
    q, k, *values, live, tokens = arrays
    return OPERATION.implementation(name).search(static, q, k, values[0] if values else None, live, tokens)
