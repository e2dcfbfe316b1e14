"""Models with experts beside transformers: equal logits, cached decoding, and pruned folders that load there."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.peers import peer
from jprune.checkpoint import load_hf, save_hf
from jprune.jobs.decoder import DecoderConfig, DecoderRun
from jprune.methods.experts.for_decoders import ExpertConfig
from jprune.models.decoding import generate
from jprune.models.llama import Llama

pytestmark = pytest.mark.reference
KINDS = ("qwen3_moe", "qwen3_moe as it is, window", "mixtral", "mixtral, window")
IDS = np.random.default_rng(0).integers(0, 256, (2, 9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: (folder that transformers wrote, its model)}."""
    torch, hub = peer("torch"), peer("transformers")
    same = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_experts_per_tok": 2, "max_position_embeddings": 64}  # fmt: skip
    out = {}
    for kind in KINDS:
        torch.manual_seed(0)
        window = 4 if "window" in kind else None
        if kind.startswith("mixtral"):
            own = hub.MixtralForCausalLM(
                hub.MixtralConfig(intermediate_size=12, num_local_experts=8, sliding_window=window, **same)
            )
        else:
            own = hub.Qwen3MoeForCausalLM(hub.Qwen3MoeConfig(
                intermediate_size=48, moe_intermediate_size=12, head_dim=8, num_experts=8, norm_topk_prob=kind == "qwen3_moe",
                use_sliding_window=window is not None, sliding_window=window, **same))  # fmt: skip
        for p in own.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_")) / "m"
        own.save_pretrained(folder)
        out[kind] = folder, own.eval()
    return out


def logits_of(own):
    torch = peer("torch")
    with torch.no_grad():
        return own(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_decoding_are_those_of_transformers_there_and_back(folders, kind, tmp_path):
    folder, own = folders[kind]
    config, v, said = load_hf(folder)
    wanted = logits_of(own)
    np.testing.assert_allclose(jax.jit(Llama(config).apply)(v, IDS), wanted, atol=1e-4)
    config, stacked, _ = load_hf(folder, scanned=True)
    np.testing.assert_allclose(jax.jit(Llama(config, True).apply)(stacked, IDS), wanted, atol=1e-4)
    answer = own.generate(peer("torch").from_numpy(IDS), max_new_tokens=6, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(generate(Llama(config), v, IDS, 6), answer.numpy())
    save_hf(v, config, tmp_path / "back", hf_config=said["hf_config"])
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
    again = peer("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(logits_of(again), wanted)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_half_of_the_experts_go_and_the_folder_loads(folders, kind, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    options = DecoderConfig(str(folders[kind][0]), "reap", calibration=str(text), sequences=6, length=16, batch_size=2)
    summary = DecoderRun(options, tmp_path / "out", ExpertConfig(0.5), quiet=True)()
    assert summary["removed"]["experts"] == 0.5
    said = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert said["num_local_experts"] == 4 and said["num_experts_per_tok"] == 2
    config, v, _ = load_hf(tmp_path / "out" / "model")
    small = peer("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    np.testing.assert_allclose(jax.jit(functools.partial(Llama(config).apply, v))(IDS), logits_of(small), atol=1e-4)
    units = json.loads((tmp_path / "out" / "units.json").read_text())
    dense = load_hf(folders[kind][0])[1]["params"]
    for i, kept in enumerate(units.values()):
        np.testing.assert_array_equal(v["params"][f"layer{i}"]["experts"]["gate"],
                                      np.asarray(dense[f"layer{i}"]["experts"]["gate"])[kept])  # fmt: skip
    answer = small.generate(peer("torch").from_numpy(IDS), max_new_tokens=4, do_sample=False)
    assert answer.shape == (2, 13)
