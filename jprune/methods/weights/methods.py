"""All methods that remove single weights, of classifiers and of language models, in the order in which they are listed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jprune.methods.contract import DecoderTask, Method, Outcome, Task
from jprune.methods.weights import one_shot
from jprune.methods.weights.by_loss import (
    BlockConfig,
    FisherConfig,
    FisherGroupsConfig,
    FisherTaylorConfig,
    icbs_of,
    second_order_of,
)
from jprune.methods.weights.elimination import SparseGPTConfig
from jprune.methods.weights.settings_and_outcome import QUANTITY, WeightConfig, check, finished, leaves_of, sparsity_of
from jprune.models.llama_blocks import pieces
from jprune.models.llama_trees import is_scanned
from jprune.surgery.patterns import Unstructured
from jprune.surgery.patterns import pattern as pattern_of


@dataclasses.dataclass(frozen=True)
class GPTConfig(WeightConfig, SparseGPTConfig):
    """Settings of SparseGPT.

    Attributes:
      damping: share of the Hessian's mean diagonal that is added to it
      block_size: columns whose mask is chosen at once
    """

    def __post_init__(self) -> None:
        WeightConfig.__post_init__(self)
        SparseGPTConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class WandaConfig(WeightConfig):
    """Settings of Wanda.

    Attributes:
      by_share: outputs keep different numbers: of each goes what adds up to the same share of its scores (Wanda's variant)
      gradient_weight: weight of the gradient of the outputs' norm beside the input's norm (the score of Wanda++: 100)
    """

    by_share: bool = False
    gradient_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_shot.check_gradient_weight(self.gradient_weight)
        if self.by_share:
            one_shot.check_shares(one_shot.own_pattern(self.pattern, "matrix"))


# -- in one shot -------------------------------------------------------------------------------------------------------


def _at_once(task: Task, config: WeightConfig, *, prune: one_shot.Prune) -> Outcome:
    """Of the whole function, on its dense inputs."""
    found = prune(task.graph, task.variables, task.inputs(), leaves_of(task, config.leaves), sparsity_of(task, config),
                  config.pattern)  # fmt: skip
    return finished(task, config, found)


def _in_turn(task: Task, config: WeightConfig, *, prune: one_shot.Prune) -> Outcome:
    """Of one leaf after the other, on what the pruned ones pass on; at once where all weights are compared."""
    if pattern_of(config.pattern) == Unstructured("model"):
        return _at_once(task, config, prune=prune)
    found = one_shot.in_turn(prune, task.graph, task.variables, task.inputs(), leaves_of(task, config.leaves),
                             sparsity_of(task, config), config.pattern)  # fmt: skip
    return finished(task, config, found)


def _layers(task: DecoderTask, config: WeightConfig, *, prune: one_shot.Prune) -> Outcome:
    """Of a decoder layer by layer, on what the pruned layers pass on; at once where only some leaves are asked for."""
    if config.leaves or is_scanned(task.variables):
        return _at_once(task, config, prune=prune)
    found = one_shot.layer_by_layer(prune, pieces(task.model.config, task.variables), task.inputs(),
                                    sparsity_of(task, config), config.pattern)  # fmt: skip
    wrapped = "params" in task.variables
    inner = dict(task.variables["params"] if wrapped else task.variables)
    masks, notes = {}, {}
    for i, layer in enumerate(found):
        inner[f"layer{i}"] = layer.params
        masks |= {f"{'params/' if wrapped else ''}layer{i}/{p}": m for p, m in layer.masks.items()}
        notes |= {f"layer{i}": layer.notes} if layer.notes else {}
    params = {**task.variables, "params": inner} if wrapped else inner
    return finished(task, config, one_shot.Pruned(params, masks, {"layers": notes} if notes else {}))


def _gpt(*args: Any, config: GPTConfig) -> one_shot.Pruned:
    return one_shot.sparsegpt(*args, config=SparseGPTConfig(config.damping, config.block_size))


def _sparsegpt(task: Task, config: GPTConfig) -> Outcome:
    prune = functools.partial(_gpt, config=config)
    return (_layers if isinstance(task, DecoderTask) else _in_turn)(task, config, prune=prune)  # pyright: ignore[reportArgumentType]


def _wanda(task: Task, config: WandaConfig) -> Outcome:
    prune = functools.partial(one_shot.wanda, by_share=config.by_share, gradient_weight=config.gradient_weight)
    return (_layers if isinstance(task, DecoderTask) else _in_turn)(task, config, prune=prune)  # pyright: ignore[reportArgumentType]


def _random(task: Task, config: WeightConfig) -> Outcome:
    return _at_once(task, config, prune=functools.partial(one_shot.random, seed=task.seed))


def _method(name: str, about: str, models: str, find: Any, config: type, matrices: bool, **more: Any) -> Method:
    checks = functools.partial(check, matrices=matrices)
    return Method(name, about, models, find, config, (QUANTITY,), optional=True, check=checks, even=True,
                  removes="weights", **more)  # fmt: skip


SECOND_ORDER = (
    ("woodfisher", "by the inverse Fisher matrix, all moves at once (WoodFisher, WoodTaylor)", FisherTaylorConfig),
    ("obert", "by the inverse Fisher matrix in small blocks (oBERT)", FisherConfig),
    ("cap", "by the inverse Fisher matrix, one weight after the other in every block (CAP, oViT)", FisherGroupsConfig),
    ("cbs", "by swaps under the Fisher matrix, then all moves at once (CBS)", FisherConfig),
    ("chita", "by hard thresholding and ridge regression on gradients (CHITA; --stages 8: CHITA++)", FisherConfig),
)


def _all(models: str) -> tuple[Method, ...]:
    plain = functools.partial(_at_once, prune=one_shot.magnitude)
    return (
        _method("weight-magnitude", "single weights of least size", models, plain, WeightConfig, False),
        _method("wanda", "single weights: |weight| x norm of its input, within each output (Wanda)", models, _wanda,
                WandaConfig, True),
        _method("sparsegpt", "single weights, column by column, the rest makes up for them (SparseGPT)", models, _sparsegpt,
                GPTConfig, True),
        _method("icbs", "single weights: a mask improved block by block, each a binary quadratic problem (iCBS)", models,
                icbs_of, BlockConfig, True, training=lambda task, config: config.steps),
        *(_method(name, f"single weights: {how}", models, functools.partial(second_order_of, name=name), config, True,
                  training=lambda task, config: config.stages) for name, how, config in SECOND_ORDER),
        _method("weight-random", "single weights by chance: the baseline to beat", models, _random, WeightConfig, False),
    )  # fmt: skip


FOR_CLASSIFIERS, FOR_DECODERS = _all("classifiers"), _all("decoders")
