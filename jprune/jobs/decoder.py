"""Prune a language model's folder: calibrate, decide, cut, recover, write a folder that other programs load.

phases/..          the decision (npz) and the checkpoints of training, for resuming
model/             the small model: safetensors, config.json, tokenizer, jprune.json
plan.json          what was removed
metrics.jsonl      every step of recovery
summary.json       before and after
report.html, widths.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import Progress

from jprune.checkpoint import PruningRecord, load_hf, save_hf
from jprune.checkpoint.hf_export import removed
from jprune.checkpoint.huggingface import read_config
from jprune.checkpoint.layouts import LINEN, kept_of_plan
from jprune.data.text import sample_windows
from jprune.files.atomic import write_json
from jprune.graph import Graph, trace
from jprune.jobs.decision_files import load_decision, save_decision
from jprune.jobs.decoder_options import LanguageOptions, Texts, load_texts
from jprune.language.finetune import recover
from jprune.language.lora import LoraConfig, layer_ranks, merge
from jprune.language.perplexity import Speed, perplexity, speeds
from jprune.methods.channels.decoder_names import Found, LanguageMethod, language_method
from jprune.models import rebuild
from jprune.models.llama import Llama
from jprune.models.llama_config import LlamaConfig
from jprune.models.llama_placement import placement
from jprune.report import measure, page, plots
from jprune.training import TuningConfig
from jprune.training.progress import display
from jprune.training.run_folder import Workspace


@dataclasses.dataclass(frozen=True)
class MeasuredDecoder:
    """One model.

    Attributes:
      perplexity: on the held-back windows.
      params, param_bytes: parameters and their bytes; peak_bytes: of arguments, results and temporaries of one batch
        of windows, as the compiler plans them.
      prefill, decode: tokens a second.
    """

    perplexity: float
    params: int
    param_bytes: int
    peak_bytes: int
    prefill: float
    decode: float


class LanguageRun(Workspace):
    """One run; calling it goes through all phases."""

    def __init__(self, options: LanguageOptions, out: Path, resume: bool = False, quiet: bool = False):
        super().__init__(out, quiet)
        self.o = options
        self.method: LanguageMethod = language_method(options.method)
        self.method.check(options, read_config(options.model))
        self.mesh = _mesh(options.mesh)
        with (
            self.claim({**dataclasses.asdict(options), "mesh": list(options.mesh)}, resume),
            display(not quiet) as progress,
        ):
            with self.phase("reading text", progress):
                self.texts: Texts = load_texts(options, read_config(options.model))
            with self.phase("loading", progress):
                self.config, self.params, self.source = load_hf(
                    options.model, dtype=options.dtype, sharding=None if self.mesh is None else placement(self.mesh)
                )
        self.model = Llama(self.config)

    def __call__(self) -> dict[str, Any]:
        """All phases; returns what summary.json says."""
        try:
            return self._run()
        finally:
            self.release()

    def _run(self) -> dict[str, Any]:
        o = self.o
        ids = self._example()
        graph = trace(self.model.apply, self.params, ids)
        with self.progress(max(o.recover, 1)) as progress:
            with self.phase("measure before", progress):
                before = self._perplexity(self.model, self.params, progress)
            with self.phase("decide", progress):
                found = self._decide(graph, progress)
            graph = found.graph or graph
            for text in found.warnings:
                self.warn(text)
            if o.sparsity and all(np.asarray(k).all() for k in found.keep.values()):
                self.warn(f"nothing is removed: --sparsity {o.sparsity:g} is less than one unit of a layer is worth")
            small = graph.compact(found.params, found.keep)
            module: Any = rebuild(found.model or self.model, small)
            if o.recover and not self.method.trains:
                small = self._recover(module, small, found, progress)
            with self.phase("measure after", progress):
                after = self._perplexity(module, small, progress)
            with self.phase("timing", progress):
                fast = speeds(
                    {"before": (self.model, self.params), "after": (module, small)}, prompt=min(o.length, 128)
                )
                one = self._measured(self.model, self.params, before, fast["before"])
                two = self._measured(module, small, after, fast["after"])
        return self._write(graph, found, module, small, one, two)

    def _example(self) -> jax.ShapeDtypeStruct:
        """Ids to trace with: two rows, so that the number of rows stays free."""
        return jax.ShapeDtypeStruct((2, self.o.length), jnp.int32)

    def placed(self, ids: np.ndarray) -> jax.Array:
        """A batch of windows where it belongs."""
        if self.mesh is None:
            return jnp.asarray(ids)
        return jax.device_put(ids, NamedSharding(self.mesh, PartitionSpec("data")))

    def watched_batches(self, progress: Progress) -> Iterator[jax.Array]:
        """The calibration windows, with a bar."""
        batches = self.texts.batches(self.o.batch_size)
        yield from (self.placed(b) for b in progress.track(batches, description="calibrating"))

    def batch_of_step(self, step: int) -> jax.Array:
        """What is trained on in a step: windows drawn from the calibration text, always the same for a step."""
        o = self.o
        return self.placed(sample_windows(self.texts.stream, o.batch_size, o.length, o.seed * 1_000_003 + step + 1))

    @property
    def save_every(self) -> int:
        """Steps of training between checkpoints."""
        return max(10, self.o.recover // 10)

    # -- phases ---------------------------------------------------------------------------------------------------

    def _decide(self, graph: Graph, progress: Progress) -> Found:
        """The method's decision; one that an interrupted run has made already is read again."""
        folder = self.folder("decision")
        if self.method.trains:  # its training is what can be gone on with
            return self.method.find(self, graph, progress)
        made = load_decision(folder, {name: group.shape for name, group in graph.groups.items()})
        if made is not None:
            keep, notes, ranks, warnings = made
            return Found(keep, self.params, notes, ranks, warnings=warnings)
        found = self.method.find(self, graph, progress)
        if found.params is self.params:  # else it made weights too, of which nothing is kept: it is found again
            save_decision(folder, found.keep, found.notes, found.ranks, found.warnings)
        return found

    def _recover(self, module: Llama, small: Any, found: Found, progress: Progress) -> Any:
        """Low-rank training of what is left, merged into it."""
        o = self.o
        graph = trace(module.apply, small, self._example())
        ranks = None if found.ranks is None else layer_ranks(graph, found.ranks)
        config = LoraConfig(rank=o.rank, alpha=2.0 * o.rank, ranks=ranks)
        tuning = TuningConfig(o.recover, o.learning_rate, "cosine", warmup=0.03, seed=o.seed)
        with self.counted("recover", o.recover, progress) as on_step:
            lora, _ = recover(graph, small, self.batch_of_step, tuning, config=config, out=self.folder("recover"),
                              resume=True, save_every=self.save_every, on_step=on_step)  # fmt: skip
        return jax.jit(lambda params, lora: merge(graph, params, lora))(small, lora)

    def _perplexity(self, module: Llama, params: Any, progress: Progress) -> float:
        sharding = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec("data"))
        windows = self.texts.evaluation
        return perplexity(module, params, windows, self.o.batch_size, sharding=sharding, progress=progress)

    def _measured(self, module: Llama, params: Any, perplexity: float, fast: Speed) -> MeasuredDecoder:
        _, peak = measure.compiled(module.apply, params, self.placed(self.texts.calibration[: self.o.batch_size]))
        count = sum(int(x.size) for x in jax.tree.leaves(params))
        return MeasuredDecoder(perplexity, count, measure.tree_bytes(params), peak, fast.prefill, fast.decode)

    # -- files ----------------------------------------------------------------------------------------------------

    def _write(
        self,
        graph: Graph,
        found: Found,
        module: Llama,
        small: Any,
        before: MeasuredDecoder,
        after: MeasuredDecoder,
    ) -> dict[str, Any]:
        o, config = self.o, module.config
        form = ("uniform" if config.uniform else "hetero") if o.form == "auto" else o.form
        plan = graph.plan(found.keep)
        plan.save(self.out / "plan.json")
        text = f"{o.sequences} windows of {o.length} tokens of {o.calibration}"
        record = PruningRecord(o.method, o.seed, text, o.sparsity, o.model, self.config,
                               kept_of_plan(plan, LINEN, self.config))  # fmt: skip
        save_hf(small, config, self.out / "model", mode=form, record=record, hf_config=self.source["hf_config"],
                tokenizer_from=o.model, overwrite=True)  # fmt: skip
        trained = [p.name for p in sorted((self.out / "phases").glob("*")) if (p / "metrics.jsonl").is_file()]
        self.join_metrics(trained)
        gone = removed(self.config, config)
        summary = {
            "options": dataclasses.asdict(o),
            "form": form,
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "removed": gone,
            "widths": {name: list(getattr(config, name)) for name in ("ffn", "q_heads", "kv_heads")},
            **found.notes,
            "warnings": self.warnings,
            "seconds": {k: round(v, 1) for k, v in self.seconds.items()},
            "device": jax.devices()[0].device_kind,
        }
        names, one, two = _widths(self.config, config)
        plots.widths(self.out / "widths.png", names, one, two)
        said = ", ".join(f"{share:.1%} of {name.replace('_', ' ')}" for name, share in gone.items())
        page.write(self.out / "report.html", f"{Path(o.model).name}: before and after", rows(before, after),
                   dataclasses.asdict(o), [("Widths before and after", self.out / "widths.png")],
                   [f"{o.method} removed {said}. Written as {form}; timed on {summary['device']}.",
                    f"Perplexity on {len(self.texts.evaluation)} windows of {o.length} tokens.", *self.warnings],
                   _layers(self.config, config))  # fmt: skip
        write_json(self.out / "summary.json", summary)
        return summary


def _mesh(shape: tuple[int, int]) -> Mesh | None:
    if shape == (1, 1):
        return None
    n = shape[0] * shape[1]
    if n > len(jax.devices()):
        raise ValueError(f"mesh {shape} needs {n} devices; there are {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:n]).reshape(shape), ("data", "model"))


def _widths(dense: LlamaConfig, small: LlamaConfig) -> tuple[list[str], list[int], list[int]]:
    """Names and widths of all layers, for the figure: MLP channels, and heads where they changed."""
    kinds = ["ffn", *(k for k in ("q_heads", "kv_heads") if getattr(dense, k) != getattr(small, k))]
    names = [f"{i} {k}" for k in kinds for i in range(dense.depth)]
    one, two = ([n for k in kinds for n in getattr(c, k)] for c in (dense, small))
    return names, one, two


def _layers(dense: LlamaConfig, small: LlamaConfig) -> list[tuple[str, ...]]:
    """The table of layers."""
    out: list[tuple[str, ...]] = [("layer", "MLP channels", "query heads", "key-value heads")]
    for i in range(dense.depth):
        pairs = [(getattr(dense, k)[i], getattr(small, k)[i]) for k in ("ffn", "q_heads", "kv_heads")]
        out.append((str(i), *(f"{b:,} of {a:,} ({b / a:.0%})" for a, b in pairs)))
    return out


def rows(before: MeasuredDecoder, after: MeasuredDecoder) -> list[tuple[str, str, str, str]]:
    """The table before/after; its first row is the header."""

    def row(name: str, a: float, b: float, form: str, unit: str = "") -> tuple[str, str, str, str]:
        return name, f"{a:{form}}{unit}", f"{b:{form}}{unit}", f"{b / a:.2f}x"

    mb = 2**20
    return [
        ("", "before", "after", "change"),
        row("perplexity", before.perplexity, after.perplexity, ".3f"),
        row("parameters", before.params, after.params, ","),
        row("size of the weights", before.param_bytes / mb, after.param_bytes / mb, ",.1f", " MiB"),
        row("memory of a batch", before.peak_bytes / mb, after.peak_bytes / mb, ",.1f", " MiB"),
        row("prefill, tokens a second", before.prefill, after.prefill, ",.0f"),
        row("decoding, tokens a second", before.decode, after.decode, ",.1f"),
    ]
