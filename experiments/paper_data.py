"""Data of the experiments on classifiers: digits, and the papers' sets from the folder that --data-dir names."""

from __future__ import annotations

from pathlib import Path

from jprune.data import Dataset, load_cifar, load_digits, load_image_folder


def digits(folder: Path | None, seed: int) -> Dataset:
    """scikit-learn's, split by the seed; they need no folder."""
    return load_digits(seed)


def cifar10(folder: Path | None, seed: int) -> Dataset:
    """CIFAR-10 in its binary format; its splits are fixed, so the seed changes nothing."""
    if folder is None:
        raise ValueError("this configuration needs --data-dir, the folder with CIFAR-10's binary files")
    return load_cifar(folder, 10)


def imagenet(folder: Path | None, seed: int) -> Dataset:
    """ImageNet-style folders train/ and val/; the seed changes nothing."""
    if folder is None:
        raise ValueError("this configuration needs --data-dir, the folder that holds train/ and val/")
    return load_image_folder(folder)
