"""The Hopper kernels in jax's interpreter of GPU kernels, with its race detector on: real copies, barriers and lists.

What it does not know (matrix instructions, layouts) is plain arithmetic there: that those compile for the chip is tested by
lowering here and by `experiments.benchmarks.compile_hopper`; that they compute the same is for an owner of the chip.
"""

import dataclasses
import functools
import itertools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed, attention, same
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulation
from jax._src.pallas.mosaic_gpu.interpret import params
from quick import QUICK

from pallas_kernels.block_score import block_scores, search_attention
from pallas_kernels.block_score import mosaic_gpu as score
from pallas_kernels.block_sparse_attention import (
    BackendError,
    BlockMask,
    KernelConfig,
    MiscompilationError,
    api,
    arg_specs,
    block_sparse_attention,
    mosaic_gpu,
    mosaic_gpu_backward,
    xla,
)
from pallas_kernels.common import aot_hopper, attention_mosaic_gpu, backends
from pallas_kernels.common import mosaic_gpu as shared
from pallas_kernels.common.attention_problem import Static, Tokens

CHECKED = params.InterpretGPUParams(detect_races=True)  # memory starts as not-a-number, reads outside raise


_compiled, _compiling = {}, threading.Lock()


def _run_once_compiled(jaxpr, consts, *args):
    """As the interpreter's own, which compiles the same program for every thread of every program of a grid."""
    with _compiling:
        if jaxpr not in _compiled:

            def run(consts, *args):
                jax.core.eval_jaxpr(jaxpr, consts, *args)

            _compiled[jaxpr] = jax.jit(run).lower(consts, *args).compile(QUICK)
    _compiled[jaxpr](consts, *args)


def simulated(f, *arrays):
    """The result of a kernel in the interpreter, which found no race."""
    simulation.reset_gpu_interpret_mode_state()
    _compiled.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", _run_once_compiled)
        out = jax.block_until_ready(jax.jit(f, compiler_options=QUICK)(*arrays))
    assert _compiled and not simulation.get_races().races_found
    return out


def problem(block_q, block_k, nq, nk, features, values, heads=(2, 1), seed=0, rules="", dtype=jnp.bfloat16):
    """(q, k, v, mask, token rules, allowed pairs) with a list that is empty and one that is full."""
    rng, (h, g), lq, lk = np.random.default_rng(seed), heads, nq * block_q, nk * block_k
    q, k, v = (
        rng.normal(size=(1, n, t, d)).astype(dtype)
        for n, t, d in ((h, lq, features), (g, lk, features), (g, lk, values))
    )
    active = rng.random((1, h, nq, nk)) < 0.5
    active[0, 0, 0], active[0, -1, -1] = False, True
    mask = BlockMask.from_dense(active, block_q=block_q, block_k=block_k, q_size=lq, kv_size=lk).with_transpose()
    one, ids = functools.partial(np.full, 1, dtype=np.int32), np.sort(rng.integers(0, 3, lq + lk)).astype(np.int32)
    ids = rng.permutation(ids)
    limit = one(lk - 23) if "l" in rules else None
    offset = one(lk // 2 - 9) if "c" in rules else None
    segments = (np.sort(ids[:lq])[None], np.sort(ids[lq:])[None]) if "s" in rules else (None, None)
    return (
        q,
        k,
        v,
        mask,
        Tokens(limit, offset, *segments),
        pairs(active, block_q, block_k, Tokens(limit, offset, *segments)),
    )


def pairs(active, block_q, block_k, tokens):
    queries, keys = active.shape[2] * block_q, active.shape[3] * block_k
    rules = {
        "offset": tokens.q_offset,
        "kv_len": tokens.kv_len,
        "q_seg": tokens.q_segments,
        "kv_seg": tokens.kv_segments,
    }
    return allowed(active, block_q, block_k, queries, keys, **rules)


# name: (block_q, block_k, query blocks, key blocks, features, values, rules, soft cap)
CASES = {
    "pairs with every rule": (64, 64, 2, 3, 64, 64, "lcs", 5.0),
    "128 by 64 tokens, values of other size": (128, 64, 2, 3, 40, 72, "lc", None),
    "pairs without a rule": (64, 64, 3, 3, 64, 64, "", None),
    "long blocks, in parts": (256, 256, 1, 2, 64, 64, "c", None),
    "large heads, in parts": (64, 128, 2, 2, 128, 256, "l", None),
}
QUICK_CASES = ["pairs with every rule"]
SELECTED = [pytest.param(n, marks=() if n in QUICK_CASES else pytest.mark.slow) for n in CASES]


@pytest.fixture
def few_buffers(monkeypatch):
    """As few as a kernel can do with: short lists fill them several times."""
    monkeypatch.setattr(shared, "MOST_BUFFERS", 2)


def near(ours, wanted):
    assert ours.shape == wanted.shape and np.isfinite(np.asarray(ours, np.float32)).all()
    assert np.linalg.norm(np.asarray(ours, np.float64) - wanted) <= 1e-2 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("few_buffers")
@pytest.mark.parametrize("name", SELECTED)
def test_attention_and_its_gradients_are_the_definition(name):
    """As a user calls it; the log-sum-exp has a cotangent too."""
    block_q, block_k, nq, nk, features, values, rules, cap = CASES[name]
    q, k, v, mask, tokens, ok = problem(block_q, block_k, nq, nk, features, values, rules=rules)
    rng = np.random.default_rng(2)
    dout, dlse = (
        rng.normal(size=(*q.shape[:3], values)).astype(v.dtype),
        rng.normal(size=q.shape[:3]).astype(np.float32),
    )
    options = {"causal": tokens.q_offset is not None, "scale": 0.2, "soft_cap": cap, "return_lse": True}

    def run(q, k, v, mask, tokens, dout, dlse):
        rules = {"q_offset": tokens.q_offset if options["causal"] else 0, "kv_len": tokens.kv_len}
        rules |= {"q_segment_ids": tokens.q_segments, "kv_segment_ids": tokens.kv_segments}
        attend = functools.partial(block_sparse_attention, mask=mask, impl="mosaic_gpu", interpret=CHECKED)
        (out, lse), back = jax.vjp(functools.partial(attend, **options, **rules), q, k, v)
        return out, lse, back((dout, dlse))

    out, lse, grads = jax.tree.map(np.asarray, simulated(run, q, k, v, mask, tokens, dout, dlse))
    assert out.dtype == v.dtype and lse.dtype == np.float32
    wanted = attention(q, k, v, ok, scale=0.2, cap=cap, dout=dout, dlse=np.where(ok.any(-1), dlse, 0))
    same(lse, wanted[1], 1e-4)
    same(out, wanted[0], 2e-2)
    for ours, exact in zip(grads, wanted[2]):
        near(ours, exact)
    assert np.isneginf(lse[0, 0, :block_q]).all() and not out[0, 0, :block_q].any()
    assert not grads[0][~ok.any(-1)].any()
    unseen = ~ok.any((1, 2))[:, None]  # the case's one key head
    assert not grads[1][unseen].any() and not grads[2][unseen].any()


def masses_of(weights, block_q, block_k):
    batch, heads, queries, keys = weights.shape
    return weights.reshape(batch, heads, queries // block_q, block_q, keys // block_k, block_k).sum((3, 5))


# passes, and bytes that one pass may keep: all key heads at once, one by one, too little for one
@pytest.mark.parametrize(
    ("passes", "kept", "rules", "blocks"),
    [
        (None, 10**9, "lcs", 2),
        pytest.param(None, 4 * 192 * 4, "l", 3, marks=pytest.mark.slow),
        pytest.param(None, 1, "lcs", 3, marks=pytest.mark.slow),
        pytest.param(2, 10**9, "", 3, marks=pytest.mark.slow),
    ],
)
def test_a_search_is_dense_attention_and_its_masses(passes, kept, rules, blocks, monkeypatch):
    monkeypatch.setattr(score, "KEPT", kept)
    q, k, v, _, tokens, _ = problem(64, 128, blocks, 2, 64, 64, heads=(2, 2), rules=rules)
    count = 64 * blocks - 22
    static, live = Static(0.2, None, 64, 128, KernelConfig(passes=passes), CHECKED), np.array([count], np.int32)
    assert score._heads_at_once(q.shape, 2, k.shape[2]) == {10**9: 2, 1: None}.get(kept, 1)
    out, lse, masses = simulated(functools.partial(score.search, static), q, k, v, live, tokens)
    ok = pairs(np.ones((1, 2, blocks, 2), bool), 64, 128, tokens)
    ok[:, :, count:] = False
    wanted = attention(q, k, v, ok, scale=0.2)
    same(out[:, :, :count], wanted[0][:, :, :count], 2e-2)
    same(lse, wanted[1], 1e-4)
    same(masses, masses_of(wanted[2], 64, 128), 1e-3)
    np.testing.assert_allclose(np.sum(masses), np.isfinite(lse).sum(), rtol=1e-4)


@pytest.mark.parametrize(("rules", "blocks"), [pytest.param("lcs", 3, marks=pytest.mark.slow), ("l", 2)])
def test_masses_for_an_older_log_sum_exp(rules, blocks):
    q, k, _, _, tokens, _ = problem(64, 128, blocks, 2, 72, 64, rules=rules)
    static = Static(0.2, 4.0, 64, 128, interpret=CHECKED)
    lse = np.random.default_rng(3).normal(size=q.shape[:3]).astype(np.float32)
    lse[:, :, 7] = -np.inf
    masses = simulated(functools.partial(score.scores, static), q, k, lse, tokens)
    ok = pairs(np.ones((1, 2, blocks, 2), bool), 64, 128, tokens)
    _, own, weights = attention(q, k, k, ok, scale=0.2, cap=4.0)
    factor = np.where(np.isneginf(lse) | np.isneginf(own), 0, np.exp(own - np.where(np.isneginf(lse), 0, lse)))
    np.testing.assert_allclose(masses, masses_of(weights * factor[..., None], 64, 128), rtol=1e-4, atol=1e-5)


@given(
    block=st.sampled_from([64, 128, 256, 320, 384]), rows=st.sampled_from([64, 128, 256]),
    features=st.integers(1, 256), values=st.integers(0, 256),
)  # fmt: skip
def test_what_is_not_refused_has_a_plan_that_fits(block, rows, features, values):
    static = Static(1.0, None, rows, block)
    d, e = shared.wide(features), shared.wide(values)
    p = mosaic_gpu.forward_plan(static, d, e)
    assert p is not None and p.parts * p.step == block and p.buffers >= 2
    used = 2 * (p.buffers * p.step * (d + e) + 128 * d + (128 * e if e != d else 0))
    assert used <= shared.SHARED_MEMORY
    for other in (mosaic_gpu_backward.query_plan(static, d, d), mosaic_gpu_backward.key_plan(static, d, d)):
        assert (
            other is not None
            and other.buffers >= 2
            and 4 * d * (128 + other.buffers * other.step) <= shared.SHARED_MEMORY
        )
    lists = [p.list_of(tile) for tile in range(6)]
    assert lists == [tile * 128 // max(rows, 128) for tile in range(6)]


def test_no_plan_where_nothing_fits():
    assert shared.plan(128, 128, 128, 200_000, 4 * 256) is None


def lowered(f, *shapes):
    """The program that jax hands to the chip's compiler, made on this machine."""
    known = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with aot_hopper.as_if_on("H100"):
        return jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=known)(*shapes).mlir_module()


def halves(*fast):
    """Half of all (head size, type, block), in which every pair of these occurs; slow but for these (features, dtype, block).

    `experiments.benchmarks.compile_hopper` compiles them all.
    """
    cases = itertools.product(enumerate(arg_specs.COMPILED), enumerate(("bfloat16", "float16")), enumerate((64, 128)))
    return [
        pytest.param(
            dataclasses.replace(spec, dtype=dtype).with_blocks(block),
            id=f"{spec.name}, {dtype}, {block}",
            marks=() if (spec.features, dtype, block) in fast else pytest.mark.slow,
        )
        for (i, spec), (j, dtype), (k, block) in cases
        if (i + j + k) % 2 == 0
    ]


@pytest.mark.parametrize("spec", halves((80, "float16", 64), (256, "float16", 128)))
def test_attention_lowers_for_the_chip(spec):
    """Forward and both gradients; beyond 128 features those of keys and values are two kernels."""

    def run(q, k, v, mask, ids):
        rules = {"causal": True, "soft_cap": 5.0, "q_segment_ids": ids, "kv_segment_ids": ids}
        attend = functools.partial(block_sparse_attention, mask=mask, impl="mosaic_gpu")
        out, back = jax.vjp(functools.partial(attend, **(rules if spec.block_q == 64 else {})), q, k, v)
        return out, back(out)

    text = lowered(run, *spec.arrays, spec.mask(), spec.segments)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == (4 if spec.features > 128 else 3)


@pytest.mark.parametrize("spec", halves((80, "float16", 64)))
def test_masses_lower_for_the_chip(spec):
    def run(q, k, v, lse, ids):
        rules = {"causal": True, "q_segment_ids": ids, "kv_segment_ids": ids} if spec.block_q == 64 else {}
        rules |= {"block_q": spec.block_q, "block_k": spec.block_k, "impl": "mosaic_gpu"}
        return search_attention(q, k, v, **rules), block_scores(q, k, lse, **rules)

    text = lowered(run, *spec.arrays, spec.lse, spec.segments)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": jnp.float32}, "impl='xla'"),
        ({"block_q": 32}, "64 or a multiple of 128"),
        ({"block_q": 192}, "64 or a multiple of 128"),
        ({"block_k": 96}, "not a multiple of 64"),
        ({"features": 257}, "257 features"),
        ({"interpret": True}, "parameters"),
        ({}, "no NVIDIA H100"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(change, words):
    how = {"dtype": jnp.bfloat16, "block_q": 64, "block_k": 64, "features": 64, "interpret": False} | change
    x = jnp.zeros((1, 1, 384, how["features"]), how["dtype"])
    mask = BlockMask.dense(block_q=how["block_q"], block_k=how["block_k"], q_size=384, kv_size=384)
    with pytest.raises(BackendError, match=words):
        block_sparse_attention(x, x, x, mask, impl="mosaic_gpu", interpret=how["interpret"])


def test_auto_takes_the_kernels_on_a_gpu_that_has_them_and_says_once_what_it_took(monkeypatch, caplog):
    x = jnp.zeros((1, 1, 64, 64), jnp.bfloat16)
    static, asked = Static(1.0, None, 64, 64), []
    operation = dataclasses.replace(api.OPERATION, title="this", prove=asked.append)
    caplog.set_level("INFO", logger=backends.__name__)
    assert operation.choose("auto", static, x, x, x, Tokens()) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for _ in range(2):
        assert operation.choose("auto", static, x, x, x, Tokens()) == "xla"
    assert not asked
    monkeypatch.setattr(attention_mosaic_gpu, "is_hopper", lambda: True)
    for _ in range(2):
        assert operation.choose("auto", static, x, x, x, Tokens()) == "mosaic_gpu"
    assert operation.choose("mosaic_gpu", static, x, x, x, Tokens()) == "mosaic_gpu" and set(asked) == {"mosaic_gpu"}
    assert operation.choose("auto", static, *[x.astype(jnp.float32)] * 3, Tokens()) == "xla"
    said = [(r.levelname, r.getMessage().partition(", no NVIDIA")[0]) for r in caplog.records]
    assert said[:3] == [
        ("INFO", "this runs on plain XLA"),
        ("WARNING", "this runs on plain XLA: the device is cpu"),
        ("INFO", "this runs on the Hopper kernels"),
    ]
    assert len(said) == 4 and "float32" in said[3][1]


def test_a_miscompiled_kernel_is_found_on_first_use(monkeypatch):
    def gradients(*problem):
        dk, dv = xla.key_gradients(*problem)
        return dk, 1.1 * dv

    wrong = types.SimpleNamespace(forward=xla.forward, query_gradient=xla.query_gradient, key_gradients=gradients)
    monkeypatch.setattr(backends.Operation, "implementation", lambda *_: wrong)
    with pytest.raises(
        MiscompilationError, match="wrong give other dv"
    ):  # the last that is compared: the others agreed
        jax.jit(lambda: api.prove("wrong"))()  # also while a program is traced


def test_what_is_compared_is_named_where_it_differs_or_is_not_a_number():
    wanted = {"values": np.ones(3), "dq": np.arange(3.0)}
    backends.compare("mosaic_gpu", wanted, wanted)
    for other in (wanted["dq"] * 1.03, np.full(3, np.nan)):
        with pytest.raises(MiscompilationError, match="the Hopper kernels give other dq"):
            backends.compare("mosaic_gpu", wanted | {"dq": other}, wanted)
