"""What ptxas, the host code and the PTX say of a kernel is read as it stands; without the wheels there is a reason."""

import os

import pytest

from pallas_kernels import aot_hopper

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
