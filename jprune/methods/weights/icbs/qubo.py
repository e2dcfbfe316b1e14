"""A block as a quadratic binary problem in a plain JSON file, for solvers of other people and machines, and their answer.

    {"format": "jprune-qubo-1", "n": 3, "ones": 1, "matrix": [[..], ..], "start": [1, 0, 0]}

Minimise x.Q x over x of zeros and ones with exactly `ones` ones. `penalised` folds that condition into the matrix for
solvers that know none. The answer is {"x": [0, 1, 0]}.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jprune.files.atomic import write_json
from jprune.files.json_files import read_json
from jprune.methods.weights.icbs.problem import Dense, Form, dense, energy
from jprune.methods.weights.icbs.solve import Solved

FORMAT = "jprune-qubo-1"


def save_qubo(file: str | Path, form: Form, start: Any) -> None:
    """Write a block's problem; host-side.

    Args:
      file: to write.
      form: Q.
      start: the current state, zeros and ones; its number of ones is the condition.
    """
    x = np.asarray(start).astype(int)
    q = np.asarray(dense(form).q, np.float64)
    write_json(
        Path(file), {"format": FORMAT, "n": len(x), "ones": int(x.sum()), "matrix": q.tolist(), "start": x.tolist()}
    )


def load_qubo(file: str | Path) -> tuple[Dense, Int[np.ndarray, " n"]]:
    """(Q, start) of a file that `save_qubo` wrote.

    Raises:
      ValueError: another format, sizes that do not fit, or numbers that are not finite.
    """
    said = read_json(Path(file), "write the problem again")
    if said.get("format") != FORMAT:
        raise ValueError(f"{file} is no {FORMAT} file: its format is {said.get('format')!r}")
    n, start = said.get("n"), _bits(file, said.get("start"), "start")
    rows = said.get("matrix")
    if (
        n != len(start)
        or not isinstance(rows, list)
        or [len(r) if isinstance(r, list) else -1 for r in rows] != [n] * len(start)
    ):
        raise ValueError(f"{file} says n = {n}, but its matrix or its start has another size")
    try:
        q = np.array(rows, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{file} holds entries that are no numbers") from None
    if not np.isfinite(q).all() or not np.array_equal(q, q.T):
        raise ValueError(f"the matrix in {file} is not symmetric, or not finite")
    if said.get("ones") != int(start.sum()):
        raise ValueError(f"{file} asks for {said.get('ones')} ones, but its start has {int(start.sum())}")
    return Dense(jnp.asarray(q, jnp.float32)), start


def read_solution(file: str | Path, form: Form, start: Any) -> Solved:
    """The state that a solver wrote, with its energy computed here; a worse one than the start is refused.

    Raises:
      ValueError: another size, other entries than 0 and 1, another number of ones, or a higher energy than the start's.
    """
    x0 = jnp.asarray(np.asarray(start), jnp.float32)
    x = _bits(file, read_json(Path(file), "let the solver write it again").get("x"), "x")
    if x.shape != x0.shape:
        raise ValueError(f"{file} solves a problem of {len(x)} variables, not of {len(x0)}")
    if int(x.sum()) != int(x0.sum()):
        raise ValueError(f"{file} has {int(x.sum())} ones, and the problem asks for {int(x0.sum())}")
    found, before = energy(form, jnp.asarray(x, jnp.float32)), energy(form, x0)
    if not float(found) <= float(before) + 1e-6 * abs(float(before)):
        raise ValueError(f"the state in {file} has energy {float(found):g}, above {float(before):g} of the start")
    return Solved(jnp.asarray(x, jnp.float32), found, before)


def penalised(form: Form, ones: int, weight: float | None = None) -> tuple[Float[np.ndarray, "n n"], float]:
    """(Q', constant) with x.Q' x + constant = x.Q x + weight (sum x - ones)^2: no condition is left.

        >>> q, constant = penalised(Dense(jnp.array([[2.0, 1.0], [1.0, 1.0]])), ones=1, weight=10.0)
        >>> q.tolist(), constant
        ([[-8.0, 11.0], [11.0, -9.0]], 10.0)

    `weight` by default exceeds what one variable can gain, so that the best state keeps the condition. Host-side.
    """
    q = np.asarray(dense(form).q, np.float64)
    if weight is None:
        weight = 2.0 * float(np.abs(q).sum(axis=1).max(initial=0.0)) + 1.0
    out = q + weight * np.ones_like(q)
    out[np.diag_indices(len(q))] -= 2 * weight * ones
    return out, float(weight * ones**2)


def _bits(file: Any, found: Any, name: str) -> np.ndarray:
    if not isinstance(found, list) or not found or any(not _is_bit(b) for b in found):
        raise ValueError(f"{name} in {file} is no list of zeros and ones")
    return np.array([int(b) for b in found])


def _is_bit(b: Any) -> bool:
    return isinstance(b, int | float) and not isinstance(b, bool) and math.isfinite(b) and b in (0, 1)
