"""CFSP of one decoder, here and in PyTorch with forward hooks; and what the smaller decoder is worth in tokens a second.

    python -m experiments.benchmarks.language_speed          # needs the "reference" extra; ten minutes

Both sides read the same folder with random weights, calibrate on the same windows, choose the channels of each layer and
cut them; they must choose the same. The PyTorch side is a straightforward loop over `transformers`' model: hooks on the
layers (angle of the residual stream) and on the down projections (squares of each channel), the language-model head left
out, scores by the closed form that the official ones have. Ours gathers moments of the attention and three more metrics
in the same pass. "cold" is the first time in a fresh process, trace and compilation included; "warm" the median of later
rounds, both sides in turns. Memory is what a run adds to the resident size of its process, at its peak.

The pruned decoder then reads prompts and writes answers beside the dense one; a speed-up is compared with the weights
that a token meets: all but the embedding, of which it is one row.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import statistics
import tempfile
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

import jprune
from experiments import record
from experiments.benchmarks import DISTURBED, RESULTS, in_turns, ratio
from experiments.peers import peer
from jprune.budget.rounding import channel_counts
from jprune.checkpoint import load_hf, save_hf
from jprune.language.blocks import blocks
from jprune.language.perplexity import Runs
from jprune.language.statistics import block_stats
from jprune.methods.channels.cfsp import CFSPConfig, allocate_keep_ratios, cfsp_keep
from jprune.models import rebuild
from jprune.models.llama import Llama, LlamaConfig, llama_config


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is pruned, and on what.

    Attributes:
      stream, ffn, depth, heads, vocab: of the decoder.
      windows, tokens, batch: of the calibration text, and how many windows at a time.
      sparsity, multiple_of: of the FFN channels.
      prompt, answer: tokens of the timed generation.
    """

    stream: int = 512
    ffn: int = 1408
    depth: int = 8
    heads: int = 8
    vocab: int = 4096
    windows: int = 16
    tokens: int = 256
    batch: int = 4
    sparsity: float = 0.5
    multiple_of: int = 128
    prompt: int = 256
    answer: int = 64

    def config(self) -> LlamaConfig:
        """Of the decoder."""
        return llama_config(self.vocab, self.stream, self.ffn, self.depth, self.heads)

    def text(self) -> list[np.ndarray]:
        """Batches of random ids."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, self.vocab, (self.windows, self.tokens)).astype(np.int32)
        return [ids[i : i + self.batch] for i in range(0, self.windows, self.batch)]


def random_variables(config: LlamaConfig) -> Any:
    """Normal weights that keep the signal's size, channels of unequal strength as trained ones have."""
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    rng = np.random.default_rng(0)

    def one(path: Any, leaf: Any) -> jax.Array:
        module, kind = path[-2].key, path[-1].key
        if kind == "scale":
            return jnp.ones(leaf.shape)
        fan = {"o": config.stream, "embed": config.stream}.get(module, leaf.shape[0])
        value = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan, dtype=np.float32)
        if module in ("gate", "up"):
            value *= np.exp(0.5 * rng.standard_normal(leaf.shape[-1], np.float32))
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(one, shapes)


class Ours:
    """Trace, calibrate, choose, cut."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.s = setting
        config, self.variables, _ = load_hf(folder)
        self.module = Llama(config)
        self.text = setting.text()
        self.graph: Any = None

    def prune(self) -> tuple[dict[str, float], list[np.ndarray]]:
        """(seconds of every part, kept channels of every layer); what is traced and compiled stays for the next time."""
        clock = [time.perf_counter()]
        if self.graph is None:
            self.graph = jprune.trace(self.module.apply, self.variables, self.text[0])
            self.found = blocks(self.graph)
        clock.append(time.perf_counter())
        stats = block_stats(self.graph, self.variables, self.text, self.found)
        clock.append(time.perf_counter())
        options = CFSPConfig(multiple_of=self.s.multiple_of)
        self.keep, _ = cfsp_keep(self.graph, self.variables, stats, self.s.sparsity, options, self.found)
        self.small = jax.block_until_ready(self.graph.compact(self.variables, self.keep))
        clock.append(time.perf_counter())
        kept = [np.flatnonzero(self.keep[b.ffn]) for b in self.found]
        return parts(clock, "trace", "calibrate", "choose and cut"), kept


class Theirs:
    """The same in PyTorch: one forward pass a batch, hooks on layers and down projections."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.s = setting
        self.torch, transformers = peer("torch"), peer("transformers")
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=self.torch.float32).eval()

    def statistics(self, batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(mean angle of each layer (L,), sums of squares of its channels (L, F))."""
        torch, layers = self.torch, self.model.model.layers
        angles = torch.zeros(len(layers))
        squares = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]
        tokens = 0

        def around(index: int) -> Callable[..., None]:
            def hook(_: Any, args: Any, kwargs: Any, out: Any) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                after = out[0] if isinstance(out, tuple) else out
                u, v = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (before, after))
                theta = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / torch.pi
                angles[index] += theta.sum()

            return hook

        def into(index: int) -> Callable[..., None]:
            def hook(_: Any, args: Any) -> None:
                squares[index] += args[0].float().square().sum(dim=(0, 1))

            return hook

        hooks = [layer.register_forward_hook(around(i), with_kwargs=True) for i, layer in enumerate(layers)]
        hooks += [layer.mlp.down_proj.register_forward_pre_hook(into(i)) for i, layer in enumerate(layers)]
        with torch.inference_mode():
            for batch in batches:
                self.model.model(torch.from_numpy(batch).long(), use_cache=False)
                tokens += batch.size
        for hook in hooks:
            hook.remove()
        return (angles / tokens).numpy(), torch.stack(squares).numpy()

    def prune(self) -> tuple[dict[str, float], list[np.ndarray]]:
        """(seconds of every part, kept channels of every layer)."""
        clock = [time.perf_counter()]
        angles, squares = self.statistics(self.s.text())
        clock.append(time.perf_counter())
        ratios = allocate_keep_ratios(angles.astype(np.float64), self.s.sparsity)
        counts = channel_counts(ratios, [self.s.ffn] * self.s.depth, multiple_of=self.s.multiple_of)
        kept = [np.sort(np.argsort(-x, kind="stable")[:n]) for x, n in zip(squares, counts, strict=True)]
        self.cut(kept)
        clock.append(time.perf_counter())
        return parts(clock, "calibrate", "choose and cut"), kept

    def cut(self, kept: list[np.ndarray]) -> list[Any]:
        """New gate, up and down projections of every layer."""
        torch, out = self.torch, []
        with torch.inference_mode():
            for layer, rows in zip(self.model.model.layers, kept, strict=True):
                index = torch.from_numpy(rows)
                for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                    weight = getattr(layer.mlp, name).weight.index_select(axis, index)
                    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                    linear.weight = torch.nn.Parameter(weight)
                    out.append(linear)
        return out


def parts(clock: list[float], *names: str) -> dict[str, float]:
    """Seconds between readings of a clock, and all of them together."""
    return dict(zip(names, np.diff(clock).tolist(), strict=True)) | {"total": clock[-1] - clock[0]}


SIDES: dict[str, Callable[[Path, Setting], Any]] = {"ours": Ours, "theirs": Theirs}


def resident(field: str) -> int:
    """Bytes that /proc says this process holds: VmRSS now, VmHWM at its peak since the last reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def added(job: Callable[[], Any]) -> tuple[Any, int]:
    """(result, bytes that the job adds to the resident size at its peak)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    out = job()
    return out, resident("VmHWM") - before


def alone(which: str, folder: Path, setting: Setting) -> dict[str, Any]:
    """One side in this process: the first run and the next."""
    side = SIDES[which](folder, setting)
    (cold, _), first = added(side.prune)
    (_, _), again = added(side.prune)
    return {"cold": cold, "first_bytes": first, "again_bytes": again}


def in_fresh_process(which: str, folder: Path, setting: Setting) -> dict[str, Any]:
    """`alone` where nothing has run before."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(alone, which, folder, setting).result()


def met(variables: Any) -> int:
    """Weights that every token is multiplied with."""
    params = variables["params"]
    return sum(x.size for name in params if name != "embed" for x in jax.tree.leaves(params[name]))


def generation(side: Ours, rounds: int) -> dict[str, Any]:
    """Tokens a second of the dense and the pruned decoder, in turns."""
    s = side.s
    runs = {
        "dense": Runs(side.module, side.variables, 1, s.prompt, s.answer),
        "pruned": Runs(rebuild(side.module, side.small), side.small, 1, s.prompt, s.answer),
    }
    jobs = {f"{name} {what}": getattr(run, what) for name, run in runs.items() for what in ("prefill", "decode")}
    times = in_turns(jobs, rounds, 2)
    left = met(side.small) / met(side.variables)
    out: dict[str, Any] = {"weights_fraction": left, "seconds": times}
    for what in ("prefill", "decode"):
        faster = ratio(times, f"dense {what}", f"pruned {what}")
        tokens = {name: run.tokens[what] / statistics.median(times[f"{name} {what}"]) for name, run in runs.items()}
        out[what] = {"tokens_per_second": tokens, "speed_up": faster, "efficiency": faster * left}
    return out


def measure(setting: Setting, rounds: int, colds: int) -> dict[str, Any]:
    """Both sides on one folder: alone in fresh processes, then in turns; then generation."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "decoder"
        save_hf(random_variables(setting.config()), setting.config(), folder)
        fresh = {which: [in_fresh_process(which, folder, setting) for _ in range(colds)] for which in SIDES}
        sides = {which: make(folder, setting) for which, make in SIDES.items()}
    last: dict[str, Any] = {}
    seen: dict[str, list[dict[str, float]]] = {which: [] for which in SIDES}

    def job(which: str) -> Callable[[], None]:
        def run() -> None:
            seconds, last[which] = sides[which].prune()
            seen[which].append(seconds)

        return run

    times = in_turns({which: job(which) for which in SIDES}, rounds)
    same = sum(len(np.intersect1d(a, b)) for a, b in zip(last["ours"], last["theirs"], strict=True))
    return {
        "params": sum(x.size for x in jax.tree.leaves(sides["ours"].variables)),
        "widths": [len(k) for k in last["ours"]],
        "kept_by_both": same / sum(map(len, last["theirs"])),
        "cold": {w: _medians([r["cold"] for r in runs]) for w, runs in fresh.items()},
        "warm": {w: _medians(seen[w][-rounds:]) for w in SIDES},
        "ratio": {
            "warm": ratio(times, "ours", "theirs"),
            "cold": statistics.median(
                a["cold"]["total"] / b["cold"]["total"] for a, b in zip(*fresh.values(), strict=True)
            ),
        },
        "megabytes": {
            w: {k: statistics.median(r[f"{k}_bytes"] for r in runs) / 2**20 for k in ("first", "again")}
            for w, runs in fresh.items()
        },
        "generation": generation(sides["ours"], 2 * rounds),
        "rounds": {"cold": fresh, "warm": times},
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(r[part] for r in rows) for part in rows[0]}


def checks(r: dict[str, Any]) -> dict[str, bool]:
    """The targets."""
    return {
        "both sides keep the same channels": r["kept_by_both"] > 0.999,
        "no slower than hooks in PyTorch, warm": r["ratio"]["warm"] <= 1,
        "prefill gains what the weights lose, within a fifth": r["generation"]["prefill"]["efficiency"] >= 0.8,
        "decoding gains what the weights lose, within a fifth": r["generation"]["decode"]["efficiency"] >= 0.8,
    }


def tables(r: dict[str, Any]) -> list[Table]:
    """Pruning, and generation."""
    pruning = Table(title="from calibration text to the smaller decoder: seconds")
    for column in (
        "",
        "first time",
        "trace",
        "calibrate",
        "choose and cut",
        "warm",
        "MB added, first",
        "MB added, warm",
    ):
        pruning.add_column(column)
    for which, name in (("ours", "jprune"), ("theirs", "PyTorch, hooks")):
        warm, mb = r["warm"][which], r["megabytes"][which]
        trace = f"{r['cold'][which]['trace']:.2f}" if which == "ours" else ""
        cells = (r["cold"][which]["total"], trace, warm["calibrate"], warm["choose and cut"], warm["total"])
        pruning.add_row(name, *(c if isinstance(c, str) else f"{c:.2f}" for c in cells), *(f"{mb[k]:.0f}" for k in mb))
    speed = Table(title=f"tokens a second at {r['generation']['weights_fraction']:.0%} of the weights")
    for column in ("", "dense", "pruned", "speed-up", "of the ideal"):
        speed.add_column(column)
    for what in ("prefill", "decode"):
        g = r["generation"][what]
        tokens = (f"{g['tokens_per_second'][name]:.0f}" for name in ("dense", "pruned"))
        speed.add_row(what, *tokens, f"{g['speed_up']:.2f}", f"{g['efficiency']:.2f}")
    return [pruning, speed]


def main(
    setting: Setting = Setting(),
    rounds: Annotated[int, tyro.conf.arg(help="warm rounds")] = 5,
    colds: Annotated[int, tyro.conf.arg(help="fresh processes a side")] = 3,
    out: Path = RESULTS / "language-speed.json",
) -> None:
    """Time pruning beside PyTorch, and generation before and after."""
    if rounds < 1 or colds < 1:
        raise ValueError(f"rounds is {rounds} and colds {colds}: medians need at least one")
    torch, transformers = peer("torch"), peer("transformers")
    results = measure(setting, rounds, colds)
    verdict = checks(results)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "torch_threads": torch.get_num_threads()}  # fmt: skip
    record.write(out, {
        "command": f"python -m experiments.benchmarks.language_speed --rounds {rounds} --colds {colds}",
        "machine": record.machine() | versions,
        "note": DISTURBED,
        "setting": dataclasses.asdict(setting),
        "checks": verdict,
        "results": results,
    })  # fmt: skip
    console = Console()
    for table in tables(results):
        Console(width=130 if not console.is_terminal else None).print(table)
    for what, holds in verdict.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
