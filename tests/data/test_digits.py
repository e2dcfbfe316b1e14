"""The digits: the real data, split by seed, standardised by the training part."""

import numpy as np
import pytest
from sklearn import datasets

from jprune.data import load_digits

EVERYTHING = np.arange(1797)


def test_shapes_and_names():
    digits = load_digits(3)
    assert (len(digits.train), len(digits.test)) == (1200, 597)
    assert digits.num_classes == 10 and digits.image_shape == (8, 8, 1) and "seed=3" in digits.name
    batch = digits.train.read(np.arange(5))
    assert batch["image"].shape == (5, 8, 8, 1) and batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32


def test_the_splits_are_the_whole_data_once():
    digits, raw = load_digits(0), datasets.load_digits()
    images = np.concatenate([digits.train.images, digits.test.images]).reshape(1797, 64)
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    ours = sorted(map(tuple, np.column_stack([images, labels])))
    assert ours == sorted(map(tuple, np.column_stack([np.float32(raw.data), raw.target])))


def test_training_pixels_are_standardised_and_noise_has_its_deviation():
    train = load_digits(1, noise=0.3).train
    clean = train.read(EVERYTHING[:1200])["image"]
    np.testing.assert_allclose([clean.mean(), clean.std()], [0, 1], atol=1e-4)
    drawn = train.draw(EVERYTHING[:1200], np.random.default_rng(0))["image"]
    np.testing.assert_allclose([(drawn - clean).mean(), (drawn - clean).std()], [0, 0.3], atol=5e-3)


def test_the_seed_decides_the_split():
    a, b, c = load_digits(0), load_digits(0), load_digits(1)
    np.testing.assert_array_equal(a.train.images, b.train.images)
    assert not np.array_equal(a.train.images, c.train.images)


@pytest.mark.parametrize("options", [dict(n_train=0), dict(n_train=1797), dict(noise=-1.0)])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_digits(0, **options)
