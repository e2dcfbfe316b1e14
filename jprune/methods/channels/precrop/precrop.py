"""PreCrop and PreConfig: choose channel widths before training (Cai et al. 2022, arXiv 2203.02549).

    1 densities   d_l = kept_l / total_l of every kernel and matrix, by a criterion at initialisation
    2 widths      from densities, through the dependency groups, corrected to the budget
    3 build       the model of these widths, initialised afresh
    4 train       it from scratch, with the normal recipe

Steps 1 and 2 are here: `precrop(model, variables, x, budget)` and, where layers may also grow, `preconfig`. The paper's
abstracts name the idea; how densities become widths is ours and stands in `widths`. All is host-side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from jprune.budget.target import Target
from jprune.graph import Graph, trace
from jprune.importance import at_init, density
from jprune.importance.density import Densities
from jprune.importance.expected_flow import synexp_of_paths
from jprune.methods.channels.precrop.free_widths import width_variables
from jprune.methods.channels.precrop.widths import SQRT, meters_of
from jprune.methods.channels.precrop.widths import Cropped as Cropped
from jprune.methods.channels.precrop.widths import WidthRule as WidthRule
from jprune.methods.channels.precrop.widths import fit as fit
from jprune.methods.channels.precrop.widths import ratios as ratios
from jprune.methods.channels.precrop.widths import widths as widths
from jprune.tracing import cost
from jprune.training.forward import as_forward

METHODS = ("synflow", "snip", "grasp", "magnitude", "random", "erk", "synexp", "reverse")
CONTROLS = ("uniform_width", "random_width")  # of widths, without densities


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How densities are found.

    Attributes:
      keep: fraction of the weights that the criterion keeps; None: the smallest fraction that a budget leaves.
      rounds, schedule, rescale: of SynFlow. temperature: of GraSP.
      paths: SynExp counts the network's paths, skip connections included, instead of taking it for a chain.
      xavier: GraSP draws matrices (not convolutions) anew, Xavier-normal, for scoring only, as its authors did.
      bn: BatchNorm in "eval" or "train" mode while SNIP and GraSP score.
      exempt: leaf paths whose density is ignored.
    """

    keep: float | None = None
    rounds: int = 100
    schedule: Literal["exponential", "linear"] = "exponential"
    rescale: bool = False
    temperature: float = 200.0
    paths: bool = False
    xavier: bool = False
    bn: Literal["eval", "train"] = "eval"
    exempt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bn not in ("eval", "train"):
            raise ValueError(f"bn is 'eval' or 'train', not {self.bn!r}")


PLAIN = Scoring()  # the default


def precrop(
    model: Any,
    variables: Any,
    x: Any,
    budget: Target | Sequence[Target],
    method: str = "synflow",
    *,
    batches: at_init.Batches = (),
    loss: at_init.OutputLoss = at_init.classification,
    key: Any = None,
    rule: WidthRule = SQRT,
    scoring: Scoring = PLAIN,
    more: Sequence[Any] = (),
) -> Cropped:
    """Steps 1 and 2: widths for a budget, from an untrained model.

    Args:
      model: whatever `jprune.training.as_forward` takes: a linen module, or any function (variables, x) -> outputs.
      variables: an initialisation (shapes alone suffice for "erk", "synexp", "reverse" and the controls).
      x: an example input batch, array or shape.
      budget: `Target.params(0.2)`, `Target.macs(...)`, or several that must all hold.
      method: one of `METHODS`, or a control: "uniform_width" (one ratio for all), "random_width" (log-uniform ratios).
      batches: (x, y) pairs for SNIP and GraSP. loss: (outputs, y) -> scalar. key: for the random methods.
      more: further initialisations; the densities are averaged over all.

    Raises:
      ValueError: unknown method, missing batches or key, nothing free to change, or a budget out of reach.
    """
    if method not in (*METHODS, *CONTROLS):
        raise ValueError(f"method is one of {(*METHODS, *CONTROLS)}, not {method!r}")
    graph = trace(as_forward(model).evaluate, variables, x)
    budgets = (budget,) if isinstance(budget, Target) else tuple(budget)
    if method in CONTROLS:
        free = width_variables(graph, rule.stage_width)
        rng = None if method == "uniform_width" else np.random.default_rng(_seed(key, method))
        rho = {g: 1.0 if rng is None else float(np.exp(rng.uniform(np.log(0.1), 0.0))) for g in free.groups}
        paths = [p for p in at_init.weight_leaves(graph) if p not in scoring.exempt]
        return fit(graph, rho, budgets, rule, dict.fromkeys(paths, 1.0))
    several = [
        layer_densities(model, graph, v, x, method, budgets, batches, loss, key, rule, scoring)
        for v in (variables, *more)
    ]
    return widths(graph, density.mean_densities(several), budgets, rule)


def preconfig(model: Any, variables: Any, x: Any, budget: Target | Sequence[Target], *, cap: float = 4.0,
              rule: WidthRule = SQRT, scoring: Scoring = PLAIN) -> Cropped:  # fmt: skip
    """Narrow some layers and widen others, up to `cap` times, under the same budgets: `precrop` with SynExp."""
    return precrop(model, variables, x, budget, "synexp", rule=dataclasses.replace(rule, cap=cap), scoring=scoring)


def layer_densities(
    model: Any, graph: Graph, variables: Any, x: Any, method: str, budgets: Sequence[Target],
    batches: at_init.Batches = (), loss: at_init.OutputLoss = at_init.classification, key: Any = None,
    rule: WidthRule = SQRT, scoring: Scoring = PLAIN,
) -> Densities:  # fmt: skip
    """Step 1: densities of one initialisation; arguments and errors are those of `precrop`."""
    forward, paths = as_forward(model), at_init.weight_leaves(graph)
    scored = [p for p in paths if p not in scoring.exempt]
    left = {
        b.quantity: min(1.0, m.limit / m.count({})) for b, m in zip(budgets, meters_of(graph, budgets, rule, scored))
    }
    keep = scoring.keep if scoring.keep is not None else min(left.values())
    shapes = {p: graph.leaves[p].shape for p in scored}
    if method == "synexp":
        n = np.array([np.prod(shapes[p]) for p in scored], np.float64)
        spent = {p: 0 for p in paths}
        for c in cost.per_layer(graph, {}):
            if c.name in spent:
                spent[c.name] += c.macs
        f = np.array([spent[p] for p in scored], np.float64)
        macs = left.get("macs")
        params = left.get("params", keep if macs is None else None)
        limits = params and params * n.sum(), macs and macs * f.sum(), rule.cap
        if scoring.paths:
            return synexp_of_paths(forward.evaluate, variables, x, {p: spent[p] for p in scored}, *limits)
        p = density.synexp(n, f, *limits)
        return dict(zip(scored, map(float, p), strict=True))
    if method in ("erk", "reverse"):
        return getattr(density, method)(shapes, keep)
    if method == "synflow":
        scores = at_init.synflow(forward.evaluate, variables, x, paths, keep, scoring.rounds, scoring.schedule,
                                 scoring.rescale)  # fmt: skip
    elif method == "magnitude":
        scores = at_init.weight_magnitude(variables, paths)
    elif method == "random":
        scores = at_init.weight_chance(variables, paths, jax.random.key(_seed(key, method)))
    else:

        def in_training(v: Any, x: Any) -> Any:
            return forward.train(v, x, jax.random.key(0))[0]

        if method == "grasp" and scoring.xavier:
            matrices = [t.leaf for t in graph.taps.values() if t.primitive == "dot_general" and t.leaf in paths]
            variables = at_init.xavier(variables, matrices, jax.random.key(_seed(key, method)))
        fn = in_training if scoring.bn == "train" else forward.evaluate
        more = {"temperature": scoring.temperature} if method == "grasp" else {}
        scores = getattr(at_init, method)(fn, variables, batches, paths, loss, **more)
    return density.densities(scores, keep, scoring.exempt)


def _seed(key: Any, method: str) -> int:
    if key is None:
        raise ValueError(f"method {method!r} draws random numbers: give key=")
    return int(jax.random.randint(key, (), 0, 2**31 - 1))
