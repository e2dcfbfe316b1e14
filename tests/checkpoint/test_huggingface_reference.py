"""Beside transformers itself: equal logits and texts of every family, and our three forms loaded by its stock classes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import LLAMA3, weights

from experiments.peers import peer
from jprune.checkpoint import load_hf, load_tokenizer, save_hf
from jprune.models.decoding import generate, new_cache
from jprune.models.llama import Llama, LlamaConfig, llama_config, stack_layers

pytestmark = pytest.mark.reference
BASE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "factor": 8.0}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SCALING}, "head_dim": 16,
                         "tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                         "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biased": ("Qwen3", {"head_dim": 16, "attention_bias": True, "use_sliding_window": True,
                               "sliding_window": 3, "max_window_layers": 2}),
}  # fmt: skip
TOKENS = 11
IDS = np.random.default_rng(0).integers(3, 50, (2, TOKENS))
MASK = np.ones((2, TOKENS), np.int64)
MASK[1, :4] = 0


def theirs(model, ids=IDS, mask=MASK):
    """transformers' logits with positions that count real tokens."""
    torch = peer("torch")
    mask = torch.tensor(mask)
    with torch.no_grad():
        positions = torch.clamp(mask.cumsum(1) - 1, min=0)
        return model(torch.tensor(ids), attention_mask=mask, position_ids=positions).logits.float().numpy()


def their_text(model, steps=8):
    torch = peer("torch")
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor(IDS), attention_mask=torch.tensor(MASK), max_new_tokens=steps, do_sample=False, pad_token_id=0
    )
    return out.numpy()


def random_model(name, folder):
    """A stock model with weights that matter, saved to a folder."""
    tf, torch = peer("transformers"), peer("torch")
    kind, extra = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**{**BASE, **extra})
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_cache_and_text_are_those_of_transformers(tmp_path, name):
    model = random_model(name, tmp_path)
    config, v, _ = load_hf(tmp_path)
    real = MASK.astype(bool)
    want = theirs(model)
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
    text = their_text(model)
    for scanned in (False, True):
        module, tree = Llama(config, scanned), stack_layers(v) if scanned else v
        step = jax.jit(module.apply)
        np.testing.assert_allclose(step(tree, ids, mask)[real], want[real], atol=5e-4)
        cache, got = new_cache(module, 2, TOKENS + 2), []
        for lo, hi in [(0, 5), *((t, t + 1) for t in range(5, TOKENS))]:
            logits, cache = step(tree, ids[:, lo:hi], mask[:, lo:hi], cache)
            got.append(logits)
        np.testing.assert_allclose(np.concatenate(got, 1)[real], want[real], atol=5e-4)
        np.testing.assert_array_equal(generate(module, tree, ids, 8, mask=mask), text)
    assert np.abs(want).max() > 1


def test_the_older_dialect_and_shards(tmp_path):
    """The same folder with its config as the hub has it, and weights in many files."""
    model = random_model("llama3", tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    config, v, _ = load_hf(tmp_path)
    file = tmp_path / "config.json"
    hf = json.loads(file.read_text())
    rope = hf.pop("rope_parameters")
    hf |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": hf.pop("dtype")}
    file.write_text(json.dumps(hf))
    again, w, _ = load_hf(tmp_path)
    assert again == config and config.rope == LLAMA3
    jax.tree.map(np.testing.assert_array_equal, v, w)


# -- what we write, loaded by stock classes ------------------------------------------------------------------------------


def uneven(**rest):
    return LlamaConfig(50, 32, (16, 48, 24), (4, 2, 6), (2, 2, 3), 8, eps=1e-5, max_positions=64, **rest)


def check_stock(folder, config, v, kind, **options):
    """transformers loads the folder as `kind` without a word about weights and computes what we compute."""
    tf = peer("transformers")
    model, info = tf.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype="float32", **options
    )
    assert not any(info.values()), info
    assert type(model).__name__ == kind
    model = model.eval()
    module, ids, mask = Llama(config), jnp.asarray(IDS), jnp.asarray(MASK)
    real = MASK.astype(bool)
    want = jax.jit(module.apply)(v, ids, mask)
    np.testing.assert_allclose(theirs(model)[real], want[real], atol=5e-4)
    np.testing.assert_array_equal(their_text(model), generate(module, v, ids, 8, mask=mask))
    return model


UNIFORM = {
    "llama": (llama_config(50, 32, 24, 2, 4, 2, max_positions=64), "LlamaForCausalLM"),
    "llama3 bfloat16": (llama_config(50, 32, 24, 2, 2, 1, head_dim=16, rope=LLAMA3, tied=True, max_positions=64),
                        "LlamaForCausalLM"),
    "biased": (llama_config(50, 32, 24, 2, 4, 2, qkv_bias=True, o_bias=True, mlp_bias=True, max_positions=64),
               "LlamaForCausalLM"),
    "three heads": (llama_config(50, 32, 24, 2, 3, 1, head_dim=8, rope=LLAMA3, max_positions=64),
                    "MistralForCausalLM"),
    "mistral": (llama_config(50, 32, 24, 2, 6, 2, head_dim=8, window=4, family="mistral", max_positions=64),
                "MistralForCausalLM"),
    "qwen2": (llama_config(50, 32, 24, 3, 3, 3, head_dim=8, qkv_bias=True, family="qwen2",
                           max_positions=64), "Qwen2ForCausalLM"),
    "qwen2 windows": (dataclasses.replace(llama_config(50, 32, 24, 3, 6, 2, head_dim=8, qkv_bias=True, family="qwen2",
                      max_positions=64), windows=(None, 3, 3)), "Qwen2ForCausalLM"),
    "qwen3": (llama_config(50, 32, 24, 2, 3, 1, head_dim=16, qk_norm=True, tied=True, family="qwen3",
                           max_positions=64), "Qwen3ForCausalLM"),
    "qwen3 windows": (dataclasses.replace(llama_config(50, 32, 24, 3, 4, 2, qk_norm=True, family="qwen3",
                      max_positions=64), windows=(3, None, 3)), "Qwen3ForCausalLM"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_models_load_in_stock_transformers(tmp_path, name):
    config, kind = UNIFORM[name]
    v = weights(config)
    save_hf(v, config, tmp_path / "m", hf_config={"bos_token_id": 1, "eos_token_id": 2}, shard_bytes=30_000)
    check_stock(tmp_path / "m", config, v, kind)


DIFFERENT = {
    "llama": ({}, "Llama"),
    "llama3 tied": ({"rope": LLAMA3, "tied": True}, "Llama"),
    "biased": ({"qkv_bias": True, "o_bias": True, "mlp_bias": True}, "Llama"),
    "mistral": ({"family": "mistral", "windows": (4, 4, 4)}, "Mistral"),
    "qwen2": ({"family": "qwen2", "qkv_bias": True, "windows": (None, 3, 3)}, "Qwen2"),
    "qwen3": ({"family": "qwen3", "qk_norm": True, "tied": True}, "Qwen3"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_padded_models_load_in_stock_transformers(tmp_path, name):
    rest, kind = DIFFERENT[name]
    config = uneven(**rest)
    v = weights(config)
    save_hf(v, config, tmp_path / "m", mode="padded")
    check_stock(tmp_path / "m", config, v, f"{kind}ForCausalLM")


@pytest.mark.parametrize("name", DIFFERENT)
def test_hetero_models_load_with_the_code_beside_them(tmp_path, name):
    tf = peer("transformers")
    rest, kind = DIFFERENT[name]
    config = uneven(**rest)
    v = weights(config)
    folder = tmp_path / "m"
    save_hf(v, config, folder, mode="hetero")
    model = check_stock(folder, config, v, f"Jprune{kind}ForCausalLM", trust_remote_code=True)
    assert [layer.mlp.gate_proj.out_features for layer in model.model.layers] == [16, 48, 24]
    with pytest.raises(Exception, match="mismatch"):  # a stock loader does not half-load it
        tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    model.save_pretrained(tmp_path / "again")  # and what transformers writes of it, we read
    again, w, _ = load_hf(tmp_path / "again")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, v, w)


def test_bfloat16_is_bit_exact_through_transformers(tmp_path):
    tf, torch = peer("transformers"), peer("torch")
    config = uneven(dtype="bfloat16")
    v = weights(config)
    save_hf(v, config, tmp_path / "m", mode="padded")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    got = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()[:48]
    np.testing.assert_array_equal(got, np.asarray(v["params"]["layer1"]["mlp"]["up"]["kernel"], np.float32).T)


def test_a_tokenizer_travels_with_the_model(tmp_path):
    tokenizers = peer("tokenizers")
    source = tmp_path / "source"
    source.mkdir()
    words = {w: i for i, w in enumerate(["<unk>", "the", "cat", "sat", "on", "mat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    config = llama_config(50, 32, 24, 1, 4)
    save_hf(weights(config), config, tmp_path / "m", tokenizer_from=source)
    assert load_tokenizer(tmp_path / "m").encode("the cat sat on the mat").ids == [1, 2, 3, 4, 1, 5]
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        load_tokenizer(tmp_path)
