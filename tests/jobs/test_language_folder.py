"""Perplexity and continuation of a language model's folder: numbers are those of the functions beneath, mistakes one line."""

import json
import sys

import jax
import numpy as np
import pytest

from jprune import cli
from jprune.checkpoint import load_hf, save_hf
from jprune.data.text import tokenize, windows
from jprune.jobs.generate import GenerateConfig, continue_prompt
from jprune.language.perplexity import perplexity
from jprune.models.decoding import generate
from jprune.models.llama import Llama, llama_config

CONFIG = llama_config(256, 16, 24, 2, 2)
PROMPT = "two times two is "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of bytes, and a text."""
    place = tmp_path_factory.mktemp("folder")
    v = jax.jit(Llama(CONFIG).init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    save_hf(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, v), CONFIG, place / "model")
    (place / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(60)))
    return place


@pytest.fixture
def said(monkeypatch, capsys):
    """(status, output, errors) of the command, in this process."""

    def of(*words):
        monkeypatch.setattr(sys, "argv", ["jprune", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return of


def test_eval_measures_a_folder_of_a_language_model(place, said):
    words = ("eval", "--model", place / "model", "--evaluation", place / "text.txt", "--length", 32, "--windows", 8)
    code, out, err = said(*words, "--out", place / "out")
    assert code == 0, err
    summary = json.loads((place / "out" / "summary.json").read_text())
    config, params, _ = load_hf(place / "model")
    text = windows(tokenize((place / "text.txt").read_text(), 256), 32, 8)
    assert summary["perplexity"] == pytest.approx(perplexity(Llama(config), params, text, 4), rel=1e-5)
    assert summary["params"] == sum(x.size for x in jax.tree.leaves(params)) and summary["windows"] == 8
    assert f"{summary['perplexity']:.3f}" in out and "report.html" in out
    assert f"{summary['perplexity']:.3f}" in (place / "out" / "report.html").read_text()


def test_generate_continues_as_the_function_does(place, said):
    found = continue_prompt(GenerateConfig(str(place / "model"), PROMPT, steps=6))
    config, params, _ = load_hf(place / "model")
    ids = tokenize(PROMPT, 256)[None]
    want = np.asarray(generate(Llama(config), params, ids, 6))[0, ids.shape[1] :]
    assert found["text"] == bytes(want.astype(np.uint8)).decode(errors="replace") and found["tokens"] == 6
    code, out, err = said("generate", "--model", place / "model", "--prompt", PROMPT, "--steps", 6)
    assert (code, out) == (0, found["text"] + "\n") and "6 tokens" in err
    drawn = {
        continue_prompt(GenerateConfig(str(place / "model"), PROMPT, steps=6, temperature=9.0, seed=s))["text"]
        for s in (1, 2)
    }
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "--model", "{model}"), "--evaluation is missing: give the text to measure on"),
        (("eval",), "--model is missing"),
        (("eval", "--model", "{model}", "--evaluation", "{text}", "--tokens", "tome"), "--tokens means nothing here"),
        (("eval", "--model", "{model}", "--evaluation", "{text}", "--length", "90000"), "windows of at most --length"),
        (("generate", "--model", "{model}"), "--prompt is missing"),
        (("generate", "--model", "{model}", "--prompt", "x", "--chat"), "has no chat template"),
    ],
)
def test_mistakes_are_one_line(words, message, place, said, tmp_path):
    filled = [w.format(model=place / "model", text=place / "text.txt") for w in words]
    code, out, err = said(*filled, *(("--out", tmp_path / "o", "--quiet") if words[0] == "eval" else ()))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()
