"""The cache: any division of a text into passes gives the logits of one pass; generation is repeated prediction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FAMILIES, prompt, tiny, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.models.decoding import generate, new_cache
from jprune.models.llama import Llama, LlamaConfig, stack_layers


@functools.cache
def ready(family, scanned=False):
    """(module, variables, ids, mask, logits in one pass)."""
    c = tiny(family)
    module, v = Llama(c, scanned), weights(c, scanned=scanned)
    ids, mask = prompt()
    return module, v, ids, mask, np.asarray(jax.jit(module.apply)(v, ids, mask))


QUICK = {("qwen2", False), ("qwen2", True), ("qwen3", False), ("mistral", True)}


@pytest.mark.parametrize(
    ("family", "scanned"),
    [
        (f, s) if (f, s) in QUICK else pytest.param(f, s, marks=pytest.mark.slow)
        for f in FAMILIES
        for s in (False, True)
    ],
)
def test_prefill_and_steps_give_the_logits_of_one_pass(family, scanned):
    module, v, ids, mask, want = ready(family, scanned)
    step = jax.jit(module.apply)
    cache = new_cache(module, 2, 12)
    logits, cache = step(v, ids[:, :4], mask[:, :4], cache)
    got = [logits]
    for t in range(4, ids.shape[1]):
        logits, cache = step(v, ids[:, t : t + 1], mask[:, t : t + 1], cache)
        got.append(logits)
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(np.concatenate(got, 1)[real], want[real], atol=2e-4)
    assert int(cache.length) == ids.shape[1] and step._cache_size() == 2  # the steps share one compilation


@functools.cache
def compiled(module):
    """Compiled once per length of a pass."""
    return jax.jit(module.apply)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([1, 2, 4]), min_size=9, max_size=9))
def test_any_division_into_passes(sizes):
    module, v, ids, mask, want = ready("qwen2")
    cache, got, lo = new_cache(module, 2, 9 + 3), [], 0
    while lo < ids.shape[1]:
        hi = lo + sizes.pop()
        hi = hi if hi <= ids.shape[1] else lo + 1
        logits, cache = compiled(module)(v, ids[:, lo:hi], mask[:, lo:hi], cache)
        got.append(logits)
        lo = hi
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(np.concatenate(got, 1)[real], want[real], atol=2e-4)


def greedy(module, v, ids, mask, steps):
    """One whole pass per token, over a buffer whose end is masked."""
    n = ids.shape[1]
    ids, mask = (np.pad(x, [(0, 0), (0, steps)]) for x in (ids, mask))
    for t in range(n, n + steps):
        ids[:, t] = np.argmax(compiled(module)(v, ids, mask)[:, t - 1], -1)
        mask[:, t] = 1
    return ids


@pytest.mark.parametrize(("family", "scanned"), [("llama3", True), ("mistral", False)])
def test_greedy_generation(family, scanned):
    module, v, ids, mask, _ = ready(family, scanned)
    want = greedy(module, v, ids, mask, 5)
    np.testing.assert_array_equal(generate(module, v, ids, 5, mask=mask), want)
    assert len(set(want[:, -5:].ravel())) > 2  # not one token repeated


def test_layers_of_different_widths_decode():
    c = LlamaConfig(50, 32, (16, 48), (4, 3), (2, 1), 8, value_dim=(4, 8))
    module, v = Llama(c), weights(c)
    ids, mask = prompt()
    np.testing.assert_array_equal(generate(module, v, ids, 4, mask=mask), greedy(module, v, ids, mask, 4))
    assert [k.shape for k in new_cache(module, 2, 5).k] == [(2, 5, 2, 8), (2, 5, 1, 8)]
    assert [x.shape for x in new_cache(module, 2, 5).v] == [(2, 5, 2, 4), (2, 5, 1, 8)]


def test_sampling_follows_the_logits_and_the_key():
    module, v, ids, _, logits = ready("llama")
    rows = 1000
    many = jnp.broadcast_to(ids[:1, :3], (rows, 3))
    drawn = np.asarray(generate(module, v, many, 1, temperature=2.0, key=jax.random.key(1)))[:, -1]
    want = np.asarray(jax.nn.softmax(logits[0, 2] / 2.0))
    found = np.bincount(drawn, minlength=50) / rows
    assert np.abs(found - want).max() < 0.06
    again = generate(module, v, many[:2], 6, temperature=1.0, key=jax.random.key(2))
    np.testing.assert_array_equal(again, generate(module, v, many[:2], 6, temperature=1.0, key=jax.random.key(2)))
    assert (again != generate(module, v, many[:2], 6, temperature=1.0, key=jax.random.key(3))).any()
    cold = generate(module, v, ids, 5, temperature=1e-4, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate(module, v, ids, 5))


def test_rows_stop_one_by_one():
    module, v, ids, mask, _ = ready("llama")
    free = np.asarray(generate(module, v, ids, 6, mask=mask))[:, -6:]
    stop = int(free[0, 2])
    first = [list(r).index(stop) if stop in r else 6 for r in free]
    assert first[0] <= 2 and first[0] != first[1]
    stopped = np.asarray(generate(module, v, ids, 6, mask=mask, stop=stop))[:, -6:]
    for row, whole, n in zip(stopped, free, first, strict=True):
        np.testing.assert_array_equal(row[:n], whole[:n])
        assert (row[n:] == stop).all()


def test_the_cache_keeps_the_dtype_of_the_weights():
    c = tiny("llama", dtype="bfloat16")
    v = stack_layers(weights(c))
    cache = new_cache(Llama(c, scanned=True), 1, 4)
    assert cache.k.dtype == jnp.bfloat16 and cache.k.shape == (3, 1, 4, 2, 8)
    logits, after = jax.jit(Llama(c, scanned=True).apply)(v, prompt()[0][:1, :3], None, cache)
    assert logits.dtype == jnp.float32 and after.v.dtype == jnp.bfloat16


def test_what_is_refused():
    module, v, ids, mask, _ = ready("llama")
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8"):
        module.apply(v, ids, None, new_cache(module, 2, 8))
    with pytest.raises(ValueError, match="pad prompts on the left"):
        generate(module, v, ids, 2, mask=mask[:, ::-1])
    with pytest.raises(ValueError, match="needs a key"):
        generate(module, v, ids, 2, temperature=0.7)
    with pytest.raises(ValueError, match="at least one"):
        generate(module, v, ids, 0)
