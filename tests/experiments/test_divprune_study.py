"""DivPrune's experiment: what it measures, demands that can fail, and what the choice costs."""

import copy
import json

import numpy as np
import pytest

from experiments import digit_tokens, divprune
from experiments.benchmarks import RESULTS, divprune_cost


def test_demands_can_fail():
    """Where DivPrune is no better than chance, nothing is shown."""
    of = {"min_distance": 0.1, "best_min_distance": 0.1, "cover_radius": 0.5, "nearest": 0.5, "attention": 0.5}
    ours = {"min_distance": 0.31, "cover_radius": 0.44, "nearest": 0.6, "attention": 0.6}

    def judged(ours, ratio):
        counts = {k: {"divprune": ours, "random": of} for k in ("32", "56", "144")}
        stored = divprune.STUDY.summed({"seeds": {"0": counts}, "cost": {"ratio": ratio}}, judge=True)
        return list(stored["checks"].values())

    assert judged(ours, 25.0) == [True] * 6
    assert judged({**ours, "min_distance": 0.29}, 25.0) == [False, True, True, True, True, True]
    assert judged({**ours, "min_distance": 0.19}, 25.0) == [False, False, True, True, True, True]
    assert judged({**ours, "cover_radius": 0.46}, 41.0) == [True, True, False, True, True, False]
    assert judged({**ours, "nearest": 0.4, "attention": 0.4}, 1.0)[3:] == [False, False, True]


def test_measures_of_one_draw():
    """Against numpy, for eight tokens."""
    digits = digit_tokens.draw(30, 0)
    x, y, questions, answers = (np.asarray(a) for a in digits)
    index = np.arange(0, 24, 3)
    got = digit_tokens.measured(digits, index, 40.0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = 1 - unit @ unit[index].T
    np.testing.assert_allclose(got["cover_radius"], apart.min(1).max(), atol=1e-5)
    np.testing.assert_allclose(got["min_distance"], (apart[index] + 9 * np.eye(8)).min(), atol=1e-5)
    cosine = questions / np.linalg.norm(questions, axis=1, keepdims=True) @ unit[index].T
    assert got["nearest"] == pytest.approx((y[index][cosine.argmax(1)] == answers).mean(), abs=1e-6)
    weight = np.exp(40 * cosine) @ np.eye(10)[y[index]]
    assert got["attention"] == pytest.approx((weight.argmax(1) == answers).mean(), abs=2e-3)


@pytest.mark.slow
def test_it_runs(tmp_path):
    out = ["--out", str(tmp_path / "d.json")]
    sizes = "--sizes 40 4 80 8 --rounds 2"
    r = divprune.STUDY.main([*out, "--seeds", "0", "--tokens", "150", "--draws", "2", *sizes.split()])
    assert set(r["results"]["8"]) == {"divprune", "random", "norm_topk", "uniform_grid"}
    assert r["cost"]["ratio_of_k_m"] == 4 and (tmp_path / "d.png").stat().st_size > 5000


def test_the_committed_costs_are_judged_as_the_program_does():
    r = json.loads((RESULTS / "divprune-cost.json").read_text())
    found = r["results"]
    assert r["checks"] == divprune_cost.checks(found) and "shared" in r["note"]
    assert found["counted"] == divprune_cost.counted(divprune_cost.Setting())
    assert all(t["equal"] == t["kept"] for t in found["torch"])  # the same tokens in the same order
    slow = copy.deepcopy(found)
    slow["layer"]["share"] = 0.03
    for p in slow["prefill"]:
        p["pruned"] = p["whole"]
    for c in slow["counted"]:
        c["share"] = 0.02
    for t in slow["torch"]:
        t["times_faster"] = 0.9
    assert not any(divprune_cost.checks(slow).values())


def test_what_is_counted():
    """A choice of 56 of 576 tokens: products of all pairs and one pass a token, beside the 7B model's own products."""
    row = next(c for c in divprune_cost.counted(divprune_cost.Setting()) if c["kept"] == 56)
    assert row["choose"] == 2 * 576**2 * 4096 + 2 * 56 * 576
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    attention = 4 * 4096 * ((40 + 576) ** 2 - (40 + 56) ** 2)
    assert row["saved"] == 32 * (2 * 520 * layer + attention)
