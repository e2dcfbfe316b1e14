"""Masses of blocks against float64 numpy, with exact, stale and missing log-sum-exps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed, attention, same
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import same_numbers
from quick import QUICK

from pallas_kernels.block_score import block_scores, search_attention, tpu_search
from pallas_kernels.block_sparse_attention import AttentionError, DerivativeError, KernelConfig

B, H, G, LQ, LK, D, E, BQ, BK = 2, 4, 2, 45, 90, 12, 20, 16, 16
NQ, NK = 3, 6
WAYS = {
    "reference": {"impl": "reference"},
    "xla": {"impl": "xla"},
    "xla tiles": {"impl": "xla", "config": KernelConfig(step_tokens=48)},
    "tpu": {"impl": "tpu", "config": KernelConfig(step_tokens=32, passes=1), "interpret": True},
    "tpu, two passes": {"impl": "tpu", "config": KernelConfig(step_tokens=32, passes=2), "interpret": True},
}
SLOWLY = [
    pytest.param(way, marks=pytest.mark.slow) for way in ("xla tiles", "tpu, two passes")
]  # parts of what runs anyway
QUICKLY = [way for way in WAYS if way not in ("xla tiles", "tpu, two passes")]
BLOCKS = {"block_q": BQ, "block_k": BK}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in ((B, H, LQ, D), (B, G, LK, D), (B, G, LK, E))]


def rules_of(seed):
    rng = np.random.default_rng([3, seed])
    return {
        "q_offset": rng.integers(-20, 90, B).astype(np.int32),
        "q_len": rng.integers(0, LQ + 1, B).astype(np.int32),
        "kv_len": rng.integers(0, LK + 1, B).astype(np.int32),
        "q_segment_ids": np.sort(rng.integers(0, 2, (B, LQ)), 1).astype(np.int32),
        "kv_segment_ids": np.sort(rng.integers(0, 2, (B, LK)), 1).astype(np.int32),
    }


@functools.cache
def program(way, rules):
    """Jitted (q, k, v, lse, rules) -> (what a search gives, masses without and with a log-sum-exp)."""

    def run(q, k, v, lse, tokens):
        options = BLOCKS | WAYS[way] | ({"causal": True, "soft_cap": 4.0, **tokens} if rules else {})
        return (
            *search_attention(q, k, v, **options),
            block_scores(q, k, **options),
            block_scores(q, k, lse, **options),
        )

    return jax.jit(run, compiler_options=QUICK)


def sums(weights):
    padded = np.zeros((B, H, NQ * BQ, NK * BK))
    padded[:, :, :LQ, :LK] = weights
    return padded.reshape(B, H, NQ, BQ, NK, BK).sum((3, 5))


def pairs(t):
    every = np.ones((B, H, NQ, NK), bool)
    if not t:
        return allowed(every, BQ, BK, LQ, LK)
    return allowed(every, BQ, BK, LQ, LK, offset=t["q_offset"], q_len=t["q_len"], kv_len=t["kv_len"],
                   q_seg=t["q_segment_ids"], kv_seg=t["kv_segment_ids"])  # fmt: skip


def agree(way, tokens, seed):
    q, k, v = arrays(seed)
    ok = pairs(tokens)
    out, lse, weights = attention(q, k, v, ok, cap=4.0 if tokens else None)
    stale = (np.nan_to_num(lse, neginf=0) + np.random.default_rng(seed).normal(size=lse.shape)).astype(np.float32)
    got = program(way, bool(tokens))(q, k, v, stale, tokens)
    same(got[0], out, 2e-5)
    same(got[1], lse, 2e-5)
    same(got[2], sums(weights), 1e-4)
    same(got[3], sums(weights), 1e-4)
    factor = np.where(np.isneginf(lse), 0, np.exp(np.nan_to_num(lse, neginf=0) - stale))
    same(got[4], sums(weights * factor[..., None]), 5e-4)
    same(got[3].sum(-1), np.pad(ok.any(-1), ((0, 0), (0, 0), (0, NQ * BQ - LQ))).reshape(B, H, NQ, BQ).sum(-1), 1e-4)
    return got


@pytest.mark.parametrize(
    "way",
    [pytest.param("reference", marks=pytest.mark.slow), "xla", pytest.param("tpu", marks=pytest.mark.slow), *SLOWLY],
)
def test_masses_are_sums_of_weights(way):
    agree(way, {}, 0)


@pytest.mark.parametrize("way", [*QUICKLY, *SLOWLY])
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_masses_under_all_rules(way, seed):
    agree(way, rules_of(seed), seed)


@pytest.mark.parametrize("way", [*QUICKLY, *SLOWLY])
def test_what_lies_behind_the_lengths_reaches_nothing(way):
    tokens = rules_of(1) | {"q_len": np.array([40, 45], np.int32), "kv_len": np.array([90, 50], np.int32)}
    q, k, v = arrays(1)
    lse = np.zeros((B, H, LQ), np.float32)
    plain = program(way, True)(q, k, v, lse, tokens)
    q[0, :, 40:], k[1, :, 50:], v[1, :, 50:], lse[0, :, 40:] = np.nan, np.nan, np.inf, np.nan
    for a, b in zip(program(way, True)(q, k, v, lse, tokens), plain):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("queries", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_several_tiles_of_keys(queries, monkeypatch):
    monkeypatch.setattr(tpu_search, "TILE", 128)
    rng = np.random.default_rng(queries)
    q, k, v = (rng.normal(size=(1, 1, n, 8)).astype(np.float32) for n in (queries, 300, 300))
    rules = BLOCKS | {"causal": True, "q_offset": 70}  # the last tiles are seen by few or by nobody
    ways = rules | {
        "impl": "tpu",
        "interpret": True,
        "config": KernelConfig(passes=1, step_tokens=256),
    }  # in two halves

    def ours(q, k, v):
        out, lse, masses = search_attention(q, k, v, **ways)
        return out, lse, masses, block_scores(q, k, lse, **ways)

    nq, nk = -(-queries // BQ), -(-300 // BK)
    ok = allowed(np.ones((1, 1, nq, nk), bool), BQ, BK, queries, 300, offset=[70])
    out, lse, weights = attention(q, k, v, ok)
    weights = np.pad(weights, ((0, 0), (0, 0), (0, nq * BQ - queries), (0, nk * BK - 300)))
    masses = weights.reshape(1, 1, nq, BQ, nk, BK).sum((3, 5))
    for a, b in zip(jax.jit(ours, compiler_options=QUICK)(q, k, v), (out, lse, masses, masses)):
        same(a, b, 2e-5)


def test_one_block_holds_every_query_and_masses_survive_huge_logits():
    q, k, _ = (x[:, :G, :32] for x in arrays(2))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k):
        return block_scores(q, k, block_q=32, block_k=32, impl="xla"), block_scores(1e3 * q, k, impl="xla", **BLOCKS)

    whole, spread = run(q, k)
    same(whole, np.full((B, G, 1, 1), 32.0), 1e-4)
    same(spread.sum(-1), np.full((B, G, 2), 16.0), 1e-4)


def test_bfloat16_masses_are_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays(3))
    out, lse, masses, again, _ = program("xla", False)(q, k, v, np.zeros((B, H, LQ), np.float32), {})
    assert (out.dtype, lse.dtype, masses.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    weights = attention(*(np.asarray(x, np.float64) for x in (q, k, v)), pairs({}))[2]
    same(masses, sums(weights), 1e-3)
    same(again, sums(weights), 1e-3)


def test_other_layouts_and_refusals():
    q, k, v = arrays(4)
    flipped = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, flipped):
        return search_attention(*arrays, **BLOCKS), search_attention(*flipped, layout="blhd", **BLOCKS)

    (out, lse, masses), (out2, lse2, masses2) = run((q, k, v), flipped)
    for a, b in ((out, out2.transpose(0, 2, 1, 3)), (lse, lse2), (masses, masses2)):
        same_numbers(a, b, terms=LK)
    with pytest.raises(AttentionError, match="lse"):
        block_scores(q, k, lse[:, :2], **BLOCKS)
    with pytest.raises(AttentionError, match="share"):
        block_scores(q[:, :3], k, **BLOCKS)
    for f in (lambda x: block_scores(x, k, **BLOCKS).sum(), lambda x: search_attention(x, k, v, **BLOCKS)[0].sum()):
        with pytest.raises(DerivativeError, match="stop_gradient"):
            jax.grad(f)(q)
