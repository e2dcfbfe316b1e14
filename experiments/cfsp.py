"""CFSP against other scores, other budgets over layers and other methods, on a small decoder or on yours.

    python -m experiments.cfsp                                     # the standard library's model, three seeds
    python -m experiments.cfsp --config paper --model DIR --text FILE --eval-text FILE
    python -m experiments.cfsp --redraw                            # only the figure and the table, from the results file

The small configuration prunes the FFN channels of a LLaMA of 1.95 million parameters that was trained on the source of
Python's standard library (experiments.stdlib_lm), byte by byte. A row's number is its excess: perplexity over that of the
unpruned model, minus one. Every row removes the same number of parameters; rows are evaluated as masks, so that one
compiled program serves all. Some are then tuned with low-rank adapters, all on the same text for the same steps.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jprune
from experiments import record, stdlib_lm
from jprune.checkpoint import load_hf, load_tokenizer
from jprune.data.text import BYTES, sample_windows, token_stream, windows
from jprune.files.atomic import write_json
from jprune.language.blocks import blocks
from jprune.language.finetune import next_token
from jprune.language.lora import LoraConfig, init, layer_ranks, merge
from jprune.language.perplexity import next_token_loss, perplexity
from jprune.language.statistics import block_stats
from jprune.methods.channels import decoder_baselines as baselines
from jprune.methods.channels.cfsp import CFSPConfig, cfsp_keep, lora_ranks
from jprune.methods.channels.decoder_channels import FINE, removed
from jprune.models.llama import Llama, LlamaConfig, with_biases
from jprune.models.llama_blocks import pieces
from jprune.training import TuningConfig, clipped
from jprune.training.state import descend, init_state

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
RANK, MOST = 8, 16  # of adapters: on average, and of the layer with the most
LORA = LoraConfig(rank=RANK, alpha=2.0 * RANK)
TUNED = ("random uniform", "magnitude uniform", "wanda uniform", "flap with biases", "taylor heads", "official coarse",
         "official coarse, ranks by importance")  # fmt: skip


class Source(NamedTuple):
    """A decoder and its text.

    Attributes:
      config, variables: unrolled.
      calibration, evaluation: (windows, tokens) ids.
      tuning: step -> (rows, tokens) ids, None where nothing is tuned.
      said: what the results say of it.
    """

    config: LlamaConfig
    variables: Any
    calibration: np.ndarray
    evaluation: np.ndarray
    tuning: Callable[[int], np.ndarray] | None
    said: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      sparsities: fractions of FFN channels; the last gets every row of the table.
      multiple_of: of the counts.
      slopes: `a` of CFSP's sigmoid, reported beside 1.
      batch: windows at a time.
      gradient_windows: how many the Taylor score averages over.
      tuning: of the adapters; None: no recovery.
      tuned_at: sparsities at which some rows are tuned.
      tuning_rows: windows of a step.
    """

    sparsities: tuple[float, ...]
    multiple_of: int | None = None
    slopes: tuple[float, ...] = (0.25, 4.0)
    batch: int = 16
    gradient_windows: int = 16
    tuning: TuningConfig | None = None
    tuned_at: tuple[float, ...] = ()
    tuning_rows: int = 8


SETTINGS = {
    "small": Setting(
        (0.2, 0.3, 0.5),
        tuning=TuningConfig(steps=30, learning_rate=1e-3, schedule="cosine", warmup=0.03),
        tuned_at=(0.2, 0.3, 0.5),
    ),
    "paper": Setting((0.2, 0.3, 0.5), multiple_of=128, slopes=(), batch=1),
}


def small(setting: Setting, seed: int, progress: Progress) -> Source:
    """The standard library's model of one seed; calibration has the same seed."""
    config, variables, corpus = stdlib_lm.base_model(seed, progress=progress)
    n = setting.tuning.steps * setting.tuning_rows if setting.tuning else 1
    text = corpus.calibration(1000 + seed, n).reshape(-1, setting.tuning_rows if setting.tuning else 1, 192)
    return Source(config, variables, corpus.calibration(seed), corpus.evaluation(), text.__getitem__,
                  {"python": corpus.python, "corpus": corpus.digest})  # fmt: skip


def folder(model: Path, text: Path, eval_text: Path, seed: int, n: int = 128, tokens: int = 1024) -> Source:
    """A Hugging Face folder, 128 random windows of 1024 tokens to calibrate on, perplexity over windows as long."""
    config, variables, _ = load_hf(model)
    tokenizer = None if config.vocab == BYTES else load_tokenizer(model)
    train, held_out = (token_stream(path, config.vocab, tokenizer) for path in (text, eval_text))
    said = {"model": model.name, "text": text.name, "eval_text": eval_text.name}
    return Source(config, variables, sample_windows(train, n, tokens, seed), windows(held_out, tokens), None, said)


class Bench:
    """What all seeds share: the graphs and the compiled programs.

    Decisions are made on the model itself. It is evaluated and tuned with biases behind its products, zero but for
    those of FLAP: the same function, and one program for all rows.
    """

    def __init__(self, config: LlamaConfig, variables: Any, setting: Setting, ids: np.ndarray):
        self.s, self.config = setting, config
        self.model = Llama(config)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
        ids_shape = jax.ShapeDtypeStruct((2, ids.shape[1]), jnp.int32)
        self.graph = jprune.trace(self.model.apply, shapes, ids_shape)
        wide = jax.eval_shape(lambda v: with_biases(v, config)[1], shapes)
        self.biased = Llama(dataclasses.replace(config, o_bias=True, mlp_bias=True))
        self.wide_graph = jprune.trace(self.biased.apply, wide, ids_shape)
        self.found = blocks(self.graph)
        self.every = {g: np.ones(self.graph.groups[g].shape, bool) for b in self.found for g in (b.ffn, b.kv) if g}
        self.mask = jax.jit(self.wide_graph.mask)
        self.merge = jax.jit(functools.partial(merge, self.wide_graph))
        self.gradients = jax.jit(
            jax.grad(lambda v, ids: next_token_loss(jnp.asarray(self.model.apply(v, ids)), ids).mean())
        )
        if setting.tuning is not None:
            self.step = self._step(setting.tuning)

    def _step(self, tuning: TuningConfig) -> Any:
        loss, rates = next_token(self.wide_graph, LORA.dropout), tuning.rates

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, params: Any, ids: Any) -> Any:
            grads = jax.grad(lambda f: loss(params, f, state.rest["masks"], ids, jax.random.key(0)))(state.params)
            return descend(tuning.stages, state, clipped(grads, tuning.clip)[0], jnp.asarray(rates)[state.step])

        return step


class Seed:
    """Every row of one seed."""

    def __init__(self, bench: Bench, source: Source, seed: int, work: Path | None, task: Callable[[], None]):
        self.b, self.src, self.seed, self.work, self.task = bench, source, seed, work, task
        self.v = source.variables
        self.wide = with_biases(self.v, source.config)[1]
        ids = source.calibration
        self.batches = np.split(ids, range(bench.s.batch, len(ids), bench.s.batch))
        began = time.perf_counter()
        self.stats = block_stats(bench.graph, self.v, self.batches, bench.found)
        self.seconds = {"calibration": time.perf_counter() - began}
        self.dense = self.perplexity(self.wide, {})

    def perplexity(self, variables: Any, keep: Any) -> float:
        """Of the masked model."""
        masked = self.b.mask(variables, {**self.b.every, **keep})
        return perplexity(self.b.biased, masked, self.src.evaluation, self.b.s.batch)

    @functools.cached_property
    def grads(self) -> Any:
        """Mean gradient over some calibration windows."""
        return self.b.gradients(self.v, self.src.calibration[: self.b.s.gradient_windows])

    def cfsp(self, sparsity: float, **options: Any) -> Any:
        options = {"multiple_of": self.b.s.multiple_of, "seed": self.seed, "exact_budget": True, **options}
        return cfsp_keep(self.b.graph, self.v, self.stats, sparsity, CFSPConfig(**options), self.b.found)[0]

    def decide(self, row: str, p: float) -> tuple[Any, Any]:
        """(keep set, variables) of a row."""
        graph, s, multiple = self.b.graph, self.stats, self.b.s.multiple_of
        method, _, how = row.partition(" ")
        if row == "wanda global":
            return baselines.wanda_sp(graph, self.v, s, p, "global", multiple_of=multiple), self.wide
        if row == "wanda in turn":
            parts = pieces(self.src.config, self.v)
            return baselines.wanda_sp_in_turn(graph, *parts, self.batches, p, multiple_of=multiple), self.wide
        if method == "flap":
            keep = baselines.flap(graph, self.v, s, p, heads="channels" not in how, multiple_of=multiple or 1)
            params = self.wide
            if "biases" in how:
                params = baselines.flap_biases(self.b.wide_graph, self.wide, s, keep).params
            return keep, params
        if method == "taylor":
            keep = baselines.taylor(graph, self.v, self.grads, p, heads=how == "heads", multiple_of=multiple or 1)
            return keep, self.wide
        options: dict[str, Any] = {"fine": method, "coarse": "angular" if how.startswith("coarse") else "uniform"}
        for part in how.split(", ")[1:]:
            name, _, value = part.partition(" = ")
            if name in ("a", "multiple_of"):
                options[name] = type(1.0 if name == "a" else 1)(value)
        return self.cfsp(p, **options), self.wide

    def tuned(self, row: str, keep: Any, variables: Any) -> float:
        """Perplexity after training adapters of the masked model."""
        setting = self.b.s.tuning
        assert setting is not None and self.src.tuning is not None
        by_importance = row.endswith("ranks by importance")
        ranks = (
            lora_ranks(self.stats.change["angular"], RANK, r_max=MOST) if by_importance else [RANK] * len(self.b.found)
        )
        wide = dataclasses.replace(LORA, rank=MOST, alpha=LORA.scale * MOST)  # the same scale whatever the rank
        lora = init(jax.random.key(self.seed), self.b.wide_graph, wide)
        for t, r in layer_ranks(
            self.b.wide_graph, list(ranks)
        ).items():  # rows beyond a layer's rank are zero, and stay so
            lora[t]["a"] = lora[t]["a"].at[r:].set(0.0)
        masks = {g: jnp.asarray(k, jnp.float32) for g, k in {**self.b.every, **keep}.items()}
        state = init_state(lora, {"masks": masks}, setting.stages)
        for k in range(setting.steps):
            state = self.b.step(state, variables, self.src.tuning(k))
        return self.perplexity(self.b.merge(variables, state.params), keep)

    def row(self, row: str, p: float, tune: bool) -> dict[str, Any]:
        """One row: excess, what it removes, and excess after tuning."""
        done = None if self.work is None else self.work / f"seed{self.seed}-{p:g}-{row}.json"
        if done is not None and done.exists():
            out = json.loads(done.read_text())
            if not tune or "recovered" in out:
                self.task()
                return out if tune else {k: x for k, x in out.items() if k != "recovered"}
        if row == "dense":
            keep, variables = {}, self.wide
        else:
            keep, variables = self.decide(row.removesuffix(", ranks by importance"), p)
        out: dict[str, Any] = {"excess": self.perplexity(variables, keep) / self.dense - 1}
        kept = {**self.b.every, **keep}
        out |= {f"removed {name}": share for name, share in removed(self.b.graph, kept, self.b.found).items()}
        out["widths"] = [int(kept[b.ffn].sum()) for b in self.b.found]
        if any(b.kv for b in self.b.found):
            out["heads"] = [int(kept[b.kv].sum()) for b in self.b.found if b.kv]
        if tune:
            out["recovered"] = self.tuned(row, keep, variables) / self.dense - 1
        if done is not None:
            done.parent.mkdir(parents=True, exist_ok=True)
            write_json(done, out)
        self.task()
        return out

    def run(self) -> dict[str, Any]:
        """{sparsity: {row: numbers}} with perplexity and seconds beside."""
        out: dict[str, Any] = {}
        for p in self.b.s.sparsities:
            tuned = p in self.b.s.tuned_at
            out[f"{p:g}"] = {row: self.row(row, p, tuned and row in TUNED) for row in rows_of(self.b.s)}
        if self.b.s.tuning is not None:  # what the same tuning does to the unpruned model
            dense = self.row("dense", 0.0, True)
            out = {p: {"dense": dense, **rows} for p, rows in out.items()}
        return {"dense": self.dense, "seconds": self.seconds, "importance": self.stats.change["angular"].tolist(),
                "results": out, **self.src.said}  # fmt: skip


def rows_of(setting: Setting) -> list[str]:
    """The same at every sparsity."""
    rows = [f"{fine} {coarse}" for fine in FINE for coarse in ("uniform", "coarse")]
    rows += [
        "wanda global",
        "wanda in turn",
        "flap channels",
        "flap heads",
        "flap with biases",
        "taylor channels",
        "taylor heads",
    ]
    rows += [f"official coarse, a = {a:g}" for a in setting.slopes]
    if setting.multiple_of is None:
        rows += ["official coarse, multiple_of = 32"]
    return [*rows, TUNED[-1]] if setting.tuning else rows


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What the small configuration has to show, on means over the seeds."""
    half, fifth = ({row: r["excess"]["mean"] for row, r in results[p].items()} for p in ("0.5", "0.2"))
    ours = half["official coarse"]
    return {
        "0.5: at most 0.85 of the same score with uniform counts": ours <= 0.85 * half["official uniform"],
        "0.5: at most 0.90 of Wanda-sp with uniform counts": ours <= 0.90 * half["wanda uniform"],
        "0.5: at most 0.90 of Wanda-sp with one threshold": ours <= 0.90 * half["wanda global"],
        "0.5: at most a quarter of magnitude": ours <= 0.25 * half["magnitude uniform"],
        "0.5: at most a quarter of random channels": ours <= 0.25 * half["random uniform"],
        "0.2: an excess of at most 0.015": fifth["official coarse"] <= 0.015,
        "0.5: the budget over layers halves the excess of random channels": half["random coarse"] <= 0.5 * half["random uniform"],
    }  # fmt: skip


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of every number of every row."""
    return {
        p: {
            row: {k: record.mean_and_spread([s["results"][p][row][k] for s in seeds]) for k, x in numbers.items()
                  if not isinstance(x, list)}
            for row, numbers in rows.items()
        }
        for p, rows in seeds[0]["results"].items()
    }  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """Excess of every row, and after tuning."""
    out = Table(title="perplexity over the unpruned model's, minus 1; mean and deviation over seeds")
    ps = list(results)
    for column in ("row", *(f"p = {p}" for p in ps), *(f"tuned, {p}" for p in ps)):
        out.add_column(column)
    for row in results[ps[0]]:
        cells = [
            f"{r['mean']:.3f} ± {r['std']:.3f}" if (r := results[p][row].get(k)) else ""
            for k in ("excess", "recovered")
            for p in ps
        ]
        out.add_row(row, *cells)
    return out


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: every row at the largest sparsity, with a dot after tuning. Right: excess over sparsity."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(1.1, 1))
    p = max(results, key=float)
    rows = {row: r for row, r in results[p].items() if row not in ("dense", TUNED[-1])}
    names = sorted(rows, key=lambda row: -rows[row]["excess"]["mean"])
    colors = ["#2a6f97" if "coarse" in n else "#b8c4d0" for n in names]
    bars.barh(names, [rows[n]["excess"]["mean"] for n in names], 0.7, color=colors,
              xerr=[rows[n]["excess"]["std"] for n in names], error_kw={"lw": 0.8})  # fmt: skip
    tuned = {n: rows[n]["recovered"]["mean"] for n in names if "recovered" in rows[n]}
    bars.plot(list(tuned.values()), list(tuned), "o", color="#c0504d", ms=4, label="after tuning")
    if tuned:
        bars.legend(fontsize=7, frameon=False)
    bars.set_xscale("log")
    bars.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bars.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    bars.xaxis.set_minor_formatter(NullFormatter())
    bars.tick_params(axis="y", labelsize=7)
    bars.set_xlabel("excess perplexity (blue: budget by importance of layers)")
    bars.set_title(f"{float(p):.0%} of the FFN channels removed", fontsize=10)
    ps = sorted(results, key=float)
    shown = ("random uniform", "random coarse", "magnitude uniform", "flap heads", "flap channels", "wanda uniform",
             "official uniform", "official coarse")  # fmt: skip
    for row in shown:
        curve.plot([float(q) for q in ps], [results[q][row]["excess"]["mean"] for q in ps], "--" if "coarse" in row else "-",
                   marker="o", ms=3, lw=1.2, label=row)  # fmt: skip
    curve.set_yscale("log")
    curve.set_xlabel("fraction of FFN channels removed")
    curve.set_ylabel("excess perplexity")
    curve.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Table, verdict and figure."""
    Console(width=150 if not console.is_terminal else None).print(table(stored["results"]))
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored["results"], picture)
    console.print(f"drawn to {picture}")


def main(
    config: Literal["small", "paper"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    model: Path | None = None,
    text: Path | None = None,
    eval_text: Path | None = None,
    out: Path | None = None,
    work: Annotated[Path | None, tyro.conf.arg(help="keep every row here, and go on from them")] = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no pruning: figure and table from the results file")] = False,
) -> None:
    """CFSP by every score, with and without its budget over layers, against Wanda-sp, FLAP, Taylor, magnitude, chance."""
    out = out or RESULTS / f"cfsp-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"cfsp-{config}.png"
    console = Console()
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    if config == "paper" and not (model and text and eval_text):
        raise SystemExit("the paper's configuration needs --model, --text and --eval-text: nothing is downloaded")
    setting = SETTINGS[config]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed: list[dict[str, Any]] = []
    bench: Bench | None = None
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("rows", total=len(seeds) * len(setting.sparsities) * len(rows_of(setting)))
        for seed in seeds:
            if model is not None and text is not None and eval_text is not None:
                source = folder(model, text, eval_text, seed)
            else:
                source = small(setting, seed, progress)
            bench = bench or Bench(source.config, source.variables, setting, source.calibration)
            per_seed.append(Seed(bench, source, seed, work, functools.partial(progress.advance, bar)).run())
    results = summary(per_seed)
    stored = {
        **record.heading("cfsp", config, seeds, setting),
        "checks": checks(results) if config == "small" else {},
        "results": results,
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
