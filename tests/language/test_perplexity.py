"""Perplexity is what numpy computes in float64; speeds are tokens divided by the median time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import tiny, weights

from jprune.language.perplexity import Runs, next_token_loss, perplexity, speed, speeds, window_losses
from jprune.models.decoding import generate
from jprune.models.llama import Llama

CONFIG = tiny()


@functools.cache
def model():
    return Llama(CONFIG), weights(CONFIG)


def ids(n, t, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, (n, t)).astype(np.int32)


def reference(logits, tokens):
    """Mean next-token loss of every window, by loops in float64."""
    out = []
    for row, own in zip(np.asarray(logits, np.float64), tokens):
        losses = []
        for t in range(len(own) - 1):
            z = row[t] - row[t].max()
            losses.append(np.log(np.exp(z).sum()) - z[own[t + 1]])
        out.append(np.mean(losses))
    return np.array(out)


def test_losses_and_perplexity_are_those_of_float64():
    module, variables = model()
    tokens = ids(5, 9)
    want = reference(jax.jit(module.apply)(variables, tokens), tokens)
    assert np.ptp(want) > 0.1
    for batch_size in (2, 5, 64):  # also with a last batch that is not full
        np.testing.assert_allclose(window_losses(module, variables, tokens, batch_size), want, rtol=2e-6)
    assert perplexity(module.apply, variables, tokens, 2) == pytest.approx(np.exp(want.mean()), rel=2e-6)


def test_closed_forms():
    uniform = jnp.zeros((3, 4, 7))
    tokens = np.arange(12).reshape(3, 4) % 7
    np.testing.assert_allclose(next_token_loss(uniform, jnp.asarray(tokens)), np.log(7), rtol=1e-6)
    # the first token is never asked for, the last logits are never used
    sure = np.zeros((1, 3, 7), np.float32)
    sure[0, 0, 2], sure[0, 1, 5], sure[0, 2] = 50, 50, np.nan
    np.testing.assert_allclose(next_token_loss(jnp.asarray(sure), jnp.asarray([[0, 2, 5]])), 0, atol=1e-6)
    # windows weigh the same
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 7)), jnp.float32)
    losses = window_losses(lookup, table, tokens)
    assert perplexity(lookup, table, tokens) == pytest.approx(float(np.exp(np.float64(losses).mean())), rel=1e-7)


def lookup(table, ids):
    return table[ids]


def test_bfloat16_logits_are_summed_in_float32():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 5000, (2, 65)).astype(np.int32)
    low = jnp.asarray(rng.normal(size=(2, 65, 5000)), jnp.bfloat16)
    want = reference(low.astype(jnp.float32), tokens)
    np.testing.assert_allclose(window_losses(given, low, tokens), want, rtol=1e-5)


def given(logits, ids):
    return logits


def test_the_sizes_that_cannot_be_are_named():
    module, variables = model()
    with pytest.raises(ValueError, match="2 windows of 1 tokens"):
        perplexity(module, variables, ids(2, 1))
    with pytest.raises(ValueError, match="0 at a time"):
        perplexity(module, variables, ids(2, 3), 0)
    with pytest.raises(ValueError, match="steps 0"):
        speed(module, variables, steps=0)
    with pytest.raises(ValueError, match="rounds is 0"):
        speed(module, variables, prompt=4, steps=2, rounds=0)


def test_what_is_timed_is_generation():
    module, variables = model()
    run = Runs(module, variables, 2, 5, 6)
    token, cache = run.prefill()
    assert run.tokens == {"prefill": 10, "decode": 12} and int(cache.length) == 5
    want = np.asarray(generate(module, variables, run._ids, 7))[:, 5:]
    np.testing.assert_array_equal(token, want[:, 0])
    np.testing.assert_array_equal(run.decode(), want[:, 1:].T)
    np.testing.assert_array_equal(run.decode(), want[:, 1:].T)  # the cache is not used up


def test_speeds_are_tokens_over_medians():
    module, variables = model()
    # a clock whose every interval is known: prefill and decoding of one warm-up and three rounds
    seconds = [9, 9, 1, 4, 7, 2, 2, 3]
    ticks = itertools.chain.from_iterable((0, s) for s in seconds)
    ticks = iter([t for k, t in enumerate(ticks) if k >= 4 or k in (0, 2)])  # the warm-up's end is not asked for
    got = speed(module, variables, batch=2, prompt=5, steps=6, rounds=3, clock=lambda: next(ticks))
    assert got == (10 / 2, 12 / 3)


def test_rounds_of_several_models_take_turns():
    models = {"a": model(), "b": model()}
    # warm-up: four beginnings; then two rounds of: prefill of a, of b, decoding of a, of b; the machine slows down fivefold
    seconds = [1, 2, 3, 4, 5, 10, 15, 20]
    ticks = iter([0] * 4 + [t for s in seconds for t in (0, s)])
    got = speeds(models, batch=1, prompt=6, steps=4, rounds=2, clock=lambda: next(ticks))
    assert got == {"a": (6 / 3, 4 / 9), "b": (6 / 6, 4 / 12)}
