"""The base model of the experiments on decoders: one corpus, trained once, found again by everything it depends on."""

import dataclasses
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import stdlib_lm
from experiments.trained_once import cache_folder, descend
from jprune.language.perplexity import perplexity
from jprune.models.llama import Llama, llama_config

CONFIG = llama_config(vocab=256, stream=16, ffn=24, depth=1, q_heads=2, tied=True)
RECIPE = stdlib_lm.Recipe(steps=40, batch=4, tokens=24, learning_rate=1e-2, warmup=4)


@pytest.fixture(scope="module")
def corpus():
    return stdlib_lm.read_corpus()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def small(seed, cache, corpus, recipe=RECIPE, **more):
    return stdlib_lm.base_model(seed, config=CONFIG, recipe=recipe, corpus=corpus, cache=cache, progress=False, **more)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_corpus_is_python_and_its_parts_are_apart(corpus):
    assert 4e6 < len(corpus.train) <= 9e6 and 2e5 < len(corpus.valid) < 1e6
    train, valid = corpus.train.tobytes(), corpus.valid.tobytes()
    text = Path(dataclasses.__file__).read_bytes()
    assert (text in train) != (text in valid)  # a file is in one of them
    built = [p.read_bytes() for p in Path(sysconfig.get_path("stdlib")).glob("_sysconfigdata*.py")]
    assert not any(text in train + valid for text in built)  # nothing of the machine that built Python
    assert corpus.evaluation().shape == corpus.calibration(0).shape == (64, 192)
    starts = {bytes(row.astype(np.uint8)) for row in corpus.evaluation()}
    assert len(starts) == 64 and all(row in valid for row in starts)
    assert not np.array_equal(corpus.calibration(0), corpus.calibration(1))


def test_training_learns_and_happens_once(corpus, cache, monkeypatch):
    config, variables, _ = small(0, cache, corpus)
    fresh = jax.tree.map(lambda x: np.random.default_rng(0).normal(0, 0.02, x.shape).astype(np.float32), variables)
    windows = corpus.evaluation(8, 24)
    assert perplexity(Llama(config), variables, windows) < 0.5 * perplexity(Llama(config), fresh, windows)

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(stdlib_lm, "train", never)
    assert same(small(0, cache, corpus)[1], variables)
    stacked = small(0, cache, corpus, scanned=True)[1]
    assert perplexity(Llama(config, scanned=True), stacked, windows) == pytest.approx(
        perplexity(Llama(config), variables, windows), rel=1e-5
    )
    for seed, changes in ((1, {}), (0, {"clip": 0.5})):
        with pytest.raises(AssertionError, match="trained again"):
            small(seed, cache, corpus, dataclasses.replace(RECIPE, **changes))


@pytest.mark.slow
def test_nothing_but_the_arguments_matters(corpus, cache):
    assert same(small(0, cache / "again", corpus)[1], small(0, cache, corpus)[1])


@pytest.mark.slow
def test_a_loss_that_bursts_is_named(corpus, cache):
    with pytest.raises(ValueError, match=r"the loss is .* at step \d+: lower the learning rate"):
        small(0, cache / "burst", corpus, dataclasses.replace(RECIPE, learning_rate=1e30, clip=1e30))
    assert not (cache / "burst").exists()


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JPRUNE_CACHE", str(tmp_path))
    assert cache_folder("some") == tmp_path / "some"
    assert cache_folder("some", "here").name == "here"
    monkeypatch.delenv("JPRUNE_CACHE")
    assert cache_folder("some").parts[-3:] == (".cache", "jprune", "some")


def test_batches_come_in_their_order():
    """Plain descent on a parabola, and every batch is met once."""
    seen = []

    def batches():
        for k in range(3):
            seen.append(k)
            yield (np.full((1,), float(k), np.float32),)

    found, losses = descend(
        lambda v, batch: jnp.sum((v - batch[0]) ** 2), jnp.zeros(1), batches(), 3, optax.sgd(0.25), False, ""
    )
    assert seen == [0, 1, 2] and found.tolist() == [1.25]  # 0, 0.5, 1.25
    np.testing.assert_allclose(losses, [0.0, 1.0, 2.25])
