"""Folders made here tensor by tensor: what is read from them, what is refused, and that every mode returns its bits."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoders import FAMILIES, LLAMA3, prompt, tiny, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jprune
from jprune import checkpoint
from jprune.checkpoint import PruningRecord, load_hf, load_tokenizer, save_hf
from jprune.checkpoint.hf_config import config_from_hf, export_family, hf_from_config
from jprune.checkpoint.hf_export import count, padded_config, removed
from jprune.checkpoint.hf_files import TensorFiles
from jprune.checkpoint.layouts import LINEN, Kept, slice_kept
from jprune.models import rebuild
from jprune.models.llama import Llama, LlamaConfig, fold_norm_width, llama_config, stack_layers
from jprune.models.rope import Rope
from jprune.tracing.paths import flatten

D, F, NQ, NK, H, V, L = 32, 48, 4, 2, 8, 50, 2
HUB = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": D,
    "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": NQ, "num_key_value_heads": NK,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tensors(dtype=np.float32, seed=0, bias=False):
    """The checkpoint's tensors, (outputs, inputs)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(dtype)

    out = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": normal(D), "lm_head.weight": normal(V, D)}
    for i in range(L):
        at = f"model.layers.{i}."
        shapes = {"q": (NQ * H, D), "k": (NK * H, D), "v": (NK * H, D), "o": (D, NQ * H)}
        out |= {f"{at}self_attn.{n}_proj.weight": normal(*s) for n, s in shapes.items()}
        if bias:
            out |= {f"{at}self_attn.{n}_proj.bias": normal(s[0]) for n, s in shapes.items() if n != "o"}
        out |= {f"{at}mlp.{n}_proj.weight": normal(*s) for n, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))}
        out |= {f"{at}{n}_layernorm.weight": normal(D) for n in ("input", "post_attention")}
    return out


def write(folder, flat=None, config=HUB, shards=1):
    """A folder as the hub has it."""
    flat = tensors() if flat is None else flat
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(flat, folder / "model.safetensors")
        return folder
    where = {}
    for k, name in enumerate(sorted(flat)):
        where[name] = f"model-{k % shards + 1:05d}-of-{shards:05d}.safetensors"
    for file in set(where.values()):
        save_file({n: x for n, x in flat.items() if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def equal(a, b):
    """Same paths, dtypes and bits."""
    a, b = dict(flatten(a)), dict(flatten(b))
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("shards", [1, 3])
def test_reading(tmp_path, shards):
    flat = tensors()
    config, v, metadata = load_hf(write(tmp_path / "m", flat, shards=shards))
    assert config == llama_config(V, D, F, L, NQ, NK, eps=1e-5, rope=Rope(500.0), max_positions=64)
    p = v["params"]
    w = flat["model.layers.1.self_attn.q_proj.weight"]
    for n in range(NQ):
        np.testing.assert_array_equal(p["layer1"]["attn"]["q"]["kernel"][:, n], w[n * H : (n + 1) * H].T)
    w = flat["model.layers.0.self_attn.o_proj.weight"]
    for n in range(NQ):
        np.testing.assert_array_equal(p["layer0"]["attn"]["o"]["kernel"][n], w[:, n * H : (n + 1) * H].T)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(
            p["layer1"]["mlp"][name]["kernel"], flat[f"model.layers.1.mlp.{name}_proj.weight"].T
        )
    np.testing.assert_array_equal(
        p["layer0"]["post_norm"]["scale"], flat["model.layers.0.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(p["lm_head"]["kernel"], flat["lm_head.weight"].T)
    assert metadata["hf_config"] == HUB and metadata["record"] is None
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), prompt()[0])
    assert jax.tree.map(lambda x: x.shape, v) == jax.tree.map(lambda x: x.shape, shapes)


def test_scanned_and_sharded_and_cast(tmp_path):
    folder = write(tmp_path / "m", tensors(ml_dtypes.bfloat16), {**HUB, "torch_dtype": "bfloat16"})
    config, v, _ = load_hf(folder)
    assert config.dtype == "bfloat16" and v["params"]["embed"]["embedding"].dtype == jnp.bfloat16
    again, stacked, _ = load_hf(folder, scanned=True)
    assert again == config
    equal(stacked, stack_layers(v))
    wide, cast, _ = load_hf(folder, dtype="float32")
    assert wide.dtype == "float32"
    equal(cast, jax.tree.map(lambda x: x.astype(jnp.float32), v))
    seen = {}

    def place(path, leaf):
        seen[path] = leaf.shape
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    _, placed, _ = load_hf(folder, sharding=place, scanned=True)
    equal(placed, stacked)
    assert seen == {p: x.shape for p, x in flatten(stacked)}


def test_norms_that_are_stored_more_precisely_stay_so(tmp_path):
    flat = tensors(ml_dtypes.bfloat16)
    flat |= {n: x for n, x in tensors().items() if "norm" in n}
    folder = write(tmp_path / "m", flat)
    ids, _ = prompt()
    config, v, _ = load_hf(folder)
    assert config.dtype == "bfloat16" and v["params"]["layer0"]["input_norm"]["scale"].dtype == jnp.float32
    _, stacked, _ = load_hf(folder, scanned=True)
    equal(stacked, stack_layers(v))
    logits = [jax.jit(Llama(config, s).apply)(p, ids) for s, p in ((False, v), (True, stacked))]
    np.testing.assert_allclose(*logits, atol=0.1)
    save_hf(v, config, tmp_path / "n")
    equal(load_hf(tmp_path / "n")[1], v)


def test_nothing_is_read_before_it_is_asked_for_and_nothing_stays_tied_to_the_file(tmp_path):
    folder = write(tmp_path / "m")
    files = TensorFiles(folder)
    x = files["model.embed_tokens.weight"]
    assert not x.flags.owndata and not x.flags.writeable  # a view of the mapped file
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start] + b" " * (-start % 64)  # aligned, where jax would use an array in place
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
    _, v, _ = load_hf(folder)
    before = jax.tree.map(np.array, v)
    with path.open("r+b") as file:
        file.seek(8 + len(header))
        file.write(bytes(len(data) - start))
    equal(v, before)


def test_both_dialects_of_the_config():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    hub = {**HUB, "rope_scaling": {"type": "llama3", **scaling}}
    newer = {k: v for k, v in HUB.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    newer |= {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **scaling}, "dtype": "float32"}
    assert config_from_hf(hub) == config_from_hf(newer)
    assert config_from_hf(hub).rope == LLAMA3
    assert config_from_hf({**HUB, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}).rope == Rope(
        500.0, "linear", 2.0
    )
    few = {k: HUB[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                               "num_attention_heads")}  # fmt: skip
    c = config_from_hf(few)
    assert (c.rope, c.head_dim, c.kv_heads, c.tied, c.qkv_bias) == (Rope(), 8, (4, 4), False, False)


@pytest.mark.parametrize(("extra", "windows"), [
    ({"model_type": "mistral", "sliding_window": 7}, (7, 7)),
    ({"model_type": "mistral", "sliding_window": None}, None),
    ({"model_type": "llama", "sliding_window": 7}, None),
    ({"model_type": "qwen2", "sliding_window": 7}, None),
    ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, (None, 7)),
    ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, None),
    ({"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 9,
      "layer_types": ["sliding_attention", "full_attention"]}, (7, None)),
])  # fmt: skip
def test_windows(extra, windows):
    assert config_from_hf({**HUB, **extra}).windows == windows


@pytest.mark.parametrize("family", FAMILIES)
def test_config_there_and_back(family):
    c = dataclasses.replace(tiny(family), max_positions=64)
    own = export_family(c)
    assert own == c.family
    assert config_from_hf(json.loads(json.dumps(hf_from_config(c, own, {"eos_token_id": 5})))) == c
    assert hf_from_config(c, own, {"eos_token_id": 5, "rope_parameters": 1})["eos_token_id"] == 5
    assert "rope_parameters" not in hf_from_config(c, own, {"rope_parameters": 1})


@pytest.mark.parametrize(("extra", "message"), [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "'longrope' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.low_freq_factor is missing"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"hidden_size": None}, "hidden_size is null: it must be a whole number, at least 1"),
    ({"num_attention_heads": 3}, "3 query heads cannot be shared evenly among 2"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 3, "layer_types": ["chunked"] * 2},
     r'layer_types\[0\] is "chunked": it must be one of'),
    ({"per_layer_config": {"0": {"hidden_size": 3}}}, "has 'hidden_size'"),
])  # fmt: skip
def test_configs_that_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**HUB, **extra})


def test_stale_buffers_are_ignored_and_other_tensors_are_not(tmp_path):
    stale = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(L)}
    _, v, _ = load_hf(write(tmp_path / "a", {**tensors(), **stale}))
    equal(v, load_hf(write(tmp_path / "b"))[1])
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight", "score.weight"):
        folder = write(tmp_path / "c", {**tensors(), name: np.ones(3, np.float32)})
        with pytest.raises(ValueError, match=f"has the tensor '{name}'"):
            load_hf(folder)
    flat = tensors()
    del flat["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"has no tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_hf(write(tmp_path / "d", flat))
    flat = tensors()
    flat["model.layers.1.mlp.up_proj.weight"] = np.ones((F, D + 1), np.float32)
    with pytest.raises(ValueError, match=r"up_proj.weight' has shape \(48, 33\); by its config.json it has \(48, 32\)"):
        load_hf(write(tmp_path / "e", flat))
    flat = {**tensors(), "model.norm.weight": np.ones(D, np.int8)}
    with pytest.raises(ValueError, match=r"'model.norm.weight' has dtype I8.*dequantise"):
        load_hf(write(tmp_path / "f", flat))


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path):
    flat = tensors()
    tied = {**HUB, "tie_word_embeddings": True}
    flat["lm_head.weight"] = flat["model.embed_tokens.weight"]
    config, v, _ = load_hf(write(tmp_path / "a", flat, tied))
    assert config.tied and "lm_head" not in v["params"]
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        load_hf(write(tmp_path / "b", tensors(), tied))


def test_damaged_folders(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*config.json"):
        load_hf(tmp_path)
    folder = write(tmp_path / "m", shards=2)
    (first, second) = sorted(folder.glob("model-*.safetensors"))
    whole = second.read_bytes()
    for cut in (4, 100, len(whole) - 8):
        second.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{second.name} is truncated"):
            load_hf(folder)
    second.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_hf(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf"{second.name} and .*{first.name} both have a tensor"):
        load_hf(folder)
    save_file({"another": np.ones(1, np.float32)}, second)
    with pytest.raises(ValueError, match=r"has no tensor .*which model.safetensors.index.json says it has"):
        load_hf(folder)
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name} is missing"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        load_hf(folder)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(HUB))
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        load_hf(bare)


# -- writing: what was saved comes back ----------------------------------------------------------------------------------


def uneven(dtype="float32", **rest):
    """Layers of different widths in all respects."""
    return LlamaConfig(50, 32, (16, 48, 24), (4, 2, 6), (2, 2, 3), 8, max_positions=64, dtype=dtype, **rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_there_and_back(tmp_path, family, dtype):
    c = dataclasses.replace(tiny(family), dtype=dtype, max_positions=64)
    v = weights(c)
    save_hf(v, c, tmp_path / "m")
    again, w, metadata = load_hf(tmp_path / "m")
    assert again == c
    equal(w, v)
    assert metadata["record"]["mode"] == "uniform"
    assert metadata["hf_config"]["head_dim"] == c.head_dim


@pytest.mark.parametrize("mode", ["padded", "hetero"])
@pytest.mark.parametrize("rest", [
    {}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}, {"family": "mistral", "windows": (4, 4, 4)},
    {"family": "qwen2", "qkv_bias": True, "windows": (None, 3, 3), "dtype": "bfloat16"},
    {"family": "qwen3", "qk_norm": True, "tied": True},
], ids=["llama", "biased", "mistral", "qwen2", "qwen3"])  # fmt: skip
def test_layers_that_differ_there_and_back(tmp_path, mode, rest):
    c = uneven(**rest)
    v = weights(c)
    save_hf(v, c, tmp_path / "m", mode=mode)
    again, w, metadata = load_hf(tmp_path / "m")
    assert again == c
    equal(w, v)
    if mode == "padded":
        big, padded, _ = load_hf(tmp_path / "m", keep_padding=True)
        assert big.uniform and big.ffn == (128,) * 3
        ids, mask = prompt()
        real = np.asarray(mask, bool)
        got, want = (jax.jit(Llama(k).apply)(p, ids, mask)[real] for k, p in ((big, padded), (c, v)))
        np.testing.assert_allclose(got, want, atol=2e-5 if c.dtype == "float32" else 0.1)
    else:
        assert metadata["hf_config"]["model_type"] == c.family
        assert metadata["hf_config"]["per_layer_config"]["1"] == {
            "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
        (tmp_path / "m" / "jprune.json").unlink()  # the config alone says the widths too
        alone, w, _ = load_hf(tmp_path / "m")
        assert alone == c
        equal(w, v)


def test_where_the_padding_is():
    """The queries of key-value head g stay behind it: zeros fill up every group, then come whole groups."""
    c = uneven()
    big = padded_config(c, 32)
    assert (big.ffn[0], big.q_heads[0], big.kv_heads[0]) == (64, 8, 4)  # 3 groups of 2 do not divide a stream of 32
    from jprune.checkpoint.hf_export import pad_layer

    q = np.arange(1, 3)[:, None, None] * np.ones((2, 8, 32))  # layer 1: one query head for each of 2 key-value heads
    padded = pad_layer("q", q.reshape(16, 32), c, big, 1).reshape(8, 8, 32)
    assert padded[:, 0, 0].tolist() == [1, 0, 2, 0, 0, 0, 0, 0]
    o = pad_layer("o", q.reshape(16, 32).T, c, big, 1).reshape(32, 8, 8)
    assert o[0, :, 0].tolist() == [1, 0, 2, 0, 0, 0, 0, 0]
    k = pad_layer("k", q.reshape(16, 32), c, big, 1).reshape(4, 8, 32)
    assert k[:, 0, 0].tolist() == [1, 2, 0, 0]
    assert pad_layer("o_bias", np.ones(32), c, big, 1).shape == (32,)
    assert pad_layer("gate_bias", np.ones(48), c, big, 1).tolist() == [1.0] * 48 + [0.0] * 16
    for family in ("mistral", "qwen2"):
        own = dataclasses.replace(c, family=family)
        assert padded_config(own).q_heads[0] == 6  # nothing to divide there


@settings(max_examples=12)
@given(st.data())
def test_any_widths_survive_every_mode(tmp_path_factory, data):
    group = [data.draw(st.integers(1, 3)) for _ in range(2)]
    kv = [data.draw(st.integers(1, 3)) for _ in range(2)]
    value = data.draw(st.sampled_from([None, (4, 2)]))
    c = LlamaConfig(11, 12, tuple(data.draw(st.integers(1, 9)) for _ in range(2)),
                    tuple(g * k for g, k in zip(group, kv)), tuple(kv), 4, value_dim=value)  # fmt: skip
    v = weights(c)
    mode = data.draw(st.sampled_from(["padded", "hetero"])) if value is None else "padded"
    folder = tmp_path_factory.mktemp("any") / "m"
    shard = data.draw(st.sampled_from([10**9, 700, 1]))
    save_hf(v, c, folder, mode=mode, multiple_of=data.draw(st.integers(1, 8)), shard_bytes=shard)
    again, w, _ = load_hf(folder)
    assert again == dataclasses.replace(c, max_positions=again.max_positions)
    equal(w, v)


def test_shards(tmp_path):
    c = tiny("llama", max_positions=64)
    v = weights(c)
    save_hf(v, c, tmp_path / "m", shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(x.nbytes for x in load_file(tmp_path / "m" / f).values()) <= 20_000 for f in files)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(v))
    equal(load_hf(tmp_path / "m")[1], v)


def test_heads_that_do_not_divide_the_stream_leave_as_a_mistral(tmp_path):
    c = llama_config(50, 32, 48, 2, 3, 1, head_dim=8, max_positions=64, rope=LLAMA3)
    v = weights(c)
    save_hf(v, c, tmp_path / "m")
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (hf["model_type"], hf["architectures"], hf["sliding_window"]) == ("mistral", ["MistralForCausalLM"], None)
    again, w, _ = load_hf(tmp_path / "m")
    assert again == c
    equal(w, v)
    biased = dataclasses.replace(c, qkv_bias=True, o_bias=True)
    with pytest.raises(
        ValueError, match="llama needs a number of heads that divides 32; mistral has no attention biases"
    ):
        save_hf(weights(biased), biased, tmp_path / "n")
    save_hf(weights(biased), biased, tmp_path / "n", mode="padded")
    equal(load_hf(tmp_path / "n")[1], weights(biased))


def test_other_keys_tokenizer_and_the_record(tmp_path):
    source = write(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "secret.bin").write_text("not to be copied")
    dense, v, metadata = load_hf(source)
    kept = Kept.of(dense, ffn=[range(12), range(24)], kv_heads=[(0,), (0, 1)])
    small, config = slice_kept(v, LINEN, kept, dense), kept.config(dense)
    record = PruningRecord("magnitude", 3, "128 windows of 1024", 0.5, "someone/model", dense, kept)
    save_hf(small, config, tmp_path / "m", mode="hetero", record=record, hf_config=metadata["hf_config"],
            tokenizer_from=source)  # fmt: skip
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "jprune.json", "model.safetensors", "modeling_jprune.py", "tokenizer.json"}
    again, w, metadata = load_hf(tmp_path / "m")
    assert again == config and metadata["hf_config"]["eos_token_id"] == 2
    equal(w, small)
    said = metadata["record"]
    assert (said["method"], said["seed"], said["source"], said["target"]) == ("magnitude", 3, "someone/model", 0.5)
    assert Kept.from_json(said["kept"], dense) == kept
    assert said["removed"]["ffn_channels"] == 1 - 36 / 96 and said["removed"]["key_value_heads"] == 0.25
    with pytest.raises(ValueError, match="kept indices do not give the widths"):
        save_hf(v, dense, tmp_path / "n", record=record)
    with pytest.raises(ValueError, match="needs the dense model's config"):
        save_hf(v, dense, tmp_path / "n", record=PruningRecord(kept=kept))
    assert not (tmp_path / "n").exists()


def test_block_configs_where_only_the_mlps_differ(tmp_path):
    c = LlamaConfig(50, 32, (16, 48), (4, 4), (2, 2), 8, max_positions=64)
    save_hf(weights(c), c, tmp_path / "m", mode="hetero")
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [b["ffn"]["intermediate_size"] for b in hf["block_configs"]] == [16, 48]
    assert {b["attention"]["n_heads_in_group"] for b in hf["block_configs"]} == {2}
    save_hf(weights(uneven()), uneven(), tmp_path / "n", mode="hetero")
    assert "block_configs" not in json.loads((tmp_path / "n" / "config.json").read_text())
    compile((tmp_path / "m" / "modeling_jprune.py").read_text(), "code", "exec")


def test_a_pruned_stream_and_value_channels(tmp_path):
    """What a trace can prune and other programs cannot say is folded, padded, or refused with the remedy."""
    module = Llama(tiny("llama", max_positions=64))
    v = weights(module.config)
    ids, _ = prompt()
    graph = jprune.trace(module.apply, v, ids)
    (stream,) = [g for g, i in graph.groups.items() if i.size == 32]
    value = [g for g in graph.groups if "/v/" in g]
    assert len(value) == 3
    keep = {stream: np.arange(32) % 4 > 0, **{g: np.arange(8) < 5 for g in value}}
    small = graph.compact(v, keep)
    config = rebuild(module, small).config
    want = jax.jit(graph.replay(keep))(small, ids)
    with pytest.raises(ValueError, match="fold_norm_width"):
        save_hf(small, config, tmp_path / "m")
    config, small = fold_norm_width(small, config)
    for mode in ("uniform", "hetero"):
        with pytest.raises(ValueError, match="mode='padded'"):
            save_hf(small, config, tmp_path / "m", mode=mode)
    save_hf(small, config, tmp_path / "m", mode="padded")
    again, w, _ = load_hf(tmp_path / "m")
    assert again == config
    equal(w, small)
    big, padded, _ = load_hf(tmp_path / "m", keep_padding=True)
    assert big.value_dim is None
    np.testing.assert_allclose(jax.jit(Llama(big).apply)(padded, ids), want, atol=1e-4)


def test_padding_that_was_trained_is_not_thrown_away(tmp_path):
    c = uneven()
    save_hf(weights(c), c, tmp_path / "m", mode="padded")
    file = tmp_path / "m" / "model.safetensors"
    flat = load_file(file)
    flat["model.layers.2.mlp.up_proj.weight"][100, 3] = 0.1
    save_file(flat, file)
    with pytest.raises(ValueError, match=r"padding of 'up' in layer 2 is not zero.*keep_padding=True"):
        load_hf(tmp_path / "m")
    _, w, _ = load_hf(tmp_path / "m", keep_padding=True)
    assert float(w["params"]["layer2"]["mlp"]["up"]["kernel"][3, 100]) == np.float32(0.1)


def test_scanned_trees_are_saved_and_read(tmp_path):
    c = tiny("qwen2", max_positions=64)
    v = weights(c, scanned=True)
    save_hf(v, c, tmp_path / "m")
    equal(load_hf(tmp_path / "m", scanned=True)[1], v)
    save_hf(weights(uneven()), uneven(), tmp_path / "n", mode="hetero")
    with pytest.raises(ValueError, match="scanned=False"):
        load_hf(tmp_path / "n", scanned=True)


def test_what_save_refuses_and_what_then_is_left(tmp_path):
    c = uneven()
    v = weights(c)
    with pytest.raises(ValueError, match="choose mode='padded'"):
        save_hf(v, c, tmp_path / "m")
    with pytest.raises(ValueError, match="choose mode='padded'"):
        save_hf(v, c, tmp_path / "m", mode="uniform")
    with pytest.raises(ValueError, match="mode must be one of uniform, padded, hetero"):
        save_hf(v, c, tmp_path / "m", mode="pickle")
    with pytest.raises(ValueError, match="has shape"):
        save_hf(v, dataclasses.replace(c, ffn=(16, 48, 25)), tmp_path / "m", mode="hetero")
    assert not list(tmp_path.iterdir())
    save_hf(v, c, tmp_path / "m", mode="hetero")
    with pytest.raises(ValueError, match="exists"):
        save_hf(v, c, tmp_path / "m", mode="padded")
    broken = jax.tree.map(lambda x: x, v)
    broken["params"]["layer2"]["mlp"]["down"]["kernel"] = jax.ShapeDtypeStruct((24, 32), jnp.float32)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        save_hf(broken, c, tmp_path / "m", mode="hetero", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    equal(load_hf(tmp_path / "m")[1], v)
    save_hf(v, c, tmp_path / "m", mode="padded", overwrite=True)
    assert load_hf(tmp_path / "m")[2]["record"]["mode"] == "padded"
    newer = json.loads((tmp_path / "m" / "jprune.json").read_text()) | {"format": "jprune-hf/9"}
    (tmp_path / "m" / "jprune.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="update jprune"):
        load_hf(tmp_path / "m")


def test_text_needs_the_tokenizers_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


# -- how much is gone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_tree(family):
    c = dataclasses.replace(tiny(family), ffn=(16, 48, 24))
    v = weights(c)
    found = count(c)
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(v))
    linear = [x.size for p, x in flatten(v) if p.endswith("kernel") and "layer" in p]
    assert found["block_linear_weights"] == sum(linear) and found["ffn_channels"] == 88


@pytest.mark.parametrize(("sizes", "share"), [
    ((32000, 4096, 11008, 32, 32), 0.642), ((32000, 5120, 13824, 40, 40), 0.653),
    ((128256, 4096, 14336, 32, 32, 8), 0.702), ((128256, 8192, 28672, 80, 64, 8), 0.799),
])  # fmt: skip
def test_shares_of_the_mlps(sizes, share):
    """Known sizes: half the channels are only 32 to 40 % of these models."""
    c = llama_config(*sizes)
    half = dataclasses.replace(c, ffn=tuple(n // 2 for n in c.ffn))
    gone = removed(c, half)
    assert gone["ffn_channels"] == 0.5 and gone["query_heads"] == 0
    assert abs(2 * gone["parameters"] - share) < 5e-4


# -- our own format ------------------------------------------------------------------------------------------------------


def test_orbax_folders_hold_decoders_too(tmp_path):
    c = dataclasses.replace(uneven(), dtype="bfloat16")
    v = weights(c)
    checkpoint.save(tmp_path / "m", v, {"config": dataclasses.asdict(c)})
    w, metadata = checkpoint.load(tmp_path / "m")
    equal(w, v)
    said = metadata["config"]
    assert said["ffn"] == [16, 48, 24]
