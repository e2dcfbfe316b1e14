"""A classifier cropped before training, and the masks and widths it is compared with: the rows of one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import in_turns, medians
from experiments.classifier import Classifier, training_step
from experiments.study import Run
from jprune import importance
from jprune.budget import Target
from jprune.data import ArraySplit, Dataset, epoch_batches
from jprune.importance.at_init import weights_of
from jprune.methods.channels.precrop import controls
from jprune.methods.channels.precrop import precrop as pc
from jprune.models import rebuild
from jprune.training import TrainConfig
from jprune.training.progress import display


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      model: () -> linen module.
      data: (data folder or None, seed) -> dataset.
      recipe: of the training from scratch.
      keep: fractions of the counted weights kept; the first gets every row, the others the curve.
      rule: how widths are chosen.
      exempt: leaves that are neither scored nor counted.
      curve: the methods of the curve.
      data_dir: the folder of the data.
    """

    model: Callable[[], Any]
    data: Callable[[Path | None, int], Dataset]
    recipe: TrainConfig
    keep: tuple[float, ...]
    rule: pc.WidthRule = pc.WidthRule()
    exempt: tuple[str, ...] = ()
    curve: tuple[str, ...] = ("unstructured synflow", "synflow sqrt", "synexp sqrt", "snip sqrt", "uniform_width")
    data_dir: Path | None = None


class CroppedNetwork:
    """The untrained network of one seed; scores of its weights are found when a row first asks for them."""

    def __init__(self, s: Setting, run: Run):
        data = s.data(s.data_dir, run.seed)
        self.s, self.seed, self.net = s, run.seed, Classifier(s.model(), data, run)
        self.graph, self.model, self.variables = self.net.graph, self.net.model, self.net.variables
        self.weights = tuple(p for p in importance.weight_leaves(self.graph) if p not in s.exempt)
        self.batches = scoring_batches(data, run.seed)
        self.scores: dict[tuple[str, float], Any] = {}

    def row(self, name: str, keep: float) -> dict[str, Any]:
        """The row of a name: "dense", a kind of mask or of weights and a score, a score and a rule, or other widths."""
        kind, _, score = name.partition(" ")
        at = f"{keep:g} {name}"
        if kind == "dense":
            total = sum(int(np.prod(self.graph.leaves[p].shape)) for p in self.weights)
            variables = self.net.fit("dense", self.s.recipe, self.variables)
            return {"accuracy": self.net.accuracy(variables), "weights": total, "macs": self.macs(),
                    "macs_if_skipped": self.macs()}  # fmt: skip
        if kind in ("unstructured", "shuffled", "reinitialised"):
            masks = importance.weight_masks(self.score(score, keep), keep)
            if kind == "shuffled":
                masks = importance.shuffled_masks(masks, np.random.default_rng(self.seed))
            other = self.net.initial(self.model, 500 + self.seed)
            return self.masked(at, masks, other if kind == "reinitialised" else self.variables)
        if kind == "first-channels":
            found = self.widths(f"{score} sqrt", keep)
            return self.cropped(at, found, controls.first_channels(self.graph, self.variables, found.widths))
        return self.cropped(at, self.widths(name, keep))

    def score(self, method: str, keep: float) -> Any:
        """Scores of single weights; those of SynFlow depend on what is to be kept."""
        at = (method, keep if method == "synflow" else 1.0)
        if at not in self.scores:
            self.scores[at] = (
                importance.synflow(self.model.apply, self.variables, self.net.x, self.weights, keep)
                if method == "synflow"
                else getattr(importance, method)(self.model.apply, self.variables, self.batches, self.weights)
            )
        return self.scores[at]

    def widths(self, row: str, keep: float) -> pc.Cropped:
        """Widths of a row "method rule" or of a control."""
        method, _, rule = row.partition(" ")
        how = dataclasses.replace(self.s.rule, rule=rule or "sqrt")
        if method in ("synflow", "snip", "grasp"):  # scores are at hand: once for both rules and the masks
            d = importance.densities(self.score(method, keep), keep)
            return pc.widths(self.graph, d, Target.params(keep), how)
        return pc.precrop(self.model, self.variables, self.net.x, Target.params(keep), method, rule=how,
                          scoring=pc.Scoring(exempt=self.s.exempt), key=jax.random.key(self.seed))  # fmt: skip

    def masked(self, name: str, masks: Any, variables: Any) -> dict[str, Any]:
        """The mask itself, trained on these weights."""
        model = controls.masked(self.model)
        trained = self.net.fit(name, self.s.recipe, controls.with_masks(variables, masks), model=model)
        rows = self.graph.layer_costs()  # an ideal sparse kernel would do each layer's MACs times its density
        skipped = sum(r.macs * (float(masks[r.name].mean()) if r.name in masks else 1.0) for r in rows)
        return {"accuracy": self.net.accuracy(trained, model), "weights": sum(int(m.sum()) for m in masks.values()),
                "macs": self.macs(), "macs_if_skipped": skipped / len(self.net.x)}  # fmt: skip

    def cropped(self, name: str, found: pc.Cropped, weights: Any = None) -> dict[str, Any]:
        """The network of these widths, initialised afresh unless weights are given."""
        shapes = self.graph.resize(self.variables, found.widths)
        module = rebuild(self.model, shapes)
        weights = self.net.initial(module, 1000 + self.seed) if weights is None else weights
        trained = self.net.fit(name, self.s.recipe, weights, model=module)
        macs = self.macs(found.widths)
        kept = sum(int(np.prod(leaf.shape)) for leaf in weights_of(shapes, self.weights).values())
        return {"accuracy": self.net.accuracy(trained, module), "weights": kept, "macs": macs,
                "macs_if_skipped": macs, "widths": list(found.widths.values())}  # fmt: skip

    def macs(self, widths: Any = None) -> float:
        """MACs of one image."""
        return self.graph.cost(widths=widths or {}).macs / len(self.net.x)


def step_times(s: Setting, rounds: int = 30, steps: int = 10) -> dict[str, float]:
    """Milliseconds of a training step: the dense network, the masked one, the cropped one; medians of rounds in turns."""
    with display(False) as progress:
        one = CroppedNetwork(s, Run(0, None, progress))
    masks = importance.weight_masks(one.score("synflow", s.keep[0]), s.keep[0])
    module = rebuild(one.model, one.graph.resize(one.variables, one.widths("synflow sqrt", s.keep[0]).widths))
    batch = epoch_batches(one.net.data.train, s.recipe.batch_size, seed=0, epoch=0)[0]
    networks = {
        "dense": (one.model, one.variables),
        "masked": (controls.masked(one.model), controls.with_masks(one.variables, masks)),
        "cropped": (module, one.net.initial(module, 0)),
    }
    jobs = {name: training_step(model, v, batch, s.recipe, steps) for name, (model, v) in networks.items()}
    return {name: 1e3 * t / steps for name, t in medians(in_turns(jobs, rounds)).items()}


def scoring_batches(data: Dataset, seed: int, per_class: int = 10) -> list[tuple[Any, Any]]:
    """Ten training examples of every class; a tenth of the training set is enough to find them."""
    split = data.train
    n = len(split) if isinstance(split, ArraySplit) and len(split) < 10000 else min(len(split), 100 * data.num_classes)
    chosen = np.random.default_rng(seed).permutation(len(split))[:n]
    read = split.read(np.sort(chosen))
    return importance.class_balanced_batches(read["image"], read["label"], per_class)
