"""What pruning buys on this machine: time of compacted models over dense ones, beside Torch-Pruning's pruned models.

    python -m experiments.benchmarks.speedup                     # needs the "reference" extra; about ten minutes

Every model loses half its MACs, the same fraction of every group, by group L2 of random weights. Ours is
the rebuilt module under `jax.jit`, once with any widths and once with widths that are multiples of 8; theirs is the torch
model after `MagnitudePruner`, pruned in small steps until the convolutions and matrix products cost half. An efficiency
of 1 means that the time fell as much as the MACs. All programs of a model take turns.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jprune
from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, medians, ratio
from experiments.peers import peer
from jprune.budget import Target, uniform
from jprune.importance import magnitude
from jprune.models import build, rebuild

KEPT = 0.5
STEPS = 200  # Torch-Pruning's: each removes a 200th of the channels, so that it stops close to the target
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: its name in our zoo, () -> its torch twin, shape of the batch (images, height, width, channels)."""

    name: str
    make: Callable[[], Any]
    batch: tuple[int, int, int, int]


def small_twin(blocks: int, channels: int) -> Any:
    """Our CIFAR-style ResNet (1x1 shortcuts) out of torchvision's basic blocks."""
    nn, basic = peer("torch").nn, peer("torchvision").models.resnet.BasicBlock

    def block(i: int, o: int) -> Any:
        shortcut = nn.Sequential(nn.Conv2d(i, o, 1, 2, bias=False), nn.BatchNorm2d(o))
        return basic(i, o) if i == o else basic(i, o, 2, shortcut)

    widths = [16] + [w for w in (16, 32, 64) for _ in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(block(i, o) for i, o in itertools.pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


CASES = {
    "digits": Case("resnet_digits", lambda: small_twin(2, 1), (256, 8, 8, 1)),
    "resnet20": Case("resnet20", lambda: small_twin(3, 3), (64, 32, 32, 3)),
    "resnet18": Case("resnet18", lambda: peer("torchvision").models.resnet18(), (4, 224, 224, 3)),
    "resnet50": Case("resnet50", lambda: peer("torchvision").models.resnet50(), (4, 224, 224, 3)),
}


def ours(case: Case, multiple: int) -> tuple[Any, Any, Any, Any, int, float]:
    """(dense module, its variables, small module, its variables, dense MACs of an image, fraction of them left)."""
    module = build(case.name)
    x = jax.ShapeDtypeStruct(case.batch, jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(0.05 * rng.standard_normal(s.shape, np.float32) ** 2), shapes)
    graph = jprune.trace(module.apply, variables, x)
    keep = uniform(graph, magnitude(graph, variables, 2), Target.macs(KEPT), multiple_of=multiple).keep
    small = graph.compact(variables, keep)
    dense = graph.cost().macs
    return module, variables, rebuild(module, small), small, dense // case.batch[0], graph.cost(keep).macs / dense


def torch_macs(model: Any, batch: tuple[int, int, int, int]) -> int:
    """MACs of convolutions and linear layers for one image, as our cost counts them."""
    torch = peer("torch")
    total = 0

    def count(module: Any, _: Any, out: Any) -> None:
        nonlocal total
        total += module.weight.numel() * (out[0, 0].numel() if out.ndim == 4 else 1)

    hooks = [
        m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    with torch.no_grad():
        model(torch.zeros(1, batch[3], *batch[1:3]))
    for hook in hooks:
        hook.remove()
    return total


def theirs(case: Case) -> tuple[Any, Any, int, float]:
    """(dense torch model, pruned one, dense MACs of an image, fraction of them left)."""
    torch, pruning = peer("torch"), peer("torch_pruning")
    model = case.make().eval()
    small = copy.deepcopy(model)
    head = [m for m in small.modules() if isinstance(m, torch.nn.Linear)][-1]
    dense = torch_macs(model, case.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = pruning.pruner.MagnitudePruner(
            small,
            torch.zeros(1, case.batch[3], *case.batch[1:3]),
            importance=pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[head],
        )
        for _ in range(STEPS):
            if torch_macs(small, case.batch) <= KEPT * dense:
                break
            pruner.step()
    return model, small, dense, torch_macs(small, case.batch) / dense


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times of all programs in turns, and what they say."""
    torch = peer("torch")
    module, variables, any_width, small, macs, left = ours(case, 1)
    _, _, even_width, even, _, even_left = ours(case, MULTIPLE)
    torch_dense, torch_small, their_macs, torch_left = theirs(case)
    if macs != their_macs:
        raise AssertionError(f"the two sides of {case.name} are different networks: {macs:,} and {their_macs:,} MACs")
    x = jnp.asarray(np.random.default_rng(1).standard_normal(case.batch, np.float32))
    image = torch.tensor(np.array(x)).permute(0, 3, 1, 2).contiguous()
    dense_run, small_run, even_run = (jax.jit(m.apply) for m in (module, any_width, even_width))

    def torch_run(model: Any) -> None:
        with torch.inference_mode():
            model(image)

    times = in_turns(
        {
            "ours dense": lambda: dense_run(variables, x),
            "ours pruned": lambda: small_run(small, x),
            "ours pruned, multiples": lambda: even_run(even, x),
            "torch dense": lambda: torch_run(torch_dense),
            "torch pruned": lambda: torch_run(torch_small),
        },
        rounds,
        2,
    )

    def row(pruned: str, dense: str, fraction: float) -> dict[str, float]:
        faster = ratio(times, dense, pruned)
        return {"macs_fraction": fraction, "speed_up": faster, "efficiency": faster * fraction}

    return {
        "batch": case.batch,
        "macs": macs,
        "milliseconds": {name: 1e3 * s for name, s in medians(times).items()},
        "ours": row("ours pruned", "ours dense", left),
        "ours, multiples": row("ours pruned, multiples", "ours dense", even_left),
        "torch-pruning": row("torch pruned", "torch dense", torch_left),
        "dense_ours_to_torch": ratio(times, "ours dense", "torch dense"),
        "pruned_ours_to_torch": ratio(times, "ours pruned", "torch pruned"),
        "rounds": times,
    }


def table(results: dict[str, Any]) -> Table:
    """Speed-ups and efficiencies."""
    out = Table(title=f"speed-up at {KEPT:.0%} of the MACs (efficiency: speed-up times the fraction of MACs left)")
    for column in ("model", "batch", "dense ms, ours / torch", "pruned ms, ours / torch", "ours",
                   f"ours, widths x{MULTIPLE}", "Torch-Pruning"):  # fmt: skip
        out.add_column(column)
    for name, r in results.items():
        ms = r["milliseconds"]
        speeds = (
            f"{r[k]['speed_up']:.2f} ({r[k]['efficiency']:.2f})" for k in ("ours", "ours, multiples", "torch-pruning")
        )
        out.add_row(name, "x".join(map(str, r["batch"])), f"{ms['ours dense']:.1f} / {ms['torch dense']:.1f}",
                    f"{ms['ours pruned']:.1f} / {ms['torch pruned']:.1f}", *speeds)  # fmt: skip
    return out


def main(
    models: tuple[str, ...] = tuple(CASES),
    rounds: Annotated[int, tyro.conf.arg(help="rounds that count")] = 15,
    images: Annotated[int | None, tyro.conf.arg(help="batch size instead of the customary one")] = None,
    out: Path = RESULTS / "speedup.json",
) -> None:
    """Time dense and pruned models of both libraries on this device."""
    if unknown := sorted(set(models) - set(CASES)):
        raise ValueError(f"no model {unknown[0]!r} here: choose from {', '.join(CASES)}")
    torch, pruning = peer("torch"), peer("torch_pruning")
    results = {}
    for name in models:
        case = CASES[name]
        if images is not None:
            case = dataclasses.replace(case, batch=(images, *case.batch[1:]))
        results[name] = measure(case, rounds)
    record.write(out, {
        "command": f"python -m experiments.benchmarks.speedup --models {' '.join(models)} --rounds {rounds}"
                   + (f" --images {images}" if images is not None else ""),
        "machine": record.machine() | {"torch": torch.__version__, "torch_pruning": pruning.__version__,
                                       "torch_threads": torch.get_num_threads()},
        "note": DISTURBED,
        "results": results,
    })  # fmt: skip
    console = Console()
    Console(width=150 if not console.is_terminal else None).print(table(results))
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
