"""`sparsify`: any optax optimizer with parameters that stay sparse, in any training loop that applies its updates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from jprune.budget.weights import Distribution, check_sparsity, choose
from jprune.methods.weights.sparse_training.follow import check_followed, named, restarted
from jprune.methods.weights.sparse_training.magnitude import Magnitude
from jprune.methods.weights.sparse_training.mask_steps import Amounts, MaskSteps, amounts
from jprune.methods.weights.sparse_training.method import Look, Method
from jprune.methods.weights.sparse_training.once import once
from jprune.surgery.patterns import NM, Pattern, Unstructured, View, groups_of, patterns_of, view_of


class SparseState(NamedTuple):
    """State of `sparsify`: arrays only, so that a checkpoint of it resumes with the same bits.

    Attributes:
      step: updates so far, int32.
      key: random key data of the whole run, uint32; each step's key is made of it and the step.
      masks: like the parameters, a bool array for each leaf with a pattern, True for the weights that train;
        `optax.MaskedNode` for the others. `masks_of` makes {path: mask} of it.
      inner: state of the optimizer.
    """

    step: Any
    key: Any
    masks: Any
    inner: Any


def sparsify(
    tx: Any,
    sparsity: float | None = None,
    method: Method = Magnitude(),
    steps: MaskSteps = MaskSteps(),
    *,
    pattern: Pattern | str | Mapping[str, Pattern | str | None] = Unstructured(),
    distribution: Distribution = "uniform",
    views: Mapping[str, View] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps the parameters sparse: the update of a weight that is masked is minus the weight.

    Any training loop that applies the updates ends with exact zeros, in every dtype. Masked weights are no parameters:
    their gradients are hidden from the optimizer (a method sees them), and a weight that regrows starts from zero with
    the optimizer's state as `init` makes it. Masks lie on the devices as their parameters do, and choosing them gathers
    no leaf. Apply the updates as they are: `sparsify` belongs outermost.

    >>> tx = sparsify(optax.adam(1e-3), 0.5)
    >>> params = {"w": jnp.arange(6.0).reshape(3, 2) - 2.6, "b": jnp.zeros(2)}
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> (optax.apply_updates(params, updates)["w"] == 0).tolist()
    [[False, False], [True, True], [True, False]]

    Args:
      tx: any optax transformation, extra arguments included.
      sparsity: share of the weights removed in the end, in [0, 1); N:M patterns need none.
      method: which weights stay.
      steps: when they are chosen, and how sparse they are by then.
      pattern: of all floating-point leaves with two or more axes; or {path or glob: pattern}: of these leaves.
      distribution: of the sparsity over leaves, as `jprune.budget.counts` has it.
      views: leaves as matrices, where convention (outputs last, inputs before them) does not hold; stacked layers have
        one, `jprune.surgery.views.conventional(shape, stacked=1)`.
      seed: of what is random.

    Returns:
      A transformation whose `init` raises ValueErrors: a sparsity outside [0, 1), an unknown name in a pattern, a pattern
      that does not fit a leaf, no leaf with a pattern, or an optimizer whose state cannot be followed though weights
      regrow. Its `update` needs `params`.
    """
    inner = optax.with_extra_args_support(tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx)
    if sparsity is not None:
        check_sparsity(sparsity)
    task = _Task(sparsity, method, steps, pattern, distribution, views)

    def init(params: Any) -> SparseState:
        step, key = jnp.zeros((), jnp.int32), jax.random.PRNGKey(seed)
        if not jax.tree.leaves(params):  # optax.tree_map_params asks where a state has something per parameter
            return SparseState(step, key, params, inner.init(params))
        plan = task.plan(params)
        if method.regrows:
            check_followed(inner, params)
        masks = {p: _whole(w) for p, w in plan.weights.items()}
        if steps.kind == "constant":
            chosen = task.masks(plan, None, masks, key, step)
            masks = {p: m & chosen[p] for p, m in masks.items()}  # what is drawn at random lies anywhere
        return SparseState(step, key, _like(params, masks, optax.MaskedNode()), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SparseState]:
        if params is None:
            raise ValueError("sparsify needs the parameters: call update(gradients, state, params)")
        plan, gradients, old = task.plan(params), named(updates), named(state.masks)
        if odd := sorted(plan.weights.keys() ^ old.keys()) or sorted(old.keys() - gradients.keys()):
            raise ValueError(f"masks, parameters and gradients are not of the same leaves: look at {odd[0]!r}")
        due = steps.due(state.step)

        def renewed(now: tuple[dict[str, Any], Any], others: Any) -> tuple[dict[str, Any], Any]:
            (old, before), (params, gradients, key, step) = now, others
            masks = task.masks(task.plan(params), gradients, old, key, step)
            if method.regrows:
                before = restarted(inner, before, params, {p: m & ~old[p] for p, m in masks.items()})
            return masks, before

        known = (params, {p: gradients[p] for p in plan.weights}, state.key, state.step)
        masks, before = once(due, renewed, (old, state.inner if method.regrows else ()), known)
        hidden = _like(updates, {p: _where(m, gradients[p], 0) for p, m in masks.items()})
        found, after = inner.update(hidden, before if method.regrows else state.inner, params, **extra)
        if method.regrows:
            found = jax.tree.map(lambda u: _where(~due, u, 0), found)
        steered = named(found)
        for p, mask in masks.items():
            w = plan.weights[p]
            u = steered[p].astype(jnp.promote_types(w.dtype, steered[p].dtype))
            steered[p] = jnp.where(mask, u, -w.astype(u.dtype))
        masks = _like(params, masks, optax.MaskedNode())
        return _like(found, steered), SparseState(optax.safe_increment(state.step), state.key, masks, after)

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(state: Any) -> dict[str, Any]:
    """The masks in an optimizer state that `sparsify` made, {path: bool array}, wherever it is nested.

    Raises:
      ValueError: there are none, or several.
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_sparse) if _is_sparse(s)]
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} states of sparsify in this optimizer state, not one")
    return named(found[0].masks)


def _is_sparse(x: Any) -> bool:
    return isinstance(x, SparseState)


def _like(tree: Any, leaves: Mapping[str, Any], otherwise: Any = None) -> Any:
    """The tree with these leaves in place of its own; others are `otherwise`, or stay."""
    paths, treedef = list(named(tree)), jax.tree.structure(tree)
    own = jax.tree.leaves(tree) if otherwise is None else [otherwise] * len(paths)
    return jax.tree.unflatten(treedef, [leaves.get(p, x) for p, x in zip(paths, own, strict=True)])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The leaves with a pattern, their patterns, and how many weights stay when."""

    weights: dict[str, Any]
    patterns: dict[str, Pattern]
    amounts: Amounts


@dataclasses.dataclass(frozen=True)
class _Task:
    """What `sparsify` was asked for."""

    sparsity: float | None
    method: Method
    steps: MaskSteps
    pattern: Pattern | str | Mapping[str, Pattern | str | None]
    distribution: Distribution
    views: Mapping[str, View] | None

    def plan(self, params: Any) -> _Plan:
        """Of shapes alone."""
        able = {p: x for p, x in named(params).items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}
        if not isinstance(self.pattern, Mapping):
            able = {p: x for p, x in able.items() if jnp.ndim(x) > 1}
        patterns = patterns_of(self.pattern, able)
        free = {p: np.shape(able[p]) for p, v in patterns.items() if not isinstance(v, NM)}
        for p, v in patterns.items():
            if v not in (Unstructured("leaf"), Unstructured("model")):
                view = view_of(p, np.shape(able[p]), self.views)
                if isinstance(v, NM):
                    groups_of(p, v, view)
        if free and self.sparsity is None:
            raise ValueError(f"the pattern of {next(iter(free))!r} needs a sparsity: sparsify(tx, 0.9)")
        if self.sparsity is not None and not free and patterns:
            raise ValueError("N:M patterns say the sparsity themselves: leave it out")
        how = self.distribution
        table = amounts(
            self.steps,
            tuple(free.items()),
            tuple((p, v) for p, v in patterns.items() if isinstance(v, NM)),
            self.sparsity or 0.0,
            tuple(how.items()) if isinstance(how, Mapping) else how,
        )
        patterns = {p: v for p, v in patterns.items() if p in table.paths or isinstance(v, NM)}
        if not patterns:
            raise ValueError("no parameter has a pattern: floating-point leaves with two or more axes have one, or those "
                             "that pattern={path: ...} names")  # fmt: skip
        return _Plan({p: able[p] for p in patterns}, patterns, table)

    def masks(self, plan: _Plan, gradients: Any, masks: dict[str, Any], key: Any, step: Any) -> dict[str, Any]:
        """The masks from this step on, in the order of the leaves."""
        index = self.steps.index(step)
        kept = dict(zip(plan.amounts.paths, jnp.asarray(plan.amounts.kept)[index], strict=True))
        look = Look(
            weights={p: _where(masks[p], w, 0) for p, w in plan.weights.items()},
            gradients=None if gradients is None else {p: gradients[p] for p in plan.weights},
            masks=masks,
            key=jax.random.fold_in(key, step),
            index=index,
            number=self.steps.number,
            step=step,
            last=self.steps.last,
            kept=kept,
            choose=functools.partial(self._choose, plan, index),
            choose_among=functools.partial(self._among, plan),
        )
        found = self.method.masks(look)
        return {p: found[p] for p in masks}

    def _choose(
        self, plan: _Plan, index: Any, scores: dict[str, Any], kept: dict[str, Any], normalise: bool = False
    ) -> dict[str, Any]:
        falling = {p: n for p, n in plan.amounts.groups.items() if n[0] != n[-1]}  # N:M that is reached by and by
        now = {p: v for p, v in plan.patterns.items() if p not in falling}
        masks = choose({p: scores[p] for p in now}, now, kept, self.views, normalise=normalise) if now else {}
        for p, numbers in falling.items():
            last = plan.patterns[p]
            assert isinstance(last, NM)

            def of(n: int, p: str = p, last: NM = last) -> Any:
                if n == last.of:
                    return lambda s: jnp.ones(s.shape, bool)
                return lambda s: choose({p: s}, dataclasses.replace(last, keep=n), None, self.views)[p]

            ways = [of(n) for n in range(last.keep, last.of + 1)]
            masks[p] = lax.switch(jnp.asarray(numbers)[index] - last.keep, ways, scores[p])
        return masks

    def _among(self, plan: _Plan, scores: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        loose = {p: Unstructured() if isinstance(v, NM) else v for p, v in plan.patterns.items()}
        return choose(scores, loose, kept, self.views)


def _whole(w: Any) -> Any:
    """A mask that keeps everything, laid out over the devices as the weights are."""
    if isinstance(w, Tracer):
        return (jnp.abs(w) >= 0) | (w != w)  # a constant would lie anywhere
    return jnp.ones(np.shape(w), bool, device=w.sharding if getattr(w, "committed", False) else None)


def _where(mask: Any, x: Any, other: Any) -> Any:
    return jnp.where(mask, x, jnp.asarray(other, x.dtype))
