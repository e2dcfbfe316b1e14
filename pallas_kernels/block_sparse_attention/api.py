"""The public function: checks, whole blocks, choice of a backend, and the derivative that all backends share."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.problem import KernelConfig, Static, Tokens

KERNELS = {"tpu": "the TPU kernels", "mosaic_gpu": "the Hopper kernels"}
OF_DEVICE = {"tpu": "tpu", "gpu": "mosaic_gpu"}  # the kernels that "auto" asks first
LAYOUTS = {"bhld": (0, 1, 2, 3), "blhd": (0, 2, 1, 3)}
_log = logging.getLogger(__name__)


class AttentionError(ValueError):
    """Arguments of an attention that do not fit together, or that a backend cannot take."""


class MiscompilationError(AttentionError, RuntimeError):
    """A kernel that compiles but computes something else on this device."""


class DerivativeError(AttentionError, NotImplementedError):
    """A derivative that does not exist."""


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
      AttentionError: arguments that contradict each other or the mask, or that the named backend cannot take.
      MiscompilationError: on the first use of the Hopper kernels, if a small problem does not come out right.
      DerivativeError: a second derivative of a backend other than the reference.
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
    chosen = choose(impl, static, q, k, v, problem.tokens)
    if chosen == "reference":
        out, lse = _reference(static, mask.to_dense(), q, k, v, problem.tokens)
    else:
        out, lse = tuple(_attend(chosen, static, q, k, v, mask, problem.tokens))
    out, lse = problem.live(out, 0), problem.live(lse[..., None], -jnp.inf)[..., 0]
    out = out.transpose(LAYOUTS[layout])
    return (out, lse) if return_lse else out


def to_bhld(x: Any, layout: str) -> Any:
    """The array as (batch, heads, tokens, features)."""
    if layout not in LAYOUTS:
        raise AttentionError(f"layout {layout!r} is not known: {', '.join(LAYOUTS)}")
    if x.ndim != 4 or 0 in x.shape:
        raise AttentionError(f"an array of shape {x.shape}: wanted four axes, {', '.join(layout)}, none empty")
    return x.transpose(LAYOUTS[layout])


def check_heads(q: Any, k: Any, v: Any) -> None:
    """Raise AttentionError unless shapes (batch, heads, tokens, features) and dtypes fit together."""
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise AttentionError(f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}: wanted one floating type")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise AttentionError(f"queries {q.shape}, keys {k.shape} and values {v.shape} (batch, heads, tokens, features) do "
                             "not fit: batch, key tokens, key heads and the features of queries and keys must agree")  # fmt: skip
    if q.shape[1] % k.shape[1]:
        raise AttentionError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: one must divide the other")


def default_scale(q: Any, scale: float | None) -> float:
    """The given scale, or 1 / sqrt(features)."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A problem of whole blocks: arrays (query, key and perhaps value), rules, the true number of queries, and q_len."""

    arrays: tuple[Any, ...]
    tokens: Tokens
    queries: int
    q_len: Any

    def live(self, x: Any, otherwise: float) -> Any:
        """The true queries of (batch, heads, queries, ...), with `otherwise` behind `q_len`."""
        x = x[:, :, : self.queries]
        if self.q_len is None:
            return x
        return jnp.where((jnp.arange(self.queries) < self.q_len[:, None])[:, None, :, None], x, otherwise)


def whole_blocks(static: Static, q: Any, k: Any, v: Any | None, *, causal: bool, q_offset: Any, q_len: Any, kv_len: Any,
                 q_segment_ids: Any, kv_segment_ids: Any) -> Whole:  # fmt: skip
    """Pad tokens to whole blocks and put zeros where tokens do not count, so that no backend meets what lies there.

    Raises:
      AttentionError: per-batch numbers or segment ids of the wrong shape or dtype.
    """
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise AttentionError("q_segment_ids and kv_segment_ids come together: give both or neither")
    q_len, kv_len = (
        n if n is None else _per_batch(what, n, batch) for what, n in (("q_len", q_len), ("kv_len", kv_len))
    )
    offset = _per_batch("q_offset", q_offset, batch) if causal else None
    q = _whole(_zero_behind(q, q_len), static.block_q)
    arrays = [_whole(_zero_behind(x, kv_len), static.block_k) for x in (k, v) if x is not None]
    if arrays[0].shape[2] != keys:
        kv_len = jnp.full(batch, keys, jnp.int32) if kv_len is None else jnp.minimum(kv_len, keys)
    segments = []
    sides = (("q", q_segment_ids, queries, static.block_q), ("kv", kv_segment_ids, keys, static.block_k))
    for what, ids, size, block in sides:
        if ids is not None:
            if jnp.shape(ids) != (batch, size) or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
                raise AttentionError(
                    f"{what}_segment_ids has shape {jnp.shape(ids)}: wanted integers ({batch}, {size})"
                )
            ids = jnp.pad(jnp.asarray(ids, jnp.int32), ((0, 0), (0, -size % block)))
        segments.append(ids)
    return Whole((q, *arrays), Tokens(kv_len, offset, *segments), queries, q_len)


def _per_batch(name: str, value: Any, batch: int) -> Any:
    if jnp.shape(value) not in ((), (batch,)) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise AttentionError(f"{name} is {jnp.result_type(value)}{list(jnp.shape(value))}: wanted an integer, or {batch} "
                             "of them, one a batch element")  # fmt: skip
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))


def _zero_behind(x: Any, length: Any) -> Any:
    if length is None:
        return x
    return jnp.where((jnp.arange(x.shape[2]) < length[:, None])[:, None, :, None], x, 0)


def _whole(x: Any, block: int) -> Any:
    missing = -x.shape[2] % block
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x


@functools.cache
def backend(name: str, of: str = "block_sparse_attention") -> Any:
    """The module of a backend, imported when it is first needed: what GPU kernels import is not on every machine."""
    return importlib.import_module(f"pallas_kernels.{of}.{name}")


def choose(impl: str, static: Static, q: Any, k: Any, v: Any | None, tokens: Tokens) -> str:
    """The backend to use.

    Raises:
      AttentionError: an unknown name, or a named backend that cannot take the problem, with its reason.
      MiscompilationError: as `block_sparse_attention`.
    """
    if impl in ("xla", "reference"):
        return impl
    if impl not in ("auto", *KERNELS):
        raise AttentionError(f"impl {impl!r} is not known: auto, reference, xla, {', '.join(KERNELS)}")
    name = OF_DEVICE.get(jax.default_backend()) if impl == "auto" else impl
    if name is None:
        return "xla"
    reason = backend(name).refusal(static, q, k, v, tokens)
    if reason and impl != "auto":
        raise AttentionError(f"{KERNELS[name]} cannot run: {reason}")
    if reason:
        _say_once(reason)
        return "xla"
    if name == "mosaic_gpu" and jax.default_backend() == "gpu" and not static.interpret:
        prove(name)
    return name


@functools.cache
def prove(name: str) -> None:
    """Compare a small causal problem and its gradients with the dense ones on this device: some releases of ptxas compile
    branches like those of these kernels wrongly, which nothing but the numbers tells. Host-side, once a process.

    Raises:
      MiscompilationError: naming what differs.
    """  # fmt: skip
    with jax.ensure_compile_time_eval():
        shapes = [(1, 2, 256, 64), (1, 1, 256, 64), (1, 1, 256, 64), (1, 2, 256, 64)]
        draw = np.random.default_rng(0)
        drawn = [jnp.asarray(draw.normal(size=s), jnp.bfloat16) for s in shapes]
        mask = BlockMask.window(None, 0, block_q=64, block_k=64, q_size=256, kv_size=256).with_transpose()
        static, tokens = Static(0.125, None, 64, 64), Tokens(q_offset=jnp.zeros(1, jnp.int32))

        def both(attend: Any) -> Any:
            (out, lse), back = jax.vjp(attend, *drawn[:3])
            return [np.asarray(x, np.float64) for x in (out, lse, *back((drawn[3], jnp.zeros_like(lse))))]

        ours = both(lambda *a: tuple(_attend(name, static, *a, mask, tokens)))
        wanted = both(lambda *a: _reference(static, mask.to_dense(), *a, tokens))
    for what, x, y in zip(("values", "log-sum-exps", "dq", "dk", "dv"), ours, wanted):
        if not np.linalg.norm(x - y) <= 0.02 * np.linalg.norm(y):  # so written, not-a-number fails too
            raise MiscompilationError(f"{KERNELS.get(name, name)} give other {what} than dense attention on this device: "
                                      "use impl='xla', or another CUDA (ptxas 12.8.0 to 12.9.0 is known for this)")  # fmt: skip


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("block-sparse attention runs on its XLA backend: %s", reason)


_reference = jax.jit(reference.attention, static_argnums=0)


def no_derivative(what: str) -> Any:
    """Decorator of f(*static, arrays): differentiating it raises DerivativeError; the first argument list is hashable."""

    def decorate(f: Any) -> Any:
        guarded = jax.custom_jvp(f, nondiff_argnums=(0, 1))
        guarded.defjvp(functools.partial(_refuse, what))
        return jax.jit(guarded, static_argnums=(0, 1))

    return decorate


def _refuse(what: str, *_: Any) -> Any:
    raise DerivativeError(what)


_only_first = no_derivative("block-sparse attention has first derivatives only: use impl='reference' for higher ones")


@_only_first
def _forward(name: str, static: Static, arrays: Any) -> Any:
    return backend(name).forward(static, *arrays)


@_only_first
def _backward(name: str, static: Static, arrays: Any) -> Any:
    q, k, v, mask, tokens, out, lse, dout, dlse = arrays
    dead = jnp.isneginf(lse)
    dout = jnp.where(dead[..., None], 0, dout)  # whatever a loss makes of such rows, they have no gradient
    delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1) - jnp.where(dead, 0, dlse)
    problem = (static, q, k, v, dout, lse, delta, mask, tokens)
    return backend(name).query_gradient(*problem), *backend(name).key_gradients(*problem)


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
