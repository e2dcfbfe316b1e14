"""Calibration of decoders of 7, 8 and 70 billion parameters, compiled for TPUs that nobody has to have.

    python -m experiments.benchmarks.language_scale          # needs the "aot" extra (libtpu); two minutes

`jprune.models.llama` in the shapes of Llama-2-7B and Llama-3-8B, bfloat16, one scan over stacked layers, never allocated:
traced, then the step that gathers the statistics of a batch is compiled by the TPU's own compiler for a mesh of data x
model devices. Of Llama-2-70B the step of a single layer is compiled for a single chip: `layerwise_stats` holds one layer
at a time. What a chip needs is the compiler's word; times would need the chip.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import jprune
from experiments import record
from experiments.benchmarks import RESULTS
from jprune.language.statistics import step_of
from jprune.models.llama import Llama, LlamaConfig, llama_config
from jprune.models.llama_blocks import pieces
from jprune.models.llama_placement import placement
from pallas_kernels.common import aot_tpu as aot

SHAPES = {
    "Llama-2-7B": llama_config(32000, 4096, 11008, 32, 32, eps=1e-5, dtype="bfloat16"),
    "Llama-3-8B": llama_config(128256, 4096, 14336, 32, 32, 8, eps=1e-5, dtype="bfloat16"),
}
LAYERWISE = {"Llama-2-70B": llama_config(32000, 8192, 28672, 80, 64, 8, eps=1e-5, dtype="bfloat16")}
CHIP = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}  # bytes of memory
BYTES = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips and how they are used.

    Attributes:
      topology: chip and grid.
      data, model: devices along the mesh's axes.
      windows, tokens: of one batch of calibration text, for the whole model.
      streams: windows at a time, layer by layer.
      all_windows: of the text, whose streams wait on the chip then.
    """

    topology: str = "v5e:4x4"
    data: int = 2
    model: int = 8
    windows: int = 32
    tokens: int = 1024
    streams: int = 4
    all_windows: int = 128


def whole(config: LlamaConfig, on: Slice) -> dict[str, Any]:
    """A step of the whole model: seconds to trace and to compile, and bytes and collectives of one chip."""
    mesh = aot.mesh(on.topology, ("data", "model"), (on.data, on.model))
    module = Llama(config, scanned=True)
    ids = jax.ShapeDtypeStruct((on.windows, on.tokens), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)
    place = placement(mesh)
    params = aot.abstract(shapes, mesh, lambda path, leaf: place(path, leaf).spec)
    batch = jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))
    return compiled(module.apply, shapes, ids, mesh, params, batch)


def layerwise(config: LlamaConfig, on: Slice) -> dict[str, Any]:
    """A step of one layer on one chip, which also gives the stream behind it; with the weights of the whole model."""
    chips = aot.mesh(on.topology, ("data", "model"), (on.data, on.model)).devices
    mesh = Mesh(chips.ravel()[:1], ("data",))
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    _, blocks, layers = pieces(config, shapes)
    stream = jax.ShapeDtypeStruct((on.streams, on.tokens, config.stream), jnp.dtype(config.dtype))
    out = compiled(
        blocks[0], layers[0], stream, mesh, aot.abstract(layers[0], mesh), aot.abstract(stream, mesh), outputs=True
    )
    waiting = on.all_windows * on.tokens * config.stream * stream.dtype.itemsize
    return out | {"params": count(shapes), "weights_bytes": size(shapes), "streams_bytes": waiting}


def compiled(
    fn: Any, shapes: Any, x: Any, mesh: Mesh, params: Any, batch: Any, outputs: bool = False
) -> dict[str, Any]:
    """What the compiler says of the calibration step of fn(params, x)."""
    clock = [time.perf_counter()]
    graph = jprune.trace(fn, shapes, x)
    run, states = step_of(graph)
    clock.append(time.perf_counter())
    sums = aot.abstract(jax.eval_shape(lambda: states), mesh)
    out = aot.compile_for(lambda *args: run(*args) if outputs else run(*args)[1], sums, params, batch, donate_argnums=0)
    clock.append(time.perf_counter())
    return {
        "params": count(shapes),
        "weights_bytes": size(shapes),
        "chip_bytes": {"arguments": out.argument, "output": out.output, "temporary": out.temporary},
        "statistics_bytes": size(states),
        "collectives": out.collectives(),
        "gathered_bytes": gathered(out.text),
        "seconds": {"trace": clock[1] - clock[0], "compile": clock[2] - clock[1]},
    }


def count(tree: Any) -> int:
    """Numbers in a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Bytes of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gathered(text: str) -> int:
    """Bytes of the largest array that a schedule gathers or exchanges; KeyError for a type not in BYTES."""
    lines = re.findall(r"= (.*?)\b(?:all-gather|all-to-all)(?:-start)?\(", text)
    found = [re.findall(r"(\w+)\[([\d,]*)\]", line) for line in lines]
    return max(
        (BYTES[t] * math.prod(int(n) for n in dims.split(",") if n) for row in found for t, dims in row), default=0
    )


def checks(results: dict[str, Any], on: Slice) -> dict[str, bool]:
    """The targets: it fits, the weights stay divided, and nothing but sums and streams travels."""
    out = {}
    memory = CHIP[on.topology.split(":")[0]]
    for name, r in results.items():
        out[f"{name}: fits a chip"] = sum(r["chip_bytes"].values()) + r.get("streams_bytes", 0) < 0.8 * memory
        if "streams_bytes" not in r:
            out[f"{name}: weights stay divided"] = r["chip_bytes"]["arguments"] < 2 * r["weights_bytes"] / on.model
            out[f"{name}: only statistics are gathered"] = r["gathered_bytes"] <= r["statistics_bytes"]
    return out


def main(on: Slice = Slice(), out: Path = RESULTS / "language-scale.json") -> None:
    """Compile the calibration step of both shapes for a slice of TPUs."""
    aot.prepare()
    results = {name: whole(config, on) for name, config in SHAPES.items()}
    results |= {name: layerwise(config, on) for name, config in LAYERWISE.items()}
    verdict = checks(results, on)
    record.write(out, {
        "command": "python -m experiments.benchmarks.language_scale",
        "machine": record.machine(),
        "setting": dataclasses.asdict(on),
        "checks": verdict,
        "results": results,
    })  # fmt: skip
    table = Table(title=f"one calibration step on {on.topology}; the whole model {on.data} data x {on.model} model")
    for column in ("model", "weights GiB", "a chip: arguments", "temporary", "streams", "collectives", "seconds"):
        table.add_column(column)
    for name, r in results.items():
        sizes = (
            r["weights_bytes"],
            *(r["chip_bytes"][k] for k in ("arguments", "temporary")),
            r.get("streams_bytes", 0),
        )
        said = ", ".join(f"{n} {k}" for k, n in r["collectives"].items())
        table.add_row(name, *(f"{x / 2**30:.2f}" for x in sizes), said or "none", f"{sum(r['seconds'].values()):.0f}")
    console = Console()
    console.print(table)
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
