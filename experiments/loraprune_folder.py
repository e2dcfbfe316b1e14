"""LoRAPrune's published recipe on a Hugging Face folder: trained, pruned, merged, sliced, written as a folder again.

    python -m experiments.loraprune_folder --folder DIR --text FILE --out DIR2

313 steps of 128 sequences of 512 tokens by default. It has been run on small folders only.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro
from rich.console import Console

import jprune
from jprune.checkpoint import PruningRecord, load_hf, load_tokenizer, save_hf
from jprune.checkpoint.layouts import LINEN_SCAN, kept_of_plan
from jprune.data.text import sample_windows, token_stream, windows
from jprune.language.lora import LoraConfig
from jprune.language.perplexity import perplexity
from jprune.methods.channels.loraprune.run import LoraPruneConfig, finalize, loraprune
from jprune.models import rebuild
from jprune.models.llama import Llama, unstack_layers
from jprune.training import TuningConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is pruned and how.

    Attributes:
      folder: the model. text: a text file, or a folder of them; a twentieth of it is held out. out: the folder to write.
      options: of LoRAPrune. tuning: of the adapters.
      batch, tokens: sequences of a step, and how long each is.
      evaluated: held-out windows.
    """

    folder: Path
    text: Path
    out: Path
    options: LoraPruneConfig = LoraPruneConfig(lora=LoraConfig(8, 16.0, 0.05))
    tuning: TuningConfig = TuningConfig(313, 1e-4, accumulate=64)
    batch: int = 128
    tokens: int = 512
    evaluated: int = 256


def main(s: Setting) -> None:
    """Prune the folder."""
    console, folder, out = Console(), s.folder, s.out
    config, params, metadata = load_hf(folder, scanned=True)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None  # bytes need none
    stream = token_stream(s.text, config.vocab, tokenizer)
    module = Llama(config, scanned=True, remat=True)
    n, t = s.batch, min(s.tokens, len(stream) // 4)
    graph = jprune.trace(module.apply, params, jnp.zeros((2, t), jnp.int32))
    held_out = windows(stream[-len(stream) // 20 :], min(t, len(stream) // 20), s.evaluated)
    trained = stream[: -len(stream) // 20]

    def batches(step: int) -> Any:
        return jnp.asarray(sample_windows(trained, n, t, step))

    console.print(f"dense: perplexity {perplexity(module.apply, params, held_out, 2):.3f}")
    got = loraprune(graph, params, batches, s.options, s.tuning, out=out / "run", resume=True,
                    save_every=20, progress=True, title="LoRAPrune")  # fmt: skip
    merged, keep = finalize(graph, params, got.lora, got.masks)
    kept = kept_of_plan(graph.plan(keep), LINEN_SCAN, config)
    small = unstack_layers(graph.compact(merged, graph.decide(keep, stacked="unstack")))
    pruned = rebuild(Llama(config), small)
    console.print(f"pruned: perplexity {perplexity(pruned.apply, small, held_out, 2):.3f}")
    said = PruningRecord("loraprune", target=s.options.sparsity, source=str(folder), dense=config, kept=kept)
    save_hf(small, pruned.config, out / "model", mode="hetero", record=said, hf_config=metadata["hf_config"],
            tokenizer_from=folder, overwrite=True)  # fmt: skip
    console.print(f"written to {out / 'model'}")


if __name__ == "__main__":
    main(tyro.cli(Setting, description=__doc__))
