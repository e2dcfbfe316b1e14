"""Folders of models with experts: there and back to the bit, by single and by joined tensors; wrong ones are named."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jprune.checkpoint import load_hf, save_hf
from jprune.models.llama import Llama, llama_config
from jprune.models.moe import Experts, ReluNorm, TopK

E, K, D, F = 3, 2, 8, 6


@functools.cache
def model(family, renormalised=True):
    config = llama_config(13, D, F, 2, 2, experts=Experts(E, TopK(K, renormalised), gated=True), family=family,
                          qk_norm=family == "qwen3_moe")  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), "int32"))
    return config, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_there_and_back(tmp_path, family):
    config, v = model(family)
    save_hf(v, config, tmp_path / "m")
    found, back, _ = load_hf(tmp_path / "m")
    assert found == config and same(back, v)
    found, stacked, _ = load_hf(tmp_path / "m", scanned=True)
    assert same(jax.tree.map(lambda x: x[1], stacked["params"]["layers"]), v["params"]["layer1"])
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    layer, own = ("mlp", "down_proj") if family == "qwen3_moe" else ("block_sparse_moe", "w2")
    down = tensors[f"model.layers.1.{layer}.experts.2.{own}.weight"]
    np.testing.assert_array_equal(down, np.asarray(v["params"]["layer1"]["experts"]["down"])[2].T)


def test_joined_tensors_are_read_too(tmp_path):
    config, v = model("qwen3_moe", renormalised=False)
    save_hf(v, config, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for i in range(2):
        at = f"model.layers.{i}.mlp.experts."
        parts = {
            p: np.stack([tensors.pop(f"{at}{e}.{p}_proj.weight") for e in range(E)]) for p in ("gate", "up", "down")
        }
        tensors[f"{at}gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        tensors[f"{at}down_proj"] = parts["down"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    found, back, _ = load_hf(tmp_path / "m")
    assert found == config and same(back, v)


def test_what_does_not_fit_is_named(tmp_path):
    config, v = model("qwen3_moe")
    save_hf(v, config, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    first = "model.layers.0.mlp.experts.0.up_proj.weight"
    more = {"num_experts": E - 1, "num_local_experts": E - 1}
    wrong = [
        (f"no tensor '{first}'", {k: x for k, x in tensors.items() if k != first}, {}),
        (r"experts.0.up_proj.weight' has shape \(6, 7\)", tensors | {first: np.zeros((F, 7), np.float32)}, {}),
        (r"experts.2.gate_proj.weight', though its config.json says 2 experts", tensors, more),
        ("num_experts is 3 and num_local_experts 2", tensors, {"num_local_experts": 2}),
        ("num_experts_per_tok", tensors, {"num_experts_per_tok": 4}),
        ("decoder_sparse_step", tensors, {"decoder_sparse_step": 2}),
        ("mlp_only_layers", tensors, {"mlp_only_layers": [0]}),
        ("num_experts", tensors, {"num_experts": None, "num_local_experts": None}),
    ]
    for message, found, changed in wrong:
        save_file(found, tmp_path / "m" / "model.safetensors")
        (tmp_path / "m" / "config.json").write_text(json.dumps(said | changed))
        with pytest.raises(ValueError, match=message):
            load_hf(tmp_path / "m")
    for experts in (Experts(E, ReluNorm(), gated=True), Experts(E, TopK(K))):
        other = dataclasses.replace(config, experts=experts)
        shapes = jax.eval_shape(Llama(other).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), "int32"))
        with pytest.raises(ValueError, match="no stock model computes this"):
            save_hf(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), other, tmp_path / "o")
    with pytest.raises(ValueError, match="only written with mode='uniform'"):
        save_hf(v, config, tmp_path / "o", mode="padded")
