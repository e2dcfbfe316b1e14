"""What a dataset is: two splits that serve batches, each batch a pure function of (seed, epoch, step).

A split knows how to read examples by index; grain supplies the order (an index shuffle that needs no memory), the
random generators and the prefetching threads. Nothing here keeps a position: an iterator is started at any step of
any epoch and produces the batches an uninterrupted run would have seen, which is all a resumed training needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Float32, Int, Num

Batch: TypeAlias = dict[str, np.ndarray]
Augmentation: TypeAlias = Callable[[np.random.Generator, np.ndarray], np.ndarray]


@runtime_checkable
class Split(Protocol):
    """Examples that can be read by index, for training (`draw`) and for evaluation (`read`)."""

    def __len__(self) -> int: ...

    def read(self, indices: Int[np.ndarray, " b"]) -> Batch:
        """The examples as evaluation sees them: "image" (b, h, w, c) float32 and "label" (b,) int32."""
        ...

    def draw(self, indices: Int[np.ndarray, " b"], rng: np.random.Generator) -> Batch:
        """The examples as training sees them, augmented with `rng`."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification data set: a training and a test split of NHWC float32 images with integer labels."""

    train: Split
    test: Split
    num_classes: int
    image_shape: tuple[int, int, int]
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split held in memory: images (n, h, w, c) of any dtype, labels (n,).

    Reading gives (augment(image) - mean) / std in float32: augmentations see the stored pixels, as the customary
    pipelines have it (a padded border is black, not grey); `noise` is the standard deviation of the Gaussian noise
    that training adds after normalising.
    """

    images: Num[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, " c"] | float = 0.0
    std: Float[np.ndarray, " c"] | float = 1.0
    augment: Augmentation | None = None
    noise: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Int[np.ndarray, " b"]) -> Batch:
        """The examples at `indices`, normalised."""
        return {"image": self._normalise(self.images[indices]), "label": self.labels[indices].astype(np.int32)}

    def draw(self, indices: Int[np.ndarray, " b"], rng: np.random.Generator) -> Batch:
        """The examples at `indices`, augmented, normalised, with noise."""
        images = self.images[indices]
        if self.augment is not None:
            images = self.augment(rng, images)
        images = self._normalise(images)
        if self.noise:
            images += np.float32(self.noise) * rng.standard_normal(images.shape, dtype=np.float32)
        return {"image": images, "label": self.labels[indices].astype(np.int32)}

    def _normalise(self, images: Num[np.ndarray, "b h w c"]) -> Float32[np.ndarray, "b h w c"]:
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (images.astype(np.float32) - mean) / std


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Number of full batches in one pass; ValueError if there is none."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if len(split) < batch_size:
        raise ValueError(f"batch_size {batch_size} is larger than the {len(split)} training examples: lower it")
    return len(split) // batch_size


def epoch_batches(split: Split, batch_size: int, *, seed: int, epoch: int) -> grain.MapDataset[Batch]:
    """The shuffled, augmented, full batches of one epoch; element `step` is a pure function of (seed, epoch, step).

    The examples left over by the last full batch are a different set every epoch, so none is lost in the long run.
    """
    steps_per_epoch(split, batch_size)
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    order: Any = grain.MapDataset.range(len(split)).seed(mixed).shuffle()
    return order.batch(batch_size, drop_remainder=True).random_map(split.draw)


def eval_batches(split: Split, batch_size: int) -> grain.MapDataset[Batch]:
    """All examples in order, in batches of one size; "weight" (b,) float32 is 0 on the padding of the last."""
    n = len(split)
    if n == 0 or batch_size < 1:
        raise ValueError(f"cannot cut {n} examples into batches of {batch_size}: both must be at least 1")

    def read(start: int) -> Batch:
        wanted = start * batch_size + np.arange(batch_size)
        return {**split.read(np.minimum(wanted, n - 1)), "weight": (wanted < n).astype(np.float32)}

    return grain.MapDataset.range(-(-n // batch_size)).map(read)


def stream(batches: grain.MapDataset[Batch], *, start: int = 0, threads: int = 2, ahead: int = 4) -> Iterator[Batch]:
    """Iterate from batch `start` on, with `threads` threads reading up to `ahead` batches in advance."""
    if start >= len(batches):
        return iter(())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    return iter(batches.slice(slice(start, None)).to_iter_dataset(options))
