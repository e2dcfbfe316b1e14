"""Sparsity schedules against their closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.budget import Schedule

KINDS = ("one_shot", "linear", "cubic", "exponential")


def test_closed_forms():
    assert list(Schedule("one_shot", 1, 0.3)) == [pytest.approx(0.3)]
    np.testing.assert_allclose(list(Schedule("one_shot", 3, 0.4)), [0.4, 0.4, 0.4])
    np.testing.assert_allclose(list(Schedule("linear", 4, 0.2)), [0.8, 0.6, 0.4, 0.2])
    # Zhu and Gupta: s_t = s (1 - (1 - t/n)^3), so half the steps remove 7/8
    np.testing.assert_allclose(list(Schedule("cubic", 2, 0.2)), [1 - 0.8 * 7 / 8, 0.2])
    np.testing.assert_allclose(
        list(Schedule("cubic", 4, 0.5)), [1 - 0.5 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)]
    )
    np.testing.assert_allclose(list(Schedule("exponential", 3, 0.125)), [0.5, 0.25, 0.125])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 50), st.floats(1e-3, 1))
def test_from_everything_down_to_the_target(kind, steps, keep):
    schedule = Schedule(kind, steps, keep)
    kept = [schedule(t) for t in range(steps + 1)]
    assert kept[0] == 1.0 and kept[-1] == pytest.approx(keep, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(kept)) and min(kept) > 0
    assert kept[1:] == list(schedule)
    if kind == "cubic" and keep < 0.999 and steps > 1:  # most goes first (nearer to 1 rounding hides it)
        gone = -np.diff(kept)
        assert (np.diff(gone) < 0).all()


def test_what_is_refused():
    for kind, steps, keep, word in (
        ("quadratic", 1, 0.5, "quadratic"),
        ("linear", 0, 0.5, "at least 1 step"),
        ("linear", 1, 0.0, "sparsity is 1 minus it"),
        ("linear", 1, 1.1, "1.1"),
        ("linear", 1, float("nan"), "nan"),
    ):
        with pytest.raises(ValueError, match=word):
            Schedule(kind, steps, keep)
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step {step} is outside 0..4"):
            Schedule("linear", 4, 0.5)(step)
