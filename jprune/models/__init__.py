"""The model zoo: Flax linen modules whose every width stands in their config, so that a pruned tree can be rebuilt.

`build("resnet20", num_classes=10)` gives a module; `rebuild(module, small)` gives the module of a compacted tree.
No model knows a method or a file: methods come in through hooks (reducers, attention functions, masks).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from jprune.models import densenet, dit, llama, mobilenet, resnet, shufflenet, unet, vgg, vit
from jprune.models.shapes import check_tree


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name of the zoo.

    Attributes:
      make: num_classes -> module.
      image: (height, width, channels) the model was designed for; other sizes work for everything but the ViTs.
      num_classes: of its customary data set.
      about: one line.
    """

    make: Callable[[int], nn.Module]
    image: tuple[int, int, int]
    num_classes: int
    about: str


_CIFAR, _IMAGENET, _DIGITS = (32, 32, 3), (224, 224, 3), (8, 8, 1)

MODELS: dict[str, Entry] = {
    **{
        f"resnet{d}": Entry(
            lambda n, d=d: resnet.cifar(d, n), _CIFAR, 10, f"CIFAR ResNet-{d}, 1x1 shortcuts (option B)"
        )
        for d in (20, 32, 56, 110)
    },
    **{
        f"resnet{d}_pad": Entry(
            lambda n, d=d: resnet.cifar(d, n, "pad"), _CIFAR, 10, f"CIFAR ResNet-{d}, zero-padded shortcuts (option A)"
        )
        for d in (20, 32, 56, 110)
    },
    "resnet_digits": Entry(
        lambda n: resnet.small((2, 2, 2), n), _DIGITS, 10, "ResNet with two blocks a stage, widths 16/32/64"
    ),
    **{
        f"resnet{d}": Entry(lambda n, d=d: resnet.imagenet(d, n), _IMAGENET, 1000, f"ImageNet ResNet-{d}")
        for d in (18, 34, 50)
    },
    **{
        f"vgg{d}_bn": Entry(lambda n, d=d: vgg.vgg(d, n), _CIFAR, 10, f"VGG-{d} with BatchNorm, one classifier layer")
        for d in (16, 19)
    },
    **{
        f"vgg{d}_bn_imagenet": Entry(
            lambda n, d=d: vgg.vgg(d, n, imagenet=True), _IMAGENET, 1000, f"ImageNet VGG-{d} with BatchNorm"
        )
        for d in (16, 19)
    },
    "mobilenet_v2": Entry(lambda n: mobilenet.mobilenet_v2(n), _IMAGENET, 1000, "MobileNetV2"),
    "mobilenet_v2_small": Entry(
        lambda n: mobilenet.mobilenet_v2(n, small_images=True), _CIFAR, 10, "MobileNetV2 for small images"
    ),
    "shufflenet_v2": Entry(lambda n: shufflenet.shufflenet_v2(n), _IMAGENET, 1000, "ShuffleNetV2 1x"),
    "shufflenet_v2_small": Entry(
        lambda n: shufflenet.shufflenet_v2(n, small_images=True), _CIFAR, 10, "ShuffleNetV2 1x for small images"
    ),
    "densenet121": Entry(densenet.densenet121, _IMAGENET, 1000, "DenseNet-121"),
    "densenet_small": Entry(
        lambda n: densenet.densenet((4, 4, 4), 12, 24, n, small_images=True),
        _CIFAR,
        10,
        "DenseNet-BC of three blocks, growth 12, for small images",
    ),
    "vit_base": Entry(lambda n: vit.vit_base(n), _IMAGENET, 1000, "ViT-B/16, class token"),
    "vit_small": Entry(
        lambda n: vit.vit(64, 4, 4, 4, n, mlp=128, pool="mean"),
        _CIFAR,
        10,
        "ViT of 4 blocks, patch 4, for small images",
    ),
    "vit_digits": Entry(
        lambda n: vit.vit(64, 4, 4, 2, n, mlp=128, pool="mean"), _DIGITS, 10, "ViT of 4 blocks, patch 2, for the digits"
    ),
    "unet_small": Entry(lambda n: unet.unet(8, 3, n), (32, 32, 3), 1, "U-Net of three levels, BatchNorm"),
}


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """The module of that name in `MODELS`; raises ValueError with the nearest names for an unknown one."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3) or sorted(MODELS)
        raise ValueError(f"no model {name!r} in the zoo: did you mean {', '.join(near)}?")
    entry = MODELS[name]
    return entry.make(entry.num_classes if num_classes is None else num_classes)


_READERS: dict[type, Callable[[Any, Any], Any]] = {
    resnet.ResNet: resnet.config_from_params,
    vgg.VGG: vgg.config_from_params,
    mobilenet.MobileNetV2: mobilenet.config_from_params,
    shufflenet.ShuffleNetV2: shufflenet.config_from_params,
    densenet.DenseNet: densenet.config_from_params,
    vit.ViT: vit.config_from_params,
    unet.UNet: unet.config_from_params,
    llama.Llama: llama.config_from_params,
    dit.VideoDiT: dit.config_from_params,
}


def rebuild(module: nn.Module, variables: Any) -> nn.Module:
    """The zoo module whose widths are those of a (compacted) tree of variables of `module`.

    The result applied to the tree is `graph.replay(keep)`, without the graph; it re-initialises to the same shapes.

    Args:
      module: the module that was traced.
      variables: arrays or `ShapeDtypeStruct`s: all collections, or the parameters alone.

    Raises:
      ValueError: not a model of the zoo, another model's tree, or widths its config cannot express (the channels of
        zero-padded shortcuts, those before a GroupNorm).
    """
    reader = _READERS.get(type(module))
    if reader is None:
        raise ValueError(
            f"{type(module).__name__} is not a model of the zoo: run its pruned tree with graph.replay(keep)"
        )
    rebuilt = module.clone(config=reader(variables, module.config))
    if isinstance(rebuilt, llama.Llama) and rebuilt.scanned != llama.is_scanned(variables):
        rebuilt = rebuilt.clone(scanned=llama.is_scanned(variables))
    check_tree(rebuilt, variables)
    return rebuilt


__all__ = ["MODELS", "Entry", "build", "rebuild"]
