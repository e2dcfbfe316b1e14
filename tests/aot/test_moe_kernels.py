"""The kernels of mixtures of experts are accepted by the compilers of real TPU chips, for the layers that models have."""

import dataclasses
import functools
import re

import pytest

from pallas_kernels.common import aot_tpu as aot

aot.prepare()

import jax  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from pallas_kernels.grouped_matmul import arg_specs as grouped_specs  # noqa: E402
from pallas_kernels.grouped_matmul import grouped_matmul  # noqa: E402
from pallas_kernels.sparse_moe import (  # noqa: E402
    BackendError,
    arg_specs,
    expert_parallel_moe,
    permuted_moe,
    tile_moe,
    union_moe,
)

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")]
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
FIRST = TOPOLOGIES[0]
WIDEST = arg_specs.BLOCKFFN_2_8B
ODD = arg_specs.MoESpec("odd", "no multiple of anything", width=200, hidden=40, experts=7, tokens=77)


def named(specs):
    return [pytest.param(spec, id=spec.name) for spec in specs]


def trained(layer=tile_moe, **options):
    """(y, all four gradients) of the layer."""

    def run(x, scores, active, up, down):
        y, back = jax.vjp(lambda *a: layer(*a[:2], active, *a[2:], impl="tpu", **options), x, scores, up, down)
        return y, back(y)

    return run


def union(*arrays):
    return union_moe(*arrays, impl="tpu")


NOTHING_MOVES = {"parameter", "bitcast", "get-tuple-element", "custom-call"}


def makers_of_weights(out, spec):
    """The instructions that give out arrays as large as the weights: a copy of them costs what a kernel saves."""
    return set(re.findall(rf"= \(?bf16\[{spec.experts},[0-9]+,[0-9]+\][^=]*? ([a-z-]+)\(", out.text))


@pytest.mark.parametrize("spec", named(arg_specs.COMPILED))
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_forward_and_all_gradients_compile(topology, spec):
    if (topology, spec) != (FIRST, WIDEST):  # long lists take long to sort, for the compiler too
        spec = dataclasses.replace(spec, tokens=512)
    out = aot.compile_kernel(trained(), topology, *spec.arrays)
    assert out.kernels() == 3
    hidden = 2 * spec.tokens * spec.experts * spec.hidden
    assert out.temporary < hidden / 2 + (1 << 20)  # the dense layer keeps all of it
    assert makers_of_weights(out, spec) <= NOTHING_MOVES


@pytest.mark.parametrize(("topology", "spec"), [(FIRST, arg_specs.BLOCKFFN_SMALL), *((t, WIDEST) for t in TOPOLOGIES)])
def test_a_union_compiles_and_copies_no_weights(topology, spec):
    out = aot.compile_kernel(union, topology, *dataclasses.replace(spec, tokens=32).arrays)
    assert out.kernels() == 1 and out.temporary < spec.weights / 10
    assert makers_of_weights(out, spec) <= NOTHING_MOVES and "ConcatBitcast" not in out.text


@pytest.mark.parametrize(("topology", "spec"), [(FIRST, ODD), ("v5p:2x2x1", dataclasses.replace(WIDEST, tokens=128))])
def test_float32_and_odd_widths_compile(topology, spec):
    spec = dataclasses.replace(spec, dtype="float32")
    assert aot.compile_kernel(trained(), topology, *spec.arrays).kernels() == 3
    few = dataclasses.replace(spec, tokens=1)
    assert aot.compile_kernel(union, topology, *few.arrays).kernels() == 1


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kept_hidden_numbers_compile(topology):
    spec = dataclasses.replace(arg_specs.BLOCKFFN_XLARGE, tokens=512)
    again, kept = (aot.compile_kernel(trained(save_hidden=save), topology, *spec.arrays) for save in (False, True))
    assert kept.kernels() == again.kernels() == 3
    assert again.flops / kept.flops == pytest.approx(9 / 6, rel=0.01)


def test_small_tiles_compile():
    spec = dataclasses.replace(arg_specs.BLOCKFFN_SMALL, tokens=100)
    assert aot.compile_kernel(trained(tile=16), FIRST, *spec.arrays).kernels() == 3


def product(lhs, rhs, sizes, scale):
    return grouped_matmul(lhs, rhs, sizes, row_scale=scale, activation="silu", impl="tpu")


@pytest.mark.parametrize(
    ("topology", "spec"),
    [*((t, grouped_specs.DEEPSEEK_MOE) for t in TOPOLOGIES), (FIRST, grouped_specs.BLOCKFFN_XLARGE)],
)
def test_grouped_products_and_their_gradients_compile(topology, spec):
    def run(lhs, rhs, sizes, scale):
        out, back = jax.vjp(lambda a, b, s: product(a, b, sizes, s), lhs, rhs, scale)
        return out, back(out)

    out = aot.compile_kernel(run, topology, *spec.arrays)
    assert out.kernels() == 4
    assert out.temporary < spec.rows * spec.hidden * 4 + (1 << 20)  # products in float32, and no weights


def test_a_grouped_product_whose_matrices_are_split_compiles():
    out = aot.compile_kernel(product, FIRST, *grouped_specs.MIXTRAL.arrays)
    assert out.kernels() == 1 and out.temporary < 1 << 20


def test_sorting_compiles_forward_and_backward():
    """Two products forward; three and two sums of outer products backward. With room for all pairs there is no other branch."""
    spec = dataclasses.replace(arg_specs.BLOCKFFN_XLARGE, tokens=256)
    out = aot.compile_kernel(trained(permuted_moe, capacity=spec.tokens * spec.experts), FIRST, *spec.arrays)
    assert out.kernels() == 7 and "conditional(" not in out.text
    assert makers_of_weights(out, spec) <= NOTHING_MOVES
    out = aot.compile_kernel(functools.partial(permuted_moe, impl="tpu"), FIRST, *spec.arrays)
    assert out.kernels() == 2 and "conditional(" in out.text


def test_experts_over_devices_compile_with_the_kernels_inside():
    """Two by two chips: tokens over both axes, experts over one; gradients of weights are summed over the other."""
    spec = dataclasses.replace(arg_specs.BLOCKFFN_XLARGE, tokens=2048)
    on = aot.mesh(FIRST, ("data", "expert"), (2, 2))
    inner = functools.partial(tile_moe, impl="tpu")

    def layer(*arrays, impl):
        return expert_parallel_moe(*arrays, mesh=on, data="data", inner=inner)

    names = dict(zip(("x", "scores", "active", "up", "down"), spec.arrays, strict=True))
    args = aot.abstract(names, on, lambda path, _: P("expert") if path in ("up", "down") else P(("data", "expert")))
    out = aot.compile_for(trained(layer), *(args[name] for name in names))
    assert out.kernels() == 3
    assert out.collectives() == {"all-gather": 2, "all-reduce": 1, "all-to-all": 3, "reduce-scatter": 2}


def test_what_has_no_room_is_refused_before_the_compiler():
    wide = dataclasses.replace(arg_specs.BLOCKFFN_SMALL, width=8192, hidden=1024, experts=8)
    with pytest.raises(BackendError, match=r"8192 x 1024 with tiles of 128 tokens need .* MB of VMEM of 38.4"):
        aot.compile_kernel(trained(), "v5p:2x2x1", *wide.arrays)
    with pytest.raises(BackendError, match=r"tiles of 3072 tokens need .* MB of VMEM of 76.8"):
        aot.compile_kernel(trained(tile=3072), FIRST, *dataclasses.replace(WIDEST, tokens=8192).arrays)
    mixtral = dataclasses.replace(grouped_specs.MIXTRAL, dtype="float32")
    with pytest.raises(BackendError, match=r"4096 x 14336 with tiles of 128 rows need .* MB of VMEM of 38.4"):
        aot.compile_kernel(lambda *a: grouped_matmul(*a[:3], impl="tpu"), "v5p:2x2x1", *mixtral.arrays)
    many = dataclasses.replace(WIDEST, tokens=1 << 20)
    with pytest.raises(BackendError, match="KB of scalar memory of 512"):
        aot.compile_kernel(trained(), FIRST, *many.arrays)
