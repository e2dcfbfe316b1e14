"""The feed-forward layers of a released BlockFFN checkpoint, as `jprune.models.moe.blockffn` has them.

    layers, config = load_blockffn(folder)
    y, routed = blockffn(layers[0], x)

Only these layers: the released models have latent attention, which the decoders here have not. Names and shapes behind
`model.layers.{i}.mlp.` (E experts of width f, d channels):

    up_proj (E f, d), down_proj (d, E f)            the experts side by side
    up_proj (E, f, d), down_proj (E, d, f)          older files; also as experts.up_proj.weight, experts.down_proj.weight
    router_proj.weight (E, d), router_norm.weight (E,)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.checkpoint.hf_files import TensorFiles
from jprune.files.json_files import Fields, read_json, said_of

LAYER = re.compile(r"model\.layers\.(\d+)\.mlp\.")
ROUTERS = {"router_act": "relu", "norm_after_router": "rms"}


def load_blockffn(folder: str | Path, dtype: Any = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(parameters of every layer, config.json) of a folder with safetensors files; host-side.

    Args:
      folder: of the checkpoint. A `pytorch_model.bin` is never read: convert it with safetensors first.
      dtype: of the experts; None: as stored. Routers are float32.

    Raises:
      ValueError: another router, a tensor that is missing or of a shape that does not fit num_experts and expert_size.
    """
    folder = Path(folder)
    with said_of(folder / "config.json"):
        config = read_json(folder / "config.json")
        said = Fields(config)
        experts, width = (said.integer(name, least=1) for name in ("num_experts", "expert_size"))
        for name, only in ROUTERS.items():
            said.text(name, only, among=(only,))
    return blockffn_layers(TensorFiles(folder), experts, width, dtype), config


def blockffn_layers(
    tensors: Mapping[str, np.ndarray], experts: int, width: int, dtype: Any = None
) -> list[dict[str, Any]]:
    """Parameters of every layer from tensors by their released names; the arguments and errors of `load_blockffn`."""
    numbers = sorted({int(m[1]) for m in map(LAYER.match, tensors) if m})
    if not numbers:
        raise ValueError("no tensor is called model.layers.0.mlp...: these are not the weights of a BlockFFN model")
    if numbers != list(range(len(numbers))):
        missing = min(set(range(numbers[-1])) - set(numbers))
        raise ValueError(f"layer {missing} of {numbers[-1] + 1} is missing: download the checkpoint again")
    return [_layer(tensors, f"model.layers.{i}.mlp.", experts, width, dtype) for i in numbers]


def _layer(tensors: Mapping[str, np.ndarray], prefix: str, e: int, f: int, dtype: Any) -> dict[str, Any]:
    router = np.asarray(_get(tensors, prefix + "router_proj.weight"))
    if router.ndim != 2 or len(router) != e:
        raise ValueError(
            f"{prefix}router_proj.weight has shape {router.shape}: it must be ({e}, d), a row for each expert"
        )
    d = router.shape[1]
    gain = _shaped(tensors, prefix + "router_norm.weight", [(e,)])
    nested = prefix + "experts.up_proj.weight" in tensors
    names = [prefix + (f"experts.{n}_proj.weight" if nested else f"{n}_proj") for n in ("up", "down")]
    up = _shaped(tensors, names[0], [(e * f, d), (e, f, d)]).reshape(e, f, d).transpose(0, 2, 1)
    down = _shaped(tensors, names[1], [(d, e * f), (e, d, f)])
    down = down.reshape(d, e, f).transpose(1, 2, 0) if down.ndim == 2 else down.transpose(0, 2, 1)
    return {
        "router": {"kernel": router.T.astype(np.float32)},
        "router_norm": {"scale": gain.astype(np.float32)},
        "up": np.ascontiguousarray(up, dtype),
        "down": np.ascontiguousarray(down, dtype),
    }


def _get(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing: download the checkpoint again")
    return tensors[name]


def _shaped(tensors: Mapping[str, np.ndarray], name: str, shapes: list[tuple[int, ...]]) -> np.ndarray:
    x = np.asarray(_get(tensors, name))
    if x.shape not in shapes:
        raise ValueError(
            f"{name} has shape {x.shape}: by the router and the config it must be {' or '.join(map(str, shapes))}"
        )
    return x
