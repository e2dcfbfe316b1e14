"""The kernels of attention over blocks are accepted by the compilers of real TPU chips, for the sizes that models have."""

import dataclasses
import re

import pytest

from pallas_kernels.common import aot_tpu as aot

aot.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels.block_score import arg_specs as searched  # noqa: E402
from pallas_kernels.block_sparse_attention import (  # noqa: E402
    BlockMask,
    KernelConfig,
    arg_specs,
    block_sparse_attention,
)

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")]
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
FIRST = TOPOLOGIES[0]  # every size and dtype for this chip; for the others what may differ there: layouts and VMEM


def named(specs):
    return [pytest.param(spec, id=spec.name) for spec in specs]


def problem(spec, dtype="bfloat16"):
    """Shapes of (q, k, v, mask with transposes, segment ids); transposed lists have room for as many as the others."""
    spec = dataclasses.replace(spec, dtype=dtype)
    return *spec.arrays, spec.mask(spec.width), spec.segments


def gradients(rules, **config):
    def run(q, k, v, mask, ids):
        options = {"causal": True, "soft_cap": 5.0, "q_segment_ids": ids, "kv_segment_ids": ids} if rules else {}
        options["config"] = KernelConfig(**config)
        out, back = jax.vjp(lambda *a: block_sparse_attention(*a, mask, impl="tpu", **options), q, k, v)
        return out, back(out)

    return run


WIDEST = max(arg_specs.COMPILED, key=lambda spec: spec.features)  # in float32 what takes most room


@pytest.mark.parametrize("spec", named(arg_specs.COMPILED))
@pytest.mark.parametrize(
    ("topology", "dtype"), [*((topology, "bfloat16") for topology in TOPOLOGIES), (FIRST, "float32")]
)
def test_forward_and_both_gradients_compile(topology, dtype, spec):
    if (topology, dtype) != (FIRST, "bfloat16"):  # once at the models' lengths: long arrays take long to lay out
        spec = dataclasses.replace(spec, tokens=4096)
    forward_and_both_gradients_compile(topology, dtype, spec)


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_the_widest_heads_in_float32_compile_for_every_chip(topology):
    forward_and_both_gradients_compile(topology, "float32", dataclasses.replace(WIDEST, tokens=4096))


def forward_and_both_gradients_compile(topology, dtype, spec):
    out = aot.compile_kernel(gradients(spec.features in (64, 128)), topology, *problem(spec.with_blocks(64), dtype))
    assert out.kernels() == 3
    one_head = 4 * spec.tokens**2
    copies = 5 * out.output  # in the kernels' layouts; float32 is laid out once more
    assert out.temporary < max(one_head, copies) < 4 * spec.heads * spec.tokens**2  # nothing of tokens x tokens


def test_a_long_sequence_needs_no_more_than_its_arrays():
    spec = dataclasses.replace(arg_specs.LONGEST, kept=0.4)
    out = aot.compile_kernel(gradients(True), FIRST, *problem(spec))  # with the least memory
    assert out.kernels() == 3 and out.temporary < 2 * out.output


@pytest.mark.parametrize("block", [16, 128, 256])
def test_blocks_of_other_sizes_compile(block):
    spec = dataclasses.replace(arg_specs.COMPILED[3].with_blocks(block), tokens=2048, kept=0.2)
    assert aot.compile_kernel(gradients(True), "v5e:2x2", *problem(spec)).kernels() == 3


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("topology", "features"), [(FIRST, 64), *((topology, 128) for topology in TOPOLOGIES)])
def test_several_blocks_together_compile(topology, features, resident):
    (spec,) = (s for s in arg_specs.COMPILED if s.features == features)
    fn = gradients(resident, blocks_together=4, resident=resident)
    spec = dataclasses.replace(spec.with_blocks(64), tokens=4096)  # which fit into VMEM on every chip
    assert aot.compile_kernel(fn, topology, *problem(spec)).kernels() == 3


def test_a_head_of_a_video_is_kept_in_vmem_where_it_fits():
    spec = searched.VIDEO.of_one_head().with_blocks(64)

    def forward(q, k, v, mask, ids):
        return block_sparse_attention(q, k, v, mask, impl="tpu", config=KernelConfig(blocks_together=4))

    for topology, fits in (("v5e:2x2", True), ("v5p:2x2x1", False)):  # 61 MB of 128 MB, and of 64
        text = aot.compile_kernel(forward, topology, *problem(spec)).text
        (call,) = (line for line in text.splitlines() if "tpu_custom_call" in line)
        limits = map(int, re.findall(r'"memory_space":"1","offset":"0","size":"([0-9]+)"', call))
        assert (max(limits, default=0) > 2 * spec.tokens * spec.features * 2) == fits


def lists(query_blocks, key_blocks, heads):
    """Shapes of (q, k, v, mask): all blocks of 16 tokens, room for every one in every list."""
    q, k = (jax.ShapeDtypeStruct((1, h, 16 * n, 64), jnp.bfloat16) for h, n in zip(heads, (query_blocks, key_blocks)))
    shapes = [(query_blocks, key_blocks), (query_blocks,), (key_blocks, query_blocks), (key_blocks,)]
    idx = [jax.ShapeDtypeStruct((1, heads[0], *s), jnp.int32) for s in shapes]
    return q, k, k, BlockMask(*idx, 16, 16, 16 * query_blocks, 16 * key_blocks)


def test_lists_that_scalar_memory_has_no_room_for_are_refused():
    def forward(together):
        config = KernelConfig(blocks_together=together, resident=False)
        return lambda *a: block_sparse_attention(*a, impl="tpu", config=config)

    def backward(*a):
        return jax.vjp(lambda q, k, v: forward(1)(q, k, v, a[3]), *a[:3])[1](a[0])

    assert aot.compile_kernel(forward(1), "v5e:2x2", *lists(16, 65536, (1, 1))).kernels() == 1
    for run, shapes in ((forward(1), (16, 131072, (1, 1))), (forward(2), (16, 65536, (1, 1))),
                        (backward, (1 << 14, 16, (8, 1)))):  # fmt: skip
        with pytest.raises(ValueError, match="KB of scalar memory of 1024"):
            aot.compile_kernel(run, "v5e:2x2", *lists(*shapes))


def test_more_log_sum_exps_than_vmem_has_room_for_are_refused():
    q, k, v, mask = lists(1 << 18, 16, (1, 1))
    idx = jax.ShapeDtypeStruct((1, 1, 16, 64), jnp.int32)  # short lists of very many queries
    mask = BlockMask(mask.kv_idx, mask.kv_cnt, idx, mask.q_cnt, 16, 16, mask.q_size, mask.kv_size)

    def backward(q, k, v, mask):
        return jax.vjp(lambda *a: block_sparse_attention(*a, mask, impl="tpu"), q, k, v)[1](q)

    with pytest.raises(ValueError, match="MB of VMEM"):
        aot.compile_kernel(backward, "v5p:2x2x1", q, k, v, mask)


def test_no_kernel_is_compiled_for_a_machine_without_tpu():
    arrays = [jnp.zeros((1, h, 32, 16)) for h in (2, 2, 2)]
    mask = BlockMask.dense(block_q=16, block_k=16, q_size=32, kv_size=32)
    with pytest.raises(ValueError, match="no TPU"):
        block_sparse_attention(*arrays, mask, impl="tpu")
