"""Second-order pruning of a model by name: gradients from its loss, all at once or in stages with gradients anew.

pruned = second_order("chita")(losses, variables, paths, batch, 0.9, stages=8)     # CHITA++
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune.budget.weights import counts
from jprune.importance.sample_gradients import sample_gradients
from jprune.methods.weights.second_order.cap import CAPConfig, cap
from jprune.methods.weights.second_order.cbs import CBSConfig, cbs
from jprune.methods.weights.second_order.chita import CHITAConfig, chita
from jprune.methods.weights.second_order.flat import Keep, Views
from jprune.methods.weights.second_order.obert import OBERTConfig, obert
from jprune.methods.weights.second_order.woodfisher import WoodFisherConfig, woodfisher
from jprune.tracing.errors import suggest
from jprune.tracing.paths import flatten, with_leaves

ALGORITHMS: dict[str, tuple[Callable[..., Any], type]] = {
    "woodfisher": (woodfisher, WoodFisherConfig),
    "obert": (obert, OBERTConfig),
    "cap": (cap, CAPConfig),
    "cbs": (cbs, CBSConfig),
    "chita": (chita, CHITAConfig),
}
Schedule = Literal["poly", "exp"]


class PrunedModel(NamedTuple):
    """A model with fewer weights.

    Attributes:
      variables: with zeros where weights went, and what stayed moved.
      masks: {path: bool array}, True where the weight stays.
      damp: {path: the largest damping that was needed, in any stage}.
    """

    variables: Any
    masks: dict[str, Any]
    damp: dict[str, float]


def second_order(name: str) -> Callable[..., PrunedModel]:
    """The function that prunes a model by the named method: `prune(losses, variables, paths, batch, sparsity, config)`.

        >>> losses = lambda v, x: (x @ v["w"]) ** 2
        >>> pruned = second_order("obert")(losses, {"w": jnp.array([3.0, 1.0])}, ["w"], jnp.eye(2), 0.5)
        >>> print(pruned.masks["w"])
        [ True False]

    Args:
      name: "woodfisher", "obert", "cap", "cbs" or "chita".

    Raises:
      ValueError: another name.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"there is no second-order method {name!r}{suggest(name, ALGORITHMS)}")
    algorithm, settings = ALGORITHMS[name]
    takes_loss = "loss" in inspect.signature(algorithm).parameters

    def prune(
        losses: Callable[[Any, Any], Any],
        variables: Any,
        paths: Sequence[str],
        batch: Any,
        sparsity: float | None,
        config: Any = None,
        *,
        per_leaf: bool = False,
        stages: int = 1,
        first: float = 0.3,
        schedule: Schedule = "poly",
        views: Views | None = None,
        chunk: int | None = None,
        on_step: Callable[[float], None] = lambda done: None,
    ) -> PrunedModel:
        """Prune the named leaves.

        Args:
          losses: (variables, batch) -> (samples,).
          paths: of the leaves to prune.
          batch: all samples.
          sparsity: share of the weights that goes, in [0, 1); None where the settings have a pattern that says it.
          config: the method's settings; None: its defaults.
          per_leaf: the same share of every leaf; otherwise the leaves compete. Gradients of one leaf are then held at a time.
          stages: gradients are taken anew for each; weights that went stay gone.
          first: sparsity of the first of several stages.
          schedule: of the stages, `sparsities`.
          views: leaves as matrices where convention does not hold.
          chunk: samples whose gradients are computed side by side.
          on_step: called after every pruning with how many stages are done, a fraction within a stage of many leaves.
        """
        config = settings() if config is None else config
        if not isinstance(config, settings):
            raise ValueError(f"{name!r} takes {settings.__name__}, not {type(config).__name__}")
        masks: dict[str, Any] = {}
        damp: dict[str, float] = {}
        parts = [[p] for p in paths] if per_leaf else [list(paths)]
        for stage, share in enumerate([None] if sparsity is None else sparsities(sparsity, stages, first, schedule)):
            leaves = dict(flatten(variables))
            keep = (
                None
                if share is None
                else kept({p: leaves[p] for p in paths}, share, per_leaf, getattr(config, "group", 1))
            )
            new: dict[str, Any] = {}
            for i, own in enumerate(parts, 1):
                gradients = sample_gradients(losses, variables, own, batch, chunk=chunk)
                more: dict[str, Any] = {"loss": _mean_loss(losses, variables, batch)} if takes_loss else {}
                found = algorithm(
                    {p: leaves[p] for p in own}, gradients, {p: keep[p] for p in own} if isinstance(keep, dict) else keep,
                    config, masks={p: masks[p] for p in own} if masks else None, views=views, **more)  # fmt: skip
                new |= {p: (found.weights[p], found.masks[p]) for p in own}
                damp |= {p: max(float(d), damp.get(p, 0.0)) for p, d in found.damp.items()}
                on_step(stage + i / len(parts))
            variables, masks = (
                with_leaves(variables, {p: w for p, (w, _) in new.items()}),
                {p: m for p, (_, m) in new.items()},
            )
        return PrunedModel(variables, masks, damp)

    return prune


def kept(weights: dict[str, Any], sparsity: float, per_leaf: bool, multiple: int = 1) -> Keep:
    """How many weights stay, of all leaves together or of each, in whole groups of `multiple`."""
    exact = counts({p: np.shape(w) for p, w in weights.items()}, sparsity)
    if per_leaf:
        return {p: max(round(n / multiple), 1) * multiple for p, n in exact.items()}
    return max(round(sum(exact.values()) / multiple), 1) * multiple


def sparsities(sparsity: float, stages: int, first: float = 0.3, schedule: Schedule = "poly") -> list[float]:
    """The sparsity of every stage, which the last one lands on.

    "poly": from `first` on along a cubic; "exp": equal shares of what is left go in every stage.

        >>> sparsities(0.9, 3, 0.3), sparsities(0.75, 2, schedule="exp")
        ([0.3, 0.825, 0.9], [0.5, 0.75])

    Raises:
      ValueError: no stage, a sparsity outside [0, 1), or a first one above the last.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it is the share of weights that is removed, in [0, 1)")
    if stages < 1:
        raise ValueError(f"stages is {stages}: it must be at least 1")
    if stages == 1:
        return [sparsity]
    if schedule == "exp":
        return [*(1 - (1 - sparsity) ** (k / stages) for k in range(1, stages)), sparsity]
    if schedule != "poly":
        raise ValueError(f"the schedule is {schedule!r}: it must be 'poly' or 'exp'")
    if not 0 <= first <= sparsity:
        raise ValueError(f"the first stage's sparsity is {first}: it lies between 0 and the last one's, {sparsity}")
    left = (1 - k / (stages - 1) for k in range(stages - 1))
    return [*(round(sparsity + (first - sparsity) * x**3, 12) for x in left), sparsity]


def _mean_loss(losses: Callable[[Any, Any], Any], variables: Any, batch: Any) -> Callable[[Any], Any]:
    mean = jax.jit(lambda weights: jnp.mean(losses(with_leaves(variables, weights), batch)))
    return lambda weights: mean(dict(weights))
