"""CIFAR-10 and CIFAR-100 from their published binary files.

A record is the label byte (CIFAR-100: the coarse label, then the fine one) and 3072 pixel bytes, the red plane first,
each plane in row order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

from jprune.data.augment import pad_crop_flip
from jprune.data.dataset import ArraySplit, Dataset

SIDE = 32
FILES = {
    10: ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    100: (["train.bin"], ["test.bin"]),
}
FOLDERS = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
# Channel means and deviations of the 50000 training images, pixels in [0, 1].
MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4866, 0.4409)}
STD = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}


def load_cifar(folder: str | Path, classes: Literal[10, 100] = 10) -> Dataset:
    """CIFAR-10 or CIFAR-100 (fine labels) from the folder that holds the .bin files, or the one above it.

    Images are (32, 32, 3), uint8 in memory and normalised per channel when read; training pads by 4, crops, mirrors.

    Raises ValueError for missing or truncated files, or labels that belong to the other data set.
    """
    if classes not in FILES:
        raise ValueError(f"classes is {classes!r}: CIFAR has 10 or 100")
    folder = _find(Path(folder), classes)
    (train_images, train_labels), (test_images, test_labels) = (
        _join([read_records(folder / name, classes) for name in names]) for names in FILES[classes]
    )
    mean, std = 255 * np.array(MEAN[classes]), 255 * np.array(STD[classes])
    return Dataset(
        train=ArraySplit(train_images, train_labels, mean, std, augment=pad_crop_flip),
        test=ArraySplit(test_images, test_labels, mean, std),
        num_classes=classes,
        image_shape=(SIDE, SIDE, 3),
        name=f"cifar{classes}",
    )


def read_records(file: Path, classes: int) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, " n"]]:
    """Images and labels (CIFAR-100: fine labels) of one binary file."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}: unpack cifar-{classes}-binary.tar.gz again")
    head = 1 if classes == 10 else 2
    size = head + 3 * SIDE * SIDE
    data = np.fromfile(file, dtype=np.uint8)
    if len(data) == 0 or len(data) % size:
        raise ValueError(
            f"{file} has {len(data)} bytes, not a multiple of the {size} of a CIFAR-{classes} record: "
            f"it is truncated or another format; unpack cifar-{classes}-binary.tar.gz again"
        )
    records = data.reshape(-1, size)
    labels = records[:, head - 1].astype(np.int32)
    if labels.max() >= classes or (classes == 100 and records[:, 0].max() >= 20):
        raise ValueError(
            f"{file} has labels that CIFAR-{classes} does not: it is another data set or is damaged; "
            f"unpack cifar-{classes}-binary.tar.gz again"
        )
    images = records[:, head:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _find(folder: Path, classes: int) -> Path:
    first = FILES[classes][0][0]
    for candidate in (folder, folder / FOLDERS[classes]):
        if (candidate / first).is_file():
            return candidate
    for pickled in (folder, folder / f"cifar-{classes}-batches-py", folder / f"cifar-{classes}-python"):
        if (pickled / ("data_batch_1" if classes == 10 else "train")).is_file():
            raise ValueError(
                f"{pickled} holds the pickled Python version: unpack cifar-{classes}-binary.tar.gz instead"
            )
    raise ValueError(
        f"there is no {first} in {folder} or {folder / FOLDERS[classes]}: "
        f"unpack cifar-{classes}-binary.tar.gz (www.cs.toronto.edu/~kriz/cifar.html) there"
    )


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)
