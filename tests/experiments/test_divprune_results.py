"""The committed results of DivPrune's experiment: complete, summed up as the program does, and judged by checks that can fail."""

import copy
import json

import numpy as np
import pytest

from experiments import divprune
from experiments.benchmarks import divprune_cost
from experiments.divprune import METHODS, RESULTS, Setting, checks, digits, measured, summary


def stored():
    return json.loads((RESULTS / "divprune-digits.json").read_text())


def test_the_file_is_what_the_program_makes_of_its_draws():
    r = stored()
    seeds = [r["seeds"][str(s)] for s in (0, 1, 2)]
    assert r["command"] == "python -m experiments.divprune --config digits --seeds 0 1 2"
    assert r["results"] == json.loads(json.dumps(summary(seeds)))
    assert r["checks"] == checks(seeds, r["cost"])
    assert set(r["results"]) == {"all", *map(str, Setting().counts)}


def test_checks_can_fail():
    r = stored()
    seeds = [copy.deepcopy(r["seeds"][str(s)]) for s in (0, 1, 2)]
    for one in seeds:
        for k in ("32", "56", "144"):
            one[k]["divprune"] = dict(one[k]["random"])
    assert not any(checks(seeds, {"ratio": 41.0}).values())


def test_measures_of_one_draw():
    """Against numpy, for eight tokens."""
    x, y, questions, answers = (np.asarray(a) for a in digits(30, 0))
    index = np.arange(0, 24, 3)
    got = measured(x, y, questions, answers, index, 40.0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = 1 - unit @ unit[index].T
    np.testing.assert_allclose(got["cover_radius"], apart.min(1).max(), atol=1e-5)
    np.testing.assert_allclose(got["min_distance"], (apart[index] + 9 * np.eye(8)).min(), atol=1e-5)
    cosine = questions / np.linalg.norm(questions, axis=1, keepdims=True) @ unit[index].T
    assert got["nearest"] == pytest.approx((y[index][cosine.argmax(1)] == answers).mean(), abs=1e-6)
    weight = np.exp(40 * cosine) @ np.eye(10)[y[index]]
    assert got["attention"] == pytest.approx((weight.argmax(1) == answers).mean(), abs=2e-3)


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(divprune, "timed", lambda setting: {**stored()["cost"], "ratio": 20.0})
    divprune.main(setting=Setting(tokens=150, draws=2), seeds=(0,), out=tmp_path / "d.json")
    r = json.loads((tmp_path / "d.json").read_text())
    assert set(r["results"]["8"]) == set(METHODS) and (tmp_path / "divprune-digits.png").stat().st_size > 5000
    divprune.main(out=tmp_path / "d.json", redraw=True)


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
