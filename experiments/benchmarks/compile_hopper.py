"""Compile every Hopper kernel for every size that models have, by NVIDIA's compiler and without a GPU, and keep what it says.

    pip install 'jax[cuda13]'                                     # of the version of jax that is installed; 4.4 GB
    python -m experiments.benchmarks.compile_hopper               # about 10 minutes on two idle cores

Forward, both gradients and masses of blocks, in bfloat16 and float16, for heads of 64, 80, 96, 128 and 256 features, blocks of
64 and 128 tokens, without token rules and with all of them, at lengths from real models. Nothing is run: the table says what
each kernel takes of the chip, not how fast it is. Checked: everything compiles, no matrix instruction waits for the one
before, registers go where they are needed, and the kernels of the common sizes keep all they compute there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import record
from experiments.benchmarks import RESULTS
from pallas_kernels.block_score import block_scores, search_attention
from pallas_kernels.block_sparse_attention import KernelConfig, arg_specs, block_sparse_attention
from pallas_kernels.common import aot_hopper
from pallas_kernels.common.attention_specs import AttentionSpec

# Lengths differ, so that heads padded to the same size are compiled all the same.
SPECS = {spec.features: spec for spec in arg_specs.COMPILED}
SOURCES = {
    "grid, threads, shared_memory": "the call that launches the kernel, in the host code that XLA compiles",
    "registers, stack, spill_stores, spill_loads, serialized, fixed_registers": "ptxas, as XLA runs it",
    "matrix_instructions, copies": "counted in the PTX",
}


def programs(spec: AttentionSpec, rules: bool) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """{name: (function, shapes)}: attention with its gradients, a search, masses."""
    tokens, (q, k, v) = spec.tokens, spec.arrays
    blocks = {"block_q": spec.block_q, "block_k": spec.block_k, "impl": "mosaic_gpu"}

    def options(ids: Any) -> dict[str, Any]:
        return (
            {"causal": True, "soft_cap": 30.0, "q_segment_ids": ids, "kv_segment_ids": ids, "kv_len": tokens - 1}
            if rules
            else {}
        )

    def attention(mask: Any, ids: Any, q: Any, k: Any, v: Any) -> Any:
        attend = functools.partial(block_sparse_attention, mask=mask, impl="mosaic_gpu", **options(ids))
        out, back = jax.vjp(attend, q, k, v)
        return out, back(out)

    def search(ids: Any, q: Any, k: Any, v: Any) -> Any:
        return search_attention(q, k, v, config=KernelConfig(passes=1), **blocks, **options(ids))

    def masses(ids: Any, lse: Any, q: Any, k: Any) -> Any:
        return block_scores(q, k, lse, **blocks, **options(ids))

    return {
        "attention": (attention, (spec.mask(), spec.segments, q, k, v)),
        "search": (search, (spec.segments, q, k, v)),
        "masses": (masses, (spec.segments, spec.lse, q, k)),
    }


def compiled(chip: str, dtype: str, features: int, block: int, rules: bool) -> list[dict[str, Any]]:
    """What the compiler says of every kernel of one size."""
    out = []
    spec = dataclasses.replace(SPECS[features], dtype=dtype).with_blocks(block)
    for program, (fn, shapes) in programs(spec, rules).items():
        found = aot_hopper.compile_kernels(fn, chip, *shapes)
        if not found:
            raise AssertionError(f"{program} for {features} features compiled no kernel of its own")
        about = {"program": program, "dtype": dtype, "features": features, "block": block, "rules": rules}
        out += [about | k._asdict() for k in found]
    return out


def checks(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What is demanded."""
    common = [r for r in rows if r["features"] <= 128 and not r["rules"]]
    return {
        "every kernel fits a program's shared memory": all(r["shared_memory"] <= 232448 for r in rows),
        "no matrix instruction waits for the one before": not any(r["serialized"] for r in rows),
        "warpgroups that compute take registers from the one that copies": not any(r["fixed_registers"] for r in rows),
        "up to 128 features without rules nothing leaves the registers": not any(r["spill_stores"] for r in common),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The kernels in bfloat16."""
    out = Table(title="Hopper kernels as compiled, bfloat16: nothing was run")
    names = ["program", "kernel", "features", "block", "rules", "grid", "threads", "shared memory", "registers",
             "spilled bytes", "wgmma"]  # fmt: skip
    for name in names:
        out.add_column(name)
    for r in rows:
        if r["dtype"] == "bfloat16":
            out.add_row(r["program"], r["name"].removeprefix("block_"), str(r["features"]), str(r["block"]),
                        "all" if r["rules"] else "none", "x".join(map(str, r["grid"])), str(r["threads"]),
                        str(r["shared_memory"]), str(r["registers"]), str(r["spill_stores"]),
                        str(r["matrix_instructions"]))  # fmt: skip
    return out


def main(
    chip: Annotated[str, tyro.conf.arg(help="H100 or H200; both are compiled for by the same instructions")] = "H100",
    features: tuple[int, ...] = tuple(SPECS),
    dtypes: tuple[str, ...] = ("bfloat16", "float16"),
    blocks: tuple[int, ...] = (64, 128),
    out: Path = RESULTS / "compile-hopper.json",
) -> None:
    """Compile the kernels and write what the compiler says."""
    console = Console(width=150)
    if not aot_hopper.available():
        console.print(
            "skipped: the CUDA wheels are not installed (pip install 'jax[cuda13]', of the version of jax here)"
        )
        return
    aot_hopper.prepare()
    sizes = list(itertools.product(dtypes, features, blocks, (False, True)))
    rows = [row for size in track(sizes, console=console) for row in compiled(chip, *size)]
    record.write(out, {
        "command": "python -m experiments.benchmarks.compile_hopper",
        "machine": {"jax": jax.__version__, "compiled_for": f"{aot_hopper.CHIPS[chip][0]} (sm_90a)"},
        "note": "compiled, never run: no such chip was at hand",
        "sources": SOURCES,
        "checks": checks(rows),
        "results": rows,
    })  # fmt: skip
    console.print(table(rows))
    for what, holds in checks(rows).items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"{len(rows)} kernels for {aot_hopper.CHIPS[chip][0]} by jax {jax.__version__}; written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
