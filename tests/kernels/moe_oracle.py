"""A mixture of experts in float64 numpy, written from the definition, one active pair of a token and an expert at a time."""

import numpy as np


def moe(x, scores, active, up, down, dy=None):
    """y, and with a cotangent also (dx, dscores, dup, ddown); nothing is read of pairs that are not active."""
    x, scores, up, down = (np.asarray(a, np.float64) for a in (x, scores, up, down))
    y = np.zeros_like(x)
    grads = [np.zeros_like(a) for a in (x, scores, up, down)]
    for t, e in zip(*np.nonzero(active)):
        h = x[t] @ up[e]
        gate = 1 / (1 + np.exp(-h))
        y[t] += (scores[t, e] * h * gate) @ down[e]
        if dy is not None:
            d = np.asarray(dy[t], np.float64)
            g = down[e] @ d
            dh = scores[t, e] * g * (gate + h * gate * (1 - gate))
            grads[0][t] += up[e] @ dh
            grads[1][t, e] = (h * gate) @ g
            grads[2][e] += np.outer(x[t], dh)
            grads[3][e] += np.outer(scores[t, e] * h * gate, d)
    return y if dy is None else (y, tuple(grads))


def draw(seed, tokens, experts, width, hidden, density=0.3, dtype=np.float32):
    """(x, scores, active, up, down, cotangent): some scores negative or 0 where active, all 0 elsewhere."""
    rng = np.random.default_rng(seed)
    active = rng.random((tokens, experts)) < density
    scores = np.where(active, rng.normal(size=active.shape), 0).astype(np.float32)
    scores[:: max(1, tokens // 3), 0] = 0  # active or not, as it comes
    x, dy = (rng.normal(size=(tokens, width)).astype(np.float32) for _ in range(2))
    up = rng.normal(size=(experts, width, hidden)) / np.sqrt(width)
    down = rng.normal(size=(experts, hidden, width)) / np.sqrt(hidden)
    return x.astype(dtype), scores, active, up.astype(dtype), down.astype(dtype), dy.astype(dtype)


def same(got, want, tolerance):
    """Assert that an array is finite and within a part of the largest wanted number (or of 1)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max(initial=0)))
