"""The attention kernels are accepted by the compilers of real TPU chips, for the sizes that models have."""

import re

import pytest

from pallas_kernels.common import aot_tpu as aot

aot.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels.block_score import block_scores, search_attention  # noqa: E402
from pallas_kernels.block_sparse_attention import BlockMask, KernelConfig, block_sparse_attention  # noqa: E402

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")]
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def problem(tokens, block, width, features, dtype, heads=(4, 2)):
    """Shapes of (q, k, v, mask with transposes, segment ids)."""
    n = tokens // block
    sizes = {"block_q": block, "block_k": block, "q_size": tokens, "kv_size": tokens}
    mask = jax.eval_shape(
        lambda a: BlockMask.pack(a, width, **sizes)[0].transposed(width)[0],
        jax.ShapeDtypeStruct((1, heads[0], n, n), bool),
    )
    q, k = (jax.ShapeDtypeStruct((1, h, tokens, features), jnp.dtype(dtype)) for h in heads)
    return q, k, k, mask, jax.ShapeDtypeStruct((1, tokens), jnp.int32)


def gradients(rules, **config):
    def run(q, k, v, mask, ids):
        options = {"causal": True, "soft_cap": 5.0, "q_segment_ids": ids, "kv_segment_ids": ids} if rules else {}
        options["config"] = KernelConfig(**config)
        out, back = jax.vjp(lambda *a: block_sparse_attention(*a, mask, impl="tpu", **options), q, k, v)
        return out, back(out)

    return run


@pytest.mark.parametrize("features", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_forward_and_both_gradients_compile(topology, dtype, features):
    out = aot.compile_kernel(gradients(features in (64, 128)), topology, *problem(4096, 64, 32, features, dtype))
    assert out.kernels() == 3
    assert out.temporary < 64 << 20  # nothing as large as tokens x tokens, 64 MB a head in float32


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_long_sequence_needs_no_more_than_its_arrays(topology):
    shapes = problem(131072, 128, 400, 128, "bfloat16")
    out = aot.compile_kernel(gradients(True), topology, *shapes)
    assert out.kernels() == 3 and out.temporary < 2 * out.output


@pytest.mark.parametrize("block", [16, 128, 256])
def test_blocks_of_other_sizes_compile(block):
    assert aot.compile_kernel(gradients(True), "v5e:2x2", *problem(2048, block, 8, 128, "bfloat16")).kernels() == 3


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_several_blocks_together_compile(topology, features, resident):
    fn = gradients(resident, blocks_together=4, resident=resident)
    assert aot.compile_kernel(fn, topology, *problem(4096, 64, 32, features, "bfloat16")).kernels() == 3


def test_a_head_of_a_video_is_kept_in_vmem_where_it_fits():
    shapes = problem(119296, 64, 380, 128, "bfloat16", heads=(1, 1))

    def forward(q, k, v, mask, ids):
        return block_sparse_attention(q, k, v, mask, impl="tpu", config=KernelConfig(blocks_together=4))

    for topology, fits in (("v5e:2x2", True), ("v5p:2x2x1", False)):  # 61 MB of 128 MB, and of 64
        text = aot.compile_kernel(forward, topology, *shapes).text
        (call,) = (line for line in text.splitlines() if "tpu_custom_call" in line)
        limits = map(int, re.findall(r'"memory_space":"1","offset":"0","size":"([0-9]+)"', call))
        assert (max(limits, default=0) > 2 * 119296 * 128 * 2) == fits


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_block_masses_compile(topology, dtype, rules):
    q, k, v, _, ids = problem(16384, 64, 8, 128, dtype)

    def run(q, k, v, lse, ids):
        options = {"causal": True, "q_segment_ids": ids, "kv_segment_ids": ids} if rules else {}
        options |= {"block_q": 64, "block_k": 64, "impl": "tpu"}
        twice = search_attention(q, k, v, config=KernelConfig(passes=2), **options)
        return search_attention(q, k, v, **options), block_scores(q, k, lse, **options), twice

    out = aot.compile_kernel(run, topology, q, k, v, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32), ids)
    assert out.kernels() == 1 + 1 + 2


def arrays(tokens, features, dtype, heads=(4, 2), queries=None):
    """Shapes of (q, k, v, segment ids)."""
    sizes = ((heads[0], queries or tokens), (heads[1], tokens), (heads[1], tokens))
    return *(jax.ShapeDtypeStruct((1, *n, features), jnp.dtype(dtype)) for n in sizes), jax.ShapeDtypeStruct(
        (1, tokens), jnp.int32
    )


def search(block, **options):
    def run(q, k, v, ids):
        return search_attention(q, k, v, block_q=block, block_k=block, impl="tpu", **options)

    return run


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_search_of_a_whole_video_is_one_pass(topology, block):
    out = aot.compile_kernel(search(block), topology, *arrays(119056, 128, "bfloat16", heads=(2, 2)))
    assert out.kernels() == 1 and out.temporary < 2 * out.argument  # copies; tokens x tokens would be 28 GB a head


@pytest.mark.parametrize(("features", "block"), [(64, 64), (80, 48), (96, 64), (256, 256), (128, 16)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_search_in_one_pass_compiles_for_other_sizes(features, block, dtype):
    def run(q, k, v, ids):
        rules = {"causal": True, "soft_cap": 5.0, "q_segment_ids": ids, "kv_segment_ids": ids} if features != 80 else {}
        return search(block, **rules)(q, k, v, ids)

    assert aot.compile_kernel(run, "v5e:2x2", *arrays(4096, features, dtype)).kernels() == 1


def test_a_search_that_one_pass_has_no_room_for_takes_two_or_says_so():
    shapes = arrays(1 << 23, 64, "bfloat16", heads=(1, 1), queries=4096)
    with pytest.raises(ValueError, match="passes=2"):
        aot.compile_kernel(search(64, config=KernelConfig(passes=1)), "v5p:2x2x1", *shapes)
    assert aot.compile_kernel(search(64), "v5p:2x2x1", *shapes).kernels() == 2


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
