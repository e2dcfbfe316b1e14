"""The layouts of known codebases, as tables. Paths and axes are those of their public snapshots of 2026."""

from __future__ import annotations

from collections.abc import Mapping

from jprune.checkpoint.layouts.layout import MATRICES, ROLES, Layout, Site

_HF = {  # logical name: module, axes of its weight
    "q": ("self_attn.q_proj", ("q_head.h", "d")),
    "k": ("self_attn.k_proj", ("kv_head.h", "d")),
    "v": ("self_attn.v_proj", ("kv_head.hv", "d")),
    "o": ("self_attn.o_proj", ("d", "q_head.hv")),
    "gate": ("mlp.gate_proj", ("F", "d")),
    "up": ("mlp.up_proj", ("F", "d")),
    "down": ("mlp.down_proj", ("d", "F")),
}
_HF_LAYER = "model.layers.{l}."


def _hf() -> Layout:
    sites = {name: (Site(f"{_HF_LAYER}{module}.weight", axes),) for name, (module, axes) in _HF.items()}
    sites |= {f"{name}_bias": (Site(f"{_HF_LAYER}{module}.bias", axes[:1]),) for name, (module, axes) in _HF.items()}
    return Layout("hf", {
        **sites,
        "q_norm": (Site(f"{_HF_LAYER}self_attn.q_norm.weight", ("h",)),),
        "k_norm": (Site(f"{_HF_LAYER}self_attn.k_norm.weight", ("h",)),),
        # as `jprune.checkpoint.hf_experts` puts a layer's experts side by side
        "router": (Site(f"{_HF_LAYER}mlp.gate.weight", ("E", "d")),),
        "expert_gate": (Site(f"{_HF_LAYER}mlp.experts.gate", ("E.F", "d")),),
        "expert_up": (Site(f"{_HF_LAYER}mlp.experts.up", ("E.F", "d")),),
        "expert_down": (Site(f"{_HF_LAYER}mlp.experts.down", ("d", "E.F")),),
        "input_norm": (Site(f"{_HF_LAYER}input_layernorm.weight", ("d",)),),
        "post_norm": (Site(f"{_HF_LAYER}post_attention_layernorm.weight", ("d",)),),
        "embed": (Site("model.embed_tokens.weight", ("vocab", "d")),),
        "final_norm": (Site("model.norm.weight", ("d",)),),
        "lm_head": (Site("lm_head.weight", ("vocab", "d")),),
    })  # fmt: skip


def _peft() -> Layout:
    """Low-rank adapters as the PEFT library writes them: A (rank, inputs), B (outputs, rank); and LoRAPrune's masks."""
    sites = {}
    for name, (module, axes) in _HF.items():
        for factor, own in (("a", ("r", axes[1])), ("b", (axes[0], "r"))):
            path = f"base_model.model.{_HF_LAYER}{module}.lora_{factor.upper()}.weight"
            sites[f"{name}_lora_{factor}"] = (Site(path, own),)
        sites[f"{name}_lora_mask"] = (Site(f"base_model.model.{_HF_LAYER}{module}.lora_mask", axes[:1]),)
    return Layout("peft", sites)


def _linen(stacked: bool) -> Layout:
    """The trees of `jprune.models.llama`."""
    layer, lead = ("layers", ("layer",)) if stacked else ("layer{l}", ())
    axes = {
        "q": ("d", "q_head", "h"),
        "k": ("d", "kv_head", "h"),
        "v": ("d", "kv_head", "hv"),
        "o": ("q_head", "hv", "d"),
        "gate": ("d", "F"),
        "up": ("d", "F"),
        "down": ("F", "d"),
    }
    sites = {}
    for name, own in axes.items():
        module = f"{layer}/{'attn' if name in 'qkvo' else 'mlp'}/{name}"
        sites[name] = (Site(f"{module}/kernel", (*lead, *own)),)
        sites[f"{name}_bias"] = (Site(f"{module}/bias", (*lead, *ROLES[name][0])),)
    for name in ("q_norm", "k_norm"):
        sites[name] = (Site(f"{layer}/attn/{name}/scale", (*lead, "h")),)
    for name in ("input_norm", "post_norm"):
        sites[name] = (Site(f"{layer}/{name}/scale", (*lead, "d")),)
    sites["router"] = (Site(f"{layer}/experts/router/kernel", (*lead, "d", "E")),)
    for name, own in {"gate": ("E", "d", "F"), "up": ("E", "d", "F"), "down": ("E", "F", "d")}.items():
        sites[f"expert_{name}"] = (Site(f"{layer}/experts/{name}", (*lead, *own)),)
    sites["embed"] = (Site("embed/embedding", ("vocab", "d")),)
    sites["final_norm"] = (Site("final_norm/scale", ("d",)),)
    sites["lm_head"] = (Site("lm_head/kernel", ("d", "vocab")),)
    return Layout("linen_scan" if stacked else "linen", sites, prefix="params")


def _maxtext(stacked: bool) -> Layout:
    layer = "decoder/layers" if stacked else "decoder/layers_{l}"

    def site(path: str, *axes: str) -> tuple[Site, ...]:
        return (Site(f"{layer}/{path}", (axes[0], "layer", *axes[1:]) if stacked else axes),)

    return Layout(
        "maxtext_scan" if stacked else "maxtext",
        {
            "q": site("self_attention/query/kernel", "d", "q_head", "h"),
            "k": site("self_attention/key/kernel", "d", "kv_head", "h"),
            "v": site("self_attention/value/kernel", "d", "kv_head", "hv"),
            "o": site("self_attention/out/kernel", "q_head", "hv", "d"),
            "gate": site("mlp/wi_0/kernel", "d", "F"),
            "up": site("mlp/wi_1/kernel", "d", "F"),
            "down": site("mlp/wo/kernel", "F", "d"),
            "input_norm": site("pre_self_attention_layer_norm/scale", "d"),
            "post_norm": site("post_self_attention_layer_norm/scale", "d"),
            "embed": (Site("token_embedder/embedding", ("vocab", "d")),),
            "final_norm": (Site("decoder/decoder_norm/scale", ("d",)),),
            "lm_head": (Site("decoder/logits_dense/kernel", ("d", "vocab")),),
        },
        prefix="params",
        interleaved=True,
        scaled_query=True,
    )


def _easylm() -> Layout:
    layer = "transformer/h/{l}"
    return Layout(
        "easylm",
        {
            "q": (Site(f"{layer}/attention/wq/kernel", ("d", "q_head.h")),),
            "k": (Site(f"{layer}/attention/wk/kernel", ("d", "kv_head.h")),),
            "v": (Site(f"{layer}/attention/wv/kernel", ("d", "kv_head.hv")),),
            "o": (Site(f"{layer}/attention/wo/kernel", ("q_head.hv", "d")),),
            "gate": (Site(f"{layer}/feed_forward/w1/kernel", ("d", "F")),),
            "down": (Site(f"{layer}/feed_forward/w2/kernel", ("F", "d")),),
            "up": (Site(f"{layer}/feed_forward/w3/kernel", ("d", "F")),),
            "input_norm": (Site(f"{layer}/attention_norm/kernel", ("d",)),),
            "post_norm": (Site(f"{layer}/ffn_norm/kernel", ("d",)),),
            "embed": (Site("transformer/wte/embedding", ("vocab", "d")),),
            "final_norm": (Site("transformer/ln_f/kernel", ("d",)),),
            "lm_head": (Site("lm_head/kernel", ("d", "vocab")),),
        },
        prefix="params",
        interleaved=True,
    )


def _tunix() -> Layout:
    """tunix's nnx models, with the adapters that qwix puts beside their weights."""
    weights = {
        "q": ("attn/q_proj/w", ("d",), ("q_head", "h")),
        "k": ("attn/k_proj/w", ("d",), ("kv_head", "h")),
        "v": ("attn/v_proj/w", ("d",), ("kv_head", "hv")),
        "o": ("attn/o_proj/w", ("q_head", "hv"), ("d",)),
        "gate": ("mlp/gate_proj/kernel", ("d",), ("F",)),
        "up": ("mlp/up_proj/kernel", ("d",), ("F",)),
        "down": ("mlp/down_proj/kernel", ("F",), ("d",)),
    }
    sites = {}
    for name, (path, contracted, out) in weights.items():
        path = f"layers/{{l}}/{path}"
        sites[name] = (Site(path, (*contracted, *out)),)
        sites[f"{name}_lora_a"] = (Site(f"{path}_lora_a", (*contracted, "r")),)
        sites[f"{name}_lora_b"] = (Site(f"{path}_lora_b", ("r", *out)),)
    return Layout("tunix", {
        **sites,
        "q_norm": (Site("layers/{l}/attn/q_norm/w", ("h",)),),
        "k_norm": (Site("layers/{l}/attn/k_norm/w", ("h",)),),
        "input_norm": (Site("layers/{l}/input_layernorm/w", ("d",)),),
        "post_norm": (Site("layers/{l}/post_attention_layernorm/w", ("d",)),),
        "embed": (Site("embedder/input_embedding", ("vocab", "d")),),
        "final_norm": (Site("final_norm/w", ("d",)),),
        "lm_head": (Site("lm_head/w", ("d", "vocab")),),
    })  # fmt: skip


def _levanter() -> Layout:
    """levanter's Equinox models with stacked layers; the arrays inside its named arrays."""
    layer = "transformer/layers/stacked"

    def site(path: str, *axes: str) -> tuple[Site, ...]:
        return (Site(f"{layer}/{path}", ("layer", *axes)),)

    return Layout("levanter", {
        "q": site("self_attn/q_proj/weight", "kv_head", "q_in_group", "h", "d"),
        "k": site("self_attn/k_proj/weight", "kv_head", "h", "d"),
        "v": site("self_attn/v_proj/weight", "kv_head", "hv", "d"),
        "o": site("self_attn/o_proj/weight", "d", "q_head", "hv"),
        "gate": site("mlp/gate_proj/weight", "F", "d"),
        "up": site("mlp/up_proj/weight", "F", "d"),
        "down": site("mlp/down_proj/weight", "d", "F"),
        "input_norm": site("input_layernorm/weight", "d"),
        "post_norm": site("post_attention_layernorm/weight", "d"),
        "embed": (Site("embeddings/token_embeddings/weight", ("vocab", "d")),),
        "final_norm": (Site("transformer/norm/weight", ("d",)),),
        "lm_head": (Site("lm_head/weight", ("vocab", "d")),),
    })  # fmt: skip


def gemma(transpose_gating: bool = False) -> Layout:
    """The Gemma library's linen trees: gate and up on one leading axis, keys and values (or all three) on another.

    Its MLP uses GELU and its embeddings are scaled: only the tensors are the same as elsewhere, not the function.

    Args:
      transpose_gating: `gating_einsum` is (2, ffn, stream) instead of (2, stream, ffn).
    """
    gating = ("F", "d") if transpose_gating else ("d", "F")
    qkv = "layer_{l}/attn/qkv_einsum/w"
    return Layout(
        "gemma",
        {
            "q": (
                Site(qkv, ("fused:0", "q_head", "d", "h")),
                Site("layer_{l}/attn/q_einsum/w", ("q_head", "d", "h")),
            ),
            "k": (
                Site(qkv, ("fused:1", "kv_head", "d", "h")),
                Site("layer_{l}/attn/kv_einsum/w", ("fused:0", "kv_head", "d", "h")),
            ),
            "v": (
                Site(qkv, ("fused:2", "kv_head", "d", "hv")),
                Site("layer_{l}/attn/kv_einsum/w", ("fused:1", "kv_head", "d", "hv")),
            ),
            "o": (Site("layer_{l}/attn/attn_vec_einsum/w", ("q_head", "hv", "d")),),
            "gate": (Site("layer_{l}/mlp/gating_einsum", ("fused:0", *gating)),),
            "up": (Site("layer_{l}/mlp/gating_einsum", ("fused:1", *gating)),),
            "down": (Site("layer_{l}/mlp/linear", ("F", "d")),),
            "input_norm": (Site("layer_{l}/pre_attention_norm/scale", ("d",)),),
            "post_norm": (Site("layer_{l}/pre_ffw_norm/scale", ("d",)),),
            "embed": (Site("embedder/input_embedding", ("vocab", "d")),),
            "final_norm": (Site("final_norm/scale", ("d",)),),
        },
        prefix="params",
        norm_offset=1.0,
    )


def custom(sites: Mapping[str, tuple[str, tuple[str, ...]]], *, interleaved: bool = False) -> Layout:
    r"""A layout of your own: {logical name: (regular expression of the path, roles of its axes)}.

    The expression's group `l` is the layer's number; without one, an axis "layer" must be among the roles:
    `custom({"gate": (r"blocks/(?P<l>\d+)/w1", ("d", "F")), ...})`.

    Raises:
      ValueError: an unknown logical name, axes that do not fit it, or no way to tell the layer.
    """
    out = {}
    for name, (path, axes) in sites.items():
        if name.partition("_")[0] in MATRICES and "layer" not in axes and "(?P<l>" not in path:
            raise ValueError(f"{name!r}: {path!r} has no group (?P<l>\\d+) and no axis 'layer': which layer is it?")
        out[name] = (Site(path, tuple(axes), regex=True),)
    return Layout("custom", out, interleaved=interleaved)


HF, PEFT = _hf(), _peft()
LINEN, LINEN_SCAN = _linen(False), _linen(True)
MAXTEXT, MAXTEXT_SCAN = _maxtext(False), _maxtext(True)
EASYLM, TUNIX, LEVANTER, GEMMA = _easylm(), _tunix(), _levanter(), gemma()
LAYOUTS = {
    layout.name: layout
    for layout in (HF, PEFT, LINEN, LINEN_SCAN, MAXTEXT, MAXTEXT_SCAN, EASYLM, TUNIX, LEVANTER, GEMMA)
}
