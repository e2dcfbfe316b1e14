"""Where arrays live during training: batches over the mesh's "data" axis, parameters as their owner placed them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh(mesh: Mesh | None) -> Mesh:
    """The mesh, which must have an axis "data"; without one, the first device alone."""
    if mesh is None:
        return Mesh(np.array(jax.devices()[:1]), ("data",))
    if "data" not in mesh.axis_names:
        raise ValueError(f'the mesh has the axes {mesh.axis_names}: name the axis that batches are split over "data"')
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over the axis "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shardings_of(variables: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf: its own if it already lies on this mesh, else a copy on every device."""

    def one(leaf):
        own = getattr(leaf, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh == mesh:
            return own
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, variables)


def place_variables(variables: Any, mesh: Mesh) -> Any:
    """The variables with every leaf on the mesh."""
    return jax.device_put(variables, shardings_of(variables, mesh))
