"""The command on a folder that transformers wrote, with a tokenizer: what it leaves is loaded by transformers and speaks."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.peers import peer
from jprune.checkpoint import load_hf
from jprune.models.llama import Llama

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random Llama of transformers beside a tokenizer trained on a text."""
    torch, transformers, tokenizers = peer("torch"), peer("transformers"), peer("tokenizers")
    place = tmp_path_factory.mktemp("user")
    text = "".join(f"The square of {i} is {i * i}, and twice {i} is {2 * i}.\n" for i in range(1500))
    (place / "text.txt").write_text(text)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([text], vocab_size=300, show_progress=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place / "dense")
    made.save(str(place / "dense" / "tokenizer.json"))
    (place / "dense" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return place


@pytest.mark.parametrize(
    ("form", "more"),
    [("uniform", ["--scope", "uniform"]), ("padded", []), ("hetero", ["--method", "loraprune", "--recover", "12"])],
)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_three_forms_load_in_transformers_and_generate(place, form, more, monkeypatch):
    torch, transformers = peer("torch"), peer("transformers")
    words = ["--model", place / "dense", "--calibration", place / "text.txt", "--sparsity", 0.5, "--sequences", 8,
             "--length", 32, "--form", form, "--out", place / form, "--quiet", *more]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "jprune", "prune", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((place / form / "summary.json").read_text())
    assert summary["form"] == form and summary["removed"]["parameters"] > 0.1
    folder = place / form / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=form == "hetero").eval()
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))  # whether code may run
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if form == "hetero":
        with pytest.raises(Exception, match="mismatch"):  # never silently as a stock model
            transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The square of 12 is", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(ids).logits.numpy()
        written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert written.shape == (1, ids.shape[1] + 5) and tokenizer.decode(written[0])
    config, params, _ = load_hf(folder)
    np.testing.assert_allclose(Llama(config).apply(params, ids.numpy()), theirs, atol=5e-4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "weight-magnitude"])
def test_sparse_folders_load_and_are_two_of_four_along_the_inputs_of_every_matrix(place, method):
    torch, transformers = peer("torch"), peer("transformers")
    words = ["--model", place / "dense", "--calibration", place / "text.txt", "--method", method, "--pattern", "2:4",
             "--sequences", 8, "--length", 32, "--out", place / method, "--quiet"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "jprune", "prune", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(place / method / "model").eval()
    dense = dict(transformers.AutoModelForCausalLM.from_pretrained(place / "dense").named_parameters())
    pruned = 0
    for name, w in model.named_parameters():
        if "_proj" not in name:
            assert torch.equal(w, dense[name]), name
            continue
        stays = w.detach().numpy() != 0
        assert (stays.reshape(len(w), -1, 4).sum(-1) == 2).all(), name  # torch stores outputs first
        same = (w == dense[name]).numpy()[stays].all()
        assert same == (method != "sparsegpt"), name  # which moves what stays
        pruned += 1
    assert pruned == 3 * 7
    ids = np.random.default_rng(1).integers(0, 300, (2, 17))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    config, params, _ = load_hf(place / method / "model")
    np.testing.assert_allclose(Llama(config).apply(params, ids), theirs, atol=2e-4)
