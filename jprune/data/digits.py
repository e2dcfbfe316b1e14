"""The embedded default: scikit-learn's 1797 handwritten digits, 8x8 grey values, nothing to download."""

from __future__ import annotations

import numpy as np

from jprune.data.dataset import ArraySplit, Dataset


def load_digits(seed: int = 0, n_train: int = 1200, noise: float = 0.3) -> Dataset:
    """Digits in a train/test split drawn by `seed`, standardised by the training pixels' mean and deviation.

    Images are (8, 8, 1) float32; training adds Gaussian noise of deviation `noise` (0 turns it off).
    """
    from sklearn import datasets  # here, because importing scikit-learn costs a second that other data need not pay

    pixels, target = datasets.load_digits(return_X_y=True)
    images, labels = np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1), np.asarray(target, np.int32)
    if not 0 < n_train < len(labels):
        raise ValueError(f"n_train is {n_train}: it must leave both splits non-empty, 1 to {len(labels) - 1}")
    if noise < 0:
        raise ValueError(f"noise is {noise}: a standard deviation cannot be negative")
    order = np.random.default_rng(seed).permutation(len(labels))
    train, test = order[:n_train], order[n_train:]
    mean, std = float(images[train].mean()), float(images[train].std())
    return Dataset(
        train=ArraySplit(images[train], labels[train], mean, std, noise=noise),
        test=ArraySplit(images[test], labels[test], mean, std),
        num_classes=10,
        image_shape=(8, 8, 1),
        name=f"digits(seed={seed}, n_train={n_train}, noise={noise:g})",
    )
