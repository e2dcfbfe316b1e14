"""Single weights: which of them go, by the weights alone, by activations, by curvature, or while the network trains.

pruned = jprune.methods.weights.wanda(graph, params, batches, jprune.methods.weights.prunable(graph), 0.5)
tx = jprune.methods.weights.sparsify(optax.adam(1e-3), 0.9)

Behind doors of their own: `jprune.methods.weights.icbs` and `jprune.methods.weights.second_order`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jprune.methods.weights.least_squares import refit as refit
    from jprune.methods.weights.one_shot import in_turn as in_turn
    from jprune.methods.weights.one_shot import layer_by_layer as layer_by_layer
    from jprune.methods.weights.one_shot import magnitude as magnitude
    from jprune.methods.weights.one_shot import prunable as prunable
    from jprune.methods.weights.one_shot import random as random
    from jprune.methods.weights.one_shot import sparsegpt as sparsegpt
    from jprune.methods.weights.one_shot import wanda as wanda
    from jprune.methods.weights.sparse_training import ACDC as ACDC
    from jprune.methods.weights.sparse_training import SET as SET
    from jprune.methods.weights.sparse_training import Magnitude as Magnitude
    from jprune.methods.weights.sparse_training import MaskSteps as MaskSteps
    from jprune.methods.weights.sparse_training import Random as Random
    from jprune.methods.weights.sparse_training import RigL as RigL
    from jprune.methods.weights.sparse_training import Saliency as Saliency
    from jprune.methods.weights.sparse_training import Static as Static
    from jprune.methods.weights.sparse_training import magnitude_masks as magnitude_masks
    from jprune.methods.weights.sparse_training import masked as masked
    from jprune.methods.weights.sparse_training import masks_of as masks_of
    from jprune.methods.weights.sparse_training import sparsify as sparsify
    from jprune.surgery.packed import bcoo as bcoo
    from jprune.surgery.packed import stored_bytes as stored_bytes
    from jprune.surgery.packed import to_dense as to_dense
    from jprune.surgery.packed import two_of_four as two_of_four
    from jprune.surgery.packed import whole_blocks as whole_blocks

_NAMES: dict[str, str] = {
    **dict.fromkeys(
        ("in_turn", "layer_by_layer", "magnitude", "prunable", "random", "sparsegpt", "wanda"), "one_shot"
    ),
    "refit": "least_squares",
    **dict.fromkeys(
        ("ACDC", "SET", "Magnitude", "MaskSteps", "Random", "RigL", "Saliency", "Static", "magnitude_masks", "masked",
         "masks_of", "sparsify"), "sparse_training"
    ),
    **dict.fromkeys(("bcoo", "stored_bytes", "to_dense", "two_of_four", "whole_blocks"), "..surgery.packed"),
}  # fmt: skip
__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'jprune.methods.weights' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
