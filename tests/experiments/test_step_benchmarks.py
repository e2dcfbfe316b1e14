"""Benchmarks of whole models at their smallest: they run, both sides agree, and what they write is complete."""

import json
import os

import numpy as np
import pytest

from experiments.benchmarks import adaspa_step, sparse_moe, token_throughput


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


@pytest.mark.slow
def test_mixtures_of_experts(tmp_path):
    setting = sparse_moe.Setting(32, 8, 16, tokens=(8,), unions=(0.25,), batch=128, densities=(0.25,))
    before = os.environ.get("XLA_FLAGS")
    try:
        sparse_moe.main(setting, rounds=1, out=tmp_path / "m.json")  # every way has to agree before it is timed
    finally:
        os.environ.pop("XLA_FLAGS") if before is None else os.environ.update(XLA_FLAGS=before)
    r = json.loads((tmp_path / "m.json").read_text())
    assert set(r["results"]["decoding"]["8"]["0.25"]["ratios"]) == {"dense", "union", "copied weights"}
    assert set(r["results"]["training"]) == {"alone", "alike"} and len(r["results"]["products"]) == 2
    for rows in r["results"]["training"].values():
        assert set(rows["0.25"]["ratios"]) == {"dense", "tiles", "sorted", "ragged_dot"}
    results = {"decoding": {"8": {"0.25": {"ratios": {"union": 0.6}}}}, "products": {"a": {"ratios": {"grouped_matmul": 1.1}}},
               "training": {"alone": {"0.1": {"ratios": {"tiles": 0.5, "sorted": 1.2}}}}}  # fmt: skip
    assert not any(sparse_moe.checks(results).values())
    with pytest.raises(ValueError, match="b computes something else"):
        sparse_moe.timed({"a": lambda: np.ones(3), "b": lambda: np.ones(3) + 0.1}, 1, "a")
