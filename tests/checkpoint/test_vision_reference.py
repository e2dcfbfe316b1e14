"""Vision transformers read from files that timm, transformers and torchvision wrote: the same answers as theirs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import relative

from jprune.checkpoint.vision import load_vision

pytestmark = pytest.mark.reference

TIMM = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 7}
HF = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip


def peer(name):
    from experiments.peers import peer

    return peer(name)


def randomise(model, seed=0):
    """Weights far from the initial ones, so that no two layers and no two channels are alike."""
    torch = peer("torch")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 1 and name.endswith("weight"):
                x.uniform_(0.5, 1.5)
            elif name.endswith("weight"):
                x.normal_(0, (1 / x[0].numel()) ** 0.5)
            else:
                x.normal_(0, 0.4)
    return model.eval()


def images(side, n=2):
    return np.random.default_rng(5).normal(size=(n, side, side, 3)).astype(np.float32)


def theirs(model, x, read=lambda y: y):
    torch = peer("torch")
    with torch.no_grad():
        return jax.tree.map(lambda t: t.numpy(), read(model(torch.from_numpy(x.transpose(0, 3, 1, 2)))))


TIMM_MODELS = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit_tiny_distilled_patch16_224, features": {"num_classes": 0},
    "vit_tiny_patch16_224": {"global_pool": "avg"},
    "vit_tiny_patch16_224, norm first": {"global_pool": "avg", "fc_norm": False, "num_heads": 2},
    "vit_tiny_patch16_224, no class token": {"global_pool": "avg", "class_token": False, "qkv_bias": False},
    "vit_little_patch16_reg4_gap_256": {"num_heads": 3},
    "vit_medium_patch16_reg1_gap_256": {},
    "vit_small_patch14_reg4_dinov2": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch32_clip_quickgelu_224": {},
    "vit_xsmall_patch16_clip_224": {},
    "vit_base_patch32_siglip_gap_256": {"img_size": (16, 16)},
    "vit_tiny_patch16_224, gelu": {"act_layer": "gelu_tanh", "img_size": 32},
}


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm(name, tmp_path):
    timm = peer("timm")
    options = {**TIMM, **TIMM_MODELS[name]}
    architecture = name.split(",")[0]
    heads = {"xsmall": 4, "tiny": 3, "small": 6, "medium": 8, "base": 12}.get(architecture.split("_")[1], 3)
    options["embed_dim"] = 4 * options.get("num_heads", heads)
    model = randomise(timm.create_model(architecture, **options))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    x = images(model.patch_embed.img_size[0])
    module, variables, preprocess, labels = load_vision(tmp_path)
    assert relative(jax.jit(module.apply)(variables, x), theirs(model, x)) <= 1e-4
    assert labels is None and preprocess.size == x.shape[1]
    cfg = model.pretrained_cfg
    assert (preprocess.mean, preprocess.std) == (tuple(cfg["mean"]), tuple(cfg["std"]))


def test_heads_and_activations_of_every_name_of_timm():
    """All of timm's plain vision transformers, built without memory: what their names alone say to us."""
    timm, torch = peer("timm"), peer("torch")
    from jprune.checkpoint.vision_config import timm_config

    seen, refused = 0, {}
    for name in timm.list_models(["vit_*", "deit*"]):
        with torch.device("meta"):
            model = timm.create_model(name)
        shapes = {n: tuple(x.shape) for n, x in model.state_dict().items()}
        plain = type(model).__name__ in ("VisionTransformer", "VisionTransformerDistilled") and model.attn_pool is None
        block = model.blocks[0]
        plain = plain and type(block).__name__ == "Block" and type(block.mlp).__name__ == "Mlp"
        plain = plain and type(model.patch_embed).__name__ == "PatchEmbed" and not hasattr(block.mlp, "gate")
        config = {"architecture": name, "global_pool": model.global_pool}
        config["pretrained_cfg"] = {"input_size": (3, *model.patch_embed.img_size)}
        try:
            ours = timm_config(config, shapes)
        except ValueError as error:
            if plain and isinstance(block.attn.q_norm, torch.nn.Identity):
                refused[name] = str(error)
            continue
        if not plain:  # another computation, whose tensors do not fit then
            continue
        act = type(block.mlp.act).__name__, getattr(block.mlp.act, "approximate", "none")
        want = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}.get(act[0], "gelu")
        assert ours.blocks[0].heads == block.attn.num_heads and ours.activation == want, (name, ours)
        assert ours.epsilon == block.norm1.eps and len(ours.blocks) == len(model.blocks), name
        assert ours.prefix == model.num_prefix_tokens and ours.image == tuple(model.patch_embed.img_size), name
        assert (ours.pool == "mean") == (model.global_pool == "avg"), name
        seen += 1
    assert seen > 80 and all("_radio_" in name for name in refused), sorted(refused)  # those have no final norm


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "DeiT with teacher"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_transformers(kind, act, tmp_path):
    hf = peer("transformers")
    labels = {i: name for i, name in enumerate(("ant", "bee", "cat", "dog", "elk"))}
    if kind == "ViT":
        config = hf.ViTConfig(**HF, hidden_act=act, id2label=labels)
        model = hf.ViTForImageClassification(config)
        processor = hf.ViTImageProcessor(size={"height": 24, "width": 24})
    else:
        config = hf.DeiTConfig(**HF, hidden_act=act, id2label=labels, layer_norm_eps=1e-3, qkv_bias=act != "gelu")
        model = hf.DeiTForImageClassification if kind == "DeiT" else hf.DeiTForImageClassificationWithTeacher
        model = model(config)
        processor = hf.DeiTImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 24, "width": 24})
    randomise(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    module, variables, preprocess, names = load_vision(tmp_path)
    assert names == tuple(labels.values()) and preprocess.squash and preprocess.size == 24
    assert (preprocess.resize, preprocess.interpolation) == ((24, "bilinear") if kind == "ViT" else (28, "bicubic"))
    x = images(24)
    assert relative(jax.jit(module.apply)(variables, x), theirs(model, x, lambda y: y.logits)) <= 1e-4


def test_transformers_without_a_classifier(tmp_path):
    hf = peer("transformers")
    model = randomise(hf.ViTModel(hf.ViTConfig(**HF)))
    model.save_pretrained(tmp_path)
    module, variables, _, labels = load_vision(tmp_path)
    x = images(24)
    assert labels is None
    assert relative(module.apply(variables, x), theirs(model, x, lambda y: y.last_hidden_state[:, 0])) <= 1e-4


@pytest.mark.parametrize("kind", ["tower", "tower with projection", "both models"])
def test_clip(kind, tmp_path):
    hf = peer("transformers")
    if kind == "both models":
        text = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, vocab_size=20)
        config = hf.CLIPConfig(vision_config=HF, text_config=text, projection_dim=6)
        model = randomise(hf.CLIPModel(config))
        tower = model.vision_model
    elif kind == "tower":
        model = tower = randomise(hf.CLIPVisionModel(hf.CLIPVisionConfig(**HF)))
    else:
        model = randomise(hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**HF, projection_dim=6)))
        tower = model.vision_model
    tower.config._attn_implementation = "eager"
    model.save_pretrained(tmp_path)
    if kind == "tower":
        processor = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24})
        processor.save_pretrained(tmp_path)
    module, variables, preprocess, _ = load_vision(tmp_path)
    assert preprocess.resize == (28 if kind == "tower" else 24) and not preprocess.squash
    torch, x = peer("torch"), images(24)
    with torch.no_grad():
        out = tower(torch.from_numpy(x.transpose(0, 3, 1, 2)), output_hidden_states=True, output_attentions=True)
        want = out.pooler_output if kind == "tower" else model.visual_projection(out.pooler_output)
    assert relative(jax.jit(module.apply)(variables, x), want.numpy()) <= 1e-4
    for layer in (0, 1, 2, -1, -2):
        got = module.apply(variables, x, layer=layer, select="full", watch=1, method="features")
        assert relative(got.x, out.hidden_states[layer].numpy()) <= 1e-4
        assert relative(got.seen.weights, out.attentions[1].numpy()) <= 1e-4
    default = module.apply(variables, x, method="features").x
    assert relative(default, out.hidden_states[-2][:, 1:].numpy()) <= 1e-4


def test_torchvision(tmp_path):
    tv = peer("torchvision").models
    from safetensors.torch import save_file

    model = randomise(tv.VisionTransformer(24, 8, 2, 4, 24, 40, num_classes=5))
    save_file(model.state_dict(), tmp_path / "vit_b_16_swag.safetensors")
    with pytest.raises(ValueError, match="24 wide: how many heads there are is not known; give heads="):
        load_vision(tmp_path)
    module, variables, preprocess, _ = load_vision(tmp_path, heads=4)
    x = images(24)
    assert relative(module.apply(variables, x), theirs(model, x)) <= 1e-4
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == (24, 24, "bicubic")


def test_what_timm_and_transformers_do_to_a_picture(tmp_path):
    from PIL import Image

    timm, hf = peer("timm"), peer("transformers")
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in ((40, 71, 3), (57, 30, 3), (24, 24, 3))
    ]
    from jprune.checkpoint.vision_config import hf_preprocess, timm_preprocess

    for mode, pct in (("center", 0.9), ("center", 1.0), ("squash", 0.8)):
        cfg = {
            "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "input_size": (3, 24, 24), "crop_pct": pct,
            "crop_mode": mode, "interpolation": "bicubic",
        }  # fmt: skip
        transform = timm.data.create_transform(**{**cfg, "is_training": False})
        ours = timm_preprocess({"pretrained_cfg": cfg})
        for picture in pictures:
            want = transform(picture).numpy().transpose(1, 2, 0)
            np.testing.assert_allclose(ours([picture])[0], want, atol=1e-5)
    processors = {
        "vit": hf.ViTImageProcessorPil(size={"height": 24, "width": 24}),
        "deit": hf.DeiTImageProcessorPil(size={"height": 28, "width": 28}, crop_size={"height": 24, "width": 24}),
        "clip": hf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    }
    for kind, processor in processors.items():
        processor.save_pretrained(tmp_path)
        ours = hf_preprocess(kind, json.loads((tmp_path / "preprocessor_config.json").read_text()), 24)
        for picture in pictures:
            want = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
            np.testing.assert_allclose(ours([picture])[0], want, atol=1e-5, err_msg=kind)
            assert jnp.asarray(want).shape == (24, 24, 3)
