"""The TPU kernels in a simulation of the chip's memories: no copy is awaited too late, nothing is read before it is written.

Uninitialised memory is not-a-number there, reads out of bounds raise, and accesses that no semaphore orders are races.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed, attention, same
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulation
from jax.experimental.pallas import tpu as pltpu
from quick import QUICK

from pallas_kernels.block_score import search_attention
from pallas_kernels.block_sparse_attention import BlockMask, KernelConfig, block_sparse_attention

pytestmark = pytest.mark.slow
CHIP = pltpu.InterpretParams(out_of_bounds_reads="raise", detect_races=True, uninitialized_memory="nan")
TPU = {"impl": "tpu", "interpret": CHIP}
PLAIN, WIDE = KernelConfig(step_tokens=32), KernelConfig(step_tokens=32, blocks_together=2, resident=True)
H, G, N = 2, 1, 64


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, h, N, d)).astype(np.float32) for h, d in ((H, 8), (G, 8), (G, 12), (H, 12))]


def quiet(run):
    """What `run` returns, with no race on the way."""
    try:
        out = jax.block_until_ready(run())
        assert not simulation.races.races_found, "RACE DETECTED"  # which jax 0.12 says itself
        return out
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(("causal", "config"), [(False, PLAIN), (True, WIDE)])
def test_forward_and_gradients(causal, config):
    q, k, v, dout = arrays(0)
    active = np.random.default_rng(1).random((1, H, 4, 4)) < 0.6
    active[0, 0, 1], active[0, 1, 2], active[0, :, :, 3] = False, True, False  # none, all, never
    mask = BlockMask.from_dense(active, block_q=16, block_k=16, q_size=N, kv_size=N).with_transpose()
    rules = {"causal": True, "q_offset": 20, "kv_len": 54} if causal else {}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, dout):
        (out, lse), back = jax.vjp(
            lambda *a: block_sparse_attention(*a, mask, return_lse=True, config=config, **rules, **TPU), q, k, v
        )
        return out, lse, back((dout, jnp.zeros_like(lse)))

    ok = allowed(active, 16, 16, N, N, **({"offset": [20], "kv_len": [54]} if causal else {}))
    out, lse, grads = attention(q, k, v, ok, dout=dout, dlse=np.zeros((1, H, N)))
    got = quiet(lambda: run(q, k, v, dout))
    same(got[0], out, 2e-5)
    same(got[1], lse, 2e-5)
    for ours, wanted in zip(got[2], grads):
        same(ours, wanted, 1e-4)


@pytest.mark.parametrize("passes", [1, 2])
def test_block_masses(passes):
    q, k, v, _ = arrays(2)
    options = {"block_q": 16, "block_k": 16, "causal": True, "config": KernelConfig(passes=passes), **TPU}
    run = jax.jit(lambda *a: search_attention(*a, **options), compiler_options=QUICK)
    out, lse, masses = quiet(lambda: run(q, k, v))
    wanted = attention(q, k, v, allowed(np.ones((1, H, 4, 4), bool), 16, 16, N, N, offset=[0]))
    same(out, wanted[0], 2e-5)
    same(lse, wanted[1], 2e-5)
    same(masses, wanted[2].reshape(1, H, 4, 16, 4, 16).sum((3, 5)), 1e-4)


def test_a_race_would_be_seen():
    def kernel(x, out, scratch, semaphore):
        copy = pltpu.make_async_copy(x, scratch, semaphore)
        copy.start()
        out[...] = scratch[...]  # not awaited
        copy.wait()

    from jax.experimental import pallas as pl

    call = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((8, 128), np.float32), in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), np.float32), pltpu.SemaphoreType.DMA(())], interpret=CHIP,
    )  # fmt: skip
    with pytest.raises((AssertionError, RuntimeError), match="RACE DETECTED"):
        quiet(lambda: call(np.ones((8, 128), np.float32)))
