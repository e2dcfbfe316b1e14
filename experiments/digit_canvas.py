"""A digit somewhere on a noisy canvas, and a small vision transformer that reads it: the stand-in for ImageNet and DeiT.

One of scikit-learn's 8x8 digits lies at a uniform offset on a 16x16 canvas of noise, so that most of an image is background.
Tokens are 4x4 windows in steps of 2, 64 of 16 values each; laid side by side they are an image of 32x32 for a model of patch 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.trained_once import cache_folder, descend, trained_once
from jprune.methods.tokens.cost import Dims, dims_of
from jprune.models.vit import ViT, vit

CANVAS, DIGIT, WINDOW, STEP = 16, 8, 4, 2
SIDE = CANVAS // STEP  # tokens in a row
NOISE, INK = 0.35, 0.4  # a pixel above INK is the digit's
TEST, PLACEMENTS = 500, 2
VERSION = 1  # to be raised with every change of the code below that changes what is trained


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW under a one-cycle schedule, the digits placed anew in every step."""

    epochs: int = 50
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.1


class Canvases(NamedTuple):
    """Images (n, 32, 32, 1), labels (n,), and which tokens show the digit: (n, 64), by their central 2x2 pixels."""

    images: np.ndarray
    labels: np.ndarray
    shown: np.ndarray


def model() -> ViT:
    """Six blocks of four heads, 32 wide, with a class token."""
    return vit(32, 6, 4, WINDOW, 10)


def sizes() -> Dims:
    """Of the model, for counting."""
    return dims_of(model().config, (SIDE * WINDOW, SIDE * WINDOW, 1))


@functools.cache
def digits(seed: int) -> tuple[Any, Any, Any, Any]:
    """(images for training, for testing, their labels): 1297 and 500, stratified."""
    found: Any = load_digits()
    images = (found.images / 16).astype(np.float32)
    return tuple(train_test_split(images, found.target, test_size=TEST, random_state=seed, stratify=found.target))


def place(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Canvases:
    """Each digit on a canvas of its own."""
    n = len(images)
    canvas = rng.uniform(0, NOISE, (n, CANVAS, CANVAS)).astype(np.float32)
    y, x = rng.integers(0, CANVAS - DIGIT + 1, (2, n))
    row, inside = np.arange(n)[:, None, None], np.arange(DIGIT)
    at = row, y[:, None, None] + inside[:, None], x[:, None, None] + inside
    canvas[at] = np.maximum(canvas[at], images)
    padded = np.pad(canvas, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW), axis=(1, 2))[:, ::STEP, ::STEP]
    tiled = windows.transpose(0, 1, 3, 2, 4).reshape(n, SIDE * WINDOW, SIDE * WINDOW, 1)
    cells = canvas.reshape(n, SIDE, STEP, SIDE, STEP).max((2, 4))
    return Canvases(np.ascontiguousarray(tiled), labels.astype(np.int32), cells.reshape(n, -1) > INK)


def test_set(seed: int) -> Canvases:
    """A thousand canvases: every test digit in two places, the same ones always."""
    _, images, _, labels = digits(seed)
    return place(np.tile(images, (PLACEMENTS, 1, 1)), np.tile(labels, PLACEMENTS), np.random.default_rng(10_000 + seed))


def calibration_set(seed: int, n: int) -> Canvases:
    """Canvases of training digits, in other places than in training."""
    images, _, labels, _ = digits(seed)
    rng = np.random.default_rng(20_000 + seed)
    chosen = rng.integers(0, len(images), n)
    return place(images[chosen], labels[chosen], rng)


def trained(
    seed: int, recipe: Recipe = Recipe(), cache: str | Path | None = None, progress: bool | Progress = True
) -> tuple[ViT, Any]:
    """(module, variables), trained once and then read from the cache."""
    said = {"recipe": dataclasses.asdict(recipe), "version": VERSION}
    module = model()
    train = functools.partial(_train, module, recipe, seed, progress)
    return module, trained_once(cache_folder("digit_canvas", cache), seed, said, lambda: (train(), {}))[0]


def _train(module: ViT, recipe: Recipe, seed: int, progress: bool | Progress) -> Any:
    images, _, labels, _ = digits(seed)
    rng = np.random.default_rng(seed)
    per_epoch = len(images) // recipe.batch
    steps = recipe.epochs * per_epoch
    first = place(images[: recipe.batch], labels[: recipe.batch], rng).images
    variables = jax.jit(module.init)(jax.random.key(seed), first)
    rates = optax.cosine_onecycle_schedule(steps, recipe.learning_rate, recipe.warmup)
    optimizer = optax.adamw(rates, weight_decay=recipe.weight_decay)

    def loss(variables: Any, batch: Any) -> Any:
        x, y = batch
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(module.apply(variables, x)), y))

    def batches() -> Iterator[Any]:
        for _ in range(recipe.epochs):
            order = rng.permutation(len(images))[: per_epoch * recipe.batch]
            for chosen in order.reshape(per_epoch, recipe.batch):
                canvases = place(images[chosen], labels[chosen], rng)
                yield canvases.images, canvases.labels

    return descend(loss, variables, batches(), steps, optimizer, progress, f"vision transformer, seed {seed}")[0]
