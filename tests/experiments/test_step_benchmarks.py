"""Benchmarks of whole models at their smallest: they run, both sides agree, and what they write is complete."""

import json

import pytest

from experiments.benchmarks import adaspa_step, token_throughput


@pytest.mark.reference
def test_tokens_here_and_in_torch(tmp_path):
    setting = token_throughput.Setting(width=24, depth=4, heads=3, image=96, batch=2, flops=0.7)
    token_throughput.main(setting, rounds=1, out=tmp_path / "t.json")
    r = json.loads((tmp_path / "t.json").read_text())["results"]
    assert set(r["errors"]) == set(token_throughput.BESIDE_TORCH) and max(r["errors"].values()) < 1e-4
    for name, row in r["methods"].items():
        assert row["ideal"] == 1 if name == "all tokens" else 1.2 < row["ideal"] < 1 / 0.7
        assert ("over_torch" in row) == (name in token_throughput.BESIDE_TORCH) and row["gain"] > 0


@pytest.mark.slow
def test_steps_of_a_video_transformer(tmp_path):
    setting = adaspa_step.Setting(frames=2, side=16, words=16, heads=2, layers=1, block=16)
    adaspa_step.main(setting, rounds=1, out=tmp_path / "s.json")
    r = json.loads((tmp_path / "s.json").read_text())["results"]
    assert set(r["seconds"]) == {"dense", "fused", "jax.nn", *(f"{a} {s}" for a in ("sparse", "research")
                                                               for s in adaspa_step.SPARSITIES)}  # fmt: skip
    for sparsity, sample in r["samples"].items():
        t = r["seconds"]
        steps = 9 * t["dense"] + t["fused"] + t[f"research {sparsity}"] + 39 * t[f"sparse {sparsity}"]
        assert sample["seconds"] == pytest.approx(steps)
        assert sample["speed_up"] == pytest.approx(50 * t["dense"] / steps)
