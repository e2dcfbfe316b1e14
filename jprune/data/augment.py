"""Training augmentations on whole NHWC batches: pure functions of a generator and the images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Num


def pad_crop_flip(
    rng: np.random.Generator, images: Num[np.ndarray, "b h w c"], pad: int = 4
) -> Num[np.ndarray, "b h w c"]:
    """Zero-pad by `pad`, cut a random window of the old size, mirror half of the images: the CIFAR recipe."""
    b, h, w, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, size=(2, b))
    flip = rng.random(b) < 0.5
    rows = top[:, None] + np.arange(h)
    columns = np.where(flip[:, None], left[:, None] + np.arange(w)[::-1], left[:, None] + np.arange(w))
    return padded[np.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]
