"""A mixture of experts over four simulated devices is the one on a single device: outputs, gradients, any number of tokens."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from moe_oracle import draw, moe, same
from quick import QUICK

from pallas_kernels.sparse_moe import MoEError, expert_parallel_moe, permuted_moe, tile_moe, union_moe

T, E, D, F = 18, 8, 12, 6


@functools.cache
def mesh(*shape):
    return jax.make_mesh(shape, ("data", "expert")[2 - len(shape) :], axis_types=(AxisType.Auto,) * len(shape))


def trained(grid, inner):
    """Jitted (x, scores, active, up, down, cotangent) -> (y, gradients)."""

    def run(x, scores, active, up, down, dy):
        where = {"mesh": mesh(*grid), "data": "data" if len(grid) == 2 else ()}
        y, back = jax.vjp(
            lambda *a: expert_parallel_moe(*a[:2], active, *a[2:], inner=inner, **where), x, scores, up, down
        )
        return y, back(dy)

    return jax.jit(run, compiler_options=QUICK)


def problem(seed=0, dtype=np.float32):
    x, scores, active, up, down, dy = draw(seed, T, E, D, F, 0.3, dtype)
    active[5], active[:, 2] = False, False
    return x, np.where(active, scores, 0), active, up, down, dy


@pytest.mark.parametrize(
    ("grid", "inner"),
    [
        ((4,), functools.partial(tile_moe, impl="xla", tile=4)),
        ((2, 2), functools.partial(permuted_moe, impl="xla", tile=4, capacity=20)),
        ((1, 4), functools.partial(tile_moe, impl="tpu", interpret=True, tile=16)),
    ],
)
def test_values_and_all_four_gradients(grid, inner):
    run = trained(grid, inner)
    for seed, density in enumerate((None, 0, 1)):
        given = list(problem(seed))
        if density is not None:
            given[2] = given[2] & False if density == 0 else given[2] | True
            given[1] = np.where(given[2], given[1] + density, 0).astype(np.float32)
        unused = ~given[2].any(0)
        given[3], given[4] = (np.where(unused[:, None, None], np.nan, w) for w in given[3:5])
        y, grads = moe(*given)
        got = run(*given)
        same(got[0], y, 1e-5)
        for ours, wanted in zip(got[1], grads, strict=True):
            same(ours, wanted, 2e-5)
        assert all(a.sharding.spec == P("expert") for a in got[1][2:])  # each stays where its expert is


def test_bfloat16_is_summed_in_float32_between_devices():
    given = problem(dtype=jnp.bfloat16)
    run = trained((4,), functools.partial(tile_moe, impl="xla"))
    y, grads = moe(*given)
    got = run(*given)
    same(got[0], y, 2e-2)
    for ours, wanted in zip(got[1], grads, strict=True):
        same(ours, wanted, 4e-2)
    assert [a.dtype for a in (got[0], *got[1])] == [given[i].dtype for i in (0, 0, 1, 3, 4)]
    sums = re.findall(
        r'"stablehlo.reduce_scatter".*?\^bb0\(%\w+: tensor<(\w+)>', run.lower(*given).as_text(), re.DOTALL
    )
    assert sums == ["f32", "f32"]


def test_a_decoding_step():
    run = jax.jit(lambda *a: expert_parallel_moe(*a, mesh=mesh(4), inner=union_moe), compiler_options=QUICK)
    *given, _ = problem(seed=3)
    same(run(*given), moe(*given), 1e-5)


def test_a_mesh_that_does_not_fit_is_named():
    *given, _ = problem()
    for options, words in (
        ({"axis": "model"}, "no axis 'model': it has 'expert'"),
        ({"data": ("rows",)}, "no axis 'rows'"),
        ({"data": "expert"}, "'expert' is among the axes of data"),
    ):
        with pytest.raises(MoEError, match=words):
            expert_parallel_moe(*given, mesh=mesh(4), **options)
    x, scores, active, up, down = given
    with pytest.raises(MoEError, match="7 experts do not lie evenly over the 4 devices of 'expert'"):
        expert_parallel_moe(x, scores[:, 1:], active[:, 1:], up[1:], down[1:], mesh=mesh(4))
