"""A trained classifier whose single weights are pruned in several ways, and the small network on scikit-learn's digits."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from experiments.study import Run
from jprune.graph import trace
from jprune.importance.at_init import weight_magnitude
from jprune.methods.weights.icbs.run import icbs
from jprune.methods.weights.icbs.steps import ICBSConfig, initial, orders_of
from jprune.methods.weights.least_squares import refit
from jprune.methods.weights.one_shot import in_turn, magnitude, prunable, sparsegpt, wanda
from jprune.methods.weights.second_order import CAPConfig, CBSConfig, CHITAConfig, WoodFisherConfig, second_order
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import apply
from jprune.surgery.patterns import pattern as pattern_of

ONE_SHOT = {"magnitude": magnitude, "Wanda": wanda, "SparseGPT": sparsegpt}
SECOND = {
    "WoodFisher": ("woodfisher", WoodFisherConfig(damp=1e-3, block=None)),
    "CBS-S": ("cbs", CBSConfig(update=False)),
    "CBS-S and CBS-U": ("cbs", CBSConfig()),
    "CHITA": ("chita", CHITAConfig(l2=1e-3)),
    "CAP": ("cap", CAPConfig()),
}
SEARCHED = {
    "iCBS, 40 steps": ICBSConfig(),
    "iCBS, 120 steps": ICBSConfig(steps=120),
    "iCBS, descent": ICBSConfig(solver="descent"),
    "iCBS, published form": ICBSConfig(published_form=True),
    "iCBS, 8 steps of all": ICBSConfig(steps=8, parts_per_step=0, solver="descent"),
    "iCBS, 40 steps of all": ICBSConfig(steps=40, parts_per_step=0, solver="descent"),
    "iCBS, no gradient": ICBSConfig(gradient_weight=0.0, steps=4, solver="descent"),
}


class Net(nn.Module):
    """64-128-64-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (images, 64) -> logits."""
        for n in (128, 64):
            x = nn.relu(nn.Dense(n)(x))
        return nn.Dense(10)(x)


NET = Net()


class Network:
    """A trained classifier of one seed, whose single weights are pruned in several ways.

    Attributes:
      apply: (variables, images) -> logits. variables: trained.
      train, test: (images, labels). seed: of the batches of iCBS.
      losses: (variables, (images, labels)) -> cross-entropy of every image.
    """

    def __init__(self, apply_fn: Any, variables: Any, train: Any, test: Any, seed: int):
        self.apply, self.variables, self.train, self.test, self.seed = apply_fn, variables, train, test, seed
        self.losses = losses_of(apply_fn)
        self.graph = trace(apply_fn, variables, train[0])
        self.leaves = prunable(self.graph)

    def numbers(self, v: Any) -> dict[str, float]:
        """Accuracy and losses."""
        right = jnp.asarray(self.apply(v, self.test[0])).argmax(-1) == self.test[1]
        return {"accuracy": 100 * float(right.mean()), "loss": float(self.losses(v, self.test).mean()),
                "training_loss": float(self.losses(v, self.train).mean())}  # fmt: skip

    def row(
        self, name: str, density: float | None, refitted: bool = False, pattern: str = "unstructured"
    ) -> dict[str, float]:
        """One method at one density, or with a pattern that says it."""
        sparsity = None if density is None else 1 - density
        args = self.graph, self.variables, [self.train[0]], self.leaves, sparsity
        if name in ONE_SHOT:
            v, masks, _ = in_turn(ONE_SHOT[name], *args, pattern)
        elif name in SECOND:
            which, config = SECOND[name]
            config = dataclasses.replace(config, pattern=pattern_of(pattern)) if density is None else config
            v, masks, _ = second_order(which)(self.losses, self.variables, self.leaves, self.train, sparsity, config)
        else:
            masks = magnitude(*args).masks
            orders = orders_of(self.variables, self.leaves, weight_matrices(self.graph, self.leaves))
            state = initial(weight_magnitude(self.variables, self.leaves), masks, SEARCHED[name], orders)
            found: Any = icbs(
                self.losses, self.variables, state, self.batch, SEARCHED[name], orders, seed=self.seed
            ).state
            masks = found.masks
            v = apply(self.variables, masks)
        if refitted:
            v = refit(self.graph, self.variables, masks, [self.train[0]])
        return self.numbers(v)

    def batch(self, step: int) -> Any:
        """200 images, others every step."""
        i = np.random.default_rng((self.seed, step)).choice(len(self.train[0]), 200, replace=False)
        return self.train[0][i], self.train[1][i]


def losses_of(apply_fn: Any) -> Any:
    """(variables, (images, labels)) -> cross-entropy of every image."""

    def losses(variables: Any, batch: Any) -> jax.Array:
        logits = jnp.asarray(apply_fn(variables, batch[0]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    return losses


@dataclasses.dataclass(frozen=True)
class Setting:
    """Densities that are asked for, and epochs of training."""

    densities: tuple[float, ...] = (0.1, 0.05)
    epochs: int = 60


def perceptron(s: Setting, run: Run) -> Network:
    """64-128-64-10 on scikit-learn's digits, trained by Adam."""
    rng = np.random.default_rng(run.seed)
    data: Any = load_digits()
    x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    order = rng.permutation(len(x))
    train, test = ((x[i], y[i]) for i in (order[:1347], order[1347:]))
    tx, v, losses = optax.adam(1e-3), jax.jit(NET.init)(jax.random.key(run.seed), x[:2]), losses_of(NET.apply)

    @jax.jit
    def update(v: Any, o: Any, batch: Any) -> Any:
        u, o = tx.update(jax.grad(lambda v: losses(v, batch).mean())(v), o)
        return optax.apply_updates(v, u), o

    o = tx.init(v)
    for _ in range(s.epochs):
        for i in rng.permutation(1347)[: 1347 // 64 * 64].reshape(-1, 64):
            v, o = update(v, o, (train[0][i], train[1][i]))
    return Network(NET.apply, v, train, test, run.seed)
