"""One question about a picture, answered by a LLaVA that reads all visual tokens and by one that reads few.

answer.json    both answers, what was kept, times and counts
kept.png       the picture as the model sees it, with the visual tokens that were kept

What is timed is the reading of the prompt, tower and projector included: that is what fewer tokens save. Once the caches are
there, every further word takes less time too, which is not counted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jprune.checkpoint.llava import load_llava
from jprune.data.images import read_image
from jprune.files.atomic import whole_folder, write_json
from jprune.methods.tokens.decoder_cost import true_macs
from jprune.methods.tokens.divprune import retained_count
from jprune.methods.tokens.llava_answer import VisualPruning, answer, read_prompt
from jprune.report import measure
from jprune.report.patches import Shown, kept_patches
from jprune.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """One question.

    Attributes:
      model: folder of a LLaVA-1.5, with tokenizer.json
      image: file of a picture
      question: what is asked about it
      tokens: which visual tokens stay; see `jprune list`
      keep: share of the visual tokens to KEEP
      count: how many of them stay, in place of --keep
      layer: drop them behind so many layers of the decoder (fastv, vtw, divprune); 0: before it
      order: of the tokens that stay, as in the picture or as they were chosen
      positions: numbered anew, or as they were
      vision: folder of CLIP, for weights without a vision tower
      steps: most tokens of an answer
      dtype: to compute in, else as stored
      seed: of what is drawn
    """

    model: str
    image: str
    question: str = "What is in this picture?"
    tokens: str = "divprune"
    keep: float = 0.098
    count: int | None = None
    layer: int = 0
    order: Literal["raster", "selection"] = "raster"
    positions: Literal["packed", "original"] = "packed"
    vision: str | None = None
    steps: int = 64
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0


def chat(options: ChatConfig, out: Path, rounds: int = 5, quiet: bool = False) -> dict[str, Any]:
    """Answer with all and with few visual tokens, write what came out, return what answer.json says.

    Raises:
      ValueError: a model, picture or options that do not go together; `out` holds something else.
    """
    run = RunFolder(out, quiet)
    with run.claim(dataclasses.asdict(options), replaces="answer.json"):
        try:
            with run.shown():
                return _chat(options, out, rounds, run)
        finally:
            run.release()


def _chat(o: ChatConfig, out: Path, rounds: int, run: RunFolder) -> dict[str, Any]:
    picture = read_image(o.image)
    with run.phase("loading"):
        module, variables, processor = load_llava(o.model, vision=o.vision, dtype=o.dtype)
    m = module.config.visual_tokens
    k = 0 if o.tokens == "vtw" else retained_count(m, o.keep) if o.count is None else o.count
    if k > m:
        raise ValueError(f"count is {k}: a picture has {m} visual tokens")
    pruning = VisualPruning(k, o.tokens, o.layer, o.order, o.positions)
    images = processor.images([[picture]])
    ids, mask = processor.prompts([o.question])
    key = jax.random.key(o.seed)
    stop = processor.tokenizer.token_to_id("</s>")

    texts, programs = [], {}
    task = run.bars.add_task("answering", total=2)
    for name, p in (("all", None), ("reduced", pruning)):
        made = np.asarray(answer(module, variables, ids, images, o.steps, mask, pruning=p, stop=stop, key=key))[0]
        texts.append(processor.tokenizer.decode(made.tolist(), skip_special_tokens=True).strip())
        read = jax.jit(lambda v, i, x, a, p=p: read_prompt(module, v, i, x, a, pruning=p, key=key))
        programs[name] = (read, (variables, ids, images, mask))
        run.bars.update(task, advance=1)
    with run.phase("timing"):
        ms = measure.interleaved(programs, rounds)
    text = ids.shape[1] - m
    language = module.config.language
    read, arguments = programs["reduced"]
    kept = np.asarray(read(*arguments).prompt.chosen)[0, 0]
    kept = np.sort(kept[kept < m])
    summary = {
        "options": dataclasses.asdict(o),
        "answers": {"all": texts[0], "reduced": texts[1]},
        "visual_tokens": m,
        "kept": k,
        "kept_tokens": kept.tolist(),
        "prompt_tokens": text + m,
        "milliseconds": ms,
        "tmacs": {"all": true_macs(language, text, m) / 1e12,
                   "reduced": true_macs(language, text, m, k, o.layer) / 1e12},
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    with whole_folder(out, overwrite=True) as folder:
        pre = processor.preprocess
        pixels = images[0, 0] * (255 * np.array(pre.std)) + 255 * np.array(pre.mean)
        side = int(m**0.5)
        patches = kept - (m - side * side)  # a class token among the visual tokens comes first
        title = f"{Path(o.image).name}: {m} visual tokens"
        where = f", behind layer {o.layer}" if o.layer else ""
        shown = Shown(pixels.clip(0, 255).round().astype(np.uint8), (side, side), title,
                      ((f"{o.tokens}: {k}{where}", patches),))  # fmt: skip
        kept_patches(folder / "kept.png", [shown])
        write_json(folder / "answer.json", summary)
    return summary


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table; its first row is the header."""
    ms, cost = summary["milliseconds"], summary["tmacs"]
    m, k = summary["visual_tokens"], summary["kept"]
    return [
        ("", "all visual tokens", "reduced", "change"),
        ("visual tokens", str(m), str(k), f"{k / m:.3f}x"),
        ("TMACs of the decoder's reading", *(f"{cost[n]:.4g}" for n in ("all", "reduced")),
         f"{cost['reduced'] / cost['all']:.3f}x"),
        ("reading the prompt, ms", *(f"{ms[n]:.1f}" for n in ("all", "reduced")), f"{ms['reduced'] / ms['all']:.2f}x"),
    ]  # fmt: skip
