"""Block-sparse attention on a Hopper GPU beside dense cuDNN attention, tokamax and PyTorch's FlexAttention; for its owners.

    python -m experiments.benchmarks.gpu_attention                   # about 20 minutes on an H100 or H200

Eight heads of SAM's image encoder and of three video transformers. Random blocks of 128 tokens in every head, the diagonal
kept, an equal number in every row, at sparsities 0, 0.5, 0.75 and 0.9; forward, and forward with gradients. Before anything is
timed, results and gradients are compared with dense attention in float32 under the same mask. tokamax and FlexAttention take
part where they are installed (the latter with a torch that sees the GPU). All programs of a model take turns in one process.
Without such a GPU it says so and runs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
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
from pallas_kernels.block_sparse_attention import BlockMask, arg_specs, block_sparse_attention
from pallas_kernels.common.attention_specs import AttentionSpec

SPARSITIES = (0.0, 0.5, 0.75, 0.9)
CHIPS = ("H100", "H200", "GH200")
OF_IDEAL = (
    0.5  # the check: at least this part of 1 / (1 - sparsity) over dense cuDNN, at 0.75 and above from 32k tokens on
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the models' attentions are measured, a part of their heads."""

    heads: int = 8
    block: int = 128
    checked_tokens: int = 2048
    calls: int = 5  # of one timing, which are waited for together
    seed: int = 0


def part(s: Setting, spec: AttentionSpec) -> AttentionSpec:
    """What is measured of a model's attention."""
    heads = min(s.heads, spec.heads)
    return dataclasses.replace(spec.with_blocks(s.block), batch=1, heads=heads, kv_heads=heads)


def arrays(s: Setting, spec: AttentionSpec) -> list[Any]:
    """Queries, keys, values and a cotangent, (1, heads, tokens, features)."""
    keys = jax.random.split(jax.random.key(s.seed), 4)
    return [jax.random.normal(key, spec.arrays[0].shape, jnp.bfloat16) for key in keys]


def mask_of(s: Setting, spec: AttentionSpec, sparsity: float) -> BlockMask:
    """Random blocks and the diagonal, as many in every row."""
    n, kept = -(-spec.tokens // spec.block_k), dataclasses.replace(spec, kept=1 - sparsity).width
    noise = np.random.default_rng([s.seed, n, int(100 * sparsity)]).random((1, spec.heads, n, n), np.float32)
    noise[..., np.arange(n), np.arange(n)] = 2
    return BlockMask.top_k(jnp.asarray(noise), kept, **spec.blocks).with_transpose()


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """(q, k, v, cotangent, *more) -> (out, dq, dk, dv)."""

    def run(q: Any, k: Any, v: Any, dout: Any, *more: Any) -> Any:
        out, back = jax.vjp(lambda *a: attend(*a, *more), q, k, v)
        return out, *back(dout)

    return jax.jit(run)


def errors(s: Setting, spec: AttentionSpec, impl: str) -> dict[str, float]:
    """The worst relative error (of the norm) of results and gradients at every sparsity, over fewer tokens.

    Raises:
      AssertionError: one is above 2e-2.
    """
    found, spec = {}, dataclasses.replace(part(s, spec), tokens=s.checked_tokens)
    given = arrays(s, spec)
    for sparsity in SPARSITIES:
        mask = mask_of(s, spec, sparsity)
        run = with_gradients(lambda q, k, v, m: block_sparse_attention(q, k, v, m, impl=impl))(*given, mask)
        dense = with_gradients(lambda q, k, v, m: block_sparse_attention(q, k, v, m, impl="reference"))
        wanted = dense(*(x.astype(jnp.float32) for x in given), mask)
        pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(run, wanted)]
        found[str(sparsity)] = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    if not max(found.values()) <= 2e-2:
        raise AssertionError(f"results differ from dense attention by {found}")
    return found


def dense_peers(implementation: str = "cudnn") -> dict[str, Callable[..., Any]]:
    """Dense attentions of (batch, heads, tokens, features) to compare with."""

    def swapped(attend: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a: attend(*(x.swapaxes(1, 2) for x in a)).swapaxes(1, 2)

    cudnn = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    peers = {"cudnn": swapped(cudnn)}
    if importlib.util.find_spec("tokamax") is not None:
        peers["tokamax"] = swapped(importlib.import_module("tokamax").dot_product_attention)
    return peers


def flex(mask: BlockMask, given: list[Any]) -> dict[str, Callable[[], Any]] | None:
    """FlexAttention over the same lists, forward and with gradients; None without a torch that sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return None
    attention = importlib.import_module("torch.nn.attention.flex_attention")
    shape = (*mask.kv_cnt.shape, mask.kv_blocks)
    idx = np.zeros(shape, np.int32)
    idx[..., : mask.width] = mask.kv_idx
    counts, ids = (torch.tensor(np.array(x), device="cuda") for x in (mask.kv_cnt, idx))
    theirs = attention.BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(ids), counts, ids, BLOCK_SIZE=mask.block_q,
        seq_lengths=(mask.q_size, mask.kv_size),
    )  # fmt: skip
    q, k, v, dout = (torch.tensor(np.array(x, np.float32), device="cuda").bfloat16() for x in given)
    compiled = torch.compile(attention.flex_attention, dynamic=False)

    def forward() -> None:
        with torch.inference_mode():
            compiled(q, k, v, block_mask=theirs)
        torch.cuda.synchronize()

    def gradients() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(compiled(*leaves, block_mask=theirs), leaves, dout)
        torch.cuda.synchronize()

    return {"flex": forward, "flex, gradients": gradients}


def repeated(calls: int, run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A job of several calls in a row."""

    def job() -> Any:
        return [run(*args) for _ in range(calls)][-1]

    return job


def measure(s: Setting, spec: AttentionSpec, rounds: int, impl: str, peers: dict[str, Any]) -> dict[str, Any]:
    """Times of one model: milliseconds of a call, speed-ups over the dense peers, teraflops a second of the kept pairs."""
    spec = part(s, spec)
    given = arrays(s, spec)
    jobs: dict[str, Callable[[], Any]] = {}
    for name, attend in peers.items():
        jobs[name] = repeated(s.calls, jax.jit(attend), *given[:3])
        jobs[f"{name}, gradients"] = repeated(s.calls, with_gradients(attend), *given)
    for sparsity in SPARSITIES:
        mask = mask_of(s, spec, sparsity)

        def ours(q: Any, k: Any, v: Any, m: Any) -> Any:
            return block_sparse_attention(q, k, v, m, impl=impl)

        jobs[f"ours {sparsity}"] = repeated(s.calls, jax.jit(ours), *given[:3], mask)
        jobs[f"ours, gradients {sparsity}"] = repeated(s.calls, with_gradients(ours), *given, mask)
        for name, job in (flex(mask, given) or {}).items():
            jobs[f"{name} {sparsity}"] = repeated(s.calls, job)
    times = in_turns(jobs, rounds, 2)
    rows = {}
    for sparsity in SPARSITIES:
        kept = dataclasses.replace(spec, kept=1 - sparsity).width
        pairs = min(kept * spec.block_k, spec.tokens) * spec.tokens * spec.heads
        row = {"ideal": spec.tokens**2 * spec.heads / pairs}
        for kind, products in (("", 2), (", gradients", 9)):  # multiplied pairs of features: 2, and 3 and 4 more
            mine = f"ours{kind} {sparsity}"
            row[f"teraflops{kind}"] = 2 * products * pairs * spec.features * s.calls / medians(times)[mine] / 1e12
            for name in [*peers, "flex"]:
                theirs = f"{name}{kind} {sparsity}" if name == "flex" else f"{name}{kind}"
                if theirs in times:
                    row[f"over {name}{kind}"] = ratio(times, theirs, mine)
        rows[str(sparsity)] = row
    return {
        "tokens": spec.tokens,
        "milliseconds": {n: 1e3 * t / s.calls for n, t in medians(times).items()},
        "sparsities": rows,
        "rounds": times,
    }


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What is demanded of a Hopper GPU."""
    rows = [
        row
        for r in results.values()
        if r["tokens"] >= 32768
        for sparsity, row in r["sparsities"].items()
        if float(sparsity) >= 0.75
    ]
    return {
        f"at least {OF_IDEAL} of the ideal over dense cuDNN from 0.75 and 32k tokens on{kind}": bool(rows)
        and all(row[f"over cudnn{kind}"] >= OF_IDEAL * row["ideal"] for row in rows)
        for kind in ("", ", gradients")
    }


def table(results: dict[str, Any]) -> Table:
    """Speed-ups and teraflops a second."""
    out = Table(title="block-sparse attention on a GPU: speed-ups of ours")
    columns = ["ideal", "over cudnn", "over tokamax", "over flex", "teraflops"]
    columns += [f"{n}, gradients" for n in columns[1:]]
    for name in ("model", "sparsity", *columns):
        out.add_column(name)
    for model, r in results.items():
        for sparsity, row in r["sparsities"].items():
            out.add_row(model, sparsity, *(f"{row[n]:.2f}" if n in row else "-" for n in columns))
    return out


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="rounds that count")] = 10,
    out: Path = RESULTS / "gpu-attention.json",
) -> None:
    """Check, then time, on this machine's Hopper GPU."""
    console = Console(width=150)
    kind = jax.devices()[0].device_kind
    if not any(name in kind for name in CHIPS):
        console.print(f"nothing was run: the device is {kind}, and the kernels are for an NVIDIA H100 or H200")
        return
    found = {spec.name: errors(setting, spec, "mosaic_gpu") for spec in arg_specs.TIMED}
    console.print(f"results and gradients agree with dense attention: {found}")
    results = {spec.name: measure(setting, spec, rounds, "mosaic_gpu", dense_peers()) for spec in arg_specs.TIMED}
    record.write(out, {
        "command": f"python -m experiments.benchmarks.gpu_attention --rounds {rounds}",
        "machine": record.machine(),
        "setting": dataclasses.asdict(setting),
        "errors": found,
        "checks": checks(results),
        "results": results,
    })  # fmt: skip
    console.print(table(results))
    for what, holds in checks(results).items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"{kind}; written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
