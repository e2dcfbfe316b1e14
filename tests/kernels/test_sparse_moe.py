"""Every implementation of the mixture of experts against float64 numpy, closed forms, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
from moe_oracle import draw, moe, same
from quick import QUICK

from pallas_kernels.sparse_moe import reference


def test_the_dense_form():
    one = jnp.ones((1, 1))
    y = reference.moe(one, 0.5 * one, one > 0, one[None], 2 * one[None])
    np.testing.assert_allclose(np.asarray(y), [[0.7310586]], rtol=1e-6)  # silu(1)
    *problem, dy = draw(0, 9, 5, 6, 4)
    problem[2][:, 3] = False
    y, back = jax.jit(lambda *a: jax.vjp(reference.moe, *a), compiler_options=QUICK)(*problem)
    wanted, grads = moe(*problem, dy)
    same(y, wanted, 1e-6)
    dx, ds, _, dup, ddown = back(dy)
    for got, want in zip((dx, ds, dup, ddown), grads):
        same(got, want, 1e-5)
