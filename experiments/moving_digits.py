"""Videos of moving digits, and a small diffusion transformer trained on them: the stand-in for a video generator.

One of scikit-learn's 8x8 digits moves with constant velocity over a 12x12 canvas and bounces off its edges. The model
sees 2x2 patches of 8 frames as 288 tokens, and 8 tokens of condition: the digit's class, where it starts, where it goes.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress
from sklearn.datasets import load_digits

from experiments.trained_once import cache_folder, descend, trained_once
from jprune.models.dit import DiTBlock, DiTConfig, VideoDiT, dense_attention

FRAMES, SIDE, DIGIT, WORDS, WORD = 8, 12, 8, 8, 32
MODEL = DiTConfig(
    stream=64, patch=(1, 2, 2), channels=1, text_width=WORD, pairs=(2, 3, 3), theta=8.0, gain=4.0,
    blocks=(DiTBlock("double", 4, 16, 256), DiTBlock("double", 4, 16, 256), DiTBlock("single", 4, 16, 256)),
)  # fmt: skip
TOKENS = FRAMES * (SIDE // 2) ** 2 + WORDS
VERSION = 1  # to be raised with every change of the code below that changes what is trained


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rectified flow by Adam: linear warm-up, half a cosine down, gradients clipped by their norm."""

    steps: int = 600
    batch: int = 8
    learning_rate: float = 2e-3
    last_rate: float = 1e-5
    warmup: int = 100
    clip: float = 1.0


class Conditioned(nn.Module):
    """The transformer with its words: a table for classes, and a linear map of start and velocity."""

    config: DiTConfig = MODEL

    @nn.compact
    def __call__(
        self, video: Any, time: Any, label: Any, motion: Any, attention: Any = dense_attention, states: Any = None
    ) -> Any:
        """video: (batch, frames, side, side, 1); time: (batch,); label: (batch,) int; motion: (batch, 4)."""
        words = nn.Embed(10, WORDS * WORD, name="classes")(label) + nn.Dense(WORDS * WORD, name="motion")(motion)
        words = jnp.reshape(words, (-1, WORDS, WORD))
        return VideoDiT(self.config, name="dit")(video, time, words, None, attention, states)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    found: Any = load_digits()
    return found.images.astype(np.float32) / 8 - 1, found.target.astype(np.int32)


def videos(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(videos (n, frames, side, side, 1) in [-1, 1], labels (n,), motions (n, 4): start and velocity, scaled)."""
    images, labels = _digits()
    chosen = rng.integers(0, len(images), n)
    room = SIDE - DIGIT
    start, velocity = rng.uniform(0, room, (n, 2)), rng.uniform(-2, 2, (n, 2))
    out = np.full((n, FRAMES, SIDE, SIDE, 1), -1.0, np.float32)
    for f in range(FRAMES):
        # reflected: a triangle wave of twice the room
        at = np.abs((start + f * velocity + room) % (2 * room) - room)
        for i, (y, x) in enumerate(np.rint(at).astype(int)):
            out[i, f, y : y + DIGIT, x : x + DIGIT, 0] = images[chosen[i]]
    motion = np.concatenate([start / room - 0.5, velocity / 2], axis=1).astype(np.float32)
    return out, labels[chosen], motion


def trained(
    seed: int, recipe: Recipe = Recipe(), cache: str | Path | None = None, progress: bool | Progress = True
) -> tuple[Conditioned, Any, float]:
    """(module, variables, mean loss of the last hundred steps), trained once and then read from the cache."""
    said = {"recipe": dataclasses.asdict(recipe), "config": dataclasses.asdict(MODEL), "version": VERSION}
    module = Conditioned()
    train = functools.partial(_train, module, recipe, seed, progress)
    variables, metadata = trained_once(cache_folder("moving_digits", cache), seed, said, train)
    return module, variables, metadata["loss"]


def _train(module: Conditioned, recipe: Recipe, seed: int, progress: bool | Progress) -> tuple[Any, dict[str, float]]:
    rng = np.random.default_rng(seed)
    x, label, motion = videos(rng, recipe.batch)
    variables = jax.jit(module.init)(jax.random.key(seed), x, np.ones(len(x), np.float32), label, motion)
    rates = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup, recipe.steps, recipe.last_rate)
    optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip), optax.adam(rates))

    def loss(variables: Any, batch: Any) -> Any:
        keys, x, label, motion = batch
        one, two = jax.random.split(jax.random.wrap_key_data(keys[0]))
        t, noise = jax.nn.sigmoid(jax.random.normal(one, (len(x),))), jax.random.normal(two, x.shape)
        at = t[:, None, None, None, None]
        said = jnp.asarray(module.apply(variables, (1 - at) * x + at * noise, t, label, motion))
        return jnp.mean((said - (noise - x)) ** 2)

    keys = (jax.random.key_data(jax.random.fold_in(jax.random.key(seed + 1), k))[None] for k in range(recipe.steps))
    batches = ((key, *videos(rng, recipe.batch)) for key in keys)
    title = f"video model, seed {seed}"
    variables, losses = descend(loss, variables, batches, recipe.steps, optimizer, progress, title)
    return variables, {"loss": float(np.mean(losses[-100:]))}
