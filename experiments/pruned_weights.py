"""A language model whose single weights are pruned in several ways, and its perplexity on text that was held back."""

from __future__ import annotations

import dataclasses
import html.parser
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import Run
from jprune.checkpoint import load_hf, load_tokenizer
from jprune.data.text import sample_windows, token_stream, windows
from jprune.graph import trace
from jprune.importance.at_init import weight_magnitude
from jprune.language.perplexity import next_token_loss, perplexity
from jprune.methods.weights.icbs.steps import ICBSConfig, initial, orders_of, schedule, step
from jprune.methods.weights.one_shot import layer_by_layer, magnitude, prunable, sparsegpt, wanda
from jprune.models.llama import Llama
from jprune.models.llama_blocks import pieces
from jprune.models.llama_trees import stack_layers
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import apply, density

ONE_SHOT = {"magnitude": magnitude, "Wanda": wanda, "SparseGPT": sparsegpt}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is pruned, on what, and how long iCBS looks.

    Attributes:
      model: folder of the language model
      text: file, or folder of HTML pages
      length: tokens of a window
      calibration: windows of calibration
      measured: windows of held-back text
      sparsities: shares of the weights removed
      look: steps of iCBS after which perplexity is measured
      icbs: its settings
    """

    model: Path | None = None
    text: Path | None = None
    length: int = 128
    calibration: int = 32
    measured: int = 24
    sparsities: tuple[float, ...] = (0.5, 0.7)
    look: tuple[int, ...] = (1, 4, 8)
    icbs: ICBSConfig = ICBSConfig(block_size=4096, parts_per_step=0, solver="descent", samples=8, fix_pruned=0.0,
                                  fix_kept=0.0)  # fmt: skip


class _Text(html.parser.HTMLParser):
    """The text of a page, a line per paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.out: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "head")
        if tag in ("p", "div", "li", "pre", "h1", "h2", "h3"):
            self.out.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.out.append(data)


def text_file(path: Path, work: Path | None) -> Path:
    """The file itself, or one made of all HTML pages of a folder, in the order of their names."""
    if not path.is_dir():
        return path
    out = (work or Path(tempfile.mkdtemp())) / "text.txt"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for page in sorted(path.glob("*.html")):
            reader = _Text()
            reader.feed(page.read_text())
            lines = (" ".join(line.split()) for line in "".join(reader.out).splitlines())
            file.write("\n".join(line for line in lines if line) + "\n")
    return out


class Decoder:
    """What the rows of one seed share."""

    def __init__(self, s: Setting, run: Run):
        if s.model is None or s.text is None:
            raise ValueError("give --model, a language model's folder, and --text, what it is to read")
        self.s, self.seed = s, run.seed
        self.config, loose, _ = load_hf(s.model, dtype="float32")
        self.module, self.loose, self.params = Llama(self.config, scanned=True), loose, stack_layers(loose)
        stream = token_stream(str(text_file(s.text, run.work)), self.config.vocab, load_tokenizer(str(s.model)))
        self.train, test = np.split(stream, [len(stream) // 2])
        self.calibration = sample_windows(self.train, s.calibration, s.length, run.seed)
        self.held = windows(test, s.length, s.measured)
        ids = jax.ShapeDtypeStruct((2, s.length), jnp.int32)
        self.graph = trace(self.module.apply, self.params, ids)
        self.leaves = prunable(self.graph)
        self.kept: dict[str, dict[str, Any]] = {}

    def measured(self, params: Any, masks: Mapping[str, Any], seconds: float, **more: Any) -> dict[str, Any]:
        """A row's numbers."""
        return {"perplexity": perplexity(self.module, params, self.held, 8), "seconds": seconds,
                "density": density(masks).total if masks else 1.0, **more}  # fmt: skip

    def dense(self) -> dict[str, Any]:
        """The model as it is."""
        return self.measured(self.params, {}, 0.0, tokens=int(self.held.size), weights=sum(
            int(np.prod(self.graph.leaves[p].shape)) for p in self.leaves))  # fmt: skip

    def one_shot(self, name: str, sparsity: float | None, pattern: str) -> tuple[Any, dict[str, Any]]:
        """(parameters, masks) of the stacked tree."""
        batches = [self.calibration[i : i + 8] for i in range(0, len(self.calibration), 8)]
        found = layer_by_layer(ONE_SHOT[name], pieces(self.config, self.loose), batches, sparsity, pattern)
        masks = {p: jnp.stack([f.masks[p.split("layers/")[1]] for f in found]) for p in self.leaves}
        layers = jax.tree.map(lambda *x: jnp.stack(x), *(f.params for f in found))
        return {"params": {**self.params["params"], "layers": layers}}, masks

    def row(self, name: str, sparsity: float | None, pattern: str = "unstructured") -> dict[str, Any]:
        """One method in one shot."""
        start = time.monotonic()
        params, masks = self.one_shot(name, sparsity, pattern)
        if name == "Wanda":
            self.kept[f"{sparsity}"] = masks
        return self.measured(params, masks, time.monotonic() - start)

    def losses(self, params: Any, ids: Any) -> Any:
        """Mean loss of every window."""
        return next_token_loss(jnp.asarray(self.module.apply(params, ids)), ids)

    def icbs(self, sparsity: float) -> dict[str, Any]:
        """Step after step from Wanda's mask; seconds are those of the steps."""
        c = dataclasses.replace(self.s.icbs, steps=max(self.s.look))
        masks = self.kept.get(f"{sparsity}") or self.one_shot("Wanda", sparsity, "unstructured")[1]
        orders = orders_of(self.params, self.leaves, weight_matrices(self.graph, self.leaves))
        state = initial(weight_magnitude(self.params, self.leaves), masks, c, orders)
        losses, out, seconds = self.losses, {}, 0.0
        for k, parts in enumerate(schedule(orders, c.steps, c.parts_per_step, self.seed), 1):
            start = time.monotonic()
            batch = jnp.asarray(sample_windows(self.train, c.samples, self.s.length, 1000 * (self.seed + 1) + k))
            state, info = step(jax.random.key(k), losses, self.params, state, parts, batch, c, orders)
            flips = sum(int(f.sum()) for f in jax.block_until_ready(info.flips).values())
            seconds += time.monotonic() - start
            if k in self.s.look:
                now = apply(self.params, state.masks)
                out[f"iCBS, {k} steps"] = self.measured(now, state.masks, seconds, flips=flips, loss=float(info.loss))
        return out
