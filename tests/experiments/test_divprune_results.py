"""The committed results of DivPrune's experiment: complete, summed up as the program does, and judged by checks that can fail."""

import copy
import json

import numpy as np
import pytest

from experiments import divprune
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
