"""How near one picture comes to another: peak signal-to-noise ratio and structural similarity. Host-side, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.ndimage import uniform_filter


def psnr(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"], span: float = 2.0) -> float:
    """Peak signal-to-noise ratio in decibels, for values that span so much (2: from -1 to 1); infinite for equal ones.

    >>> round(psnr(np.zeros(4), np.full(4, 0.2)), 2)
    20.0
    """
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(span**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def ssim(
    a: Float[np.ndarray, ...],
    b: Float[np.ndarray, ...],
    window: int = 7,
    span: float = 2.0,
) -> float:
    """Mean structural similarity of (frames, height, width) whose values span so much (Wang et al. 2004, with a uniform window).

    Raises:
      ValueError: shapes differ, are no frames, or are smaller than the window.

    >>> frames = np.random.default_rng(0).uniform(-1, 1, (2, 9, 9))
    >>> round(ssim(frames, frames), 6)
    1.0
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < window:
        raise ValueError(f"frames {a.shape} and {b.shape}: give two of one shape (frames, height, width), "
                         f"at least {window} high and wide")  # fmt: skip
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    size: Any = (1, window, window)
    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = uniform_filter(x, size), uniform_filter(y, size)
    n = window**2 / (window**2 - 1)
    vx, vy, cov = (
        n * (uniform_filter(p * q, size) - mp * mq) for p, q, mp, mq in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    pad = window // 2
    return float(found[:, pad : a.shape[1] - pad, pad : a.shape[2] - pad].mean())
