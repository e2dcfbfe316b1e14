"""The training state and the one compiled step that advances it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune.training.forward import Forward
from jprune.training.gradients import accumulated, clipped
from jprune.training.loss import Loss
from jprune.training.placement import shardings_of


class TrainState(NamedTuple):
    """Everything a step changes: trainable parameters, the other collections, optimiser state, steps done (int32)."""

    params: Any
    rest: Mapping[str, Any]
    opt_state: tuple[Any, ...]  # one entry a stage of the optimiser
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of a step; equal recipes share one compiled program."""

    forward: Forward
    stages: tuple[optax.GradientTransformation, ...]  # of the optimiser, each from `update_of`
    loss: Loss
    dtype: str
    wrapped: bool  # the variables are {"params": .., collections}, not a bare parameter tree
    shardings: tuple[NamedSharding, ...]  # of the state's leaves, in jax's flattening order
    accumulate: int = 1
    clip: float = math.inf


def init_state(
    params: Any, rest: Mapping[str, Any], stages: Sequence[optax.GradientTransformation], mesh: Mesh | None = None
) -> TrainState:
    """A fresh state; the caller's arrays are copied, since steps give their buffers away.

    On a mesh, moments that have the shape of the parameters take the parameters' sharding and everything else is
    replicated. Without one, every array stays where it is.
    """
    if mesh is None:
        params, rest = _copy((params, dict(rest)))
        return TrainState(params, rest, tuple(_copy(s.init(params)) for s in stages), jnp.zeros((), jnp.int32))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, rest = (_copy_to(tree, shardings_of(tree, mesh)) for tree in (params, rest))

    def init(stage: optax.GradientTransformation) -> Any:
        return optax.tree_utils.tree_map_params(
            stage,
            lambda leaf, param: _copy_to(leaf, param.sharding if leaf.shape == param.shape else everywhere),
            stage.init(params),
            params,
            transform_non_params=lambda leaf: _copy_to(leaf, everywhere),
        )

    opt_state = tuple(init(stage) for stage in stages)
    return TrainState(params, rest, opt_state, jax.device_put(jnp.zeros((), jnp.int32), everywhere))


def update_of(stage: optax.GradientTransformation) -> optax.GradientTransformation:
    """The stage without its own `init`: stages that differ only in the state they begin with then compile once."""
    return stage._replace(init=_is_initialised)


def descend(
    stages: Sequence[optax.GradientTransformation],
    state: TrainState,
    grads: Any,
    rate: Any,
    rest: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state after one step of the optimiser, whose stages receive `learning_rate` if they take extra arguments.

    rest: new values of the other collections; by default the old ones.
    """
    opt_state = []
    for stage, old in zip(stages, state.opt_state, strict=True):
        takes_rate = isinstance(stage, optax.GradientTransformationExtraArgs)
        grads, new = stage.update(grads, old, state.params, **({"learning_rate": rate} if takes_rate else {}))
        opt_state.append(new)
    params = optax.apply_updates(state.params, grads)
    return TrainState(params, state.rest if rest is None else rest, tuple(opt_state), state.step + 1)


def _is_initialised(params: Any) -> Any:
    raise AssertionError("a stage without init has its state already")


def _copy(tree: Any) -> Any:
    """The tree in buffers of its own, where its arrays lie; nothing is compiled, as it would be for every shape."""

    def one(x: Any) -> jax.Array:
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        if isinstance(x, Tracer):  # only its shape is asked for: there is no buffer that a step could take
            return x
        return jax.device_put(x, x.sharding if getattr(x, "committed", False) else None, may_alias=False)

    return jax.tree.map(one, tree)


def _copy_to(tree: Any, shardings: Any) -> Any:
    return jax.device_put(_copy(tree), shardings)  # may_alias=False alone would share the first device's part


@functools.lru_cache(maxsize=16)
def compiled_step(recipe: Recipe) -> Callable[[TrainState, Mapping[str, jax.Array], jax.Array, jax.Array], Any]:
    """jit of (state, batch, key, rate) -> (state, metrics); the state is donated, metrics are float32 scalars."""

    def low(tree):
        if recipe.dtype == "float32":
            return tree
        return jax.tree.map(lambda x: x.astype(recipe.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key, rate):
        key = jax.random.fold_in(key, state.step)

        def objective(params, part, key):
            variables = {"params": low(params), **state.rest} if recipe.wrapped else low(params)
            logits, updates = recipe.forward.train(variables, low(part["image"]), key)
            logits = logits.astype(jnp.float32)
            out = recipe.loss(logits, part, params)
            value, extra = out if isinstance(out, tuple) else (out, {})
            updates = dict(updates)
            losses, logged = updates.pop("losses", {}), updates.pop("metrics", {})
            extra = {**extra, **losses, **logged}
            if logits.ndim == 2:
                extra["accuracy"] = (logits.argmax(axis=-1) == part["label"]).mean()
            return value + sum(losses.values()), (updates, extra)

        def of(part, key):
            return jax.value_and_grad(objective, has_aux=True)(state.params, part, key)

        if recipe.accumulate == 1:
            (value, (updates, extra)), grads = of(batch, key)
        else:
            (value, (updates, extra)), grads = accumulated(of, batch, recipe.accumulate, key)
        if unknown := set(updates) - set(state.rest):
            raise ValueError(f"the model updates the collections {sorted(unknown)}, which its variables do not have")
        if recipe.accumulate > 1:
            updates = jax.tree.map(_in_its_type, updates, {k: state.rest[k] for k in updates})
        metrics = {"loss": value, "learning_rate": rate, **extra}
        if math.isfinite(recipe.clip):
            grads, metrics["gradient_norm"] = clipped(grads, recipe.clip)
        new = descend(recipe.stages, state, grads, rate, {**state.rest, **updates})
        leaves, treedef = jax.tree.flatten(new)
        leaves = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(leaves, recipe.shardings, strict=True)]
        return treedef.unflatten(leaves), {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return step


def _in_its_type(mean, old):
    if not jnp.issubdtype(old.dtype, jnp.floating):
        raise ValueError(
            f"training updates a variable of {old.dtype}, which has no mean over micro-batches: accumulate=1"
        )
    return mean.astype(old.dtype)
