"""The kernels that search blocks are accepted by the compilers of real TPU chips, for the sizes that models have."""

import dataclasses

import pytest

from pallas_kernels.common import aot_tpu as aot

aot.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels.block_score import arg_specs, block_scores, search_attention  # noqa: E402
from pallas_kernels.block_sparse_attention import KernelConfig  # noqa: E402

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")]
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
FIRST = TOPOLOGIES[0]  # every size and dtype for this chip; for the others what may differ there: layouts and VMEM


def search(block, **options):
    def run(q, k, v, ids):
        return search_attention(q, k, v, block_q=block, block_k=block, impl="tpu", **options)

    return run


def searching(spec, dtype="bfloat16"):
    """Shapes of (q, k, v, segment ids)."""
    return *dataclasses.replace(spec, dtype=dtype).arrays, spec.segments


@pytest.mark.parametrize(
    ("topology", "dtype", "rules"),
    [(FIRST, "bfloat16", False), *((t, d, True) for t in TOPOLOGIES for d in ("bfloat16", "float32"))],
)
def test_block_masses_compile(topology, dtype, rules):
    q, k, v, ids = searching(dataclasses.replace(arg_specs.VIDEO, tokens=16384), dtype)

    def run(q, k, v, lse, ids):
        options = {"causal": True, "q_segment_ids": ids, "kv_segment_ids": ids} if rules else {}
        options |= {"block_q": 64, "block_k": 64, "impl": "tpu"}
        twice = search_attention(q, k, v, config=KernelConfig(passes=2), **options)
        return search_attention(q, k, v, **options), block_scores(q, k, lse, **options), twice

    out = aot.compile_kernel(run, topology, q, k, v, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32), ids)
    assert out.kernels() == 1 + 1 + 2


@pytest.mark.parametrize(("topology", "block"), [(FIRST, 128), *((topology, 64) for topology in TOPOLOGIES)])
def test_a_search_of_a_whole_video_is_one_pass(topology, block):
    out = aot.compile_kernel(search(block), topology, *searching(arg_specs.VIDEO))
    assert out.kernels() == 1 and out.temporary < 2 * out.argument  # copies; tokens x tokens would be 28 GB a head


@pytest.mark.parametrize(
    ("spec", "block"),
    [pytest.param(s, b, id=f"{s.name}, {b}") for s, b in zip(arg_specs.COMPILED, (64, 48, 64, 16, 256), strict=True)],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_search_in_one_pass_compiles_for_other_sizes(spec, block, dtype):
    def run(q, k, v, ids):
        rules = {"causal": True, "soft_cap": 5.0, "q_segment_ids": ids, "kv_segment_ids": ids} if block != 48 else {}
        return search(block, **rules)(q, k, v, ids)

    few = dataclasses.replace(spec, tokens=4096)  # one pass has room for blocks of 16 and for float32
    assert aot.compile_kernel(run, "v5e:2x2", *searching(few, dtype)).kernels() == 1


def test_a_search_that_one_pass_has_no_room_for_takes_two_or_says_so():
    q, k = (jax.ShapeDtypeStruct((1, 1, n, 64), jnp.bfloat16) for n in (4096, 1 << 23))
    shapes = (q, k, k, None)
    with pytest.raises(ValueError, match="passes=2"):
        aot.compile_kernel(search(64, config=KernelConfig(passes=1)), "v5p:2x2x1", *shapes)
    assert aot.compile_kernel(search(64), "v5p:2x2x1", *shapes).kernels() == 2
