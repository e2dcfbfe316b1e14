"""What carries every experiment, on a toy: rows, seeds, resuming, summing up, demands, redrawing."""

import dataclasses
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.record import over_seeds, plain
from experiments.study import Study, at_least, at_most


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A toy.

    Attributes:
      base: what is added.
    """

    inner: Inner = Inner()
    base: float = 1.0
    data_dir: Path | None = None
    model: object = len


def toy(calls, stop=None):
    """Rows add the seed to the setting's base; `calls` learns what ran, and `stop` is a row that fails."""

    def begin(setting, run):
        calls.append(f"begin {run.seed}")
        return setting.base + run.seed

    def row(name, found):
        def run(shared):
            if name == stop:
                raise KeyboardInterrupt
            calls.append(f"{name} {shared:g}")
            return found(shared)

        return run

    def rows(setting):
        return {
            ("first",): row("first", lambda x: x),
            ("pruned", "ours"): row("ours", lambda x: {"accuracy": 2 * x, "widths": [1, 2], "said": "text"}),
            ("pruned", "other"): row("other", lambda x: [{"accuracy": x}, {"accuracy": x + 2}]),
        }

    def demands(stored):
        r = stored["results"]
        return {
            "ours is large": at_least(r["pruned"]["ours"]["accuracy"]["mean"], 3),
            "it is small": at_most(r["first"]["mean"], 1),
        }

    def draw(stored):
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([stored["results"]["first"]["mean"]], [1], "o")
        return figure

    return Study(
        "toy", "A toy.", {"small": Setting(), "large": Setting(base=100.0)}, begin, rows, demands,
        lambda stored: [f"cost {stored['cost']}"], draw, once={"cost": lambda setting: [setting.base]}, seeds=(0, 1),
    )  # fmt: skip


def test_seeds_are_summed_up_judged_and_drawn_again_alike(tmp_path, capsys):
    calls, out = [], tmp_path / "toy.json"
    study = toy(calls)
    stored = study.main(["--seeds", "0", "1", "2", "--out", str(out)])
    assert stored == json.loads(out.read_text()) and calls.count("begin 1") == 1 and len(calls) == 12
    assert stored["results"] == {
        "first": {"mean": 2.0, "std": 1.0},
        "pruned": {
            "ours": {"accuracy": {"mean": 4.0, "std": 2.0}},
            "other": {"accuracy": {"mean": 3.0, "std": pytest.approx(1.4142135)}},
        },
    }
    assert stored["seeds"]["2"]["pruned"]["ours"] == {"accuracy": 6.0, "widths": [1, 2], "said": "text"}
    assert stored["checks"] == {"ours is large": True, "it is small": False} and stored["cost"] == [1.0]
    assert stored["command"] == "python -m experiments.toy --config small --seeds 0 1 2"
    said = capsys.readouterr().out
    assert "yes ours is large (4 >= 3)" in said and "NO  it is small (2 <= 1)" in said
    before, picture = out.read_bytes(), out.with_suffix(".png").read_bytes()
    study.main(["--out", str(out), "--redraw"])
    assert out.read_bytes() == before and out.with_suffix(".png").read_bytes() == picture and len(calls) == 12
    damaged = {**stored, "results": {}, "checks": {"ours is large": False}}
    out.write_text(json.dumps(damaged))
    study.main(["--out", str(out), "--redraw"])  # verdicts are those of the seeds' numbers, whatever the file said
    assert out.read_bytes() == before


def test_an_interrupted_run_goes_on_and_ends_alike(tmp_path):
    whole = toy([]).main(["--out", str(tmp_path / "whole.json")])
    calls, out = [], tmp_path / "toy.json"
    for stop in ("ours", "other"):
        with pytest.raises(KeyboardInterrupt):
            toy(calls, stop).main(["--out", str(out)])
    assert calls == ["begin 0", "first 1", "begin 0", "ours 1"] and not out.exists()
    with pytest.raises(KeyboardInterrupt):  # before the first row: nothing is left behind
        toy([], "first").main(["--out", str(tmp_path / "none.json")])
    with pytest.raises(ValueError, match="started with setting"):
        toy(calls).main(["--out", str(out), "--inner.rate", "0.25"])
    assert toy(calls).main(["--out", str(out)]) == whole
    assert calls[4:] == ["begin 0", "other 1", "begin 1", "first 2", "ours 2", "other 2"]
    assert {p.name for p in tmp_path.iterdir()} == {"whole.json", "whole.png", "toy.json", "toy.png"}
    work = ["--work", str(tmp_path / "work"), "--out", str(out)]
    assert toy(calls).main(work) == toy([], "first").main(work) == whole  # a folder that the user named is kept


def test_settings_are_flags_and_rows_can_be_chosen(tmp_path):
    calls, out = [], ["--out", str(tmp_path / "toy.json"), "--seeds", "3"]
    stored = toy(calls).main([*out, "--config", "large", "--inner.steps", "4", "--data-dir", "some/data"])
    assert stored["setting"] == {
        "config": "large", "inner": {"rate": 0.5, "steps": [4]}, "base": 100.0, "data_dir": "data",
    }  # fmt: skip
    assert stored["seeds"]["3"]["first"] == 103.0 and stored["checks"] == {}  # demands are about the default
    stored = toy(calls).main([*out, "--rows", "first"])
    assert stored["seeds"] == {"3": {"first": 4.0}} and stored["checks"] == {}
    with pytest.raises(ValueError, match=r"no rows \['frist'\]; there are \['first', 'other', 'ours'\]"):
        toy(calls).main([*out, "--rows", "first", "frist"])


def test_numbers_that_are_none_stop_the_run(tmp_path):
    study = dataclasses.replace(toy([]), rows=lambda setting: {("a", "b"): lambda shared: {"x": float("inf")}})
    with pytest.raises(ValueError, match=r"row a, b of seed 0: .* in \{'x': inf\}"):
        study.main(["--out", str(tmp_path / "toy.json")])


def test_what_is_no_number_is_not_summed_up():
    parts = [{"a": 1, "b": [1, 2], "c": {"d": "text"}, "e": True}, {"a": 2, "b": [3], "c": {"d": "x"}, "e": False}]
    assert over_seeds(parts) == {"a": {"mean": 1.5, "std": pytest.approx(0.70710678)}}
    assert plain({"x": (1, Inner()), "p": Path("a/b")}) == {"x": [1, {"rate": 0.5, "steps": [1, 2]}], "p": "b"}
    assert not at_most(float("nan"), 1).holds and not at_least(float("nan"), 1).holds
