"""A language model's folder continues a prompt: the quick look at whether a pruned model still speaks."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jprune.checkpoint import load_hf, load_tokenizer
from jprune.checkpoint.chat_template import load_chat_template
from jprune.checkpoint.huggingface import read_config
from jprune.data.text import BYTES, tokenize
from jprune.methods.contract import checked
from jprune.models.decoding import generate
from jprune.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """One prompt.

    Attributes:
      model: folder of a language model
      prompt: the text to continue
      chat: put the prompt as a user's message, by the folder's chat template
      steps: most tokens of the answer
      temperature: 0: the likeliest token; else tokens are drawn, the more evenly the higher
      dtype: to compute in, else as stored
      seed: of what is drawn
    """

    model: str
    prompt: str
    chat: bool = False
    steps: int = 64
    temperature: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self, {
            "prompt": (bool(self.prompt), "a text of at least one character"),
            "steps": (self.steps >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
        })  # fmt: skip


def continue_prompt(options: GenerateConfig) -> dict[str, Any]:
    """{"text": the answer, "tokens": how many, "tokens_per_second": compilation left out}.

    Raises:
      ValueError: a folder that cannot be read, or one without a chat template where one is asked for.
    """
    o = options
    config = read_config(o.model)
    tokenizer: Any = None
    if config.vocab != BYTES or (Path(o.model) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(o.model)
    prompt = o.prompt
    if o.chat:
        template = load_chat_template(o.model, answer=True)
        if template is None:
            raise ValueError(f"{o.model} has no chat template: leave --chat out")
        prompt = template([{"role": "user", "content": o.prompt}])
    ids = jnp.asarray(tokenize(prompt, config.vocab, tokenizer))[None]
    config, params, source = load_hf(o.model, dtype=o.dtype)
    module = Llama(config)
    stop = _stop(source["hf_config"])

    def answer() -> np.ndarray:
        whole = generate(module, params, ids, o.steps, temperature=o.temperature, key=jax.random.key(o.seed), stop=stop)
        return np.asarray(whole)[0, ids.shape[1] :]

    made = answer()
    start = time.perf_counter()
    answer()
    seconds = time.perf_counter() - start
    if stop is not None and (ends := np.flatnonzero(made == stop)).size:
        made = made[: ends[0]]
    text = (
        bytes(made.astype(np.uint8)).decode(errors="replace") if tokenizer is None else tokenizer.decode(made.tolist())
    )
    return {"text": text, "tokens": len(made), "tokens_per_second": o.steps / seconds}


def _stop(config: Any) -> int | None:
    """The token that ends an answer."""
    said = config.get("eos_token_id")
    return said[0] if isinstance(said, list) and said else said if isinstance(said, int) else None
