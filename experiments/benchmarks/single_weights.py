"""Wanda and SparseGPT beside the same computations written plainly in PyTorch, and the time of iCBS's block solvers.

    python -m experiments.benchmarks.single_weights            # needs the "reference" extra

The matrices of a decoder's layer (width 576, MLP 1536) meet 4,096 tokens; both sides get the same numbers, take turns in one
process, and have to agree before they are timed: in nearly all of the mask, and in the error that the outputs are left with. A
block is a random problem as iCBS makes them, from 64 samples' gradients; annealing has ten restarts.

Memory is that of a process of its own for each method and side, which prunes the three matrices once: its peak, less what it was
when they and their inputs had been loaded and a small problem had been solved. On our side that includes compiling; what the
compiled programs hold besides their inputs stands beside it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from experiments.peers import peer
from jprune.budget.weights import choose
from jprune.importance.weight_inputs import gram, squares
from jprune.methods.weights.elimination import eliminate
from jprune.methods.weights.icbs.problem import block_form, dense
from jprune.methods.weights.icbs.solve import solve

SHAPES = ((576, 576), (1536, 576), (576, 1536))  # outputs, inputs
DAMPING, BLOCK = 0.01, 128


@dataclasses.dataclass(frozen=True)
class Setting:
    """Tokens that are calibrated with, rounds of timing, sizes of the blocks that are solved."""

    tokens: int = 4096
    rounds: int = 3
    blocks: tuple[int, ...] = (256, 512, 1024)


@jax.jit
def wanda(w: Any, x: Any) -> Any:
    """The mask of half of every row."""
    score = jnp.abs(w) * jnp.sqrt(squares(x))
    return choose({"w": score.T}, "row", {"w": w.size // 2})["w"].T  # by convention kernels have inputs first


@jax.jit
def sparsegpt(w: Any, x: Any) -> Any:
    """(mask, matrix) of half the weights."""
    found = eliminate(w, gram(x), w.size // 2)
    return found.mask, found.matrix


def torch_wanda(w: Any, x: Any) -> Any:
    """As its authors write it: a stable sort of every row."""
    torch: Any = peer("torch")
    score = w.abs() * x.square().sum(0).sqrt()
    order = torch.sort(score, dim=-1, stable=True).indices[:, : w.shape[1] // 2]
    return torch.ones_like(w, dtype=torch.bool).scatter_(1, order, False)


def torch_sparsegpt(w: Any, x: Any) -> Any:
    """Algorithm 1 of the paper, column by column in blocks."""
    torch: Any = peer("torch")
    w, h = w.clone(), x.T @ x
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        own, factor = w[:, start:end], u[start:end, start:end]
        score = own.square() / factor.diagonal().square()
        keep = score > score.flatten().sort().values[score.numel() // 2 - 1]
        errors = torch.zeros_like(own)
        for i in range(end - start):
            column = own[:, i]
            left = torch.where(keep[:, i], column, torch.zeros(()))
            errors[:, i] = (column - left) / factor[i, i]
            own[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
            own[:, i] = left
        out[:, start:end] = keep
        w[:, end:] -= errors @ u[start:end, end:]
    return out, w


def problems(tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(matrix, inputs that are alike and differ in size) of every shape."""
    rng, out = np.random.default_rng(0), []
    for shape in SHAPES:
        w = rng.normal(size=shape).astype(np.float32)
        x = (rng.normal(size=(tokens, shape[1])) * np.exp(rng.normal(size=shape[1]))).astype(np.float32)
        out.append((w, x + 0.5 * x @ rng.normal(size=(shape[1], shape[1])).astype(np.float32) / shape[1] ** 0.5))
    return out


def against_torch(s: Setting) -> dict[str, Any]:
    """Ratios of times per method and shape, after both agree."""
    torch: Any = peer("torch")
    torch.set_num_threads(jax.local_device_count() if jax.local_device_count() > 1 else torch.get_num_threads())
    out = {}
    for shape, (w, x) in zip(SHAPES, problems(s.tokens), strict=True):
        one, two = (jnp.asarray(w), jnp.asarray(x)), (torch.from_numpy(w), torch.from_numpy(x))
        ours, theirs = sparsegpt(*one), torch_sparsegpt(*two)
        error = [float(np.linalg.norm(x @ (np.asarray(m) - w).T)) for m in (ours[1], theirs[1])]
        same = float((np.asarray(ours[0]) == theirs[0].numpy()).mean())
        alike = float((np.asarray(wanda(*one)) == torch_wanda(*two).numpy()).mean())
        if not (same > 0.98 and alike > 0.9999 and abs(error[0] / error[1] - 1) < 0.02):
            raise ValueError(f"the two sides differ at {shape}: masks {alike}, {same}, errors {error}")
        jobs: dict[str, Callable[[], Any]] = {
            "Wanda": lambda one=one: wanda(*one), "Wanda, PyTorch": lambda two=two: torch_wanda(*two),
            "SparseGPT": lambda one=one: sparsegpt(*one), "SparseGPT, PyTorch": lambda two=two: torch_sparsegpt(*two),
        }  # fmt: skip
        times = in_turns(jobs, s.rounds)
        out[f"{shape[0]} x {shape[1]}"] = {
            "seconds": medians(times),
            "ratios": {name: ratio(times, name, f"{name}, PyTorch") for name in ("Wanda", "SparseGPT")},
            "same mask": {"Wanda": alike, "SparseGPT": same},
            "error over PyTorch's": error[0] / error[1],
        }
    return out


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "Wanda": wanda,
    "Wanda, PyTorch": torch_wanda,
    "SparseGPT": sparsegpt,
    "SparseGPT, PyTorch": torch_sparsegpt,
}


def most_held() -> int:
    """Bytes that this process has held at most. (What `getrusage` says of a child begins with its parent's.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak(way: str, folder: str) -> dict[str, int]:
    """Bytes by which this process grows when it prunes the matrices in a folder; for a process of its own."""
    theirs = "PyTorch" in way
    load: Any = peer("torch").from_numpy if theirs else jnp.asarray
    small = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    WAYS[way](load(small[0]), load(small[1]))  # libraries that are read at the first use are not what is asked for
    held = [tuple(load(np.load(f"{folder}/{i}{name}.npy")) for name in "wx") for i in range(len(SHAPES))]
    before = most_held()
    for w, x in held:
        jax.block_until_ready(WAYS[way](w, x))
    grown = most_held() - before
    if theirs:
        return {"peak": grown}
    programs: Any = [jax.jit(WAYS[way]).lower(*p).compile().memory_analysis() for p in held]
    return {"peak": grown, "programs": max(m.temp_size_in_bytes + m.output_size_in_bytes for m in programs)}


def memory(s: Setting) -> dict[str, dict[str, int]]:
    """`peak` of every way, each in a process that has read the same files and has compiled nothing before."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (w, x) in enumerate(problems(s.tokens)):
            np.save(f"{folder}/{i}w.npy", w)
            np.save(f"{folder}/{i}x.npy", x)
        env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        for way in WAYS:
            call = f"print(json.dumps(b.peak({way!r}, {folder!r})))"
            code = f"import json; from experiments.benchmarks import single_weights as b; {call}"
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the process that measures {way} failed: {done.stderr[-2000:]}")
            out[way] = json.loads(done.stdout.splitlines()[-1])
    return out


def solvers(s: Setting) -> dict[str, Any]:
    """Seconds and energies of one block of each size."""
    out, key = {}, jax.random.key(0)
    for n in s.blocks:
        rng = np.random.default_rng(n)
        w, g = rng.normal(size=n), rng.normal(size=(64, n))
        w, g = jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32)
        form, _ = block_form(w, jnp.zeros(n), g, g.mean(0), 0.75, 1e-3)
        start = jnp.asarray(np.arange(n) < n // 2, jnp.float32)
        forms = {"matrix": dense(form), "low rank": form}
        jobs = {
            f"{method}, {kind}": lambda m=method, f=f, start=start: solve(key, f, start, method=m, restarts=10)
            for method in ("sa", "descent")
            for kind, f in forms.items()
        }
        times = medians(in_turns(jobs, 3))
        out[str(n)] = {name: {"seconds": times[name], "energy": float(job().energy)} for name, job in jobs.items()}
        out[str(n)]["start"] = float(jobs["sa, matrix"]().start)
    return out


def main(setting: Setting = Setting(), out: Path = RESULTS / "single-weights.json") -> None:
    """Measure, print, write."""
    found = {"against PyTorch": against_torch(setting), "memory": memory(setting), "solvers": solvers(setting)}
    console = Console()
    table = Table("matrix", "method", "seconds", "over PyTorch's", title=DISTURBED)
    for shape, r in found["against PyTorch"].items():
        for name, value in r["ratios"].items():
            table.add_row(shape, name, f"{r['seconds'][name]:.3f}", f"{value:.2f}")
    console.print(table)
    table = Table("method", "peak, MB", "programs, MB", title="memory besides the matrices and their inputs")
    for way, r in found["memory"].items():
        table.add_row(way, *(f"{r[k] / 1e6:.0f}" if k in r else "" for k in ("peak", "programs")))
    console.print(table)
    table = Table("block", "solver", "seconds", "energy")
    for n, r in found["solvers"].items():
        for name, value in r.items():
            if isinstance(value, dict):
                table.add_row(n, name, f"{value['seconds']:.2f}", f"{value['energy']:.4f}")
    console.print(table)
    command = "python -m experiments.benchmarks.single_weights"
    record.write(
        out, {"command": command, "machine": record.machine(), "setting": dataclasses.asdict(setting), **found}
    )


if __name__ == "__main__":
    tyro.cli(main)
