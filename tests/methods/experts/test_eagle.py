"""A trained drafter: its loss against numpy, its cache against reading everything anew, answers that stay the model's own."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import same_numbers

from jprune.methods.experts.eagle import Eagle, EagleHead, eagle_loss, logits_of, train_eagle
from jprune.methods.experts.speculative import hidden_states, speculate
from jprune.models.llama import Llama, llama_config
from jprune.models.moe import Experts

VOCAB, STEPS = 13, 12


@functools.cache
def model(tied=False):
    module = Llama(llama_config(VOCAB, 16, 8, 2, 4, kv_heads=2, experts=Experts(6), tied=tied))
    v = jax.jit(module.init)(jax.random.key(3), np.zeros((1, 4), int))
    return module, jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, v)


@functools.cache
def hidden(tied=False):
    """ids -> what the model's head reads, and the logits."""
    module, v = model(tied)
    read = jax.jit(lambda ids: hidden_states(module, v, ids)[:2])
    return lambda ids: read(jnp.asarray(ids))[::-1]


def counting(step, rows=8, tokens=12):
    """Rows that go on by a number of their own, as an answer of a real model is largely foreseeable."""
    rng = np.random.default_rng(step)
    return (rng.integers(0, VOCAB, (rows, 1)) + rng.integers(1, 3, (rows, 1)) * np.arange(tokens)) % VOCAB


@functools.cache
def trained():
    """(head, its weights, their loss before and after) for the model's own answers."""
    module, v = model()
    answers = jax.jit(functools.partial(continued, module))(v, jnp.asarray(counting(0, 48, 2)))
    found = train_eagle(
        module, v, lambda k: answers[8 * (k % 6) : 8 * (k % 6) + 8], 150, optax.adam(1e-2), width=32, noise=0.0
    )
    head = EagleHead(module.config, 32)
    first = jax.jit(head.init)(jax.random.key(0), *[jnp.zeros((1, 2, 16))] * 2)  # as the run starts
    loss = jax.jit(lambda p: eagle_loss(head, p, module, v, answers))
    return head, found.state.params, (float(loss(first)), float(loss(found.state.params)))


def continued(module, v, ids, steps=STEPS):
    def step(ids, k):
        best = jnp.argmax(module.apply(v, ids)[:, ids.shape[1] - steps + k - 1], -1)
        return ids.at[:, ids.shape[1] - steps + k].set(best), None

    return jax.lax.scan(step, jnp.pad(ids, ((0, 0), (0, steps))), jnp.arange(steps))[0]


def test_the_heads_logits_are_the_models_own():
    for tied in (False, True):
        module, v = model(tied)
        states, logits = hidden(tied)(counting(0))
        same_numbers(jax.jit(logits_of, static_argnums=0)(module.config, v, states), logits, terms=16)


def test_the_loss_is_its_definition():
    module, v = model()
    head, ids = EagleHead(module.config, 32), counting(1, 2)
    own = np.asarray(hidden()(ids)[0])
    params = jax.jit(head.init)(jax.random.key(0), own[:, :-2], own[:, :-2])
    noise = np.random.default_rng(0).normal(size=own[:, :-2].shape).astype(np.float32)
    embedded = np.asarray(v["params"]["embed"]["embedding"])[ids[:, 1:-1]]
    guessed = np.asarray(jax.jit(head.apply)(params, embedded, own[:, :-2] + noise)[0], np.float64)
    apart = np.abs(guessed - own[:, 1:-1])
    smooth = np.where(apart < 1, apart**2 / 2, apart - 0.5).mean()
    table = np.asarray(v["params"]["lm_head"]["kernel"], np.float64)
    said, right = guessed @ table, own[:, 1:-1] @ table
    log = said - said.max(-1, keepdims=True)
    log = log - np.log(np.exp(log).sum(-1, keepdims=True))
    share = np.exp(right - right.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    wanted = smooth - 0.1 * (share * log).sum(-1).mean()
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda v: eagle_loss(head, params, module, v, jnp.asarray(ids), noise))
    )(v)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    layers = jax.tree.leaves({k: g for k, g in gradient["params"].items() if k.startswith("layer")})
    assert not any(np.any(g) for g in layers)  # the model is not trained


def test_answers_stay_the_models_own_and_take_fewer_passes():
    module, v = model()
    head, params, (before, after) = trained()
    assert after < before / 2
    drafter = Eagle(module, v, head, params, size=64, chunk=4)
    taken = []
    for i in (1, 2):  # the drafter forgets one prompt before the next
        plain = speculate(module, v, counting(0)[i : i + 1, :2], STEPS, drafter=None, chunk=4)
        said = speculate(module, v, counting(0)[i : i + 1, :2], STEPS, drafter=drafter, chunk=4)
        np.testing.assert_array_equal(said.tokens, plain.tokens)
        taken.append(said.per_pass)
    assert np.mean(taken) > 1.5
    untrained = Eagle(
        module, v, head, jax.jit(head.init)(jax.random.key(1), *[jnp.zeros((1, 2, 16))] * 2), size=64, chunk=4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worse = speculate(module, v, counting(0)[2:3, :2], STEPS, drafter=untrained, chunk=4)
    np.testing.assert_array_equal(worse.tokens, plain.tokens)
    assert worse.per_pass < taken[1]
    one = speculate(
        module, v, counting(0)[1:2, :1], 3, drafter=drafter, chunk=4
    )  # nothing was seen before the first pass
    assert one.drafted[0] == 0


def test_a_chain_is_that_of_reading_everything_anew():
    """Told in parts of any size; the guesses leave no trace."""
    module, v = model()
    head, params, _ = trained()
    ids = counting(3, 1, 11)
    states = hidden()(ids)[0]
    drafter = Eagle(module, v, head, params, size=32, chunk=3)
    for start, end in ((0, 5), (5, 6), (6, 10)):
        drafter.saw(states[0, start:end], ids[0, start + 1 : end + 1])
        said = drafter(ids[0, : end + 1], 3)
    table = v["params"]["embed"]["embedding"]

    @jax.jit
    def whole(tokens, states):  # padded: what comes later is not seen
        out = head.apply(params, table[tokens], states)[0]
        return out, jnp.argmax(logits_of(module.config, v, out), -1)

    tokens, read = np.pad(ids[:, 1:11], ((0, 0), (0, 3))), np.pad(states[:, :10], ((0, 0), (0, 3), (0, 0)))
    for k in range(9, 12):
        out, best = (np.asarray(x) for x in whole(tokens, read))
        tokens[0, k + 1], read[0, k + 1] = best[0, k], out[0, k]
        if k == 9:
            same_numbers(drafter._last[0, 0], out[0, 9], terms=64)
    assert said.tolist() == tokens[0, 10:].tolist()


def test_a_run_goes_on_with_the_same_bits_and_wrong_ones_are_named(tmp_path):
    module, v = model()
    whole = train_eagle(module, v, counting, 4, out=tmp_path / "whole").state.params
    train_eagle(module, v, counting, 4, out=tmp_path / "parts", save_every=2)
    again = train_eagle(module, v, counting, 4, out=tmp_path / "parts", resume=True).state.params
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), whole, again))
    with pytest.raises(ValueError, match="rows have 2 tokens"):
        train_eagle(module, v, lambda k: counting(k, tokens=2), 4)
    drafter = Eagle(module, v, EagleHead(module.config, 64), whole, size=4)
    with pytest.raises(ValueError, match="room for 4 tokens"):
        drafter.saw(jnp.zeros((5, 16)), np.zeros(5, int))
