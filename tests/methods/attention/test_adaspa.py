"""AdaSpa's state machine: the schedule, what each action computes against float64, and a whole sampler with a DiT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.methods.attention import patterns
from jprune.methods.attention.adaspa import (
    Action,
    action_for_step,
    adaspa_attention,
    attention_of,
    init_state,
    sample,
    segments,
)
from jprune.methods.attention.adaspa_select import AdaSpaConfig, keep_counts, kept_flags, spans
from jprune.models.dit import DiTBlock, DiTConfig, VideoDiT
from jprune.models.samplers import RectifiedFlow
from jprune.models.samplers import sample as plain_sample

TEXT_LAST = AdaSpaConfig(0.6, 8, text_start=59, text_len=9, min_tokens=0)
TEXT_FIRST = AdaSpaConfig(0.6, 8, text_start=0, text_len=9, min_tokens=0)
TOKENS = 68


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def problem(seed=0, sharp=2.0):
    q, k, v = (normal(seed + i, 2, 4, TOKENS, 8) for i in range(3))
    return sharp * q, k, v


def attended(q, k, v, flags=None, valid=None):
    """Softmax attention over the flagged pairs of tokens, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if flags is not None:
        logits = np.where(flags, logits, -np.inf)
    if valid is not None:
        logits = np.where(np.asarray(valid)[:, None, None], logits, -np.inf)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", w / w.sum(-1, keepdims=True), v)


def pairs(state, config):
    """Which pairs of tokens a state lets attend, text rows all."""
    at = spans(TOKENS, config)
    flags = np.ones((2, 4, at.blocks, at.blocks), bool)
    flags[:, :, at.first : at.last] = kept_flags(state.chosen, config, TOKENS)
    return np.repeat(np.repeat(flags, config.block, 2), config.block, 3)[:, :, :TOKENS, :TOKENS]


def test_the_schedule():
    config = AdaSpaConfig()
    assert segments(50, config) == [
        (Action.DENSE, 0, 9), (Action.FUSED, 9, 10), (Action.SPARSE, 10, 29), (Action.RESEARCH, 29, 30),
        (Action.SPARSE, 30, 50)]  # fmt: skip
    early = AdaSpaConfig(search_steps=(0, 29))
    assert [a for a, *_ in segments(50, early)] == [Action.FUSED, Action.SPARSE, Action.RESEARCH, Action.SPARSE]
    every = AdaSpaConfig(search_steps=(1, 2, 3))
    assert [action_for_step(i, every) for i in range(5)] == [
        Action.DENSE, Action.FUSED, Action.RESEARCH, Action.RESEARCH, Action.SPARSE]  # fmt: skip
    assert segments(5, every)[2] == (Action.RESEARCH, 2, 4)


@pytest.mark.parametrize(
    "config", [TEXT_LAST, TEXT_FIRST, AdaSpaConfig(0.5, 16, min_tokens=0)], ids=["last", "first", "none"]
)
def test_every_action_against_float64(config):
    q, k, v = problem()
    act = jax.jit(adaspa_attention, static_argnums=(4, 5))
    state = init_state(2, 4, TOKENS, config)
    out, same = act(q, k, v, state, Action.DENSE, config)
    np.testing.assert_allclose(out, attended(q, k, v), atol=2e-5)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True))
    out, state = act(q, k, v, state, Action.FUSED, config)
    np.testing.assert_allclose(out, attended(q, k, v), atol=2e-5)
    at, counts = spans(TOKENS, config), keep_counts(spans(TOKENS, config).video, config.sparsity)
    assert state.chosen.ids.dtype == jnp.int16 and state.chosen.ids.shape == (2, 4, at.video, counts.need)
    assert state.chosen.count.sum(-1).tolist() == [4 * counts.base] * 2
    flags = pairs(state, config)
    assert not flags.all()
    out, after = act(q, k, v, state, Action.SPARSE, config)
    np.testing.assert_allclose(out, attended(q, k, v, flags), atol=2e-5)
    assert np.abs(np.asarray(out) - attended(q, k, v)).max() > 1e-2
    q, k = k, q  # another step's
    out, found = act(q, k, v, after, Action.RESEARCH, config)
    np.testing.assert_allclose(out, attended(q, k, v, pairs(found, config)), atol=2e-5)
    assert (pairs(found, config) != flags).any()


@pytest.mark.parametrize("config", [TEXT_LAST, AdaSpaConfig.paper(**{"block": 8, "min_tokens": 0})])
def test_searching_again_with_the_same_tokens_finds_the_same_blocks(config):
    q, k, v = problem()
    _, first = adaspa_attention(q, k, v, init_state(2, 4, TOKENS, config), Action.FUSED, config)
    assert (first.lse is None) == (config.research == "exact")
    _, again = adaspa_attention(q, k, v, first, Action.RESEARCH, config)
    np.testing.assert_array_equal(pairs(again, config), pairs(first, config))


def test_one_pass_and_two_find_the_same():
    q, k, v = problem(3)
    one, two = TEXT_LAST, AdaSpaConfig.paper(sparsity=0.6, block=8, text_start=59, text_len=9, min_tokens=0)
    a, b = (adaspa_attention(q, k, v, init_state(2, 4, TOKENS, c), Action.FUSED, c)[1] for c in (one, two))
    np.testing.assert_array_equal(pairs(a, one), pairs(b, two))


def test_without_sparsity_it_is_dense():
    config = AdaSpaConfig(0.0, 8, text_start=59, text_len=9, min_tokens=0)
    q, k, v = problem()
    _, state = adaspa_attention(q, k, v, init_state(2, 4, TOKENS, config), Action.FUSED, config)
    out, _ = adaspa_attention(q, k, v, state, Action.SPARSE, config)
    np.testing.assert_allclose(out, attended(q, k, v), atol=2e-5)


@pytest.mark.parametrize("config", [TEXT_LAST, TEXT_FIRST])
def test_padding_is_never_attended_to_and_carries_no_mass(config):
    q, k, v = problem()
    valid = np.ones((2, TOKENS), bool)
    text = np.arange(config.text_start, config.text_start + config.text_len)
    valid[0, text[-4:]] = False
    noise = k.at[:, :, text[-4:]].set(jnp.where(valid[:, text[-4:]][:, None, :, None], k[:, :, text[-4:]], 50.0))
    states = []
    for keys in (k, noise):
        out, state = adaspa_attention(
            q, keys, v, init_state(2, 4, TOKENS, config), Action.FUSED, config, jnp.asarray(valid)
        )
        np.testing.assert_allclose(out, attended(q, k, v, valid=valid), atol=2e-5)
        out, _ = adaspa_attention(q, keys, v, state, Action.SPARSE, config, jnp.asarray(valid))
        np.testing.assert_allclose(out, attended(q, k, v, pairs(state, config), valid), atol=2e-5)
        states.append(pairs(state, config))
    np.testing.assert_array_equal(*states)


def test_batch_elements_do_not_see_each_other_and_heads_are_interchangeable():
    q, k, v = problem()
    run = functools.partial(adaspa_attention, action=Action.FUSED, config=TEXT_LAST)
    _, state = run(q, k, v, init_state(2, 4, TOKENS, TEXT_LAST))
    _, other = run(q.at[1].add(1.0), k, v, init_state(2, 4, TOKENS, TEXT_LAST))
    np.testing.assert_array_equal(state.chosen.ids[0], other.chosen.ids[0])
    order = jnp.array([2, 0, 3, 1])
    _, turned = run(q[:, order], k[:, order], v[:, order], init_state(2, 4, TOKENS, TEXT_LAST))
    np.testing.assert_array_equal(turned.chosen.count, state.chosen.count[:, order])


def test_short_sequences_and_chosen_layers_stay_dense():
    q, k, v = problem()
    short = AdaSpaConfig(0.6, 8, min_tokens=TOKENS + 1)
    out, _ = adaspa_attention(q, k, v, init_state(2, 4, TOKENS, short), Action.SPARSE, short)
    np.testing.assert_allclose(out, attended(q, k, v), atol=2e-5)
    config = AdaSpaConfig(0.6, 8, min_tokens=0, dense_layers=(1,))
    hook, state = attention_of(Action.SPARSE, config), init_state(2, 4, TOKENS, config)
    np.testing.assert_allclose(hook(1, q, k, v, None, state)[0], attended(q, k, v), atol=2e-5)
    assert np.abs(np.asarray(hook(0, q, k, v, None, state)[0]) - attended(q, k, v)).max() > 1e-2


@functools.cache
def small_dit():
    blocks = (DiTBlock("double", 2, 6, 24), DiTBlock("single", 2, 6, 24))
    module = VideoDiT(DiTConfig(12, (1, 2, 2), 1, 5, blocks, (1, 1, 1), frequencies=8, gain=3.0))
    video, text = normal(0, 2, 4, 8, 8, 1), normal(1, 2, 4, 5)
    v = jax.jit(module.init)(jax.random.key(0), video, jnp.ones(2), text)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return module, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), v), video, text


def predictor(hook):
    module, v, _, text = small_dit()

    def predict(x, t, states):
        return module.apply(v, x, jnp.full(2, t), text, None, hook, states)

    return predict


@pytest.mark.slow
def test_a_sampler_with_a_transformer():
    """Dense steps, a search, sparse steps: with sparsity 0 the dense sample, with sparsity near it."""
    _, _, video, _ = small_dit()
    sampler = RectifiedFlow(8)
    found = {}
    for sparsity in (0.0, 0.5):
        config = AdaSpaConfig(sparsity, 8, (2, 5), text_start=64, text_len=4, min_tokens=0)
        states = (init_state(2, 2, 68, config),) * 2
        found[sparsity], after = jax.jit(
            lambda x, s, c=config: sample(lambda a: predictor(attention_of(a, c)), x, sampler, s, c)
        )(video, states)
        assert [s.chosen.count.sum(-1).tolist() for s in after] == [[2 * keep_counts(8, sparsity).base] * 2] * 2
    dense, _ = plain_sample(predictor(lambda i, q, k, v, valid, s: (jnp.asarray(attended_jax(q, k, v)), s)), video,
                            sampler, (0, 0))  # fmt: skip
    np.testing.assert_allclose(found[0.0], dense, atol=1e-4)
    apart = float(jnp.abs(found[0.5] - dense).max() / jnp.abs(dense).max())
    assert 1e-4 < apart < 0.5
    with pytest.raises(ValueError, match="step 9 of 8"):
        sample(lambda a: predictor(attention_of(a, AdaSpaConfig())), video, sampler, (), AdaSpaConfig())


def attended_jax(q, k, v):
    w = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) / jnp.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", w, v)


# -- what it is compared with ------------------------------------------------------------------------------------------


def test_rankings_against_plain_loops():
    q, k, _ = problem()
    config, n = TEXT_LAST, 9
    near = patterns.window(q, k, config)
    assert near[0, 0, 3].tolist() == [-3, -2, -1, 0, -1, -2, -3, -4, -5]
    pooled = patterns.mean_pool(q, k, config)
    means = [np.stack([np.asarray(x)[:, :, 8 * i : 8 * i + 8].mean(2) for i in range(8)], 2) for x in (q, k)]
    np.testing.assert_allclose(pooled[:, :, :8, :8], np.einsum("bhpd,bhrd->bhpr", *means), atol=1e-5)
    last = np.asarray(patterns.last_queries(16)(q, k, config))
    rows = range(40, 56)  # 7 blocks of video alone
    logits = np.einsum("bhqd,bhkd->bhqk", np.asarray(q)[:, :, 40:56], np.asarray(k)) / np.sqrt(8)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    column, diagonal = np.zeros((2, 4, n)), {}
    for i, row in enumerate(rows):
        for j in range(TOKENS):
            column[:, :, j // 8] += w[:, :, i, j]
            at = j // 8 - row // 8
            diagonal[at] = diagonal.get(at, 0) + w[:, :, i, j]
    for p in range(n):
        for r in range(n):
            np.testing.assert_allclose(last[:, :, p, r], column[:, :, r] + diagonal.get(r - p, 0), atol=1e-4)


@pytest.mark.parametrize(
    "ranking", [patterns.window, patterns.mean_pool, patterns.last_queries(8), patterns.chance(jax.random.key(0))]
)
def test_patterns_keep_as_many_blocks(ranking):
    q, k, v = problem()
    hook = patterns.attention_of(ranking, Action.SPARSE, TEXT_LAST)
    start = init_state(2, 4, TOKENS, TEXT_LAST)
    out, state = hook(0, q, k, v, None, start)
    np.testing.assert_allclose(out, attended(q, k, v, pairs(state, TEXT_LAST)), atol=2e-5)
    at = spans(TOKENS, TEXT_LAST)
    video = at.last * TEXT_LAST.block
    np.testing.assert_allclose(out[:, :, video:], attended(q, k, v)[:, :, video:], atol=2e-5)
    # keys that a row keeps have weight: as many as the budget and the sinks together
    seen, _ = hook(0, q, k, jnp.broadcast_to(jnp.eye(TOKENS), (2, 4, TOKENS, TOKENS)), None, start)
    blocks = np.add.reduceat(np.asarray(seen)[:, :, 0] > 0, range(0, TOKENS, 8), axis=-1) > 0
    assert (blocks.sum(-1) == keep_counts(at.video, 0.6).base + at.sinks).all()
    dense, _ = patterns.attention_of(ranking, Action.DENSE, TEXT_LAST)(0, q, k, v, None, start)
    np.testing.assert_allclose(dense, attended(q, k, v), atol=2e-5)
