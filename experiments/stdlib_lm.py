"""The small language model that the experiments on decoders share: Python's own standard library, byte by byte.

    python -m experiments.stdlib_lm --seeds 0 1 2        # trains what is not in the cache yet; minutes a seed on a CPU

The corpus needs no download: the .py files of the running Python's library, a vocabulary of 256 bytes. A file is held out
when the md5 of its path says so, so the split depends on nothing but names; what the machine that built this Python wrote
into its library is left out. The same Python version has the same corpus everywhere, and results name it by its digest.

The model is a LLaMA of 1.95 million parameters. A trained one is kept under a name made of everything it depends on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Int32, UInt8
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.trained_once import cache_folder, descend, trained_once
from jprune.data.text import sample_windows, windows
from jprune.language.perplexity import next_token_loss, perplexity
from jprune.models.llama import Llama, LlamaConfig, llama_config, stack_layers

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages"}
MODEL = llama_config(vocab=256, stream=160, ffn=448, depth=6, q_heads=5, head_dim=32, tied=True)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model is trained: AdamW, a linear warm-up, half a cosine to zero, gradients clipped by their norm."""

    steps: int = 400
    batch: int = 12
    tokens: int = 192
    learning_rate: float = 3e-3
    warmup: int = 40
    clip: float = 1.0
    weight_decay: float = 0.01


RECIPE = Recipe()
VERSION = 1  # to be raised with every change of the code below that changes what is trained


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Two streams of bytes.

    Attributes:
      train, valid: texts of the files, one after the other in the order of their paths.
      python: the version whose library it is.
      digest: of both streams.
    """

    train: UInt8[np.ndarray, " n"]
    valid: UInt8[np.ndarray, " m"]
    python: str
    digest: str

    def calibration(self, seed: int, n: int = 64, tokens: int = RECIPE.tokens) -> Int32[np.ndarray, "n t"]:
        """Windows of training text at random starts."""
        return sample_windows(self.train, n, tokens, seed)

    def evaluation(self, n: int = 64, tokens: int = RECIPE.tokens) -> Int32[np.ndarray, "n t"]:
        """The same windows every time, spread over the held-out text."""
        return windows(self.valid, tokens, n)


@functools.cache
def read_corpus(cap: int = 9_000_000) -> Corpus:
    """The running Python's library; at most `cap` bytes to train on.

    Raises:
      ValueError: this Python has no library in .py files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        # _sysconfigdata_*.py and config-*/ hold the paths and compilers of the machine that built this Python
        if SKIPPED & set(name.split("/")) or name.startswith(("_sysconfigdata", "config-")):
            continue
        held_out = int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0
        parts[held_out].append((root / name).read_bytes())
    train, valid = b"".join(parts[False])[:cap], b"".join(parts[True])
    if not train or not valid:
        raise ValueError(f"{root} has no .py files to read: use a Python with its library unpacked")
    digest = hashlib.sha256(train + b"\0" + valid).hexdigest()[:16]
    streams = (np.frombuffer(text, np.uint8) for text in (train, valid))
    return Corpus(*streams, platform.python_version(), digest)


def base_model(
    seed: int,
    scanned: bool = False,
    *,
    config: LlamaConfig = MODEL,
    recipe: Recipe = RECIPE,
    corpus: Corpus | None = None,
    cache: str | Path | None = None,
    progress: bool | Progress = True,
) -> tuple[LlamaConfig, Any, Corpus]:
    """(config, variables, corpus): `Llama(config, scanned).apply(variables, ids)` is the trained model.

    Trained once for everything it depends on, then read from the cache.

    Args:
      seed: of the initial weights and of the order of the data.
      scanned: stack the layers.
      config, recipe, corpus: other than the experiments' own.
      cache: folder, see `cache_folder`.
      progress: show a bar, or put it onto this one.
    """
    corpus = corpus or read_corpus()
    said = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "corpus": corpus.digest,
            "version": VERSION}  # fmt: skip
    folder = cache_folder("stdlib_lm", cache)
    variables, _ = trained_once(
        folder, seed, said, lambda: (train(config, recipe, seed, corpus, progress), {}), {"python": corpus.python}
    )
    return config, stack_layers(variables) if scanned else variables, corpus


def initial(config: LlamaConfig, seed: int) -> Any:
    """Normal weights whose variance is one over their inputs; 0.02, the custom, learns much slower at this width."""
    variables = jax.jit(Llama(config).init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))

    def scaled(path: Any, x: jax.Array) -> jax.Array:
        module, kind = path[-2].key, path[-1].key
        if kind not in ("kernel", "embedding"):
            return x
        inputs = {"o": x.size // x.shape[-1], "embed": config.stream}.get(module, x.shape[0])
        return x * (inputs**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(scaled, variables)


def train(config: LlamaConfig, recipe: Recipe, seed: int, corpus: Corpus, progress: bool | Progress = True) -> Any:
    """Variables of an unrolled model after all steps of the recipe.

    Raises:
      ValueError: the loss is not finite any more.
    """
    module = Llama(config)  # unrolled: six layers compile as fast as a scan and a step takes three quarters of its time
    rates = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup, recipe.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(recipe.clip), optax.adamw(rates, weight_decay=recipe.weight_decay)
    )

    def loss(variables: Any, ids: Any) -> Any:
        return next_token_loss(jnp.asarray(module.apply(variables, ids)), ids).mean()

    order = sample_windows(corpus.train, recipe.steps * recipe.batch, recipe.tokens, seed)
    batches = order.reshape(recipe.steps, recipe.batch, recipe.tokens)
    title = f"base model, seed {seed}"
    return descend(loss, initial(config, seed), batches, recipe.steps, optimizer, progress, title)[0]


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    cache: Annotated[Path | None, tyro.conf.arg(help="folder of trained models")] = None,
) -> None:
    """Train the base models that are not there yet; print their perplexity per byte of held-out text."""
    table = Table(title="base models")
    for column in ("seed", "perplexity", "parameters"):
        table.add_column(column)
    corpus = None
    for seed in seeds:
        config, variables, corpus = base_model(seed, cache=cache)
        value = perplexity(Llama(config), variables, corpus.evaluation())
        table.add_row(str(seed), f"{value:.3f}", f"{sum(x.size for x in jax.tree.leaves(variables)):,}")
    console = Console()
    console.print(table)
    if corpus is not None:
        sizes = f"{len(corpus.train):,} bytes of text, {len(corpus.valid):,} held out"
        console.print(
            f"Python {corpus.python}: {sizes}, digest {corpus.digest}; models in {cache_folder('stdlib_lm', cache)}"
        )


if __name__ == "__main__":
    tyro.cli(main)
