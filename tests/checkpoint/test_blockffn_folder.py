"""Released BlockFFN checkpoints: each layout gives the layer that a loop over tokens and experts computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jprune.checkpoint.blockffn import load_blockffn
from jprune.models.moe.blockffn import blockffn

E, F, D = 3, 4, 6
RNG = np.random.default_rng(0)
UP, DOWN = RNG.normal(size=(2, E, F, D)).astype(np.float32), RNG.normal(size=(2, E, D, F)).astype(np.float32)
ROUTER, GAIN = RNG.normal(size=(2, E, D)).astype(np.float32), RNG.normal(size=(2, E)).astype(np.float32)
CONFIG = {
    "num_experts": E,
    "expert_size": F,
    "router_act": "relu",
    "norm_after_router": "rms",
    "ffn_type": "block_linear",
}


def tensors(layout):
    out = {"model.embed_tokens.weight": np.zeros((7, D), np.float32)}
    for i in range(2):
        at = f"model.layers.{i}.mlp."
        up, down = (
            ("experts.up_proj.weight", "experts.down_proj.weight") if layout == "nested" else ("up_proj", "down_proj")
        )
        flat = layout == "side by side"
        out |= {
            at + up: UP[i].reshape(E * F, D) if flat else UP[i],
            at + down: np.concatenate(DOWN[i], axis=1) if flat else DOWN[i],
            at + "router_proj.weight": ROUTER[i],
            at + "router_norm.weight": GAIN[i],
        }
    return {name: np.ascontiguousarray(x) for name, x in out.items()}


def folder(path, found, config=CONFIG):
    path.mkdir()
    save_file(found, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def by_hand(i, x):
    """One token and one expert at a time."""
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        r = np.maximum(ROUTER[i] @ row, 0)
        a = r / np.sqrt((r**2).mean() + 1e-5) * GAIN[i]
        for e in np.flatnonzero(r):
            h = UP[i, e] @ row
            y[t] += a[e] * DOWN[i, e] @ (h / (1 + np.exp(-h)))
    return y


@pytest.mark.parametrize("layout", ["side by side", "one by one", "nested"])
def test_layers_compute_what_the_checkpoint_means(tmp_path, layout):
    layers, config = load_blockffn(folder(tmp_path / "m", tensors(layout)))
    assert len(layers) == 2 and config["expert_size"] == F
    x = RNG.normal(size=(5, D)).astype(np.float32)
    run = jax.jit(lambda layer, x: blockffn(layer, x)[0])
    for i, layer in enumerate(layers):
        np.testing.assert_allclose(run(layer, jnp.asarray(x)), by_hand(i, x), atol=1e-4)


def test_what_does_not_fit_is_named(tmp_path):
    good = tensors("side by side")
    wrong = {
        "router_act": (good, CONFIG | {"router_act": "softmax"}),
        "num_experts": (good, {k: v for k, v in CONFIG.items() if k != "num_experts"}),
        r"layers.0.mlp.router_proj.weight has shape \(3, 6\): it must be \(4, d\)": (good, CONFIG | {"num_experts": 4}),
        r"layers.0.mlp.up_proj has shape \(12, 6\)": (good, CONFIG | {"expert_size": 5}),
        "'model.layers.1.mlp.router_norm.weight' is missing": (
            {k: v for k, v in good.items() if k != "model.layers.1.mlp.router_norm.weight"}, CONFIG),
        "layer 0 of 2 is missing": ({k: v for k, v in good.items() if ".0." not in k}, CONFIG),
        "not the weights of a BlockFFN": ({"a": GAIN}, CONFIG),
    }  # fmt: skip
    for k, (message, (found, config)) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=message):
            load_blockffn(folder(tmp_path / str(k), found, config))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"neither model.safetensors"):
        load_blockffn(tmp_path / "bin")
