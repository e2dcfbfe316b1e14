"""LoRAPrune: heads and MLP channels pruned by adapters' gradients against true gradients, magnitudes and chance.

    python -m experiments.loraprune                          # Python's library as text, three seeds, CPU
    python -m experiments.loraprune --config llama --folder DIR --text FILE --out DIR2
    python -m experiments.loraprune --redraw                 # only the figure and the table, from the results file

The small configuration prunes half of the heads and MLP channels of layers 1 to 4 of six, in 60 steps of LoRA training; all
rows of a seed see the same batches. "llama" is the published recipe, for a decoder in a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jprune
from experiments import record
from experiments.stdlib_lm import MODEL, base_model
from jprune.checkpoint import PruningRecord, load_hf, load_tokenizer, save_hf
from jprune.checkpoint.layouts import LINEN_SCAN, kept_of_plan
from jprune.data.text import sample_windows, token_stream, windows
from jprune.language.finetune import next_token, recover
from jprune.language.lora import LoraConfig, init
from jprune.language.perplexity import perplexity
from jprune.methods.channels.loraprune.loraprune import group_importance
from jprune.methods.channels.loraprune.masks import prunable, update_masks
from jprune.methods.channels.loraprune.run import LoraPruneConfig, finalize, gradient, loraprune, step_of, unit_counts
from jprune.models import rebuild
from jprune.models.llama import Llama, unstack_layers
from jprune.training import TuningConfig
from jprune.training.state import init_state

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
CRITERIA = ("lora", "grad", "magnitude", "random")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      options: of LoRAPrune.
      tuning: of the adapters.
      rows, tokens: sequences of a step, and how long each is.
      evaluated: held-out windows.
    """

    options: LoraPruneConfig
    tuning: TuningConfig
    rows: int
    tokens: int
    evaluated: int


SETTINGS = {
    "small": Setting(
        LoraPruneConfig(every=5, skip_first=1, lora=LoraConfig(8, 16.0)), TuningConfig(60, 1e-3), 4, 192, 64
    ),
    "llama": Setting(
        LoraPruneConfig(lora=LoraConfig(8, 16.0, 0.05)), TuningConfig(313, 1e-4, accumulate=64), 128, 512, 256
    ),
}


def _rows(options: LoraPruneConfig) -> dict[str, LoraPruneConfig]:
    """The rows that differ in their options alone."""
    change = functools.partial(dataclasses.replace, options)
    return {
        **{c: change(criterion=c) for c in CRITERIA},
        "lora, cooldown 0.5": change(cooldown=0.5),
    }


class Seed:
    """All rows of one seed: its base model, its order of the data."""

    def __init__(self, setting: Setting, seed: int, work: Path | None, progress: Progress):
        self.s, self.seed, self.progress = setting, seed, progress
        self.work = None if work is None else work / f"seed{seed}"
        config, self.params, corpus = base_model(seed, scanned=True, progress=progress)
        self.module = Llama(config, scanned=True)
        self.graph = jprune.trace(self.module.apply, self.params, jnp.zeros((2, setting.tokens), jnp.int32))
        self.tuning = dataclasses.replace(setting.tuning, seed=seed)
        n, t = setting.rows, setting.tokens
        text = sample_windows(corpus.train, n * setting.tuning.steps, t, 1000 + seed)
        self.batches = functools.partial(_batch, text.reshape(-1, n, t))
        self.held_out = corpus.evaluation(setting.evaluated, t)
        self.calibration = jnp.asarray(corpus.calibration(seed, 4, t))
        self.dense = self.quality(self.params)

    def quality(self, params: Any) -> float:
        """Perplexity per byte of held-out text."""
        return perplexity(self.module.apply, params, self.held_out)

    def outcome(self, lora: Any, masks: Any, seconds: float) -> dict[str, Any]:
        """What a row is judged by; the merged weights are sliced, and must be as good as the masked ones."""
        params, keep = finalize(self.graph, self.params, lora, masks)
        value = self.quality(self.graph.mask(params, keep))
        kept = self.graph.cost(keep, stacked="unstack").params / self.graph.cost().params
        return {"perplexity": value, "excess": value / self.dense - 1, "parameters_removed": 1 - kept,
                "gone": {g: int((~k).sum()) for g, k in keep.items()}, "seconds": seconds}  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Every row, then what the one-shot baseline makes of as many steps."""
        rows = {name: functools.partial(self.row, name, o) for name, o in _rows(self.s.options).items()}
        out: dict[str, Any] = {}
        for name, do in self.progress.track({**rows, "one-shot grad": self.one_shot}.items(),
                                            description=f"seed {self.seed}"):  # fmt: skip
            out |= self.once(name, do)
        return out

    def once(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `do` finds; read from the work folder if an earlier run has found it."""
        file = None if self.work is None else self.work / f"{name}.json"
        if file is not None and file.is_file():
            return json.loads(file.read_text())
        found = do()
        if file is not None:
            record.write(file, found)
        return found

    def row(self, name: str, options: LoraPruneConfig) -> dict[str, Any]:
        """The loop with these options."""
        began = time.monotonic()
        got = loraprune(self.graph, self.params, self.batches, options, self.tuning, progress=self.progress,
                        title=f"seed {self.seed} {name}")  # fmt: skip
        out = self.outcome(got.lora, got.masks, time.monotonic() - began)
        if name == "lora":
            out["sliced_perplexity"] = self.sliced(got)
        return {name: out}

    def sliced(self, got: Any) -> float:
        """Perplexity of the really smaller model."""
        params, keep = finalize(self.graph, self.params, got.lora, got.masks)
        small = unstack_layers(self.graph.compact(params, keep, stacked="unstack"))
        module = rebuild(Llama(self.module.config), small)
        return perplexity(module.apply, small, self.held_out)

    def one_shot(self) -> dict[str, Any]:
        """True gradients of the first batch decide everything; then all steps are for recovery."""
        began = time.monotonic()
        o, graph = dataclasses.replace(self.s.options, criterion="grad"), self.graph
        lora = init(jax.random.key(self.seed), graph, o.lora)
        rows = prunable(graph, skip_first=o.skip_first, skip_last=o.skip_last)
        of = jax.jit(gradient(graph, o, lora, next_token(graph, o.lora.dropout)))
        masks = {g: jnp.ones(graph.groups[g].shape) for g in rows}
        grads, weight_grads = of(self.params, lora, masks, self.batches(0), jax.random.key(0))[1]
        scores = group_importance(graph, self.params, lora, grads, list(rows), criterion="grad",
                                  weight_grads=weight_grads)  # fmt: skip
        masks = update_masks(scores, masks, unit_counts(graph, o, rows, o.ratio), rows)
        before = self.outcome(lora, masks, time.monotonic() - began)
        lora, _ = recover(graph, self.params, self.batches, self.tuning, config=o.lora, lora=lora, masks=masks,
                          progress=self.progress, title=f"seed {self.seed} one-shot")  # fmt: skip
        return {"one-shot grad": self.outcome(lora, masks, time.monotonic() - began), "one-shot grad, untuned": before}

    def agreement(self, channels: int = 20) -> dict[str, float]:
        """Spearman correlation of each criterion's scores with |change of the loss| when one unit is zeroed.

        After 20 steps of LoRA without pruning; over all heads and some channels of the prunable layers, per layer and
        kind of unit, then averaged.
        """
        graph, o = self.graph, self.s.options
        tuning = dataclasses.replace(self.tuning, steps=20)
        lora, _ = recover(graph, self.params, self.batches, tuning, config=o.lora, progress=self.progress,
                          title=f"seed {self.seed} agreement")  # fmt: skip
        loss, rows = next_token(graph, o.lora.dropout), prunable(graph, skip_first=o.skip_first, skip_last=o.skip_last)
        ones = {g: jnp.ones(graph.groups[g].shape) for g in rows}
        of = jax.jit(gradient(graph, dataclasses.replace(o, criterion="grad"), lora, loss))
        value, (grads, weight_grads) = of(self.params, lora, ones, self.calibration, jax.random.key(0))
        scores = {}
        for c in CRITERIA[:3]:
            own = weight_grads if c == "grad" else None
            scores[c] = group_importance(graph, self.params, lora, grads, list(rows), criterion=c,
                                         weight_grads=own)  # fmt: skip

        @jax.jit
        def without(params: Any, lora: Any, units: Any) -> Any:
            masks = {g: ones[g].at[units[g][0], units[g][1]].set(units[g][2]) for g in ones}
            return loss(params, lora, masks, self.calibration, None)

        draw, found = np.random.default_rng(self.seed), {c: [] for c in scores}
        for g, layers in rows.items():
            size = graph.groups[g].size
            for layer in np.flatnonzero(layers):
                chosen = np.sort(draw.permutation(size)[:channels])
                change = []
                for unit in chosen:
                    at = {h: (np.int32(layer), np.int32(unit), np.float32(h != g)) for h in ones}
                    at |= {h: (np.int32(0), np.int32(0), np.float32(1)) for h in ones if h != g}
                    change.append(abs(float(without(self.params, lora, at)) - float(value)))
                for c, s in scores.items():
                    found[c].append(_spearman(np.asarray(s[g])[layer][chosen], np.asarray(change)))
        return {c: float(np.mean(v)) for c, v in found.items()}


def _batch(text: Any, step: int) -> jax.Array:
    return jnp.asarray(text[step])


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def memory(setting: Setting, scanned: bool, tokens: int = 64) -> dict[str, Any]:
    """Bytes XLA plans for one row of `tokens` tokens: arguments + results + temporary - those shared.

    "accumulating": a micro-step that adds its gradients to those of the ones before, whose buffers it takes over.
    "whole step": no accumulation; gradients end within the step.
    """
    module = Llama(MODEL, scanned)
    ids = jnp.zeros((1, tokens), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)
    graph = jprune.trace(module.apply, params, ids)
    out: dict[str, Any] = {}
    for criterion in ("lora", "grad"):
        o = dataclasses.replace(setting.options, criterion=criterion)
        lora = jax.eval_shape(lambda o=o: init(jax.random.key(0), graph, o.lora))
        rows = prunable(graph, skip_first=o.skip_first, skip_last=o.skip_last)
        ones = {g: jax.ShapeDtypeStruct(graph.groups[g].shape, jnp.float32) for g in rows}
        loss = next_token(graph, o.lora.dropout)
        of, key = gradient(graph, o, lora, loss), jax.random.key(0)
        total = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), jax.eval_shape(of, params, lora, ones, ids, key)[1]
        )

        def micro(total: Any, params: Any, lora: Any, masks: Any, ids: Any, of: Any = of) -> Any:
            return jax.tree.map(jnp.add, total, of(params, lora, masks, ids, jax.random.key(0))[1])

        tuning = dataclasses.replace(setting.tuning, accumulate=1)
        state = jax.eval_shape(
            lambda f, m, tuning=tuning: init_state(f, {"masks": m, "ema": m}, tuning.stages), lora, ones
        )
        programs = {
            "accumulating": (micro, (total, params, lora, ones, ids)),
            "whole step": (step_of(graph, o, tuning, lora, loss), (state, params, ids, jnp.float32(0))),
        }
        for name, (fn, arguments) in programs.items():
            m = jax.jit(fn, donate_argnums=0).lower(*arguments).compile().memory_analysis()
            out.setdefault(name, {})[criterion] = (
                m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            )
        shapes = {tuple(x.shape) for x in jax.tree.leaves(total)}
        weights = {tuple(graph.leaves[p].shape) for p in (graph.taps[t].leaf for t in lora)}
        out.setdefault("gradients of weights", {})[criterion] = len(shapes & weights)
    return out


def checks(results: dict[str, Any], bytes_: dict[str, Any]) -> dict[str, bool]:
    """What the small configuration has to show, on means over the seeds."""
    excess = {name: row["excess"]["mean"] for name, row in results.items()}
    held = {form: m["accumulating"]["lora"] / m["accumulating"]["grad"] for form, m in bytes_.items()}
    return {
        "excess of lora at most 0.92 times that of magnitude": excess["lora"] <= 0.92 * excess["magnitude"],
        "excess of lora at most 0.65 times that of random": excess["lora"] <= 0.65 * excess["random"],
        "excess of lora at most 1.10 times that of grad": excess["lora"] <= 1.10 * excess["grad"],
        **{f"memory of the accumulating micro-step at most 0.75 times that of grad ({form})": h <= 0.75
           for form, h in held.items()},
        "no gradient has the shape of a weight": all(m["gradients of weights"]["lora"] == 0 for m in bytes_.values()),
        "the sliced model is the masked one": abs(
            results["lora"]["sliced_perplexity"]["mean"] / results["lora"]["perplexity"]["mean"] - 1) <= 1e-3,
    }  # fmt: skip


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of every number of every row."""
    return {name: {k: record.mean_and_spread([s[name][k] for s in seeds]) for k in row if k != "gone"}
            for name, row in seeds[0].items()}  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """Means and deviations as a table."""
    out = Table(title="held-out perplexity per byte, mean and deviation over seeds")
    for column in ("row", "perplexity", "excess over dense", "parameters removed", "seconds"):
        out.add_column(column)
    for name, r in sorted(results.items(), key=lambda item: item[1]["excess"]["mean"]):
        out.add_row(name, f"{r['perplexity']['mean']:.3f} ± {r['perplexity']['std']:.3f}",
                    f"{r['excess']['mean']:.3f} ± {r['excess']['std']:.3f}", f"{r['parameters_removed']['mean']:.1%}",
                    f"{r['seconds']['mean']:.0f}")  # fmt: skip
    return out


def draw(stored: dict[str, Any], path: Path) -> None:
    """Left: excess of every row. Right: bytes of a step with adapters' gradients and with those of the weights."""
    results, held = stored["results"], stored["memory"]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    bars, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    names = sorted(results, key=lambda n: -results[n]["excess"]["mean"])
    colors = ["#2a6f97" if n == "lora" else "#b8c4d0" for n in names]
    bars.barh(names, [results[n]["excess"]["mean"] for n in names], 0.7, color=colors,
              xerr=[results[n]["excess"]["std"] for n in names], error_kw={"lw": 0.8})  # fmt: skip
    bars.set_xlabel("perplexity over that of the dense model, minus 1")
    bars.tick_params(axis="y", labelsize=8)
    bars_ = [(form, name) for form in held for name in ("accumulating", "whole step")]
    for k, (form, name) in enumerate(bars_):
        for j, criterion in enumerate(("lora", "grad")):
            right.bar(k + 0.38 * j - 0.19, held[form][name][criterion] / 1e6, 0.34, color=("#2a6f97", "#b8c4d0")[j],
                      label=criterion if not k else None)  # fmt: skip
    labels = [f"{form}\n{name.replace('accumulating', 'micro-step')}" for form, name in bars_]
    right.set_xticks(range(len(bars_)), labels, fontsize=8)
    right.set_ylabel("MB")
    right.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Table, agreement with ablation, memory, verdict and figure."""
    Console(width=110 if not console.is_terminal else None).print(table(stored["results"]))
    said = ", ".join(f"{c} {v['mean']:.2f}" for c, v in stored["agreement"].items())
    console.print(f"rank correlation of scores with the loss's change when a unit is zeroed: {said}")
    for form, held in stored["memory"].items():
        for name in ("accumulating", "whole step"):
            m = held[name]
            console.print(f"{form}, {name}: {m['lora'] / 1e6:.1f} MB lora, {m['grad'] / 1e6:.1f} MB grad")
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored, picture)
    console.print(f"drawn to {picture}")


def prune_folder(setting: Setting, folder: Path, text: Path, out: Path, console: Console) -> None:
    """The published recipe on a Hugging Face folder: trained, pruned, merged, sliced, written as a folder again."""
    config, params, metadata = load_hf(folder, scanned=True)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None  # bytes need none
    stream = token_stream(text, config.vocab, tokenizer)
    module = Llama(config, scanned=True, remat=True)
    n, t = setting.rows, min(setting.tokens, len(stream) // 4)
    graph = jprune.trace(module.apply, params, jnp.zeros((2, t), jnp.int32))
    held_out = windows(stream[-len(stream) // 20 :], min(t, len(stream) // 20), setting.evaluated)
    trained = stream[: -len(stream) // 20]
    batches: Callable[[int], Any] = functools.partial(_drawn, trained, n, t)
    console.print(f"dense: perplexity {perplexity(module.apply, params, held_out, 2):.3f}")
    got = loraprune(graph, params, batches, setting.options, setting.tuning, out=out / "run", resume=True,
                    save_every=20, progress=True, title="LoRAPrune")  # fmt: skip
    merged, keep = finalize(graph, params, got.lora, got.masks)
    kept = kept_of_plan(graph.plan(keep), LINEN_SCAN, config)
    small = unstack_layers(graph.compact(merged, keep, stacked="unstack"))
    pruned = rebuild(Llama(config), small)
    console.print(f"pruned: perplexity {perplexity(pruned.apply, small, held_out, 2):.3f}")
    said = PruningRecord("loraprune", target=setting.options.ratio, source=str(folder), dense=config, kept=kept)
    save_hf(small, pruned.config, out / "model", mode="hetero", record=said, hf_config=metadata["hf_config"],
            tokenizer_from=folder, overwrite=True)  # fmt: skip
    console.print(f"written to {out / 'model'}")


def _drawn(stream: Any, rows: int, tokens: int, step: int) -> jax.Array:
    return jnp.asarray(sample_windows(stream, rows, tokens, step))


def main(
    config: Literal["small", "llama"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path | None = None,
    folder: Annotated[Path | None, tyro.conf.arg(help="llama: the Hugging Face folder to prune")] = None,
    text: Annotated[Path | None, tyro.conf.arg(help="llama: a text file, or a folder of them")] = None,
    work: Annotated[Path | None, tyro.conf.arg(help="keep every row here, and do not run again what is there")] = None,
    steps: Annotated[int | None, tyro.conf.arg(help="other than the configuration's")] = None,
    rows: Annotated[int | None, tyro.conf.arg(help="sequences of a step, other than the configuration's")] = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no training: figure and table from the results file")] = False,
) -> None:
    """LoRAPrune against the same loop with other scores, and against pruning at once."""
    setting = SETTINGS[config]
    if steps is not None:
        setting = dataclasses.replace(setting, tuning=dataclasses.replace(setting.tuning, steps=steps))
    if rows is not None:
        tuning = dataclasses.replace(setting.tuning, accumulate=min(setting.tuning.accumulate, rows))
        setting = dataclasses.replace(setting, rows=rows, tuning=tuning)
    console = Console()
    if config == "llama":
        if folder is None or text is None or out is None:
            raise ValueError("--config llama needs --folder (the model), --text and --out (a folder to write)")
        prune_folder(setting, folder, text, out, console)
        return
    out = out or RESULTS / f"loraprune-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"loraprune-{config}.png"
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed, agreement, dense = [], [], []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for seed in seeds:
            one = Seed(setting, seed, work, progress)
            dense.append(one.dense)
            per_seed.append(one.run())
            agreement.append(one.once("agreement", one.agreement))
            console.print(f"seed {seed}: dense {one.dense:.3f}, " + ", ".join(
                f"{name} {row['perplexity']:.3f}" for name, row in per_seed[-1].items()))  # fmt: skip
    results = summary(per_seed)
    held = {form: memory(setting, form == "scanned") for form in ("unrolled", "scanned")}
    stored = {
        **record.heading("loraprune", config, seeds, setting),
        "checks": checks(results, held),
        "dense_perplexity": record.mean_and_spread(dense),
        "agreement": {c: record.mean_and_spread([a[c] for a in agreement]) for c in agreement[0]},
        "memory": held,
        "results": results,
        "seeds": {str(s): {"dense": d, **rows} for s, d, rows in zip(seeds, dense, per_seed, strict=True)},
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
