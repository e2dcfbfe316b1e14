"""Base models that experiments share: trained once for everything they depend on, then read from a cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import optax
from rich.progress import Progress

from jprune.checkpoint import load, save
from jprune.training import TuningConfig, fit


def cache_folder(name: str, cache: str | Path | None = None) -> Path:
    """Where trained models of a name are kept: `cache`, else $JPRUNE_CACHE/name, else ~/.cache/jprune/name."""
    if cache is not None:
        return Path(cache)
    root = os.environ.get("JPRUNE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "jprune") / name


def trained_once(
    folder: Path, seed: int, said: Mapping[str, Any], train: Callable[[], Any], note: Mapping[str, Any] | None = None
) -> Any:
    """(variables, what was said of them): read if a model of which the same was said lies in the folder, else trained.

    Args:
      folder: from `cache_folder`.
      seed, said: all that the variables depend on; plain data.
      train: () -> (variables, more to say of them).
      note: said of them too, but nothing depends on it.
    """
    key = hashlib.sha256(json.dumps({**said, "seed": seed}, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"seed{seed}-{key}"
    if not file.exists():
        variables, found = train()
        save(
            file, variables, {**said, **(note or {}), **found, "seed": seed}, overwrite=True
        )  # another may have been first
    return load(file)


def descend(
    loss: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    steps: int,
    optimizer: optax.GradientTransformation,
    progress: bool | Progress,
    title: str,
) -> tuple[Any, list[float]]:
    """(variables, loss of every step) after so many batches, which come in their order from one generator of numbers.

    Raises:
      ValueError: the loss is not finite any more.
    """
    stream = enumerate(batches)

    def batch_of(step: int) -> Any:
        number, batch = next(stream)
        assert number == step  # of one run from its beginning: nothing is resumed in the middle
        return batch

    config = TuningConfig(steps, clip=math.inf)  # the optimiser clips
    return fit(lambda v, batch, key: loss(v, batch), variables, batch_of, config, optimizer=optimizer, progress=progress,
               title=title)  # fmt: skip
