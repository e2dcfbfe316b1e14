"""Where a decoder's weights lie on a mesh: MLP channels and heads over one axis, everything else on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# axis of each module's leaves that is divided, counted from behind the layers' axis
_KERNELS = {"gate": 1, "up": 1, "down": 0, "q": 1, "k": 1, "v": 1, "o": 0}
_BIASES = {"gate": 0, "up": 0, "q": 0, "k": 0, "v": 0}
_EXPERTS = {"gate": 2, "up": 2, "down": 1}  # channels inside every expert


def placement(mesh: Mesh, axis: str = "model") -> Callable[[str, Any], NamedSharding]:
    """(leaf path, leaf) -> sharding, for `load_hf`, `checkpoint.load` or `jax.device_put` with a tree of them.

    Every layer of a `Llama`, scanned or unrolled, is divided by channels of the MLP or of every expert, and by heads
    (tensor parallel);
    where a layer has a number of them that `axis` does not divide, that leaf lies on every device. A batch is divided
    by giving the ids a sharding of their own.

    Raises:
      ValueError: the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has the axes {tuple(mesh.shape)}, not {axis!r}: name the one to divide weights by")
    parts = mesh.shape[axis]

    def place(path: str, leaf: Any) -> NamedSharding:
        *_, module, kind = ("", *path.split("/"))
        own = {"kernel": _KERNELS, "bias": _BIASES}.get(kind, {}).get(module)
        if module == "experts":
            own = _EXPERTS.get(kind)
        if own is not None:
            at = own + (1 if "layers/" in path else 0)
            if leaf.shape[at] % parts == 0:
                return NamedSharding(mesh, PartitionSpec(*(axis if i == at else None for i in range(len(leaf.shape)))))
        return NamedSharding(mesh, PartitionSpec())

    return place
