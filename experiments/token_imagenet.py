"""Zero-TPrune's published schedules and other reducers on ImageNet, for owners of the pictures and of DeiT's weights.

    python -m experiments.token_imagenet --model deit_small --data imagenet/val

`--model` is a folder or file that `jprune eval` reads, `--data` a folder with a folder for each class; nothing is downloaded. For
DeiT-T, -S and -B the schedules whose accuracy the authors have published are run beside it (their earlier scores, and the
paper's ablation at 3.08 GFLOPs, whose exact votes are not public); then every method at `--fractions` of the blocks'
MACs. The program has been run on small folders of this format only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import record
from experiments.benchmarks import RESULTS
from jprune.checkpoint.vision import load_vision
from jprune.jobs.vision import batches, pictures_of
from jprune.methods.tokens.cost import count_macs, dims_of
from jprune.methods.tokens.reducers_by_name import METHODS, reducer_for
from jprune.methods.tokens.zero_tprune import PRESETS
from jprune.models.token_hook import TokenReducer

SIZES = {192: "tiny", 384: "small", 768: "base"}
WHOLE = {"tiny": 72.136, "small": 79.826, "base": 81.794}  # top-1 of all tokens, as the authors measured it
PUBLISHED = {"proto-T": 70.356, "proto-T6": 68.720, "proto-S": 79.340, "proto-S-hard": 59.390, "proto-B": 81.158,
             "table-3.08": 79.4}  # fmt: skip


def reducers(
    size: str | None, fractions: tuple[float, ...], methods: tuple[str, ...], dims: Any
) -> dict[str, TokenReducer | None]:
    """{name: reducer}: all tokens, the presets of this size, every method at every fraction."""
    out: dict[str, TokenReducer | None] = {"all tokens": None}
    out |= {name: reducer for name, (of, reducer) in PRESETS.items() if of == size and dims.patches == 196}
    for f in fractions:
        out |= {f"{name} {f:g}": reducer_for(name, f, dims) for name in methods}
    return out


def measure(model: str, data: str, fractions: tuple[float, ...], methods: tuple[str, ...], batch: int, images: int,
            heads: int | None) -> dict[str, Any]:  # fmt: skip
    """Top-1 accuracy and MACs of every reducer."""
    vision = load_vision(model, heads=heads)
    folder, labelled, note = pictures_of(data, vision)
    if not labelled:
        raise ValueError(f"accuracies need labels. {note}")
    side = vision.preprocess.size
    dims = dims_of(vision.module.config, (side, side, 3))
    size = SIZES.get(dims.width) if dims.depth == 12 else None
    chosen = np.arange(len(folder))
    if images and images < len(folder):
        chosen = np.sort(np.random.default_rng(0).choice(chosen, images, replace=False))
    key, programs = jax.random.key(0), {}

    def program(reducer: TokenReducer | None) -> Any:
        def top(v: Any, x: Any) -> Any:
            logits: Any = vision.module.apply(v, x, reducer=reducer, key=key)
            return logits.argmax(-1)

        return jax.jit(top)

    for name, reducer in reducers(size, fractions, methods, dims).items():
        programs[name] = reducer, program(reducer)
    right = dict.fromkeys(programs, 0)
    labels = folder.labels[chosen]
    for k, (x, n) in enumerate(
        track(batches(folder, chosen, batch), "batches", -(-len(chosen) // batch), transient=True)
    ):
        wanted = labels[k * batch : k * batch + n]
        for name, (_, run) in programs.items():
            right[name] += int((np.asarray(run(vision.variables, jnp.asarray(x)))[:n] == wanted).sum())
    rows = {}
    for name, (reducer, _) in programs.items():
        cost = count_macs(reducer or TokenReducer(), dims)
        published = WHOLE.get(size or "") if name == "all tokens" else PUBLISHED.get(name)
        rows[name] = {
            "top1": 100 * right[name] / len(chosen),
            "gflops_blocks": cost["blocks"] / 1e9,
            "gflops_total": cost["total"] / 1e9,
            "choosing": cost["overhead"] / 1e9,
            "published": published,
        }
    return {"images": len(chosen), "methods": rows}


def table(results: dict[str, Any]) -> Table:
    """Accuracies."""
    out = Table(title=f"top-1 accuracy of {results['images']:,} pictures")
    for column in ("tokens", "GFLOPs, blocks", "GFLOPs, all", "choosing", "top-1, %", "published"):
        out.add_column(column)
    for name, r in results["methods"].items():
        out.add_row(name, f"{r['gflops_blocks']:.3f}", f"{r['gflops_total']:.3f}", f"{r['choosing']:.4f}", f"{r['top1']:.2f}",
                    "" if r["published"] is None else f"{r['published']:.2f}")  # fmt: skip
    return out


def main(
    model: str,
    data: str,
    fractions: tuple[float, ...] = (0.87, 0.65, 0.55),
    methods: tuple[str, ...] = tuple(METHODS),
    batch: int = 128,
    images: Annotated[int, tyro.conf.arg(help="at most so many pictures; 0: all")] = 0,
    heads: Annotated[int | None, tyro.conf.arg(help="attention heads, where the files do not say")] = None,
    out: Path = RESULTS / "token-imagenet.json",
) -> None:
    """Token reducers on a folder of pictures, beside the published numbers."""
    results = measure(model, data, fractions, methods, batch, images, heads)
    record.write(out, {
        "command": f"python -m experiments.token_imagenet --model {Path(model).name} --data {Path(data).name}",
        "machine": record.machine(), "results": results})  # fmt: skip
    console = Console()
    Console(width=110 if not console.is_terminal else None).print(table(results))
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
