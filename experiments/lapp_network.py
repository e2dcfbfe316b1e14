"""Networks of a given cost, by thresholds learned or chosen in training or by their widths alone: the rows of one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jprune
from experiments.classifier import Classifier
from experiments.study import Run
from jprune.data import Dataset
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.methods.channels.lapp.network import Network, finalise, init, prepare, slice_lapp
from jprune.methods.channels.lapp.run import LappRunConfig, run
from jprune.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to get a network of a given cost: "lapp", "uniform", "random", "dense", "narrow" or "random widths"."""

    how: str
    lapp: LappConfig | None = None

    @property
    def name(self) -> str:
        """How, and what is not as usual."""
        c = self.lapp
        if c is None:
            return self.how
        options = [c.bypass] if self.how in ("lapp", "uniform", "random") else []
        standard = LappConfig(c.target)
        options += [] if c.task_to_threshold else ["constraint alone"]
        options += [c.score] if c.score != standard.score else []
        return f"{self.how} {' '.join(options)} {c.target:g}".replace("  ", " ")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
      model: widths of the stages or None for the whole ones -> linen module. widths: of the stages.
      data: (data folder or None, seed) -> dataset.
      train, warmup, stop: the recipe, the epochs of warm-up and when the network is sliced.
      compared: ways to a network.
      data_dir: the folder of the data.
    """

    model: Callable[[Sequence[int] | None], Any]
    widths: tuple[int, ...]
    data: Callable[[Path | None, int], Dataset]
    train: TrainConfig
    warmup: int
    stop: int
    compared: tyro.conf.Suppress[tuple[Way, ...]]
    data_dir: Path | None = None


class LappNetwork:
    """The network of one seed before training."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.run = s, run
        self.net = Classifier(s.model(None), s.data(s.data_dir, run.seed), run, batch=s.train.batch_size)
        self.x = jax.ShapeDtypeStruct((s.train.batch_size, *self.net.data.image_shape), jnp.float32)
        self.macs = self.cost(self.net.model.apply, self.net.variables).macs

    def cost(self, fn: Any, variables: Any) -> Any:
        """Of a whole batch."""
        return jprune.trace(fn, variables, self.x).cost()

    def row(self, way: Way) -> dict[str, Any]:
        """Train one network; what it reached and what it costs."""
        if way.lapp is None:
            return self.trained(way.name, self.net.model, self.net.variables)
        if way.how == "narrow":
            module = self.narrow(way.lapp.target)
            return self.trained(way.name, module, self.net.initial(module, self.run.seed))
        if way.how == "random widths":
            net = prepare(self.net.model, self.net.variables, self.x, way.lapp)
            start = init(jax.random.key(self.run.seed), net, self.net.variables)
            keep = finalise(net, start, self.random(net), nearest=True).keep
            small = slice_lapp(net, start, keep)
            return self.trained(way.name, small.forward, small.variables)
        return self.sliced(way)

    def sliced(self, way: Way) -> dict[str, Any]:
        """A network whose filters are cut while it is trained."""
        assert way.lapp is not None
        choose = {"lapp": None, "uniform": lambda net: dict.fromkeys(net.layers, 0.0), "random": self.random}[way.how]
        recipe = dataclasses.replace(self.s.train, seed=self.run.seed)
        config = LappRunConfig(way.lapp, recipe, self.s.warmup, self.s.stop, choose is None, nearest=choose is not None)
        folder = None if self.run.work is None else self.run.work / way.name.replace(" ", "-")
        r = run(self.net.model, self.net.variables, self.net.data, config, choose=choose, out=folder,
                resume=folder is not None, progress=self.run.progress,
                title=f"seed {self.run.seed} {way.name}")  # fmt: skip
        share = {n: r.kept[n] / layer.size for n, layer in r.network.layers.items()}
        return {
            "accuracy": r.accuracy["final"], "macs_fraction": r.ratio, "params": r.params, "offset": r.offset,
            "gated": r.accuracy["gated"], "sliced": r.accuracy["sliced"],
            "spread": max(share.values()) - min(share.values()),
            "kept": r.kept, "thresholds": r.thresholds, "warnings": list(r.warnings),
        }  # fmt: skip

    def random(self, net: Network) -> dict[str, float]:
        """A threshold for every layer by chance."""
        rng = np.random.default_rng(self.run.seed)
        return {name: float(rng.normal()) for name in net.layers}

    def trained(self, name: str, model: Any, variables: Any) -> dict[str, Any]:
        """A network that is trained as it is."""
        forward = model.apply if hasattr(model, "apply") else model.evaluate
        tuned, cost = self.net.fit(name, self.s.train, variables, model=model), self.cost(forward, variables)
        return {
            "accuracy": self.net.accuracy(tuned, model),
            "macs_fraction": cost.macs / self.macs,
            "params": cost.params,
        }

    def narrow(self, target: float) -> Any:
        """Every width times one number: of all such networks the one nearest to the target."""
        found: dict[tuple[int, ...], float] = {}
        for scale in np.linspace(0.1, 1.0, 91):
            widths = tuple(max(1, round(scale * w)) for w in self.s.widths)
            if widths not in found:
                module = self.s.model(widths)
                shapes = jax.eval_shape(module.init, jax.random.key(0), self.net.x)
                found[widths] = self.cost(module.apply, shapes).macs / self.macs
        return self.s.model(min(found, key=lambda w: abs(found[w] - target)))
