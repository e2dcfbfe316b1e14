"""The same attention in PyTorch: scaled dot product attention with a boolean mask, gradients included, and FlexAttention."""

import jax
import numpy as np
import pytest
from attention_oracle import allowed, same

from experiments.peers import peer
from pallas_kernels.block_sparse_attention import BlockMask, block_sparse_attention

pytestmark = pytest.mark.reference
B, H, G, N, D, BLOCK = 2, 4, 2, 256, 32, 64


def problem(seed):
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.normal(size=(B, h, N, D)).astype(np.float32) for h in (H, G, G, H))
    active = rng.random((B, H, N // BLOCK, N // BLOCK)) < 0.5
    active[:, :, :, 0] = True  # torch has no rows without keys
    mask = BlockMask.from_dense(active, block_q=BLOCK, block_k=BLOCK, q_size=N, kv_size=N)
    return q, k, v, dout, active, mask


def test_values_and_gradients_are_those_of_scaled_dot_product_attention():
    torch = peer("torch")
    q, k, v, dout, active, mask = problem(0)
    ok = allowed(active, BLOCK, BLOCK, N, N, offset=[0, 0])
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=torch.tensor(ok), enable_gqa=True)
    wanted.backward(torch.tensor(dout))
    out, back = jax.vjp(lambda *a: block_sparse_attention(*a, mask, causal=True, impl="xla"), q, k, v)
    same(out, wanted.detach(), 2e-5)
    for ours, t in zip(back(dout), tensors):
        same(ours, t.grad, 1e-4)


def test_values_and_log_sum_exps_are_those_of_flex_attention():
    torch = peer("torch")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, _, active, mask = problem(1)
    flags = torch.tensor(active)
    theirs = create_block_mask(lambda b, h, i, j: flags[b, h, i // BLOCK, j // BLOCK], B, H, N, N, device="cpu",
                               BLOCK_SIZE=BLOCK)  # fmt: skip
    wanted, lse = flex_attention(*(torch.tensor(x) for x in (q, k, v)), block_mask=theirs, enable_gqa=True,
                                 return_lse=True)  # fmt: skip
    ours = block_sparse_attention(q, k, v, mask, return_lse=True, impl="xla")
    same(ours[0], wanted, 2e-5)
    same(ours[1], lse, 2e-5)
