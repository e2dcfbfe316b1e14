"""The three forms in which a pruned decoder is written for other programs, and how much of it is gone.

uniform  all layers equally wide: an ordinary model of its family
padded   zero rows and columns up to the widest layer: an ordinary model too, and exactly the same function
hetero   layers as they are; loads with the few lines of code written beside the weights
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jprune.checkpoint.hf_config import CLASSES, PER_LAYER, hf_from_config
from jprune.models.llama_config import LlamaConfig
from jprune.models.moe.routers import ReluNorm

CODE_FILE = "modeling_jprune.py"


# -- padding ---------------------------------------------------------------------------------------------------------


def padded_config(config: LlamaConfig, multiple_of: int = 128) -> LlamaConfig:
    """The uniform widths that hold every layer: the widest MLP rounded up, the largest group of query heads, so many
    key-value heads that a LLaMA's heads divide the stream again (where that is possible at all)."""
    ffn = -(-max(config.ffn) // multiple_of) * multiple_of
    group = max(q // kv for q, kv in zip(config.q_heads, config.kv_heads, strict=True))
    kv = max(config.kv_heads)
    if config.family == "llama":
        legal = [(k * g, k, g) for k in range(kv, config.stream + 1) for g in range(group, config.stream // k + 1)
                 if config.stream % (k * g) == 0]  # fmt: skip
        if legal:
            _, kv, group = min(legal)
    n = config.depth
    return dataclasses.replace(config, ffn=(ffn,) * n, q_heads=(kv * group,) * n, kv_heads=(kv,) * n, value_dim=None)


def pad_layer(name: str, x: np.ndarray, small: LlamaConfig, big: LlamaConfig, layer: int) -> np.ndarray:
    """A logical tensor of a layer (rows are outputs) with zeros up to the widths of `big`.

    Query heads are padded inside their key-value group, so that each still meets the keys it belongs to.
    """
    for axis, shape in _split(name, small, layer).items():
        x = _pad_axis(x, axis, shape, _split(name, big, layer)[axis])
    return x


def strip_layer(name: str, x: np.ndarray, small: LlamaConfig, big: LlamaConfig, layer: int) -> np.ndarray:
    """The inverse of `pad_layer`.

    Raises:
      ValueError: what would be cut off is not zero: the padded model was trained on.
    """
    whole = x
    for axis, shape in _split(name, small, layer).items():
        wide = _split(name, big, layer)[axis]
        x = np.moveaxis(x, axis, 0)
        x = x.reshape(*wide, *x.shape[1:])[tuple(slice(n) for n in shape)]
        x = np.moveaxis(x.reshape(math.prod(shape), *x.shape[len(shape) :]), 0, axis)
    if np.count_nonzero(whole) != np.count_nonzero(x):
        raise ValueError(
            f"the padding of {name!r} in layer {layer} is not zero: the padded model was trained on. Load it as it is "
            "with keep_padding=True"
        )
    return x


def _split(name: str, c: LlamaConfig, layer: int) -> dict[int, tuple[int, ...]]:
    """{axis of a logical tensor: the sizes it is made of}, for the axes that padding lengthens."""
    kv = c.kv_heads[layer]
    queries, keys = (kv, c.q_heads[layer] // kv, c.head_dim), (kv, c.head_dim)
    value = c.value_dims[layer]
    matrix = name.removesuffix("_bias")
    if matrix == "o" or matrix == "down":
        if name != matrix:
            return {}
        return {1: (*queries[:2], value) if matrix == "o" else (c.ffn[layer],)}
    rows = {"q": queries, "k": keys, "v": (kv, value), "gate": (c.ffn[layer],), "up": (c.ffn[layer],)}.get(matrix)
    return {} if rows is None else {0: rows}


def _pad_axis(x: np.ndarray, axis: int, shape: tuple[int, ...], wide: tuple[int, ...]) -> np.ndarray:
    x = np.moveaxis(x, axis, 0)
    rest = x.shape[1:]
    x = np.pad(
        x.reshape(*shape, *rest), [*((0, w - n) for n, w in zip(shape, wide, strict=True)), *[(0, 0)] * len(rest)]
    )
    return np.moveaxis(x.reshape(math.prod(wide), *rest), 0, axis)


# -- layers of different widths --------------------------------------------------------------------------------------


def hetero_config(config: LlamaConfig, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of layers that differ: transformers' `per_layer_config`, and `block_configs` where only MLPs do.

    The model type is the family's and its global widths may be read, so that tokenizers load without our code. The stock
    classes refuse the model by the shapes of its tensors.
    """
    c = config
    out = hf_from_config(padded_config(c, 1), c.family, base)  # numbers of heads that LLaMA's own check accepts
    own = f"Jprune{CLASSES[c.family]}"
    module = CODE_FILE.removesuffix(".py")
    out |= {
        "architectures": [f"{own}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{own}Config",
            "AutoModelForCausalLM": f"{module}.{own}ForCausalLM",
        },
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": {
            str(i): {key: getattr(c, name)[i] for key, name in PER_LAYER.items()} for i in range(c.depth)
        },
    }
    if len(set(c.q_heads)) == len(set(c.kv_heads)) == 1:
        group = c.q_heads[0] // c.kv_heads[0]
        out["block_configs"] = [
            {
                "attention": {"n_heads_in_group": group, "no_op": False},
                "ffn": {"intermediate_size": n, "no_op": False},
            }
            for n in c.ffn
        ]
    return out


def remote_code(family: str) -> str:
    """The Python file with which transformers loads layers of different widths (trust_remote_code=True)."""
    return _CODE.replace("FAMILY", family).replace("Stock", CLASSES[family])


_CODE = '''"""A decoder whose layers differ in width, as `per_layer_config` of its config.json says. Written by jprune."""

import copy

import torch
from transformers import StockConfig, StockForCausalLM, StockModel
from transformers.models.FAMILY.modeling_FAMILY import StockDecoderLayer


class JpruneStockConfig(StockConfig):
    allow_global_per_layer_attribute_access = True  # the layers below never read the global widths

    def validate_architecture(self):
        """Heads need not divide the hidden size: head_dim is explicit."""


def layer_config(config, i):
    """The config of one layer; older versions of transformers keep the overrides as a plain dict."""
    found = config.per_layer_config
    if not isinstance(found, dict):
        return found[i]
    own = copy.copy(config)
    for key, value in found.get(str(i), {}).items():
        setattr(own, key, value)
    return own


class JpruneStockModel(StockModel):
    config_class = JpruneStockConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(
            [StockDecoderLayer(layer_config(config, i), i) for i in range(config.num_hidden_layers)]
        )
        self.post_init()


class JpruneStockForCausalLM(StockForCausalLM):
    config_class = JpruneStockConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = JpruneStockModel(config)
        self.post_init()
'''


# -- how much is gone ------------------------------------------------------------------------------------------------


def count(config: LlamaConfig) -> dict[str, int]:
    """Numbers of a model: ffn channels, query and kv heads, linear weights of all layers, all parameters; experts."""
    c, d, h = config, config.stream, config.head_dim
    linear = other = 0
    count = 1 if c.experts is None else c.experts.count
    for f, q, kv, v in zip(c.ffn, c.q_heads, c.kv_heads, c.value_dims, strict=True):
        linear += (3 if c.experts is None or c.experts.gated else 2) * count * d * f + d * (
            q * h + kv * h + kv * v + q * v
        )
        other += 2 * d + (2 * h if c.qk_norm else 0)
        if c.experts is not None:
            other += count * d + (count if isinstance(c.experts.router, ReluNorm) else 0)
        other += (q * h + kv * h + kv * v if c.qkv_bias else 0) + (d if c.o_bias else 0) + c.mlp_bias * (2 * f + d)
    outside = c.vocab * d * (1 if c.tied else 2) + d
    return {
        "ffn_channels": count * sum(c.ffn),
        "query_heads": sum(c.q_heads),
        "key_value_heads": sum(c.kv_heads),
        **({} if c.experts is None else {"experts": count * c.depth}),
        "block_linear_weights": linear,
        "parameters": linear + other + outside,
    }


def removed(dense: LlamaConfig, pruned: LlamaConfig) -> dict[str, float]:
    """Fractions that pruning removed, by every count in use: the literature mixes them."""
    before, after = count(dense), count(pruned)
    return {name: 1 - after[name] / before[name] for name in before}
