"""AdaSpa's choice of blocks: counts, tiers, sinks and top blocks against closed forms and a plain numpy search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.methods.attention.adaspa_select import (
    AdaSpaConfig,
    block_mask,
    keep_counts,
    kept_flags,
    recall_of,
    select_blocks,
    spans,
    tiers,
)


def test_counts_in_closed_form():
    assert keep_counts(64, 0.8) == (13, 6, 20)
    assert keep_counts(8, 0.25) == (6, 4, 8)
    assert keep_counts(11, 0.7) == (3, 2, 4)
    assert keep_counts(8, 0.0) == (8, 8, 8)
    assert keep_counts(5, 0.99) == (1, 1, 1)


def test_tiers_are_strict_clamped_and_ordered():
    recall = jnp.array([[0.95, 0.81, 0.80, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.9, 0.9, 0.9, 0.9]])
    assert tiers(recall, 0.8).tolist() == [[1, 0, -1, -1, 1], [0] * 5, [1, 1, 0, -1, -1]]


def test_a_block_with_any_text_is_a_sink():
    late = AdaSpaConfig(block=8, text_start=100, text_len=9)
    assert spans(109, late) == (0, 12, 14) and (spans(109, late).video, spans(109, late).sinks) == (12, 2)
    early = AdaSpaConfig(block=8, text_start=0, text_len=9)
    assert spans(109, early) == (2, 14, 14)
    assert spans(64, AdaSpaConfig(block=8)) == (0, 8, 8)
    with pytest.raises(ValueError, match="at the start or at the end"):
        spans(120, late)
    with pytest.raises(ValueError, match="no block of video"):
        spans(16, AdaSpaConfig(block=8, text_start=4, text_len=12))


def by_loops(masses, config, tokens):
    """Flags, recalls and tiers with plain loops, float64."""
    at, counts = spans(tokens, config), keep_counts(spans(tokens, config).video, config.sparsity)
    batch, heads = masses.shape[:2]
    video = range(at.first, at.last)

    def flags_of(b, h, count):
        out = np.zeros((at.video, at.blocks), bool)
        for i, p in enumerate(video):
            row = sorted(video, key=lambda r: (-masses[b, h, p, r], r))
            out[i, row[:count]] = True
            out[i, [r for r in range(at.blocks) if r not in video]] = True
        return out

    def recall_of(b, h, flags):
        rows = masses[b, h, at.first : at.last]
        return (rows * flags).sum() / rows.sum()

    all_flags, recalls, levels = [], np.zeros((batch, heads)), np.zeros((batch, heads), int)
    for b in range(batch):
        usual = [recall_of(b, h, flags_of(b, h, counts.base)) for h in range(heads)]
        level = [0] * heads
        if config.head_adaptive != "off":
            many = min(sum(r > config.recall_threshold for r in usual), heads // 2)
            order = sorted(range(heads), key=lambda h: (-usual[h], h))
            for h in order[:many]:
                level[h] = 1
            for h in order[heads - many :]:
                level[h] = -1
        number = {0: counts.base, 1: counts.spare, -1: counts.need}
        if config.head_adaptive == "guarded":
            now = sum(recall_of(b, h, flags_of(b, h, number[level[h]])) for h in range(heads))
            level = level if now > sum(usual) else [0] * heads
        for h in range(heads):
            flags = flags_of(b, h, number[level[h]])
            all_flags.append(flags)
            recalls[b, h], levels[b, h] = recall_of(b, h, flags), level[h]
    return np.reshape(all_flags, (batch, heads, at.video, at.blocks)), recalls, levels


@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["paper", "guarded", "off"]),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.8]),
    text=st.sampled_from([(0, 0), (0, 5), (0, 8), (34, 6), (32, 8)]),
)
@settings(max_examples=15, deadline=None)
def test_against_plain_loops(seed, mode, sparsity, text):
    rng = np.random.default_rng(seed)
    config = AdaSpaConfig(sparsity, 4, head_adaptive=mode, text_start=text[0], text_len=text[1], recall_threshold=0.6)
    masses = rng.gamma(rng.uniform(0.8, 3, (2, 5, 1, 1)), size=(2, 5, 10, 10))
    masses[:, :, :, :3] = np.round(masses[:, :, :, :3])  # ties
    masses = masses.astype(np.float32).astype(np.float64)
    found = jax.jit(select_blocks, static_argnums=(1, 2))(jnp.asarray(masses, jnp.float32), config, 40)
    flags, recall, level = by_loops(masses, config, 40)
    np.testing.assert_allclose(found.recall, recall, rtol=1e-5)
    again = recall_of(jnp.asarray(masses, jnp.float32), found.chosen, config, 40)
    np.testing.assert_allclose(again, recall, rtol=1e-5)
    if sparsity:  # without it all heads recall everything, to rounding
        np.testing.assert_array_equal(found.tier, level)
    np.testing.assert_array_equal(kept_flags(found.chosen, config, 40), flags)


def test_uniform_attention_keeps_the_lowest_blocks():
    """q = 0: every block has the mass block^2 / tokens, all tie, recall is the fraction of kept blocks."""
    config = AdaSpaConfig(0.7, 8, head_adaptive="off", text_start=88, text_len=8)
    found = select_blocks(jnp.full((1, 1, 12, 12), 8 * 8 / 96), config, 96)
    assert kept_flags(found.chosen, config, 96)[0, 0, 0].tolist() == [True] * 3 + [False] * 8 + [True]
    assert found.recall[0, 0] == pytest.approx(4 / 12)


def test_the_budget_is_kept_over_heads_and_lists_are_valid():
    config = AdaSpaConfig(0.8, 4, text_start=120, text_len=8)
    masses = jax.random.gamma(jax.random.key(0), 0.2, (2, 8, 32, 32))
    found = select_blocks(masses, config, 128)
    assert found.chosen.count.sum(-1).tolist() == [8 * 6] * 2
    mask = block_mask(found.chosen, config, 128).check()
    assert (mask.q_size, mask.kv_size, mask.width) == (120, 128, keep_counts(30, 0.8).need + 2)
    assert bool((jnp.diff(mask.kv_idx, axis=-1) >= 0).all())


def test_what_is_refused():
    for settings_, what in (({"sparsity": 1.0}, "sparsity"), ({"search_steps": (3, 3)}, "search_steps"),
                            ({"search_steps": ()}, "search_steps"), ({"recall_threshold": 1.0}, "recall_threshold")):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            AdaSpaConfig(**settings_)
    with pytest.raises(ValueError, match="have 16"):
        select_blocks(jnp.ones((1, 1, 8, 8)), AdaSpaConfig(block=8), 128)
    assert AdaSpaConfig.paper(sparsity=0.9).research == "cached"
