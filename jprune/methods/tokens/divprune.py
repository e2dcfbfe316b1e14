"""DivPrune: of an image's tokens keep those that differ most (Alvar, Singh, Akbari, Zhang, CVPR 2025, arXiv 2503.02175).

Wanted are the k tokens whose smallest pairwise cosine distance is as large as possible (max-min diversity, NP-hard). Greedy,
farthest first:

    first   the token whose nearest neighbour is farthest
    then    again and again the token farthest from all that were chosen, lower index among equals

One vector holds every token's distance to the chosen set, so that a step reads one row of distances: O(k M) after the matrix,
or O(k M d) with rows made on demand. A chosen token is out for ever: duplicates never fill up places, as they would if chosen
tokens (at distance 0 to themselves) competed on. The run for k begins with the run for every smaller k.

The chord sqrt(2 d) is a metric that ranks alike, so that the smallest chord is at least half of the best possible one, the
smallest cosine distance at least a quarter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

METRICS = ("cosine", "l2", "l1")
FIRST = ("max_nn", "index0", "medoid")
BLOCK = 512  # rows of distances at a time, where not all are held
LARGEST_MATRIX = 8192  # tokens; 256 MiB of float32


class SelectResult(NamedTuple):
    """Chosen tokens, in the order of the choice.

    Attributes:
      order: indices; the number of tokens where there was no valid token left to choose.
      trace: distance of each to those before it (of the first to its nearest neighbour), not increasing from the second on;
        the last is the smallest distance within the selection. -inf where nothing was chosen.
    """

    order: Int32[Array, " k"]
    trace: Float32[Array, " k"]


def retained_count(tokens: int, keep: float) -> int:
    """How many of so many tokens a share of them is: rounded, halves to even, at least one.

    Raises:
      ValueError: a share outside (0, 1], or no tokens.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: it must be above 0 and at most 1")
    if tokens < 1:
        raise ValueError(f"{tokens} tokens leave nothing to keep")
    return min(max(round(keep * tokens), 1), tokens)


def distances(a: Float[Array, "n d"], b: Float[Array, "m d"], metric: str = "cosine") -> Float32[Array, "n m"]:
    """Distances of all rows of `a` to all of `b`, in float32; of a row of zeros the cosine distance is 1 to everything.

    Raises:
      ValueError: an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    a, b = _ready(a, metric), _ready(b, metric)
    return _between(a, b, metric)


def cosine_distance_matrix(x: Float[Array, "m d"], valid: Bool[Array, " m"] | None = None) -> Float32[Array, "m m"]:
    """1 - cosine of all pairs of rows, in [0, 2]; infinite where either is not valid."""
    matrix = distances(x, x)
    return matrix if valid is None else jnp.where(valid[:, None] & valid[None, :], matrix, jnp.inf)


@functools.partial(jax.jit, static_argnames=("k", "first", "metric", "on_demand"))
def divprune_select(
    x: Float[Array, "m d"],
    k: int,
    valid: Bool[Array, " m"] | None = None,
    first: str = "max_nn",
    metric: str = "cosine",
    on_demand: bool | None = None,
) -> SelectResult:
    """The k tokens that farthest-first traversal chooses (section 3); jit-ed, under vmap for batches.

    Args:
      x: tokens; any floating type, compared in float32.
      k: how many.
      valid: False at padding, which is never chosen and nobody's neighbour; None: all are tokens.
      first: "max_nn" is DivPrune; "index0" the first valid token, "medoid" the one nearest to all, for ablations.
      metric: "cosine"; "l2" and "l1" for ablations.
      on_demand: make rows of distances when they are needed and not all at once; None: above 8192 tokens.

    Raises:
      ValueError: k is not among 1, ..., tokens; an unknown `first` or metric.
    """
    m = x.shape[0]
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}: of {m} tokens 1 to {m} can be kept")
    if first not in FIRST:
        raise ValueError(f"first must be one of {', '.join(FIRST)}, not {first!r}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    ready = _ready(x, metric)
    alive = jnp.ones(m, bool) if valid is None else valid
    whole = not (m > LARGEST_MATRIX if on_demand is None else on_demand)
    # Kept as the product of a cosine, from which rows are subtracted when they are read: a second matrix would cost more
    # than all steps.
    matrix = _compared(ready, ready, metric) if whole else None

    def row(i: Any) -> Any:
        return _distance(_compared(ready[i][None], ready, metric)[0] if matrix is None else matrix[i], metric)

    start, near = _first(ready, alive, matrix, first, metric)
    return _traverse(row, start, near, alive, k)


@functools.partial(jax.jit, static_argnames="k")
def farthest_first(
    apart: Float[Array, "m m"], k: int, start: Any = 0, valid: Bool[Array, " m"] | None = None
) -> SelectResult:
    """The same traversal of any distances, from a first token of one's own; jit-ed, under vmap for batches.

    Args:
      apart: distances of all pairs.
      k: how many tokens, from 1 to m.
      start: the first of them, a valid one.
      valid: False at padding; None: all are tokens.
    """
    alive = jnp.ones(len(apart), bool) if valid is None else valid
    start = jnp.asarray(start, jnp.int32)
    near = jnp.min(jnp.where((jnp.arange(len(apart)) != start) & alive, apart[start], jnp.inf))
    return _traverse(lambda i: apart[i].astype(jnp.float32), start, near.astype(jnp.float32), alive, k)


def _traverse(row: Callable[[Any], Any], start: Any, near: Any, alive: Any, k: int) -> SelectResult:
    """k tokens from `start` on, the first at distance `near` to its nearest neighbour."""
    m = alive.shape[0]
    # -inf: out of the question, as padding or as chosen already; a minimum leaves it so
    left = jnp.where(alive, row(start), -jnp.inf).at[start].set(-jnp.inf)

    def step(left: Any, _: Any) -> Any:
        i = jnp.argmax(left)
        far = left[i]
        return jnp.minimum(left, row(i)).at[i].set(-jnp.inf), (jnp.where(far == -jnp.inf, m, i), far)

    _, (order, trace) = jax.lax.scan(step, left, length=k - 1)
    some = alive.any()
    order = jnp.concatenate([jnp.where(some, start, m)[None], order])
    trace = jnp.concatenate([jnp.where(some, near, -jnp.inf)[None], trace])
    return SelectResult(order.astype(jnp.int32), trace)


def mmdp_value(x: Float[Array, "m d"], index: Int[Array, " k"], metric: str = "cosine") -> Float32[Array, ""]:
    """The smallest distance between two chosen tokens, which max-min diversity asks to be large; inf for one token."""
    among = distances(x[index], x[index], metric)
    return jnp.min(jnp.where(jnp.eye(len(index), dtype=bool), jnp.inf, among))


def cover_radius(x: Float[Array, "m d"], index: Int[Array, " k"], metric: str = "cosine") -> Float32[Array, ""]:
    """The largest distance of any token to the nearest chosen one."""
    return jnp.max(jnp.min(distances(x, x[index], metric), axis=1))


def mmdp_bruteforce(x: Any, k: int) -> tuple[tuple[int, ...], float]:
    """(the best k tokens, their smallest cosine distance) of all selections, in float64 on the host; for few tokens.

    Raises:
      ValueError: k is not among 2, ..., tokens.
    """
    x = np.asarray(x, np.float64)
    if not 2 <= k <= len(x):
        raise ValueError(f"k is {k}: of {len(x)} tokens 2 to {len(x)} can be compared")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    apart = 1 - x @ x.T
    pairs = np.array(list(itertools.combinations(range(k), 2))).T
    chosen = np.array(list(itertools.combinations(range(len(x)), k)))
    smallest = apart[chosen[:, pairs[0]], chosen[:, pairs[1]]].min(axis=1)
    best = int(smallest.argmax())
    return tuple(int(i) for i in chosen[best]), float(smallest[best])


def _ready(x: Any, metric: str) -> Any:
    """Rows to compare: float32, of length one for the cosine."""
    x = x.astype(jnp.float32)
    if metric != "cosine":
        return x
    # first by the largest entry, so that the squares of large half-precision numbers do not overflow and small ones count
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _compared(a: Any, b: Any, metric: str) -> Any:
    """Cosines, or the other metrics' distances, of all pairs."""
    if metric == "cosine":
        return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    power = {"l1": 1, "l2": 2}[metric]
    return jax.lax.map(lambda row: jnp.linalg.norm(b - row, ord=power, axis=-1), a)  # (n, m, d) would not fit


def _distance(compared: Any, metric: str) -> Any:
    return jnp.clip(1.0 - compared, 0.0, 2.0) if metric == "cosine" else compared


def _between(a: Any, b: Any, metric: str) -> Any:
    return _distance(_compared(a, b, metric), metric)


def _nearest(x: Any, alive: Any, matrix: Any, metric: str) -> Any:
    """Every token's distance to its nearest valid neighbour, itself excluded."""
    m = x.shape[0]

    def of(rows: Any, i: Any) -> Any:
        others = (jnp.arange(m) != i[:, None]) & alive
        return jnp.min(jnp.where(others, _distance(rows, metric), jnp.inf), axis=1)

    if matrix is not None:
        return of(matrix, jnp.arange(m))
    blocks = -(-m // BLOCK)
    padded = jnp.pad(x, ((0, blocks * BLOCK - m), (0, 0))).reshape(blocks, BLOCK, -1)
    index = jnp.arange(blocks * BLOCK).reshape(blocks, BLOCK)
    return jax.lax.map(lambda at: of(_compared(at[0], x, metric), at[1]), (padded, index)).reshape(-1)[:m]


def _first(x: Any, alive: Any, matrix: Any, first: str, metric: str) -> tuple[Any, Any]:
    """(index of the first choice, distance to its nearest neighbour)."""
    m = x.shape[0]
    if first == "max_nn":
        near = jnp.where(alive, _nearest(x, alive, matrix, metric), -jnp.inf)
        start = jnp.argmax(near)
        return start, near[start]
    if first == "index0":
        start = jnp.argmax(alive)
    else:

        def total(i: Any) -> Any:
            return jnp.sum(jnp.where(alive, _between(x[i][None], x, metric)[0], 0.0))

        start = jnp.argmin(jnp.where(alive, jax.lax.map(total, jnp.arange(m)), jnp.inf))
    others = jnp.where((jnp.arange(m) != start) & alive, _between(x[start][None], x, metric)[0], jnp.inf)
    return start, jnp.min(others)
