"""Images a second of a vision transformer on fewer tokens: beside its MACs, and beside the same method in PyTorch.

    python -m experiments.benchmarks.token_throughput          # needs the "reference" extra; DeiT-T's sizes, 224 pixels

Both sides have the same random weights and are given the same images; before anything is timed, their logits are compared, with
all tokens and with few. In PyTorch the model is written as its users write it: one fused attention
(`scaled_dot_product_attention`) in blocks that do not prune, explicit weights in those that do, `topk` and `gather`. Everything
takes turns in one process, on as many threads. A gain is the time with all tokens over that with few, each side over its own.
"""

from __future__ import annotations

import dataclasses
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
from jprune.methods.tokens.cost import count_macs, dims_of
from jprune.methods.tokens.reducers_by_name import reducer_for
from jprune.methods.tokens.zero_tprune import ZeroTPrune
from jprune.models import vit
from jprune.models.token_hook import TokenReducer

METHODS = ("zero_tprune", "tome", "cls_topk", "random")
BESIDE_TORCH = ("all tokens", "zero_tprune")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the model, and what share of its blocks' MACs is left."""

    width: int = 192
    depth: int = 12
    heads: int = 3
    patch: int = 16
    image: int = 224
    batch: int = 8
    flops: float = 0.65
    seed: int = 0


def torch_side(module: vit.ViT, params: Any, reducer: ZeroTPrune | None) -> Callable[[Any], Any]:
    """The model in PyTorch, images (batch, 3, height, width) -> logits, with the stages of Zero-TPrune after its blocks."""
    torch: Any = peer("torch")
    functional = torch.nn.functional
    p = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params)
    width, (block, *_) = module.config.stream, module.config.blocks
    heads, head = block.heads, block.head
    specs = {} if reducer is None else {s.layer: s for s in reducer.specs}

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (width,), p[name]["scale"], p[name]["bias"], module.config.epsilon)

    def dense(x: Any, leaf: Any, inputs: int) -> Any:
        return x @ leaf["kernel"].reshape(inputs, -1) + leaf["bias"].reshape(-1)

    def scores(weights: Any, votes: int, s: Any) -> Any:
        n = weights.shape[-1]
        signal = torch.ones(n)
        signal[0] = n**0.5 if s.boost else 1.0
        signal = (signal / signal.sum()).expand((*weights.shape[:2], n))
        for _ in range(votes):
            signal = torch.einsum("bhij,bhi->bhj", weights, signal)
        signal = signal * n
        counted = torch.ones((*signal.shape[:2], 1))
        if s.vhf is not None:
            variance = signal.var(-1, correction=0)
            passes = (variance >= s.vhf[0]) & (variance <= s.vhf[1])
            passes = passes | ~passes.any(1, keepdim=True)
            counted = passes[..., None].float()
        return ((counted * signal**2).sum(1) / counted.sum(1)).sqrt()

    def without_duplicates(first: Any, keys: Any, remove: int) -> Any:
        """Places of the tokens that are left, ascending."""
        batch, n = first.shape
        order = torch.argsort(first[:, 1:], dim=-1, descending=True, stable=True) + 1
        half = (n - 1) // 2
        less, more = order[:, n - 1 - half :], order[:, : n - 1 - half]
        unit = functional.normalize(keys, dim=-1)
        one, two = (torch.gather(unit, 1, o[..., None].expand(-1, -1, unit.shape[-1])) for o in (less, more))
        match = (one @ two.transpose(1, 2)).max(-1).values
        gone = torch.gather(less, 1, match.topk(remove, -1).indices)
        here = torch.ones(batch, n, dtype=torch.bool).scatter_(1, gone, False)
        return here.nonzero()[:, 1].reshape(batch, -1)

    def pruned(x: Any, weights: Any, keys: Any, s: Any) -> Any:
        batch, n = x.shape[:2]
        remove, keep = s.numbers(n - 1)
        places = torch.arange(n).expand(batch, n)
        if remove:
            places = without_duplicates(scores(weights, 1, s), keys, remove)
        if keep < n - 1 - remove:
            m = places.shape[1]
            rows = torch.gather(weights, 2, places[:, None, :, None].expand(-1, heads, -1, n))
            inner = torch.gather(rows, 3, places[:, None, None, :].expand(-1, heads, m, -1))
            score = scores(inner / inner.sum(-1, keepdim=True), s.iters, s)
            best = score[:, 1:].topk(keep, -1).indices + 1
            best = torch.cat([torch.zeros(batch, 1, dtype=torch.long), best.sort(-1).values], 1)
            places = torch.gather(places, 1, best)
        return torch.gather(x, 1, places[..., None].expand(-1, -1, width))

    def run(images: Any) -> Any:
        with torch.inference_mode():
            kernel = p["patch_embed"]["kernel"].permute(3, 2, 0, 1)
            x = functional.conv2d(images, kernel, p["patch_embed"]["bias"], stride=module.config.patch)
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([p["cls_token"].expand(x.shape[0], -1, -1), x], 1) + p["pos_embed"]
            for i in range(len(module.config.blocks)):
                name, (batch, n) = f"block{i + 1}", x.shape[:2]
                qkv = dense(norm(x, f"{name}_norm1"), p[f"{name}_attn"]["qkv"], width)
                q, k, v = qkv.reshape(batch, n, 3, heads, head).permute(2, 0, 3, 1, 4)
                weights = None
                if i in specs:
                    weights = (q @ k.transpose(-2, -1) * head**-0.5).softmax(-1)
                    y = weights @ v
                else:
                    y = functional.scaled_dot_product_attention(q, k, v)
                x = x + dense(y.transpose(1, 2).reshape(batch, n, width), p[f"{name}_attn"]["proj"], width)
                y = functional.gelu(dense(norm(x, f"{name}_norm2"), p[f"{name}_fc1"], width))
                x = x + dense(y, p[f"{name}_fc2"], block.mlp)
                if i in specs:
                    x = pruned(x, weights, k.transpose(1, 2).reshape(batch, n, width), specs[i])
            return dense(norm(x, "norm")[:, 0], p["head"], width)

    return run


def measure(s: Setting, rounds: int, torch_too: bool) -> dict[str, Any]:
    """Times of all programs in turns."""
    module = vit.vit(s.width, s.depth, s.heads, s.patch, 1000)
    images = jax.random.normal(jax.random.key(s.seed), (s.batch, s.image, s.image, 3))
    params = jax.jit(module.init)(jax.random.key(s.seed + 1), images[:1])
    params = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, params)  # attention that prefers something
    dims, key = dims_of(module.config, (s.image, s.image, 3)), jax.random.key(2)
    reducers: dict[str, TokenReducer | None] = {"all tokens": None}
    reducers |= {name: reducer_for(name, s.flops, dims) for name in METHODS}
    jobs: dict[str, Any] = {}
    answers: dict[str, np.ndarray] = {}
    for name, reducer in reducers.items():
        program = jax.jit(lambda p, x, r=reducer: module.apply(p, x, reducer=r, key=key))
        jobs[name] = jax.tree_util.Partial(program, params, images)
        answers[name] = np.asarray(jobs[name]())
    errors = {}
    if torch_too:
        theirs = peer("torch").from_numpy(np.array(jnp.moveaxis(images, -1, 1)))
        for name in BESIDE_TORCH:
            reducer = reducers[name]
            assert reducer is None or isinstance(reducer, ZeroTPrune)
            side = torch_side(module, params["params"], reducer)
            jobs[f"{name}, torch"] = jax.tree_util.Partial(side, theirs)
            found = side(theirs).numpy()
            errors[name] = float(np.abs(found - answers[name]).max() / np.abs(answers[name]).max())
        if max(errors.values()) > 1e-3:
            raise AssertionError(f"logits of the two sides differ by {errors} of their scale")
    times = in_turns(jobs, rounds, 1)
    rows = {}
    for name, reducer in reducers.items():
        cost = count_macs(reducer or TokenReducer(), dims)
        whole = count_macs(TokenReducer(), dims)["total"]
        rows[name] = {
            "gflops": cost["total"] / 1e9,
            "choosing": cost["overhead"] / 1e9,
            "ideal": whole / (cost["total"] + cost["overhead"]),
            "gain": ratio(times, "all tokens", name),
        }
        if torch_too and name in BESIDE_TORCH:
            rows[name]["gain_torch"] = ratio(times, "all tokens, torch", f"{name}, torch")
            rows[name]["over_torch"] = ratio(times, f"{name}, torch", name)
    seconds = medians(times)
    return {
        "milliseconds": {n: 1e3 * t for n, t in seconds.items()},
        "images_per_second": {n: s.batch / t for n, t in seconds.items()},
        "methods": rows,
        "errors": errors,
        "rounds": times,
    }


def table(results: dict[str, Any]) -> Table:
    """Images a second and gains."""
    out = Table(title="images a second, and the gain over all tokens")
    for column in ("tokens", "GFLOPs", "choosing", "images a second", "gain", "ideal", "gain in torch", "over torch"):
        out.add_column(column)
    for name, r in results["methods"].items():
        numbers = [r["gflops"], r["choosing"], results["images_per_second"][name], r["gain"], r["ideal"], r.get("gain_torch"),
                   r.get("over_torch")]  # fmt: skip
        out.add_row(
            name, *("-" if x is None else f"{x:.{d}f}" for x, d in zip(numbers, (3, 4, 1, 2, 2, 2, 2), strict=True))
        )
    return out


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="rounds that count")] = 9,
    torch: Annotated[bool, tyro.conf.arg(help="compare with PyTorch")] = True,
    out: Path = RESULTS / "token-throughput.json",
) -> None:
    """Time a vision transformer on all tokens and on few, here and in PyTorch."""
    results = measure(setting, rounds, torch)
    machine = record.machine()
    if torch:
        module: Any = peer("torch")
        machine |= {"torch": module.__version__, "torch_threads": module.get_num_threads()}
    record.write(out, {
        "command": f"python -m experiments.benchmarks.token_throughput --rounds {rounds}",
        "machine": machine,
        "setting": dataclasses.asdict(setting),
        "note": DISTURBED,
        "results": results,
    })  # fmt: skip
    console = Console()
    Console(width=120 if not console.is_terminal else None).print(table(results))
    console.print(f"{machine['device']}; written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
