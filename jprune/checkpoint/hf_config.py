"""config.json of the Hugging Face hub and `LlamaConfig`: both dialects read, the older one (all programs know it) written.

Hub and transformers 4: top-level `rope_theta`, `rope_scaling` (or null; its type under `rope_type` or `type`) and
`torch_dtype`. transformers 5: `rope_parameters` with everything about positions, and `dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jprune.files.json_files import REQUIRED, Fields
from jprune.models.llama_config import FAMILIES, WITH_EXPERTS, LlamaConfig
from jprune.models.moe.routers import Experts, TopK
from jprune.models.rope import Rope

OWN = "jprune_"  # before the model type of folders whose layers differ, in versions up to 0.1
PER_LAYER = {"intermediate_size": "ffn", "num_attention_heads": "q_heads", "num_key_value_heads": "kv_heads"}
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral",
}  # fmt: skip
LIKE = {
    "qwen3_moe": "qwen3",
    "mixtral": "mistral",
}  # families with experts: the one whose attention and norms they have
MOST_LAYERS = 100_000  # more than any model has; each costs time, also where there are no files to compare with
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def config_from_hf(hf: Mapping[str, Any], dtype: str = "float32", *, layers: int | None = None) -> LlamaConfig:
    """The model that a config.json describes, per-layer widths of our own folders included.

    Args:
      hf: the JSON object.
      dtype: of the weights, if the config does not say.
      layers: how many of them the files hold, which a config that claims more is compared with before anything is built.

    Raises:
      ValueError: a model type, activation, rope type or quantisation that is not supported, an entry of a wrong type or
        out of range; the key is named.
    """
    f = hf if isinstance(hf, Fields) else Fields(hf)
    kind = f.text("model_type")
    family = kind.removeprefix(OWN)
    if family not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not supported: only {', '.join(FAMILIES)} are")
    if f.get("quantization_config"):
        raise ValueError("the model is quantised (quantization_config): dequantise it before pruning")
    act = f.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {act!r} is not supported: only 'silu' is")
    depth = f.integer("num_hidden_layers", least=1, most=MOST_LAYERS)
    d, heads = (f.integer(k, least=1) for k in ("hidden_size", "num_attention_heads"))
    if layers is not None and depth > layers:
        raise ValueError(
            f"num_hidden_layers is {depth}, and the files hold {layers} layers: one of them is another model's"
        )
    head = f.integer("head_dim", None, least=1) or (128 if family == "qwen3" else d // heads)
    like = LIKE.get(family, family)
    bias = f.flag("attention_bias", False) and like in ("llama", "qwen3")
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    widths = {
        "ffn": [f.integer(width, least=1)] * depth,
        "q_heads": [heads] * depth,
        "kv_heads": [f.integer("num_key_value_heads", None, least=1) or heads] * depth,
    }
    per_layer = f.fields("per_layer_config", {})
    for layer in per_layer:
        overrides = per_layer.fields(layer)
        for key in overrides:
            if key not in PER_LAYER or not _is_layer(layer, depth):
                raise ValueError(f"per_layer_config of layer {layer} has {key!r}: only {', '.join(PER_LAYER)} are read")
            widths[PER_LAYER[key]][int(layer)] = overrides.integer(key, least=1)
    return LlamaConfig(
        vocab=f.integer("vocab_size", least=1),
        stream=d,
        head_dim=head,
        ffn=tuple(widths["ffn"]),
        q_heads=tuple(widths["q_heads"]),
        kv_heads=tuple(widths["kv_heads"]),
        windows=_windows(f, family, depth),
        eps=f.number("rms_norm_eps", 1e-6, above=0),
        rope=_rope(f),
        tied=f.flag("tie_word_embeddings", False),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=f.flag("mlp_bias", False) and family == "llama",
        qk_norm=like == "qwen3",
        experts=_experts(f, family),
        family=family,
        max_positions=f.integer("max_position_embeddings", 2048, least=1),
        dtype=(f.text("dtype", None) or f.text("torch_dtype", None) or dtype).removeprefix("torch."),
    )


def _experts(f: Fields, family: str) -> Experts | None:
    """Of a family that has them, in every layer."""
    if family not in WITH_EXPERTS:
        return None
    if family == "qwen3_moe" and (f.integer("decoder_sparse_step", 1) != 1 or f.integers("mlp_only_layers", [])):
        raise ValueError("some layers have an MLP in place of experts (decoder_sparse_step, mlp_only_layers): only models "
                         "with experts in every layer are read")  # fmt: skip
    local = f.integer("num_local_experts", None, least=1)
    count = f.integer("num_experts", local, least=1) if family == "qwen3_moe" else local
    if count is None:
        raise ValueError("num_local_experts is missing" if family == "mixtral" else "num_experts is missing")
    if local is not None and local != count:
        raise ValueError(f"num_experts is {count} and num_local_experts {local}: correct one of them")
    k = f.integer("num_experts_per_tok", 2 if family == "mixtral" else REQUIRED, least=1, most=count)
    return Experts(count, TopK(k, family == "mixtral" or f.flag("norm_topk_prob", False)), gated=True)


def _is_layer(text: str, depth: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) < depth


def _windows(f: Fields, family: str, depth: int) -> tuple[int | None, ...] | None:
    """How far every layer looks back."""
    window = f.integer("sliding_window", None, least=1)
    always = LIKE.get(family, family) == "mistral"
    if family == "llama" or window is None or not (always or f.flag("use_sliding_window", False)):
        return None
    kinds = f.texts("layer_types", None, among=("sliding_attention", "full_attention"))
    if always or family == "qwen3_moe":
        own = [True] * depth
    elif kinds is None:
        first = f.integer("max_window_layers", 28)
        own = [i >= first for i in range(depth)]
    else:
        own = [k == "sliding_attention" for k in kinds]
        if len(own) != depth:
            raise ValueError(
                f"layer_types lists {len(own)} layers, num_hidden_layers says {depth}: correct one of them"
            )
    return tuple(window if o else None for o in own) if any(own) else None


def _rope(f: Fields) -> Rope:
    found = f.fields("rope_parameters", {}) or f.fields("rope_scaling", {})
    theta = found.number("rope_theta", None, above=0) or f.number("rope_theta", None, above=0) or 10000.0
    kind = found.text("rope_type", None) or found.text("type", None) or "default"
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope type {kind!r} is not supported: only {', '.join(_ROPE_KEYS)} are")
    for place in (f, found):
        if place.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor is not supported: whole heads are rotated")
    if kind == "default":
        return Rope(theta)
    factor = found.number("factor", above=0)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    low, high = (found.number(f"{end}_freq_factor", above=0) for end in ("low", "high"))
    return Rope(theta, "llama3", factor, low, high, found.integer("original_max_position_embeddings", least=1))


def export_family(config: LlamaConfig) -> str:
    """The family whose stock `transformers` classes compute this model; the config's own wherever that is possible.

    A LLaMA whose heads do not divide the stream is refused by its config class there, though the model would run; as
    a Mistral without a window it is the same function.

    Raises:
      ValueError: no stock family has this mixture of biases, norms and windows.
    """
    families = [config.family, *(f for f in FAMILIES if f != config.family)]
    reasons = [(f, _unfit(f, config)) for f in families]
    fit = next((f for f, why in reasons if why is None), None)
    if fit is None:
        raise ValueError("no stock model computes this: " + "; ".join(f"{f} {why}" for f, why in reasons))
    return fit


def _unfit(family: str, c: LlamaConfig) -> str | None:
    """Why a family's stock classes cannot be this model."""
    windows, like = set(c.windows or (None,)), LIKE.get(family, family)
    if (c.experts is not None) != (family in WITH_EXPERTS):
        return "has no experts" if c.experts is not None else "always has experts"
    if c.experts is not None:
        router = c.experts.router
        if not c.experts.gated or not isinstance(router, TopK):
            return "has gated experts and a top-k router"
        if family == "mixtral" and not router.renormalised:
            return "has weights that are divided by their sum"
    if len(windows - {None}) > 1:
        return "has one window size"
    if family == "llama" and windows != {None}:
        return "has no window"
    if (like == "mistral" or family == "qwen3_moe") and len(windows) > 1:
        return "has one window for all layers"
    if family == "llama" and c.stream % max(c.q_heads):
        return f"needs a number of heads that divides {c.stream}"
    if c.qk_norm != (like == "qwen3"):
        return "has no qk_norm" if c.qk_norm else "always has qk_norm"
    if c.mlp_bias and family != "llama":
        return "has no mlp_bias"
    if like in ("llama", "qwen3") and c.qkv_bias != c.o_bias:
        return "has biases on q, k, v and o together"
    if like == "mistral" and (c.qkv_bias or c.o_bias):
        return "has no attention biases"
    if family == "qwen2" and (not c.qkv_bias or c.o_bias):
        return "has biases on q, k, v and not on o"
    return None


def hf_from_config(config: LlamaConfig, family: str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json for stock `transformers` of a uniform model; other keys of `base` (token ids, ...) are kept."""
    c = config
    out = {k: v for k, v in (base or {}).items() if k not in _REPLACED}
    out |= {
        "architectures": [f"{CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": c.vocab,
        "hidden_size": c.stream,
        "intermediate_size": max(c.ffn) if family != "qwen3_moe" else (base or {}).get("intermediate_size", max(c.ffn)),
        "num_hidden_layers": c.depth,
        "num_attention_heads": max(c.q_heads),
        "num_key_value_heads": max(c.kv_heads),
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope.theta,
        **({} if c.rope.kind == "default" else {"rope_scaling": _scaling(c.rope)}),
        "tie_word_embeddings": c.tied,
        "torch_dtype": c.dtype,
    }
    like = LIKE.get(family, family)
    if like in ("llama", "qwen3"):
        out["attention_bias"] = c.qkv_bias
    if c.experts is not None:
        out |= _said_of_experts(c, family)
    if family == "llama":
        out["mlp_bias"] = c.mlp_bias
    window = next((w for w in c.windows or () if w is not None), None)
    if like == "mistral":
        out["sliding_window"] = window
    elif like in ("qwen2", "qwen3"):
        own = [w is not None for w in c.windows or (None,) * c.depth]
        out |= {"use_sliding_window": window is not None, "sliding_window": window}
        out["max_window_layers"] = own.index(True) if any(own) else c.depth
        if own != sorted(own):  # only the newer key can say that other layers than the last ones have a window
            out["layer_types"] = ["sliding_attention" if o else "full_attention" for o in own]
    return out


def _scaling(rope: Rope) -> dict[str, Any]:
    values = (rope.factor, rope.low, rope.high, rope.original)
    return {"rope_type": rope.kind, **dict(zip(_ROPE_KEYS[rope.kind], values, strict=False))}


def _said_of_experts(c: LlamaConfig, family: str) -> dict[str, Any]:
    """The entries that a family with experts has besides."""
    assert c.experts is not None and isinstance(c.experts.router, TopK)
    count = c.experts.count
    out = {"num_local_experts": count, "num_experts_per_tok": c.experts.router.k}
    if family == "qwen3_moe":  # older programs read num_experts, newer ones write num_local_experts
        out |= {"num_experts": count, "moe_intermediate_size": max(c.ffn)}
        out |= {"norm_topk_prob": c.experts.router.renormalised, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return out


_REPLACED = (
    "auto_map", "per_layer_config", "block_configs", "layer_types", "rope_parameters", "rope_scaling", "rope_theta",
    "dtype", "torch_dtype", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers",
    "transformers_version", "pretraining_tp", "quantization_config", "allow_global_per_layer_attribute_access",
)  # fmt: skip
