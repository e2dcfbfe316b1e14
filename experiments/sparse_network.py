"""A small network on scikit-learn's digits whose single weights are pruned in several ways."""

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


def losses(variables: Any, batch: Any) -> jax.Array:
    """Cross-entropy of every image."""
    logits = jnp.asarray(NET.apply(variables, batch[0]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])


@dataclasses.dataclass(frozen=True)
class Setting:
    """Densities that are asked for, and epochs of training."""

    densities: tuple[float, ...] = (0.1, 0.05)
    epochs: int = 60


class Trained:
    """The dense network of one seed, and its data."""

    def __init__(self, s: Setting, run: Run):
        self.seed, rng = run.seed, np.random.default_rng(run.seed)
        data = load_digits()
        x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
        order = rng.permutation(len(x))
        self.train, self.test = ((x[i], y[i]) for i in (order[:1347], order[1347:]))
        tx, v = optax.adam(1e-3), jax.jit(NET.init)(jax.random.key(run.seed), x[:2])

        @jax.jit
        def update(v: Any, o: Any, batch: Any) -> Any:
            u, o = tx.update(jax.grad(lambda v: losses(v, batch).mean())(v), o)
            return optax.apply_updates(v, u), o

        o = tx.init(v)
        for _ in range(s.epochs):
            for i in rng.permutation(1347)[: 1347 // 64 * 64].reshape(-1, 64):
                v, o = update(v, o, (self.train[0][i], self.train[1][i]))
        self.variables = v
        self.graph = trace(NET.apply, v, self.train[0])
        self.leaves = prunable(self.graph)

    def numbers(self, v: Any) -> dict[str, float]:
        """Accuracy and losses."""
        right = jnp.asarray(NET.apply(v, self.test[0])).argmax(-1) == self.test[1]
        return {"accuracy": 100 * float(right.mean()), "loss": float(losses(v, self.test).mean()),
                "training_loss": float(losses(v, self.train).mean())}  # fmt: skip

    def row(self, name: str, density: float, refitted: bool = False) -> dict[str, float]:
        """One method at one density."""
        args = self.graph, self.variables, [self.train[0]], self.leaves, 1 - density
        if name in ONE_SHOT:
            v, masks, _ = in_turn(ONE_SHOT[name], *args)
        elif name in SECOND:
            which, config = SECOND[name]
            v, masks, _ = second_order(which)(losses, self.variables, self.leaves, self.train, 1 - density, config)
        else:
            masks = magnitude(*args).masks
            orders = orders_of(self.variables, self.leaves, weight_matrices(self.graph, self.leaves))
            state = initial(weight_magnitude(self.variables, self.leaves), masks, SEARCHED[name], orders)
            found: Any = icbs(losses, self.variables, state, self.batch, SEARCHED[name], orders, seed=self.seed).state
            masks = found.masks
            v = apply(self.variables, masks)
        if refitted:
            v = refit(self.graph, self.variables, masks, [self.train[0]])
        return self.numbers(v)

    def batch(self, step: int) -> Any:
        """200 images, others every step."""
        i = np.random.default_rng((self.seed, step)).choice(1347, 200, replace=False)
        return self.train[0][i], self.train[1][i]
