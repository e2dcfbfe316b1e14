"""Attention over active blocks in float64 numpy, written from the definition, one head at a time."""

import numpy as np


def allowed(active, block_q, block_k, queries, keys, *, offset=None, q_len=None, kv_len=None, q_seg=None, kv_seg=None):
    """bool (batch, heads, queries, keys) of flags a block and rules a token; rules are arrays over the batch."""
    ok = np.repeat(np.repeat(active, block_q, 2), block_k, 3)[:, :, :queries, :keys].copy()
    i, j = np.arange(queries)[:, None], np.arange(keys)[None]
    for b in range(ok.shape[0]):
        if offset is not None:
            ok[b] &= j <= i + offset[b]
        if q_len is not None:
            ok[b] &= i < q_len[b]
        if kv_len is not None:
            ok[b] &= j < kv_len[b]
        if q_seg is not None:
            ok[b] &= q_seg[b][:, None] == kv_seg[b][None]
    return ok


def attention(q, k, v, ok, *, scale=None, cap=None, dout=None, dlse=None):
    """(out, lse, weights) of pairs that are `ok`, and with cotangents also (dq, dk, dv)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, heads, queries, d = q.shape
    shared = heads // k.shape[1]
    scale = d**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, heads, queries, v.shape[-1])), np.full((batch, heads, queries), -np.inf)
    weights = np.zeros(ok.shape)
    grads = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(batch, heads):
        g, seen = h // shared, ok[b, h]
        alive = seen.any(1)
        reached = seen.any(0)  # what lies in keys that nobody sees reaches nothing
        key, value = (np.where(reached[:, None], x[b, g], 0) for x in (k, v))
        s = q[b, h] @ key.T * scale
        z = np.where(seen, s if cap is None else cap * np.tanh(s / cap), -np.inf)
        top = np.where(alive, z.max(1), 0)
        w = np.exp(z - top[:, None])
        total = w.sum(1)
        lse[b, h, alive] = (top + np.log(np.where(alive, total, 1)))[alive]
        w /= np.where(alive, total, 1)[:, None]
        weights[b, h], out[b, h] = w, w @ value
        if dout is None:
            continue
        do, dl = (np.asarray(x, np.float64)[b, h] for x in (dout, dlse))
        dw = do @ value.T
        dz = w * (dw - (w * dw).sum(1, keepdims=True) + dl[:, None])
        ds = (dz if cap is None else dz * (1 - np.tanh(s / cap) ** 2)) * scale
        grads[0][b, h] = ds @ key
        grads[1][b, g] += ds.T @ q[b, h]
        grads[2][b, g] += w.T @ do
    return (out, lse, weights) if dout is None else (out, lse, grads)


def same(ours, wanted, atol):
    """Assert equality where finite and the same infinities; never true of not-a-number."""
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    assert not np.isnan(ours).any()
    finite = np.isfinite(wanted)
    assert np.array_equal(ours[~finite], wanted[~finite])
    np.testing.assert_allclose(ours[finite], wanted[finite], rtol=0, atol=atol)
