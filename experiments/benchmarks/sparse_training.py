"""What sparse training costs: steps beside those of the dense optimizer, choosing masks beside sorting, over devices.

    python -m experiments.benchmarks.sparse_training       # five minutes

Steps are those of a perceptron with Adam, its arrays donated; away from the steps at which masks are chosen (a whole step
in which they are is timed too); by the clock, and by the time of this process on the processors, which other work on the
machine hardly touches. Choosing is timed for one leaf, beside a program that sorts its scores, takes the k-th as
the threshold of the same mask and gives ties to the lowest index. What devices send each other is read from the programs
that are compiled for four simulated ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from jprune.budget import choose
from jprune.methods.weights import ACDC, SET, Magnitude, MaskSteps, RigL, Saliency, masks_of, sparsify
from jprune.surgery.patterns import density, pack

METHODS = {"magnitude": Magnitude(), "saliency": Saliency(), "SET": SET(), "RigL": RigL(), "AC/DC": ACDC()}
NEVER = MaskSteps("one_shot", 10**8, 2 * 10**8, 10**7)
ALWAYS = MaskSteps("one_shot", 0, 10**5, 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the perceptron and of the leaves whose masks are chosen.

    Attributes:
      width, depth, batch: of the perceptron, which reads 784 numbers.
      sparsity: of all masks.
      leaves: numbers of weights of the leaves.
      side: of the square leaf that lies over four devices.
    """

    width: int = 2048
    depth: int = 3
    batch: int = 256
    sparsity: float = 0.9
    leaves: tuple[int, ...] = (2**18, 2**20, 2**22)
    side: int = 256


def perceptron(s: Setting) -> tuple[Any, Callable[[Any], Any]]:
    """Parameters, and their loss on one batch."""
    rng = np.random.default_rng(0)
    sizes = [784, *[s.width] * s.depth, 10]
    params = [
        {"kernel": jnp.asarray(rng.normal(size=(a, b)) / math.sqrt(a), jnp.float32), "bias": jnp.zeros(b)}
        for a, b in itertools.pairwise(sizes)
    ]
    x, y = jnp.asarray(rng.normal(size=(s.batch, 784)), jnp.float32), jnp.asarray(rng.integers(0, 10, s.batch))

    def loss(params: Any) -> Any:
        h = x
        for i, layer in enumerate(params):
            h = h @ layer["kernel"] + layer["bias"]
            h = jax.nn.relu(h) if i < len(params) - 1 else h
        return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()

    return params, loss


def trainer(tx: Any, params: Any, loss: Callable[[Any], Any]) -> tuple[Callable[[], Any], int]:
    """A function that trains one step further, and the bytes that its program needs besides what it is given."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    held = [jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, tx.init(params))]
    compiled = step.lower(*held).compile()

    def run() -> Any:
        held[:] = compiled(*held)
        return held[0]

    return run, extra_bytes(compiled)


def extra_bytes(compiled: Any) -> int:
    """What a program needs besides what it is given and gives."""
    return compiled.memory_analysis().temp_size_in_bytes


def steps(s: Setting, rounds: int) -> dict[str, Any]:
    """Ratios of a sparse step to the dense one in the same round, and of a step that chooses masks."""
    params, loss = perceptron(s)
    jobs, extra = {}, {}
    jobs["dense"], extra["dense"] = trainer(optax.adam(1e-3), params, loss)
    for name, method in METHODS.items():
        for when, mask_steps in (("", NEVER), (", choosing", ALWAYS)):
            tx = sparsify(optax.adam(1e-3), s.sparsity, method, mask_steps)
            jobs[name + when], extra[name + when] = trainer(tx, params, loss)
    times = in_turns(jobs, rounds, warm_up=3)
    work = in_turns(jobs, rounds, clock=time.process_time)
    masks = masks_of(sparsify(optax.adam(1e-3), s.sparsity).init(params))
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "ratios": {name: ratio(times, name, "dense") for name in jobs},
        "processor_ratios": {name: ratio(work, name, "dense") for name in jobs},
        "seconds": medians(times),
        "processor_seconds": medians(work),
        "program_bytes": extra,
        "mask_bytes": sum(m.nbytes for m in masks.values()),
        "stored_bytes": sum(m["bits"].nbytes for m in pack(masks).values()),
        "rounds": times,
    }


def by_sorting(scores: Any, k: int) -> Any:
    """The same mask by a stable sort of all scores."""
    order = jnp.argsort(-scores.ravel(), stable=True)
    return jnp.zeros(scores.size, bool).at[order[:k]].set(True).reshape(scores.shape)


def choices(s: Setting, rounds: int) -> list[dict[str, Any]]:
    """Seconds and bytes of choosing one mask, both ways."""
    out = []
    for n in s.leaves:
        x = jnp.abs(jnp.asarray(np.random.default_rng(n).normal(size=(n // 256, 256)), jnp.float32))
        k = n - round(n * s.sparsity)
        ways: dict[str, Any] = {
            "counted": jax.jit(lambda x, k=k: choose({"w": x}, "unstructured", {"w": k})["w"]),
            "sorted": jax.jit(functools.partial(by_sorting, k=k)),
        }
        equal = bool((ways["counted"](x) == ways["sorted"](x)).all())
        times = in_turns({name: functools.partial(way, x) for name, way in ways.items()}, rounds)
        size = {name: extra_bytes(way.lower(x).compile()) for name, way in ways.items()}
        out.append({"weights": n, "equal": equal, **medians(times), "times_faster": ratio(times, "sorted", "counted"),
                    "program_bytes": size, "rounds": times})  # fmt: skip
    return out


def collectives(text: str) -> dict[str, Any]:
    """How many collectives but sums a compiled program has, and the most entries that one of them brings."""
    sizes = []
    for line in text.splitlines():
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line):
            results = line.split(") ", 1)[0] if "= (" in line else line.split("(", 1)[0]
            sizes.append(
                max(math.prod(int(n) for n in f.split(",") if n) for f in re.findall(r"\w+\[([\d,]*)\]", results))
            )
    return {"collectives": len(sizes), "largest": max(sizes, default=0), "sums": text.count(" all-reduce(")}


def over_devices(side: int) -> dict[str, Any]:
    """What four devices send each other to choose masks within a training step, and to sort one leaf."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    place = NamedSharding(mesh, PartitionSpec("data", "model"))
    params = {"w": jax.device_put(jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32), place)}
    out = {}
    for name, method in METHODS.items():
        tx = sparsify(optax.adam(1e-3), 0.9, method, ALWAYS)
        state = tx.init(params)
        step: Any = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p))
        out[name] = collectives(str(step.lower(params, state, params).compile().as_text()))
        out[name]["placed"] = all(m.sharding.is_equivalent_to(place, 2) for m in masks_of(state).values())
    k = side * side // 10
    naive = jax.jit(functools.partial(by_sorting, k=k)).lower(params["w"]).compile()
    out["sorted"] = collectives(str(naive.as_text()))
    return out


def simulated(side: int) -> dict[str, Any]:
    """`over_devices` in a process of its own, which has four."""
    code = f"import json; from experiments.benchmarks import sparse_training as b; print(json.dumps(b.over_devices({side})))"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process with four devices failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exactness() -> dict[str, int]:
    """Weights kept of 50,000,001 at 0.9, of which float32 keeps one too many."""
    scores = {"w": jnp.arange(50_000_001, dtype=jnp.float32)}
    return density(choose(scores, "unstructured", 0.9)).kept


def checks(r: dict[str, Any]) -> dict[str, bool]:
    """The targets."""
    return {
        "a step that chooses no mask takes at most 5 % more processor time than the dense one": all(
            r["steps"]["processor_ratios"][name] <= 1.05 for name in METHODS),
        "and at most 5 % more by the clock": all(r["steps"]["ratios"][name] <= 1.05 for name in METHODS),
        "choosing is faster than sorting and makes the same mask": all(
            c["times_faster"] > 1 and c["equal"] for c in r["choices"]),
        "choosing needs less memory than sorting": all(
            c["program_bytes"]["counted"] < c["program_bytes"]["sorted"] for c in r["choices"]),
        "no leaf is gathered over devices, and masks lie as their leaves": all(
            r["devices"][name]["largest"] <= 4 and r["devices"][name]["placed"] for name in METHODS),
        "counts are exact": r["kept_of_50000001"] == 5_000_000,
    }  # fmt: skip


def tables(r: dict[str, Any]) -> list[Table]:
    """Steps, choices, devices."""
    first = Table(title=f"a training step of {r['steps']['parameters']:,} parameters, over the dense one")
    for column in ("", "no masks chosen", "by the clock", "masks chosen", "by the clock", "program, MB"):
        first.add_column(column)
    ratios, work, size = r["steps"]["ratios"], r["steps"]["processor_ratios"], r["steps"]["program_bytes"]
    first.add_row("dense", "1", "1", "", "", f"{size['dense'] / 1e6:.0f}")
    for name in METHODS:
        own = (f"{x[name + when]:.3f}" for when in ("", ", choosing") for x in (work, ratios))
        first.add_row(name, *own, f"{size[name] / 1e6:.0f}")
    second = Table(title="choosing the mask of one leaf")
    for column in ("weights", "counted, ms", "sorted, ms", "times faster", "counted, MB", "sorted, MB"):
        second.add_column(column)
    for c in r["choices"]:
        b = c["program_bytes"]
        second.add_row(f"{c['weights']:,}", f"{1e3 * c['counted']:.1f}", f"{1e3 * c['sorted']:.1f}",
                       f"{c['times_faster']:.1f}", f"{b['counted'] / 1e6:.1f}", f"{b['sorted'] / 1e6:.1f}")  # fmt: skip
    third = Table(title="four devices: what is sent but for sums")
    for column in ("", "collectives", "entries of the largest"):
        third.add_column(column)
    for name, d in r["devices"].items():
        third.add_row(name, str(d["collectives"]), f"{d['largest']:,}")
    return [first, second, third]


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="of every timing")] = 15,
    out: Path = RESULTS / "sparse-training.json",
) -> None:
    """What sparse training costs."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: medians need at least one")
    results = {
        "steps": steps(setting, rounds),
        "choices": choices(setting, max(rounds // 4, 1)),
        "devices": simulated(setting.side),
        "kept_of_50000001": exactness()["w"],
    }
    verdict = checks(results)
    record.write(out, {
        "command": f"python -m experiments.benchmarks.sparse_training --rounds {rounds}",
        "machine": record.machine() | {"optax": optax.__version__},
        "note": DISTURBED,
        "setting": dataclasses.asdict(setting),
        "checks": verdict,
        "results": results,
    })  # fmt: skip
    console = Console()
    for table in tables(results):
        Console(width=110 if not console.is_terminal else None).print(table)
    b = results["steps"]
    console.print(f"masks: {b['mask_bytes']:,} bytes on the device, {b['stored_bytes']:,} in a checkpoint")
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
