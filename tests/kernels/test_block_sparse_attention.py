"""Every implementation against float64 numpy, closed forms, and what must not matter: order, padding, unvisited blocks.

One program per implementation holds all token rules, so that examples with other lengths, offsets and segments compile nothing.
"""

import dataclasses
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

from pallas_kernels.block_sparse_attention import (
    AttentionError,
    BackendError,
    BlockMask,
    DerivativeError,
    KernelConfig,
    block_sparse_attention,
)

B, H, G, LQ, LK, D, E = 2, 4, 2, 45, 70, 12, 20
SIZES = {"block_q": 16, "block_k": 16, "q_size": LQ, "kv_size": LK}
NQ, NK = 3, 5
# name: impl and its options; "steps" walks lists two blocks at a time, for four query blocks at once
WAYS = {
    "reference": {"impl": "reference"},
    "xla": {"impl": "xla"},
    "xla steps": {"impl": "xla", "config": KernelConfig(step_tokens=32, rows_at_once=4)},
    "tpu": {"impl": "tpu", "config": KernelConfig(step_tokens=32), "interpret": True},
    "tpu wide": {
        "impl": "tpu",
        "config": KernelConfig(step_tokens=32, blocks_together=2, resident=True),
        "interpret": True,
    },
}
TPU_SLOWLY = pytest.param("tpu", marks=pytest.mark.slow)  # "wide" has all of it and more, and runs always
SPARSE = ["xla", pytest.param("xla steps", marks=pytest.mark.slow), TPU_SLOWLY]


def arrays(seed, spread=1.0, heads=(H, G, G)):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, h, n, d)).astype(np.float32) for h, n, d in zip(heads, (LQ, LK, LK), (D, D, E)))
    return q * spread, k, v


def flags(seed, density=0.4):
    return np.random.default_rng([7, seed]).random((B, H, NQ, NK)) < density


def packed(active):
    """Lists of one width whatever the flags, so that nothing compiles anew."""
    mask, _ = BlockMask.pack(active, NK, **SIZES)
    return mask.transposed(NQ)[0]


@functools.cache
def program(way, rules):
    """Jitted (q, k, v, mask, token rules, cotangents) -> (out, lse, (dq, dk, dv)); with all rules or with none."""

    def run(q, k, v, mask, tokens, dout, dlse):
        options = WAYS[way] | ({"causal": True, "soft_cap": 4.0, **tokens} if rules else {})
        (out, lse), back = jax.vjp(
            lambda *a: block_sparse_attention(*a, mask, return_lse=True, scale=0.4, **options), q, k, v
        )
        return out, lse, back((dout, dlse))

    return jax.jit(run, compiler_options=QUICK)  # other entries of `tokens`, other rules: compiled anew


def rules_of(seed, segments=2):
    rng = np.random.default_rng([3, seed])
    return {
        "q_offset": rng.integers(-20, 60, B).astype(np.int32),
        "q_len": rng.integers(0, LQ + 1, B).astype(np.int32),
        "kv_len": rng.integers(0, LK + 1, B).astype(np.int32),
        "q_segment_ids": np.sort(rng.integers(0, segments, (B, LQ)), 1).astype(np.int32),
        "kv_segment_ids": np.sort(rng.integers(0, segments, (B, LK)), 1).astype(np.int32),
    }


NO_RULE = {
    "q_offset": np.full(B, LK, np.int32), "q_len": np.full(B, LQ, np.int32), "kv_len": np.full(B, LK, np.int32),
    "q_segment_ids": np.zeros((B, LQ), np.int32), "kv_segment_ids": np.zeros((B, LK), np.int32),
}  # fmt: skip


def pairs(active, tokens):
    return allowed(active, 16, 16, LQ, LK, offset=tokens["q_offset"], q_len=tokens["q_len"], kv_len=tokens["kv_len"],
                   q_seg=tokens["q_segment_ids"], kv_seg=tokens["kv_segment_ids"])  # fmt: skip


def cotangents(seed):
    rng = np.random.default_rng([11, seed])
    return rng.normal(size=(B, H, LQ, E)).astype(np.float32), rng.normal(size=(B, H, LQ)).astype(np.float32)


def agree(way, active, tokens, seed, q=None, k=None, v=None):
    """Compare one problem with the definition, gradients included; returns what the implementation gave."""
    q, k, v = (given if given is not None else x for given, x in zip((q, k, v), arrays(seed)))
    dout, dlse = cotangents(seed)
    got = program(way, tokens is not None)(q, k, v, packed(active), tokens or {}, dout, dlse)
    ok = pairs(active, NO_RULE | (tokens or {}))
    cap = 4.0 if tokens is not None else None
    out, lse, grads = attention(q, k, v, ok, scale=0.4, cap=cap, dout=dout, dlse=dlse)
    same(got[0], out, 2e-5)
    same(got[1], lse, 2e-5)
    for ours, wanted in zip(got[2], grads):
        same(ours, wanted, 1e-4)
    return got, ok


@pytest.mark.parametrize("way", [pytest.param("reference", marks=pytest.mark.slow), *SPARSE])
def test_values_and_gradients_without_rules(way):
    active = flags(0)
    active[0, 1, 2], active[1, 0] = False, True
    got, _ = agree(way, active, None, 0)
    assert np.isneginf(got[1][0, 1, 32:]).all() and not np.asarray(got[0])[0, 1, 32:].any()


@pytest.mark.parametrize("way", ["reference", "xla", "xla steps", TPU_SLOWLY, "tpu wide"])
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), density=st.floats(0, 1), segments=st.integers(1, 3))
def test_values_and_gradients_under_all_rules(way, seed, density, segments):
    active, tokens = flags(seed, density), rules_of(seed, segments)
    (out, lse, grads), ok = agree(way, active, tokens, seed)
    dead = ~ok.any(-1)  # rows without a key, keys without a row
    assert not np.asarray(out)[dead].any() and np.isneginf(np.asarray(lse)[dead]).all()
    assert not np.asarray(grads[0])[dead].any()
    unseen = ~ok.reshape(B, G, H // G, LQ, LK).any((2, 3))
    assert not np.asarray(grads[1])[unseen].any() and not np.asarray(grads[2])[unseen].any()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tpu", "tpu wide"])
@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), density=st.floats(0.6, 1))
def test_steps_whose_pairs_all_count_and_others(way, seed, density):
    tokens = {n: x for n, x in rules_of(seed).items() if n in ("q_offset", "kv_len")}  # segments mask every step
    agree(way, flags(seed, density), tokens, seed)


@pytest.mark.parametrize("way", ["xla", "xla steps", "tpu wide"])
def test_every_fill_of_the_last_block(way):
    for fill in range(1, 17):
        tokens = NO_RULE | {"kv_len": np.array([64 + fill if fill <= 6 else 48 + fill, 16 + fill], np.int32)}
        agree(way, flags(fill, 0.6), tokens, fill)


@pytest.mark.parametrize("way", ["reference", "xla", "xla steps", TPU_SLOWLY, "tpu wide"])
def test_what_lies_where_nobody_looks_reaches_nothing(way):
    active = flags(5)
    active[:, :, :, 2] = False  # a key block that no query visits,
    active[:, :, 1] = False  # and a query block that visits none
    tokens = NO_RULE | {"kv_len": np.array([67, 64], np.int32), "q_len": np.array([45, 40], np.int32)}
    tokens["q_segment_ids"] = np.where(np.arange(LQ) == 5, 9, np.zeros((B, 1), np.int32)).astype(np.int32)
    q, k, v = arrays(5)
    plain = program(way, True)(q, k, v, packed(active), tokens, *cotangents(5))
    for x in (k, v):
        x[:, :, 32:48] = np.nan
        x[0, :, 67:], x[1, :, 64:] = np.nan, np.inf
    q[1, :, 40:] = np.nan
    dout, dlse = cotangents(5)
    dout[1, :, 40:], dlse[1, :, 40:], dout[:, :, 16:32], dlse[:, :, 16:32] = np.nan, np.nan, np.inf, np.nan
    dout[:, :, 5], dlse[:, :, 5] = np.nan, np.inf  # a query of a visited block that no key answers
    if way != "reference":  # automatic derivatives multiply such cotangents with zeros
        planted = program(way, True)(q, k, v, packed(active), tokens, dout, dlse)
    else:
        planted = program(way, True)(q, k, v, packed(active), tokens, *cotangents(5))
    for a, b in zip(jax.tree.leaves(planted), jax.tree.leaves(plain)):
        assert np.array_equal(a, b)  # and not-a-number equals nothing


@pytest.mark.parametrize("way", SPARSE)
def test_order_of_lists_and_padding_do_not_matter(way):
    active, (q, k, v) = flags(6), arrays(6)
    mask = packed(active)
    rng = np.random.default_rng(0)

    def shuffled(idx, cnt, junk):
        idx = np.array(idx)
        for at in np.ndindex(cnt.shape):
            n = int(cnt[at])
            idx[at][:n] = rng.permutation(idx[at][:n])
            idx[at][n:] = junk
        return jnp.asarray(idx)

    plain = program(way, False)(q, k, v, mask, {}, *cotangents(6))
    again = program(way, False)(q, k, v, mask, {}, *cotangents(6))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        assert np.array_equal(a, b)
    k[:, :, 32:48] = v[:, :, 32:48] = np.nan  # only the queries that visit this block may notice
    unvisited = ~active[:, :, :, 2]
    for junk in (2, -1, 10**6):
        other = dataclasses.replace(mask, kv_idx=shuffled(mask.kv_idx, mask.kv_cnt, junk),
                                    q_idx=shuffled(mask.q_idx, mask.q_cnt, 1))  # fmt: skip
        out, lse, (dq, *_) = program(way, False)(q, k, v, other, {}, *cotangents(6))
        for a, b in zip((out, lse, dq), (plain[0], plain[1], plain[2][0])):
            rows = np.repeat(unvisited, 16, 2)[:, :, :LQ]
            same(np.asarray(a)[rows], np.asarray(b)[rows], 1e-5)
            assert np.isnan(np.asarray(a)[~rows]).any() or not (~rows).any()


@pytest.mark.parametrize("way", SPARSE)
def test_two_disjoint_masks_combine_to_their_union(way):
    active, part, (q, k, v) = flags(8, 0.7), flags(9, 0.5), arrays(8)
    run, seeds = program(way, False), cotangents(8)
    (o1, l1, _), (o2, l2, _), (o, l, _) = (
        run(q, k, v, packed(a), {}, *seeds) for a in (active & part, active & ~part, active)
    )
    both = np.logaddexp(l1, l2)
    same(l, both, 2e-5)
    share = [np.where(np.isneginf(both), 0, np.exp(np.asarray(x) - both))[..., None] for x in (l1, l2)]
    same(o, share[0] * o1 + share[1] * o2, 2e-5)


@pytest.mark.parametrize("way", SPARSE)
def test_closed_forms(way):
    run, zero = program(way, False), cotangents(0)
    q, k, v = arrays(1)
    active = flags(1, 0.5)
    ok = pairs(active, NO_RULE)
    visible = ok.sum(-1)
    out, lse, _ = run(0 * q, k, v, packed(active), {}, *zero)  # no query: the mean of what is seen
    means = np.einsum("bhij,bhjd->bhid", ok / np.maximum(visible, 1)[..., None], np.repeat(v, H // G, 1))
    same(out, means, 2e-5)
    same(lse, np.log(visible, where=visible > 0, out=np.full(visible.shape, -np.inf)), 2e-5)
    for sign in (1, -1):  # huge logits: the best key alone
        big = 1e4 * sign
        q1, k1 = np.zeros_like(q), np.zeros_like(k)
        q1[..., 0], k1[..., 0] = big / 0.4, np.linspace(-1, 1, LK)
        out, lse, grads = run(q1, k1, v, packed(np.ones_like(active)), {}, *zero)
        winner = LK - 1 if sign > 0 else 0
        same(out, np.broadcast_to(np.repeat(v, H // G, 1)[:, :, winner : winner + 1], out.shape), 2e-5)
        assert all(np.isfinite(x).all() for x in (lse, *grads))


@pytest.mark.parametrize("way", ["xla", TPU_SLOWLY])
def test_shared_key_heads_are_repeated_key_heads(way):
    active, (q, k, v) = flags(2), arrays(2)
    run, seeds = program(way, False), cotangents(2)
    out, lse, (dq, dk, dv) = run(q, k, v, packed(active), {}, *seeds)
    many = run(q, np.repeat(k, H // G, 1), np.repeat(v, H // G, 1), packed(active), {}, *seeds)
    for a, b in zip((out, lse, dq), (many[0], many[1], many[2][0])):
        same(a, b, 1e-6)
    for a, b in zip((dk, dv), many[2][1:]):
        same(a, np.asarray(b).reshape(B, G, H // G, LK, -1).sum(2), 1e-5)


@pytest.mark.parametrize("way", ["xla", TPU_SLOWLY])
def test_bfloat16_is_summed_in_float32(way):
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(3))
    active = flags(3, 0.7)
    dout, dlse = cotangents(3)
    out, lse, grads = program(way, False)(q, k, v, packed(active), {}, dout.astype(jnp.bfloat16), dlse)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.bfloat16.dtype}
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    ok = pairs(active, NO_RULE)
    rounded = np.asarray(dout.astype(jnp.bfloat16), np.float64)
    wanted = attention(*exact, ok, scale=0.4, dout=rounded, dlse=np.asarray(dlse))

    @jax.jit
    def plain(q, k, v):  # what a softmax in bfloat16 loses
        s = jnp.einsum("bhid,bhjd->bhij", q, jnp.repeat(k, H // G, 1)) * jnp.bfloat16(0.4)
        w = jnp.where(ok.any(-1, keepdims=True), jax.nn.softmax(jnp.where(ok, s, -jnp.inf), -1), 0)
        return jnp.einsum("bhij,bhjd->bhid", w, jnp.repeat(v, H // G, 1))

    worst = np.nanmax(np.abs(np.asarray(plain(q, k, v), np.float64) - wanted[0]))
    same(out, wanted[0], 2 * worst + 1e-3)
    same(lse, wanted[1], 1e-3)
    for ours, true in zip(grads, wanted[2]):
        assert np.linalg.norm(np.asarray(ours, np.float64) - true) <= 2e-2 * np.linalg.norm(true)


def test_masks_shared_by_batch_or_heads_and_lists_without_transposes():
    active = flags(4)[:1, :1]
    few = BlockMask.from_dense(active, **SIZES)
    dout, dlse = cotangents(4)
    out, _, grads = program("xla", False)(*arrays(4), few, {}, dout, dlse)
    everywhere = np.broadcast_to(active, (B, H, NQ, NK))
    wanted = attention(*arrays(4), pairs(everywhere, NO_RULE), scale=0.4, dout=dout, dlse=dlse)
    same(out, wanted[0], 2e-5)
    for a, b in zip(grads, wanted[2]):
        same(a, b, 1e-4)


def test_layouts_default_scale_and_the_automatic_choice():
    q, k, v = arrays(4)
    mask = BlockMask.window(20, 10, **SIZES)
    flipped = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, flipped):
        plain = block_sparse_attention(*arrays, mask, return_lse=True)
        named = block_sparse_attention(*arrays, mask, impl="xla")  # no TPU here
        return *plain, *block_sparse_attention(*flipped, mask, layout="blhd", return_lse=True), named

    plain, lse, out, lse2, named = run((q, k, v), flipped)
    same_numbers(out.transpose(0, 2, 1, 3), plain, terms=LK)
    same_numbers(lse, lse2, terms=LK)
    active = np.broadcast_to(mask.to_dense(), (B, H, NQ, NK))
    same(plain, attention(q, k, v, pairs(active, NO_RULE))[0], 2e-5)
    assert np.array_equal(plain, named)


def test_second_derivatives_are_refused_but_the_reference_has_them():
    q, k, v = (x[:1, :2, :32, :4] for x in arrays(4))
    mask = BlockMask.dense(block_q=16, block_k=16, q_size=32, kv_size=32)

    def slope(x, way):
        return jax.grad(lambda y: (block_sparse_attention(y, k, v, mask, **WAYS[way]) ** 2).sum())(x)

    for way in ("xla", "tpu"):
        with pytest.raises(DerivativeError, match="first derivatives only"):
            jax.eval_shape(jax.grad(lambda x, way=way: slope(x, way).sum()), q)
    u = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def slope_and_curvature(x):
        return jax.jvp(lambda y: slope(y, "reference"), (x,), (u,))

    ahead, behind = (slope_and_curvature(q + step * u)[0] for step in (1e-2, -1e-2))
    same(slope_and_curvature(q)[1], (ahead - behind) / 2e-2, 2e-3)


def test_work_follows_the_lists():
    """The programs' multiplications, as XLA counts one turn of each loop: fewer with narrower lists, never all pairs."""
    shape = jax.ShapeDtypeStruct((1, 1, 2048, 16), jnp.float32)
    sizes = {"block_q": 32, "block_k": 32, "q_size": 2048, "kv_size": 2048}

    def flops(width):
        masks = jax.eval_shape(
            lambda a: BlockMask.pack(a, width, **sizes)[0], jax.ShapeDtypeStruct((1, 1, 64, 64), bool)
        )
        program = jax.jit(lambda *a: block_sparse_attention(*a, impl="xla")).lower(shape, shape, shape, masks)
        return program.compile().cost_analysis()["flops"]

    assert flops(8) < 0.2 * flops(64) and flops(8) * 64 < 0.2 * 4 * 2048**2 * 16


MASK = BlockMask.dense(**SIZES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": np.zeros((B, H, LQ + 1, D), np.float32)}, "the mask is of 45 and 70"),
        ({"q": np.zeros((B, 3, LQ, D), np.float32)}, "share"),
        ({"q": np.zeros((B, H, LQ, D + 1), np.float32)}, "do not fit"),
        ({"q": np.zeros((B, H, LQ, D), np.float16)}, "float16"),
        ({"q": np.zeros((H, LQ, D), np.float32)}, "four axes"),
        ({"mask": packed(flags(0)[:, :3])}, "either equal or 1"),
        ({"impl": "cuda"}, "cuda"),
        ({"layout": "hbld"}, "hbld"),
        ({"kv_len": np.zeros(3, np.int32)}, "kv_len"),
        ({"q_len": 3.5}, "q_len"),
        ({"impl": "tpu"}, "no TPU"),
        ({"impl": "tpu", "interpret": True, "mask": BlockMask.dense(**SIZES | {"block_k": 8})}, "multiple of 16"),
        ({"q_segment_ids": np.zeros((B, LQ), np.int32)}, "come together"),
        (
            {"q_segment_ids": np.zeros((B, 3), np.int32), "kv_segment_ids": np.zeros((B, LK), np.int32)},
            "wanted integers",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, words):
    q, k, v = arrays(0)
    arguments = {"q": q, "k": k, "v": v, "mask": MASK} | change
    error = BackendError if "impl" in change else AttentionError
    with pytest.raises(error, match=words):
        block_sparse_attention(**arguments)
    assert jax.eval_shape(block_sparse_attention, q, k, v, MASK).shape == (B, H, LQ, E)  # what is right passes


@pytest.mark.parametrize("wrong", [{"blocks_together": 0}, {"blocks_together": 17}, {"step_tokens": 0}])
def test_configurations_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KernelConfig(**wrong)
