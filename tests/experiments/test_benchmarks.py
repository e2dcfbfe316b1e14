"""The benchmark programs at their smallest: they run, and what they write is complete and consistent."""

import json
import math

import pytest

from experiments import grouping
from experiments.benchmarks import RESULTS, in_turns, language_speed, llama_7b, medians, ratio


def written(path):
    """The record, with what every record must say and nothing about this machine's files."""
    text = path.read_text()
    assert str(path.parent) not in text
    r = json.loads(text)
    assert r["command"].startswith("python -m experiments.")
    assert r["machine"]["platform"] == "cpu" and "cores" in r["machine"]["device"] and r["machine"]["jprune"]
    return r


def test_jobs_take_turns():
    seen, clock = [], [0.0]

    def job(name, seconds):
        seen.append(name)
        clock[0] += seconds * (100 if len(seen) <= 2 else 1)  # the first round is slow

    jobs = {"a": lambda: job("a", 1), "b": lambda: job("b", 5)}
    times = in_turns(jobs, rounds=2, warm_up=1, clock=lambda: clock[0])
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1, 1], "b": [5, 5]}


def test_ratios_are_of_the_same_round():
    times = {"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 1.0]}
    assert ratio(times, "a", "b") == 2.0  # of 0.5, 2, 3
    assert medians(times) == {"a": 3.0, "b": 2.0}


def test_llama(tmp_path):
    llama_7b.main(tmp_path / "llama.json", layers=2)
    r = written(tmp_path / "llama.json")
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    params = 2 * layer + 2 * 32000 * 4096 + 4096
    for name, found in r["results"].items():
        assert found["params"] == params
        assert 0.49 < found["params_fraction"] <= 0.5
        assert found["units"] == 4096 + 2 * (11008 + 32 + 128)  # the stream; hidden widths, heads and value head sizes
        assert found["groups"] == {"unrolled": 1 + 2 * 3, "scanned": 1 + 3}[name]
        assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert r["checks"] and all(r["checks"].values())


def test_grouping(tmp_path):
    out = tmp_path / "grouping.json"
    small = "--blocks 1 --widths 8 --recipe.epochs 1 --recipe.batch-size 256 --shown 0.8 --step 0.1 --rounds 2"
    grouping.STUDY.main(["--seeds", "0", "--out", str(out), *small.split()])
    r = written(out)
    assert set(r["results"]["pruned"]) == set(grouping.CRITERIA)
    for name, row in r["results"]["pruned"].items():
        assert list(row) == ["0.8"]
        assert 0.5 < row["0.8"]["macs_fraction"]["mean"] <= 0.8, name  # a unit of so small a network costs a lot
        assert 0 <= row["0.8"]["accuracy"]["mean"] <= 1
    assert 0.3 < r["results"]["wall_clock"]["macs_fraction"]["mean"] <= 0.5
    assert len(r["checks"]) == 4


def test_grouping_demands_can_fail():
    def judged(**accuracy):
        rows = {name.replace("_", " "): {"0.7": {"accuracy": {"mean": a}}} for name, a in accuracy.items()}
        results = {"pruned": rows, "wall_clock": {"time_fraction": {"mean": 0.95}}}
        return [d.holds for d in grouping.demands({"results": results}).values()]

    assert judged(group_L2=0.9, random=0.83, **{"first-member": 0.79}) == [False, True, False]
    assert judged(group_L2=0.9, random=0.81, **{"first-member": 0.81}) == [True, False, False]


@pytest.mark.reference
def test_dependency_graph(tmp_path):
    from experiments.benchmarks import dependency_graph

    dependency_graph.main(models=("resnet18",), side=64, rounds=1, colds=1, out=tmp_path / "graph.json")
    r = written(tmp_path / "graph.json")
    found = r["results"]["resnet18"]
    assert found["units"] == {"ours": 2880, "theirs": 2880}  # per stage the stream and two blocks: 3 x (64 + ... + 512)
    assert found["channels"] == {"ours": 4800, "theirs": 4800} and found["layers_where_they_prune_more"] == []
    assert found["params_fraction"]["ours"] == found["params_fraction"]["theirs"] < 0.3
    for when in ("cold", "warm"):
        for side, parts in (("ours", ("trace", "score", "allocate", "compact")), ("theirs", ("pruner", "prune"))):
            seconds = found[when][side]
            assert sum(seconds[p] for p in parts) == pytest.approx(seconds["total"])
    assert all(math.isfinite(v) and v > 0 for v in found["ratio"].values())
    assert r["machine"]["torch_pruning"]


@pytest.mark.reference
def test_speedup(tmp_path):
    from experiments.benchmarks import speedup

    speedup.main(models=("digits",), rounds=2, images=4, out=tmp_path / "speedup.json")
    found = written(tmp_path / "speedup.json")["results"]["digits"]
    assert found["batch"] == [4, 8, 8, 1]
    for row in ("ours", "ours, multiples", "torch-pruning"):
        assert 0.4 < found[row]["macs_fraction"] <= 0.5, row
        assert found[row]["efficiency"] == pytest.approx(found[row]["speed_up"] * found[row]["macs_fraction"])
    assert len(found["rounds"]["torch pruned"]) == 2


def test_the_stored_language_speed_says_what_its_checks_say():
    stored = json.loads((RESULTS / "language-speed.json").read_text())
    assert language_speed.checks(stored["results"]) == stored["checks"]
    slow = {**stored["results"], "ratio": {"warm": 1.01}, "kept_by_both": 0.99}
    assert list(language_speed.checks(slow).values())[:2] == [False, False]


@pytest.mark.reference
def test_language_speed(tmp_path):

    setting = language_speed.Setting(32, 48, 2, 4, 64, 4, 16, 2, 0.5, 8, 8, 4)
    language_speed.main(setting, rounds=2, colds=1, out=tmp_path / "speed.json")
    r = written(tmp_path / "speed.json")
    found = r["results"]
    assert found["kept_by_both"] == 1 and 0 < sum(found["widths"]) < 2 * 48  # both sides chose the same channels
    for which, parts in (
        ("ours", ("trace", "calibrate", "choose and cut")),
        ("theirs", ("calibrate", "choose and cut")),
    ):
        for when in ("cold", "warm"):
            assert 0 < max(found[when][which][p] for p in parts) <= found[when][which]["total"]
    assert len(found["rounds"]["warm"]["ours"]) == 2 and all(v > 0 for v in found["ratio"].values())
    left = found["generation"]["weights_fraction"]
    dense = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32 + 32 * 64
    assert left == pytest.approx(1 - 3 * 32 * (96 - sum(found["widths"])) / dense)
    for what in ("prefill", "decode"):
        g = found["generation"][what]
        assert g["efficiency"] == pytest.approx(g["speed_up"] * left) and min(g["tokens_per_second"].values()) > 0
    assert r["checks"] == language_speed.checks(found) and r["machine"]["transformers"]
