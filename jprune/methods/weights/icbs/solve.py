"""Solvers of the cardinality problem: minimise x.Q x over binary x with a given number of ones.

All of them start from a state and swap one 1 with one 0, so that the number of ones never changes, and never return a
state of higher energy than the start. Jit-able and vmap-able; n is static, the number of ones is not. Entries of `valid`
that are False pad a block that is not full: they stay 0.

    D_ij = -2 f_i + Q_ii + 2 f_j + Q_jj - 2 Q_ij,   f = Q x            the change when i goes from 1 to 0 and j from 0 to 1
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jprune.methods.weights.icbs.problem import Form, energy, normalised

Solver: TypeAlias = Literal["sa", "descent", "tabu", "exact"]
BETA_FIRST, BETA_LAST, BETA_FACTOR = 1e-3, 100.0, 1.1
LARGEST_EXACT = 20
CANDIDATES = 64  # on each side, among which one swap is chosen where all n^2 would be too many
FULL = 1024  # up to this n every swap is looked at


class Solved(NamedTuple):
    """A state and its energy.

    Attributes:
      x: 0 or 1, float32, with as many ones as the start.
      energy: x.Q x.
      start: energy of the start.
    """

    x: Float[Array, " n"]
    energy: Float[Array, ""]
    start: Float[Array, ""]


def betas() -> np.ndarray:
    """The inverse temperatures of annealing: 1e-3 growing by 1.1 while below 100, 121 of them."""
    n = math.ceil(math.log(BETA_LAST / BETA_FIRST) / math.log(BETA_FACTOR))
    return BETA_FIRST * BETA_FACTOR ** np.arange(n)


@functools.partial(jax.jit, static_argnames=("method", "restarts", "sweeps"))
def solve(
    key: Array,
    form: Form,
    x0: Float[Array, " n"],
    valid: Any = None,
    *,
    method: Solver = "sa",
    restarts: int = 5,
    sweeps: int = 1,
) -> Solved:
    """The best state found from x0.

        >>> q = Dense(jnp.array([[2.0, 1.0], [1.0, 1.0]]))
        >>> out = solve(jax.random.key(0), q, jnp.array([1.0, 0.0]))
        >>> out.x.tolist(), float(out.energy)
        ([0.0, 1.0], 1.0)

    Args:
      key: of annealing.
      form: Q.
      x0: 0 or 1.
      valid: False at padding; None: all count.
      method: "sa" anneals from x0 `restarts` times, then descends; "descent" takes the best swap, several at once where
        those help together, while one helps; "tabu" goes on through worse states, forbidding what was just swapped;
        "exact" tries all (up to 20 variables).
      restarts: of "sa". Restart r draws the same numbers whatever the number of restarts.
      sweeps: passes of "sa" per temperature.

    Raises:
      ValueError: too many variables for "exact".
    """
    x0 = x0.astype(jnp.float32)
    ok = jnp.ones(x0.shape, bool) if valid is None else valid
    start = energy(form, x0)
    if method == "exact":
        x = _exact(form, x0, ok)
    else:
        unit, _ = normalised(form)
        if method == "descent":
            x = descend(unit, x0, ok)
        elif method == "tabu":
            x = _tabu(unit, x0, ok)
        else:  # annealing
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(restarts))
            annealed = jax.vmap(lambda k: _anneal(k, unit, x0, ok, sweeps))(keys)
            several = jnp.concatenate([annealed, x0[None]])  # annealing may leave a good start and never come back
            ends = jax.vmap(lambda x: descend(unit, x, ok))(several)
            x = ends[jnp.argmin(jax.vmap(functools.partial(energy, unit))(ends))]
    found = energy(form, x)
    better = found <= start
    return Solved(jnp.where(better, x, x0), jnp.where(better, found, start), start)


# -- annealing -------------------------------------------------------------------------------------------------------


def _anneal(key: Array, form: Form, x0: Any, ok: Any, sweeps: int) -> Any:
    """The best state at the end of a temperature: swaps accepted with min(1, exp(-2 beta D)).

    The ones lie in front of the zeros in `order`, padding behind both, so that a partner is drawn by one number.
    """
    n = x0.shape[0]
    k, real = jnp.sum(x0).astype(jnp.int32), jnp.sum(ok).astype(jnp.int32)
    order = jnp.argsort(jnp.where(ok, 1 - x0, 2), stable=True).astype(jnp.int32)
    place = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    diagonal = form.diagonal()

    def propose(state: Any, given: Any) -> Any:
        order, place, f, changed, beta = state
        i, u, v = given
        at = place[i]
        one = at < k
        many = jnp.where(one, real - k, k)
        drawn = jnp.minimum((u * many).astype(jnp.int32), many - 1)
        partner = jnp.where(one, k + drawn, drawn)
        j = order[jnp.maximum(partner, 0)]
        off, on = jnp.where(one, i, j), jnp.where(one, j, i)  # off: 1 -> 0, on: 0 -> 1
        f_off, f_on = form.product_at(f, off, 1.0), form.product_at(f, on, 0.0)
        d = -2 * f_off + diagonal[off] + 2 * f_on + diagonal[on] - 2 * form.entry(off, on)
        accept = (many > 0) & ok[i] & ((d <= 0) | (v < jnp.exp(-2 * beta * d)))
        f = form.swapped(f, off, on, accept.astype(jnp.float32))
        a, b = place[off], place[on]
        new_a, new_b = jnp.where(accept, on, off), jnp.where(accept, off, on)
        order = order.at[a].set(new_a).at[b].set(new_b)
        place = place.at[new_a].set(a).at[new_b].set(b)
        return (order, place, f, changed | (accept & (d != 0)), beta), None

    def temperature(state: Any, given: Any) -> Any:
        order, place, x_best, best, frozen = state
        beta, key = given
        x = jnp.zeros(n).at[order].set((jnp.arange(n) < k).astype(jnp.float32))
        f = form.state(x)  # anew, as float32 drifts

        def sweep(carry: Any, key: Any) -> Any:
            draws = jax.random.uniform(key, (2, n))
            return lax.scan(propose, carry, (jnp.arange(n), draws[0], draws[1]))

        new, _ = lax.scan(sweep, (order, place, f, False, beta), jax.random.split(key, sweeps))
        order, place = (jnp.where(frozen, old, now) for old, now in zip((order, place), new[:2]))
        x = jnp.zeros(n).at[order].set((jnp.arange(n) < k).astype(jnp.float32))
        found = energy(form, x)
        x_best, best = jnp.where(found < best, x, x_best), jnp.minimum(found, best)
        return (order, place, x_best, best, frozen | ~new[3]), None  # a temperature without a change ends it

    schedule = jnp.asarray(betas(), jnp.float32)
    first = (order, place, x0, energy(form, x0), jnp.asarray(False))
    (_, _, x, *_), _ = lax.scan(temperature, first, (schedule, jax.random.split(key, len(schedule))))
    return x


# -- descent ---------------------------------------------------------------------------------------------------------


def _sides(form: Form, x: Any, f: Any, ok: Any) -> tuple[Any, Any]:
    """What turning each 1 off and each 0 on changes, alone; infinite where it is not one."""
    d = form.diagonal()
    off = jnp.where((x == 1) & ok, d - 2 * f, jnp.inf)
    on = jnp.where((x == 0) & ok, d + 2 * f, jnp.inf)
    return off, on


def _best_swap(form: Form, off: Any, on: Any) -> tuple[Any, Any, Any]:
    """(change, i, j) of the best swap; among the most promising of each side where there are very many."""
    n = off.shape[0]
    many = n if n <= FULL else CANDIDATES
    _, i = lax.top_k(-off, many)
    _, j = lax.top_k(-on, many)
    d = off[i][:, None] + on[j][None, :] - 2 * form.entries(i, j)
    d = jnp.where(jnp.isnan(d), jnp.inf, d)
    at = jnp.argmin(d)
    return d.ravel()[at], i[at // many], j[at % many]


def descend(form: Form, x0: Float[Array, " n"], ok: Any) -> Float[Array, " n"]:
    """Swaps while they lower the energy: as many at once as help together, at last the best one alone."""
    n = x0.shape[0]
    ranks = jnp.arange(n)
    eps = 1e-6

    def go(state: Any) -> Any:
        x, e, many, rounds = state
        f = form.times(x)
        off, on = _sides(form, x, f, ok)
        first, second = jnp.argsort(off), jnp.argsort(on)
        gain = jnp.sort(off) + jnp.sort(on)
        take = (ranks < many) & (gain < 0)
        several = x.at[first].add(-take.astype(jnp.float32)).at[second].add(take.astype(jnp.float32))
        d, i, j = _best_swap(form, off, on)
        single = jnp.where(d < 0, x.at[i].set(0.0).at[j].set(1.0), x)
        new = jnp.where(many > 1, several, single)
        found = energy(form, new)
        better = found < e - eps * jnp.abs(e)
        many = jnp.where(better, jnp.where(many > 1, jnp.minimum(2 * many, n), 1), jnp.where(many > 1, many // 2, 0))
        return jnp.where(better, new, x), jnp.where(better, found, e), many, rounds + 1

    first = (x0, energy(form, x0), jnp.asarray(max(n // 4, 1)), jnp.asarray(0))
    x, *_ = lax.while_loop(lambda s: (s[2] > 0) & (s[3] < 8 * n + 64), go, first)
    return x


def _tabu(form: Form, x0: Any, ok: Any) -> Any:
    """The best swap that is not forbidden, whether it helps or not; forbidden ones count where they lead to a new best."""
    n = x0.shape[0]
    tenure = max(n // 20, 2)

    def go(k: Any, state: Any) -> Any:
        x, until, best, e_best = state
        f = form.times(x)
        e = jnp.dot(x, f, precision="highest")
        off, on = _sides(form, x, f, ok)
        free = until <= k
        d_any, i_any, j_any = _best_swap(form, off, on)
        d, i, j = _best_swap(form, jnp.where(free, off, jnp.inf), jnp.where(free, on, jnp.inf))
        aspire = e + d_any < e_best
        d, i, j = (jnp.where(aspire, a, b) for a, b in ((d_any, d), (i_any, i), (j_any, j)))
        moved = jnp.isfinite(d)
        x = jnp.where(moved, x.at[i].set(0.0).at[j].set(1.0), x)
        until = jnp.where(moved, until.at[i].set(k + tenure).at[j].set(k + tenure), until)
        e = energy(form, x)
        return x, until, jnp.where(e < e_best, x, best), jnp.minimum(e, e_best)

    x0 = descend(form, x0, ok)
    state = (x0, jnp.zeros(n, jnp.int32), x0, energy(form, x0))
    return lax.fori_loop(0, 10 * n, go, state)[2]


def _exact(form: Form, x0: Any, ok: Any) -> Any:
    """The best of all states with as many ones."""
    n = x0.shape[0]
    if n > LARGEST_EXACT:
        raise ValueError(f"the exact solver tries all states of up to {LARGEST_EXACT} variables; these are {n}")
    every = jnp.asarray(np.array(list(itertools.product((0.0, 1.0), repeat=n)), np.float32))
    fits = (jnp.sum(every, axis=1) == jnp.sum(x0)) & jnp.all((every == 0) | ok, axis=1)
    energies = jax.vmap(functools.partial(energy, form))(every)
    return every[jnp.argmin(jnp.where(fits, energies, jnp.inf))]
