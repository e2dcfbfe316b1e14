"""Tuning adapters: the loss, agreement with a plain AdamW on merged weights, masks, keys, and runs that go on to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import normal

import jprune
from jprune.language.finetune import next_token, recover
from jprune.language.lora import LoraConfig, init, merge
from jprune.training import TuningConfig

CONFIG = LoraConfig(rank=2, alpha=4.0)
PARAMS = {"e": normal(0, 11, 6) * 3, "w": normal(1, 6, 8), "v": normal(2, 8, 11)}


def bigrams(p, ids):
    """A language model of one token's memory."""
    return jnp.tanh(p["e"][ids] @ p["w"]) @ p["v"]


@functools.cache
def traced():
    return jprune.trace(bigrams, PARAMS, jnp.zeros((2, 5), jnp.int32))


def batches(step):
    ids = np.random.default_rng(step).integers(0, 11, (4, 5))
    ids[:, 1::2] = (ids[:, ::2] * 3 + 1)[:, :2] % 11  # half of the tokens follow from the one before
    return jnp.asarray(ids, jnp.int32)


def fresh():
    return init(jax.random.key(7), traced(), CONFIG, ["w", "v"])


def test_the_loss_counts_what_the_mask_says():
    ids = batches(0)
    logits = np.asarray(bigrams(PARAMS, ids), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p[:, :-1], np.asarray(ids)[:, 1:, None], -1)[..., 0])
    loss = jax.jit(next_token(traced()))
    lora = fresh()
    assert loss(PARAMS, lora, {}, ids, None) == pytest.approx(nats.mean(), rel=1e-6)
    mask = np.arange(20).reshape(4, 5) % 3 > 0
    want = (nats * mask[:, 1:]).sum() / mask[:, 1:].sum()
    assert loss(PARAMS, lora, {}, (ids, jnp.asarray(mask)), None) == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match="a batch has 3 arrays"):
        loss(PARAMS, lora, {}, (ids, ids, ids), None)


def test_recovery_is_adamw_on_merged_weights():
    """Against optax's own AdamW and clipping, differentiating the merged weights, in one batch at a time."""
    tuning = TuningConfig(5, 0.02, "cosine", clip=0.5, weight_decay=0.1, accumulate=2)
    graph = traced()
    got, losses = recover(graph, PARAMS, batches, tuning, config=CONFIG, lora=fresh())
    rates = tuning.rates
    descent = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(lambda t: jnp.asarray(rates)[t], weight_decay=0.1)
    )
    lora = fresh()
    state = descent.init(lora)

    @jax.jit
    def step(lora, state, ids):
        def loss(f):
            logits = bigrams(merge(graph, PARAMS, f), ids)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = descent.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    for t in range(5):
        lora, state, value = step(lora, state, batches(t))
        assert losses[t] == pytest.approx(float(value), rel=1e-4)
    for t, f in lora.items():
        for k in f:
            np.testing.assert_allclose(got[t][k], f[k], atol=2e-4)
    long, losses = recover(graph, PARAMS, batches, TuningConfig(60, 0.05), config=CONFIG, lora=fresh())
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert next_token(graph)(PARAMS, long, {}, batches(99), None) < 0.85 * next_token(graph)(
        PARAMS, fresh(), {}, batches(99), None
    )


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    tuning = TuningConfig(6, 0.02)
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.2)
    run = functools.partial(recover, traced(), PARAMS, config=config, save_every=2)
    want, losses = run(batches, tuning, lora=fresh())

    def dies(step):
        if step == 5:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        run(dies, tuning, lora=fresh(), out=tmp_path)
    got, rest = run(batches, tuning, lora=fresh(), out=tmp_path, resume=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert rest == losses[-2:]
    with pytest.raises(ValueError, match="holds a run, up to step 6"):
        run(batches, tuning, lora=fresh(), out=tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        run(batches, TuningConfig(6, 0.03), lora=fresh(), out=tmp_path, resume=True)


def test_masked_units_and_broken_losses():
    """With everything masked nothing can be learned by w; a loss that is not finite stops the run."""
    graph = traced()
    (group,) = [g for g in graph.groups if g.startswith("w:")]
    masks = {group: np.zeros(8)}
    lora, _ = recover(graph, PARAMS, batches, TuningConfig(2, 0.1), config=CONFIG, lora=fresh(), masks=masks)
    np.testing.assert_array_equal(lora["w"]["b"], fresh()["w"]["b"])
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        recover(graph, {**PARAMS, "v": PARAMS["v"] * jnp.nan}, batches, TuningConfig(2), config=CONFIG, lora=fresh())


def test_every_step_and_micro_batch_has_its_own_key():
    def noise(params, lora, masks, batch, key):
        return jax.random.uniform(key) + 0 * jnp.sum(lora["w"]["b"])

    _, losses = recover(traced(), PARAMS, batches, TuningConfig(3), config=CONFIG, lora=fresh(), loss=noise)
    _, halves = recover(
        traced(), PARAMS, batches, TuningConfig(3, accumulate=2), config=CONFIG, lora=fresh(), loss=noise
    )
    assert len({*losses, *halves}) == 6
