"""Compile for a named accelerator without having one: the chip's own compiler, run on this machine's CPU.

    aot.prepare()                                            # before jax is imported
    on = aot.mesh("v5e:2x2")
    aot.compile_for(fn, aot.abstract(params, on), ...)       # flops, bytes, memory per device, schedule

What compiles is accepted by the chip's compiler (memory, layouts, collectives). Numbers and timings need other proofs.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

TPU_CHIPS = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for the machine's metadata
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at a time: there is no device to quarrel over
}


class Compiled(NamedTuple):
    """What the compiler says of one program on one device of the mesh.

    flops, bytes_accessed: as it counts them; argument, output, temporary: bytes of memory; text: the scheduled HLO.
    """

    flops: float
    bytes_accessed: float
    argument: int
    output: int
    temporary: int
    text: str

    @property
    def memory(self) -> int:
        """Bytes one device needs while it runs."""
        return self.argument + self.output + self.temporary

    def kernels(self) -> int:
        """How many calls of Pallas kernels the program makes."""
        return len(re.findall(r'custom_call_target="tpu_custom_call"', self.text))

    def collectives(self) -> dict[str, int]:
        """How often each collective starts in the schedule."""
        names = re.findall(
            r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", self.text
        )
        return {n: names.count(n) for n in sorted(set(names))}


def prepare() -> None:
    """Set the environment that libtpu needs; call it before jax is first imported.

    Raises:
      RuntimeError: jax is imported already without it.
    """
    missing = {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    if missing and "jax" in sys.modules and "TPU_SKIP_MDS_QUERY" in missing:
        raise RuntimeError(f"set {', '.join(f'{k}={v}' for k, v in missing.items())} before jax is imported")
    os.environ.update(missing)


def available() -> bool:
    """Whether libtpu is installed (`pip install 'jprune[aot]'`)."""
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


@functools.lru_cache(maxsize=8)
def mesh(topology: str, axes: Sequence[str] = ("data",), shape: Sequence[int] | None = None) -> Any:
    """A mesh over the devices of a topology such as "v5e:2x2", "v5p:2x2x1", "v6e:2x4".

    Args:
      topology: chip and grid.
      axes: names of the mesh axes.
      shape: devices along each; by default all along the first.

    Raises:
      ValueError: an unknown chip, or libtpu is not installed.
    """
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    if topology.split(":")[0] not in TPU_CHIPS:
        raise ValueError(f"topology {topology!r} names no chip known here: {', '.join(TPU_CHIPS)}, as in 'v5e:2x2'")
    if not available():
        raise ValueError("libtpu is not installed: pip install 'jprune[aot]'")
    prepare()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = tuple(shape) if shape is not None else (len(devices), *(1,) * (len(axes) - 1))
    return Mesh(np.array(devices).reshape(sizes), tuple(axes))


def compile_for(fn: Callable[..., Any], *args: Any, **options: Any) -> Compiled:
    """Compile `fn` for the devices that the shardings of its abstract arguments lie on.

    Args:
      fn: a function, or an already jitted one.
      *args: trees of `jax.ShapeDtypeStruct`, each with a `NamedSharding` over a `mesh`.
      **options: for `jax.jit` (static_argnums, donate_argnums, out_shardings).

    Raises:
      whatever the chip's compiler refuses.
    """
    import jax

    return _of(jax.jit(fn, **options).lower(*args).compile())


def compile_kernel(fn: Callable[..., Any], topology: str, *shapes: Any) -> Compiled:
    """Compile `fn`, Pallas kernels for TPU inside it, for one device of a topology.

    Args:
      fn: traced as if that chip were here, which is what a kernel asks when it is lowered.
      topology: as for `mesh`.
      *shapes: trees of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: as `mesh`; whatever the chip's compiler refuses.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    here = SingleDeviceSharding(mesh(topology).devices.flat[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with as_if_on(topology):
        lowered = jax.jit(fn).lower(*args)
    return _of(lowered.compile())


def as_if_on(topology: str) -> Any:
    """A context in which kernels that ask for the chip are told that of a topology."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = mesh(topology).devices.flat[0]
    chip = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=chip))


def _of(compiled: Any) -> Compiled:
    cost: Any = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    memory: Any = compiled.memory_analysis()
    return Compiled(
        float(cost.get("flops", 0.0)),
        float(cost.get("bytes accessed", 0.0)),
        int(memory.argument_size_in_bytes),
        int(memory.output_size_in_bytes),
        int(memory.temp_size_in_bytes),
        compiled.as_text() or "",
    )


def abstract(tree: Any, on: Any, spec: Callable[[str, Any], Any] | None = None) -> Any:
    """The shapes of a tree, laid out over a mesh: replicated, or by `spec(path, leaf) -> PartitionSpec`."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def one(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        wanted = PartitionSpec() if spec is None else spec(name, x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, wanted))

    return jax.tree_util.tree_map_with_path(one, tree)
