"""Weights published for PyTorch (names of torchvision, timm, transformers) as variables of the zoo's modules.

A module's config says which layers it has; a table per family says what each library calls them. All else follows from
shapes: convolutions OIHW -> HWIO, dense layers (out, in) -> (in, out), BatchNorm's four vectors.
Files have to be safetensors: PyTorch's own format is a pickle, and loading one runs whatever code is in it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jprune.checkpoint import vit_names
from jprune.checkpoint.tensors import load_safetensors
from jprune.models import densenet, mobilenet, resnet, shufflenet, vgg, vit
from jprune.models.shapes import first_layer, shapes_of
from jprune.tracing.paths import flatten

Table = dict[str, str]  # layer of the module ("stage1_block1/conv1") -> what its tensors' names begin with
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
IGNORED = "num_batches_tracked"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def load_torch(module: nn.Module, path: str | Path) -> Any:
    """`from_torch` of a safetensors file, as timm publishes them or `safetensors.torch.save_file` writes them.

    Raises:
      ValueError: no such file, another format, or tensors that are not this module's.
    """
    if os.fspath(path).endswith(PICKLES):
        raise ValueError(
            f"{path} is a pickle, which can run code when it is loaded: load it where you trust it and write "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    nested, _ = load_safetensors(path, separator=".")
    return from_torch(module, traverse_util.flatten_dict(nested, sep="."))


def from_torch(module: nn.Module, tensors: Mapping[str, Any]) -> Any:
    """Flax variables of a ResNet, VGG, MobileNetV2, ShuffleNetV2, DenseNet or ViT from the zoo.

    The widths are those of the module's config, pruned or not; of the tensors come the image's channels and, for a
    vision transformer, the number of tokens. Each tensor is used exactly once, and keeps its dtype.

    Args:
      module: of the zoo.
      tensors: {name in torchvision, timm or (vision transformers, without their model's name in front) transformers:
        array}, such as the `state_dict` of a model in numpy arrays.

    Raises:
      ValueError: no family with PyTorch names, or a tensor that is missing, left over or of another shape.
    """
    kind = type(module).__name__
    tensors = {name: x for name, x in tensors.items() if not name.endswith(IGNORED)}
    table = max(tables(module).values(), key=lambda t: sum(prefix + "weight" in tensors for prefix in t.values()))
    if isinstance(module, vit.ViT) and module.config.fused == ("block1_attn/query" in table):
        stored = module.clone(config=dataclasses.replace(module.config, fused=not module.config.fused))
        return (vit.fuse if module.config.fused else vit.unfuse)(stored, from_torch(stored, tensors))[1]
    first = table[first_layer(module)] + "weight"
    stem = _tensor(tensors, first, kind)
    if stem.ndim != 4:
        raise ValueError(f"tensor {first!r} has shape {stem.shape}, not that of a convolution: the file is another's")
    tokens = None
    if isinstance(module, vit.ViT):
        name = table["pos_embed"]
        positions = _tensor(tensors, name, kind)
        rows = 3 - name.endswith(".weight")  # of an Embedding: a matrix
        if positions.ndim != rows:
            raise ValueError(f"tensor {name!r} has shape {positions.shape}, not (1, tokens, width)")
        tokens = positions.shape[-2]
    shapes = shapes_of(module, stem.shape[1], tokens)
    names = torch_names(table, shapes)
    for name in tensors:
        if name not in names:
            raise ValueError(
                f"tensor {name!r} has no place in this {kind}: build the module with the file's depth and options, "
                "or leave the tensor out if the model does not need it"
            )
    config: Any = getattr(module, "config", None)
    side = config.pool_to if isinstance(module, vgg.VGG) else 1
    flattened = "dense1" if isinstance(module, vgg.VGG) and config.hidden else "head"
    wanted = dict(flatten(shapes))
    flat = {}
    for name, path in names.items():
        array = _tensor(tensors, name, kind)
        layer = path.split("/", 1)[1].rpartition("/")[0]
        bias = wanted.get(f"params/{layer}/bias")
        outputs = len(bias.shape) if bias is not None else 1
        if layer.rpartition("/")[2] in ("qkv", "query", "key", "value"):
            outputs = len(wanted[path].shape) - path.endswith("/kernel")
        value = _converted(array, wanted[path].shape, path, outputs, side if layer == flattened else 1)
        if value is None:
            raise ValueError(
                f"tensor {name!r} of shape {array.shape} does not fit leaf {path!r} of shape {wanted[path].shape}: "
                f"build the {kind} with the file's widths and number of classes"
            )
        flat[path] = jnp.asarray(value)
    return jax.tree.structure(shapes).unflatten([flat[path] for path in wanted])


def torch_names(table: Table, shapes: Any, leaves: Mapping[str, str] = LEAVES) -> dict[str, str]:
    """{tensor name: leaf path} of a tree of variables, under the names of one of the `tables`.

    `leaves` says what the file calls a layer's "kernel", "bias" and so on.
    """
    names = {}
    for path, _ in flatten(shapes):
        layer, _, leaf = path.split("/", 1)[1].rpartition("/")
        names[table[layer] + leaves[leaf] if layer else table[leaf]] = path
    return names


def tables(module: nn.Module) -> dict[str, Table]:
    """{"torchvision" or "timm": table} of a module; where the two agree, "torchvision" stands for both.

    Raises:
      ValueError: the module has no counterpart in either.
    """
    for family, makers in _FAMILIES.items():
        if isinstance(module, family):
            return {library: dict(make(module.config)) for library, make in makers.items()}
    raise ValueError(
        f"no PyTorch names are known for {type(module).__name__}, only for "
        f"{', '.join(f.__name__ for f in _FAMILIES)}: write its variables leaf by leaf"
    )


def _tensor(tensors: Mapping[str, Any], name: str, kind: str) -> np.ndarray:
    if name not in tensors:
        remedy = "build the module with the file's depth and options, or give a complete file"
        for wrapped in (n.removesuffix(name) for n in tensors if n.endswith("." + name)):
            if all(n.startswith(wrapped) for n in tensors):
                remedy = f"all names begin with {wrapped!r}: take it off"
        raise ValueError(f"tensor {name!r} of a {kind} is missing: {remedy}")
    array = np.asarray(tensors[name])
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"tensor {name!r} is {array.dtype}, not floating point: give the weights before quantisation")
    return array


def _converted(array: np.ndarray, shape: Any, path: str, outputs: int, side: int) -> np.ndarray | None:
    """A tensor as the leaf of that shape; None if it does not fit.

    Args:
      array: torch's.
      shape: the leaf's.
      path: the leaf's.
      outputs: how many of a kernel's axes count its outputs (the bias has them all).
      side: of the feature map that a dense layer reads flattened: (channels, side, side) in torch, channels last here.
    """
    if not path.endswith("/kernel"):
        if path.endswith("/bias"):
            return array.reshape(shape) if array.shape == (int(np.prod(shape)),) else None
        if path.endswith(("/pos_embed", "/cls_token")):  # CLIP has them without the axis for images
            return array.reshape(shape) if array.shape in (shape, shape[1:], shape[2:]) else None
        return array if array.shape == shape else None
    if len(shape) == 4 and outputs == 1:
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 and array.transpose(2, 3, 1, 0).shape == shape else None
    inputs, out = int(np.prod(shape[:-outputs])), int(np.prod(shape[-outputs:]))
    matrix = array.reshape(array.shape[0], -1) if array.ndim == 4 else array  # timm's VGG: a head of convolutions
    if matrix.shape != (out, inputs):
        return None
    spread = matrix.reshape(out, inputs // side**2, side, side)
    return spread.transpose(2, 3, 1, 0).reshape(shape)


# -- what torchvision and timm call the layers ---------------------------------------------------------------------

Pairs = Iterator[tuple[str, str]]


def _resnet(c: resnet.ResNetConfig) -> Pairs:
    yield from (("stem_conv", "conv1."), ("stem_bn", "bn1."), ("head", "fc."))
    for i, stage in enumerate(c.stages):
        for j, block in enumerate(stage):
            ours, theirs = f"stage{i + 1}_block{j + 1}", f"layer{i + 1}.{j}"
            for k in range(len(block.inner) + 1):
                yield f"{ours}/conv{k + 1}", f"{theirs}.conv{k + 1}."
                yield f"{ours}/bn{k + 1}", f"{theirs}.bn{k + 1}."
            yield f"{ours}/shortcut_conv", f"{theirs}.downsample.0."
            yield f"{ours}/shortcut_bn", f"{theirs}.downsample.1."


def _vgg(c: vgg.VGGConfig) -> Pairs:
    """torchvision numbers every module: convolution, BatchNorm, ReLU; pooling; in the head linear, ReLU, dropout."""
    yield from _vgg_features(c)
    for i in range(len(c.hidden)):
        yield f"dense{i + 1}", f"classifier.{3 * i}."
    yield "head", f"classifier.{3 * len(c.hidden)}."


def _vgg_timm(c: vgg.VGGConfig) -> Pairs:
    yield from _vgg_features(c)
    for i in range(len(c.hidden)):
        yield f"dense{i + 1}", f"pre_logits.fc{i + 1}."
    yield "head", "head.fc."


def _vgg_features(c: vgg.VGGConfig) -> Pairs:
    n = 0
    for i, block in enumerate(c.features):
        for j in range(len(block)):
            yield f"block{i + 1}_conv{j + 1}", f"features.{n}."
            yield f"block{i + 1}_bn{j + 1}", f"features.{n + 1}."
            n += 3
        n += i + 1 in c.pools


def _no_projection(c: mobilenet.MobileNetConfig) -> None:
    for i, block in enumerate(c.blocks):
        if block.projection:
            raise ValueError(
                f"block{i + 1} has a convolution on its shortcut, which torchvision's and timm's MobileNetV2 have not: "
                "build the module without projection"
            )


def _mobilenet(c: mobilenet.MobileNetConfig) -> Pairs:
    _no_projection(c)
    last = len(c.blocks) + 1
    yield from (("stem_conv", "features.0.0."), ("stem_bn", "features.0.1."), ("head", "classifier.1."))
    yield from (("last_conv", f"features.{last}.0."), ("last_bn", f"features.{last}.1."))
    for i, block in enumerate(c.blocks):
        ours, theirs, n = f"block{i + 1}", f"features.{i + 1}.conv", 0
        for layer in ("expand", "depthwise") if block.expanded else ("depthwise",):
            yield f"{ours}/{layer}_conv", f"{theirs}.{n}.0."
            yield f"{ours}/{layer}_bn", f"{theirs}.{n}.1."
            n += 1
        yield f"{ours}/project_conv", f"{theirs}.{n}."
        yield f"{ours}/project_bn", f"{theirs}.{n + 1}."


def _mobilenet_timm(c: mobilenet.MobileNetConfig) -> Pairs:
    """timm numbers blocks by stage; the first block of each is the one that adds nothing back."""
    _no_projection(c)
    yield from (("stem_conv", "conv_stem."), ("stem_bn", "bn1."), ("head", "classifier."))
    yield from (("last_conv", "conv_head."), ("last_bn", "bn2."))
    stage, place = -1, 0
    for i, block in enumerate(c.blocks):
        stage, place = (stage, place + 1) if block.residual else (stage + 1, 0)
        ours, theirs = f"block{i + 1}", f"blocks.{stage}.{place}"
        order = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if not block.expanded:
            order = {"depthwise": "conv_dw", "project": "conv_pw"}
        for n, (layer, name) in enumerate(order.items()):
            yield f"{ours}/{layer}_conv", f"{theirs}.{name}."
            yield f"{ours}/{layer}_bn", f"{theirs}.bn{n + 1}."


def _shufflenet(c: shufflenet.ShuffleNetConfig) -> Pairs:
    yield from (("stem_conv", "conv1.0."), ("stem_bn", "conv1.1."), ("head", "fc."))
    yield from (("last_conv", "conv5.0."), ("last_bn", "conv5.1."))
    left = {"left_depthwise_conv": 0, "left_depthwise_bn": 1, "left_conv": 2, "left_bn": 3}
    right = {"conv1": 0, "bn1": 1, "depthwise_conv": 3, "bn2": 4, "conv2": 5, "bn3": 6}
    for i, stage in enumerate(c.stages):
        for j in range(len(stage)):
            for branch, order in ((1, left), (2, right)):
                for layer, n in order.items():
                    yield f"stage{i + 1}_unit{j + 1}/{layer}", f"stage{i + 2}.{j}.branch{branch}.{n}."


def _densenet(c: densenet.DenseNetConfig) -> Pairs:
    yield from (("stem_conv", "features.conv0."), ("stem_bn", "features.norm0."))
    yield from (("last_bn", f"features.norm{len(c.blocks) + 1}."), ("head", "classifier."))
    for i, block in enumerate(c.blocks):
        for j in range(len(block)):
            ours, theirs = f"block{i + 1}_layer{j + 1}", f"features.denseblock{i + 1}.denselayer{j + 1}"
            for k in (1, 2):
                yield f"{ours}_conv{k}", f"{theirs}.conv{k}."
                yield f"{ours}_bn{k}", f"{theirs}.norm{k}."
        yield f"transition{i + 1}_conv", f"features.transition{i + 1}.conv."
        yield f"transition{i + 1}_bn", f"features.transition{i + 1}.norm."


_FAMILIES: dict[type, dict[str, Callable[[Any], Pairs]]] = {
    resnet.ResNet: {"torchvision": _resnet},
    vgg.VGG: {"torchvision": _vgg, "timm": _vgg_timm},
    mobilenet.MobileNetV2: {"torchvision": _mobilenet, "timm": _mobilenet_timm},
    shufflenet.ShuffleNetV2: {"torchvision": _shufflenet},
    densenet.DenseNet: {"torchvision": _densenet},
    vit.ViT: {
        "timm": vit_names.timm,
        "torchvision": vit_names.torchvision,
        "transformers": vit_names.transformers,
        "clip": vit_names.clip,
    },
}
