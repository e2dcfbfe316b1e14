"""The Hopper kernels on the chip itself, against dense attention: for its owners, `python -m pytest -m gpu tests/kernels`.

Here and in CI there is no such chip and every test is skipped; what stands for it then is in `test_mosaic_gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_score import block_scores, search_attention
from pallas_kernels.block_sparse_attention import BlockMask, block_sparse_attention

WAY = {"impl": "mosaic_gpu"}
SHAPES = {
    "64": (64, 64, 64, 64),
    "64, odd heads": (64, 64, 80, 48),
    "64 with 128 keys": (64, 128, 128, 128),
    "128": (128, 128, 128, 128),
    "128 with 64 keys": (128, 64, 96, 128),
    "256, large heads": (256, 256, 256, 256),
}  # block_q, block_k, features, values
RULES = {
    "none": {},
    "causal": {"causal": True, "q_offset": 37},
    "lengths": {"q_len": 700, "kv_len": 611},
    "segments": {"q_segment_ids": "q", "kv_segment_ids": "kv"},
    "all": {
        "causal": True,
        "q_offset": 200,
        "kv_len": 900,
        "q_segment_ids": "q",
        "kv_segment_ids": "kv",
        "soft_cap": 5.0,
    },
}


@pytest.fixture(autouse=True)
def chip():
    kind = jax.devices()[0].device_kind
    if not any(name in kind for name in ("H100", "H200", "GH200")) and "interpret" not in WAY:
        pytest.skip(f"the device is {kind}: these kernels run on an NVIDIA H100 or H200 only")


def problem(name, dtype, seed=0, queries=790, keys=930, heads=(4, 2)):
    block_q, block_k, features, values = SHAPES[name]
    rng, (h, g) = np.random.default_rng(seed), heads
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, n, t, d)), dtype)
        for n, t, d in ((h, queries, features), (g, keys, features), (g, keys, values))
    )
    active = rng.random((2, h, -(-queries // block_q), -(-keys // block_k))) < 0.4
    active[0, 0, 0], active[1, 1, -1] = False, True
    mask = BlockMask.from_dense(active, block_q=block_q, block_k=block_k, q_size=queries, kv_size=keys)
    return q, k, v, mask.with_transpose()


def options(rules, queries, keys):
    ids = {"q": np.arange(queries) // 190 * np.ones((2, 1), int), "kv": np.arange(keys) // 300 * np.ones((2, 1), int)}
    return {n: jnp.asarray(ids[x], jnp.int32) if isinstance(x, str) else x for n, x in RULES[rules].items()}


def differentiated(how, mask, rules, q, k, v, dout, dlse):
    attend = functools.partial(block_sparse_attention, mask=mask, return_lse=True, **rules, **how)
    (out, lse), back = jax.vjp(attend, q, k, v)
    return out, lse, *back((dout.astype(out.dtype), dlse))


def agree(ours, wanted, relative):
    for x, y in zip(ours, wanted, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.array_equal(np.isneginf(x), np.isneginf(y))
        x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        assert np.linalg.norm(x - y) <= relative * np.linalg.norm(y)


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_and_gradients_are_the_dense_ones(name, dtype, rules):
    q, k, v, mask = problem(name, dtype)
    rng = np.random.default_rng(1)
    dout, dlse = (jnp.asarray(rng.normal(size=(*q.shape[:3], *d)), jnp.float32) for d in ((v.shape[-1],), ()))
    how = options(rules, q.shape[2], k.shape[2])
    ours = jax.jit(functools.partial(differentiated, WAY, mask, how))(q, k, v, dout, dlse)
    again = jax.jit(functools.partial(differentiated, WAY, mask, how))(q, k, v, dout, dlse)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    agree(ours, jax.jit(functools.partial(differentiated, {"impl": "reference"}, mask, how))(*exact, dout, dlse), 2e-2)
    for x, y in zip(ours, again):
        assert np.array_equal(x, y)  # and not-a-number equals nothing


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_what_lies_in_blocks_that_nobody_visits_reaches_nothing(name):
    q, k, v, mask = problem(name, jnp.bfloat16)
    active = np.asarray(mask.to_dense()).copy()
    active[..., 1] = False
    mask = BlockMask.from_dense(
        active, block_q=mask.block_q, block_k=mask.block_k, q_size=q.shape[2], kv_size=k.shape[2]
    ).with_transpose()
    run = jax.jit(functools.partial(differentiated, WAY, mask, {}))
    dout, dlse = jnp.ones((*q.shape[:3], v.shape[-1])), jnp.ones(q.shape[:3])
    at = slice(mask.block_k, 2 * mask.block_k)
    planted = (x.at[:, :, at].set(jnp.nan) for x in (k, v))
    for x, y in zip(run(q, k, v, dout, dlse), run(q, *planted, dout, dlse)):
        assert np.array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_search_and_masses_are_the_dense_ones(name, rules):
    q, k, v, mask = problem(name, jnp.bfloat16)
    how = options(rules, q.shape[2], k.shape[2]) | {"block_q": mask.block_q, "block_k": mask.block_k}
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    ours = search_attention(q, k, v, **how, **WAY)
    wanted = search_attention(*exact, **how, impl="reference")
    agree(ours, wanted, 2e-2)
    masses = block_scores(q, k, wanted[1], **how, **WAY)
    agree([masses, ours[2]], [wanted[2]] * 2, 1e-3)
