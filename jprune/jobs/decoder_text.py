"""The text that a run on a language model's folder looks at, trains on and measures with, as windows of token ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jprune.checkpoint import load_tokenizer
from jprune.checkpoint.chat_template import load_chat_template
from jprune.data.text import BYTES, sample_windows, token_stream, windows
from jprune.models.llama_config import LlamaConfig

HELD_BACK = 0.1  # of the calibration text, its end, where no other text is given to measure on
MEASURED = 64  # windows that perplexity is measured on


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids: the stream to train on, windows of it to calibrate with, windows of other text to measure on."""

    stream: np.ndarray
    calibration: np.ndarray
    evaluation: np.ndarray

    def batches(self, size: int) -> list[np.ndarray]:
        """The calibration windows, `size` at a time, the last batch smaller where they do not divide."""
        return [self.calibration[i : i + size] for i in range(0, len(self.calibration), size)]


class Asked(Protocol):
    """What is asked for: the options of a run that have to do with text, as `DecoderConfig` has them."""

    @property
    def model(self) -> str: ...
    @property
    def calibration(self) -> str | None: ...
    @property
    def evaluation(self) -> str | None: ...
    @property
    def text_key(self) -> str | None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def seed(self) -> int: ...


def read_tokens(folder: str, config: LlamaConfig, path: str, text_key: str | None = None) -> np.ndarray:
    """The token ids of a text file or a folder of them, by the tokenizer and the chat template of a model's folder.

    Raises:
      ValueError: no tokenizer, or other text than a text file holds.
    """
    tokenizer: Any = None
    if config.vocab != BYTES or (Path(folder) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    return token_stream(path, config.vocab, tokenizer, field=text_key, chat=load_chat_template(folder))


def load_texts(o: Asked, config: LlamaConfig) -> Texts:
    """Read and tokenise what the options name.

    Raises:
      ValueError: no tokenizer, too little text, or other text than a text file holds.
    """
    assert o.calibration is not None
    stream = read_tokens(o.model, config, o.calibration, o.text_key)
    if o.evaluation is None:
        cut = int(len(stream) * (1 - HELD_BACK))
        stream, other = stream[:cut], stream[cut:]
    else:
        other = read_tokens(o.model, config, o.evaluation, o.text_key)
    _check_enough(o, len(stream), len(other))
    return Texts(stream, sample_windows(stream, o.sequences, o.length, o.seed), windows(other, o.length, MEASURED))


def _check_enough(o: Asked, calibrate: int, measure: int) -> None:
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
