"""Methods that remove whole experts of a language model: equally many in every layer, those with the lowest scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from jprune.graph import trace
from jprune.methods.contract import DecoderTask, Method, NoConfig, Outcome, checked
from jprune.methods.experts import scores as of
from jprune.methods.experts.fewer import take_experts
from jprune.models.layers import params_of
from jprune.models.llama import Llama
from jprune.models.moe.routers import DSMoE, Grin, TopK

EXPERTS = "experts"  # the quantity that an amount counts here
USUAL = 0.5


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Settings of methods that remove experts.

    Attributes:
      experts: share of each layer's experts to REMOVE, in place of --sparsity
      gate: weights in the score: "combine", those that the model applies, or "official", of a softmax over all experts
    """

    experts: float | None = None
    gate: of.Gate = "combine"

    def __post_init__(self) -> None:
        checked(self, {
            "experts": (self.experts is None or 0 <= self.experts < 1, "at least 0 and below 1"),
            "gate": (self.gate in ("combine", "official"), "combine or official"),
        })  # fmt: skip


def lowest(scores: Float[np.ndarray, "layers experts"], remove: int) -> Bool[np.ndarray, "layers experts"]:
    """True where an expert stays: all but the `remove` lowest of each layer; of equal ones the first go."""
    keep = np.ones(scores.shape, bool)
    np.put_along_axis(keep, np.argsort(scores, axis=1, kind="stable")[:, :remove], False, axis=1)
    return keep


def _number(task: DecoderTask, config: ExpertConfig) -> int:
    """Experts to remove in each layer."""
    count, least = _experts(task)
    if config.experts is not None and task.amount is not None:
        raise ValueError("give either --experts or --sparsity, not both: they say the same")
    share = config.experts if config.experts is not None else USUAL if task.amount is None else task.amount.sparsity
    remove = int(count * share + 1e-9)
    if count - remove < least:
        raise ValueError(f"{share:g} of {count} experts leaves {count - remove}, but a token goes to {least}: remove at most "
                         f"{(count - least) / count:g} of them")  # fmt: skip
    return remove


def _experts(task: DecoderTask) -> tuple[int, int]:
    """(experts of a layer, how many have to stay)."""
    experts = task.model.config.experts
    if experts is None:
        raise ValueError(f"the model has no experts: it is a {task.model.config.family}; choose a method for MLPs")
    return experts.count, experts.router.k if isinstance(experts.router, TopK | DSMoE | Grin) else 1


def _by_scores(task: DecoderTask, config: ExpertConfig, *, score: Callable[[of.ExpertStats], Any]) -> Outcome:
    stats = of.expert_stats(task.model, task.variables, task.inputs(), config.gate)
    return _without(task, lowest(score(stats), _number(task, config)), stats)


def _random(task: DecoderTask, config: ExpertConfig) -> Outcome:
    shape = (task.model.config.depth, _experts(task)[0])
    drawn = np.asarray(jax.random.uniform(jax.random.key(task.seed), shape))
    return _without(task, lowest(drawn, _number(task, config)), None)


def _idle(task: DecoderTask, config: NoConfig) -> Outcome:
    stats = of.expert_stats(task.model, task.variables, task.inputs())
    count, least = _experts(task)
    remove = min(int((stats.tokens == 0).sum(axis=1).min()), count - least)
    found = _without(task, lowest(stats.tokens, remove), stats)
    if not remove:
        text = "nothing is removed: some layer uses all of its experts on this text"
        return dataclasses.replace(found, warnings=(*found.warnings, text))
    return found


def _without(task: DecoderTask, keep: Bool[np.ndarray, "layers experts"], stats: of.ExpertStats | None) -> Outcome:
    """The outcome of keeping these experts."""
    config = task.model.config
    kept = [np.flatnonzero(k).tolist() for k in keep]
    params, left = dict(params_of(task.variables)), len(kept[0])
    router = config.experts.router
    for i, index in enumerate(kept):
        layer = dict(params[f"layer{i}"])
        layer["experts"], router = take_experts(layer["experts"], index, config.experts.router)
        params[f"layer{i}"] = layer
    experts = dataclasses.replace(config.experts, count=left, router=router)
    model = Llama(dataclasses.replace(config, experts=experts))
    variables = {**task.variables, "params": params} if "params" in task.variables else params
    notes: dict[str, Any] = {"experts": {f"layer{i}": index for i, index in enumerate(kept)}}
    if stats is not None:
        lost = 1 - (stats.tokens * keep).sum(axis=1) / np.maximum(stats.tokens.sum(axis=1), 1)
        notes |= {"calibration_tokens": stats.seen, "routed_pairs_lost": lost.tolist(),
                  "experts_never_used": (stats.tokens == 0).sum(axis=1).tolist()}  # fmt: skip
    warnings = ()
    if isinstance(router, TopK) and not router.renormalised and left < config.experts.count:
        warnings = ("this model's router does not divide the weights of a token's experts by their sum: with fewer experts all "
                    "weights grow, also of tokens that lose none",)  # fmt: skip
    return Outcome(
        model, variables, trace(model.apply, variables, *task.example).cost(),
        {f"layer{i}/experts": (config.experts.count, left) for i in range(config.depth)},
        notes=notes, warnings=warnings, units=notes["experts"],
    )  # fmt: skip


def _check(task: DecoderTask, config: ExpertConfig) -> None:
    _number(task, config)


def _check_idle(task: DecoderTask, config: NoConfig) -> None:
    _experts(task)


def _method(name: str, about: str, find: Any) -> Method:
    return Method(
        name,
        about,
        "decoders",
        find,
        ExpertConfig,
        (EXPERTS,),
        optional=True,
        check=_check,
        even=True,
        removes="experts",
    )


METHODS = (
    _method("reap", "experts by weight x norm of their outputs, a mean over their tokens (REAP)",
            functools.partial(_by_scores, score=of.reap)),
    _method("expert-frequency", "experts by how many tokens are routed to them",
            functools.partial(_by_scores, score=of.frequency)),
    _method("expert-weight", "experts by the sum of their router's weights",
            functools.partial(_by_scores, score=of.router_weight)),
    _method("expert-random", "experts by lot", _random),
    Method("expert-idle", "experts that no token of the calibration text is routed to, equally many in every layer", "decoders",
           _idle, NoConfig, (), optional=True, check=_check_idle, even=True, removes="experts"),
)  # fmt: skip
