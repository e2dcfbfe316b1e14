"""The experiments on single weights: their rows run, and what they demand is judged on numbers of their own."""

import json

import pytest
from rich.progress import Progress

from experiments import pruned_weights, sparse_decoder, sparse_digits
from experiments.study import Run

FOUND = {"accuracy": 50.0, "loss": 1.0, "training_loss": 1.0}


def test_a_row_runs_and_its_numbers_are_written(tmp_path):
    out = sparse_digits.STUDY.main(["--seeds", "0", "--rows", "magnitude", "--out", str(tmp_path / "r.json"), "--epochs", "1",
                                    "--densities", "0.5"])  # fmt: skip
    row = json.loads((tmp_path / "r.json").read_text())["results"]["0.5"]["magnitude"]
    assert row["accuracy"]["mean"] > 30 and out["results"]["0.5"]["magnitude"] == row


def test_demands_fail_where_the_search_gains_nothing():
    names = [k[-1] for k in sparse_digits.rows(sparse_digits.Setting()) if k[0] == "0.1"]
    seed = {d: dict.fromkeys(names, FOUND) for d in ("0.1", "0.05")}
    mean = {d: {n: {k: {"mean": v, "std": 0.0} for k, v in FOUND.items()} for n in names} for d in seed}
    judged = sparse_digits.demands({"results": mean, "seeds": {"0": seed}})
    assert not any(d.holds for what, d in judged.items() if "above its start" in what or "training loss" in what)


def test_pages_become_text_and_the_model_is_asked_for(tmp_path):
    (tmp_path / "b.html").write_text("<head>not</head><body><p>two  words</p><script>not</script></body>")
    (tmp_path / "a.html").write_text("<h1>First</h1><p>one\nline</p>")
    file = pruned_weights.text_file(tmp_path, tmp_path / "work")
    assert file.read_text().split() == ["First", "one", "line", "two", "words"]
    with pytest.raises(ValueError, match="a language model's folder"):
        pruned_weights.Decoder(sparse_decoder.SETTINGS["smollm2"], Run(0, None, Progress()))
