"""A classifier pruned by MaskSparsity, by what it is compared with, and by masks that are controls: the phases of one seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.classifier import Classifier
from experiments.study import Run
from jprune.data import Dataset, steps_per_epoch
from jprune.importance import batchnorm_scale, magnitude, random
from jprune.methods.channels.depgraph_sparse import group_sparsity
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.channels.masksparsity.run import MaskSparsityConfig, run
from jprune.models import rebuild
from jprune.tracing.paths import flatten
from jprune.training import TrainConfig, learning_rates


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, the data and the recipe of every phase.

    Attributes:
      model: () -> linen module.
      data: (data folder or None, seed) -> dataset.
      baseline, sparse, finetune: recipes of steps 0, 1 and 3, 5.
      sparsities: fractions of the listed channels to prune, each rows of its own; the first has the controls too.
      strength: s of both sparse phases; weak: the control that must fail.
      group_strength: of DepGraph's group shrinkage.
      coupled: whether residual streams are pruned too.
      threshold: th of steps 2 and 4.
      data_dir: the folder of the data.
    """

    model: Callable[[], Any]
    data: Callable[[Path | None, int], Dataset]
    baseline: TrainConfig
    sparse: TrainConfig
    finetune: TrainConfig
    sparsities: tuple[float, ...]
    strength: float
    group_strength: float
    weak: float | None = None
    coupled: bool = False
    threshold: float = 0.01
    data_dir: Path | None = None


Mask = dict[str, np.ndarray]


class MaskedNetwork:
    """All phases of one seed; each is trained when a row first asks for it, and rows share them.

    Attributes:
      CHOSEN: rows whose channels are chosen by scores or scales of one network. CONTROLS: of MaskSparsity.
    """

    CHOSEN = ("slimming", "batchnorm-scale", "magnitude-l1", "group-norm", "group-norm-sparse", "random")
    CONTROLS = ("network-wide random mask, suggested s", "penalty too weak", "random mask", "random mask, by threshold",
                "network-wide random mask")  # fmt: skip

    def __init__(self, s: Setting, run: Run):
        self.s, self.seed = s, run.seed
        self.net = Classifier(s.model(), s.data(s.data_dir, run.seed), run)
        self.graph = self.net.graph
        self.listed = ms.listed_scales(self.graph, s.coupled)
        self.trained: dict[str, Any] = {}

    def phase(self, name: str, recipe: TrainConfig, variables: Any, transform: Any = None, model: Any = None) -> Any:
        """Variables after a phase of training."""
        if name not in self.trained:
            self.trained[name] = self.net.fit(name, recipe, variables, transform, model)
        return self.trained[name]

    @functools.cached_property
    def dense(self) -> Any:
        """W0."""
        return self.phase("baseline", self.s.baseline, self.net.variables)

    @functools.cached_property
    def longer(self) -> Any:
        """W0 after the epochs of the sparse phases, without a penalty."""
        return self.phase("longer", self.s.sparse, self.dense)

    @functools.cached_property
    def grouped(self) -> Any:
        """W0 after DepGraph's shrinkage of whole groups."""
        recipe = dataclasses.replace(self.s.sparse, weight_decay=0.0)
        return self.phase("group-norm", recipe, self.dense, group_sparsity(self.graph, self.s.group_strength))

    @functools.cached_property
    def slim(self) -> Any:
        """W0 after the method's first step, which is network slimming."""
        everywhere = ms.masked_penalty(ms.all_masked(self.graph, self.listed), self.s.strength)
        return self.phase("global", self.s.sparse, self.dense, everywhere)

    def row(self, sparsity: float, name: str) -> dict[str, Any]:
        """One row."""
        at = f"{sparsity:g}"
        if name == "masksparsity":
            return self.masked(f"masked-{at}", f"masked-{at}", sparsity)
        if name == "masksparsity, by threshold":
            return self.masked(f"threshold-{at}", f"masked-{at}", sparsity, by="threshold")
        if name.startswith("control: "):
            return self.control(name.removeprefix("control: "), sparsity)
        g, more = self.graph, self.longer
        phase, variables, scores = {
            "slimming": ("slimming", lambda: self.slim, None),
            "batchnorm-scale": ("scale", lambda: more, batchnorm_scale),
            "magnitude-l1": ("l1", lambda: more, lambda g, v: magnitude(g, v, 1)),
            "group-norm": ("norm", lambda: more, lambda g, v: magnitude(g, v, 2)),
            "group-norm-sparse": ("normsparse", lambda: self.grouped, lambda g, v: magnitude(g, v, 2)),
            "random": ("random", lambda: more, lambda g, v: random(g, jax.random.key(self.seed))),
        }[name]
        v = variables()
        keep = self.mask(sparsity) if scores is None else self.chosen(scores(g, v), sparsity)
        return self.pruned(f"{phase}-{at}", v, keep)

    def control(self, name: str, sparsity: float) -> dict[str, Any]:
        """A mask or a strength that is not the method's own."""
        s = self.s
        shuffled = {g: np.random.default_rng(self.seed).permutation(k) for g, k in self.mask(sparsity).items()}
        luck = self.chosen(random(self.graph, jax.random.key(1000 + self.seed)), sparsity)
        if name == "penalty too weak":
            return self.masked("weak", "weak", mask=self.mask(sparsity), strength=s.weak)
        if name == "random mask":
            return self.masked("shuffled-mask", "shuffled-mask", mask=shuffled)
        if name == "random mask, by threshold":
            return self.masked("shuffled-threshold", "shuffled-mask", mask=shuffled, by="threshold")
        if name == "network-wide random mask":
            return self.masked("random-mask", "random-mask", mask=luck)
        leaves = dict(flatten(self.dense))
        largest = max(float(np.abs(leaves[p]).max()) for paths in self.listed.values() for p in paths)
        rates = learning_rates(s.sparse, steps_per_epoch(self.net.data.train, s.sparse.batch_size))
        enough = ms.suggest_s(rates, s.sparse.momentum, largest)
        return {
            **self.masked("random-mask-suggested", "random-mask-suggested", mask=luck, strength=enough),
            "s": enough,
        }

    def mask(self, sparsity: float) -> Mask:
        """Step 2 of the method."""
        return ms.make_mask(self.slim, self.listed, ms.MaskRule("sparsity", sparsity=sparsity)).keep

    def chosen(self, scores: Any, sparsity: float) -> Mask:
        """The listed channels with the largest scores."""
        own = {g: np.asarray(scores[g]) for g in self.listed}
        return ms.make_mask(own, {g: (g,) for g in self.listed}, ms.MaskRule("sparsity", sparsity=sparsity)).keep

    def masked(
        self,
        name: str,
        masked: str,
        sparsity: float = 0.5,
        mask: Mask | None = None,
        strength: float | None = None,
        by: str = "mask",
    ) -> dict[str, Any]:
        """The method from W0 on; its masked phase has the name `masked`, which rows may share."""
        s = self.s
        config = MaskSparsityConfig(
            baseline=None, sparse=s.sparse, finetune=s.finetune, strength_global=s.strength,
            strength=s.strength if strength is None else strength, rule=ms.MaskRule("sparsity", sparsity=sparsity),
            coupled=s.coupled, prune_threshold=s.threshold, prune_by=by)  # fmt: skip
        names = {"round1-global": "global", "round1-masked": masked, "round1-finetune": f"{name}-finetune"}

        def fit(phase: str, model: Any, variables: Any, recipe: TrainConfig, transform: Any) -> Any:
            return self.phase(names[phase], recipe, variables, transform, model)

        (done,) = run(self.net.model, self.dense, self.net.data, config, train_fn=fit, mask=mask).rounds
        row = done.accuracy | self.described(self.trained[masked], done.decision.keep)
        if by == "threshold":
            row |= {k: getattr(done.decision, k) for k in ("masked_survivors", "unmasked_losses")}
        return row

    def pruned(self, name: str, variables: Any, keep: Mask) -> dict[str, Any]:
        """Prune, test, fine-tune, test."""
        small = self.graph.compact(variables, keep)
        module = rebuild(self.net.model, small)
        tuned = self.phase(f"{name}-finetune", self.s.finetune, small, model=module)
        accuracy = {"before": self.net.accuracy(variables), "pruned": self.net.accuracy(small, module),
                    "finetuned": self.net.accuracy(tuned, module)}  # fmt: skip
        return accuracy | self.described(variables, keep)

    def described(self, variables: Any, keep: Mask) -> dict[str, float]:
        """What pruning these variables so leaves, and takes."""
        leaves, scales = dict(flatten(variables)), [(p, g) for g, paths in self.listed.items() for p in paths]
        gammas = np.concatenate([np.abs(leaves[p]) for p, _ in scales])
        stays = np.concatenate([keep[g] for _, g in scales])
        cost, dense = self.graph.cost(keep), self.graph.cost()
        return {
            "macs_fraction": cost.macs / dense.macs,
            "params_fraction": cost.params / dense.params,
            "mean_kept_gamma": float(gammas[stays].mean()),
            "max_pruned_gamma": float(gammas[~stays].max(initial=0.0)),
        }
