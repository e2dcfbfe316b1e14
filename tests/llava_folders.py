"""The small LLaVA written out in every layout of files, shared by tests."""

import functools
import json
import re

import numpy as np
from safetensors.numpy import save_file
from small_llava import IMAGE, VOCAB, model

from jprune.checkpoint.vit_names import clip

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

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{i}" for i in ids)
