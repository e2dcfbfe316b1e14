"""Trees of a decoder's parameters: scanned and unrolled form, the config read back from a pruned tree, folded norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.models import layers
from jprune.models.llama_config import LlamaConfig


def is_scanned(variables: Any) -> bool:
    """Whether a tree of variables (or of parameters) has its layers stacked."""
    return "layers" in layers.params_of(variables)


def unstack_layers(variables: Any) -> Any:
    """The unrolled form of a scanned tree: `layers` becomes `layer0`, `layer1`, ...; other forms stay as they are.

    Leaves may be arrays with a leading layer axis, `ShapeDtypeStruct`s, or the lists of one array per layer that
    compacting with `graph.decide(keep, stacked="unstack")` makes where layers keep different widths.
    """
    params = layers.params_of(variables)
    if "layers" not in params:
        return variables
    stacked = params["layers"]
    out = {name: value for name, value in params.items() if name != "layers"}
    for i in range(_depth(stacked)):
        out[f"layer{i}"] = jax.tree.map(lambda x, i=i: _row(x, i), stacked, is_leaf=_is_list)
    return {**variables, "params": out} if "params" in variables else out


def stack_layers(variables: Any) -> Any:
    """The scanned form of an unrolled tree: one leading axis over the layers; other forms stay as they are.

    Raises:
      ValueError: layers of different widths, named by leaf.
    """
    params = layers.params_of(variables)
    names = layer_names(params)
    if not names:
        return variables
    first = params[names[0]]

    def stack(path: Any, *rows: Any) -> Any:
        shapes = [tuple(x.shape) for x in rows]
        if len(set(shapes)) > 1:
            i = next(i for i, s in enumerate(shapes) if s != shapes[0])
            leaf = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"leaf {leaf!r} has shape {shapes[0]} in layer 0 and {shapes[i]} in layer {i}: only equally wide "
                "layers can be stacked"
            )
        if isinstance(rows[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(rows), *shapes[0]), rows[0].dtype)
        return np.stack(rows) if all(isinstance(x, np.ndarray) for x in rows) else jnp.stack(rows)

    out = {name: value for name, value in params.items() if name not in names}
    out["layers"] = jax.tree_util.tree_map_with_path(stack, first, *(params[name] for name in names[1:]))
    return {**variables, "params": out} if "params" in variables else out


def layer_names(params: Mapping[str, Any]) -> list[str]:
    """`layer0`, `layer1`, ... as far as an unrolled tree has them; raises ValueError where one is missing."""
    found = sorted(int(n[5:]) for n in params if n.startswith("layer") and n[5:].isdigit())
    if found != list(range(len(found))):
        raise ValueError(f"the tree has layers {found}: one is missing in between")
    return [f"layer{i}" for i in found]


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def _depth(stacked: Any) -> int:
    leaf = jax.tree.leaves(stacked, is_leaf=_is_list)[0]
    return len(leaf) if isinstance(leaf, list) else leaf.shape[0]


def _row(x: Any, i: int) -> Any:
    if isinstance(x, list):  # each array has kept a layer axis of length one
        return _row(x[i], 0)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[i]


def config_from_params(variables: Any, base: LlamaConfig) -> LlamaConfig:
    """The config whose widths are those of a (pruned) tree, unrolled or scanned.

    The attention scale and the norms' divisor stay those of `base`, with which the weights were trained.

    Raises:
      ValueError: another model's tree, another number of layers, or pruned rotary pairs, which no config can say.
    """
    p = layers.params_of(variables)
    if is_scanned(p) and any(isinstance(x, list) for x in jax.tree.leaves(p["layers"], is_leaf=_is_list)):
        raise ValueError("the layers are lists of unequal arrays: bring the tree into form with unstack_layers first")
    scanned = is_scanned(p)
    names = ["layers"] * base.depth if scanned else layer_names(p)
    if len(names) != base.depth or (scanned and _depth(p["layers"]) != base.depth):
        found = _depth(p["layers"]) if scanned else len(names)
        raise ValueError(f"the tree has {found} layers, the config {base.depth}: they belong to different models")
    ffn, q_heads, kv_heads, value = [], [], [], []
    counts: set[int] = set()
    for name in names:
        heads, head = layers.shape_of(p, name, "attn", "q", "kernel")[-2:]
        if head != base.head_dim:
            raise ValueError(
                f"the query heads of {name!r} have {head} channels, the config {base.head_dim}: rotary pairs were "
                "pruned, and which ones no config can say; run the tree with graph.replay(keep)"
            )
        if base.experts is None:
            ffn.append(layers.kernel_width(p, name, "mlp", "gate"))
        else:
            count, _, width = layers.shape_of(p, name, "experts", "up")[-3:]
            ffn.append(int(width))
            counts.add(int(count))
        q_heads.append(int(heads))
        kv_heads.append(int(layers.shape_of(p, name, "attn", "k", "kernel")[-2]))
        value.append(layers.kernel_width(p, name, "attn", "v"))
    if len(counts) > 1:
        raise ValueError(f"the layers have {sorted(counts)} experts: a config has one number of them for all layers")
    experts = None if base.experts is None else dataclasses.replace(base.experts, count=counts.pop())
    vocab, stream = layers.shape_of(p, "embed", "embedding")
    return dataclasses.replace(
        base,
        vocab=int(vocab),
        stream=int(stream),
        ffn=tuple(ffn),
        experts=experts,
        q_heads=tuple(q_heads),
        kv_heads=tuple(kv_heads),
        value_dim=None if set(value) == {base.head_dim} else tuple(value),
        norm_width=None if int(stream) == (base.norm_width or base.stream) else base.norm_width or base.stream,
    )


def fold_norm_width(variables: Any, config: LlamaConfig) -> tuple[LlamaConfig, Any]:
    """The same function with norms that divide by the stream's own width: their scales and `eps` take up the ratio.

    x / sqrt(s/N + e) * w = x / sqrt(s/n + e N/n) * (w sqrt(N/n)) for the square sum s. Exact but for the rounding of
    the scales to their dtype. Other programs know no `norm_width`.
    """
    if config.norm_width in (None, config.stream):
        return dataclasses.replace(config, norm_width=None), variables
    ratio = config.norm_width / config.stream

    def scale(path: Any, x: Any) -> Any:
        keys = [str(getattr(k, "key", k)) for k in path]
        wide = keys[-2:-1] and keys[-2] in ("input_norm", "post_norm", "final_norm")
        return (x * np.sqrt(ratio)).astype(x.dtype) if wide else x

    folded = dataclasses.replace(config, norm_width=None, eps=config.eps * ratio)
    return folded, jax.tree_util.tree_map_with_path(scale, variables)


def with_biases(variables: Any, config: LlamaConfig) -> tuple[LlamaConfig, Any]:
    """The same function with biases, zero where they are new, behind the attention and in the MLP.

    What pruning removes can then move into them (`jprune.surgery.compensate`). A LLaMA gets them on queries, keys and
    values too: its class in other programs knows attention with biases everywhere or nowhere.
    """
    params = dict(layers.params_of(variables))
    modules = [] if config.o_bias else [("attn", "o")]
    everywhere = config.family == "llama" and not config.qkv_bias
    modules += [("attn", name) for name in "qkv"] if everywhere else []
    modules += [] if config.mlp_bias else [("mlp", name) for name in ("gate", "up", "down")]
    lead = 1 if is_scanned(params) else 0
    for name in ["layers"] if lead else layer_names(params):
        layer = dict(params[name])
        for module, linear in modules:
            kernel = layer[module][linear]["kernel"]
            inputs = 1 if linear in ("q", "k", "v") else kernel.ndim - lead - 1
            bias = jnp.zeros((*kernel.shape[:lead], *kernel.shape[lead + inputs :]), kernel.dtype)
            layer[module] = {**layer[module], linear: {"kernel": kernel, "bias": bias}}
        params[name] = layer
    new = dataclasses.replace(config, o_bias=True, mlp_bias=True, qkv_bias=config.qkv_bias or everywhere)
    return new, {**variables, "params": params} if "params" in variables else params
