"""A small decoder pruned while adapters are trained, at once, or not at all: the rows of one seed, and what a step holds."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import jprune
from experiments.stdlib_lm import MODEL, base_model
from experiments.study import Run
from jprune.data.text import sample_windows
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      options: of LoRAPrune.
      tuning: of the adapters.
      batch, tokens: sequences of a step, and how long each is.
      evaluated: held-out windows.
      agreement: seeds over which scores are compared with what zeroing a unit does.
    """

    options: LoraPruneConfig = LoraPruneConfig(every=5, skip_first=1, lora=LoraConfig(8, 16.0))
    tuning: TuningConfig = TuningConfig(60, 1e-3)
    batch: int = 4
    tokens: int = 192
    evaluated: int = 64
    agreement: tuple[int, ...] = (0, 1, 2)


class AdaptedDecoder:
    """The base model of one seed, and its order of the data."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.seed, self.progress = s, run.seed, run.progress
        config, self.params, corpus = base_model(run.seed, scanned=True, progress=run.progress)
        self.module = Llama(config, scanned=True)
        self.graph = jprune.trace(self.module.apply, self.params, jnp.zeros((2, s.tokens), jnp.int32))
        self.tuning = dataclasses.replace(s.tuning, seed=run.seed)
        self.text = sample_windows(corpus.train, s.batch * s.tuning.steps, s.tokens, 1000 + run.seed)
        self.held_out = corpus.evaluation(s.evaluated, s.tokens)
        self.calibration = jnp.asarray(corpus.calibration(run.seed, 4, s.tokens))

    def batches(self, step: int) -> jax.Array:
        """The same for all rows."""
        return jnp.asarray(self.text[step * self.s.batch : (step + 1) * self.s.batch])

    def quality(self, params: Any) -> float:
        """Perplexity per byte of held-out text."""
        return perplexity(self.module.apply, params, self.held_out)

    @functools.cached_property
    def dense(self) -> float:
        """Perplexity before pruning."""
        return self.quality(self.params)

    def outcome(self, lora: Any, masks: Any, seconds: float) -> dict[str, Any]:
        """What a row is judged by; the merged weights are sliced, and must be as good as the masked ones."""
        params, keep = finalize(self.graph, self.params, lora, masks)
        value = self.quality(self.graph.mask(params, keep))
        kept = self.graph.cost(self.graph.decide(keep, stacked="unstack")).params / self.graph.cost().params
        return {"perplexity": value, "excess": value / self.dense - 1, "parameters_removed": 1 - kept,
                "gone": {g: int((~k).sum()) for g, k in keep.items()}, "seconds": seconds}  # fmt: skip

    def row(self, name: str, options: LoraPruneConfig) -> dict[str, Any]:
        """The loop with these options."""
        began = time.monotonic()
        got = loraprune(self.graph, self.params, self.batches, options, self.tuning, progress=self.progress,
                        title=f"seed {self.seed} {name}")  # fmt: skip
        out = self.outcome(got.lora, got.masks, time.monotonic() - began)
        if name == "lora":
            out["sliced_perplexity"] = self.sliced(got)
        return out

    def sliced(self, got: Any) -> float:
        """Perplexity of the really smaller model."""
        params, keep = finalize(self.graph, self.params, got.lora, got.masks)
        small = unstack_layers(self.graph.compact(params, self.graph.decide(keep, stacked="unstack")))
        module = rebuild(Llama(self.module.config), small)
        return perplexity(module.apply, small, self.held_out)

    @functools.cached_property
    def one_shot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(tuned, untuned): true gradients of the first batch decide everything; then all steps are for recovery."""
        began = time.monotonic()
        o, graph = dataclasses.replace(self.s.options, criterion="grad"), self.graph
        lora = init(jax.random.key(self.seed), graph, o.lora)
        rows = prunable(graph, skip_first=o.skip_first, skip_last=o.skip_last)
        of = jax.jit(gradient(graph, o, lora, next_token(graph, o.lora.dropout)))
        masks = {g: jnp.ones(graph.groups[g].shape) for g in rows}
        grads, weight_grads = of(self.params, lora, masks, self.batches(0), jax.random.key(0))[1]
        scores = group_importance(graph, self.params, lora, grads, list(rows), criterion="grad",
                                  weight_grads=weight_grads)  # fmt: skip
        masks = update_masks(scores, masks, unit_counts(graph, o, rows, o.sparsity), rows)
        before = self.outcome(lora, masks, time.monotonic() - began)
        lora, _ = recover(graph, self.params, self.batches, self.tuning, config=o.lora, lora=lora, masks=masks,
                          progress=self.progress, title=f"seed {self.seed} one-shot")  # fmt: skip
        return self.outcome(lora, masks, time.monotonic() - began), before

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
        for c in ("lora", "grad", "magnitude"):
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
                    found[c].append(_rank_correlation(np.asarray(s[g])[layer][chosen], change))
        return {c: float(np.mean(v)) for c, v in found.items()}


def _rank_correlation(x: Any, y: Any) -> float:
    found: Any = spearmanr(x, y)
    return float(found.statistic)


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
            m: Any = jax.jit(fn, donate_argnums=0).lower(*arguments).compile().memory_analysis()
            out.setdefault(name, {})[criterion] = (
                m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            )
        shapes = {tuple(x.shape) for x in jax.tree.leaves(total)}
        weights = {tuple(graph.leaves[p].shape) for p in (graph.taps[t].leaf for t in lora)}
        out.setdefault("gradients of weights", {})[criterion] = len(shapes & weights)
    return out
