"""Adapters on disk: names and shapes as PEFT writes them, ranks and scales per module, masks as LoRAPrune writes them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import tiny, weights
from safetensors.numpy import load_file, save_file

import jprune
from jprune.checkpoint.layouts import EASYLM, LINEN, LINEN_SCAN, convert, view
from jprune.checkpoint.layouts.convert import native
from jprune.language.lora import Lora, LoraConfig, init, layer_ranks
from jprune.language.peft import load_peft, save_peft
from jprune.methods.channels.loraprune.masks import prunable
from jprune.models.llama import Llama

SMALL = {"vocab": 20, "stream": 16, "ffn": 12, "depth": 2}
IDS = jnp.zeros((2, 3), jnp.int32)
HEAD = tiny(**SMALL).head_dim


@functools.cache
def decoder(scanned):
    module = Llama(tiny("llama", **SMALL), scanned)
    v = weights(module.config, scanned=scanned)
    return v, jprune.trace(module.apply, v, IDS)


@functools.cache
def adapters(scanned):
    """(config, factors, masks) with ranks 3 and 2."""
    _, graph = decoder(scanned)
    config = LoraConfig(2, 5.0, 0.1, layer_ranks(graph, [3, 2]))
    lora = init(jax.random.key(0), graph, config)
    lora = {t: {"a": f["a"], "b": jnp.sin(jnp.arange(f["b"].size, dtype=jnp.float32)).reshape(f["b"].shape)
                * (jnp.abs(f["a"]).sum(-1) > 0)[..., None, :]} for t, f in lora.items()}  # fmt: skip
    rng = np.random.default_rng(0)
    masks = {g: np.float32(rng.random(graph.groups[g].shape) < 0.6) for g in prunable(graph, skip_first=0, skip_last=0)}
    return config, Lora(lora, dict.fromkeys(lora, config.scale)), masks


def test_the_files_are_those_of_peft(tmp_path):
    _, graph = decoder(False)
    config, lora, masks = adapters(False)
    save_peft(tmp_path, graph, lora, HEAD, dropout=config.dropout, masks=masks, base="a/model")
    said, files = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert (said["r"], said["lora_alpha"], said["peft_type"], said["base_model_name_or_path"]) == (
        2,
        5.0,
        "LORA",
        "a/model",
    )
    assert sorted(said["target_modules"]) == sorted(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    assert set(said["rank_pattern"].values()) == {3} and set(said["alpha_pattern"].values()) == {7.5}
    assert all(m.startswith("model.layers.0.") for m in said["rank_pattern"]) and len(said["rank_pattern"]) == 7
    at = "base_model.model.model.layers.1.self_attn.q_proj"
    assert files[f"{at}.lora_A.weight"].shape == (2, 16) and files[f"{at}.lora_B.weight"].shape == (16, 2)
    assert len(files) == 2 * 7 * 3
    (kv,) = [g for g in masks if "layer1/attn" in g]
    heads = np.repeat(masks[kv], 2)  # of two queries each
    np.testing.assert_array_equal(files[f"{at}.lora_mask"], np.repeat(heads, HEAD))
    np.testing.assert_array_equal(files[f"{at.replace('q_proj', 'v_proj')}.lora_mask"], np.repeat(masks[kv], HEAD))
    (ffn,) = [g for g in masks if "layer1/mlp" in g]
    np.testing.assert_array_equal(files["base_model.model.model.layers.1.mlp.up_proj.lora_mask"], masks[ffn])
    assert files["base_model.model.model.layers.1.mlp.down_proj.lora_mask"].all()


@pytest.mark.parametrize(
    ("written", "read"),
    [(False, False), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, False), (False, True), (True, True)))],
)
def test_read_back_unrolled_and_stacked(tmp_path, written, read):
    layouts = {False: LINEN, True: LINEN_SCAN}
    config, lora, masks = adapters(written)
    _, graph = decoder(written)
    save_peft(tmp_path, graph, lora, HEAD, dropout=config.dropout, layout=layouts[written], masks=masks)
    _, graph = decoder(read)
    got, again, kept = load_peft(tmp_path, graph, HEAD, layout=layouts[read])
    assert (again.rank, again.alpha, again.dropout, again.scale) == (2, 5.0, 0.1, 2.5)
    for t, f in got.items():
        other = (
            t if written == read else t.replace("/layers/", "/layer1/") if read else t.replace("/layer1/", "/layers/")
        )
        if other not in lora:
            continue
        mine, theirs = ({k: np.asarray(x) for k, x in tree.items()} for tree in (f, lora[other]))
        if read and not written:
            mine = {k: x[1] for k, x in mine.items()}
        elif written and not read:
            theirs = {k: x[1] for k, x in theirs.items()}
        r = min(mine["a"].shape[0], theirs["a"].shape[0])  # a stack is padded to its largest rank
        np.testing.assert_array_equal(mine["a"][:r], theirs["a"][:r])
        np.testing.assert_array_equal(mine["b"][:, :r], theirs["b"][:, :r])
        assert not mine["a"][r:].any() and not theirs["a"][r:].any()
    assert len(got) == (7 if read else 14) and len(kept) == (2 if read else 4)
    if written == read:
        jax.tree.map(np.testing.assert_array_equal, kept, masks)


@pytest.mark.parametrize("rooted", [False, True])
def test_every_module_has_the_scale_that_its_configuration_gives_it(tmp_path, rooted):
    """Alphas by name or by a regular expression, over the rank or its root; and written again."""
    _, graph = decoder(False)
    _, lora, _ = adapters(False)
    save_peft(tmp_path, graph, lora, HEAD)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    said["alpha_pattern"] = {"model.layers.0.mlp.up_proj": 30.0, r"layers\.1\..*\.[kv]_proj": 11.0}
    said["lora_alpha"], said["use_rslora"] = 5.0, rooted
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    got, again, kept = load_peft(tmp_path, graph, HEAD)
    assert kept is None and again.rank == said["r"]
    save_peft(tmp_path / "again", graph, got, HEAD)
    twice, *_ = load_peft(tmp_path / "again", graph, HEAD)
    for t in got:
        layer, rank = (0, 3) if "layer0" in t else (1, 2)
        alpha = 30.0 if layer == 0 and "/up/" in t else 11.0 if layer == 1 and ("/k/" in t or "/v/" in t) else 5.0
        want = alpha / (rank**0.5 if rooted else rank)
        assert got.scales[t] == pytest.approx(want, rel=1e-12) == twice.scales[t]
        np.testing.assert_array_equal(got[t]["b"], lora[t]["b"])
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "alpha_pattern": {"(": 1.0}}))
    with pytest.raises(ValueError, match="no regular expression"):
        load_peft(tmp_path, graph, HEAD)


def test_interleaved_heads_are_permuted():
    """A tree whose rotary pairs are neighbours has the rows of q and k, and so those of B, in another order."""
    v, _ = decoder(False)
    easy = convert(v["params"], LINEN, EASYLM, tiny(**SMALL))
    f = adapters(False)[1]["params/layer1/attn/q/kernel"]
    delta = np.asarray(f["b"] @ f["a"])
    moved = native("q_lora_b", np.asarray(f["b"]), EASYLM, HEAD) @ np.asarray(f["a"])
    tree = jax.tree.map(jnp.zeros_like, v["params"])
    tree["layer1"]["attn"]["q"]["kernel"] = jnp.asarray(delta.T.reshape(16, 4, HEAD))
    np.testing.assert_array_equal(view(convert(tree, LINEN, EASYLM, tiny(**SMALL)), EASYLM, "q", 1), moved)
    assert view(easy, EASYLM, "q", 1).shape == moved.shape and (moved != delta).any()


def test_what_is_refused(tmp_path):
    _, graph = decoder(False)
    config, lora, masks = adapters(False)
    save_peft(tmp_path, graph, lora, HEAD, dropout=config.dropout, masks=masks)
    file, said = tmp_path / "adapter_model.safetensors", json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(file)

    def with_(change=None, **other):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**said, **other}))
        save_file({**tensors, **(change or {})}, file)
        return load_peft(tmp_path, graph, HEAD)

    with pytest.raises(ValueError, match="'IA3' adapters: only LORA"):
        with_(peft_type="IA3")
    with pytest.raises(ValueError, match="says use_dora=True"):
        with_(use_dora=True)
    with pytest.raises(ValueError, match=r"the tensor 'lm_head.lora_A.weight', which is none"):
        with_({"lm_head.lora_A.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="has q_lora_a of layer 7"):
        with_({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.ones((2, 16), np.float32)})
    at = "base_model.model.model.layers.0.self_attn.k_proj.lora_mask"
    half = tensors[at].copy()
    half[0] = 1 - half[0]
    with pytest.raises(ValueError, match="it prunes part of a head"):
        with_({at: half})
    with pytest.raises(ValueError, match="than its neighbours"):
        with_({at: 1 - tensors[at]})
    with pytest.raises(ValueError, match=r"the adapter of .*q_proj is"):
        with_({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((3, 8), np.float32)})
