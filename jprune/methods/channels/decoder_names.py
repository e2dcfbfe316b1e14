"""Methods for a language model's folder by name: how the units that stay are found, and what follows."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from jprune.graph import Graph, trace
from jprune.jobs.decoder_options import LanguageOptions
from jprune.language.blocks import blocks
from jprune.language.lora import LoraConfig
from jprune.language.perplexity import next_token_loss
from jprune.language.statistics import block_stats
from jprune.methods.channels import decoder_baselines as baselines
from jprune.methods.channels.cfsp import CFSPConfig, cfsp_keep, lora_ranks
from jprune.methods.channels.loraprune.run import LoraPruneConfig, finalize, loraprune, pruning_steps
from jprune.models.llama import Llama
from jprune.models.llama_config import LlamaConfig
from jprune.models.llama_trees import with_biases
from jprune.training import TuningConfig

if TYPE_CHECKING:
    from jprune.jobs.decoder import LanguageRun


@dataclasses.dataclass(frozen=True)
class Found:
    """A decision.

    Attributes:
      keep: the units that stay.
      params: of the dense model, changed where the method trained.
      notes: what is said of it in summary.json.
      ranks: of low-rank recovery, one per layer.
      warnings: what a user would not expect of it.
      model, graph: where `params` are another model's than the one that was loaded.
    """

    keep: dict[str, np.ndarray]
    params: Any
    notes: Mapping[str, Any]
    ranks: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()
    model: Llama | None = None
    graph: Graph | None = None


@dataclasses.dataclass(frozen=True)
class LanguageMethod:
    """One name.

    Attributes:
      about: one line.
      find: (run, graph, progress) -> `Found`.
      trains: it prunes while it trains, for `recover` steps.
      scopes: that it knows.
      even: it keeps equally much in every layer whatever the scope.
      family: the only one whose files can hold what it makes; None: all.
    """

    about: str
    find: Callable[[LanguageRun, Graph, Progress], Found]
    trains: bool = False
    scopes: tuple[str, ...] = ("global", "uniform")
    even: bool = False
    family: str | None = None

    def check(self, o: LanguageOptions, config: LlamaConfig) -> None:
        """Raise ValueError for options that it cannot follow, or a sparsity that this model cannot reach."""
        if o.scope not in self.scopes:
            other = ", ".join(n for n, m in LANGUAGE_METHODS.items() if o.scope in m.scopes)
            raise ValueError(
                f"scope is {o.scope!r}: method {o.method!r} knows only {', '.join(self.scopes)}; leave --scope out, or "
                f"choose another method ({other})"
            )
        if o.form == "uniform" and not (self.even or o.scope == "uniform"):
            raise ValueError("form 'uniform' needs layers of equal width: give --scope uniform too, or --form padded")
        if self.family not in (None, config.family):
            raise ValueError(
                f"method {o.method!r} leaves biases, which files of the {config.family} family have no room for: use "
                "flap-plain"
            )
        if self.trains:
            if not o.recover:
                raise ValueError(
                    f"method {o.method!r} prunes while it trains: give --recover STEPS, the steps it may take"
                )
            pruning_steps(_loraprune_options(o, "lora"), o.recover)
        unit = o.multiple_of
        least = [min(unit, n) / n for n in config.ffn]
        if self.trains:
            least = [max(a, 1 / n) for a, n in zip(least, config.kv_heads, strict=True)]
        # heads and channels go in every layer at the same rate; channels alone share one budget
        reached = 1 - (max(least) if self.trains else float(np.average(least, weights=config.ffn)))
        if o.sparsity > reached + 1e-9:
            raise ValueError(
                f"sparsity is {o.sparsity}, but every layer keeps a unit or a multiple of {unit} at least: with these "
                f"widths sparsity can be at most {reached:.3g}"
            )


def _by_statistics(fine: str, coarse: str = "angular") -> Callable[[LanguageRun, Graph, Progress], Found]:
    """Statistics of one pass, then CFSP's decision."""

    def find(run: LanguageRun, graph: Graph, progress: Progress) -> Found:
        o = run.o
        even = o.scope == "uniform"
        options = CFSPConfig(coarse="uniform" if even else coarse, fine=fine, multiple_of=o.multiple_of,
                              exact_budget=not even, uniform_width=even, seed=o.seed)  # fmt: skip
        stats = block_stats(graph, run.params, run.watched_batches(progress))
        keep, report = cfsp_keep(graph, run.params, stats, o.sparsity, options)
        ranks = None
        if coarse != "uniform":
            ranks = tuple(int(r) for r in lora_ranks(stats.change["angular"], o.rank, r_max=max(32, o.rank)))
        notes = {"tokens": stats.tokens, "importance": report.importance, "keep_ratios": report.keep_ratios}
        return Found(keep, run.params, notes, ranks)

    return find


def _wanda(run: LanguageRun, graph: Graph, progress: Progress) -> Found:
    """One threshold for all layers, on standardised scores."""
    stats = block_stats(graph, run.params, run.watched_batches(progress))
    keep = baselines.wanda_sp(graph, run.params, stats, run.o.sparsity, "global", multiple_of=run.o.multiple_of)
    return Found(keep, run.params, {"tokens": stats.tokens})


def _flap(biases: bool) -> Callable[[LanguageRun, Graph, Progress], Found]:
    def find(run: LanguageRun, graph: Graph, progress: Progress) -> Found:
        o, model, params = run.o, run.model, run.params
        if biases:
            config, params = with_biases(params, run.config)
            model = Llama(config)
            graph = trace(model.apply, params, *graph.example_inputs)
        stats = block_stats(graph, params, run.watched_batches(progress))

        def decide(sparsity: float) -> dict[str, np.ndarray]:
            return baselines.flap(graph, params, stats, sparsity, multiple_of=o.multiple_of)

        keep = decide(o.sparsity)
        said = _no_head_gone(graph, keep, o.sparsity, decide, "all heads and channels share one threshold, and none of the "
                             "heads lies below it")  # fmt: skip
        after = baselines.flap_biases(graph, params, stats, keep).params if biases else params
        return Found(keep, after, {"tokens": stats.tokens}, None, said, model, graph)

    return find


def _taylor(run: LanguageRun, graph: Graph, progress: Progress) -> Found:
    """|weight x gradient| of the calibration text's loss."""

    def loss(params: Any, ids: Any) -> Any:
        return next_token_loss(jnp.asarray(run.model.apply(params, ids)), ids).sum()

    total = baselines.taylor_gradients(graph, loss, run.params, run.watched_batches(progress), heads=True)

    def decide(sparsity: float) -> dict[str, np.ndarray]:
        return baselines.taylor(graph, run.params, total, sparsity, heads=True, multiple_of=run.o.multiple_of)

    keep = decide(run.o.sparsity)
    said = _no_head_gone(
        graph, keep, run.o.sparsity, decide, "every layer gives up the same share of them, rounded down"
    )
    return Found(keep, run.params, {"tokens": int(run.texts.calibration.size)}, None, said)


def _no_head_gone(
    graph: Graph,
    keep: Mapping[str, np.ndarray],
    sparsity: float,
    decide: Callable[[float], Mapping[str, np.ndarray]],
    why: str,
) -> tuple[str, ...]:
    """A warning where a method for heads and channels removes no head, with the least sparsity at which it would."""
    heads = {b.kv: graph.groups[b.kv].size for b in blocks(graph) if b.kv is not None}
    if not heads:
        return ("no head is removed: every layer has one key-value head, which all its query heads need",)

    def whole(found: Mapping[str, np.ndarray]) -> bool:
        return all(np.asarray(found[g]).all() for g in heads if g in found)

    if not sparsity or not whole(keep):
        return ()
    low, high = math.floor(1000 * sparsity), 1000  # in thousandths; at all of it no decision can be made
    while high - low > 1:
        middle = (low + high) // 2
        try:
            gone = not whole(decide(middle / 1000))
        except ValueError:  # out of reach
            gone = True
        low, high = (low, middle) if gone else (middle, high)
    try:
        reached = high < 1000 and not whole(decide(high / 1000))
    except ValueError:
        reached = False
    least = f"the first goes at --sparsity {high / 1000:g}" if reached else "none goes at any sparsity within reach"
    n = sorted(set(heads.values()))
    return (f"no head is removed, only channels: a layer has {' to '.join(map(str, {n[0]: 0, n[-1]: 0}))} key-value heads, "
            f"each of which goes with its query heads, and {why}; {least}",)  # fmt: skip


def _loraprune_options(o: LanguageOptions, criterion: Any) -> LoraPruneConfig:
    every = max(1, min(10, o.recover // 10))
    return LoraPruneConfig(ratio=o.sparsity, every=every, multiple_of=o.multiple_of, criterion=criterion,
                     lora=LoraConfig(rank=o.rank, alpha=2.0 * o.rank, dropout=0.05))  # fmt: skip


def _by_training(criterion: str) -> Callable[[LanguageRun, Graph, Progress], Found]:
    def find(run: LanguageRun, graph: Graph, progress: Progress) -> Found:
        o = run.o
        options = _loraprune_options(o, criterion)
        tuning = TuningConfig(o.recover, o.learning_rate, seed=o.seed)
        most = max(run.config.kv_heads)
        if 0 < o.sparsity < 1 / most - 1e-6:  # as `pruned_units` rounds
            least = f"the first goes at --sparsity {math.ceil(1000 / most) / 1000:g}" if most > 1 else "it cannot go"
            run.warn(f"no head is removed, only channels: a layer has {most} key-value head{'s' * (most > 1)}, and the same "
                     f"share of every layer's goes, rounded down; {least}")  # fmt: skip
        with run.counted("loraprune", o.recover, progress) as on_step:
            result = loraprune(graph, run.params, run.batch_of_step, options, tuning, out=run.folder("loraprune"),
                               resume=True, save_every=run.save_every, on_step=on_step)  # fmt: skip
        params, keep = finalize(graph, run.params, result.lora, result.masks)
        return Found(keep, params, {"skipped": {"first": options.skip_first, "last": options.skip_last}})

    return find


LANGUAGE_METHODS: dict[str, LanguageMethod] = {
    "cfsp": LanguageMethod("channels of MLPs by activation norms, layers by how far they turn the stream (CFSP)",
                           _by_statistics("official")),
    "cfsp-eq8": LanguageMethod("the same with the score of the paper's equation 8", _by_statistics("eq8")),
    "cfsp-relative3": LanguageMethod("the same with all three matrices relative to the other channels",
                                     _by_statistics("relative3")),
    "wanda-sp": LanguageMethod("|weight| x activation norm, all layers alike (Wanda, structured)",
                               _by_statistics("wanda", "uniform"), even=True),
    "wanda-sp-global": LanguageMethod("the same, standardised, with one threshold for all layers", _wanda,
                                      scopes=("global",)),
    "flap": LanguageMethod("heads and channels that fluctuate least, their means moved into biases (FLAP)", _flap(True),
                           scopes=("global",), family="llama"),
    "flap-plain": LanguageMethod("the same without biases", _flap(False), scopes=("global",)),
    "taylor": LanguageMethod("|weight x gradient| of heads and channels, all layers alike (LLM-Pruner)", _taylor, even=True),
    "magnitude": LanguageMethod("norms of the down projection's columns, all layers alike",
                                _by_statistics("magnitude", "uniform"), even=True),
    "random": LanguageMethod("chance, all layers alike: the baseline to beat", _by_statistics("random", "uniform"), even=True),
    "loraprune": LanguageMethod("heads and channels by low-rank gradients, masked out while adapters train (LoRAPrune)",
                                _by_training("lora"), trains=True, scopes=("global",)),
}  # fmt: skip


def language_method(name: str) -> LanguageMethod:
    """The method of that name; ValueError with the nearest names for an unknown one."""
    if name not in LANGUAGE_METHODS:
        near = difflib.get_close_matches(name, LANGUAGE_METHODS, n=3) or sorted(LANGUAGE_METHODS)
        raise ValueError(f"no method {name!r} for language models: did you mean {', '.join(near)}?")
    return LANGUAGE_METHODS[name]
