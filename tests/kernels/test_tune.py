"""The configuration that was the fastest is the answer, from a measurement once and from its file afterwards."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import (
    AttentionError,
    BackendError,
    BlockMask,
    KernelConfig,
    tune,
)

module = importlib.import_module("pallas_kernels.block_sparse_attention.tune")  # the name is that of its function
SIZES = {"block_q": 16, "block_k": 16, "q_size": 48, "kv_size": 80}
TRIED = (KernelConfig(), KernelConfig(step_tokens=32), KernelConfig(step_tokens=16, rows_at_once=2))


def problem():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, n, 8)), jnp.float32) for n in (48, 80, 80))
    return q, k, v, BlockMask.window(40, 10, **SIZES)


@pytest.fixture
def seconds(monkeypatch):
    """Times by configuration in place of a clock; how often it was asked."""
    given = {"asked": 0, "times": {TRIED[0]: [3, 3, 3], TRIED[1]: [1, 2, 9], TRIED[2]: [0, 4, 4]}}

    def in_turns(jobs, rounds):
        assert all(np.array_equal(job(), problem()[0][:, : job().shape[1]]) for job in jobs.values())
        given["asked"] += 1
        return {config: given["times"][config] for config in jobs}

    monkeypatch.setattr(module, "_in_turns", in_turns)
    monkeypatch.setattr(module, "_program", lambda *_: lambda q, k, v, mask: q)  # nothing to compile
    return given


def test_the_smallest_median_wins_and_is_kept(seconds, tmp_path):
    again = [tune(*problem(), configs=TRIED, cache=tmp_path) for _ in range(3)]
    assert again == [TRIED[1]] * 3 and seconds["asked"] == 1  # medians 3, 2, 4: neither the mean nor the minimum
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert kept["config"]["step_tokens"] == 32 and len(kept["seconds"]) == 3 and kept["failed"] == []


def test_another_problem_is_measured_anew(seconds, tmp_path):
    q, k, v, mask = problem()
    tune(q, k, v, mask, configs=TRIED, cache=tmp_path)
    for change in ({"causal": True}, {"gradients": True}, {"impl": "xla", "kv_len": 70}):
        tune(q, k, v, mask, configs=TRIED, cache=tmp_path, **change)
    tune(q[:, :1], k[:, :1], v[:, :1], mask, configs=TRIED, cache=tmp_path)
    tune(q, k, v, BlockMask.dense(**SIZES), configs=TRIED, cache=tmp_path)
    assert seconds["asked"] == 6 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("content", ["{", "[]", '{"key": {}, "config": {}}', '{"config": {"speed": 1}}'])
def test_a_file_that_cannot_be_believed_is_written_anew(seconds, tmp_path, content):
    tune(*problem(), configs=TRIED, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    file.write_text(content)
    with pytest.warns(UserWarning, match="measured anew"):
        assert tune(*problem(), configs=TRIED, cache=tmp_path) == TRIED[1]
    assert file.read_text() == good and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_compile_is_passed_over(seconds, tmp_path, monkeypatch):
    seconds["times"][TRIED[1]] = [9, 9, 9]

    def program(config, *_):
        def run(q, *_):
            if config == TRIED[2]:
                raise RuntimeError("no room")
            return q

        return run

    monkeypatch.setattr(module, "_program", program)
    assert tune(*problem(), configs=TRIED, cache=tmp_path) == TRIED[0]
    with pytest.raises(AttentionError, match="no room"):
        tune(*problem(), configs=[TRIED[2]] * 2, cache=tmp_path)


def test_it_measures_what_it_finds_for_a_cpu(tmp_path):
    q, k, v, mask = problem()
    q, k, v = (x[:, :1] for x in (q, k, v))
    tried = module.candidates("xla", mask)
    assert len(tried) > 3 and tried[0] == KernelConfig()
    best = tune(q, k, v, mask, configs=tried[:2], rounds=2, gradients=True, cache=tmp_path)
    assert best in tried[:2]
    (file,) = tmp_path.iterdir()
    assert all(0 < s < 10 for _, s in json.loads(file.read_text())["seconds"])


@pytest.mark.parametrize("wrong", [{"config": KernelConfig()}, {"rounds": 0}, {"configs": []}, {"impl": "cuda"}])
def test_what_means_nothing_is_refused(wrong, tmp_path):
    with pytest.raises((AttentionError, BackendError)):
        tune(*problem(), cache=tmp_path, **wrong)


def lists(*rows):
    """A mask of one head, 64 queries a block, eight key blocks."""
    active = np.zeros((1, 1, len(rows), 8), bool)
    for n, row in enumerate(rows):
        active[0, 0, n, list(row)] = True
    return BlockMask.from_dense(active, block_q=64, block_k=64, q_size=64 * len(rows), kv_size=512)


def test_blocks_are_taken_together_where_their_lists_are_alike():
    alike, apart = lists(*[[0]] * 8), lists(*[[n] for n in range(8)])
    assert module.blocks_together(alike) == 8
    tried = module.candidates("tpu", alike)
    assert tried[0] == KernelConfig() and {c.blocks_together for c in tried[1:]} == {4, 8}  # the two best of the model
    assert module.candidates("mosaic_gpu", alike) == (KernelConfig(),)
    assert module.blocks_together(apart) == 1  # a union of n costs n * (overhead + 64 n), alone n * (overhead + 64)
    pairs = lists(
        [0], [0], [1], [1], [2], [2], [3], [3]
    )  # alone 8 * 120, pairs 4 * 184, fours 2 * 2 * 312, all 4 * 568
    assert module.blocks_together(pairs) == 2
    assert module.blocks_together(pairs, overhead=0.0) == 1  # 8 * 64 either way: not more than there is a reason for
    assert module.blocks_together(apart, ridge=10**6) == 1
    assert module.blocks_together(pairs, ridge=561.0) == 2  # 8, 4, 4 and 4 * (568 against 561)
    assert module.blocks_together(lists(*[[]] * 8)) == 1
    wide = dataclasses.replace(alike, block_q=256, q_size=8 * 256)
    assert module.blocks_together(wide) == 2  # 512 queries at most
