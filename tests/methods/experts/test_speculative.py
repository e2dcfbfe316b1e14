"""Speculative decoding gives the tokens of decoding one by one, whatever the drafter does, and leaves no trace of errors."""

import functools
import warnings

import jax
import numpy as np
import pytest

from jprune.methods.experts import speculative
from jprune.methods.experts.speculative import bytes_of, gain, gain_of_bytes, ngram, speculate
from jprune.models.decoding import generate
from jprune.models.llama import Llama, llama_config, stack_layers
from jprune.models.moe import Experts

VOCAB, STEPS = 13, 21
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, (1, n)) for i, n in enumerate((1, 6, 6))]


@functools.cache
def model(experts=True):
    config = llama_config(VOCAB, 16, 8, 2, 4, kv_heads=2, experts=Experts(6) if experts else None)
    v = jax.jit(Llama(config).init)(jax.random.key(3), np.zeros((1, 4), int))
    return Llama(config), jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, v)


@functools.cache
def one_by_one(i, experts=True):
    return speculate(*model(experts), PROMPTS[i], STEPS, drafter=None).tokens


def chance(tokens, count):
    return np.random.default_rng(len(tokens)).integers(0, VOCAB, count)


@pytest.mark.parametrize("i", range(len(PROMPTS)))
@pytest.mark.parametrize("drafter", [ngram, chance])
def test_the_answer_is_that_of_decoding_one_by_one(i, drafter):
    said = speculate(*model(), PROMPTS[i], STEPS, drafter=drafter)
    np.testing.assert_array_equal(said.tokens, one_by_one(i))
    assert sum(said.accepted) == STEPS and len(said.tokens) == PROMPTS[i].shape[1] + STEPS
    assert all(1 <= a <= d + 1 for a, d in zip(said.accepted, said.drafted, strict=True))
    np.testing.assert_array_equal(
        generate(*model(), PROMPTS[i], STEPS)[0], said.tokens
    )  # another program, no near ties


def test_without_experts_and_with_stacked_layers_too():
    module, v = model(experts=False)
    said = speculate(module, v, PROMPTS[1], STEPS)
    np.testing.assert_array_equal(said.tokens, one_by_one(1, experts=False))
    assert said.used == []
    module, v = model()
    stacked = speculate(Llama(module.config, scanned=True), stack_layers(v), PROMPTS[1], STEPS)
    np.testing.assert_array_equal(stacked.tokens, one_by_one(1))
    assert stacked.used[0].shape == (2,)


def test_a_perfect_drafter_fills_every_pass_and_a_wrong_one_none():
    answer = one_by_one(1)

    def perfect(tokens, count):
        return answer[len(tokens) : len(tokens) + count]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = speculate(*model(), PROMPTS[1], STEPS, drafter=perfect, chunk=8)
    assert said.accepted == [8, 8, 5] and said.per_pass == 7
    with pytest.warns(UserWarning, match="cannot pay here: a pass gives 1.00 tokens"):
        wrong = speculate(*model(), PROMPTS[1], STEPS, drafter=lambda t, n: (perfect(t, n) + 1) % VOCAB)
    assert wrong.predicted < 1 < said.predicted
    assert set(wrong.accepted) == {1} and wrong.drafted[0] == 7
    np.testing.assert_array_equal(wrong.tokens, answer)
    for row, alone in zip(wrong.used, wrong.used_by_one, strict=True):
        assert (row >= alone).all()


def test_wrong_guesses_leave_no_trace_in_the_cache(monkeypatch):
    """Bit for bit the cache of decoding one by one, up to its length; nothing behind is valid."""
    caches = {}
    real = speculative.cut_cache

    def kept(cache, length):
        out = real(cache, length)
        caches[int(length)] = out
        return out

    monkeypatch.setattr(speculative, "cut_cache", kept)
    one = {}
    for drafter, store in ((None, one), (chance, None)):
        caches.clear()
        speculate(*model(), PROMPTS[1], STEPS, drafter=drafter)
        if store is not None:
            store |= caches
    assert len(caches) > 5
    for length, cache in caches.items():
        for name in ("k", "v"):
            for a, b in zip(getattr(cache, name), getattr(one[length], name), strict=True):
                np.testing.assert_array_equal(a[:, :length], b[:, :length])
        assert int(cache.valid.sum()) == length == int(cache.length)


def test_it_ends_at_the_stop_token_in_the_middle_of_a_pass():
    answer = one_by_one(2)
    new = answer[6:]
    stop = int(new[4])
    first = int(np.flatnonzero(new == stop)[0])
    said = speculate(*model(), PROMPTS[2], STEPS, stop=stop, drafter=lambda t, n: answer[len(t) : len(t) + n])
    np.testing.assert_array_equal(said.tokens, answer[: 6 + first + 1])


def test_the_drafter_by_hand():
    assert ngram(np.array([5, 6, 7, 5, 6, 8, 5, 6]), 2).tolist() == [8, 5]  # the latest occurrence
    assert ngram(np.array([1, 2, 3]), 2).tolist() == [] and ngram(np.array([4]), 2).tolist() == []
    assert ngram(np.array([1, 1]), 3).tolist() == [1]
    assert gain(2.0, 1.0, 4.0) == 0.5


@pytest.mark.parametrize(
    ("more", "why"),
    [({"temperature": 0.7}, "sample with jprune.models.decoding.generate"), ({"ids": np.zeros((2, 3), int)}, "one row"),
     ({"steps": 0}, "at least 1"), ({"drafter": lambda t, n: [VOCAB]}, "vocabulary of 13"),
     ({"drafter": lambda t, n: [0] * (n + 1)}, "at most 7")],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(more, why):
    asked = {"ids": PROMPTS[1], "steps": 9, **more}
    with pytest.raises(ValueError, match=why):
        speculate(*model(), asked.pop("ids"), asked.pop("steps"), **asked)


def test_what_a_pass_reads():
    """By hand: 6 experts of two layers, 16 x 8 up and down, in float32; the head but not the table of tokens."""
    _, v = model()
    always, experts = bytes_of(v)
    assert experts == 4 * 2 * 6 * 2 * 16 * 8
    everything = 4 * sum(x.size for x in jax.tree.leaves(v))
    assert always == everything - experts - 4 * VOCAB * 16
    tied = {"params": {k: w for k, w in v["params"].items() if k != "lm_head"}}
    assert bytes_of(tied) == (always, experts)  # the table is the head, of the same size
    assert gain_of_bytes(3.0, always, 0) == 3.0
    assert gain_of_bytes(2.0, 0, experts, [0.5, 0.7], [0.2, 0.4]) == pytest.approx(1.0)
