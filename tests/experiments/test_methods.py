"""The experiments' programs: rows and settings of every configuration, and demands that can fail."""

import copy
import dataclasses
import itertools
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import experiments
from experiments import adaspa, expert_pruning, lapp, masksparsity, precropping
from experiments.benchmarks import adaspa_roofline
from experiments.record import over_seeds
from jprune.files.json_files import read_json

STUDIES = {
    p.stem: import_module(f"experiments.{p.stem}").STUDY
    for p in sorted(Path(experiments.__file__).parent.glob("*.py"))
    if "\nSTUDY = Study(" in p.read_text()
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_configuration_has_settings_and_rows(name):
    study = STUDIES[name]
    assert study.about and f"python -m experiments.{name}" in study.about
    for config, setting in study.settings.items():
        assert study.options(["--config", config, "--seeds", "7"]).seeds == (7,)
        keys = list(study.rows(setting))
        assert keys and not any(a == b[: len(a)] for a, b in itertools.permutations(keys, 2))  # none lies in another
        assert dataclasses.is_dataclass(setting)


def test_the_commands_that_the_pages_name_are_understood():
    root = Path(__file__).parents[2]
    text = "\n".join(p.read_text() for p in [*root.glob("docs/*.md"), root / "README.md"])
    text += "\n".join(s.about or "" for s in STUDIES.values())
    commands = re.findall(r"python -m experiments\.(\w+)((?: +[^\s`#]+)*)", text)
    named = {name for name, _ in commands}
    assert set(STUDIES) <= named and all(find_spec(f"experiments.{name}") for name in named)
    for name, flags in commands:
        if name in STUDIES:
            assert STUDIES[name].options(flags.split() if flags.lstrip().startswith("--") else [])


def test_demands_of_masksparsity_can_fail():
    def judged(**changed):
        row = {"before": 0.99, "pruned": 0.985, "mean_kept_gamma": 0.9}
        rows = {k[-1]: dict(row) for k in masksparsity.STUDY.rows(masksparsity.SETTINGS["small"]) if k[0] == "0.75"}
        rows["slimming"] |= {"pruned": 0.3, "mean_kept_gamma": 0.05}
        rows["control: penalty too weak"]["pruned"] = 0.3
        for name, change in changed.items():
            rows[name] |= change
        d = masksparsity.demands({"results": over_seeds([{"0.75": rows}])})
        return [i for i, x in enumerate(d.values()) if not x.holds]

    assert judged() == []
    assert judged(masksparsity={"pruned": 0.96}) == [0] and judged(slimming={"pruned": 0.8}) == [1]
    assert judged(slimming={"mean_kept_gamma": 0.1}) == [2] and judged(
        **{"control: penalty too weak": {"pruned": 0.98}}
    ) == [3]
    assert judged(**{f"control: {n}": {"pruned": 0.96} for n in masksparsity.MaskedNetwork.CONTROLS}) == [4, 5, 6, 7]


def test_demands_of_precropping_can_fail():
    def judged(times=(2.0, 9.0), **changed):
        rows = {name: {"accuracy": 0.95} for name in precropping.FULL} | {
            n: {"accuracy": 0.9} for n in ("uniform_width", "reverse")
        }
        rows |= {name.replace("__", " "): {"accuracy": a} for name, a in changed.items()}
        stored = {
            "results": over_seeds([{"0.02": rows}]),
            "step_ms": dict(zip(("cropped", "masked"), times, strict=True)),
        }
        return [i for i, x in enumerate(precropping.demands(stored).values()) if not x.holds]

    assert judged() == []
    assert judged(shuffled__synflow=0.97, shuffled__snip=0.93) == [0, 1]
    assert judged(uniform_width=0.945, reverse=0.93) == [2, 3]
    assert judged(synexp__lsq=0.96, snip__lsq=0.96) == [5, 6]
    assert judged(times=(9.0, 2.0), unstructured__synflow=0.99, shuffled__synflow=0.99) == [7, 8]


def test_demands_of_lapp_can_fail():
    rows = {k[0]: {"accuracy": 0.9, "offset": 0.1, "spread": 0.5} for k in lapp.STUDY.rows(lapp.SETTINGS["small"])}
    rows["lapp none 0.25"]["accuracy"] = rows["lapp pw 0.25"]["accuracy"] = 0.95

    def judged(**changed):
        seed = copy.deepcopy(rows)
        for name, change in changed.items():
            seed[name] |= change
        d = lapp.demands({"results": over_seeds([seed]), "seeds": {"0": seed}})
        return [i for i, x in enumerate(d.values()) if not x.holds]

    assert judged() == []
    assert judged(**{"uniform none 0.25": {"accuracy": 0.94}}) == [0] and judged(
        **{"lapp pw 0.25": {"accuracy": 0.94}}
    ) == [2]
    assert judged(**{"lapp dw 0.25": {"offset": -0.4}}) == [3] and judged(**{"lapp none 0.25": {"spread": 0.2}}) == [4]
    assert judged(**{"narrow 0.25": {"accuracy": 0.96}, "random widths 0.25": {"accuracy": 0.96}}) == [6, 7]


def test_demands_of_adaspa_are_about_every_run():
    decibels = {"exact": 27, "adaspa": 26, "adaspa, cached lse": 26, "mean pool": 23, "window": 18, "last queries": 19}
    masses = {
        "exact": 0.7,
        "adaspa": 0.68,
        "adaspa, cached lse": 0.68,
        "mean pool": 0.6,
        "window": 0.5,
        "last queries": 0.55,
    }

    def judged(second=decibels, masses=masses):
        seeds = {str(i): {"0.8": {m: [{"psnr": d, "recall": masses[m]} for d in (decibels[m], second[m])] for m in masses}}
                 for i in range(2)}  # fmt: skip
        d = adaspa.demands({"results": over_seeds(list(seeds.values())), "seeds": seeds})
        return [i for i, x in enumerate(d.values()) if not x.holds]

    assert judged() == []
    assert judged({**decibels, "window": 24}) == [0] and judged({**decibels, "last queries": 25}) == [1]
    assert judged({**decibels, "adaspa, cached lse": 24.9}) == [2] and judged({**decibels, "exact": 25.6}) == [3]
    assert judged(masses={**masses, "mean pool": 0.69}) == [4]


def test_what_the_page_says_of_a_large_video_is_what_the_program_counts(tmp_path):
    adaspa_roofline.main(tmp_path / "roofline.json")
    at = read_json(tmp_path / "roofline.json")["results"]["0.8"]
    assert (round(at["flops"] / 1e15), round(at["dense_flops"] / 1e15)) == (195, 523)
    assert round(at["speed_up_of_attention"], 1) == 2.7


@pytest.mark.slow
def test_adaspa_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setenv("JPRUNE_CACHE", str(tmp_path / "cache"))
    small = "--recipe.steps 8 --recipe.learning-rate 0.02 --recipe.warmup 1 --recipe.batch 1"
    small += " --sampler.steps 11 --noises 2 --sparsities 0.8"
    stored = adaspa.STUDY.main(
        ["--seeds", "0", "--out", str(tmp_path / "a.json"), "--rows", "adaspa", "window", *small.split()]
    )
    runs = stored["seeds"]["0"]["0.8"]
    assert set(runs) == {"adaspa", "window"} and all(len(found) == 2 for found in runs.values())
    for found in (*runs["adaspa"], *runs["window"]):
        assert found["psnr"] > 0 and -1 <= found["ssim"] <= 1 and 0 < found["recall"] < 1


def test_demands_of_expert_pruning_can_fail():
    rows = {name: {"8": {"loss": {"mean": loss}}} for name, loss in
            (("REAP", 2.1), ("frequency", 2.2), ("router weight", 2.1), ("random", 2.5))}  # fmt: skip
    stored = {"setting": {"experts": 16}, "results": {"pruned": rows}}
    assert all(d.holds for d in expert_pruning.demands(stored).values())
    rows["frequency"]["8"]["loss"]["mean"] = 2.0
    assert [d.holds for d in expert_pruning.demands(stored).values()] == [False, True, True]
