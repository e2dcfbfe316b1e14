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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune.checkpoint import PruningRecord, load_hf, save_hf
from jprune.checkpoint.hf_export import removed
from jprune.checkpoint.huggingface import read_config
from jprune.checkpoint.layouts import LINEN, kept_of_plan
from jprune.checkpoint.masks import save_masks
from jprune.data.text import sample_windows
from jprune.files.atomic import write_json
from jprune.graph import trace
from jprune.jobs.decoder_text import Texts, load_texts
from jprune.jobs.outputs import write_report
from jprune.jobs.pruning_run import PruningRun
from jprune.language.finetune import recover
from jprune.language.lora import LoraConfig, layer_ranks, merge
from jprune.language.perplexity import Speed, next_token_loss, perplexity, speeds
from jprune.methods.contract import DecoderTask, Method, Outcome, checked
from jprune.methods.names import method
from jprune.models.llama import Llama
from jprune.models.llama_config import LlamaConfig
from jprune.models.llama_placement import placement
from jprune.report import measure, plots
from jprune.surgery.patterns import density
from jprune.training import TuningConfig

USUAL = 0.3  # share removed where nothing is asked for


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the outcome of a run, beside the settings of its method.

    Attributes:
      model: folder of a language model, as Hugging Face's programs write it
      method: what is removed, and how; see `jprune list`
      sparsity: share of --quantity to REMOVE
      keep: share of --quantity to KEEP, in place of --sparsity
      quantity: what these shares count; units are the channels (and heads), weights the single weights that the method may remove
      calibration: text file, or a folder of them, to look at and to recover on; language models need it
      evaluation: text to measure perplexity on; else a tenth of the calibration text is held back
      text_key: entry of a .jsonl line that holds its text, or its chat messages
      sequences: windows of calibration text
      length: tokens of a window
      batch_size: examples at a time
      recover: steps of low-rank training afterwards; for methods that prune while they train, the steps they take
      learning_rate: of that training
      rank: mean rank of that training
      form: how the folder is written; auto is uniform where the layers agree, else hetero
      dtype: to compute in, else as stored
      mesh: devices for data and for the model
      seed: of everything
    """

    model: str
    method: str = "cfsp"
    sparsity: float | None = None
    keep: float | None = None
    quantity: Literal["macs", "params", "bytes", "latency", "units", "weights"] | None = None
    calibration: str | None = None
    evaluation: str | None = None
    text_key: str | None = None
    sequences: int = 128
    length: int = 1024
    batch_size: int = 4
    recover: int = 0
    learning_rate: float = 1e-4
    rank: int = 8
    form: Literal["auto", "uniform", "padded", "hetero"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    mesh: tuple[int, int] = (1, 1)
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self, {
            "calibration": (self.calibration is not None, "a text file (.txt, .md, .py, .jsonl) or a folder of them"),
            "sequences": (self.sequences >= 1, "at least 1"),
            "length": (self.length >= 2, "at least 2"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "recover": (self.recover >= 0, "at least 0"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "rank": (self.rank >= 1, "at least 1"),
            "form": (self.form in ("auto", "uniform", "padded", "hetero"), "auto, uniform, padded or hetero"),
            "dtype": (self.dtype in (None, "float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
        })  # fmt: skip
        devices = (
            (len(self.mesh) == 2 and min(self.mesh) >= 1, "two numbers of devices, data and model"),
            (self.batch_size % self.mesh[0] == 0, f"such that data divides the batch of {self.batch_size}"),
        )
        for rule in devices:
            checked(self, {"mesh": rule})
        _ = self.amount  # which says what is wrong with it

    @property
    def chosen(self) -> Method:
        """The method."""
        return method(self.method, "decoders")

    @property
    def amount(self) -> Any:
        """How much is to go."""
        return self.chosen.amount(self.quantity, self.keep, self.sparsity, USUAL)


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


class DecoderRun(PruningRun):
    """One run in its folder; calling it goes through all phases."""

    def __init__(self, options: DecoderConfig, *more: Any, **named: Any):
        """As `PruningRun`."""
        self.o = options
        super().__init__(options, *more, **named)

    def prepare(self, resume: bool) -> None:
        """Check, then read text and weights."""
        options = self.o
        even = self.method.even or getattr(self.settings, "scope", None) == "uniform"
        if options.form == "uniform" and not even:
            way = "give --scope uniform too, or" if hasattr(self.settings, "scope") else "give"
            raise ValueError(f"form 'uniform' needs layers of equal width: {way} --form padded")
        if options.recover and self.method.removes == "weights":
            raise ValueError("recover merges low-rank updates into all weights, which fills the zeros again: leave it out, or "
                             "give --refit-kept, which moves the kept weights alone")  # fmt: skip
        self.config = read_config(options.model)
        if self.config.experts is not None and self.method.removes == "channels":
            raise ValueError(f"method {options.method!r} removes channels of MLPs, and {options.model} has experts in their "
                             "place: choose reap or another method for experts, or one for single weights")  # fmt: skip
        if self.config.experts is not None and options.recover:
            raise ValueError("recover is not offered for models with experts: leave it out")
        self.model = Llama(self.config)
        ids = jax.ShapeDtypeStruct((2, options.length), jnp.int32)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), ids)
        self.method.check(self._task(shapes), self.settings)
        self.mesh = _mesh(options.mesh)
        with self.claim(self.said, resume), self.shown():
            with self.phase("reading text"):
                self.texts: Texts = load_texts(options, self.config)
            with self.phase("loading"):
                self.config, self.params, self.source = load_hf(
                    options.model, dtype=options.dtype, sharding=None if self.mesh is None else placement(self.mesh)
                )
        self.model = Llama(self.config)

    def _task(self, params: Any) -> DecoderTask:
        """What the method sees."""
        o = self.o
        ids = jax.ShapeDtypeStruct((2, o.length), jnp.int32)

        def loss(model: Any, params: Any, ids: Any) -> jax.Array:
            return next_token_loss(jnp.asarray(model.apply(params, ids)), ids).mean()

        return DecoderTask(
            self.model, trace(self.model.apply, params, ids), params, (ids,), o.amount, self._batches, self._batches, loss,
            self, o.seed, self.batch_of_step, o.recover, o.learning_rate, o.rank, self._save_every)  # fmt: skip

    def work(self) -> dict[str, Any]:
        """Measure, decide, cut, recover, measure, write."""
        o = self.o
        task = self._task(self.params)
        with self.shown(max(o.recover, 1)):
            with self.phase("measure before"):
                before = self._perplexity(self.model, self.params)
            with self.phase("decide"):
                outcome = self.method.find(task, self.settings)
            for text in outcome.warnings:
                self.warn(text)
            if outcome.masks is None and outcome.units is None and (outcome.keep is None or outcome.graph is None):
                raise ValueError(f"method {o.method!r} gives no keep set, which a model's folder is made of")
            gone = outcome.keep if outcome.masks is None else outcome.masks
            if task.amount is not None and task.amount.sparsity and gone and all(k.all() for k in gone.values()):
                self.warn(
                    f"nothing is removed: --sparsity {task.amount.sparsity:g} is less than one unit of a layer is worth"
                )
            module, small = outcome.model, outcome.variables
            if (count := _count(small)) != outcome.cost.params:
                raise ValueError(f"the small model has {count:,} parameters, not {outcome.cost.params:,}")
            if o.recover and not self.method.trains:
                small = self._recover(module, small, outcome)
            with self.phase("measure after"):
                after = self._perplexity(module, small)
            with self.phase("timing"):
                fast = speeds(
                    {"before": (self.model, self.params), "after": (module, small)}, prompt=min(o.length, 128)
                )
                one = self._measured(self.model, self.params, before, fast["before"])
                two = self._measured(module, small, after, fast["after"])
        return self._write(task, outcome, small, one, two)

    # -- data -----------------------------------------------------------------------------------------------------

    def _placed(self, ids: np.ndarray) -> jax.Array:
        """A batch of windows where it belongs."""
        if self.mesh is None:
            return jnp.asarray(ids)
        return jax.device_put(ids, NamedSharding(self.mesh, PartitionSpec("data")))

    def _batches(self) -> Iterator[jax.Array]:
        """The calibration windows, with a bar."""
        batches = self.texts.batches(self.o.batch_size)
        yield from (self._placed(b) for b in self.bars.track(batches, description="calibrating"))

    def batch_of_step(self, step: int) -> jax.Array:
        """What is trained on in a step: windows drawn from the calibration text, always the same for a step."""
        o = self.o
        return self._placed(sample_windows(self.texts.stream, o.batch_size, o.length, o.seed * 1_000_003 + step + 1))

    @property
    def _save_every(self) -> int:
        """Steps of training between checkpoints."""
        return max(10, self.o.recover // 10)

    # -- phases ---------------------------------------------------------------------------------------------------

    def _recover(self, module: Llama, small: Any, outcome: Outcome) -> Any:
        """Low-rank training of what is left, merged into it."""
        o = self.o
        graph = trace(module.apply, small, jax.ShapeDtypeStruct((2, o.length), jnp.int32))
        ranks = None if outcome.ranks is None else layer_ranks(graph, outcome.ranks)
        config = LoraConfig(rank=o.rank, alpha=2.0 * o.rank, ranks=ranks)
        tuning = TuningConfig(o.recover, o.learning_rate, "cosine", warmup=0.03, seed=o.seed)
        with self.counted("recover", o.recover) as on_step:
            lora, _ = recover(graph, small, self.batch_of_step, tuning, config=config, out=self.folder("recover"),
                              resume=True, save_every=self._save_every, on_step=on_step)  # fmt: skip
        return jax.jit(lambda params, lora: merge(graph, params, lora))(small, lora)

    def _perplexity(self, module: Llama, params: Any) -> float:
        sharding = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec("data"))
        windows = self.texts.evaluation
        return perplexity(module, params, windows, self.o.batch_size, sharding=sharding, progress=self.bars)

    def _measured(self, module: Llama, params: Any, perplexity: float, fast: Speed) -> MeasuredDecoder:
        _, peak = measure.compiled(module.apply, params, self._placed(self.texts.calibration[: self.o.batch_size]))
        return MeasuredDecoder(perplexity, _count(params), measure.tree_bytes(params), peak, fast.prefill, fast.decode)

    def _kept(self, task: DecoderTask, outcome: Outcome) -> dict[str, float]:
        """Shares of everything an amount can count that are left, before anything is recovered."""
        dense, now = task.graph.cost(), outcome.cost
        out = {q: getattr(now, q) / getattr(dense, q) for q in ("macs", "params", "bytes")}
        if outcome.masks is not None:
            return out | {"weights": density(outcome.masks).total}
        return out | {"units": sum(b for _, b in outcome.widths.values()) / sum(a for a, _ in outcome.widths.values())}

    # -- files ----------------------------------------------------------------------------------------------------

    def _write(
        self, task: DecoderTask, outcome: Outcome, small: Any, before: MeasuredDecoder, after: MeasuredDecoder
    ) -> dict[str, Any]:
        o, config, out = self.o, outcome.model.config, self.out
        assert out is not None
        form = ("uniform" if config.uniform else "hetero") if o.form == "auto" else o.form
        kept = None
        if outcome.keep is not None and outcome.graph is not None:
            plan = outcome.graph.plan(outcome.keep)
            plan.save(out / "plan.json")
            kept = kept_of_plan(plan, LINEN, self.config)
        if outcome.masks is not None:
            save_masks(out / "masks.safetensors", outcome.masks)
        if outcome.units is not None:
            write_json(out / "units.json", dict(outcome.units))
        text = f"{o.sequences} windows of {o.length} tokens of {o.calibration}"
        asked = 0.0 if task.amount is None else task.amount.sparsity
        record = PruningRecord(o.method, o.seed, text, asked, o.model, self.config, kept)
        save_hf(small, config, out / "model", mode=form, record=record, hf_config=self.source["hf_config"],
                tokenizer_from=o.model, overwrite=True)  # fmt: skip
        gone = removed(self.config, config)
        summary = {
            "options": self.said,
            "form": form,
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "removed": gone,
            "quantity": None if task.amount is None else task.amount.quantity,
            "kept": self._kept(task, outcome),
            "widths": {name: list(getattr(config, name)) for name in ("ffn", "q_heads", "kv_heads")},
            **outcome.notes,
        }
        names, one, two = _widths(self.config, config)
        said = ", ".join(f"{share:.1%} of {name.replace('_', ' ')}" for name, share in gone.items())
        if outcome.masks is not None:
            names, one, two = _weights(outcome.masks)
            said = f"{1 - sum(two) / sum(one):.1%} of the weights of {len(names)} matrices"
        notes = [
            f"{o.method} removed {said}. Written as {form}; timed on {jax.devices()[0].device_kind}.",
            f"Perplexity on {len(self.texts.evaluation)} windows of {o.length} tokens.",
        ]
        what = "weights" if outcome.masks is not None else "widths"
        figures = [(f"{what.capitalize()} before and after", what, lambda p: plots.widths(p, names, one, two))]
        return write_report(self, f"{Path(o.model).name}: before and after", rows(before, after), self.said, figures,
                            notes, _layers(self.config, config), summary)  # fmt: skip


def _count(params: Any) -> int:
    return sum(int(x.size) for x in jax.tree.leaves(params))


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
    if dense.experts is not None and small.experts is not None and dense.experts.count != small.experts.count:
        names = [f"{i} experts" for i in range(dense.depth)]
        one, two = ([n] * dense.depth for n in (dense.experts.count, small.experts.count))
    return names, one, two


def _weights(masks: Mapping[str, Any]) -> tuple[list[str], list[int], list[int]]:
    """Names of the pruned matrices, their weights, and those that stay, for the figure."""
    found = density(masks)
    return list(found.size), list(found.size.values()), [found.kept[p] for p in found.size]


def _layers(dense: LlamaConfig, small: LlamaConfig) -> list[tuple[str, ...]]:
    """The table of layers."""
    out: list[tuple[str, ...]] = [("layer", "MLP channels", "query heads", "key-value heads")]
    if dense.experts is not None and small.experts is not None:
        out = [("layer", "channels of an expert", "query heads", "key-value heads", "experts")]
    for i in range(dense.depth):
        pairs = [(getattr(dense, k)[i], getattr(small, k)[i]) for k in ("ffn", "q_heads", "kv_heads")]
        if dense.experts is not None and small.experts is not None:
            pairs.append((dense.experts.count, small.experts.count))
        out.append((str(i), *(f"{b:,} of {a:,} ({b / a:.0%})" for a, b in pairs)))
    return out


def rows(before: MeasuredDecoder, after: MeasuredDecoder) -> list[tuple[str, str, str, str]]:
    """The table before/after; its first row is the header."""
    mb, row = 2**20, measure.row
    return [
        ("", "before", "after", "change"),
        row("perplexity", before.perplexity, after.perplexity, ".3f"),
        row("parameters", before.params, after.params, ","),
        row("size of the weights", before.param_bytes / mb, after.param_bytes / mb, ",.1f", " MiB"),
        row("memory of a batch", before.peak_bytes / mb, after.peak_bytes / mb, ",.1f", " MiB"),
        row("prefill, tokens a second", before.prefill, after.prefill, ",.0f"),
        row("decoding, tokens a second", before.decode, after.decode, ",.1f"),
    ]
