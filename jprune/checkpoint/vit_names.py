"""What other libraries call the layers of a vision transformer: {our layer: what its tensors' names begin with}.

Layers of timm and torchvision have one kernel for query, key and value; those of transformers, of its CLIP, and of the
.npz files of "How to train your ViT" (Steiner et al. 2022) three. A table of the second kind names "block1_attn/query".
"""

from __future__ import annotations

from collections.abc import Iterator

from jprune.models.vit_config import ViTConfig

Pairs = Iterator[tuple[str, str]]


def torchvision(c: ViTConfig) -> Pairs:
    """Names of `torchvision.models.VisionTransformer`."""
    yield from (("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed", "conv_proj."))
    yield from (("norm", "encoder.ln."), ("head", "heads.head."))
    yield from _blocks(
        c,
        "encoder.layers.encoder_layer_{i}.",
        _norm1="ln_1.",
        _norm2="ln_2.",
        **{"_attn/qkv": "self_attention.in_proj_", "_attn/proj": "self_attention.out_proj."},
        _fc1="mlp.0.",
        _fc2="mlp.3.",
    )


def timm(c: ViTConfig) -> Pairs:
    """Names of timm's `VisionTransformer` and `VisionTransformerDistilled`; the official DeiT files have the same."""
    yield from ((name, name) for name in ("cls_token", "dist_token", "reg_token", "pos_embed"))
    after_mean = c.pool == "mean" and not c.norm_first
    yield from (("patch_embed", "patch_embed.proj."), ("pre_norm", "norm_pre."))
    yield from (("norm", "fc_norm." if after_mean else "norm."), ("head", "head."), ("head_dist", "head_dist."))
    yield from _blocks(
        c,
        "blocks.{i}.",
        _norm1="norm1.",
        **{"_attn/qkv": "attn.qkv.", "_attn/proj": "attn.proj."},
        _norm2="norm2.",
        _fc1="mlp.fc1.",
        _fc2="mlp.fc2.",
        _scale1="ls1.gamma",
        _scale2="ls2.gamma",
    )


def transformers(c: ViTConfig) -> Pairs:
    """Names of transformers' ViT and DeiT files, without "vit." or "deit." in front."""
    yield from (("cls_token", "embeddings.cls_token"), ("dist_token", "embeddings.distillation_token"))
    yield "pos_embed", "embeddings.position_embeddings"
    yield from (("patch_embed", "embeddings.patch_embeddings.projection."), ("norm", "layernorm."))
    yield from (
        ("head", "cls_classifier." if c.both_heads else "classifier."),
        ("head_dist", "distillation_classifier."),
    )
    yield from _blocks(
        c,
        "encoder.layer.{i}.",
        _norm1="layernorm_before.",
        **{f"_attn/{n}": f"attention.attention.{n}." for n in ("query", "key", "value")},
        **{"_attn/proj": "attention.output.dense."},
        _norm2="layernorm_after.",
        _fc1="intermediate.dense.",
        _fc2="output.dense.",
    )


def clip(c: ViTConfig) -> Pairs:
    """Names of the vision tower in transformers' CLIP files, without "vision_model." in front."""
    yield from (("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding.weight"))
    yield from (("patch_embed", "embeddings.patch_embedding."), ("pre_norm", "pre_layrnorm."))
    yield from (("norm", "post_layernorm."), ("head", "visual_projection."))
    yield from _blocks(
        c,
        "encoder.layers.{i}.",
        _norm1="layer_norm1.",
        **{f"_attn/{n}": f"self_attn.{n[0]}_proj." for n in ("query", "key", "value")},
        **{"_attn/proj": "self_attn.out_proj."},
        _norm2="layer_norm2.",
        _fc1="mlp.fc1.",
        _fc2="mlp.fc2.",
    )


def augreg(c: ViTConfig) -> Pairs:
    """Names of the arrays in the .npz files, which Flax wrote: leaves are called, and shaped, as here."""
    yield from (("cls_token", "cls"), ("pos_embed", "Transformer/posembed_input/pos_embedding"))
    yield from (("patch_embed", "embedding/"), ("norm", "Transformer/encoder_norm/"), ("head", "head/"))
    attention = "MultiHeadDotProductAttention_1"
    yield from _blocks(
        c,
        "Transformer/encoderblock_{i}/",
        _norm1="LayerNorm_0/",
        **{f"_attn/{n}": f"{attention}/{n}/" for n in ("query", "key", "value")},
        **{"_attn/proj": f"{attention}/out/"},
        _norm2="LayerNorm_2/",
        _fc1="MlpBlock_3/Dense_0/",
        _fc2="MlpBlock_3/Dense_1/",
    )


def _blocks(c: ViTConfig, prefix: str, **parts: str) -> Pairs:
    for i in range(len(c.blocks)):
        for ending, name in parts.items():
            yield f"block{i + 1}{ending}", prefix.format(i=i) + name
