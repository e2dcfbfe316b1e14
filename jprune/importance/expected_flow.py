"""Densities from the expected synaptic flow of a network with skip connections: SynExp where it is no chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jprune.importance.at_init import Fn, modulus, ones_like_one_sample, total_flow, weights_of, with_weights
from jprune.importance.density import Densities, synexp


def synexp_of_paths(
    fn: Fn,
    variables: Any,
    x: Any,
    macs_of: Mapping[str, int],
    params: float | None = None,
    macs: float | None = None,
    cap: float = 1.0,
) -> Densities:
    """Densities that maximise the expected synaptic flow with every path counted, skip connections included.

    Over random signs, sizes and masks the expected flow is that of the network whose every weight of layer l is
    p_l * mean |w_l|: a sum over paths of products of densities, so `synexp` is its solution for a chain. The logarithm
    of such a sum is not concave in log p: this is a local optimum (sequential quadratic programming) from the chain's.
    Host-side, float64.

    Args:
      fn, variables, x: as for `synflow`.
      macs_of: {leaf path: MACs} of the layers to choose densities for.
      params, macs, cap: as for `synexp`.

    Raises:
      ValueError: those of `synexp`, a flow that overflows or vanishes, or no convergence.
    """
    w = {p: np.asarray(v, np.float64) for p, v in weights_of(variables, list(macs_of)).items()}
    n, f = np.array([v.size for v in w.values()], np.float64), np.array([macs_of[p] for p in w], np.float64)
    start = synexp(n, f, params, macs, cap)
    with jax.enable_x64(True):
        base = jax.tree.map(modulus, variables)
        ones = ones_like_one_sample(x)
        mean = {p: np.abs(v).mean() for p, v in w.items()}

        @jax.jit
        def log_flow(u: Any) -> Any:
            flat = {p: jnp.full(v.shape, jnp.exp(u[i]) * mean[p]) for i, (p, v) in enumerate(w.items())}
            return jnp.log(total_flow(fn, with_weights(base, flat), ones))

        slope = jax.jit(jax.value_and_grad(log_flow))

        def negative(u: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slope(jnp.asarray(u))
            return -float(value), -np.asarray(gradient)

        if not np.isfinite(negative(np.log(start))[0]):
            raise ValueError("the expected flow overflows or vanishes: the network is too deep for it; use paths=False")
        kept = [(cost / budget) for cost, budget in ((n, params), (f, macs)) if budget is not None]
        limits = [{"type": "ineq", "fun": lambda u, c=c: 1 - c @ np.exp(u), "jac": lambda u, c=c: -c * np.exp(u)}
                  for c in kept]  # fmt: skip
        # a density of e^-12 asks for no channel in any layer
        found = scipy.optimize.minimize(negative, np.log(start), jac=True, method="SLSQP", constraints=limits,
                                        bounds=[(min(-12.0, s), np.log(cap)) for s in np.log(start)],
                                        options={"maxiter": 500, "ftol": 1e-12})  # fmt: skip
    if not found.success:
        raise ValueError(f"the search for densities did not converge ({found.message}): use paths=False")
    # the solver meets the budgets to rounding only
    p = np.exp(found.x) / max([1.0, *(c @ np.exp(found.x) for c in kept)])
    return dict(zip(w, map(float, p), strict=True))
