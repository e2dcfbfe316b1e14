"""All methods that remove channels and heads of a language model, in the order in which they are listed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jprune.budget.reach import sparsity_for
from jprune.budget.target import Target
from jprune.graph import Graph, trace
from jprune.language.blocks import blocks
from jprune.language.perplexity import next_token_loss
from jprune.language.statistics import block_stats
from jprune.methods.channels import decoder_baselines as baselines
from jprune.methods.channels.cfsp import CFSPConfig, cfsp_keep, lora_ranks
from jprune.methods.channels.loraprune.method import METHODS as LORAPRUNE
from jprune.methods.contract import UNITS, DecoderTask, Method, Outcome, WidthConfig, check_least, checked, cut
from jprune.models.llama import Llama
from jprune.models.llama_trees import with_biases
from jprune.training.decisions import Decided, remembered

Keep = dict[str, np.ndarray]
Make = Callable[[DecoderTask, Any], Decided]
QUANTITIES = (UNITS, "params", "macs", "bytes")


@dataclasses.dataclass(frozen=True)
class ScopeConfig(WidthConfig):
    """Settings of methods that can divide the amount over the layers in two ways.

    Attributes:
      scope: layers share the amount as the method says, or all keep the same number
    """

    scope: Literal["global", "uniform"] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self, {"scope": (self.scope in ("global", "uniform"), "global or uniform")})


def check(task: DecoderTask, config: WidthConfig, *, family: str | None = None, heads: bool = False) -> None:
    """Refuse an amount that this model cannot lose, and a family whose files cannot hold what the method makes.

    Args:
      family: the only one whose files have room for what the method makes; None: all have.
      heads: the method removes heads too.
    """
    model = task.model.config
    if family not in (None, model.family):
        raise ValueError(
            f"the method leaves biases, which files of the {model.family} family have no room for: use flap-plain"
        )
    unit, amount = config.multiple_of, task.wanted
    if amount.quantity != UNITS:
        found = blocks(task.graph)
        least = {b.ffn: min(unit, task.graph.groups[b.ffn].size) for b in found}
        least |= {b.kv: 1 for b in found if heads and b.kv is not None}
        share = getattr(task.graph.cost(widths=least), amount.quantity) / getattr(task.graph.cost(), amount.quantity)
        if amount.keep < share:
            raise ValueError(f"keep is {amount.keep} of the {amount.quantity}, but {share:.3g} is left when every layer "
                             "keeps as little as it may: raise --keep")  # fmt: skip
        return
    least = float(np.average([min(unit, n) / n for n in model.ffn], weights=model.ffn))
    check_least(task, least, unit)


def sparsity_of(task: DecoderTask, decide: Callable[[float], Mapping[str, Any]], dense: Graph | None = None) -> float:
    """The share of units at which `decide` loses the task's amount of whatever it counts.

    `dense`: the graph of the given model, where the task's has more parameters than that.
    """
    amount = task.wanted
    if amount.quantity == UNITS:
        return amount.sparsity
    whole = getattr((dense or task.graph).cost(), amount.quantity)
    return sparsity_for(task.graph, decide, Target(amount.quantity, int(amount.keep * whole)))


def _find(task: DecoderTask, config: WidthConfig, *, make: Make) -> Outcome:
    """The decision, made once and read again by a run that goes on, then cut."""
    return cut(task, remembered(task.run.folder("decision"), task.graph, lambda: make(task, config)))


def _method(name: str, about: str, make: Make, config: type = WidthConfig, heads: bool = False) -> Method:
    checks = functools.partial(check, heads=heads)
    return Method(name, about, "decoders", functools.partial(_find, make=make), config, QUANTITIES, check=checks)


# -- decisions -------------------------------------------------------------------------------------------------------


def _by_statistics(fine: str, coarse: str = "angular") -> Make:
    """Statistics of one pass, then CFSP's decision."""

    def make(task: DecoderTask, config: WidthConfig) -> Decided:
        even = coarse == "uniform" or (isinstance(config, ScopeConfig) and config.scope == "uniform")
        options = CFSPConfig(coarse="uniform" if even else coarse, fine=fine, multiple_of=config.multiple_of,
                              exact_budget=not even, uniform_width=even, seed=task.seed)  # fmt: skip
        stats = block_stats(task.graph, task.variables, task.inputs())

        def decide(sparsity: float) -> Any:
            return cfsp_keep(task.graph, task.variables, stats, sparsity, options)

        keep, report = decide(sparsity_of(task, lambda s: decide(s)[0]))
        ranks = None
        if coarse != "uniform":
            ranks = tuple(int(r) for r in lora_ranks(stats.change["angular"], task.rank, r_max=max(32, task.rank)))
        notes = {"tokens": stats.tokens, "importance": report.importance, "keep_ratios": report.keep_ratios}
        return Decided(keep, notes, ranks)

    return make


def _wanda(task: DecoderTask, config: WidthConfig) -> Decided:
    """One threshold for all layers, on standardised scores."""
    stats = block_stats(task.graph, task.variables, task.inputs())

    def decide(sparsity: float) -> Keep:
        return baselines.wanda_sp(task.graph, task.variables, stats, sparsity, "global", multiple_of=config.multiple_of)

    return Decided(decide(sparsity_of(task, decide)), {"tokens": stats.tokens})


def _taylor(task: DecoderTask, config: WidthConfig) -> Decided:
    """|weight x gradient| of the calibration text's loss."""

    def loss(params: Any, ids: Any) -> Any:
        return next_token_loss(jnp.asarray(task.model.apply(params, ids)), ids).sum()

    total = baselines.taylor_gradients(task.graph, loss, task.variables, task.inputs(), heads=True)

    def decide(sparsity: float) -> Keep:
        return baselines.taylor(task.graph, task.variables, total, sparsity, heads=True, multiple_of=config.multiple_of)

    sparsity = sparsity_of(task, decide)
    keep = decide(sparsity)
    said = _no_head_gone(
        task.graph, keep, sparsity, decide, "every layer gives up the same share of them, rounded down"
    )
    return Decided(keep, {}, None, said)


def _flap(task: DecoderTask, config: WidthConfig, *, biases: bool) -> Outcome:
    """Heads and channels that fluctuate least; with biases for what they were on average."""
    if biases:
        given = task.graph
        model, params = with_biases(task.variables, task.model.config)
        module = Llama(model)
        task = dataclasses.replace(
            task, model=module, variables=params, graph=trace(module.apply, params, *task.example)
        )
        stats, decided = _flap_decision(task, config, given)
        after = baselines.flap_biases(task.graph, task.variables, stats, decided.keep).params
        return cut(dataclasses.replace(task, variables=after), decided)
    return _find(task, config, make=lambda task, config: _flap_decision(task, config)[1])


def _flap_decision(task: DecoderTask, config: WidthConfig, dense: Graph | None = None) -> tuple[Any, Decided]:
    stats = block_stats(task.graph, task.variables, task.inputs())

    def decide(sparsity: float) -> Keep:
        return baselines.flap(task.graph, task.variables, stats, sparsity, multiple_of=config.multiple_of)

    sparsity = sparsity_of(task, decide, dense)
    keep = decide(sparsity)
    said = _no_head_gone(task.graph, keep, sparsity, decide, "all heads and channels share one threshold, and none of "
                         "the heads lies below it")  # fmt: skip
    return stats, Decided(keep, {"tokens": stats.tokens}, None, said)


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


METHODS: tuple[Method, ...] = (
    _method("cfsp", "channels of MLPs by activation norms, layers by how far they turn the stream (CFSP)",
            _by_statistics("official"), ScopeConfig),
    _method("cfsp-eq8", "the same with the score of the paper's equation 8", _by_statistics("eq8"), ScopeConfig),
    _method("cfsp-relative3", "the same with all three matrices relative to the other channels",
            _by_statistics("relative3"), ScopeConfig),
    dataclasses.replace(_method("wanda-sp", "|weight| x activation norm, all layers alike (Wanda, structured)",
                                _by_statistics("wanda", "uniform")), even=True),
    _method("wanda-sp-global", "the same, standardised, with one threshold for all layers", _wanda),
    Method("flap", "heads and channels that fluctuate least, their means moved into biases (FLAP)", "decoders",
           functools.partial(_flap, biases=True), WidthConfig, QUANTITIES,
           check=functools.partial(check, family="llama", heads=True)),
    Method("flap-plain", "the same without biases", "decoders", functools.partial(_flap, biases=False), WidthConfig, QUANTITIES,
           check=functools.partial(check, heads=True)),
    dataclasses.replace(_method("taylor", "|weight x gradient| of heads and channels, all layers alike (LLM-Pruner)",
                                _taylor, heads=True), even=True),
    dataclasses.replace(_method("magnitude", "norms of the down projection's columns, all layers alike",
                                _by_statistics("magnitude", "uniform")), even=True),
    dataclasses.replace(_method("random", "chance, all layers alike: the baseline to beat",
                                _by_statistics("random", "uniform")), even=True),
    *LORAPRUNE,
)  # fmt: skip
