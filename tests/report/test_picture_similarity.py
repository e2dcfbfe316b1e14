"""Signal-to-noise ratio and structural similarity of pictures, against their definitions."""

import numpy as np
import pytest

from jprune.report.similarity import psnr, ssim


def test_decibels():
    assert psnr(np.zeros((3, 3)), np.full((3, 3), 0.2)) == pytest.approx(20.0)  # 10 log10(4 / 0.04)
    assert psnr(np.zeros(5), np.full(5, 0.1), span=1.0) == pytest.approx(20.0)
    assert psnr(np.ones(2), np.ones(2)) == np.inf


def test_structural_similarity_is_the_mean_over_whole_windows():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 2, 10, 9))
    found, (c1, c2) = [], (0.02**2, 0.06**2)
    for x, y in zip(a, b, strict=True):
        for i in range(4):
            for j in range(3):
                p, q = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
                (vx, cov), (_, vy) = np.cov(p, q)
                luminance = (2 * p.mean() * q.mean() + c1) / (p.mean() ** 2 + q.mean() ** 2 + c1)
                found.append(luminance * (2 * cov + c2) / (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0) and ssim(a, b) < 0.2


def test_frames_that_cannot_be_compared_are_refused():
    for a, b in (((1, 6, 9), (1, 6, 9)), ((1, 9, 9), (2, 9, 9)), ((9, 9), (9, 9))):
        with pytest.raises(ValueError, match="at least 7 high and wide"):
            ssim(np.zeros(a), np.zeros(b))
