"""Text as a language model sees it: files to one stream of token ids, the stream to windows of equal length.

stream = token_stream("wiki.txt", vocab, tokenizer)        # files -> text -> ids
calibration = sample_windows(stream, n=128, t=1024)        # random starts, as CFSP, Wanda and SparseGPT draw them
evaluation = windows(stream, t=1024)                       # one after the other
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int32, Integer

from jprune.files.json_files import parse_json

Chat: TypeAlias = Callable[[Sequence[Mapping[str, str]]], str]  # messages of a chat -> one text

ENDINGS = (".txt", ".md", ".py", ".jsonl")
BYTES = 256  # a vocabulary of this size needs no tokenizer: its ids are the bytes of UTF-8


def read_text(path: str | Path, *, field: str | None = None, separator: str = "\n", chat: Chat | None = None) -> str:
    """The text of a .txt, .md, .py or .jsonl file, or of all of them in a folder and its subfolders, sorted by path.

    Args:
      path: file or folder; hidden files and folders are left out.
      field: the entry of a .jsonl line that holds its text or the messages of a chat, where lines are objects and not
        strings; None: "text", or else "messages".
      chat: what makes one text of a chat's messages (`jprune.checkpoint.chat_template`); None: "role: content" lines.
      separator: put between files, and between the lines of a .jsonl file.

    Raises:
      ValueError: nothing there to read, another kind of file, text that is not UTF-8, a .jsonl line without text.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        files = [path / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not files:
            raise ValueError(f"{path} holds no text: put {', '.join(ENDINGS)} files into it")
    elif path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(
                f"{path} is no text file known here: give one of {', '.join(ENDINGS)}, or a folder of them"
            )
        files = [path]
    else:
        raise ValueError(f"there is no file or folder {path}: check the path")
    text = separator.join(_one_file(file, field, separator, chat or plain_chat) for file in files)
    if not text.strip():
        raise ValueError(f"{path} holds no text, only white space: give another file")
    return text


def _one_file(file: Path, field: str | None, separator: str, chat: Chat) -> str:
    try:
        text = file.read_bytes().decode("utf-8")  # not read_text: it would rewrite line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): convert it, with iconv for instance") from error
    if file.suffix.lower() != ".jsonl":
        return text
    parts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"line {number} of {file} is not JSON ({error}): write one object or string a line"
            ) from error
        try:
            parts.append(_text_of(entry, field, chat))
        except ValueError as error:
            raise ValueError(f"line {number} of {file} {error}") from error
    return separator.join(parts)


def _text_of(entry: Any, field: str | None, chat: Chat) -> str:
    """The text of a .jsonl line."""
    if isinstance(entry, dict):
        name = field or next((n for n in ("text", "messages") if n in entry), "text")
        if name not in entry:
            has = ", ".join(map(repr, entry)) or "nothing"
            raise ValueError(f"has no {name!r}, but {has}: name the entry that holds its text (--text-key, or field=)")
        entry = entry[name]
    if isinstance(entry, list) and entry and all(isinstance(m, dict) for m in entry):
        return chat([_message(m) for m in entry])
    if not isinstance(entry, str):
        raise ValueError(f"has no text, but {type(entry).__name__}: write strings, or objects with text or messages")
    return entry


def _message(said: dict[str, Any]) -> dict[str, str]:
    """One message of a chat as {"role", "content"}; of a content in parts, the parts that are text."""
    role, content = said.get("role"), said.get("content")
    if isinstance(content, list):
        content = "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"has a message with {', '.join(map(repr, said))}: each needs the strings 'role' and 'content'"
        )
    return {"role": role, "content": content}


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """The messages of a chat as one text without a template: "role: content", a line each."""
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def tokenize(text: str, vocab: int, tokenizer: Any = None) -> Int32[np.ndarray, " n"]:
    """The ids of a text, all at once: by a `tokenizers.Tokenizer`, or the bytes of UTF-8 where `vocab` is 256.

    Args:
      text: at least one character.
      vocab: the model's number of embeddings.
      tokenizer: as `jprune.checkpoint.load_tokenizer` reads it; its special tokens are added once, to the whole text.

    Raises:
      ValueError: empty text, no tokenizer for another vocabulary, or ids that the model has no embedding for.
    """
    if not text:
        raise ValueError("the text is empty: give at least one character")
    if tokenizer is None:
        if vocab != BYTES:
            raise ValueError(
                f"a model with a vocabulary of {vocab} needs its tokenizer (jprune.checkpoint.load_tokenizer); only "
                f"one of {BYTES} reads bytes"
            )
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
    return check_ids(np.asarray(tokenizer.encode(text).ids, np.int32), vocab)


def check_ids(ids: Integer[np.ndarray, ...], vocab: int) -> Int32[np.ndarray, ...]:
    """The ids as int32; raises ValueError if one of them is no row of the embedding, or there are none.

    JAX would clamp an id that is too large to the last embedding and say nothing.
    """
    if not ids.size:
        raise ValueError("there are no token ids: give some text")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"the text has the token id {low if low < 0 else high}, the model only 0 to {vocab - 1}: its tokenizer "
            "belongs to another model"
        )
    return ids.astype(np.int32)


def token_stream(
    path: str | Path,
    vocab: int,
    tokenizer: Any = None,
    *,
    field: str | None = None,
    separator: str = "\n",
    chat: Chat | None = None,
) -> Int32[np.ndarray, " n"]:
    """`tokenize` of `read_text`; raises what they raise."""
    return tokenize(read_text(path, field=field, separator=separator, chat=chat), vocab, tokenizer)


def sample_windows(
    stream: Integer[np.ndarray, " n"], n: int, t: int, seed: int = 0
) -> Int32[np.ndarray, "n_windows t"]:
    """`n` windows of `t` tokens at random starts, the same that CFSP, FLAP, Wanda and SparseGPT draw for this seed.

    Starts are uniform in [0, tokens - t - 1], from Python's own generator, and may overlap.

    Raises:
      ValueError: nothing is asked for, or the stream is shorter than t + 1 tokens.
    """
    if n < 1 or t < 1:
        raise ValueError(f"cannot draw {n} windows of {t} tokens: both must be at least 1")
    if len(stream) < t + 1:
        raise ValueError(
            f"the text has {len(stream)} tokens, windows of {t} need {t + 1}: give more text, or smaller t"
        )
    draw = random.Random(seed)
    starts = np.array([draw.randint(0, len(stream) - t - 1) for _ in range(n)])
    return np.asarray(stream)[starts[:, None] + np.arange(t)].astype(np.int32)


def windows(stream: Integer[np.ndarray, " n"], t: int, limit: int | None = None) -> Int32[np.ndarray, "n_windows t"]:
    """The stream cut into windows of `t` tokens, without the rest; with a limit that many, spread over all of them.

    Raises:
      ValueError: nothing is asked for, or the stream is shorter than one window.
    """
    if t < 1 or (limit is not None and limit < 1):
        raise ValueError(f"cannot cut windows of {t} tokens, {limit} of them: both must be at least 1")
    count = len(stream) // t
    if not count:
        raise ValueError(f"the text has {len(stream)} tokens, a window needs {t}: give more text, or smaller t")
    rows = np.arange(count) if limit is None or limit >= count else np.arange(limit) * count // limit
    return np.asarray(stream)[: count * t].reshape(count, t)[rows].astype(np.int32)
