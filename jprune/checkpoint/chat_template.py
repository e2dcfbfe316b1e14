"""The chat template of a Hugging Face folder: what makes one text of the messages of a chat, as the model was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jprune.files.json_files import read_json


def load_chat_template(folder: str | Path, answer: bool = False) -> Callable[[Sequence[Mapping[str, str]]], str] | None:
    """messages ({"role", "content"}) -> text, or None where the folder has no template (chat_template.jinja, or an
    entry of tokenizer_config.json). The package jinja2 is needed once a chat is rendered.

    Args:
      folder: of the model.
      answer: the text goes on to where the model's answer begins.
    """
    folder = Path(folder)
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    said: dict[str, Any] = read_json(config) if config.is_file() else {}
    source = file.read_text(encoding="utf-8") if file.is_file() else said.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    special = {name: _token(said.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return lambda messages: _rendered(source, messages, special, answer)


def _token(said: Any) -> str:
    """A special token of tokenizer_config.json: a string, an object with its content, or nothing."""
    return str(said.get("content", "")) if isinstance(said, Mapping) else str(said or "")


def _rendered(source: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], answer: bool) -> str:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template is a stranger's program
    except ImportError as error:
        raise ImportError(f"{error}; chats need: python -m pip install jinja2") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source).render(messages=messages, add_generation_prompt=answer, **special)
    except TemplateError as error:
        raise ValueError(f"is a chat that the model's chat template refuses ({error})") from error
