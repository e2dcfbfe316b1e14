"""A language model's folder, pruned by the command: what is written is true, runs go on, mistakes are one line."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jprune.checkpoint import load_hf, save_hf
from jprune.language.perplexity import perplexity
from jprune.models.llama import Llama, llama_config
from jprune.pipeline.language import LanguageRun
from jprune.pipeline.language_methods import LANGUAGE_METHODS
from jprune.pipeline.language_options import LanguageOptions

CONFIG = llama_config(256, 32, 48, 3, 4, kv_heads=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of bytes and a text."""
    place = tmp_path_factory.mktemp("language")
    v = Llama(CONFIG).init(jax.random.key(0), np.zeros((1, 4), np.int32))
    save_hf(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, v), CONFIG, place / "dense")
    (place / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(900)))
    return place


def options(place, **more):
    return LanguageOptions(str(place / "dense"), **{"calibration": str(place / "text.txt"), "sequences": 6, "length": 24,
                           "batch_size": 2, **more})  # fmt: skip


def run(place, name, **more):
    return LanguageRun(options(place, **more), place / name, quiet=True)()


@pytest.fixture(scope="module")
def whole(place):
    return place / "whole", run(place, "whole", sparsity=0.25, recover=4, learning_rate=1e-2)


def test_the_folder_holds_everything_and_loads(whole, place):
    out, summary = whole
    assert {p.name for p in out.iterdir()} == {"model", "plan.json", "metrics.jsonl", "summary.json", "report.html",
                                               "options.json", "phases", "widths.png"}  # fmt: skip
    config, params, meta = load_hf(out / "model")
    assert list(config.ffn) == summary["widths"]["ffn"] and sum(config.ffn) == 0.75 * 3 * 48
    assert sum(x.size for x in jax.tree.leaves(params)) == summary["after"]["params"] < summary["before"]["params"]
    assert meta["record"]["method"] == "cfsp" and meta["record"]["target"] == 0.25
    texts = LanguageRun(options(place), place / "texts", quiet=True).texts
    assert perplexity(Llama(config), params, texts.evaluation, 2) == pytest.approx(
        summary["after"]["perplexity"], rel=1e-5
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["step"]) for r in lines] == [("recover", i + 1) for i in range(4)]
    page = (out / "report.html").read_text()
    assert f"{summary['after']['perplexity']:.3f}" in page and "25.0% of ffn channels" in page


def test_recovery_helps(whole):
    _, summary = whole
    assert summary["after"]["perplexity"] < 0.9 * summary["before"]["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["uniform", "padded"])
def test_forms(place, form):
    summary = run(place, form, form=form, scope="uniform" if form == "uniform" else "global", multiple_of=8)
    config, _, meta = load_hf(place / form / "model")
    assert summary["form"] == meta["record"]["mode"] == form
    assert (len(set(config.ffn)) == 1) == (form == "uniform") and all(f % 8 == 0 for f in config.ffn)


@pytest.mark.slow
def test_heads_and_channels_go_while_adapters_train(place):
    summary = run(place, "loraprune", method="loraprune", sparsity=0.5, recover=12)
    assert summary["widths"] == {"ffn": [24, 24, 48], "q_heads": [2, 2, 4], "kv_heads": [1, 1, 2]}
    config, params, _ = load_hf(place / "loraprune" / "model")
    assert config.kv_heads == (1, 1, 2) and np.isfinite(Llama(config).apply(params, np.ones((1, 5), np.int32))).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in LANGUAGE_METHODS if m not in ("cfsp", "loraprune")])
def test_every_method_removes_what_was_asked(place, method):
    summary = run(place, method, method=method, sparsity=0.5)
    assert summary["removed"]["block_linear_weights"] > 0.2
    assert summary["after"]["params"] < summary["before"]["params"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfsp", "loraprune"])
def test_an_interrupted_run_goes_on_with_the_same_bits(place, method, monkeypatch):
    asked = {"method": method, "recover": 24, "learning_rate": 1e-3}
    straight = run(place, f"straight {method}", **asked)
    draw = LanguageRun.batch_of_step

    def stopping(self, step):
        if step == 15:  # behind the checkpoint of step 10
            raise KeyboardInterrupt
        return draw(self, step)

    monkeypatch.setattr(LanguageRun, "batch_of_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(place, f"cut {method}", **asked)
    asked_steps = []
    monkeypatch.setattr(LanguageRun, "batch_of_step", lambda self, step: asked_steps.append(step) or draw(self, step))
    summary = LanguageRun(options(place, **asked), place / f"cut {method}", resume=True, quiet=True)()
    assert asked_steps == list(range(10, 24))
    assert summary["after"]["perplexity"] == straight["after"]["perplexity"]
    ways = [(place / f"{way} {method}" / "model" / "model.safetensors").read_bytes() for way in ("straight", "cut")]
    assert ways[0] == ways[1]


@pytest.mark.slow
def test_the_command(place, whole):
    """The same run by the command line: the same model, and a folder that is taken is not overwritten."""
    words = ["--model", place / "dense", "--calibration", place / "text.txt", "--sequences", 6, "--length", 24,
             "--batch-size", 2, "--sparsity", 0.25, "--recover", 4, "--learning-rate", 1e-2]  # fmt: skip

    def prune(*more):
        done = subprocess.run([sys.executable, "-m", "jprune.cli", "prune", *map(str, [*words, *more])],
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    status, out, err = prune("--out", place / "command")
    assert status == 0, err
    assert "perplexity" in out and "report.html" in out
    models = [(at / "model" / "model.safetensors").read_bytes() for at in (place / "command", whole[0])]
    assert models[0] == models[1]
    status, _, err = prune("--out", place / "command", "--epochs", 3)
    assert (status, err.count("\n")) == (2, 1) and "--epochs means nothing to a language model's folder" in err


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"calibration": None}, "calibration is None: it must be a text file"),
        ({"calibration": "/nowhere.txt"}, "no file or folder /nowhere.txt"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"method": "cspf"}, "did you mean cfsp"),
        ({"length": 5000}, "of 1.* tokens to calibrate with"),
        ({"method": "loraprune"}, "give --recover STEPS"),
        ({"method": "loraprune", "recover": 1}, "pruning step"),
        ({"method": "loraprune", "recover": 20, "scope": "uniform"}, "knows only global"),
        ({"form": "uniform"}, "needs layers of equal width"),
        ({"mesh": (1, 64)}, "needs 64 devices"),
        ({"mesh": (3, 1)}, "divides the batch"),
        ({"sparsity": 0.9, "multiple_of": 32}, "sparsity can be at most 0.33"),
        ({"sparsity": 0.99}, "sparsity can be at most 0.97"),
        ({"sparsity": 0.99, "method": "loraprune", "recover": 20}, "sparsity can be at most 0.5"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(place, more, what):
    with pytest.raises(ValueError, match=what):
        LanguageRun(options(place, **more), place / "never", quiet=True)
    assert not (place / "never").exists()
