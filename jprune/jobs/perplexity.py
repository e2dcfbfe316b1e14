"""How good and how fast a language model's folder is: perplexity on text, tokens a second, memory.

summary.json, report.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jprune.checkpoint import load_hf
from jprune.checkpoint.huggingface import read_config
from jprune.data.text import windows
from jprune.files.atomic import whole_folder
from jprune.graph import trace
from jprune.jobs.decoder_text import read_tokens
from jprune.jobs.outputs import write_report
from jprune.language.perplexity import perplexity, speed
from jprune.methods.contract import checked
from jprune.models.llama import Llama
from jprune.report import measure
from jprune.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """What is measured.

    Attributes:
      model: folder of a language model, or of a vision transformer
      evaluation: text file, or a folder of them, to measure perplexity on
      text_key: entry of a .jsonl line that holds its text, or its chat messages
      length: tokens of a window
      windows: at most so many of them
      batch_size: examples at a time
      dtype: to compute in, else as stored
    """

    model: str
    evaluation: str
    text_key: str | None = None
    length: int = 1024
    windows: int = 64
    batch_size: int = 4
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        checked(self, {
            "length": (self.length >= 2, "at least 2"),
            "windows": (self.windows >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
        })  # fmt: skip


def evaluate_text(options: PerplexityConfig, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Measure, write what came out, return what summary.json says.

    Raises:
      ValueError: a folder or a text that cannot be read, or less text than one window; `out` holds something else.
    """
    o, run = options, RunFolder(out, quiet)
    with run.claim(dataclasses.asdict(o), replaces="summary.json"):
        try:
            with run.shown():
                config = read_config(o.model)
                with run.phase("reading text"):
                    ids = read_tokens(o.model, config, o.evaluation, o.text_key)
                    if len(ids) < o.length:
                        raise ValueError(f"{o.evaluation} has {len(ids):,} tokens: give more text, or windows of at most "
                                         f"--length {len(ids)}")  # fmt: skip
                    text = windows(ids, o.length, o.windows)
                with run.phase("loading"):
                    config, params, _ = load_hf(o.model, dtype=o.dtype)
                return _measure(o, out, run, Llama(config), params, text)
        finally:
            run.release()


def _measure(o: PerplexityConfig, out: Path, run: RunFolder, module: Llama, params: Any, text: Any) -> dict[str, Any]:
    with run.phase("perplexity"):
        found = perplexity(module, params, text, o.batch_size, progress=run.bars)
    with run.phase("timing"):
        fast = speed(module, params, prompt=min(o.length, 128))
        _, peak = measure.compiled(module.apply, params, jnp.asarray(text[: o.batch_size]))
    cost = trace(module.apply, params, jax.ShapeDtypeStruct((2, o.length), jnp.int32)).cost()
    summary = {
        "options": dataclasses.asdict(o),
        "perplexity": found,
        "windows": len(text),
        "params": sum(int(x.size) for x in jax.tree.leaves(params)),
        "param_bytes": measure.tree_bytes(params),
        "peak_bytes": peak,
        "macs": int(cost.macs) // 2,
        "prefill": fast.prefill,
        "decode": fast.decode,
    }
    notes = [f"Perplexity on {len(text)} windows of {o.length} tokens of {o.evaluation}; timed on "
             f"{jax.devices()[0].device_kind}."]  # fmt: skip
    layers = [("layer", "MLP channels", "query heads", "key-value heads")] + [
        (str(i), *(f"{getattr(module.config, k)[i]:,}" for k in ("ffn", "q_heads", "kv_heads")))
        for i in range(module.config.depth)
    ]
    title = f"{Path(o.model).name}: perplexity"
    with whole_folder(out, overwrite=True) as folder:
        return write_report(run, title, rows(summary), dataclasses.asdict(o), [], notes, layers, summary, folder)


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table; its first row is the header."""
    s, mb = summary, 2**20
    return [
        ("", "measured"),
        ("perplexity", f"{s['perplexity']:.3f}"),
        ("parameters", f"{s['params']:,}"),
        ("MACs of a window", f"{s['macs']:,}"),
        ("size of the weights", f"{s['param_bytes'] / mb:,.1f} MiB"),
        ("memory of a batch", f"{s['peak_bytes'] / mb:,.1f} MiB"),
        ("prefill, tokens a second", f"{s['prefill']:,.0f}"),
        ("decoding, tokens a second", f"{s['decode']:,.1f}"),
    ]
