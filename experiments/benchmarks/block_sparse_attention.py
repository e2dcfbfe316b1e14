"""Block-sparse attention on this device beside dense attention and PyTorch's FlexAttention with the same block mask.

    python -m experiments.benchmarks.block_sparse_attention          # needs the "reference" extra and a C++ compiler

Random blocks of every head, an equal number in every row, at sparsities 0, 0.5, 0.8 and 0.9. The dense side is
`jax.nn.dot_product_attention` and, faster on a CPU, a loop over blocks of queries with plain matrix products: speed-ups
are over both. FlexAttention is compiled by torch, on as many threads. Everything takes turns in one process, after each
result was compared with the dense one.
"""

from __future__ import annotations

import dataclasses
import importlib
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
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from experiments.peers import peer
from pallas_kernels.block_score import block_scores, search_attention
from pallas_kernels.block_sparse_attention import BlockMask, arg_specs, block_sparse_attention

SPARSITIES = (0.0, 0.5, 0.8, 0.9)
OF_IDEAL = 0.5  # the check: at least this part of (blocks of a row) / (blocks kept), at 0.8 and above


@dataclasses.dataclass(frozen=True)
class Setting:
    """One attention problem: some heads of SAM's image encoder."""

    tokens: int = arg_specs.TIMED[0].tokens
    heads: int = 4
    features: int = arg_specs.TIMED[0].features
    block: int = 64
    seed: int = 0

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    def kept(self, sparsity: float) -> int:
        """Key blocks of a row."""
        return max(1, round((1 - sparsity) * self.blocks))


def looped_dense(block: int) -> Callable[..., Any]:
    """Dense attention as a loop over heads and blocks of queries, the fastest on CPU that XLA was found to make."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        heads, tokens, features = q.shape[1:]

        def rows(i: Any) -> Any:
            h, p = jnp.unravel_index(i, (heads, tokens // block))
            s = jax.lax.dynamic_slice(q[0, h], (p * block, 0), (block, features)) @ k[0, h].T / features**0.5
            e = jnp.exp(s - s.max(1, keepdims=True))
            return (e @ v[0, h]) / e.sum(1, keepdims=True)

        return jax.lax.map(rows, jnp.arange(heads * tokens // block)).reshape(q.shape)

    return jax.jit(attend)


def mask_of(s: Setting, sparsity: float) -> BlockMask:
    """Random blocks, as many in every row."""
    noise = np.random.default_rng([s.seed, int(100 * sparsity)]).random((1, s.heads, s.blocks, s.blocks))
    sizes = {"block_q": s.block, "block_k": s.block, "q_size": s.tokens, "kv_size": s.tokens}
    return BlockMask.top_k(jnp.asarray(noise), s.kept(sparsity), **sizes).with_transpose()


def flex_of(s: Setting, mask: BlockMask, q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """FlexAttention over the same lists, all of whole blocks."""
    torch = peer("torch")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    idx = np.zeros((1, s.heads, s.blocks, s.blocks), np.int32)  # its lists are as wide as there are blocks
    idx[..., : mask.width] = mask.kv_idx
    counts, ids = torch.tensor(np.array(mask.kv_cnt)), torch.tensor(idx)
    theirs = flex.BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(ids),
        counts,
        ids,
        BLOCK_SIZE=s.block,
        seq_lengths=(s.tokens, s.tokens),
    )
    tensors = [torch.tensor(np.array(x)) for x in (q, k, v)]
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def run() -> Any:
        with torch.inference_mode():
            return compiled(*tensors, block_mask=theirs)

    return run


def exact(q: Any, k: Any, v: Any, mask: BlockMask) -> np.ndarray:
    """The definition, float64, one head at a time."""
    out = np.zeros(q.shape)
    dense = np.asarray(mask.to_dense())
    for h in range(q.shape[1]):
        s = np.asarray(q[0, h], np.float64) @ np.asarray(k[0, h], np.float64).T / q.shape[-1] ** 0.5
        s[~np.repeat(np.repeat(dense[0, h], mask.block_q, 0), mask.block_k, 1)] = -np.inf
        e = np.exp(s - s.max(1, keepdims=True))
        out[0, h] = e @ np.asarray(v[0, h], np.float64) / e.sum(1, keepdims=True)
    return out


def measure(s: Setting, rounds: int, flex: bool) -> dict[str, Any]:
    """Times of all programs in turns, and what they say."""
    rng = np.random.default_rng(s.seed)
    q, k, v = (jnp.asarray(rng.standard_normal((1, s.heads, s.tokens, s.features), np.float32)) for _ in range(3))
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    dense, loop = jax.jit(jax.nn.dot_product_attention), looped_dense(s.block)
    sparse = jax.jit(lambda q, k, v, m: block_sparse_attention(q, k, v, m, impl="xla"))
    slope = jax.jit(jax.grad(lambda x, m: (block_sparse_attention(*x, m, impl="xla") ** 2).sum()))
    sizes = {"block_q": s.block, "block_k": s.block, "impl": "xla"}
    lse = block_sparse_attention(q, k, v, mask_of(s, 0.0), impl="xla", return_lse=True)[1]
    dense_slope = jax.jit(jax.grad(lambda x: (jax.nn.dot_product_attention(*x) ** 2).sum()))
    jobs: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(*swapped),
        "dense, gradients": lambda: dense_slope(swapped),
        "dense, looped": lambda: loop(q, k, v),
        "masses": jax.tree_util.Partial(jax.jit(lambda q, k, l: block_scores(q, k, l, **sizes)), q, k, lse),
        "search": jax.tree_util.Partial(jax.jit(lambda q, k, v: search_attention(q, k, v, **sizes)), q, k, v),
    }
    errors = {}
    for sparsity in SPARSITIES:
        mask = mask_of(s, sparsity)
        jobs[f"ours {sparsity}"] = jax.tree_util.Partial(sparse, q, k, v, mask)
        jobs[f"ours, gradients {sparsity}"] = jax.tree_util.Partial(slope, (q, k, v), mask)
        if flex:
            jobs[f"flex {sparsity}"] = flex_of(s, mask, q, k, v)
        wanted = exact(q, k, v, mask)
        for name in ("ours", "flex") if flex else ("ours",):
            errors[f"{name} {sparsity}"] = float(np.abs(np.asarray(jobs[f"{name} {sparsity}"]()) - wanted).max())
    if max(errors.values()) > 2e-5:
        raise AssertionError(f"results differ from the definition by {errors}")
    times = in_turns(jobs, rounds, 1)
    rows = {}
    for sparsity in SPARSITIES:
        ideal = s.blocks / s.kept(sparsity)
        rows[str(sparsity)] = {
            "kept": s.kept(sparsity),
            "ideal": ideal,
            "over_dense": ratio(times, "dense", f"ours {sparsity}"),
            "over_looped": ratio(times, "dense, looped", f"ours {sparsity}"),
            "of_ideal": ratio(times, "dense, looped", f"ours {sparsity}") / ideal,
            "gradients_over_dense": ratio(times, "dense, gradients", f"ours, gradients {sparsity}"),
            "gradients_over_own": ratio(times, "ours, gradients 0.0", f"ours, gradients {sparsity}"),
        } | ({"over_flex": ratio(times, f"flex {sparsity}", f"ours {sparsity}")} if flex else {})
    return {
        "milliseconds": {name: 1e3 * t for name, t in medians(times).items()},
        "sparsities": rows,
        "search_to_looped": ratio(times, "search", "dense, looped"),
        "masses_to_looped": ratio(times, "masses", "dense, looped"),
        "errors": errors,
        "rounds": times,
    }


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What is demanded of a CPU."""
    rows = results["sparsities"]
    return {
        "faster than jax.nn.dot_product_attention from 0.5": all(
            rows[s]["over_dense"] > 1 for s in ("0.5", "0.8", "0.9")
        ),
        f"at least {OF_IDEAL} of the ideal over looped dense at 0.8 and 0.9": all(
            rows[s]["of_ideal"] >= OF_IDEAL for s in ("0.8", "0.9")
        ),
        "a search costs at most 1.3 of looped dense": results["search_to_looped"] <= 1.3,
        "masses cost at most 0.75 of looped dense": results["masses_to_looped"] <= 0.75,
    }


def table(results: dict[str, Any]) -> Table:
    """Speed-ups."""
    out = Table(title="block-sparse attention: speed-up over dense attention, and beside FlexAttention")
    for column in ("sparsity", "ideal", "over jax.nn", "over looped", "of ideal", "over Flex", "gradients: over jax.nn",
                   "over own at 0"):  # fmt: skip
        out.add_column(column)
    for name, r in results["sparsities"].items():
        numbers = [r.get(n) for n in ("ideal", "over_dense", "over_looped", "of_ideal", "over_flex",
                                      "gradients_over_dense", "gradients_over_own")]  # fmt: skip
        out.add_row(name, *("-" if x is None else f"{x:.2f}" for x in numbers))
    return out


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="rounds that count")] = 15,
    flex: Annotated[bool, tyro.conf.arg(help="compare with FlexAttention")] = True,
    out: Path = RESULTS / "block-sparse-attention.json",
) -> None:
    """Time sparse, dense and PyTorch's attention on this device."""
    results = measure(setting, rounds, flex)
    machine = record.machine()
    if flex:
        torch = peer("torch")
        machine |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    record.write(out, {
        "command": f"python -m experiments.benchmarks.block_sparse_attention --rounds {rounds}",
        "machine": machine,
        "setting": dataclasses.asdict(setting),
        "note": DISTURBED,
        "checks": checks(results),
        "results": results,
    })  # fmt: skip
    console = Console()
    Console(width=130 if not console.is_terminal else None).print(table(results))
    parts = (f"{n} {results[f'{n}_to_looped']:.2f}" for n in ("search", "masses"))
    console.print(f"time over that of looped dense: {', '.join(parts)}")
    for what, holds in checks(results).items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"{machine['device']}; written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
