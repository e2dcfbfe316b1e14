"""What the files of a vision transformer say of it: its `ViTConfig`, and how it wants its images.

Depth and widths are read off the tensors; what no shape shows (heads, activation, epsilon) comes from config.json or
from the architecture's name. A name, option or activation that is not known is an error: a guess would be a model of
the right shapes and wrong answers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jprune.data.images import MEAN, STD, Preprocess
from jprune.files.json_files import REQUIRED, Fields
from jprune.models.vit_config import ViTBlock, ViTConfig

Shapes = Mapping[str, tuple[int, ...]]

# Heads of timm's and torchvision's sizes, as their model definitions have them.
HEADS = {
    "tiny": 3, "xsmall": 4, "wee": 4, "dwee": 4, "little": 5, "dlittle": 5, "small": 6, "medium": 8, "mediumd": 8,
    "betwixt": 10, "base": 12, "so150m2": 13, "so150m": 14, "large": 16, "intern300m": 16, "so400m": 16, "huge": 16,
    "giant": 16, "giantopt": 16, "gigantic": 16,
}  # fmt: skip
TORCHVISION_HEADS = {768: 12, 1024: 16, 1280: 16}
ODD_HEADS = {"vit_base_patch16_gap_224": 16}
# Those whose MLP has the tanh form of GELU.
TANH = re.compile(r"vit_(base_patch32|giantopt_patch16|large_patch16(?=_siglip_gap_512)|so400m_patch16)_siglip_gap")
# What else may stand in a name; other words (rope, relpos, parallel blocks ...) are other computations.
WORDS = re.compile(r"patch\d+|\d+|36x1|miil|clip|quickgelu|siglip|gap|reg\d+|dinov2|tipsv2|distilled|plus|mae|dino")
# timm's arguments that the tensors show or that do nothing in evaluation; `num_heads` and `act_layer` are read.
SHOWN = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "act_layer",
    "dynamic_img_size", "weight_init", "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate",
}  # fmt: skip
ACTS = {
    "gelu": "gelu", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu", "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def timm_config(config: Mapping[str, Any], shapes: Shapes, heads: int | None = None) -> ViTConfig:
    """The model of a timm config.json and the shapes of its tensors."""
    f = Fields(config)
    name, args, cfg = f.text("architecture"), f.fields("model_args", {}), f.fields("pretrained_cfg", {})
    words = name.split("_")
    size = words[1] if len(words) > 1 else ""
    standard = 14 if "plus" in words else ODD_HEADS.get(name, HEADS.get(size))
    count = heads or args.integer("num_heads", None, least=1) or standard
    if words[0] not in ("vit", "deit", "deit3") or not all(WORDS.fullmatch(w) for w in words[2:]) or not count:
        raise ValueError(
            f"architecture {name!r} is not a plain vision transformer of timm (vit_SIZE_patchN..., deit_..., deit3_..., "
            f"SIZE one of {', '.join(HEADS)}): its heads and its computation are not known; for another SIZE give heads="
        )
    if odd := sorted(k for k, v in args.items() if v and k not in SHOWN):
        raise ValueError(f"model_args of {name!r} has {odd[0]} = {args[odd[0]]!r}, which is not supported")
    tanh = TANH.match(name)
    act = "quick_gelu" if "quickgelu" in words else "gelu_tanh" if tanh else "gelu"
    pool = args.text("global_pool", None) or f.text("global_pool", None)
    pool = pool or ("avg" if "gap" in words or "cls_token" not in shapes else "token")
    if pool not in ("token", "avg"):
        raise ValueError(f"{name!r} pools its tokens by {pool!r}: only 'token' and 'avg' are supported")
    image = _pair(args, "img_size", None) or cfg.integers("input_size", None, count=3, least=1)
    registers = _shape(shapes, "reg_token", 3)[1] if "reg_token" in shapes else 0
    return _config(
        shapes,
        count,
        stem="patch_embed.proj.",
        positions="pos_embed",
        block="blocks.{}.",
        fc1="mlp.fc1.weight",
        head="head.",
        image=image and image[-2:],
        pool="token" if pool == "token" else "mean",
        class_token="cls_token" in shapes,
        distilled="dist_token" in shapes,
        both_heads="dist_token" in shapes and ("head_dist.weight" in shapes or "head.weight" not in shapes),
        registers=registers,
        norm_first=pool == "avg" and "norm.weight" in shapes,
        pre_norm="norm_pre.weight" in shapes,
        layer_scale="blocks.0.ls1.gamma" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        activation=_activation(args.text("act_layer", None) or act),
        epsilon=1e-5 if "clip" in words else 1e-6,
    )


def hf_config(config: Mapping[str, Any], shapes: Shapes, heads: int | None = None) -> ViTConfig:
    """The model of a config.json of transformers' ViT or DeiT; names without "vit." or "deit." in front."""
    f = Fields(config)
    both = "distillation_classifier.weight" in shapes
    first = "encoder.layer.0.attention.attention.query.bias"
    return _config(
        shapes,
        heads or f.integer("num_attention_heads", 12, least=1),  # what is not in the file is transformers' default
        stem="embeddings.patch_embeddings.projection.",
        positions="embeddings.position_embeddings",
        block="encoder.layer.{}.",
        fc1="intermediate.dense.weight",
        head="cls_classifier." if both else "classifier.",
        image=_pair(f, "image_size", 224),
        class_token=True,
        distilled="embeddings.distillation_token" in shapes,
        both_heads=both,
        qkv_bias=first in shapes,
        fused=False,
        activation=_activation(f.text("hidden_act", "gelu")),
        epsilon=f.number("layer_norm_eps", 1e-12, above=0),
    )


def clip_config(config: Mapping[str, Any], shapes: Shapes, heads: int | None = None) -> ViTConfig:
    """The vision tower of a `vision_config` of transformers' CLIP; names without "vision_model." in front."""
    f = Fields(config)
    return _config(
        shapes,
        heads or f.integer("num_attention_heads", 12, least=1),
        stem="embeddings.patch_embedding.",
        positions="embeddings.position_embedding.weight",
        block="encoder.layers.{}.",
        fc1="mlp.fc1.weight",
        head="visual_projection.",
        image=_pair(f, "image_size", 224),
        class_token=True,
        pre_norm=True,
        fused=False,
        activation=_activation(f.text("hidden_act", "quick_gelu")),
        epsilon=f.number("layer_norm_eps", 1e-5, above=0),
    )


def torchvision_config(shapes: Shapes, heads: int | None = None) -> ViTConfig:
    """torchvision's `vit_b_16` and its like, from shapes alone."""
    width = _shape(shapes, "conv_proj.weight", 4)[0]
    if not heads and width not in TORCHVISION_HEADS:
        raise ValueError(f"no vit_* of torchvision is {width} wide: how many heads there are is not known; give heads=")
    return _config(
        shapes,
        heads or TORCHVISION_HEADS[width],
        stem="conv_proj.",
        positions="encoder.pos_embedding",
        block="encoder.layers.encoder_layer_{}.",
        fc1="mlp.0.weight",
        head="heads.head.",
        class_token=True,
    )


def augreg_config(shapes: Shapes) -> ViTConfig:
    """The model of an .npz file in Flax's layout, from shapes alone."""
    torch = {}  # the few shapes that `_config` reads, the way PyTorch has them
    for name, shape in shapes.items():
        torch[name] = shape if "kernel" not in name else shape[::-1]
    query = _shape(shapes, "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", 3)
    return _config(
        torch,
        query[1],
        stem="embedding/",
        positions="Transformer/posembed_input/pos_embedding",
        block="Transformer/encoderblock_{}/",
        fc1="MlpBlock_3/Dense_0/kernel",
        head="head/",
        weight="kernel",
        class_token="cls" in shapes,
        pool="token" if "cls" in shapes else "mean",
        norm_first="cls" not in shapes,
        fused=False,
    )


def _config(
    shapes: Shapes,
    heads: int,
    *,
    stem: str,
    positions: str,
    block: str,
    fc1: str,
    head: str,
    image: tuple[int, int] | None = None,
    weight: str = "weight",
    **options: Any,
) -> ViTConfig:
    kernel = _shape(shapes, stem + weight, 4)
    if kernel[2] != kernel[3] or 0 in kernel:
        raise ValueError(f"{stem + weight!r} has shape {kernel}: a convolution over square patches is needed")
    width, patch = kernel[0], kernel[2]
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} heads do not divide the width {width}: the config is another model's, or give heads="
        )
    depth = 0
    while block.format(depth) + fc1 in shapes:
        depth += 1
    if not depth:
        raise ValueError(f"tensor {block.format(0) + fc1!r} is missing: the file is another model's")
    size = width // heads
    blocks = tuple(ViTBlock(heads, size, size, _shape(shapes, block.format(i) + fc1, 2)[0]) for i in range(depth))
    config = ViTConfig(
        patch=patch,
        stream=width,
        blocks=blocks,
        num_classes=_shape(shapes, head + weight, 2)[0] if head + weight in shapes else 0,
        patch_bias=stem + "bias" in shapes,
        head_bias=head + "bias" in shapes,
        **options,
    )
    rows = _shape(shapes, positions, 2, 3)[-2]
    by_rows = {}
    for which, count in (("all", rows - config.prefix), ("patches", rows)):
        side = math.isqrt(max(count, 0))
        grid = (image[0] // patch, image[1] // patch) if image else (side, side)
        if count > 0 and grid[0] * grid[1] == count:
            by_rows[which] = image or (side * patch, side * patch)
    if not by_rows:
        of = f"images of {image[0]}x{image[1]} pixels" if image else "a square image"
        raise ValueError(
            f"{positions!r} has {rows} rows, and {of} in patches of {patch} with {config.prefix} special tokens does "
            "not: the config is another model's"
        )
    which = next(iter(by_rows))
    return dataclasses.replace(config, positions=which, image=by_rows[which])


def _shape(shapes: Shapes, name: str, *ranks: int) -> tuple[int, ...]:
    """The shape of a tensor, which must have one of these numbers of axes."""
    if name not in shapes:
        raise ValueError(f"tensor {name!r} is missing: the file is another model's, or not complete")
    if len(shapes[name]) not in ranks:
        raise ValueError(f"tensor {name!r} has shape {shapes[name]}, not {ranks[0]} axes: the file is another model's")
    return shapes[name]


def _activation(name: Any) -> str:
    if name not in ACTS:
        raise ValueError(f"activation {name!r} is not supported: only {', '.join(sorted(ACTS))} are")
    return ACTS[name]


def _pair(f: Fields, key: str, default: int | None) -> Any:
    """(height, width) of an entry that says both or the side of a square."""
    if isinstance(f.get(key), list | tuple):
        return f.integers(key, count=2, least=1)
    side = f.integer(key, default, least=1)
    return side and (side, side)


# -- images --------------------------------------------------------------------------------------------------------


def timm_preprocess(config: Mapping[str, Any]) -> Preprocess:
    """What timm's evaluation does to a picture, from the "pretrained_cfg" of a config.json."""
    cfg = Fields(config).fields("pretrained_cfg", {})
    if "mean" not in cfg or "std" not in cfg or "input_size" not in cfg:
        raise ValueError(
            "config.json has no pretrained_cfg with mean, std and input_size: it does not say what to feed"
        )
    _, height, width = cfg.integers("input_size", count=3, least=1)
    mode = cfg.text("crop_mode", None) or "center"
    if height != width or mode not in ("center", "squash"):
        raise ValueError(
            f"images of {height}x{width} pixels with crop_mode {mode!r}: only squares, center or squash are"
        )
    share = cfg.number("crop_pct", None, above=0, most=1) or 0.875
    filled = cfg.text("interpolation", None) or "bicubic"
    return _preprocess(
        height, math.floor(height / share), *_normalisation(cfg, "mean", "std"), filled, mode == "squash"
    )


def hf_preprocess(kind: str, config: Mapping[str, Any], side: int) -> Preprocess:
    """What transformers' image processor does, from a preprocessor_config.json; `kind` is the "model_type".

    Where the file does not say, transformers' defaults for the kind of model hold, at the model's `side`.
    """
    f, clip = Fields(config), kind.startswith("clip")
    crop = f.flag("do_center_crop", kind != "vit")
    squash = not clip
    if isinstance(f.get("size"), Mapping):
        own = f.fields("size")
        squash = "shortest_edge" not in own
        values = {own.integer(k, least=1) for k in ("shortest_edge", "height", "width") if k in own}
        if len(values) != 1:
            raise ValueError(f"preprocessor_config.json has size {dict(own)}: only squares or shortest_edge are read")
        size = values.pop()
    else:
        size = f.integer("size", {"deit": round(side * 256 / 224)}.get(kind, side), least=1)
    if not crop:
        cut = size
    elif isinstance(f.get("crop_size"), Mapping):
        own = f.fields("crop_size")
        cut = max(own.integer(k, least=1) for k in own) if own else side
    else:
        cut = f.integer("crop_size", side, least=1)
    filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    resample = f.integer("resample", 2 if kind == "vit" else 3)
    if resample not in filters or not f.flag("do_resize", True):
        raise ValueError(f"preprocessor_config.json wants no resizing, or resample {resample!r}: neither is supported")
    usual = (CLIP_MEAN, CLIP_STD) if clip else (HALF, HALF)
    return _preprocess(cut, size, *_normalisation(f, "image_mean", "image_std", *usual), filters[resample], squash)


def torchvision_preprocess(side: int, swag: bool) -> Preprocess:
    """torchvision's: the weights named SWAG scale bicubically to their size, the others to 256/224 of it."""
    if swag:
        return _preprocess(side, side, MEAN, STD, "bicubic", False)
    return _preprocess(side, round(side * 256 / 224), MEAN, STD, "bilinear", False)


def augreg_preprocess(side: int) -> Preprocess:
    """Pixels in [-1, 1]; the centre 90 percent, as timm evaluates these files."""
    return _preprocess(side, math.floor(side / 0.9), HALF, HALF, "bicubic", False)


def _normalisation(f: Fields, mean: str, std: str, *default: Any) -> tuple[Any, Any]:
    """The two entries that say how a channel is shifted and scaled."""
    usual = default or (REQUIRED, REQUIRED)
    return f.numbers(mean, usual[0], count=3), f.numbers(std, usual[1], count=3)


def _preprocess(size: int, resize: int, mean: Any, std: Any, interpolation: str, squash: bool) -> Preprocess:
    return Preprocess(size, resize, mean, std, interpolation, squash)
