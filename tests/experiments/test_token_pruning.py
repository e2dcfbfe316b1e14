"""Digits on canvases, and the experiment with token reducers: its checks can fail, and at its smallest it runs."""

import numpy as np
import pytest

from experiments import compared_reducers, digit_canvas, digit_reader, token_pruning
from experiments.digit_canvas import NOISE, calibration_set, digits, place


def test_a_canvas_shows_its_digit_where_it_is_said_to():
    images, _, labels, _ = digits(0)
    rng = np.random.default_rng(0)
    found = place(images[:5], labels[:5], rng)
    again = np.random.default_rng(0)
    canvas = again.uniform(0, NOISE, (5, 16, 16)).astype(np.float32)
    corner = again.integers(0, 9, (2, 5))
    for i in range(5):
        y, x = corner[:, i]
        canvas[i, y : y + 8, x : x + 8] = np.maximum(canvas[i, y : y + 8, x : x + 8], images[i])
        padded = np.pad(canvas[i], 1)
        for row in range(8):
            for column in range(8):
                window = padded[2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
                tile = found.images[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4, 0]
                np.testing.assert_array_equal(tile, window)
                assert found.shown[i, 8 * row + column] == (window[1:3, 1:3].max() > 0.4)
    assert found.labels.tolist() == labels[:5].tolist()


def test_test_sets_are_fixed_and_apart_from_training():
    one, two = digit_canvas.test_set(0), digit_canvas.test_set(0)
    assert one.images.shape == (1000, 32, 32, 1) and (one.images == two.images).all()
    assert one.labels[:500].tolist() == one.labels[500:].tolist() and not (one.images[:500] == one.images[500:]).all()
    assert 0.12 < one.shown.mean() < 0.18
    training, testing, *_ = digits(1)
    assert (len(training), len(testing)) == (1297, 500)
    assert len(calibration_set(1, 7).labels) == 7


def test_sizes_are_those_of_the_model():
    dims = digit_canvas.sizes()
    assert (dims.width, dims.depth, dims.patches, dims.prefix, dims.patch_inputs, dims.classes) == (
        32,
        6,
        64,
        1,
        16,
        10,
    )
    cost = compared_reducers.count_macs(compared_reducers.by_stages((24, 12, 8, 6)), dims)["fraction"]
    assert cost == pytest.approx(0.297, abs=5e-3)
    cost = compared_reducers.count_macs(compared_reducers.by_stages((44, 32, 24, 16), 0.4), dims)["fraction"]
    assert cost == pytest.approx(0.475, abs=5e-3)


def test_auroc():
    shown = np.array([[True, False, False, True]])
    assert digit_reader.auroc(np.array([[4.0, 1.0, 2.0, 3.0]]), shown) == 1.0
    assert digit_reader.auroc(np.array([[1.0, 1.0, 1.0, 1.0]]), shown) == 0.5
    assert digit_reader.auroc(np.array([[4.0, 1.0, 2.0, 1.5]]), shown) == 0.75


def outcome(**changed):
    """Results in which all checks hold, but for what is changed."""
    values = {
        "full": 0.95, "auroc": 0.97, "votes": 0.9, "random": 0.3, "grid": 0.3, "wrong": 0.4, "diverse": 0.85, "diverse32": 0.92,
        "stages": 0.9, "alone": 0.88, "mild": 0.94, "gap": 1e-6, **changed,
    }  # fmt: skip
    m = {k: {"mean": v, "std": 0.0} for k, v in values.items()}
    at20 = {"PageRank, 5 votes": m["votes"], "random": m["random"], "grid": m["grid"], "wrong transpose": m["wrong"],
            "DivPrune": m["diverse"]}  # fmt: skip
    return {
        "full": m["full"],
        "localisation": {"0": {"PageRank, 5 votes": m["auroc"]}},
        "entry": {"32": {"DivPrune": m["diverse32"]}, "20": at20},
        "network": {
            "mild": {"Zero-TPrune": m["mild"]},
            "hard": {"Zero-TPrune": m["stages"], "importance, 5 votes": m["alone"]},
        },
        "hidden against dropped": m["gap"],
    }


def test_checks_can_fail():
    assert all(d.holds for d in token_pruning.demands({"results": outcome()}).values())
    for changed, number in (
        ({"auroc": 0.9}, 1), ({"votes": 0.8}, 1), ({"random": 0.6, "grid": 0.2}, 2), ({"wrong": 0.7}, 1), ({"alone": 0.91}, 1),
        ({"mild": 0.92}, 1), ({"gap": 1e-3}, 1), ({"grid": 0.6}, 1), ({"diverse": 0.79}, 1), ({"diverse32": 0.87}, 1),
    ):  # fmt: skip
        failed = [what for what, d in token_pruning.demands({"results": outcome(**changed)}).items() if not d.holds]
        assert len(failed) == number, (changed, failed)


@pytest.mark.slow
def test_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setenv("JPRUNE_CACHE", str(tmp_path / "cache"))
    few = {"zero_tprune", "tome", "random"}
    rows = ["full", "0", "DivPrune", "PageRank, 5 votes", "Zero-TPrune", "ToMe", "0.6", "hidden against dropped"]
    small = "--recipe.epochs 1 --images 8 --kept 32 20 --fractions 0.6 --searched 0.6 --trials 2 --few 8 --methods"
    out = ["--seeds", "0", "--out", str(tmp_path / "small.json"), "--rows", *rows]
    stored = token_pruning.STUDY.main([*out, *small.split(), *sorted(few)])
    results = stored["results"]
    assert results["hidden against dropped"]["mean"] <= 1e-4 and set(results["localisation"]) == {"0"}
    assert set(results["curves"]) == few and set(results["entry"]) == {"32", "20"} and len(results["network"]) == 2
    for cost in stored["costs"]["curves"].values():
        assert abs(cost["0.6"]["fraction"] / 0.6 - 1) <= 0.01
    assert set(results["searched"]["0.6"]) == {"calibration", "held_out"}
