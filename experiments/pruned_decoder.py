"""A decoder whose FFN channels (and heads) are pruned by many rules, evaluated as masks by one compiled program, then tuned."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from experiments import stdlib_lm
from experiments.study import Run
from jprune.checkpoint import load_hf, load_tokenizer
from jprune.data.text import BYTES, sample_windows, token_stream, windows
from jprune.language.blocks import blocks
from jprune.language.finetune import recover
from jprune.language.lora import LoraConfig, init, layer_ranks, merge
from jprune.language.perplexity import next_token_loss, perplexity
from jprune.language.statistics import block_stats
from jprune.methods.channels import decoder_baselines as baselines
from jprune.methods.channels.cfsp import CFSPConfig, cfsp_keep, lora_ranks
from jprune.methods.channels.decoder_channels import removed
from jprune.models.llama import Llama, LlamaConfig, with_biases
from jprune.models.llama_blocks import pieces
from jprune.training import TuningConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      sparsities: fractions of FFN channels; the last is that of the figure's bars.
      multiple_of: of the counts.
      slopes: `a` of CFSP's sigmoid, reported beside 1.
      batch: windows at a time.
      gradient_windows: how many the Taylor score averages over.
      tuning: of the adapters; None: no recovery. tuning_rows: windows of a step.
      source: the standard library's model, or a Hugging Face folder:
      model, text, eval_text: it, and what it is calibrated and evaluated on, files or folders.
    """

    sparsities: tuple[float, ...] = (0.2, 0.3, 0.5)
    multiple_of: int | None = None
    slopes: tuple[float, ...] = (0.25, 4.0)
    batch: int = 16
    gradient_windows: int = 16
    tuning: TuningConfig | None = None
    tuning_rows: int = 8
    source: Literal["library", "folder"] = "library"
    model: Path | None = None
    text: Path | None = None
    eval_text: Path | None = None


RANK, MOST = 8, 16  # of adapters: on average, and of the layer with the most
LORA = LoraConfig(rank=RANK, alpha=2.0 * RANK)


class Source(NamedTuple):
    """A decoder and its text.

    Attributes:
      config, variables: unrolled.
      calibration, evaluation: (windows, tokens) ids.
      tuning: (steps, rows, tokens) ids, None where nothing is tuned.
      said: what the results say of it.
    """

    config: LlamaConfig
    variables: Any
    calibration: np.ndarray
    evaluation: np.ndarray
    tuning: np.ndarray | None
    said: dict[str, Any]


def standard_library(s: Setting, run: Run) -> Source:
    """The standard library's model of one seed; calibration has the same seed."""
    config, variables, corpus = stdlib_lm.base_model(run.seed, progress=run.progress)
    rows = s.tuning_rows if s.tuning else 1
    n = s.tuning.steps * rows if s.tuning else 1
    text = corpus.calibration(1000 + run.seed, n)
    return Source(config, variables, corpus.calibration(run.seed), corpus.evaluation(), text.reshape(-1, rows, text.shape[1]),
                  {"python": corpus.python, "corpus": corpus.digest})  # fmt: skip


def folder(s: Setting, seed: int, n: int = 128, tokens: int = 1024) -> Source:
    """A Hugging Face folder, 128 random windows of 1024 tokens to calibrate on, perplexity over windows as long.

    Raises:
      ValueError: a folder or a text is not named.
    """
    if s.model is None or s.text is None or s.eval_text is None:
        raise ValueError("this configuration needs --model, --text and --eval-text: nothing is downloaded")
    config, variables, _ = load_hf(s.model)
    tokenizer = None if config.vocab == BYTES else load_tokenizer(s.model)
    train, held_out = (token_stream(path, config.vocab, tokenizer) for path in (s.text, s.eval_text))
    said = {"model": s.model.name, "text": s.text.name, "eval_text": s.eval_text.name}
    return Source(config, variables, sample_windows(train, n, tokens, seed), windows(held_out, tokens), None, said)


class Programs:
    """The graphs and the compiled programs, which all seeds share.

    Decisions are made on the model itself. It is evaluated and tuned with biases behind its products, zero but for
    those of FLAP: the same function, and one program for all rows.
    """

    def __init__(self, config: LlamaConfig, dtype: str, tokens: int):
        self.model = Llama(config)
        ids_shape = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), ids_shape)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
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


programs = functools.cache(Programs)


class PrunedDecoder:
    """The decoder of one seed, and the statistics of its calibration text."""

    def __init__(self, s: Setting, run: Run):
        source = standard_library(s, run) if s.source == "library" else folder(s, run.seed)
        dtype = str(jax.tree.leaves(source.variables)[0].dtype)
        bench = programs(source.config, dtype, source.calibration.shape[1])
        self.s, self.b, self.src, self.seed, self.progress = s, bench, source, run.seed, run.progress
        self.v = source.variables
        self.wide = with_biases(self.v, source.config)[1]
        ids = source.calibration
        self.batches = np.split(ids, range(s.batch, len(ids), s.batch))
        began = time.perf_counter()
        self.stats = block_stats(bench.graph, self.v, self.batches, bench.found)
        self.seconds = {"calibration": time.perf_counter() - began}
        self.dense = self.perplexity(self.wide, {})

    def perplexity(self, variables: Any, keep: Any) -> float:
        """Of the masked model."""
        masked = self.b.mask(variables, {**self.b.every, **keep})
        return perplexity(self.b.biased, masked, self.src.evaluation, self.s.batch)

    @functools.cached_property
    def grads(self) -> Any:
        """Mean gradient over some calibration windows."""
        return self.b.gradients(self.v, self.src.calibration[: self.s.gradient_windows])

    def cfsp(self, sparsity: float, **options: Any) -> Any:
        options = {"multiple_of": self.s.multiple_of, "seed": self.seed, "exact_budget": True, **options}
        return cfsp_keep(self.b.graph, self.v, self.stats, sparsity, CFSPConfig(**options), self.b.found)[0]

    def decide(self, row: str, p: float) -> tuple[Any, Any]:
        """(keep set, variables) of a row."""
        graph, s, multiple = self.b.graph, self.stats, self.s.multiple_of
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
        setting = self.s.tuning
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
        lora, _ = recover(self.b.wide_graph, variables, self.src.tuning.__getitem__, setting, config=LORA, lora=lora, masks=masks,
                          progress=self.progress, title=f"seed {self.seed} {row}")  # fmt: skip
        return self.perplexity(self.b.merge(variables, lora), keep)

    def row(self, row: str, p: float, tune: bool) -> dict[str, Any]:
        """One row: excess, what it removes, and excess after tuning."""
        keep, variables = {}, self.wide
        if row != "dense":
            keep, variables = self.decide(row.removesuffix(", ranks by importance"), p)
        out: dict[str, Any] = {"excess": self.perplexity(variables, keep) / self.dense - 1}
        kept = {**self.b.every, **keep}
        out |= {f"removed {name}": share for name, share in removed(self.b.graph, kept, self.b.found).items()}
        out["widths"] = [int(kept[b.ffn].sum()) for b in self.b.found]
        if any(b.kv for b in self.b.found):
            out["heads"] = [int(kept[b.kv].sum()) for b in self.b.found if b.kv]
        if tune:
            out["recovered"] = self.tuned(row, keep, variables) / self.dense - 1
        return out

    @functools.cached_property
    def dense_row(self) -> dict[str, Any]:
        """What the same tuning does to the unpruned model."""
        return self.row("dense", 0.0, True)

    def about(self) -> dict[str, Any]:
        """Of the model before pruning."""
        return {"perplexity": self.dense, "seconds": self.seconds, "importance": self.stats.change["angular"].tolist(),
                **self.src.said}  # fmt: skip
