"""iCBS: block after block of weights, the mask that does the loss least harm; surviving weights never change.

Rosenberg, Brubaker, Schuetz, Zhu, Kadioglu, Borujeni, Katzgraber, Scalable iterative pruning of large language and
vision models using block coordinate descent (2024). A step takes the pruned weights that look most important and the
kept ones that look least so, models the loss of every joint decision about them (`problem`), solves that (`solve`) and
applies it. Every part's density stays what the initial mask gave it. A part is a leaf, or one matrix of a stack.

    state = initial(params, masks, config, orders)
    state, info = step(key, losses, params, state, parts, batch, config, orders)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jprune.importance.sample_gradients import entry_gradients
from jprune.methods.contract import checked
from jprune.methods.weights.icbs.problem import (
    Form,
    bend,
    block_form,
    block_matrix,
    dense,
    drop_negative,
    idle,
    normalised,
    step_energy,
)
from jprune.methods.weights.icbs.solve import Solver, solve
from jprune.surgery.patterns import apply, placed_as
from jprune.surgery.products import Product
from jprune.tracing.paths import flatten, with_leaves

Losses: TypeAlias = Callable[[Any, Any], Float[Array, " samples"]]
Masks: TypeAlias = Mapping[str, Bool[Array, "..."]]
Orders: TypeAlias = Mapping[str, Int[np.ndarray, "parts size"]]
Parts: TypeAlias = Mapping[str, Sequence[int]]
Importance: TypeAlias = Callable[[Any, Any], Mapping[str, Float[Array, "..."]]]
Selection: TypeAlias = Literal["gradient", "magnitude", "wanda", "random"]
Hessian: TypeAlias = Literal["fisher", "exact", "fisher_mean"]


@dataclasses.dataclass(frozen=True)
class ICBSConfig:
    """Settings of iCBS; the defaults are the authors' for a small network, with blocks that suit a processor.

    Attributes:
      steps: of block coordinate descent
      block_size: weights that are decided about together
      pruned_share: share of a block that is pruned when it is chosen
      gradient_weight: a, the weight of the gradient's term; with 0 no step moves
      ridge: weight of the squared size of a step
      tabu: share of the free weights that may not be chosen again for a while
      fix_pruned: share of the pruned weights, the least important ones, that stay pruned for ever
      fix_kept: share of the kept weights, the most important ones, that stay for ever
      selection: what makes a weight important when a block is chosen: gradient (times the weight), magnitude, wanda, random
      hessian: fisher (of the samples' own gradients), exact (of the loss; small networks), fisher_mean (of their mean)
      prune_idle: prune first what the loss does not see at all (a row of zeros in the problem), outside the solver
      solver: sa (annealing), descent, tabu or exact
      restarts: of annealing
      parts_per_step: blocks solved with one gradient, each of another part; their interplay is left out; 0: all parts
      samples: examples of a step
      published_form: leave out all negative entries, as the authors' published program does
    """

    steps: int = 40
    block_size: int = 256
    pruned_share: float = 0.5
    gradient_weight: float = 0.75
    ridge: float = 1e-3
    tabu: float = 0.4
    fix_pruned: float = 0.42
    fix_kept: float = 0.35
    selection: Selection = "gradient"
    hessian: Hessian = "fisher"
    prune_idle: bool = False
    solver: Solver = "sa"
    restarts: int = 5
    parts_per_step: int = 1
    samples: int = 200
    published_form: bool = False

    def __post_init__(self) -> None:
        at_least = {"steps": 0, "block_size": 2, "restarts": 1, "parts_per_step": 0, "samples": 1}
        checked(self, {name: (getattr(self, name) >= n, f"at least {n}") for name, n in at_least.items()})
        shares = {name: (0 <= getattr(self, name) < 1, "in [0, 1)") for name in ("tabu", "fix_pruned", "fix_kept")}
        checked(self, shares | {
            "pruned_share": (0 < self.pruned_share < 1, "in (0, 1)"),
            "gradient_weight": (self.gradient_weight >= 0, "at least 0"),
            "ridge": (self.ridge >= 0, "at least 0"),
            "solver": (self.solver in ("sa", "descent", "tabu", "exact"), "sa, descent, tabu or exact"),
            "selection": (self.selection in get_args(Selection), "gradient, magnitude, wanda or random"),
            "hessian": (self.hessian in get_args(Hessian), "fisher, exact or fisher_mean"),
        })  # fmt: skip

    @property
    def pruned_first(self) -> int:
        """Pruned weights of a full block."""
        return min(max(round(self.block_size * self.pruned_share), 1), self.block_size - 1)


class State(NamedTuple):
    """All that changes, as arrays: saved and loaded in the middle, a run goes on as if it had not stopped.

    Attributes:
      masks: {path: True where a weight stays}.
      free: {path: True where a weight may change sides}.
      pushed: {path: number under which a weight was chosen last, counted within its part; 0: never}, int32.
      counts: {path: (parts,) weights chosen so far in this part}, int32.
      step: steps made.
    """

    masks: dict[str, Any]
    free: dict[str, Any]
    pushed: dict[str, Any]
    counts: dict[str, Any]
    step: Any


class StepInfo(NamedTuple):
    """What one step did to each of its parts, {path: (parts of the step,)}.

    Attributes:
      energy: E of the step, at most 0.
      predicted: change of the loss that the quadratic predicts.
      flips: weights that changed sides; chosen: in the block; loss: of the batch before the step.
    """

    energy: dict[str, Any]
    predicted: dict[str, Any]
    flips: dict[str, Any]
    chosen: dict[str, Any]
    loss: Any


def orders_of(
    params: Any, paths: Sequence[str], matrices: Mapping[str, Product] | None = None
) -> dict[str, np.ndarray]:
    """{path: (parts, size) flat positions of the leaf}: its matrices one by one, row after row (one output after another).

    Without a `matrices` entry a leaf is one part, in its own order. Host-side.
    """
    shapes = {p: np.shape(x) for p, x in flatten(params)}
    out = {}
    for p in paths:
        index = np.arange(int(np.prod(shapes[p])), dtype=np.int32)
        if matrices is not None and p in matrices:
            m = matrices[p]
            laid = np.asarray(m.matrix(jnp.asarray(index.reshape(shapes[p]))))
            out[p] = laid.reshape(int(np.prod(m.lead, dtype=int)), -1)
        else:
            out[p] = index[None]
    return out


# -- the start -------------------------------------------------------------------------------------------------------


def free_set(scores: Float[np.ndarray, " size"], mask: Bool[np.ndarray, " size"], config: ICBSConfig) -> np.ndarray:
    """True where a weight is neither among the least important pruned nor among the most important kept ones; host-side.

    Args:
      scores: that `mask` was chosen by, of one part or one group of it.
      mask: True where a weight stays.
      config: the two shares that are fixed, rounded to even at a half.
    """
    order = np.argsort(scores, kind="stable")
    pruned, kept = order[~mask[order]], order[mask[order]]
    fixed = round(config.fix_pruned * len(pruned)), round(config.fix_kept * len(kept))
    free = np.ones(mask.shape, bool)
    free[pruned[: fixed[0]]] = False
    free[kept[len(kept) - fixed[1] :]] = False
    return free


def initial(
    scores: Mapping[str, Any], masks: Masks, config: ICBSConfig, orders: Orders, groups: Mapping[str, int] | None = None
) -> State:
    """The state before the first step; host-side.

    Args:
      scores: {path: array} that the masks were chosen by; the ends of their order are fixed for ever.
      masks: {path: True where a weight stays}.
      config: settings.
      orders: from `orders_of`.
      groups: {path: rows of a part that were compared each for itself}, for masks with equally many weights per output;
        absent: a part is one group.

    Raises:
      ValueError: scores that are not finite, or masks and scores of different leaves.
    """
    if set(scores) != set(masks) or set(orders) != set(masks):
        raise ValueError("scores, masks and orders are of different leaves: give one of each for every leaf")
    free = {}
    for p, mask in masks.items():
        s, m = np.asarray(scores[p], np.float32).ravel(), np.asarray(mask).ravel()
        if not np.isfinite(s).all():
            raise ValueError(f"the scores of {p!r} are not finite: look for NaN or infinity in its weights and inputs")
        flat = np.ones(m.shape, bool)
        for part in orders[p]:
            rows = 1 if groups is None else groups.get(p, 1)
            for group in part.reshape(rows, -1):
                flat[group] = free_set(s[group], m[group], config)
        free[p] = placed_as(jnp.asarray(flat.reshape(np.shape(mask))), mask)
    return State(
        {p: jnp.asarray(m) for p, m in masks.items()}, free,
        {p: placed_as(jnp.zeros(np.shape(m), jnp.int32), m) for p, m in masks.items()},
        {p: jnp.zeros(len(orders[p]), jnp.int32) for p in masks}, jnp.zeros((), jnp.int32))  # fmt: skip


# -- a step ----------------------------------------------------------------------------------------------------------


class _Chosen(NamedTuple):
    """A block: positions in its part, which of them count, and which of these are pruned."""

    index: Int[Array, " n"]
    valid: Bool[Array, " n"]
    pruned: Bool[Array, " n"]


def choose_block(
    scores: Float[Array, " size"], mask: Any, free: Any, pushed: Any, count: Any, config: ICBSConfig
) -> _Chosen:
    """The pruned weights of highest score, then the kept ones of lowest; ties go to the lowest position (section 3.4).

    Where all free weights fit into one block they are all taken, and what was chosen lately does not matter.
    """
    n = min(config.block_size, scores.shape[0])
    first = min(config.pruned_first, n - 1)
    many = jnp.sum(free)
    held = jnp.round(config.tabu * many).astype(jnp.int32)
    all_fit = many <= n
    tabu = (pushed > 0) & (pushed > count - held) & (many - held >= n) & ~all_fit
    open_ = free & ~tabu

    def listed(which: Any, by: Any) -> tuple[Any, Any]:
        _, index = lax.top_k(jnp.where(which, by, -jnp.inf), n)
        return index, jnp.sum(which)

    p_index, p_many = listed(open_ & ~mask, scores)
    k_index, k_many = listed(open_ & mask, -scores)
    p_take = jnp.where(all_fit, p_many, jnp.minimum(first, p_many))
    k_take = jnp.where(all_fit, k_many, jnp.minimum(n - first, k_many))
    slot = jnp.arange(n)
    pruned = slot < p_take
    index = jnp.where(pruned, p_index, k_index[jnp.clip(slot - p_take, 0, n - 1)])
    return _Chosen(index, slot < p_take + k_take, pruned)


@functools.partial(jax.jit, static_argnames=("losses", "paths"))
def _mean_gradient(losses: Losses, now: Any, batch: Any, paths: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """(mean loss, {path: its float32 gradient}) at the current weights."""
    leaves = dict(flatten(now))

    def mean_loss(weights: Mapping[str, Any]) -> Any:
        return jnp.mean(losses(with_leaves(now, weights), batch).astype(jnp.float32))

    loss, gradient = jax.value_and_grad(mean_loss)({p: leaves[p] for p in paths})
    return loss, {p: g.astype(jnp.float32) for p, g in gradient.items()}


@functools.partial(jax.jit, static_argnames="losses")
def _exact_hessians(losses: Losses, now: Any, batch: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """{path: (parts, n, n) second derivatives of the mean loss by a block's weights}, columns by forward over reverse."""
    leaves = dict(flatten(now))

    def of(path: str, index: Any) -> Any:
        leaf = leaves[path]

        def gradient(step: Any) -> Any:
            def mean_loss(step: Any) -> Any:
                moved = leaf.reshape(-1).at[index].add(step.astype(leaf.dtype)).reshape(leaf.shape)
                return jnp.mean(losses(with_leaves(now, {path: moved}), batch).astype(jnp.float32))

            return jax.grad(mean_loss)(step)

        zero = jnp.zeros(index.shape, jnp.float32)
        columns = lax.map(lambda e: jax.jvp(gradient, (zero,), (e,))[1], jnp.eye(index.size), batch_size=32)
        return (columns + columns.T) / 2

    return {p: lax.map(functools.partial(of, p), index) for p, index in flat.items()}


class _Leaf(NamedTuple):
    """One leaf's part of the state; programs that work on leaves of one shape are compiled once for all of them."""

    trained: Any
    gradient: Any
    importance: Any  # None: |weight x gradient|
    mask: Any
    free: Any
    pushed: Any
    counts: Any


@functools.partial(jax.jit, static_argnames="config")
def _blocks(leaf: _Leaf, rows: Any, which: Any, config: ICBSConfig) -> tuple[_Chosen, Any, Any, Any]:
    """(blocks, flat positions, w0, gbar) of some parts of a leaf; `rows` are the flat positions of these parts."""
    here = (leaf.trained, leaf.gradient, leaf.mask, leaf.free, leaf.pushed)
    w0, g, mask, free, pushed = (x.reshape(-1)[rows] for x in here)
    w0 = w0.astype(jnp.float32)
    scores = jnp.abs(w0 * g) if leaf.importance is None else leaf.importance.reshape(-1)[rows]
    b = jax.vmap(functools.partial(choose_block, config=config))(scores, mask, free, pushed, leaf.counts[which])
    flat, w0, g = (jnp.take_along_axis(x, b.index, axis=1) for x in (rows, w0, g))
    return b, flat, w0, g


@functools.partial(jax.jit, static_argnames="config")
def _solved(
    key: Any, leaf: _Leaf, b: _Chosen, flat: Any, w0: Any, gbar: Any, curvature: Any, which: Any, config: ICBSConfig
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(mask, pushed, counts, what happened) of a leaf after its blocks were decided about."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(which)
    pruned, energy, predicted = jax.vmap(functools.partial(_decide, config=config))(keys, b, w0, curvature, gbar)
    many = jnp.sum(b.valid, axis=1)
    at = jnp.where(b.valid, flat, leaf.mask.size)  # padding falls outside and is dropped

    def put(array: Any, values: Any) -> Any:
        return array.reshape(-1).at[at].set(values, mode="drop").reshape(array.shape)

    count = leaf.counts[which]
    order = count[:, None] + 1 + jnp.arange(b.index.shape[1])
    flips = jnp.sum((pruned != b.pruned) & b.valid, axis=1)
    said = {"energy": energy, "predicted": predicted, "flips": flips, "chosen": many}
    return put(leaf.mask, ~pruned), put(leaf.pushed, order), leaf.counts.at[which].set(count + many), said


def _decide(key: Any, b: _Chosen, w0: Any, curvature: Any, gbar: Any, config: ICBSConfig) -> tuple[Any, Any, Any]:
    """(pruned, E, predicted change of the loss) of one block; the current state where no better one is found.

    `curvature` has the gradients that the Fisher matrix is made of, or with hessian="exact" the Hessian itself.
    """
    exact = config.hessian == "exact"
    w0, gbar = (jnp.where(b.valid, x, 0.0) for x in (w0, gbar))
    curvature = jnp.where(b.valid & b.valid[:, None], curvature, 0.0) if exact else jnp.where(b.valid, curvature, 0.0)
    start = b.pruned & b.valid
    dw = jnp.where(start, -w0, 0.0)
    pose = functools.partial(block_matrix if exact else block_form, w0, dw, curvature, gbar, config.gradient_weight)
    form: Form = pose(config.ridge)[0]
    if config.published_form:
        form = drop_negative(normalised(form)[0])
    elif not exact and curvature.shape[0] * 4 > curvature.shape[1]:  # the matrix is as small as its factors
        form = dense(form)
    if config.prune_idle:
        free = b.valid & idle(pose(0.0)[0])
        first, begin, rest = _idle_first(start, b.valid, free)
    else:
        first, begin, rest = jnp.zeros_like(start), start, b.valid
    found = solve(key, form, begin.astype(jnp.float32), rest, method=config.solver, restarts=config.restarts)
    pruned = jnp.where(rest, found.x == 1, first)
    delta = w0 * ~pruned - (w0 + dw)
    bent = delta @ jnp.matmul(curvature, delta, precision="highest") if exact else bend(delta, curvature)
    energy, predicted = step_energy(delta, bent, gbar, config.gradient_weight, config.ridge)
    if config.prune_idle:  # the start of the solver was not the current state
        better = energy <= 0
        pruned = jnp.where(better, pruned, start)
        energy, predicted = jnp.where(better, energy, 0.0), jnp.where(better, predicted, 0.0)
    return pruned, energy, predicted


def _idle_first(start: Any, valid: Any, free: Any) -> tuple[Any, Any, Any]:
    """(idle weights that are pruned, where the others start, which the others are), with as many pruned in all."""
    order = jnp.argsort(jnp.where(free, jnp.where(start, 0, 1), 2), stable=True)
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    first = free & (rank < jnp.sum(start))
    rest = valid & ~free
    others = start & rest
    revived = jnp.sum(first) - jnp.sum(start & free)  # the most important ones, which stand first
    return first, others & (jnp.cumsum(others) > revived), rest


def step(
    key: Array,
    losses: Losses,
    params: Any,
    state: State,
    parts: Parts,
    batch: Any,
    config: ICBSConfig,
    orders: Orders,
    importance: Importance | None = None,
) -> tuple[State, StepInfo]:
    """One step on a block of each of these parts.

    Args:
      key: of the solver.
      losses: (params, batch) -> loss of every sample, (samples,).
      params: the trained ones, which are never changed.
      state: from `initial` or the step before.
      parts: {path: which of its parts}; one part alone is the paper's step.
      batch: a pytree with the samples on axis 0.
      config: settings.
      orders: from `orders_of`.
      importance: (params with zeros, batch) -> {path: scores}, which selection="wanda" needs: inputs come from a graph.

    Returns:
      The new state, and what happened. Where E is not below 0 the mask stays as it was.

    Raises:
      ValueError: what `sample_gradients` refuses; selection="wanda" without `importance`.
    """
    if config.selection == "wanda" and importance is None:
        raise ValueError("selection='wanda' needs importance=(params, batch) -> {path: scores}: it is made of inputs")
    trained = dict(flatten(params))
    now = apply(params, state.masks)
    loss, gradient = _mean_gradient(losses, now, batch, tuple(parts))
    which = {p: jnp.asarray(i, jnp.int32) for p, i in parts.items()}
    scores: Mapping[str, Any] = {}
    if importance is not None:
        scores = importance(now, batch)
    elif config.selection == "magnitude":
        scores = {p: jnp.abs(trained[p].astype(jnp.float32)) for p in which}
    elif config.selection == "random":
        drawn = jax.random.split(jax.random.fold_in(key, 2**31 - 1), len(trained))  # the solver takes part numbers
        scores = {
            p: jax.random.uniform(drawn[i], np.shape(x)) for i, (p, x) in enumerate(trained.items()) if p in which
        }
    leaves, blocks = {}, {}
    for p, i in which.items():
        own = {name: getattr(state, name)[p] for name in ("masks", "free", "pushed", "counts")}
        leaves[p] = _Leaf(trained[p], gradient[p], scores.get(p), *own.values())
        blocks[p] = _blocks(leaves[p], jnp.asarray(orders[p])[i], i, config)
    curvatures = _curvatures(losses, now, batch, blocks, config)
    new: dict[str, dict[str, Any]] = {name: dict(getattr(state, name)) for name in ("masks", "pushed", "counts")}
    info: dict[str, dict[str, Any]] = {name: {} for name in ("energy", "predicted", "flips", "chosen")}
    for p, (b, flat, w0, gbar) in blocks.items():
        mask, pushed, counts, said = _solved(key, leaves[p], b, flat, w0, gbar, curvatures[p], which[p], config)
        new["masks"][p], new["pushed"][p] = (placed_as(x, state.masks[p]) for x in (mask, pushed))
        new["counts"][p] = counts
        for name, value in said.items():
            info[name][p] = value
    return State(new["masks"], state.free, new["pushed"], new["counts"], state.step + 1), StepInfo(**info, loss=loss)


def _curvatures(losses: Losses, now: Any, batch: Any, blocks: Mapping[str, Any], config: ICBSConfig) -> dict[str, Any]:
    """{path: the curvature that `_decide` takes, of every part}."""
    if config.hessian == "exact":
        return _exact_hessians(losses, now, batch, {p: flat for p, (_, flat, *_) in blocks.items()})
    if config.hessian == "fisher_mean":
        return {p: gbar[:, None] for p, (*_, gbar) in blocks.items()}
    entries, _ = entry_gradients(losses, now, {p: flat.ravel() for p, (_, flat, *_) in blocks.items()}, batch)
    return {p: entries[p].reshape(-1, *b.index.shape).swapaxes(0, 1) for p, (b, *_) in blocks.items()}


# -- which parts, when -----------------------------------------------------------------------------------------------


def schedule(
    orders: Orders, steps: int, parts_per_step: int, seed: int, how: Literal["log", "uniform"] = "log"
) -> list[dict[str, list[int]]]:
    """The parts of every step: each part as often as the logarithm of its size says, in random order; host-side.

    Several parts a step are different ones. 0 parts a step: all of them, every step.
    """
    every = [(p, i) for p, parts in orders.items() for i in range(len(parts))]
    if parts_per_step == 0 or parts_per_step >= len(every):
        return [_by_path(every)] * steps
    rng = np.random.default_rng(seed)
    total = steps * parts_per_step
    weight = np.array([np.log10(orders[p].shape[1]) if how == "log" else 1.0 for p, _ in every])
    wanted = np.maximum(weight, 1e-9) / np.maximum(weight, 1e-9).sum() * total
    counts = np.floor(wanted).astype(int)
    rest = np.argsort(-(wanted - counts) - rng.random(len(every)) * 1e-9)
    counts[rest[: total - counts.sum()]] += 1
    counts = _spread(np.minimum(counts, steps), steps, total)
    turns = [i for i in rng.permutation(len(every)) for _ in range(counts[i])]
    # dealt out in turn, so that no step has a part twice: a part's turns, at most `steps`, lie beside each other
    dealt = [turns[k::steps] for k in range(steps)]
    return [_by_path([every[i] for i in sorted(dealt[k])]) for k in rng.permutation(steps)]


def _spread(counts: np.ndarray, limit: int, total: int) -> np.ndarray:
    """Counts of at most `limit` with this sum, raised where there is room."""
    for i in np.argsort(counts):
        counts[i] += min(limit - counts[i], total - counts.sum())
    return counts


def _by_path(chosen: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for p, i in chosen:
        out.setdefault(p, []).append(i)
    return out
