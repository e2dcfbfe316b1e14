"""Block lists say what their dense flags say, whatever made them, and refuse what contradicts itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_attention import BlockMask, BlockMaskError
from pallas_kernels.common.block_lists import flags_compared, flags_scattered, union_lists

SIZES = {"block_q": 8, "block_k": 16, "q_size": 37, "kv_size": 100}  # 5 and 7 blocks
BLOCKS = (5, 7)


def flags(seed, density=0.4, lead=(2, 3)):
    return np.random.default_rng(seed).random((*lead, *BLOCKS)) < density


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_lists_and_their_transposes_say_what_the_flags_say(seed, density):
    active = flags(seed, density)
    mask = BlockMask.from_dense(active, width=7, **SIZES).with_transpose(5)  # fixed: every width compiles anew
    assert np.array_equal(mask.to_dense(), active)
    assert np.array_equal(mask.kv_cnt, active.sum(-1)) and np.array_equal(mask.q_cnt, active.sum(-2))
    for idx, cnt, rows in ((mask.kv_idx, mask.kv_cnt, active), (mask.q_idx, mask.q_cnt, active.swapaxes(2, 3))):
        idx, cnt = np.asarray(idx), np.asarray(cnt)
        for at in np.ndindex(cnt.shape):
            n, ids = cnt[at], idx[at]
            wanted = np.flatnonzero(rows[at])
            assert np.array_equal(ids[:n], wanted)
            assert (ids[n:] == (wanted[-1] if n else 0)).all()
    np.testing.assert_allclose(mask.density(), active.mean(), rtol=1e-6)
    assert mask.check() is mask


def test_flags_are_the_same_however_a_device_makes_them():
    mask = BlockMask.from_dense(flags(4), **SIZES)
    assert np.array_equal(mask.to_dense(), flags(4))  # by numpy
    for made in (flags_compared, flags_scattered):
        assert np.array_equal(jax.jit(made, static_argnums=0)(7, mask.kv_idx, mask.kv_cnt), flags(4))


def test_lists_are_as_wide_as_the_fullest_row():
    for active in (flags(0), flags(0, 0.0)):
        mask = BlockMask.from_dense(active, **SIZES).with_transpose()
        assert mask.width == max(active.sum(-1).max(), 1) and mask.q_idx.shape[-1] == max(active.sum(-2).max(), 1)


def test_known_masks_are_made_inside_a_traced_function():
    sizes = {"block_q": 4, "block_k": 4, "q_size": 10, "kv_size": 12}
    assert jax.jit(lambda: BlockMask.dense(**sizes).to_dense())().all()


def test_under_jit_a_flag_tells_of_blocks_that_found_no_room():
    active = np.zeros((1, 1, *BLOCKS), bool)
    active[0, 0, 2, :4] = True
    pack = jax.jit(lambda a, w: BlockMask.pack(a, w, **SIZES), static_argnums=1)
    mask, overflow = pack(active, 4)
    assert not overflow and np.array_equal(mask.to_dense(), active)
    mask, overflow = pack(active, 3)
    assert overflow and mask.width == 3 and mask.kv_cnt.max() == 3
    turned, overflow = jax.jit(lambda m: m.transposed(1))(BlockMask.from_dense(active, **SIZES))
    assert not overflow and np.array_equal(turned.q_cnt[0, 0], [1, 1, 1, 1, 0, 0, 0])
    active[0, 0, 4, 3] = True
    assert jax.jit(lambda m: m.transposed(1))(BlockMask.from_dense(active, **SIZES))[1]


def test_known_masks_stay_known_inside_a_traced_function():
    @jax.jit
    def f(x):
        mask = BlockMask.window(20, 5, **SIZES).with_transpose()
        assert mask.width == 2 + 1 and not isinstance(mask.kv_cnt, jax.core.Tracer)
        return x + mask.kv_cnt.sum() + mask.q_cnt.sum()

    assert f(0) == 2 * BlockMask.window(20, 5, **SIZES).to_dense().sum()


def test_top_k_keeps_the_best_with_counts_of_their_own():
    scores = np.random.default_rng(1).normal(size=(2, 3, *BLOCKS)).astype(np.float32)
    scores[0, 0, 0] = 1.0  # all equal: the lowest ids win
    scores[0, 0, 1, 3] = np.nan
    counts = np.array([[[1], [7], [0]], [[3], [2], [5]]])
    for mask in (
        BlockMask.top_k(jnp.asarray(scores), counts, **SIZES),
        jax.jit(lambda s, c: BlockMask.top_k(s, c, width=7, **SIZES))(scores, counts),
    ):
        dense = np.asarray(mask.to_dense())
        for b, h, p in np.ndindex(2, 3, 5):
            row = np.nan_to_num(scores[b, h, p], nan=-np.inf)
            best = np.argsort(-row, kind="stable")[: counts[b, h, 0]]
            assert set(np.flatnonzero(dense[b, h, p])) == set(best)
        assert np.array_equal(mask.kv_idx[0, 0, 0, :1], [0])
        mask.check()


def test_a_traced_mask_is_the_known_one():
    known = BlockMask.from_dense(flags(5), width=7, **SIZES).with_transpose(5)

    def traced(active):
        mask = BlockMask.pack(active, 7, **SIZES)[0]
        return mask.with_transpose(), mask.to_dense(), union_lists(mask.kv_idx, mask.kv_cnt, 7, 3)

    wanted = known, known.to_dense(), union_lists(known.kv_idx, known.kv_cnt, 7, 3)
    for a, b in zip(jax.tree.leaves(jax.jit(traced)(flags(5))), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_lists_of_neighbours_become_one_that_knows_its_owners(together):
    active = flags(3)
    mask = BlockMask.from_dense(active, **SIZES)
    idx, cnt, owners = map(np.asarray, union_lists(mask.kv_idx, mask.kv_cnt, 7, together))
    padded = np.concatenate([active, np.zeros((2, 3, -5 % together, 7), bool)], 2)
    groups = padded.reshape(2, 3, -1, together, 7)
    assert cnt.shape == groups.shape[:3]
    for at in np.ndindex(cnt.shape):
        ids = idx[at][: cnt[at]]
        assert np.array_equal(ids, np.flatnonzero(groups[at].any(0)))
        bits = owners[at][: cnt[at], None] >> np.arange(together) & 1
        assert np.array_equal(bits.T.astype(bool), groups[at][:, ids])
    union = groups.any(3).sum() * together
    np.testing.assert_allclose(mask.shared(together), active.sum() / union, rtol=1e-6)


def test_windows_cover_exactly_the_blocks_that_hold_a_pair():
    i, j = np.arange(37)[:, None], np.arange(100)[None]
    for before, after, offset in ((None, 0, 0), (None, 0, 63), (20, 5, 10), (0, 0, 0), (None, None, 0)):
        near = np.ones((37, 100), bool)
        near &= True if before is None else j - i - offset >= -before
        near &= True if after is None else j - i - offset <= after
        padded = np.zeros((40, 112), bool)
        padded[:37, :100] = near
        wanted = padded.reshape(5, 8, 7, 16).any((1, 3))
        mask = BlockMask.window(before, after, q_offset=offset, **SIZES)
        assert np.array_equal(mask.to_dense()[0, 0], wanted)
    assert np.array_equal(BlockMask.dense(**SIZES).to_dense(), np.ones((1, 1, 5, 7), bool))
    own = BlockMask.from_function(lambda b, h, p, r: (p + r + b) % 3 == h, batch=2, heads=3, **SIZES)
    b, h, p, r = np.indices((2, 3, 5, 7))
    assert np.array_equal(own.to_dense(), (p + r + b) % 3 == h)


def test_a_mask_is_a_pytree_whose_sizes_are_static():
    mask = BlockMask.from_dense(flags(0), **SIZES).with_transpose()
    assert len(jax.tree.leaves(mask)) == 4
    doubled = jax.jit(lambda m: dataclasses.replace(m, kv_cnt=m.kv_cnt * 2))(mask)
    assert doubled.block_q == 8 and np.array_equal(doubled.kv_cnt, 2 * mask.kv_cnt)
    shapes = jax.eval_shape(lambda a: BlockMask.pack(a, 4, **SIZES)[0], jax.ShapeDtypeStruct((1, 2, *BLOCKS), bool))
    assert shapes.check().kv_idx.shape == (1, 2, 5, 4)


IDX, CNT = np.zeros((1, 1, 5, 3), np.int32), np.ones((1, 1, 5), np.int32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockMask.from_dense(flags(0)[..., :6], **SIZES), "100 keys"),
        (lambda: BlockMask.from_dense(flags(0).astype(int), **SIZES), "bool"),
        (lambda: BlockMask.from_dense(flags(0, 1.0), width=6, **SIZES), "width>=7"),
        (lambda: BlockMask.from_dense(flags(0), **SIZES | {"block_q": 0}), "q_block"),
        (lambda: BlockMask.pack(flags(0), 0, **SIZES), "positive"),
        (lambda: jax.jit(lambda a: BlockMask.from_dense(a, **SIZES))(flags(0)), "pack"),
        (lambda: jax.jit(lambda m: m.with_transpose(2))(BlockMask.dense(**SIZES)), "transposed"),
        (lambda: BlockMask.dense(**SIZES).with_transpose(4), "width 4"),
        (lambda: BlockMask.from_lists(IDX.astype(np.int16), CNT, **SIZES), "int16"),
        (lambda: BlockMask.from_lists(IDX + 7, CNT, **SIZES), "7 blocks"),
        (lambda: BlockMask.from_lists(IDX - 1, CNT, **SIZES), "-1"),
        (lambda: BlockMask.from_lists(IDX, CNT * 4, **SIZES), "room for 3"),
        (lambda: BlockMask.from_lists(IDX, CNT * 2, **SIZES), "twice"),
        (lambda: BlockMask.from_lists(IDX[:, :, :4], CNT[:, :, :4], **SIZES), "do not fit"),
        (lambda: BlockMask.top_k(jnp.zeros((1, 1, *BLOCKS)), 8, **SIZES), "0 to 7"),
        (lambda: BlockMask.top_k(jnp.zeros((1, 1, 5, 6)), 2, **SIZES), "shape"),
        (lambda: jax.jit(lambda c: BlockMask.top_k(jnp.zeros((1, 1, *BLOCKS)), c, **SIZES))(3), "width"),
    ],
)
def test_contradictions_are_named(make, words):
    with pytest.raises(BlockMaskError, match=words):
        make()
    assert BlockMask.from_lists(IDX, CNT, **SIZES).width == 3  # what is right passes
