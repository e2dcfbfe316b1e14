"""What choosing tokens costs beside what it saves: by count for LLaVA-1.5-7B, measured on a small LLaVA, and in PyTorch.

    python -m experiments.benchmarks.divprune_cost       # a quarter of an hour; PyTorch only where it is installed

Counted: the matrix of distances and the loop, over the MACs of the prefill without the dropped tokens. Measured: a
LLaVA whose decoder has eight layers of width 512 reads a prompt with one image (576 tokens) or five (2880, chosen together),
whole and pruned; and one layer of the 7B model's width reads 576 and 56 visual tokens, of which the model has thirty-two. A
small decoder is the hard case: choosing costs tokens / (12 x width x layers) of the prefill, 3 % at 2880 tokens here.

The PyTorch side follows the description of the authors' loop: all distances first, then for every token the columns of all
chosen ones are gathered again and their minimum taken, k^2 m reads where one running minimum needs k m.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians
from experiments.peers import peer
from jprune.methods.tokens.decoder_cost import true_macs
from jprune.methods.tokens.divprune import divprune_select, retained_count
from jprune.methods.tokens.llava_answer import VisualPruning, read_prompt
from jprune.models.llama import Block, context
from jprune.models.llama_config import llama_config
from jprune.models.llava import Llava, LlavaConfig
from jprune.models.vit_config import ViTBlock, ViTConfig

SEVEN = llama_config(32064, 4096, 11008, 32, 32)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      stream, ffn, depth, heads: of the small decoder.
      side: patches along an image.
      text: tokens of the prompt beside the images.
      images: of the prompts.
      ratios: of kept tokens.
      width: of the tokens chosen side by side, that of the 7B model.
      sizes: how many tokens are chosen from side by side.
    """

    stream: int = 512
    ffn: int = 1408
    depth: int = 8
    heads: int = 8
    side: int = 24
    text: int = 40
    images: tuple[int, ...] = (1, 5)
    ratios: tuple[float, ...] = (0.05, 0.098, 0.25)
    width: int = 4096
    sizes: tuple[int, ...] = (576, 2880)

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.side**2


def counted(setting: Setting) -> list[dict[str, Any]]:
    """Operations, two a MAC, of the choice beside those it saves in the 7B model."""
    out = []
    for m in setting.sizes:
        for r in setting.ratios:
            k = retained_count(m, r)
            choose = 2 * m * m * SEVEN.stream + 2 * k * m
            saved = 2 * (true_macs(SEVEN, setting.text, m) - true_macs(SEVEN, setting.text, m, k))
            out.append({"tokens": m, "kept": k, "choose": choose, "saved": saved, "share": choose / saved})
    return out


def small_llava(s: Setting) -> tuple[Llava, Any]:
    """Random weights; one block of a narrow tower, so that the decoder is what is timed."""
    vision = ViTConfig(2, 64, (ViTBlock(4, 16, 16, 128),), 0, fused=False, class_token=True, pre_norm=True, patch_bias=False,
                       head_bias=False, activation="quick_gelu", epsilon=1e-5, image=(2 * s.side, 2 * s.side))  # fmt: skip
    module = Llava(LlavaConfig(vision, llama_config(1024, s.stream, s.ffn, s.depth, s.heads), 1023, feature_layer=-1))
    ids, pixels = prompt(s, 1)
    return module, jax.jit(module.init)(jax.random.key(0), ids, pixels)


def prompt(s: Setting, images: int) -> tuple[Any, Any]:
    """(ids, pixels) of one row."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 1000, s.text)
    ids = np.concatenate([text[: s.text // 2], np.full(images * s.tokens, 1023), text[s.text // 2 :]])
    pixels = rng.normal(size=(1, images, 2 * s.side, 2 * s.side, 3))
    return jnp.asarray(ids[None], jnp.int32), jnp.asarray(pixels, jnp.float32)


def prefills(s: Setting, rounds: int) -> list[dict[str, Any]]:
    """Seconds of reading whole and pruned prompts, and of the choice alone."""
    module, variables = small_llava(s)
    out = []
    for images in s.images:
        ids, pixels = prompt(s, images)
        m = images * s.tokens

        def reader(pruning: VisualPruning | None, ids: Any = ids, pixels: Any = pixels) -> Callable[[], Any]:
            run = jax.jit(lambda v, ids, pixels: read_prompt(module, v, ids, pixels, pruning=pruning).logits)
            return functools.partial(run, variables, ids, pixels)

        @jax.jit
        def visual(v: Any, pixels: Any) -> Any:
            return module.apply(v, module.apply(v, pixels, method="features"), method="project")

        x = jnp.reshape(visual(variables, pixels), (m, -1))
        jobs = {"whole": reader(None)}
        kept = {r: retained_count(m, r) for r in s.ratios}
        for r, k in kept.items():
            jobs[f"pruned {r:g}"] = reader(VisualPruning(k, scope="sample"))
            jobs[f"choose {r:g}"] = functools.partial(divprune_select, x, k)
        times = in_turns(jobs, rounds)
        for r, k in kept.items():
            # what the choice costs, of what leaving out the tokens would save if it cost nothing
            shares = [
                c / (w - p + c)
                for w, p, c in zip(times["whole"], times[f"pruned {r:g}"], times[f"choose {r:g}"], strict=True)
            ]
            seconds = medians(times)
            out.append({"tokens": m, "kept": k, "whole": seconds["whole"], "pruned": seconds[f"pruned {r:g}"],
                        "choose": seconds[f"choose {r:g}"], "share": statistics.median(shares), "rounds": times})  # fmt: skip
    return out


def layer_of_seven(s: Setting, rounds: int) -> dict[str, Any]:
    """One layer of the 7B model's width, which has as many of them as its depth."""
    config = dataclasses.replace(
        SEVEN, ffn=SEVEN.ffn[:1], q_heads=SEVEN.q_heads[:1], kv_heads=SEVEN.kv_heads[:1], vocab=8
    )
    block = Block(config, 0)
    m, k = s.sizes[0], retained_count(s.sizes[0], 0.098)
    rng = np.random.default_rng(0)

    def stream(n: int) -> Any:
        return jnp.asarray(rng.standard_normal((1, n, config.stream), np.float32))

    shapes = jax.eval_shape(block.init, jax.random.key(0), stream(2), context(config, 2)[0])
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32) / 64), shapes)
    run: Any = jax.jit(lambda p, x: block.apply(p, x, context(config, x.shape[1])[0])[0])
    x = stream(m)[0]
    jobs = {
        "whole": functools.partial(run, params, stream(s.text + m)),
        "pruned": functools.partial(run, params, stream(s.text + k)),
        "choose": lambda: divprune_select(x, k),
    }
    times = in_turns(jobs, rounds)
    paired = zip(times["whole"], times["pruned"], times["choose"], strict=True)
    share = statistics.median(c / (SEVEN.depth * (w - p)) for w, p, c in paired)
    return {"tokens": m, "kept": k, "layers": SEVEN.depth, **medians(times), "share": share, "rounds": times}


class Theirs:
    """The choice in PyTorch, all chosen columns gathered again for every token."""

    def __init__(self, x: np.ndarray):
        self.torch = peer("torch")
        self.x = self.torch.from_numpy(np.array(x))

    def choose(self, k: int) -> list[int]:
        """k indices, the first the token whose nearest neighbour is farthest."""
        torch = self.torch
        with torch.inference_mode():
            unit = self.x / self.x.norm(dim=1, keepdim=True)
            apart = 1 - unit @ unit.T
            second = torch.topk(apart, 2, dim=0, largest=False).values[1]
            chosen = [int(second.argmax())]
            while len(chosen) < k:
                near = apart[:, torch.tensor(chosen)].min(dim=1).values
                chosen.append(int(near.argmax()))
        return chosen


def beside_torch(s: Setting, rounds: int) -> list[dict[str, Any]]:
    """Both sides on the same tokens."""
    out = []
    for m in s.sizes:
        x = np.random.default_rng(0).standard_normal((m, s.width), np.float32)
        theirs = Theirs(x)
        for r in s.ratios:
            k = retained_count(m, r)
            ours = functools.partial(divprune_select, jnp.asarray(x), k)
            times = in_turns({"ours": ours, "theirs": functools.partial(theirs.choose, k)}, rounds)
            same = sum(a == b for a, b in zip(ours().order.tolist(), theirs.choose(k), strict=True))
            faster = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
            out.append(
                {"tokens": m, "kept": k, **medians(times), "times_faster": faster, "equal": same, "rounds": times}
            )
    return out


def checks(r: dict[str, Any]) -> dict[str, bool]:
    """The targets."""
    out = {
        "by count the choice costs less than 2 % of what it saves in the 7B model": all(
            c["share"] < 0.02 for c in r["counted"]),
        "measured at the 7B model's width too": r["layer"]["share"] < 0.02,
        "pruned prompts are read faster, the choice included": all(p["pruned"] < p["whole"] for p in r["prefill"]),
    }  # fmt: skip
    if r["torch"] is not None:
        out["no slower than the loop that gathers again, in PyTorch"] = all(t["times_faster"] >= 1 for t in r["torch"])
    return out


def tables(r: dict[str, Any]) -> list[Table]:
    """Counted and measured shares; beside PyTorch."""
    shares = Table(title="the choice, of what the dropped tokens would cost")
    for column in ("", "tokens", "kept", "whole, s", "pruned, s", "choice, ms", "share"):
        shares.add_column(column)
    for c in r["counted"]:
        shares.add_row("7B, counted", str(c["tokens"]), str(c["kept"]), "", "", "", f"{c['share']:.3%}")
    layer = r["layer"]
    rows = [("7B, one layer", layer, 1e3), *(("small LLaVA", p, 1e3) for p in r["prefill"])]
    for name, p, ms in rows:
        cells = (f"{p['whole']:.2f}", f"{p['pruned']:.2f}", f"{ms * p['choose']:.1f}", f"{p['share']:.2%}")
        shares.add_row(name, str(p["tokens"]), str(p["kept"]), *cells)
    beside = Table(title="the choice alone")
    for column in ("tokens", "kept", "ours, ms", "PyTorch, ms", "times faster", "equal"):
        beside.add_column(column)
    for t in r["torch"] or ():
        cells = (f"{1e3 * t[n]:.1f}" for n in ("ours", "theirs"))
        beside.add_row(str(t["tokens"]), str(t["kept"]), *cells, f"{t['times_faster']:.2f}", f"{t['equal']}")
    return [shares, beside]


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="of every timing")] = 5,
    out: Path = RESULTS / "divprune-cost.json",
) -> None:
    """What choosing tokens costs, and what it saves."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: medians need at least one")
    console = Console()
    versions: dict[str, Any] = {}
    try:
        torch = peer("torch")
        versions = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    except ImportError as error:
        console.print(f"not beside PyTorch: {error}")
    results = {
        "counted": counted(setting),
        "layer": layer_of_seven(setting, rounds),
        "prefill": prefills(setting, rounds),
        "torch": beside_torch(setting, rounds) if versions else None,
    }
    verdict = checks(results)
    record.write(out, {
        "command": f"python -m experiments.benchmarks.divprune_cost --rounds {rounds}",
        "machine": record.machine() | versions,
        "note": DISTURBED,
        "setting": dataclasses.asdict(setting),
        "checks": verdict,
        "results": results,
    })  # fmt: skip
    for table in tables(results):
        Console(width=110 if not console.is_terminal else None).print(table)
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
