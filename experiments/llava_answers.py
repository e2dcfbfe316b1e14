"""Short answers of a LLaVA-1.5 with few visual tokens, for owners of its weights and of questions with pictures.

    python -m experiments.llava_answers --model llava-1.5-7b-hf --questions gqa.jsonl --images gqa/images

A line of the questions' file is {"image": file within the folder, "question": text, "answer": text}: GQA, POPE, OK-VQA,
ScienceQA and the like in that form; nothing is downloaded. Counted are answers that are the same word for word (lower case,
without punctuation and articles), and F1 of "yes" where all answers are yes or no, as POPE has it. Methods are compared at
equal numbers of tokens (`--ratio`, the paper's 0.098) and FastV and VTW at the decoder's equal cost too, by the paper's rule.
The program has been run on a small model with random weights only.
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import record
from experiments.benchmarks import RESULTS
from jprune.checkpoint.llava import LlavaFolder, load_llava
from jprune.methods.tokens.decoder_cost import kept_within, last_layer_within, paper_tmacs
from jprune.methods.tokens.divprune import retained_count
from jprune.methods.tokens.llava_answer import VisualPruning, answer

SHORT = "\nAnswer the question using a single word or phrase."


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def scores(said: list[str], wanted: list[str]) -> dict[str, float]:
    """{"exact": share of equal answers}, and "f1" of "yes" where all wanted ones are yes or no."""
    a, b = [plain(x) for x in said], [plain(x) for x in wanted]
    out = {"exact": float(np.mean([x == y for x, y in zip(a, b, strict=True)]))}
    if set(b) <= {"yes", "no"}:
        yes = [x.split(" ")[0] == "yes" for x in a]
        hits = sum(y and w == "yes" for y, w in zip(yes, b, strict=True))
        out["f1"] = 2 * hits / max(1, sum(yes) + b.count("yes"))
    return out


def prunings(folder: LlavaFolder, ratio: float, text: int) -> dict[str, VisualPruning | None]:
    """{name: what the decoder sees}: all, the methods at this share of tokens, those behind a layer at its cost too."""
    c = folder.module.config
    m = c.visual_tokens
    k = retained_count(m, ratio)
    out: dict[str, VisualPruning | None] = {
        "all": None,
        "divprune": VisualPruning(k),
        "divprune, unsorted": VisualPruning(k, order="selection"),
        "divprune, old positions": VisualPruning(k, positions="original"),
        "random": VisualPruning(k, "random"),
        "uniform_grid": VisualPruning(k, "uniform_grid"),
        "visionzip": VisualPruning(k, "visionzip"),
        "prumerge_plus": VisualPruning(k - 1, "prumerge_plus"),
    }
    layer = min(2, c.language.depth - 1)
    out["fastv, as many"] = VisualPruning(k, "fastv", layer=layer)
    cost = paper_tmacs(c.language, text, m, kept=k)
    try:
        same = kept_within(c.language, text, m, cost, layer)
    except ValueError:  # these layers alone cost more
        same = 0
    if same:
        out["fastv, same cost"] = VisualPruning(same, "fastv", layer=layer)
    if (last := last_layer_within(c.language, text, m, cost)) > 0:
        out["vtw, same cost"] = VisualPruning(0, "vtw", layer=last)
    return out


def load_questions(path: Path, most: int) -> list[dict[str, str]]:
    """Lines of the file; raises ValueError for one that is not of the form above."""
    found = []
    for i, line in enumerate(path.read_text().splitlines()):
        entry = json.loads(line)
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(k), str) for k in ("image", "question", "answer")
        ):
            raise ValueError(
                f"line {i + 1} of {path} is not {{'image': ..., 'question': ..., 'answer': ...}}, all text"
            )
        found.append(entry)
    if not found:
        raise ValueError(f"{path} has no questions")
    return found[:most] if most else found


def measure(folder: LlavaFolder, questions: list[dict[str, str]], images: Path, ratio: float, steps: int, suffix: str,
            bucket: int = 16) -> dict[str, Any]:  # fmt: skip
    """Scores of every method. Prompts are padded to multiples of `bucket`, so that few shapes are compiled."""
    module, variables, processor = folder
    stop = processor.tokenizer.token_to_id("</s>")
    texts = [processor.prompts([q["question"] + suffix])[0].shape[1] - module.config.visual_tokens for q in questions]
    methods = prunings(folder, ratio, round(sum(texts) / len(texts)))
    said: dict[str, list[str]] = {name: [] for name in methods}
    for q in track(questions, "questions", transient=True):
        with Image.open(images / q["image"]) as opened:
            pixels = processor.images([[opened.convert("RGB")]])
        ids, mask = processor.prompts([q["question"] + suffix])
        more = -ids.shape[1] % bucket
        ids, mask = (np.pad(a, ((0, 0), (more, 0))) for a in (ids, mask))
        for name, pruning in methods.items():
            made = answer(
                module, variables, ids, pixels, steps, mask, pruning=pruning, stop=stop, key=jax.random.key(0)
            )
            said[name].append(processor.tokenizer.decode(np.asarray(made)[0].tolist(), skip_special_tokens=True))
    wanted = [q["answer"] for q in questions]
    rows = {}
    for name, p in methods.items():
        m = module.config.visual_tokens
        cost = paper_tmacs(module.config.language, round(sum(texts) / len(texts)), m, layer=p.layer if p else 0,
                            kept=m if p is None else p.k)  # fmt: skip
        rows[name] = {"kept": m if p is None else p.k, "paper_tmacs": cost, **scores(said[name], wanted)}
    return {"questions": len(questions), "methods": rows}


def table(results: dict[str, Any]) -> Table:
    """Scores."""
    out = Table(title=f"{results['questions']:,} questions")
    for column in ("visual tokens", "kept", "TFLOPs, the paper's rule", "equal answers", "F1 of yes"):
        out.add_column(column)
    for name, r in results["methods"].items():
        out.add_row(
            name, str(r["kept"]), f"{r['paper_tmacs']:.4g}", f"{r['exact']:.2%}", f"{r['f1']:.3f}" if "f1" in r else ""
        )
    return out


def main(
    model: str,
    questions: Path,
    images: Path,
    ratio: float = 0.098,
    vision: Annotated[str | None, tyro.conf.arg(help="folder of CLIP, for weights without a vision tower")] = None,
    dtype: str | None = None,
    steps: Annotated[int, tyro.conf.arg(help="most tokens of an answer")] = 16,
    most: Annotated[int, tyro.conf.arg(help="so many questions only; 0: all")] = 0,
    suffix: Annotated[str, tyro.conf.arg(help="behind every question")] = SHORT,
    out: Path = RESULTS / "llava-answers.json",
) -> None:
    """Short answers with few visual tokens."""
    asked = load_questions(questions, most)
    results = measure(load_llava(model, vision=vision, dtype=dtype), asked, images, ratio, steps, suffix)
    said = f"--model {Path(model).name} --questions {questions.name} --ratio {ratio:g}"
    record.write(out, {
        "command": f"python -m experiments.llava_answers {said}",
        "machine": record.machine(), "results": results})  # fmt: skip
    console = Console()
    Console(width=110 if not console.is_terminal else None).print(table(results))
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
