"""Every layout of LLaVA-1.5's files gives the same model; pictures and questions are prepared as each kind wants them."""

import dataclasses
import functools
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from small_llava import IMAGE, VOCAB, config, model

from jprune.checkpoint.llava import PROMPTS, LlavaProcessor, load_llava, pad_to_square
from jprune.data.images import Preprocess
from jprune.models.vit_names import clip

VISION = {"model_type": "clip_vision_model", "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "hidden_act": "quick_gelu"}  # fmt: skip
TEXT = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}  # fmt: skip
# how each container begins the names of tower, projector's layers, decoder and its head
CONTAINERS = {
    "classic": ("vision_tower.vision_model.", "multi_modal_projector.linear_{}.", "language_model.model.",
                "language_model.lm_head."),
    "in memory": ("model.vision_tower.vision_model.", "model.multi_modal_projector.linear_{}.", "model.language_model.",
                  "lm_head."),
    "transformers 5": ("vision_tower.", "multi_modal_projector.linear_{}.", "language_model.model.",
                       "language_model.lm_head."),
    "authors": (None, "model.mm_projector.{}.", "model.", "lm_head."),
}  # fmt: skip


def clip_tensors(prefix):
    """The tower as PyTorch stores it."""
    out = {}
    for ours, theirs in clip(model()[0].config.vision):
        node = model()[1]["params"]["vision"]
        for key in ours.split("/"):
            node = node.get(key, {})
        if not isinstance(node, dict):
            out[prefix + theirs] = np.asarray(node[0, 0] if ours == "cls_token" else node[0])
            continue
        for kind, leaf in node.items():
            x = np.asarray(leaf)
            if kind != "kernel":
                x = x.reshape(-1)
            elif ours == "patch_embed":
                x = x.transpose(3, 2, 0, 1)
            else:  # (inputs, heads, head) of query, key and value; (heads, head, outputs) behind them
                x = (x.reshape(-1, x.shape[-1]) if ours.endswith("proj") else x.reshape(x.shape[0], -1)).T
            out[prefix + theirs + ("bias" if kind == "bias" else "weight")] = x
    return {name: np.ascontiguousarray(x) for name, x in out.items()}


def language_tensors(prefix, head):
    p = model()[1]["params"]["language"]
    out = {prefix + "embed_tokens.weight": p["embed"]["embedding"], prefix + "norm.weight": p["final_norm"]["scale"],
           head + "weight": p["lm_head"]["kernel"].T}  # fmt: skip
    for i in range(2):
        layer, at = p[f"layer{i}"], f"{prefix}layers.{i}."
        for n in "qkv":
            kernel = layer["attn"][n]["kernel"]
            out[f"{at}self_attn.{n}_proj.weight"] = kernel.reshape(kernel.shape[0], -1).T
        out[f"{at}self_attn.o_proj.weight"] = layer["attn"]["o"]["kernel"].reshape(-1, 16).T
        out |= {f"{at}mlp.{n}_proj.weight": layer["mlp"][n]["kernel"].T for n in ("gate", "up", "down")}
        out[f"{at}input_layernorm.weight"] = layer["input_norm"]["scale"]
        out[f"{at}post_attention_layernorm.weight"] = layer["post_norm"]["scale"]
    return out


@functools.cache
def tensors(container):
    """{name: array} of the small model."""
    vision, projector, language, head = CONTAINERS[container]
    out = language_tensors(language, head)
    if vision is not None:
        out |= clip_tensors(vision) | {vision + "embeddings.position_ids": np.arange(10, dtype=np.int64)}
    for i, layer in enumerate(("linear_1", "linear_2")):
        leaf = model()[1]["params"]["projector"][layer]
        name = projector.format(2 * i if container == "authors" else i + 1)
        out |= {name + "weight": leaf["kernel"].T, name + "bias": leaf["bias"]}
    return {n: np.ascontiguousarray(x) for n, x in out.items()}


def write(folder, container="classic", dtype=np.float32, without=(), hf=(), more=()):
    """A folder of the small model, and for the authors' layout CLIP's beside it."""
    folder.mkdir()
    found = {
        n: x if x.dtype == np.int64 else x.astype(dtype) for n, x in tensors(container).items() if n not in without
    }
    save_file({**found, **dict(more)}, folder / "model.safetensors")
    if container == "authors":
        said = {**TEXT, "model_type": "llava", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip"}  # fmt: skip
        tower = folder.with_name("clip")
        tower.mkdir(exist_ok=True)
        text = {"text_model.embeddings.position_ids": np.zeros(3, np.int64), "logit_scale": np.zeros((), np.float32)}
        save_file(clip_tensors("vision_model.") | text, tower / "model.safetensors")
        (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION}))
    else:
        said = {"model_type": "llava", "text_config": TEXT, "vision_config": VISION, "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default", "image_token_index": IMAGE}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**said, **dict(hf)}))
    return {"vision": folder.with_name("clip")} if container == "authors" else {}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_the_same_model(tmp_path, container):
    more = write(tmp_path / "m", container)
    module, variables, processor = load_llava(tmp_path / "m", **more)
    placeholder = VOCAB if container == "authors" else IMAGE  # the authors' vocabulary has none
    assert module.config == dataclasses.replace(config(), image_token=placeholder)
    jax.tree.map(np.testing.assert_array_equal, variables, model()[1])
    assert processor.pad == (container == "authors")
    assert processor.template == PROMPTS["original" if container == "authors" else "hf"]
    assert processor.tokenizer is None


def test_dtypes(tmp_path):
    write(tmp_path / "m", dtype=ml_dtypes.bfloat16)
    kept = load_llava(tmp_path / "m")
    assert {x.dtype.name for x in jax.tree.leaves(kept.variables)} == {"bfloat16"}
    cast = load_llava(tmp_path / "m", dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(cast.variables)} == {"float32"}
    assert cast.module.config.language.dtype == "float32"


def test_what_is_refused(tmp_path):
    head, first = "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"
    odd = {"audio_tower.weight": np.zeros(1, np.float32)}
    cases = {
        "next": ({"hf": {"model_type": "llava_next"}}, "only LLaVA-1.5 is read"),
        "newline": ({"more": {"image_newline": np.zeros(16, np.float32)}}, "LLaVA-1.6"),
        "odd": ({"more": odd}, "audio_tower.weight.*belongs to no part"),
        "half": ({"without": [first]}, "lacks linear_1.weight"),
        "relu": ({"hf": {"projector_hidden_act": "relu"}}, "projector_hidden_act 'relu'"),
        "layers": ({"hf": {"vision_feature_layer": [-2, -5]}}, "one layer"),
        "norm": ({"without": ["language_model.model.norm.weight"]}, "no tensor 'model.norm.weight'"),
        "untied": ({"without": [head], "hf": {"text_config": {**TEXT, "tie_word_embeddings": False}}}, "lm_head"),
    }
    for name, (how, said) in cases.items():
        write(tmp_path / name, **how)
        with pytest.raises(ValueError, match=said):
            load_llava(tmp_path / name)
    write(tmp_path / "blind", "authors")
    with pytest.raises(ValueError, match="download openai/clip and give its folder as vision"):
        load_llava(tmp_path / "blind")


class Words:
    """A tokenizer of known words, as the package tokenizers has it; 1 begins a text."""

    def __init__(self, placeholder):
        self.placeholder = placeholder

    def token_to_id(self, word):
        return IMAGE if self.placeholder and word == "<image>" else None

    def encode(self, text, add_special_tokens=True):
        words = re.findall(r"<image>|\w+|\S", text)
        ids = [IMAGE if w == "<image>" else 2 + sum(map(ord, w)) % 30 for w in words]
        return type("Encoding", (), {"ids": [1] * add_special_tokens + ids})


def processor(placeholder=True, pad=False):
    return LlavaProcessor(config(), Preprocess(12, 12, interpolation="bicubic"), pad, PROMPTS["hf"], Words(placeholder))


def test_prompts_hold_a_placeholder_for_every_visual_token():
    for placeholder in (True, False):
        ids, mask = processor(placeholder).prompts(["what?", "what is it, then?"], images=2)
        assert (ids == IMAGE).sum(1).tolist() == [18, 18]
        assert (ids[0] != 0).tolist() == mask[0].tolist() and mask[1].all() and not mask[0].all()
        assert ids[1, 0] == 1 and (ids == 1).sum() == 2  # each text begins once
        where = np.flatnonzero(ids[1] == IMAGE)
        assert where[8] - where[0] == 8
    with pytest.raises(ValueError, match="leave it out"):
        processor().prompts(["<image>?"])
    with pytest.raises(ValueError, match="there is no tokenizer"):
        LlavaProcessor(config(), Preprocess(12, 12), False, PROMPTS["hf"]).prompts(["what?"])


def test_pictures():
    wide = Image.fromarray(np.full((6, 12, 3), 200, np.uint8))
    square = np.asarray(pad_to_square(wide, (1, 2, 3)))
    assert square.shape == (12, 12, 3) and (square[3:9] == 200).all()
    assert (square[:3] == [1, 2, 3]).all() and (square[9:] == [1, 2, 3]).all()
    padded = processor(pad=True).images([[wide], [wide]])
    assert padded.shape == (2, 1, 12, 12, 3)
    np.testing.assert_allclose(padded[0, 0, 0], 0, atol=0.02)  # the mean colour is 0 to the tower
    cut = processor().images([[wide, wide]])
    assert cut.shape == (1, 2, 12, 12, 3) and np.ptp(cut[0, 0], axis=(0, 1)).max() < 0.05
    with pytest.raises(ValueError, match="equally many"):
        processor().images([[wide], [wide, wide]])
