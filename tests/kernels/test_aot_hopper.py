"""What ptxas, the host code and the PTX say of a kernel is read as it stands; without the wheels there is a reason."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from experiments.benchmarks import compile_hopper
from pallas_kernels.common import aot_hopper

PTXAS = """ptxas info    : 0 bytes gmem
ptxas warning : Registers are spilled to local memory in function 'some_kernel_mosaic_gpu_kernel', 8 bytes spill stores
ptxas info    : Compiling entry function 'some_kernel_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for some_kernel_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 16 bytes cumulative stack size, 1 bytes smem
"""
HOST = """declare void @mosaic_gpu_launch_kernel(ptr, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, ptr, ptr)
  call void @mosaic_gpu_launch_kernel(ptr %0, i32 8, i32 4, i32 2, i32 0, i32 0, i32 0, i32 384, i32 1, i32 1, i32 166992, ptr %1, ptr %3)
"""  # noqa: E501
PTX = "wgmma.mma_async.sync.aligned.m64n64k16 {}\n" * 3 + "cp.async.bulk.tensor.5d.shared::cluster {}\n" * 2


def test_what_the_compiler_writes_is_read():
    kernel = aot_hopper.read(PTXAS, HOST, PTX)
    assert kernel == ("some_kernel", (8, 4, 2), 384, 166992, 168, 16, 8, 12, False, False, 3, 2)
    warned = PTXAS + "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert aot_hopper.read(warned, HOST, PTX) == kernel._replace(serialized=True)
    warned = PTXAS + "ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain ..."
    other = HOST.replace("launch_kernel", "build_kernel_spec")  # as from jax 0.12 on
    assert aot_hopper.read(warned, other, PTX) == kernel._replace(fixed_registers=True)


@pytest.mark.parametrize(("spoiled", "words"), [(0, "kernel's name"), (1, "launch")])
def test_what_cannot_be_read_is_said(spoiled, words):
    texts = [PTXAS, HOST, PTX]
    texts[spoiled] = "nothing"
    with pytest.raises(ValueError, match=words):
        aot_hopper.read(*texts)


def test_without_wheels_or_with_an_unknown_chip_there_is_a_reason(monkeypatch):
    with pytest.raises(ValueError, match="H100, H200"):
        aot_hopper.compile_kernels(abs, "A100")
    monkeypatch.setattr(aot_hopper, "PLUGINS", ())
    before = dict(os.environ)
    with pytest.raises(ValueError, match="jax\\[cuda13\\]"):
        aot_hopper.compile_kernels(abs, "H100")
    assert dict(os.environ) == before


NAMES = {
    "attention": "block_sparse_attention",
    "gradient of queries": "block_sparse_attention_dq",
    "gradients of keys and values": "block_sparse_attention_dkdv",
    "gradient of keys": "block_sparse_attention_dk",
    "gradient of values": "block_sparse_attention_dv",
    "masses": "block_scores",
}


def test_the_compiled_sizes_are_complete_and_the_page_tells_of_them():
    stored = json.loads((compile_hopper.RESULTS / "compile-hopper.json").read_text())
    rows = stored["results"]
    assert stored["checks"] == compile_hopper.checks(rows) and all(stored["checks"].values())
    sizes = {(r["dtype"], r["features"], r["block"], r["rules"]) for r in rows}
    assert sizes == set(itertools.product(("bfloat16", "float16"), compile_hopper.SPECS, (64, 128), (False, True)))
    page = (Path(__file__).parents[2] / "docs" / "block_sparse_attention.md").read_text()
    assert f"all {len(rows)} of them" in page and f"by jax {stored['machine']['jax']}" in page
    told = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    assert len(told) == 13  # gradients of keys and values are two kernels at 256 features
    for name, features, *numbers in told:
        plain, ruled = (
            next(
                r
                for r in rows
                if (r["name"], r["features"], r["rules"]) == (NAMES[name], int(features), rules)
                and (r["dtype"], r["block"]) == ("bfloat16", 128)
                and r["program"] != "search"
            )
            for rules in (False, True)
        )
        assert [plain["shared_memory"], plain["spill_stores"], ruled["spill_stores"]] == [int(n) for n in numbers]


def test_checks_of_compiled_kernels_can_fail():
    bad = {"shared_memory": 232449, "serialized": True, "fixed_registers": True, "features": 64, "rules": False}
    assert not any(compile_hopper.checks([bad | {"spill_stores": 4}]).values())
