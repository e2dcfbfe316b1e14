"""What the inner loops of attention and of experts cost on TPUs, counted in the compiler's own schedule: no chip, no noise.

    python -m experiments.benchmarks.tpu_schedule          # needs the "aot" extra (libtpu); two minutes

Every kernel is compiled for v5e, v5p and v6e, and the instruction bundles of one turn of its innermost loop are counted (of
experts: of one step of the grid), on the path where every pair of tokens counts. A bundle is at least one cycle. Beside them
stands what the matrix units need: a product (m, k) x (k, n) is ceil(k / size) * min(m * ceil(n / size), n * ceil(m / size)) rows
through a unit of size x size numbers, whichever operand it holds, divided by the units of a core and the rows that each takes in
a cycle (1, of 256 columns 2: published operations a second / (2 * units * size^2) is that many times the clock of 1.5 GHz, 1.75
and 1.75). A loop of as few bundles as that keeps the units busy. That is an estimate: waits for memory are not in it, and the
bundles of v5 issue products somewhat faster than units take them (the line "product alone" shows by how much).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.common import aot_tpu as aot

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOKENS = 16384  # longer sequences compile longer, to the same loops within 2 %
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
BUNDLE = re.compile(r"^\s*(?:0x([0-9a-f]+)|0)\s+(?:[A-Z]{2})?\s*:\s?([> ]*)\{")


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Bundles in a row at one depth of loops: how many, and how many instructions each unit gets of them."""

    depth: int
    bundles: int
    uses: dict[str, int]


def stretches(bundles: str, utilization: str) -> list[Stretch]:
    """A kernel's final bundles, cut where the depth of loops changes or a branch lies between.

    Args:
      bundles: text of its `final_bundles` dump. utilization: of its `final_hlo-static-per-bundle-utilization` dump.

    Raises:
      ValueError: the two do not belong together, or have another form than is known here.
    """
    names = re.search(r"^MXU,.*$", utilization, re.M)
    used = [list(map(int, line.split())) for line in utilization.partition("== UTILIZATION:")[2].split("\n") if line]
    lines = [(m[2].count(">"), line[m.end() :]) for line in bundles.split("\n") if (m := BUNDLE.match(line))]
    if names is None or tuple(names[0].split(", ")) != UNITS or len(used) != len(lines):
        raise ValueError(f"{len(lines)} bundles and uses of {len(used)}: this compiler writes another form of schedule")
    out: list[Stretch] = []
    begin = 0
    for n in range(1, len(lines) + 1):
        if n == len(lines) or lines[n][0] != lines[begin][0] or "sbr.rel" in lines[n - 1][1]:
            uses = {name: sum(row[i] for row in used[begin:n]) for i, name in enumerate(UNITS)}
            out.append(Stretch(lines[begin][0], n - begin, uses))
            begin = n
    return out


def turn(found: Sequence[Stretch]) -> dict[str, Any]:
    """One turn of the innermost loop that multiplies: bundles, those of the products' stretch, its uses.

    Where a step has a path with masks and one without, the shorter counts, and the other is told as `masked`.
    """
    multiplying = [s for s in found if s.uses["MXU"]]
    deepest = max(s.depth for s in multiplying)
    paths = [s for s in multiplying if s.depth == deepest]
    plain = min(paths, key=lambda s: s.bundles)
    rest = sum(s.bundles for s in found if s.depth == deepest and s not in paths)
    masked = max(s.bundles for s in paths)
    return {
        "bundles": plain.bundles + rest,
        "masked": masked + rest if len(paths) > 1 else None,
        "uses": plain.uses,
        "all": sum(s.bundles for s in found),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A program in one shape; for each kernel in it a title, its name, and the products (m, k, n) of one turn."""

    run: Callable[..., Any]
    shapes: tuple[Any, ...]
    kernels: tuple[tuple[str, str, tuple[tuple[int, int, int], ...]], ...]


def cases(block: int, features: int) -> list[Case]:
    """Every kernel for a head of the model that has heads of so many features, over TOKENS and a quarter of the blocks."""
    import jax

    from pallas_kernels.block_score import search_attention, tpu, tpu_search
    from pallas_kernels.block_sparse_attention import BlockMask, KernelConfig, arg_specs, block_sparse_attention
    from pallas_kernels.common.attention_problem import Static
    from pallas_kernels.common.tpu import group_of

    (spec,) = (s for s in arg_specs.COMPILED if s.features == features)
    spec = dataclasses.replace(spec.of_one_head().with_blocks(block), tokens=TOKENS, kept=0.25)
    x, mask = spec.arrays[0], spec.mask(spec.width)
    static = Static(1.0, None, block, block)
    step = group_of(None, spec.width, block) * block

    def gradients(**options: Any) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any, m: BlockMask) -> Any:
            config = KernelConfig(**options)
            return jax.vjp(lambda *a: block_sparse_attention(*a, m, impl="tpu", config=config), q, k, v)[1](q)

        return run

    def search(passes: int) -> Callable[..., Any]:
        options = {"block_q": block, "block_k": block, "impl": "tpu", "config": KernelConfig(passes=passes)}
        return lambda q, k, v: search_attention(q, k, v, **options)

    out = []
    for together, resident in ((1, True), (256 // block, True), (256 // block, False)):
        rows, config = block * together, {"blocks_together": together, "resident": resident}
        what = f"{rows} rows, blocks of {block} in {'VMEM' if resident else 'HBM'}, {features} features"
        inner, outer = (rows, features, step), (rows, step, features)  # a product over features, and one over tokens
        out.append(Case(gradients(**config), (x, x, x, mask), (
            (f"forward, {what}", "block_sparse_attention", (inner, outer)),
            (f"dq, {what}", "block_sparse_attention_dq", (inner, inner, outer)),
            (f"dk and dv, {what}", "block_sparse_attention_dkv", (inner, inner, outer, outer)),
        )))  # fmt: skip
    group, step, _ = tpu.shape_of(static, x)
    rows, what = group * block, f"blocks of {block}, {features} features"
    title = f"masses, {rows} rows, {what}"
    out.append(Case(search(2), (x, x, x), ((title, "block_scores", ((rows, features, step),)),)))
    group, step, _ = tpu_search.shape_of(static, x, x)
    rows = group * block
    products = ((rows, features, step), (rows, step, features))
    out.append(Case(search(1), (x, x, x), ((f"search in one pass, {rows} rows, {what}", "search", products),)))
    return out


def expert_cases() -> list[Case]:
    """Mixtures of experts of BlockFFN XLarge, 128 tokens a step or a chunk of 32, and a grouped product of DeepSeekMoE's size."""
    import jax

    from pallas_kernels.grouped_matmul import arg_specs as grouped_specs
    from pallas_kernels.grouped_matmul import grouped_matmul
    from pallas_kernels.sparse_moe import arg_specs, tile_moe, union_moe

    spec, rows, few = dataclasses.replace(arg_specs.BLOCKFFN_XLARGE, tokens=512), 128, 32
    width, hidden, wide = spec.width, spec.hidden, dataclasses.replace(grouped_specs.DEEPSEEK_MOE, rows=1024)

    def gradients(x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
        def layer(x: Any, scores: Any, up: Any, down: Any) -> Any:
            return tile_moe(x, scores, active, up, down, tile=rows, impl="tpu")

        y, back = jax.vjp(layer, x, scores, up, down)
        return y, back(y)

    def product(lhs: Any, rhs: Any, sizes: Any, scale: Any) -> Any:
        return grouped_matmul(lhs, rhs, sizes, row_scale=scale, activation="silu", impl="tpu")

    def outer(lhs: Any, rhs: Any, sizes: Any, dout: Any) -> Any:
        return jax.vjp(lambda b: grouped_matmul(lhs, b, sizes, impl="tpu"), rhs)[1](dout)

    def step(tokens: int) -> tuple[tuple[int, int, int], ...]:
        return (tokens, width, hidden), (tokens, hidden, width)

    dw = ((hidden, rows, width),) * 2
    what, of = f"experts of {width} x {hidden}", f"128 rows of {wide.width} x {wide.hidden}"
    cotangent = jax.ShapeDtypeStruct((wide.rows, wide.hidden), wide.dtype)
    return [
        Case(gradients, spec.arrays, (
            (f"{what}, forward, 128 tokens", "tile_moe", step(rows)),
            (f"{what}, gradient of tokens, 128", "tile_moe_dx", (*step(rows), (rows, width, hidden))),
            (f"{what}, gradient of weights, 128", "tile_moe_dw", ((rows, width, hidden),) * 2 + dw),
        )),
        Case(lambda *a: union_moe(*a, impl="tpu"), dataclasses.replace(spec, tokens=few).arrays,
             ((f"{what}, union, {few} tokens", "union_moe", step(few)),)),
        Case(product, wide.arrays, ((f"grouped product, {of}", "grouped_matmul", ((128, wide.width, wide.hidden),)),)),
        Case(outer, (*wide.arrays[:3], cotangent),
             ((f"its weights' gradient, {of}", "grouped_matmul_outer", ((wide.hidden, 128, wide.width),)),)),
    ]  # fmt: skip


def product_alone() -> Case:
    """A matrix product without anything around it, to see what the compiler makes of the units."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def kernel(a: Any, b: Any, out: Any) -> None:
        def body(i: Any, _: None) -> None:
            rows = a[pl.ds(pl.multiple_of(i * 512, 512), 512), :]
            out[...] = jnp.dot(rows, b[...], preferred_element_type=jnp.float32)

        jax.lax.fori_loop(0, 4, body, None)

    def run(a: Any, b: Any) -> Any:
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct((512, 512), jnp.float32), name="product")(a, b)

    shapes = (jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16))
    return Case(run, shapes, (("product alone", "product", ((512, 1024, 512),)),))


def least_cycles(topology: str, products: Sequence[tuple[int, int, int]]) -> float:
    """Cycles that the matrix units of one core need for these products (m, k, n)."""
    from jax.experimental.pallas import tpu as pltpu

    with aot.as_if_on(topology):
        chip = pltpu.get_tpu_info()
    size = chip.mxu_column_size
    rows = sum(-(-k // size) * min(m * -(-n // size), n * -(-m // size)) for m, k, n in products)
    return rows / (chip.num_mxus * (2 if size == 256 else 1))


def measure(case: Case, topology: str, dump: Path) -> dict[str, dict[str, Any]]:
    """The kernels of one program on one chip, from what the compiler writes into `dump`: {title: figures}."""
    for old in dump.iterdir():
        old.unlink()
    aot.compile_kernel(case.run, topology, *case.shapes)

    def text(name: str, kind: str) -> str:
        found = [p for p in dump.iterdir() if re.search(rf"-{name}(\.\d+)?-\d+-{kind}\.txt$", p.name)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} dumps of {name}, {kind}: one kernel of that name was expected")
        return found[0].read_text()

    out = {}
    for title, name, products in case.kernels:
        bundles, uses = (text(name, kind) for kind in ("final_bundles", "final_hlo-static-per-bundle-utilization"))
        found, least = turn(stretches(bundles, uses)), least_cycles(topology, products)
        out[title] = found | {"least": least, "busy": least / found["bundles"]}
        out[title]["busy_masked"] = least / found["masked"] if found["masked"] else None
    return out


def table(results: dict[str, Any]) -> Table:
    """Bundles, and the part of them that the matrix units need."""
    out = Table(title="innermost loops: bundles / cycles the matrix units need (their part; with masks)")
    out.add_column("kernel")
    for chip in TOPOLOGIES:
        out.add_column(chip)
    for name, chips in results.items():
        out.add_row(name, *(
            f"{r['bundles']} / {r['least']:.0f} ({r['busy']:.2f}" + (f"; {r['busy_masked']:.2f})" if r["masked"] else ")")
            for r in chips.values()
        ))  # fmt: skip
    return out


def main(
    blocks: tuple[int, ...] = (64, 128),
    features: tuple[int, ...] = (128, 64),
    out: Annotated[Path | None, tyro.conf.arg(help="results file; experiments/results/tpu-schedule.json")] = None,
) -> None:
    """Count the bundles of all kernels for all chips; without libtpu say so and do nothing."""
    console = Console()
    if not aot.available():
        console.print("left out: libtpu, the TPUs' compiler, is not installed (pip install 'jprune[aot]')")
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"  # read when it is loaded
        )
        aot.prepare()
        from experiments import record
        from experiments.benchmarks import RESULTS

        results: dict[str, Any] = {}
        for case in (product_alone(), *(c for d in features for b in blocks for c in cases(b, d)), *expert_cases()):
            for chip, topology in TOPOLOGIES.items():
                for title, figures in measure(case, topology, Path(folder)).items():
                    results.setdefault(title, {})[chip] = figures
    import importlib.metadata

    out = out or RESULTS / "tpu-schedule.json"
    record.write(out, {
        "command": "python -m experiments.benchmarks.tpu_schedule",
        "machine": record.machine() | {"libtpu": importlib.metadata.version("libtpu")},
        "note": "counted in the compiler's schedule for each chip; nothing was run",
        "results": results,
    })  # fmt: skip
    Console(width=130 if not console.is_terminal else None).print(table(results))
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
