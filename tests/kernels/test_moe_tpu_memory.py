"""The kernels of mixtures of experts in a simulation of a TPU's memories: all outputs are written, nothing is read before it is.

Uninitialised memory is not-a-number there, reads out of bounds raise, and accesses that no semaphore orders are races.
"""

import functools

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulation
from jax.experimental.pallas import tpu as pltpu
from moe_oracle import draw, moe, same
from quick import QUICK

from pallas_kernels.sparse_moe import permuted_moe, tile_moe, union_moe

pytestmark = pytest.mark.slow
CHIP = pltpu.InterpretParams(out_of_bounds_reads="raise", detect_races=True, uninitialized_memory="nan")


def quiet(run, *given):
    """What `run` returns, with no race on the way."""
    try:
        out = jax.block_until_ready(jax.jit(run, compiler_options=QUICK)(*given))
        assert not simulation.races.races_found, "RACE DETECTED"  # which jax 0.12 says itself
        return out
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("layer", [tile_moe, permuted_moe, functools.partial(tile_moe, save_hidden=True)])
def test_tiles_and_experts_that_nobody_uses_are_written(layer):
    x, scores, active, up, down, dy = draw(0, 48, 4, 24, 8)
    active[16:32], active[:, 2] = False, False
    scores = np.where(active, scores, 0)

    def run(x, scores, active, up, down, dy):
        y, back = jax.vjp(lambda *a: layer(*a[:2], active, *a[2:], tile=16, impl="tpu", interpret=CHIP),
                          x, scores, up, down)  # fmt: skip
        return y, back(dy)

    got, (y, grads) = quiet(run, x, scores, active, up, down, dy), moe(x, scores, active, up, down, dy)
    same(got[0], y, 1e-5)
    for ours, wanted in zip(got[1], grads, strict=True):
        same(ours, wanted, 2e-5)


@pytest.mark.parametrize("density", [0, 0.4])
def test_a_union(density):
    *given, _ = draw(1, 5, 4, 24, 8, density)
    same(quiet(lambda *a: union_moe(*a, impl="tpu", interpret=CHIP), *given), moe(*given), 1e-5)
