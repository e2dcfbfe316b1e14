"""One vision transformer written out by hand in every layout: each is read back as the same tree; what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from laws import lively
from safetensors.numpy import save_file

from jprune.checkpoint.vision import clip_vision, load_vision
from jprune.checkpoint.vision_config import hf_preprocess, timm_config, timm_preprocess, torchvision_preprocess
from jprune.data import Preprocess
from jprune.models import vit

MODULE = vit.vit(6, 1, 2, 4, 5, mlp=7)
TREE = lively(jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
P = jax.tree.map(np.asarray, TREE["params"])
QKV, PROJ = P["block1_attn"]["qkv"], P["block1_attn"]["proj"]
DEIT = "deit_tiny_patch16_224"
CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 8, 8], "crop_pct": 0.9}
TIMM = {"architecture": DEIT, "model_args": {"num_heads": 2}, "pretrained_cfg": CFG}
HF = {"model_type": "vit", "num_attention_heads": 2, "image_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6}


def linear(name, p):
    return {f"{name}.weight": p["kernel"].T, f"{name}.bias": p["bias"]}


def norm(name, p):
    return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}


def patches(name):
    return {
        f"{name}.weight": P["patch_embed"]["kernel"].transpose(3, 2, 0, 1),
        f"{name}.bias": P["patch_embed"]["bias"],
    }


def part(k):
    """Query (0), key (1) or value (2) as PyTorch has it: rows of the first head, then of the second."""
    return QKV["kernel"][:, k].reshape(6, 6).T, QKV["bias"][k].reshape(6)


def timm():
    b = "blocks.0"
    return {
        "cls_token": P["cls_token"], "pos_embed": P["pos_embed"], **patches("patch_embed.proj"),
        **norm(f"{b}.norm1", P["block1_norm1"]), **norm(f"{b}.norm2", P["block1_norm2"]), **norm("norm", P["norm"]),
        f"{b}.attn.qkv.weight": np.concatenate([part(k)[0] for k in range(3)]),
        f"{b}.attn.qkv.bias": np.concatenate([part(k)[1] for k in range(3)]),
        f"{b}.attn.proj.weight": PROJ["kernel"].reshape(6, 6).T, f"{b}.attn.proj.bias": PROJ["bias"],
        **linear(f"{b}.mlp.fc1", P["block1_fc1"]), **linear(f"{b}.mlp.fc2", P["block1_fc2"]), **linear("head", P["head"]),
    }  # fmt: skip


def torchvision():
    b, t = "encoder.layers.encoder_layer_0", timm()
    return {
        "class_token": P["cls_token"], "encoder.pos_embedding": P["pos_embed"], **patches("conv_proj"),
        **norm(f"{b}.ln_1", P["block1_norm1"]), **norm(f"{b}.ln_2", P["block1_norm2"]), **norm("encoder.ln", P["norm"]),
        f"{b}.self_attention.in_proj_weight": t["blocks.0.attn.qkv.weight"],
        f"{b}.self_attention.in_proj_bias": t["blocks.0.attn.qkv.bias"],
        f"{b}.self_attention.out_proj.weight": t["blocks.0.attn.proj.weight"],
        f"{b}.self_attention.out_proj.bias": t["blocks.0.attn.proj.bias"],
        **linear(f"{b}.mlp.0", P["block1_fc1"]), **linear(f"{b}.mlp.3", P["block1_fc2"]),
        **linear("heads.head", P["head"]),
    }  # fmt: skip


def transformers(prefix="vit."):
    b, t = "encoder.layer.0", timm()
    out = {
        "embeddings.cls_token": P["cls_token"], "embeddings.position_embeddings": P["pos_embed"],
        **patches("embeddings.patch_embeddings.projection"), **norm("layernorm", P["norm"]),
        **norm(f"{b}.layernorm_before", P["block1_norm1"]), **norm(f"{b}.layernorm_after", P["block1_norm2"]),
        f"{b}.attention.output.dense.weight": t["blocks.0.attn.proj.weight"],
        f"{b}.attention.output.dense.bias": t["blocks.0.attn.proj.bias"],
        **linear(f"{b}.intermediate.dense", P["block1_fc1"]), **linear(f"{b}.output.dense", P["block1_fc2"]),
    }  # fmt: skip
    for k, name in enumerate(("query", "key", "value")):
        out[f"{b}.attention.attention.{name}.weight"], out[f"{b}.attention.attention.{name}.bias"] = part(k)
    return {**{prefix + n: x for n, x in out.items()}, **linear("classifier", P["head"])}


def augreg():
    b, a = "Transformer/encoderblock_0", "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    leaves = {
        "embedding": P["patch_embed"], "head": P["head"], "Transformer/encoder_norm": P["norm"], f"{a}/out": PROJ,
        f"{b}/LayerNorm_0": P["block1_norm1"], f"{b}/LayerNorm_2": P["block1_norm2"],
        f"{b}/MlpBlock_3/Dense_0": P["block1_fc1"], f"{b}/MlpBlock_3/Dense_1": P["block1_fc2"],
        **{f"{a}/{n}": jax.tree.map(lambda x, k=k: x[..., k, :, :], QKV) for k, n in enumerate(("query", "key", "value"))},
    }  # fmt: skip
    out = {f"{name}/{leaf}": x for name, p in leaves.items() for leaf, x in p.items()}
    return {**out, "cls": P["cls_token"], "Transformer/posembed_input/pos_embedding": P["pos_embed"]}


def clip(prefix="vision_model."):
    b, t = "encoder.layers.0", transformers("")
    out = {
        "embeddings.class_embedding": P["cls_token"][0, 0], "embeddings.position_embedding.weight": P["pos_embed"][0],
        "embeddings.patch_embedding.weight": patches("x")["x.weight"], **norm("post_layernorm", P["norm"]),
        "embeddings.position_ids": np.arange(5)[None],
        **norm("pre_layrnorm", P["block1_norm2"]), **norm(f"{b}.layer_norm1", P["block1_norm1"]),
        **norm(f"{b}.layer_norm2", P["block1_norm2"]), **linear(f"{b}.mlp.fc1", P["block1_fc1"]),
        **linear(f"{b}.mlp.fc2", P["block1_fc2"]),
    }  # fmt: skip
    theirs = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    for leaf in ("weight", "bias"):
        out[f"{b}.self_attn.out_proj.{leaf}"] = t[f"encoder.layer.0.attention.output.dense.{leaf}"]
        for ours, name in theirs.items():
            out[f"{b}.self_attn.{name}.{leaf}"] = t[f"encoder.layer.0.attention.attention.{ours}.{leaf}"]
    return {prefix + n: x for n, x in out.items()}


def write(folder, tensors, config=None, **files):
    folder.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "model.safetensors")
    for name, data in {"config": config, **files}.items():
        if data is not None:
            (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def same(found, tree=TREE):
    """Whether the tree that was read is this one, to the bit."""
    got = vit.fuse(found.module, found.variables)[1]
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), got, tree))
    config = dataclasses.replace(found.module.config, fused=True, image=None, class_token=None)
    assert config == MODULE.config


def test_timm(tmp_path):
    found = load_vision(write(tmp_path, timm(), {**TIMM, "label_names": list("abcde")}))
    same(found)
    assert found.labels == tuple("abcde") and found.module.config.image == (8, 8) and found.module.config.fused
    assert found.preprocess == Preprocess(8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")
    args = {"model_args": {}, "label_names": {str(i): n for i, n in enumerate("abcde")}}
    with pytest.raises(ValueError, match="12 heads do not divide the width 6"):
        load_vision(write(tmp_path, timm(), {**TIMM, **args, "architecture": "deit_base_patch16_224"}))
    found = load_vision(write(tmp_path, timm(), {**TIMM, **args}), heads=2, dtype="bfloat16")
    assert found.labels == tuple("abcde")
    assert {x.dtype for x in jax.tree.leaves(found.variables)} == {jnp.dtype(jnp.bfloat16)}
    half = {n: x.astype(ml_dtypes.bfloat16) for n, x in timm().items()}
    found = load_vision(write(tmp_path, half, TIMM))
    assert {x.dtype for x in jax.tree.leaves(found.variables)} == {jnp.dtype(jnp.bfloat16)}


def test_heads_without_biases(tmp_path):
    found = load_vision(write(tmp_path, cut(timm(), "blocks.0.attn.qkv.bias"), TIMM))
    attention = found.variables["params"]["block1_attn"]
    assert not found.module.config.qkv_bias and set(attention["qkv"]) == {"kernel"}
    np.testing.assert_array_equal(attention["qkv"]["kernel"], QKV["kernel"])


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_transformers(prefix, tmp_path):
    labels = {"id2label": {str(i): n for i, n in enumerate("abcde")}}
    extra = {f"{prefix}embeddings.mask_token": P["cls_token"], f"{prefix}pooler.dense.bias": P["norm"]["bias"]}
    found = load_vision(write(tmp_path, {**transformers(prefix), **extra}, {**HF, **labels}))
    same(found)
    assert found.labels == tuple("abcde") and not found.module.config.fused
    assert found.preprocess == Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3, "bilinear", squash=True)
    placeholders = {"id2label": {str(i): f"LABEL_{i}" for i in range(5)}}
    assert load_vision(write(tmp_path, transformers(prefix), {**HF, **placeholders})).labels is None


def test_a_teacher_has_two_heads(tmp_path):
    tensors = transformers("deit.")
    tensors = {n.replace("classifier", "cls_classifier"): x for n, x in tensors.items()}
    tensors |= {n.replace("cls_", "distillation_"): x + 1 for n, x in tensors.items() if "classifier" in n}
    tensors["deit.embeddings.distillation_token"] = P["cls_token"] + 1
    tensors["deit.embeddings.position_embeddings"] = np.concatenate([P["pos_embed"][:, :1], P["pos_embed"]], 1)
    processor = {"size": 10, "crop_size": 8, "resample": 3, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    config = {**HF, "model_type": "deit", "layer_norm_eps": 1e-12}
    found = load_vision(write(tmp_path, tensors, config, preprocessor_config=processor))
    c, params = found.module.config, found.variables["params"]
    assert c.distilled and c.both_heads and c.prefix == 2 and c.epsilon == 1e-12
    np.testing.assert_array_equal(params["head_dist"]["kernel"], P["head"]["kernel"] + 1)
    np.testing.assert_array_equal(params["dist_token"], P["cls_token"] + 1)
    assert found.preprocess == Preprocess(8, 10, (0.1,) * 3, (0.2,) * 3, "bicubic", squash=True)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_clip(prefix, tmp_path):
    config = {"model_type": "clip", "vision_config": {"num_attention_heads": 2, "image_size": 8}}
    beside = {"text_model.final_layer_norm.bias": P["norm"]["bias"], "logit_scale": np.float32(1)}
    found = load_vision(write(tmp_path, {**clip(prefix), **beside}, config))
    c = found.module.config
    assert c.pre_norm and c.num_classes == 0 and not c.patch_bias and found.labels is None
    assert (c.activation, c.epsilon) == ("quick_gelu", 1e-5)
    for name in ("cls_token", "pos_embed", "block1_fc1", "norm"):
        jax.tree.map(np.testing.assert_array_equal, found.variables["params"][name], P[name])
    np.testing.assert_array_equal(found.variables["params"]["pre_norm"]["scale"], P["block1_norm2"]["scale"])
    for k, name in enumerate(("query", "key", "value")):
        got = found.variables["params"]["block1_attn"][name]
        np.testing.assert_array_equal(got["kernel"], QKV["kernel"][:, k])
    assert not found.preprocess.squash and found.preprocess.mean[0] == 0.48145466
    tensors = {n: x for n, x in clip(prefix).items() if "position_ids" not in n}
    projected = {**tensors, "visual_projection.weight": P["head"]["kernel"].T}
    module, variables = clip_vision(config["vision_config"], projected)
    assert module.config.num_classes == 5 and set(variables["params"]["head"]) == {"kernel"}
    assert jax.eval_shape(module.apply, variables, jnp.zeros((2, 8, 8, 3))).shape == (2, 5)


def test_torchvision(tmp_path):
    save_file({n: np.ascontiguousarray(x) for n, x in torchvision().items()}, tmp_path / "vit_b_16-c8.safetensors")
    found = load_vision(tmp_path, heads=2)
    same(found)
    assert found.preprocess.interpolation == "bicubic" and found.preprocess.resize == 8  # a size that only SWAG has
    same(load_vision(tmp_path / "vit_b_16-c8.safetensors", heads=2))
    with pytest.raises(ValueError, match=r"6 wide: how many heads there are is not known; give heads="):
        load_vision(tmp_path)
    plain, swag = (torchvision_preprocess(224, swag) for swag in (False, True))
    assert (plain.resize, plain.interpolation) == (256, "bilinear") and (swag.resize, swag.interpolation) == (
        224,
        "bicubic",
    )


def test_augreg(tmp_path):
    np.savez(tmp_path / "S_16.npz", **augreg())
    found = load_vision(tmp_path / "S_16.npz")
    same(found)
    assert found.preprocess == Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3, "bicubic")
    arrays = augreg()
    arrays["head/bias"] = arrays["head/bias"][:4]
    np.savez(tmp_path / "S_16.npz", **arrays)
    with pytest.raises(ValueError, match=r"'head/bias' has shape \(4,\), not \(5,\)"):
        load_vision(tmp_path)
    for extra, message in (
        ({"pre_logits/bias": np.ones(6)}, "'pre_logits/bias' has no place"),
        ({}, "norm/bias' is miss"),
    ):
        arrays = {n: x for n, x in augreg().items() if extra or n != "Transformer/encoder_norm/bias"}
        np.savez(tmp_path / "S_16.npz", **arrays, **extra)
        with pytest.raises(ValueError, match=message):
            load_vision(tmp_path)
    np.savez(tmp_path / "S_16.npz", cls=np.array([{}], object))
    with pytest.raises(ValueError, match=r"S_16\.npz is damaged or no \.npz file .*allow_pickle"):
        load_vision(tmp_path)


def test_official_deit_files_have_no_config(tmp_path):
    save_file(
        {n: np.ascontiguousarray(x) for n, x in timm().items()}, tmp_path / "deit_tiny_patch16_224-a1b2.safetensors"
    )
    found = load_vision(tmp_path)
    assert found.module.config.blocks[0].heads == 3 and found.preprocess.mean == (0.485, 0.456, 0.406)
    (tmp_path / "deit_tiny_patch16_224-a1b2.safetensors").rename(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"no config\.json beside it that says what it is"):
        load_vision(tmp_path)


# -- what only names and options say -------------------------------------------------------------------------------


def shapes(**changes):
    """Shapes of timm's tensors; None takes one away."""
    out = {n: x.shape for n, x in timm().items()} | {n.replace("__", "."): s for n, s in changes.items()}
    return {n: s for n, s in out.items() if s is not None}


@pytest.mark.parametrize(
    ("config", "changes", "wanted"),
    [
        ({}, {}, {"pool": "token", "activation": "gelu", "epsilon": 1e-6, "positions": "all"}),
        ({"global_pool": "avg"}, {}, {"pool": "mean", "class_token": True, "norm_first": True}),
        (
            {"architecture": "vit_small_patch16_reg4_gap_256"},
            {
                "cls_token": None,
                "reg_token": (1, 4, 6),
                "pos_embed": (1, 4, 6),
                "fc_norm__weight": (6,),
                "norm__weight": None,
            },
            {"pool": "mean", "registers": 4, "positions": "patches", "norm_first": False, "class_token": False},
        ),
        ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, {}, {"activation": "quick_gelu", "epsilon": 1e-5}),
        (
            {"architecture": "vit_so400m_patch16_siglip_gap_256", "global_pool": "token"},
            {},
            {"activation": "gelu_tanh"},
        ),
        ({"model_args": {"num_heads": 2, "act_layer": "quick_gelu"}}, {}, {"activation": "quick_gelu"}),
        ({"pretrained_cfg": {}}, {"pos_embed": (1, 10, 6)}, {"image": (12, 12), "positions": "all"}),
        ({}, {"head__weight": None, "head__bias": None}, {"num_classes": 0, "head_bias": False}),
        ({}, {"blocks__0__ls1__gamma": (6,), "norm_pre__weight": (6,)}, {"layer_scale": True, "pre_norm": True}),
        ({}, {"dist_token": (1, 1, 6), "pos_embed": (1, 6, 6)}, {"distilled": True, "both_heads": False}),
    ],
)
def test_what_a_timm_folder_says(config, changes, wanted):
    found = timm_config({**TIMM, **config}, shapes(**changes))
    assert {k: getattr(found, k) for k in wanted} == wanted


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            {"architecture": "swin_tiny_patch4"},
            {},
            r"'swin_tiny_patch4' is not a plain vision transformer.*give heads=",
        ),
        ({"architecture": "vit_small_patch16_rope_224"}, {}, "'vit_small_patch16_rope_224' is not a plain"),
        ({"architecture": "vit_new_patch16_224", "model_args": {}}, {}, "another SIZE give heads="),
        ({"model_args": {"num_heads": 2, "qk_norm": True}}, {}, "has qk_norm = True, which is not supported"),
        ({"global_pool": "map"}, {}, "pools its tokens by 'map': only"),
        ({"model_args": {"num_heads": 2, "act_layer": "silu"}}, {}, "activation 'silu' is not supported"),
        ({"model_args": {"num_heads": 4}}, {}, "4 heads do not divide the width 6"),
        (
            {},
            {"pos_embed": (1, 7, 6)},
            r"'pos_embed' has 7 rows, and images of 8x8 pixels in patches of 4 with 1 special",
        ),
        ({}, {"pos_embed": None}, "'pos_embed' is missing"),
        (
            {},
            {"patch_embed__proj__weight": (6, 3, 4, 2)},
            r"has shape \(6, 3, 4, 2\): a convolution over square patches",
        ),
        ({}, {"blocks__0__mlp__fc1__weight": None}, r"'blocks\.0\.mlp\.fc1\.weight' is missing"),
    ],
)
def test_timm_folders_that_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        timm_config({**TIMM, **config}, shapes(**changes))


def cut(tensors, name):
    return {n: x for n, x in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (timm(), {**TIMM, "pretrained_cfg": {**CFG, "input_size": [3, 12, 12]}}, "5 rows, and images of 12x12"),
        (timm(), {**TIMM, "model_args": {"num_heads": 2, "img_size": 8}, "pretrained_cfg": {**CFG, "input_size": [3, 12, 12]}},
         r"prepares images of 12 pixels, and its model has positions for \(8, 8\)"),
        (timm(), {**TIMM, "pretrained_cfg": {"input_size": [3, 8, 8]}}, "no pretrained_cfg with mean"),
        (timm(), {**TIMM, "label_names": ["a"]}, "names 1 classes, and its model has 5"),
        ({**timm(), "blocks.0.attn.q_norm.weight": np.ones(3, np.float32)}, TIMM, "'blocks.0.attn.q_norm.weight' has no place"),
        (cut(timm(), "norm.bias"), TIMM, "'norm.bias' of a ViT is missing"),
        (timm(), {"model_type": "bert"}, "nor a model_type that is read here, but 'bert': only vit, deit"),
        (transformers(), {**HF, "hidden_act": "relu"}, "activation 'relu' is not supported"),
        (transformers(), {**HF, "num_attention_heads": 4}, "4 heads do not divide"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tensors, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_vision(write(tmp_path, tensors, config))


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json and holds no \.safetensors or \.npz file"):
        load_vision(tmp_path)
    with pytest.raises(ValueError, match=r"vit\.pth is a pickle"):
        load_vision(tmp_path / "vit.pth")
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, x=np.ones(1))
    with pytest.raises(ValueError, match=r"holds a\.npz, b\.npz: give a model's folder, or one file"):
        load_vision(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": {"height": 8, "width": 9}}, "only squares or shortest_edge"),
        ({"resample": 5}, "resample 5"),
        ({"do_resize": False}, "wants no resizing"),
        ({"size": 6, "crop_size": 8, "do_center_crop": True}, "size 8 must be positive and no larger than resize 6"),
    ],
)
def test_processors_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        hf_preprocess("vit", config, 8)


def test_what_processors_say():
    assert hf_preprocess("clip", {"size": 10, "crop_size": {"height": 8, "width": 8}}, 8).resize == 10
    assert hf_preprocess("clip", {"size": {"shortest_edge": 10}, "crop_size": 8}, 8) == hf_preprocess(
        "clip", {"size": 10}, 8
    )
    assert hf_preprocess("deit", {}, 224).resize == 256
    squashed = timm_preprocess({"pretrained_cfg": {**CFG, "crop_mode": "squash", "crop_pct": 0.5}})
    assert squashed.squash and squashed.resize == 16
    with pytest.raises(ValueError, match="only squares, center or squash"):
        timm_preprocess({"pretrained_cfg": {**CFG, "crop_mode": "border"}})
