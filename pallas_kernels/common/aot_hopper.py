"""Compile Mosaic GPU kernels for a Hopper chip without having one, and read what its compiler says of each.

    aot_hopper.prepare()                                     # before jax looks for devices
    aot_hopper.compile_kernels(fn, "H100", *shapes)          # registers, spills, shared memory, instructions

XLA runs NVIDIA's own ptxas on them while it compiles, from the wheels of `jax[cuda13]`, on this machine's CPU. What compiles is
accepted by the chip's compiler; numbers and timings need other proofs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CHIPS = {
    "H100": ("NVIDIA H100 80GB HBM3", 3352320000000, 84978434048),
    "H200": ("NVIDIA H200", 4800000000000, 150000000000),
}  # device kind, bytes a second and bytes of its memory
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # there is no driver to ask
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""


class Kernel(NamedTuple):
    """One compiled kernel.

    grid, threads, shared_memory: of its launch (bytes; all of it is dynamic), from the host code that XLA would run.
    registers: a thread's at the launch, which warpgroups then shift among each other; stack, spill_stores, spill_loads: bytes
    a thread; serialized: whether matrix instructions wait for each other; fixed_registers: whether warpgroups cannot shift
    any. These are ptxas' words. matrix_instructions, copies: how many wgmma and bulk tensor copies its PTX holds.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    serialized: bool
    fixed_registers: bool
    matrix_instructions: int
    copies: int


def prepare() -> None:
    """Set what compiling without a GPU needs; call it before jax first looks for devices."""
    os.environ.update(ENVIRONMENT)
    if "jax" in sys.modules:  # it has read the environment already
        sys.modules["jax"].config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])


def available() -> bool:
    """Whether the wheels with NVIDIA's compiler are installed (`pip install 'jax[cuda13]'`)."""
    return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def compile_kernels(fn: Callable[..., Any], chip: str, *shapes: Any) -> list[Kernel]:
    """Compile `fn` for a chip and return the Mosaic GPU kernels in it that this process had not compiled before.

    Args:
      fn: traced as if that chip were here. chip: "H100" or "H200". *shapes: trees of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: an unknown chip, or the wheels are not installed; whatever the chip's compiler refuses.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is not known here: {', '.join(CHIPS)}")
    if not available():
        raise ValueError("the CUDA wheels are not installed: pip install 'jax[cuda13]' of the same version as jax")
    prepare()
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    kind, bandwidth, memory = CHIPS[chip]
    target = TARGET.format(kind=kind, bandwidth=bandwidth, memory=memory)
    described = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    here = SingleDeviceSharding(described.devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with tempfile.TemporaryDirectory() as folder:
        said = {"MOSAIC_GPU_DUMP_TO": folder}
        said |= {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "HOST_LLVM")}
        before = {name: os.environ.get(name) for name in said}
        os.environ.update(said)
        try:
            with as_if_on(chip):
                lowered = jax.jit(fn).lower(*args)
            lowered.compile()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return [_kernel(path) for path in sorted(Path(folder).glob("*.ptxas"))]


def as_if_on(chip: str) -> Any:
    """A context in which kernels that ask for the device are told that of a chip in CHIPS."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind=CHIPS[chip][0], num_cores=132, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _kernel(path: Path) -> Kernel:
    return read(path.read_text(), path.with_suffix(".ll").read_text(), path.with_suffix(".ptx").read_text())


def read(ptxas: str, host: str, ptx: str) -> Kernel:
    """One kernel from ptxas' messages, the host code that launches it and its PTX."""

    def numbers(pattern: str, text: str, what: str) -> tuple[int, ...]:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"no {what} in what the compiler wrote: {text[:200]!r}")
        return tuple(map(int, found.groups()))

    name = re.search(r"entry function '(\w+?)_mosaic_gpu_kernel'", ptxas)
    if name is None:
        raise ValueError(f"no kernel's name in what the compiler wrote: {ptxas[:200]!r}")
    launch = r"call void @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr [^,]+" + r", i32 (\d+)" * 10
    x, y, z, *_, threads, _ny, _nz, shared = numbers(launch, host, "launch")
    stack, stores, loads = numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas, "spills"
    )
    (registers,) = numbers(r"Used (\d+) registers", ptxas, "registers")
    counts = (ptx.count(s) for s in ("wgmma.mma_async.sync", "cp.async.bulk.tensor"))
    said = ("are serialized" in ptxas, "'setmaxnreg' ignored" in ptxas)
    return Kernel(name[1], (x, y, z), threads, shared, registers, stack, stores, loads, *said, *counts)
