"""Wanda and SparseGPT beside the same computations written plainly in PyTorch, and the time of iCBS's block solvers.

    python -m experiments.benchmarks.single_weights            # needs the "reference" extra

The matrices of a decoder's layer (width 576, MLP 1536) meet 4,096 tokens; both sides get the same numbers, take turns in one
process, and have to agree before they are timed: in nearly all of the mask, and in the error that the outputs are left with. A
block is a random problem as iCBS makes them, from 64 samples' gradients; annealing has ten restarts.
"""

from __future__ import annotations

import dataclasses
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
    blocks: tuple[int, ...] = (256, 512)


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


def against_torch(s: Setting) -> dict[str, Any]:
    """Ratios of times per method and shape, after both agree."""
    torch: Any = peer("torch")
    torch.set_num_threads(jax.local_device_count() if jax.local_device_count() > 1 else torch.get_num_threads())
    rng, out = np.random.default_rng(0), {}
    for shape in SHAPES:
        w = rng.normal(size=shape).astype(np.float32)
        x = (rng.normal(size=(s.tokens, shape[1])) * np.exp(rng.normal(size=shape[1]))).astype(np.float32)
        x += 0.5 * x @ rng.normal(size=(shape[1], shape[1])).astype(np.float32) / shape[1] ** 0.5
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
    found = {"against PyTorch": against_torch(setting), "solvers": solvers(setting)}
    console = Console()
    table = Table("matrix", "method", "seconds", "over PyTorch's", title=DISTURBED)
    for shape, r in found["against PyTorch"].items():
        for name, value in r["ratios"].items():
            table.add_row(shape, name, f"{r['seconds'][name]:.3f}", f"{value:.2f}")
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
