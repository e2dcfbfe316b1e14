"""What decides the outcome of pruning a language model's folder: the options, checked, and the text they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoint import load_tokenizer
from jprune.checkpoint.chat_template import load_chat_template
from jprune.data.text import BYTES, sample_windows, token_stream, windows
from jprune.models.llama_config import LlamaConfig

HELD_BACK = 0.1  # of the calibration text, its end, where no other text is given to measure on
MEASURED = 64  # windows that perplexity is measured on


@dataclasses.dataclass(frozen=True)
class LanguageOptions:
    """Everything that decides the outcome of a run.

    Attributes:
      model: a Hugging Face folder.
      method: see `jprune list`.
      sparsity: fraction to remove, in [0, 1): of the MLPs' channels, or of channels and heads where the method prunes
        both.
      calibration: a text file or a folder of them; the method looks at windows of it, recovery trains on it.
      evaluation: text to measure perplexity on; None: the last tenth of the calibration text, which is held back.
      text_key: the entry of a .jsonl line that holds its text or its chat messages; None: "text", else "messages".
      scope: "global": layers share the budget as the method says; "uniform": the same number in every layer.
      multiple_of: kept channels are multiples of this (128 suits accelerators).
      sequences, length: how many windows of how many tokens are looked at.
      batch_size: windows at a time.
      recover: steps of low-rank training afterwards (methods that prune while they train: the steps they take).
      learning_rate, rank: of that training; rank is the mean over the layers.
      form: "auto" (uniform where the layers agree, else hetero), "uniform", "padded" or "hetero".
      dtype: to compute in; None: as the weights are stored.
      mesh: (data, model): devices to divide batches and weights over.
      seed: of everything.
    """

    model: str
    method: str = "cfsp"
    sparsity: float = 0.3
    calibration: str | None = None
    evaluation: str | None = None
    text_key: str | None = None
    scope: str = "global"
    multiple_of: int = 1
    sequences: int = 128
    length: int = 1024
    batch_size: int = 4
    recover: int = 0
    learning_rate: float = 1e-4
    rank: int = 8
    form: str = "auto"
    dtype: str | None = None
    mesh: tuple[int, int] = (1, 1)
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("calibration", self.calibration is not None, "a text file (.txt, .md, .py, .jsonl) or a folder of them"),
            ("sparsity", 0 <= self.sparsity < 1, "a fraction to remove, at least 0 and below 1"),
            ("scope", self.scope in ("global", "uniform"), "global or uniform"),
            ("multiple_of", self.multiple_of >= 1, "at least 1"),
            ("sequences", self.sequences >= 1, "at least 1"),
            ("length", self.length >= 2, "at least 2"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("recover", self.recover >= 0, "at least 0"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("rank", self.rank >= 1, "at least 1"),
            ("form", self.form in ("auto", "uniform", "padded", "hetero"), "auto, uniform, padded or hetero"),
            ("dtype", self.dtype in (None, "float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
            ("mesh", len(self.mesh) == 2 and min(self.mesh) >= 1, "two numbers of devices, data and model"),
            ("mesh", self.batch_size % self.mesh[0] == 0, f"such that data divides the batch of {self.batch_size}"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {allowed}")


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids: the stream to train on, windows of it to calibrate with, windows of other text to measure on."""

    stream: np.ndarray
    calibration: np.ndarray
    evaluation: np.ndarray

    def batches(self, size: int) -> list[np.ndarray]:
        """The calibration windows, `size` at a time, the last batch smaller where they do not divide."""
        return [self.calibration[i : i + size] for i in range(0, len(self.calibration), size)]


def load_texts(o: LanguageOptions, config: LlamaConfig) -> Texts:
    """Read and tokenise what the options name.

    Raises:
      ValueError: no tokenizer, too little text, or other text than a text file holds.
    """
    tokenizer: Any = None
    if config.vocab != BYTES or (Path(o.model) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(o.model)
    chat = load_chat_template(o.model)

    def read(path: str) -> np.ndarray:
        return token_stream(path, config.vocab, tokenizer, field=o.text_key, chat=chat)

    assert o.calibration is not None
    stream = read(o.calibration)
    if o.evaluation is None:
        cut = int(len(stream) * (1 - HELD_BACK))
        stream, other = stream[:cut], stream[cut:]
    else:
        other = read(o.evaluation)
    _check_enough(o, len(stream), len(other))
    return Texts(stream, sample_windows(stream, o.sequences, o.length, o.seed), windows(other, o.length, MEASURED))


def _check_enough(o: LanguageOptions, calibrate: int, measure: int) -> None:
    """Raise ValueError for less text than one window, in the words of the options that help."""
    if calibrate > o.length and measure >= o.length:
        return
    fits = min(calibrate - 1, measure)
    shorter = f", or windows of at most --length {fits}" if fits >= 2 else ""
    if o.evaluation is None:
        raise ValueError(
            f"{o.calibration} has {calibrate + measure:,} tokens, of which {measure:,} are held back to measure on: too "
            f"few of one or the other for windows of {o.length} tokens. Give more text, other text to measure on with "
            f"--evaluation{shorter}"
        )
    few, n, wanted = (
        (o.calibration, calibrate, o.length + 1) if calibrate <= o.length else (o.evaluation, measure, o.length)
    )
    raise ValueError(
        f"{few} has {n:,} tokens, and windows of {o.length} tokens need {wanted:,}: give more text{shorter}"
    )
