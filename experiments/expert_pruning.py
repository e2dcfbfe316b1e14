"""Fewer experts in a trained decoder: the loss against the share that goes, for REAP and what it has to beat.

    python -m experiments.expert_pruning

A decoder whose MLPs are 16 gated experts, of which a byte goes to 2, reads Python's standard library for 300 steps. Then
experts go, equally many in both layers, by each of four scores on a little of the training text; nothing is trained
afterwards. Measured on held-back files: the loss per byte, and which share of the (byte, expert) pairs lost its expert.
Random ones are a mean of five draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import expert_decoder
from experiments.figures import label, panels, spread, table
from experiments.study import Demand, Key, Run, Study, at_most
from jprune.methods.experts.fewer import take_experts
from jprune.methods.experts.for_decoders import lowest
from jprune.methods.experts.scores import ExpertStats, expert_stats, frequency, reap, router_weight
from jprune.methods.experts.training import ExpertLosses
from jprune.models.layers import params_of
from jprune.models.llama import Llama
from jprune.models.moe import Experts, TopK

SCORES: dict[str, Callable[[ExpertStats], np.ndarray]] = {
    "REAP": reap,
    "frequency": frequency,
    "router weight": router_weight,
}


@dataclasses.dataclass(frozen=True)
class Setting(expert_decoder.Setting):
    """Sizes of the decoder and of its training, and what is removed.

    Attributes:
      calibration: windows of training text that scores are made of
      removed: experts of each layer that go
      draws: of random ones
    """

    experts: int = 16
    width: int = 48
    active: int = 2
    calibration: int = 64
    removed: tuple[int, ...] = (4, 8, 12)
    draws: int = 5


class Pruned:
    """What the rows of one seed share: the trained decoder and the sums of its experts."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.seed = s, run.seed
        self.decoders = expert_decoder.Decoders(s, run)
        experts = Experts(s.experts, TopK(s.active), gated=True)
        self.module, self.variables = self.decoders.trained("gated TopK", experts, ExpertLosses(balance=1e-2))
        text = self.decoders.batches.reshape(-1, s.tokens)[: s.calibration]
        self.stats = expert_stats(self.module, self.variables, [text[i : i + 16] for i in range(0, len(text), 16)])

    def without(self, remove: int, scores: np.ndarray) -> dict[str, float]:
        """Loss, and the share of pairs that is lost, with so few experts."""
        keep, params = lowest(scores, remove), dict(params_of(self.variables))
        config = self.module.config
        assert config.experts is not None
        for i, kept in enumerate(keep):
            layer = params[f"layer{i}"]
            few, _ = take_experts(layer["experts"], np.flatnonzero(kept).tolist(), config.experts.router)
            params[f"layer{i}"] = {**layer, "experts": few}
        fewer = dataclasses.replace(config.experts, count=config.experts.count - remove)
        small = Llama(dataclasses.replace(config, experts=fewer))
        lost = 1 - (self.stats.tokens * keep).sum() / self.stats.tokens.sum()
        return {"loss": self.decoders.loss(small, {"params": params}), "pairs_lost": float(lost)}

    def whole(self) -> dict[str, float]:
        """Nothing removed; and how unevenly the experts are used: the largest share of tokens over the mean one."""
        load = self.stats.tokens / self.stats.tokens.mean(axis=1, keepdims=True)
        return {"loss": self.decoders.loss(self.module, self.variables), "largest_load": float(load.max())}

    def scored(self, name: str, remove: int) -> dict[str, float]:
        """By one of the scores."""
        return self.without(remove, SCORES[name](self.stats))

    def drawn(self, remove: int) -> dict[str, float]:
        """A mean over draws."""
        keys = jax.random.split(jax.random.key(self.seed), self.s.draws)
        found = [self.without(remove, np.asarray(jax.random.uniform(k, self.stats.tokens.shape))) for k in keys]
        return {n: float(np.mean([f[n] for f in found])) for n in found[0]}


def rows(s: Setting) -> dict[Key, Callable[[Pruned], Any]]:
    """Every score at every share."""
    out: dict[Key, Callable[[Pruned], Any]] = {("whole",): Pruned.whole}
    for n in s.removed:
        out |= {("pruned", name, str(n)): functools.partial(Pruned.scored, name=name, remove=n) for name in SCORES}
        out["pruned", "random", str(n)] = functools.partial(Pruned.drawn, remove=n)
    return out


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds, with half of the experts gone."""
    half = str(stored["setting"]["experts"] // 2)
    loss = {name: r[half]["loss"]["mean"] for name, r in stored["results"]["pruned"].items()}
    return {
        f"half of the experts: REAP's loss at most {n}'s": at_most(loss["REAP"], loss[n]) for n in loss if n != "REAP"
    }


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """The loss of every score."""
    found, count = stored["results"]["pruned"], stored["setting"]["experts"]
    removed = list(found["REAP"])
    lines = [[name, *(spread(r[n]["loss"]) for n in removed), *(spread(r[n]["pairs_lost"]) for n in removed)]
             for name, r in found.items()]  # fmt: skip
    heads = [f"{n} of {count} gone" for n in removed]
    return [table(f"loss per byte; whole: {spread(stored['results']['whole']['loss'])}",
                  ("score", *heads, *(f"pairs lost, {n}" for n in removed)), lines)]  # fmt: skip


def draw(stored: Mapping[str, Any]) -> Any:
    """Loss over the share of experts that is gone."""
    figure, (axes,) = panels(1, (5.6, 4))
    whole, count = stored["results"]["whole"]["loss"]["mean"], stored["setting"]["experts"]
    for (name, r), color in zip(stored["results"]["pruned"].items(), ("#d1495b", "#2a6f97", "#edae49", "#b8c4d0")):
        shares = [0.0, *(100 * int(n) / count for n in r)]
        axes.plot(shares, [whole, *(x["loss"]["mean"] for x in r.values())], "o-", color=color, label=name)
    label(axes, "experts removed, %", "loss per byte", "")
    return figure


STUDY = Study("expert_pruning", __doc__, {"small": Setting()}, Pruned, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
