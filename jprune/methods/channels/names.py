"""Channel pruning methods by name, as the command line offers them: how units are scored, and what training they need."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import importance
from jprune.data import Dataset
from jprune.graph import Graph
from jprune.importance.reduce import Scores
from jprune.training.forward import as_forward
from jprune.training.loss import cross_entropy

SAMPLES = 256  # training images that gradient criteria look at


@dataclasses.dataclass(frozen=True)
class Method:
    """One name.

    Attributes:
      about: one line.
      scores: (graph, model, variables, dataset, seed) -> scores; None where the small network is not cut from a
        trained one.
      sparse: one more training phase with a penalty on all scales before scoring (network slimming).
      way: "trained": train, prune, fine-tune; "masksparsity": its five steps; "precrop": widths from densities at
        initialisation, then training; "lapp": shrink in the first epochs of the only training.
      criterion, cap: of "precrop": where the densities come from, and how many times wider a layer may become; the
        criterion of "lapp" is its kind of bypass.
      quantities: what a target may count.
      fixed: options that mean nothing to it.
    """

    about: str
    scores: Any = None
    sparse: bool = False
    way: str = "trained"
    criterion: str = ""
    cap: float = 1.0
    quantities: tuple[str, ...] = ("macs", "params", "bytes")
    fixed: tuple[str, ...] = ("strength", "sparsity", "threshold")


def _images(dataset: Dataset, seed: int) -> tuple[jax.Array, jax.Array]:
    n = min(SAMPLES, len(dataset.train))
    chosen = np.random.default_rng(seed).choice(len(dataset.train), n, replace=False)
    batch = dataset.train.read(np.sort(chosen))
    return jnp.asarray(batch["image"]), jnp.asarray(batch["label"])


def _taylor(graph: Graph, model: Any, variables: Any, dataset: Dataset, seed: int) -> Scores:
    images, labels = _images(dataset, seed)
    forward = as_forward(model)
    grads = jax.jit(jax.grad(lambda v: cross_entropy(forward.evaluate(v, images), labels).mean()))(variables)
    return importance.taylor(graph, variables, grads)


def _fisher(graph: Graph, model: Any, variables: Any, dataset: Dataset, seed: int) -> Scores:
    batch = _images(dataset, seed)
    forward = as_forward(model)

    def loss(v: Any, sample: Any) -> jax.Array:
        return cross_entropy(forward.evaluate(v, sample[0][None]), sample[1][None]).mean()

    squares = jax.jit(lambda v, b: importance.mean_squared_gradients(loss, v, b))(variables, batch)
    return importance.fisher(graph, variables, squares)


_BY_BUDGET = ("scope", "steps", "schedule")
_ONLY_TRAINED = (*_BY_BUDGET, "finetune_epochs", "finetune_learning_rate", "strength", "sparsity", "threshold")


def _precrop(criterion: str, about: str, cap: float = 1.0) -> Method:
    return Method(
        about, way="precrop", criterion=criterion, cap=cap, quantities=("macs", "params"), fixed=_ONLY_TRAINED
    )


def _lapp(bypass: str, about: str) -> Method:
    fixed = (*_ONLY_TRAINED, "multiple_of", "min_keep")
    return Method(about, way="lapp", criterion=bypass, quantities=("macs",), fixed=fixed)


METHODS: dict[str, Method] = {
    "magnitude-l2": Method("sum of squared weights of the group (DepGraph)",
                           lambda g, m, v, d, s: importance.magnitude(g, v, 2)),
    "magnitude-l1": Method("sum of absolute weights of the group", lambda g, m, v, d, s: importance.magnitude(g, v, 1)),
    "lamp": Method("squared weights over the sum of those that are not smaller", lambda g, m, v, d, s: importance.lamp(g, v)),
    "fpgm": Method("distance to the other units (geometric median)", lambda g, m, v, d, s: importance.fpgm(g, v)),
    "batchnorm": Method("BatchNorm scale of a normally trained network",
                        lambda g, m, v, d, s: importance.batchnorm_scale(g, v)),
    "taylor": Method("|weight x gradient|", _taylor),
    "fisher": Method("weight^2 x mean squared per-sample gradient (diagonal Fisher)", _fisher),
    "random": Method("uniform random scores, the baseline to beat",
                     lambda g, m, v, d, s: importance.random(g, jax.random.key(s))),
    "slimming": Method("BatchNorm scale after training with a penalty on all scales (network slimming)",
                       lambda g, m, v, d, s: importance.batchnorm_scale(g, v), True,
                       fixed=("sparsity", "threshold")),
    "masksparsity": Method("penalty only on the scales of the channels that will go, by threshold (MaskSparsity)",
                           way="masksparsity", fixed=("target", "quantity", "multiple_of", *_BY_BUDGET)),
    "precrop": _precrop("synflow", "widths from SynFlow's densities at initialisation, trained from scratch (PreCrop)"),
    "precrop-snip": _precrop("snip", "the same with SNIP's densities"),
    "precrop-grasp": _precrop("grasp", "the same with GraSP's densities"),
    "precrop-synexp": _precrop("synexp", "the same with the densities that maximise SynFlow's expectation"),
    "preconfig": _precrop("synexp", "the same, and layers may also grow, up to four times (PreConfig)", 4.0),
    "uniform-width": _precrop("uniform_width", "one width factor for all layers, trained from scratch: the baseline"),
    "lapp": _lapp("pw", "a learned threshold per layer, a 1x1 bypass beside each, in the first epochs (LAPP)"),
    "lapp-dw": _lapp("dw", "the same with depthwise bypasses, which cost least"),
    "lapp-none": _lapp("none", "the same without bypasses"),
}  # fmt: skip


def method(name: str) -> Method:
    """The method of that name; ValueError with the nearest names for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3) or sorted(METHODS)
        raise ValueError(f"no method {name!r}: did you mean {', '.join(near)}?")
    return METHODS[name]
