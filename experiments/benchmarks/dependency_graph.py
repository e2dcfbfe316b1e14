"""From a model to half its channels: dependency groups, scores, slices - beside Torch-Pruning, in one run.

    python -m experiments.benchmarks.dependency_graph            # needs the "reference" extra; a few minutes

Both sides start from a model with random weights and end with its channels halved by the squared magnitude of whole
groups: here trace, score, allocate and compact; there a `MagnitudePruner` (which builds its dependency graph) and one
step. The last layer's outputs stay. Of the attention both halve the size of a head, not the number of heads. "cold" is
the first time in a fresh process, compilation included; "warm" the median of later rounds, both sides in turns. A warm
trace of the same module takes its jaxpr from jax's memory; "anew" is that of another module object, whose Python code
jax runs again. What the imports and the models left behind is exempted from garbage collection before, for each side
shares its process with the other's libraries.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import fnmatch
import gc
import multiprocessing
import statistics
import subprocess
import sys
import time
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
from experiments.benchmarks import DISTURBED, RESULTS
from experiments.peers import peer
from jprune.budget import Target, uniform
from jprune.checkpoint.torch import tables, torch_names
from jprune.importance import magnitude
from jprune.models import build


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on both sides.

    Attributes:
      name: in our zoo.
      library: whose model it is compared with, and whose layer names are used.
      make: () -> torch model.
      last: torch model -> its last layer.
      whole: patterns of our groups that stay whole.
    """

    name: str
    library: str
    make: Callable[[], Any]
    last: Callable[[Any], Any]
    whole: tuple[str, ...] = ()


CASES = {
    "resnet18": Case("resnet18", "torchvision", lambda: peer("torchvision").models.resnet18(), lambda m: m.fc),
    "resnet50": Case("resnet50", "torchvision", lambda: peer("torchvision").models.resnet50(), lambda m: m.fc),
    "densenet121": Case(
        "densenet121", "torchvision", lambda: peer("torchvision").models.densenet121(), lambda m: m.classifier
    ),
    "vit_base": Case(
        "vit_base",
        "timm",
        lambda: peer("timm").create_model("vit_base_patch16_224"),
        lambda m: m.head,
        ("*_attn/qkv/kernel:2",),  # the heads themselves
    ),
}


def random_variables(module: Any, side: int) -> Any:
    """Normal weights without compiling the module's initialisers."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, side, side, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32)), shapes)


def ours(case: Case, module: Any, variables: Any, side: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(seconds of every part, what came out)."""
    clock = [time.perf_counter()]
    graph = jprune.trace(module.apply, variables, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))
    clock.append(time.perf_counter())
    scores = magnitude(graph, variables, 2)
    jax.block_until_ready(scores)
    clock.append(time.perf_counter())
    whole = [g for p in case.whole for g in fnmatch.filter(graph.groups, p)]
    half = graph.cost(widths={g: i.size // 2 for g, i in graph.groups.items() if g not in whole}).macs
    keep = uniform(graph, scores, Target.macs(half), max_sparsity=0.5, frozen=whole).keep
    clock.append(time.perf_counter())
    small = jax.block_until_ready(graph.compact(variables, keep))
    clock.append(time.perf_counter())
    for g, k in keep.items():
        if k.sum() != (k.size if g in whole else k.size - k.size // 2):
            raise AssertionError(f"group {g} keeps {k.sum()} of {k.size}")
    seconds = dict(zip(("trace", "score", "allocate", "compact"), np.diff(clock).tolist(), strict=True))
    seconds |= {"prune": clock[-1] - clock[1], "total": clock[-1] - clock[0]}
    other = build(case.name)
    again = time.perf_counter()
    jprune.trace(other.apply, variables, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))
    seconds["anew"] = time.perf_counter() - again
    left = sum(x.size for x in jax.tree.leaves(small["params"])) / graph.cost().params
    units = sum(i.size for i in graph.groups.values())
    return seconds, {"units": units, "params_fraction": left, "channels": our_channels(case, module, graph, variables)}


def our_channels(case: Case, module: Any, graph: jprune.Graph, variables: Any) -> dict[str, int]:
    """{torch's layer name: outputs that belong to a prunable unit} of convolutions and matrix products."""
    named = torch_names(tables(module)[case.library], variables)
    out = {}
    for name, path in named.items():
        if not path.endswith("/kernel"):
            continue
        shape = graph.leaves[path].shape
        first = 1 if path.split("/")[-2] == "qkv" else len(shape) - 1  # (stream, 3, heads, size)
        owned = np.zeros(shape[first:], bool)
        for group in graph.groups.values():
            for m in group.members:
                if m.path == path and m.axis >= first:
                    owned[(slice(None),) * (m.axis - first) + (m.positions.ravel(),)] = True
        out[name.removesuffix(".weight")] = int(owned.sum())
    return out


def theirs(case: Case, model: Any, side: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The same of Torch-Pruning; the model is pruned in place."""
    torch, pruning = peer("torch"), peer("torch_pruning")
    x = torch.zeros(1, 3, side, side)
    heads = {m.qkv: m.num_heads for m in model.modules() if type(m).__name__ == "Attention"}
    before = sum(p.numel() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the parameters that belong to no module
        clock = [time.perf_counter()]
        graph = pruning.DependencyGraph().build_dependency(model, x)
        clock.append(time.perf_counter())
        pruner = pruning.pruner.MagnitudePruner(
            model,
            x,
            importance=pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[case.last(model)],
            num_heads=heads,
        )
        clock.append(time.perf_counter())
        found = their_channels(graph, model, case.last(model))
        again = time.perf_counter()
        pruner.step()
        clock.append(clock[-1] + time.perf_counter() - again)
    trace, init, step = np.diff(clock).tolist()
    # the pruner builds the graph once more, so the total is without the first part, which serves to compare the traces
    seconds = {"trace": trace, "pruner": init, "prune": step, "total": init + step}
    return seconds, found | {"params_fraction": sum(p.numel() for p in model.parameters()) / before}


def their_channels(graph: Any, model: Any, last: Any) -> dict[str, Any]:
    """Units of all groups, and per layer the outputs that are in one."""
    torch = peer("torch")
    names = {module: name for name, module in model.named_modules()}
    channels: dict[str, set[int]] = collections.defaultdict(set)
    units = 0
    for group in graph.get_all_groups(ignored_layers=[last]):
        units += len(group[0].idxs)
        for item in group:
            module = item.dep.target.module
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and graph.is_out_channel_pruning_fn(
                item.dep.handler
            ):
                channels[names[module]].update(item.idxs)
    return {"units": units, "channels": {name: len(c) for name, c in channels.items()}}


def measure(name: str, side: int, rounds: int) -> dict[str, Any]:
    """Both sides in this process: the first time, then `rounds` rounds in turns."""
    case = CASES[name]
    peer("torch_pruning"), jprune.trace  # imports are not part of the first time
    model = case.make().eval()
    for m in model.modules():
        if type(m).__name__ == "Attention":
            m.fused_attn = False  # the fused kernel hides the products its groups are found by
    module = build(name)
    variables = random_variables(module, side)
    jobs = {
        "ours": lambda m: ours(case, module, variables, side),
        "theirs": lambda m: theirs(case, m, side),
    }
    out: dict[str, Any] = {"cold": {}, "warm": {s: collections.defaultdict(list) for s in jobs}}
    gc.collect()
    gc.freeze()
    for k in range(1 + rounds):
        for which in list(jobs) if k % 2 == 0 else reversed(list(jobs)):
            seconds, found = jobs[which](copy.deepcopy(model) if which == "theirs" else None)
            if k == 0:
                out["cold"][which] = seconds
                out[which] = found
            else:
                for part, s in seconds.items():
                    out["warm"][which][part].append(s)
    out["warm"] = {which: dict(parts) for which, parts in out["warm"].items()}
    return out


def in_fresh_process(name: str, side: int, rounds: int) -> dict[str, Any]:
    """`measure` where nothing has run before."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, name, side, rounds).result()


def compare(name: str, side: int, rounds: int, colds: int) -> dict[str, Any]:
    """Medians, ratios (ours to theirs; below 1 we are faster) and what each side can prune."""
    runs = [in_fresh_process(name, side, rounds if k == 0 else 0) for k in range(max(colds, 1))]
    first = runs[0]

    def cold(which: str) -> dict[str, float]:
        return {part: statistics.median(r["cold"][which][part] for r in runs) for part in first["cold"][which]}

    def warm(which: str) -> dict[str, float]:
        return {part: statistics.median(s) for part, s in first["warm"][which].items()}

    def per_round(part: str, of: str = "") -> float:
        pairs = zip(first["warm"]["ours"][of or part], first["warm"]["theirs"][part], strict=True)
        return statistics.median(a / b for a, b in pairs)

    mine, other = first["ours"], first["theirs"]
    return {
        "cold": {"ours": cold("ours"), "theirs": cold("theirs")},
        "warm": {"ours": warm("ours"), "theirs": warm("theirs")},
        "ratio": {
            "cold": statistics.median(r["cold"]["ours"]["total"] / r["cold"]["theirs"]["total"] for r in runs),
            "cold trace": statistics.median(r["cold"]["ours"]["trace"] / r["cold"]["theirs"]["trace"] for r in runs),
            "warm trace anew": per_round("trace", "anew"),
            **{f"warm {part}": per_round(part) for part in ("trace", "prune", "total")},
        },
        "units": {"ours": mine["units"], "theirs": other["units"]},
        "channels": {"ours": sum(mine["channels"].values()), "theirs": sum(other["channels"].values())},
        "layers_where_they_prune_more": sorted(
            layer for layer, n in other["channels"].items() if mine["channels"].get(layer, 0) < n
        ),
        "params_fraction": {"ours": mine["params_fraction"], "theirs": other["params_fraction"]},
        "seconds": {"cold": [r["cold"] for r in runs], "warm": first["warm"]},
    }


def imports(rounds: int) -> dict[str, float]:
    """Seconds that imports take in a fresh process, beyond those of the one before: medians."""
    steps = ("import jax", "import jprune", "jprune.trace")
    code = "import time; c = [time.perf_counter()]\n"
    code += "".join(f"{step}; c.append(time.perf_counter())\n" for step in steps)
    code += "print(*[b - a for a, b in zip(c, c[1:])])"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(rounds)
    ]
    seconds = np.median([[float(x) for x in r.stdout.split()] for r in runs], axis=0)
    return dict(zip(steps, seconds.tolist(), strict=True))


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """The targets."""
    out = {}
    for name, r in results.items():
        out[f"{name}: the graph no slower, warm"] = r["ratio"]["warm trace"] <= 1
        out[f"{name}: no slower, cold"] = r["ratio"]["cold"] <= 1
        out[f"{name}: no slower, warm"] = r["ratio"]["warm total"] <= 1
        out[f"{name}: every channel they prune we prune"] = not r["layers_where_they_prune_more"]
    return out


def table(results: dict[str, Any]) -> Table:
    """Seconds and channels of both sides."""
    out = Table(title="half of every group: seconds, ours / Torch-Pruning's")
    for column in (
        "model",
        "cold",
        "ratio",
        "warm",
        "ratio",
        "trace, warm",
        "trace anew",
        "prune, warm",
        "channels",
        "parameters left",
    ):
        out.add_column(column)
    for name, r in results.items():

        def both(when: str, part: str, r: Any = r) -> str:
            return f"{r[when]['ours'][part]:.2f} / {r[when]['theirs'][part]:.2f}"

        out.add_row(
            name, both("cold", "total"), f"{r['ratio']['cold']:.2f}", both("warm", "total"),
            f"{r['ratio']['warm total']:.2f}", both("warm", "trace"), f"{r['warm']['ours']['anew']:.2f}", both("warm", "prune"),
            f"{r['channels']['ours']:,} / {r['channels']['theirs']:,}",
            f"{r['params_fraction']['ours']:.1%} / {r['params_fraction']['theirs']:.1%}",
        )  # fmt: skip
    return out


def main(
    models: tuple[str, ...] = ("resnet50", "densenet121", "vit_base"),
    side: Annotated[int, tyro.conf.arg(help="of the images; the ViT needs 224")] = 224,
    rounds: Annotated[int, tyro.conf.arg(help="warm rounds")] = 5,
    colds: Annotated[int, tyro.conf.arg(help="fresh processes for the first-time medians")] = 3,
    out: Path = RESULTS / "dependency-graph.json",
) -> None:
    """Time trace and prune of both libraries, and count what each can prune."""
    if unknown := sorted(set(models) - set(CASES)):
        raise ValueError(f"no model {unknown[0]!r} here: choose from {', '.join(CASES)}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: medians need at least one")
    torch, pruning = peer("torch"), peer("torch_pruning")
    results = {name: compare(name, side, rounds, colds) for name in models}
    verdict = checks(results)
    record.write(out, {
        "command": f"python -m experiments.benchmarks.dependency_graph --models {' '.join(models)} --side {side} "
                   f"--rounds {rounds} --colds {colds}",
        "machine": record.machine() | {"torch": torch.__version__, "torch_pruning": pruning.__version__,
                                       "timm": peer("timm").__version__, "torch_threads": torch.get_num_threads()},
        "note": DISTURBED,
        "checks": verdict,
        "imports": imports(max(rounds, 3)),
        "results": results,
    })  # fmt: skip
    console = Console()
    Console(width=150 if not console.is_terminal else None).print(table(results))
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
