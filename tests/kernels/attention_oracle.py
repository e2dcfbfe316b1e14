"""Attention over active blocks in float64 numpy, written from the definition: one head and one pair of tokens at a time."""

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
        g = h // shared
        for i in range(queries):
            seen = np.flatnonzero(ok[b, h, i])
            if not len(seen):
                continue
            s = k[b, g, seen] @ q[b, h, i] * scale
            z = s if cap is None else cap * np.tanh(s / cap)
            top = z.max()
            w = np.exp(z - top)
            lse[b, h, i] = top + np.log(w.sum())
            w /= w.sum()
            weights[b, h, i, seen] = w
            out[b, h, i] = w @ v[b, g, seen]
            if dout is None:
                continue
            do, dl = np.asarray(dout, np.float64)[b, h, i], np.asarray(dlse, np.float64)[b, h, i]
            dw = v[b, g, seen] @ do
            dz = w * (dw - w @ dw) + w * dl
            ds = (dz if cap is None else dz * (1 - np.tanh(s / cap) ** 2)) * scale
            grads[0][b, h, i] += ds @ k[b, g, seen]
            grads[1][b, g, seen] += ds[:, None] * q[b, h, i]
            grads[2][b, g, seen] += w[:, None] * do
    return (out, lse, weights) if dout is None else (out, lse, grads)


def same(ours, wanted, atol):
    """Assert equality where finite and the same infinities; never true of not-a-number."""
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    assert not np.isnan(ours).any()
    finite = np.isfinite(wanted)
    assert np.array_equal(ours[~finite], wanted[~finite])
    np.testing.assert_allclose(ours[finite], wanted[finite], rtol=0, atol=atol)
