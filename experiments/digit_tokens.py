"""Digits as the tokens of an image: what a choice of them covers, what can be read from it, how long choosing takes.

Some of scikit-learn's digits are tokens (64 numbers each), the others are questions. Nothing is trained: a question is
answered by the label of the nearest kept token, and by attention over the kept tokens (a softmax over cosines, with labels as
values), which is what a layer that reads the tokens does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import in_turns
from jprune.methods.tokens.divprune import (
    cosine_distance_matrix,
    cover_radius,
    divprune_select,
    farthest_first,
    mmdp_value,
)


class Digits(NamedTuple):
    """Tokens (m, 64) with their labels, questions (n, 64) with theirs."""

    tokens: Any
    labels: Any
    questions: Any
    answers: Any


def draw(tokens: int, seed: int) -> Digits:
    """So many digits are tokens, the rest questions."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = jnp.asarray(pixels[order], jnp.float32), jnp.asarray(labels[order])
    return Digits(x[:tokens], y[:tokens], x[tokens:], y[tokens:])


def measured(digits: Digits, index: Any, sharpness: float) -> dict[str, float]:
    """Every measure of one selection; `sharpness` is what the attention's cosines are multiplied with."""
    return {name: float(v) for name, v in _measured(digits, index, sharpness).items()}


@jax.jit
def _measured(digits: Digits, index: Any, sharpness: Any) -> dict[str, Any]:
    x, y, questions, answers = digits
    unit = [v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (questions, x[index])]
    cosine = unit[0] @ unit[1].T
    read = jax.nn.softmax(sharpness * cosine, axis=-1) @ jax.nn.one_hot(y[index], 10)
    return {
        "min_distance": mmdp_value(x, index),
        "cover_radius": cover_radius(x, index),
        "nearest": (y[index][jnp.argmax(cosine, 1)] == answers).mean(),
        "attention": (jnp.argmax(read, 1) == answers).mean(),
    }


def timed(sizes: tuple[tuple[int, int], tuple[int, int]], rounds: int) -> dict[str, Any]:
    """Seconds of the whole choice and of the loop behind the matrix of distances, in turns.

    The fastest round counts: it is the one that least else disturbed, and the longer a job, the more of its medians are
    other programs' time.
    """
    rng = np.random.default_rng(0)
    jobs = {}
    for m, k in sizes:
        x = jnp.asarray(rng.normal(size=(m, 64)), jnp.float32)
        apart = cosine_distance_matrix(x)
        jobs[f"{m} whole"] = lambda x=x, k=k: divprune_select(x, k)
        jobs[f"{m} loop"] = lambda apart=apart, k=k: farthest_first(apart, k)
    times = in_turns(jobs, rounds, 2)
    seconds = {name: min(of) for name, of in times.items()}
    (small, k), (large, more) = sizes
    return {
        "seconds": seconds,
        "ratio": seconds[f"{large} loop"] / seconds[f"{small} loop"],
        "ratio_of_k_m": large * more / (small * k),
        "rounds": times,
    }
