"""A mixture of experts whose work follows the active experts, beside the dense layer and `jax.lax.ragged_dot`, on this CPU.

    python -m experiments.benchmarks.sparse_moe          # ten minutes

With tokamax's grouped product too, in an environment of its own, since it wants an older typeguard than the command line does:

    python -m pip install -e . && python -m pip install tokamax
    python -c "from experiments.benchmarks.sparse_moe import main; main()"

The dense layer is two matrix products over all experts with the weights already laid out as it likes them: (width, experts x
hidden) and back. Decoding: a few tokens, whose experts together are a share of all. Training: output and all gradients, at shares
of active pairs; "alike" tokens come in runs of 128 that use the same experts, others choose alone. Products: one grouped product
with its gradients. Every time is this process's on the processors, with one thread for a product, so that other work on the
machine hardly touches it; ratios are medians over rounds in which all sides take turns.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import time
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
from experiments.benchmarks import RESULTS, in_turns, medians, ratio
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.sparse_moe import permute_pairs, permuted_moe, tile_moe, union_moe

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
RUN = 128  # tokens that are alike


@dataclasses.dataclass(frozen=True)
class Setting:
    """Shapes of the layers.

    Attributes:
      width, experts, hidden: of the decoding layer. tokens: of its steps. unions: shares of the experts in use.
      batch: tokens of a training step; its layer is half as wide, with half as many experts of half the width.
      densities: shares of active pairs.
    """

    width: int = 1024
    experts: int = 64
    hidden: int = 128
    tokens: tuple[int, ...] = (1, 8, 32)
    unions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    batch: int = 1024
    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)


def layer(seed: int, width: int, experts: int, hidden: int) -> tuple[Any, Any]:
    """up and down, float32."""
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(experts, width, hidden)) / width**0.5
    down = rng.normal(size=(experts, hidden, width)) / hidden**0.5
    return jnp.asarray(up, jnp.float32), jnp.asarray(down, jnp.float32)


def laid_out(up: Any, down: Any) -> tuple[Any, Any]:
    """The same as the dense layer wants them."""
    return jnp.asarray(up.transpose(1, 0, 2).reshape(up.shape[1], -1)), down.reshape(-1, down.shape[2])


def dense(x: Any, scores: Any, up: Any, down: Any) -> Any:
    """All experts for all tokens, in two products; weights as `laid_out` gives them."""
    h = jax.nn.silu(x @ up).reshape(*scores.shape, -1)
    return (h * scores[..., None]).reshape(len(x), -1) @ down


def every(x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
    """`dense`, which does not ask what is active."""
    return dense(x, scores, up, down)


def taken(x: Any, scores: Any, active: Any, up: Any, down: Any, room: int) -> Any:
    """The union's weights gathered into a copy, and the dense layer on it: what is usually written."""
    ids = jnp.argsort(~active.any(0), stable=True)[:room]
    h = jnp.einsum("td,edf->tef", x, up[ids])
    return jnp.einsum("tef,efd->td", jax.nn.silu(h) * scores[:, ids, None], down[ids])


def by_ragged_dot(product: Callable[..., Any], room: int, x: Any, scores: Any, active: Any, up: Any, down: Any) -> Any:
    """The same sorted pairs as `permuted_moe`, by another grouped product, with the gradients that jax derives."""
    pairs = permute_pairs(active, jax.lax.stop_gradient(scores), room)
    experts = jnp.repeat(jnp.arange(up.shape[0]), pairs.group_sizes, total_repeat_length=room)
    score = jnp.where(jnp.arange(room) < pairs.group_sizes.sum(), scores[pairs.row_token, experts], 0)
    hidden = jax.nn.silu(product(x[pairs.row_token], up, pairs.group_sizes)) * score[:, None]
    out = product(hidden, down, pairs.group_sizes)
    return jnp.zeros_like(x).at[pairs.row_token].add(out)


def timed(jobs: dict[str, Callable[[], Any]], rounds: int, over: str, wanted: Any = None) -> dict[str, Any]:
    """Processor milliseconds, and ratios over one of the jobs, which all give the same, or what is wanted in its place.

    Raises:
      ValueError: one gives something else.
    """
    wanted = jobs[over]() if wanted is None else wanted
    for name, job in jobs.items():
        if name != over:
            for a, b in zip(jax.tree.leaves(job()), jax.tree.leaves(wanted), strict=True):
                error = float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
                if not error < 1e-4:
                    raise ValueError(f"{name} computes something else: {error} of the norm")
    times = in_turns(jobs, rounds, clock=time.process_time)
    return {
        "milliseconds": {name: 1e3 * seconds for name, seconds in medians(times).items()},
        "ratios": {name: ratio(times, name, over) for name in jobs},
    }


def decoding(s: Setting, rounds: int) -> dict[str, Any]:
    """{tokens: {union: figures}}: every token uses an eighth of the experts in the union, or one."""
    up, down = layer(0, s.width, s.experts, s.hidden)
    whole, out = laid_out(up, down), {}
    for tokens in s.tokens:
        for share in s.unions:
            rng, count = np.random.default_rng(tokens), max(1, round(share * s.experts))
            union = rng.permutation(s.experts)[:count]
            active = np.zeros((tokens, s.experts), bool)
            for i, e in enumerate(union):
                active[i % tokens, e] = True
            x, scores = jnp.asarray(rng.normal(size=(tokens, s.width)), jnp.float32), rng.normal(size=active.shape)
            active, scores = jnp.asarray(active), jnp.asarray(np.where(active, scores, 0), jnp.float32)
            programs = {
                "dense": (jax.jit(dense), (x, scores, *whole)),
                "union": (jax.jit(functools.partial(union_moe, impl="xla")), (x, scores, active, up, down)),
                "copied weights": (jax.jit(functools.partial(taken, room=count)), (x, scores, active, up, down)),
            }
            jobs = {name: functools.partial(run, *given) for name, (run, given) in programs.items()}
            out.setdefault(str(tokens), {})[f"{share:g}"] = timed(jobs, rounds, "dense")
    return out


def flags(s: Setting, experts: int, density: float, alike: bool) -> Any:
    """Active pairs, exactly so many of all."""
    rng = np.random.default_rng(round(1000 * density))
    rows = -(-s.batch // RUN) if alike else s.batch
    drawn = rng.random((rows, experts))
    active = drawn <= np.sort(drawn, axis=None)[max(1, round(density * drawn.size)) - 1]
    return np.repeat(active, RUN, 0)[: s.batch] if alike else active


def with_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted (x, scores, active, up, down, cotangent) -> output and four gradients."""

    def both(x: Any, scores: Any, active: Any, up: Any, down: Any, dy: Any) -> Any:
        y, back = jax.vjp(lambda x, scores, up, down: run(x, scores, active, up, down), x, scores, up, down)
        return y, back(dy)

    return jax.jit(both)


def training(s: Setting, rounds: int) -> dict[str, Any]:
    """{alike or alone: {density: figures}} of output and gradients."""
    width, experts, hidden = s.width // 2, s.experts // 2, s.hidden // 2
    up, down = layer(1, width, experts, hidden)
    whole, out = laid_out(up, down), {}
    rng = np.random.default_rng(2)
    x, dy = (jnp.asarray(rng.normal(size=(s.batch, width)), jnp.float32) for _ in range(2))
    for name, alike in (("alone", False), ("alike", True)):
        for density in s.densities:
            active = flags(s, experts, density, alike)
            room = -(-int(active.sum()) // 128) * 128
            scores = jnp.asarray(np.where(active, rng.normal(size=active.shape), 0), jnp.float32)
            on = jnp.asarray(active)
            layers: dict[str, Callable[..., Any]] = {
                "tiles": functools.partial(tile_moe, impl="xla"),
                "sorted": functools.partial(permuted_moe, capacity=room, impl="xla"),
                "ragged_dot": functools.partial(by_ragged_dot, jax.lax.ragged_dot, room),
            }
            jobs: dict[str, Callable[[], Any]] = {
                "dense": functools.partial(with_gradients(every), x, scores, on, *whole, dy)
            }
            for way, run in layers.items():
                jobs[way] = functools.partial(with_gradients(run), x, scores, on, up, down, dy)
            y, (dx, dscores, dup, ddown) = jobs["dense"]()
            dup = jnp.asarray(dup).reshape(width, experts, hidden).transpose(1, 0, 2)
            wanted = y, (dx, jnp.where(on, dscores, 0), dup, ddown.reshape(down.shape))
            out.setdefault(name, {})[f"{density:g}"] = timed(jobs, rounds, "dense", wanted)
    return out


def tokamax_product() -> Callable[..., Any] | None:
    """Its grouped product as it runs on this device, or None where it is not installed."""
    if importlib.util.find_spec("tokamax") is None:
        return None
    return importlib.import_module("tokamax").ragged_dot


def product_with_gradients(product: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted (lhs, rhs, sizes, cotangent) -> product and two gradients."""

    def both(lhs: Any, rhs: Any, sizes: Any, dout: Any) -> Any:
        y, back = jax.vjp(lambda a, b: product(a, b, sizes), lhs, rhs)
        return y, back(dout)

    return jax.jit(both)


def products(s: Setting, rounds: int) -> dict[str, Any]:
    """{shape: figures} of one grouped product with its gradients, rows spread over groups by chance."""
    out = {}
    theirs = tokamax_product()
    for rows, groups, width, hidden in ((2 * s.batch, s.experts // 8, s.width // 2, s.hidden * 4),
                                        (2 * s.batch, s.experts, s.width, s.hidden)):  # fmt: skip
        rng = np.random.default_rng(groups)
        lhs, dout = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for n in (width, hidden))
        rhs = layer(3, width, groups, hidden)[0]
        sizes = jnp.asarray(np.bincount(rng.integers(0, groups, rows), minlength=groups), jnp.int32)
        ways: dict[str, Callable[..., Any]] = {"ragged_dot": jax.lax.ragged_dot,
                                               "grouped_matmul": functools.partial(grouped_matmul, impl="xla")}  # fmt: skip
        if theirs is not None:
            ways["tokamax"] = theirs

        jobs = {
            name: functools.partial(product_with_gradients(run), lhs, rhs, sizes, dout) for name, run in ways.items()
        }
        out[f"{rows} rows, {groups} x {width} x {hidden}"] = timed(jobs, rounds, "ragged_dot")
    return out


def checks(r: dict[str, Any]) -> dict[str, bool]:
    """The targets; what is not measured does not hold."""
    union = r["decoding"].get("8", {}).get("0.25", {}).get("ratios", {}).get("union", float("inf"))
    products_ = [row["ratios"]["grouped_matmul"] for row in r["products"].values()]
    return {
        "a union of 25 % of the experts for 8 tokens takes at most half the dense layer's time": union <= 0.5,
        "training is faster than dense wherever at most a tenth of the pairs is active, in tiles and sorted": all(
            row["ratios"][way] < 1
            for rows in r["training"].values() for density, row in rows.items() if float(density) <= 0.1
            for way in ("tiles", "sorted")),
        "a grouped product is faster than ragged_dot": all(x < 1 for x in products_),
    }  # fmt: skip


def tables(r: dict[str, Any]) -> list[Table]:
    """One for each part: ratios, and the milliseconds that they are of."""
    out = []
    for part, over in (("decoding", "dense"), ("training", "dense"), ("products", "ragged_dot")):
        rows = {"": r[part]} if part == "products" else r[part]
        table = Table(title=f"{part}: processor time over that of {over}")
        names = list(next(iter(next(iter(rows.values())).values()))["ratios"])
        for column in ("", "", f"{over}, ms", *(n for n in names if n != over)):
            table.add_column(column)
        for name, group in rows.items():
            for share, row in group.items():
                own = (f"{row['ratios'][n]:.2f}" for n in names if n != over)
                table.add_row(name, share, f"{row['milliseconds'][over]:.2f}", *own)
        out.append(table)
    return out


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="of decoding; a third of them of training and products")] = 15,
    out: Path = RESULTS / "sparse-moe.json",
) -> None:
    """Measure, print, write."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: medians need at least one")
    os.environ["XLA_FLAGS"] = f"{ONE_THREAD} {os.environ.get('XLA_FLAGS', '')}".strip()  # read at the first computation
    results = {
        "decoding": decoding(setting, rounds),
        "training": training(setting, -(-rounds // 3)),
        "products": products(setting, -(-rounds // 3)),
    }
    console = Console()
    for table in tables(results):
        console.print(table)
    found = checks(results)
    for what, holds in found.items():
        console.print(f"{'holds' if holds else 'DOES NOT HOLD'}: {what}")
    command = 'python -c "from experiments.benchmarks.sparse_moe import main; main()"'
    record.write(out, {
        "command": command if tokamax_product() else "python -m experiments.benchmarks.sparse_moe", "machine": record.machine(),
        "note": "processor time of this process, one thread a product; the machine was shared, so read ratios",
        "tokamax": importlib.metadata.version("tokamax") if tokamax_product() else "not installed",
        "setting": dataclasses.asdict(setting), "rounds": rounds, "results": results, "checks": found,
    })  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
