"""Batches: pure functions of (seed, epoch, step), every example once, streams that start anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.data import ArraySplit, epoch_batches, eval_batches, steps_per_epoch, stream


def numbered(n, **options):
    """A split whose example i is an image full of i with label i."""
    images = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 2, 2, 1))
    return ArraySplit(images.copy(), np.arange(n), **options)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_depends_on_seed_epoch_and_step_only():
    split = numbered(40, noise=1.0)
    batches = epoch_batches(split, 8, seed=3, epoch=2)
    backwards = [batches[step] for step in reversed(range(5))][::-1]
    again = epoch_batches(split, 8, seed=3, epoch=2)
    assert all(equal(again[step], backwards[step]) for step in range(5))
    for other in (dict(seed=4, epoch=2), dict(seed=3, epoch=1), dict(seed=2, epoch=3)):
        changed = epoch_batches(split, 8, **other)[0]
        assert not np.array_equal(changed["label"], backwards[0]["label"])
        assert not np.array_equal(changed["image"], backwards[0]["image"])


def test_noise_differs_between_batches_and_examples():
    split = ArraySplit(np.zeros((32, 2, 2, 1), np.float32), np.zeros(32, np.int64), noise=1.0)
    images = np.concatenate([b["image"] for b in stream(epoch_batches(split, 8, seed=0, epoch=0))])
    assert len(np.unique(images)) == images.size


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_stream_may_start_at_any_step(start):
    batches = epoch_batches(numbered(40, noise=0.5), 8, seed=0, epoch=1)
    got = list(stream(batches, start=start, threads=3))
    assert len(got) == 5 - start and all(equal(b, batches[start + i]) for i, b in enumerate(got))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_an_epoch_sees_no_example_twice_and_drops_less_than_a_batch(n, batch_size, seed, epoch):
    if batch_size > n:
        with pytest.raises(ValueError, match="lower it"):
            epoch_batches(numbered(n), batch_size, seed=seed, epoch=epoch)
        return
    seen = np.concatenate([b["label"] for b in stream(epoch_batches(numbered(n), batch_size, seed=seed, epoch=epoch))])
    assert len(seen) == len(set(seen)) == steps_per_epoch(numbered(n), batch_size) * batch_size > n - batch_size


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70))
def test_evaluation_sees_each_example_once_in_order(n, batch_size):
    batches = list(stream(eval_batches(numbered(n, mean=1.0, std=2.0), batch_size)))
    assert {len(b["label"]) for b in batches} == {batch_size}
    weight = np.concatenate([b["weight"] for b in batches]) > 0
    labels = np.concatenate([b["label"] for b in batches])[weight]
    images = np.concatenate([b["image"] for b in batches])[weight]
    np.testing.assert_array_equal(labels, np.arange(n))
    np.testing.assert_array_equal(images[:, 1, 1, 0], (np.arange(n) - 1) / np.float32(2))
    assert images.dtype == np.float32 and labels.dtype == np.int32


def test_orders_are_spread_evenly():
    """The first place of an epoch falls on every example about equally often."""
    first = [epoch_batches(numbered(8), 1, seed=0, epoch=e)[0]["label"][0] for e in range(400)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # the 0.1 % quantile of chi-squared with 7 degrees of freedom


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="batch_size is 0"):
        steps_per_epoch(numbered(4), 0)
    with pytest.raises(ValueError, match="cannot cut 0 examples"):
        eval_batches(numbered(0), 4)
