"""The GPU benchmark at its smallest, on the CPU with plain XLA in the kernels' place; without a GPU it runs nothing."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_attention as bench

SMALL = bench.Setting(heads=2, block=64, checked_tokens=128, calls=1)
SPEC = dataclasses.replace(bench.arg_specs.TIMED[0], tokens=256, features=16)


def test_without_a_gpu_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "errors", None)  # not called
    bench.main(SMALL, out=tmp_path / "x.json")
    assert "nothing was run" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.01, 1.1])
def test_results_are_compared_before_anything_is_timed(factor, monkeypatch):
    def run(q, *_):
        return [
            q.astype(jnp.float32) * (factor if q.dtype == jnp.bfloat16 else 1)
        ]  # ours; the dense is asked in float32

    monkeypatch.setattr(bench, "with_gradients", lambda attend: run)
    if factor < 1.02:
        assert list(bench.errors(SMALL, SPEC, "xla").values()) == pytest.approx([factor - 1] * 4, rel=1e-4)
    else:
        with pytest.raises(AssertionError, match="differ"):
            bench.errors(SMALL, SPEC, "xla")


@pytest.mark.slow
def test_all_programs_are_timed(monkeypatch):
    monkeypatch.setattr(bench, "SPARSITIES", (0.75,))
    monkeypatch.setattr(bench, "flex", lambda *a: {"flex": lambda: None, "flex, gradients": lambda: None})
    found = bench.measure(SMALL, SPEC, 1, "xla", bench.dense_peers("xla"))
    row = found["sparsities"]["0.75"]
    assert row["ideal"] == 4
    names = [f"{n}{g}" for n in ("teraflops", "over cudnn", "over flex") for g in ("", ", gradients")]
    assert set(row) == {"ideal", *names}
    assert bench.table({SPEC.name: found}).row_count == 1
    assert not any(bench.checks({SPEC.name: found}).values())  # too short to say anything


def test_what_is_demanded():
    row = {"ideal": 4.0, "over cudnn": 2.1, "over cudnn, gradients": 1.9}
    assert list(bench.checks({"model": {"tokens": 32768, "sparsities": {"0.75": row, "0.5": {}}}}).values()) == [
        True,
        False,
    ]
