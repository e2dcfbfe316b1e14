"""The programs for large models, on small ones in the same formats."""

import json

import jax
import numpy as np
import pytest
from llava_folders import Words, write
from PIL import Image

from experiments import llava_answers, token_imagenet
from jprune.checkpoint import llava as folders
from jprune.methods.tokens.cost import deit, uniform_dims
from jprune.methods.tokens.zero_tprune import PRESETS


def test_published_schedules_are_run_on_their_deit():
    names = list(token_imagenet.reducers("small", (0.65,), ("tome",), deit("small")))
    assert names == ["all tokens", *(n for n, (of, _) in PRESETS.items() if of == "small"), "tome 0.65"]
    assert list(token_imagenet.reducers(None, (), (), uniform_dims(48, 3, 3, 16))) == ["all tokens"]
    assert set(token_imagenet.PUBLISHED) <= set(PRESETS)


def test_answers_are_compared_word_for_word():
    assert llava_answers.plain(" The  Cat, a dog. ") == "cat dog"
    assert llava_answers.scores(["a Cat", "dog"], ["cat.", "cow"]) == {"exact": 0.5}
    found = llava_answers.scores(["Yes.", "no", "yes, it is", "no"], ["yes", "yes", "no", "no"])
    assert found == {"exact": 0.5, "f1": pytest.approx(0.5)}


@pytest.mark.slow
def test_questions_of_a_small_model(tmp_path, monkeypatch):
    write(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(folders, "load_tokenizer", lambda folder: Words(True))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    entry = {"image": "a.png", "question": "is it a cat?", "answer": "yes"}
    (tmp_path / "q.jsonl").write_text(json.dumps(entry) + "\n")
    jax.clear_caches()
    arguments = (str(tmp_path / "model"), tmp_path / "q.jsonl", tmp_path)
    llava_answers.main(*arguments, ratio=0.5, steps=2, suffix="", out=tmp_path / "o.json")
    rows = json.loads((tmp_path / "o.json").read_text())["results"]["methods"]
    assert rows["all"]["kept"] == 9 and rows["divprune"]["kept"] == 4 and rows["fastv, as many"]["kept"] == 4
    assert rows["divprune"]["paper_tmacs"] < rows["fastv, as many"]["paper_tmacs"] < rows["all"]["paper_tmacs"]
    assert all(0 <= r["exact"] <= 1 and 0 <= r["f1"] <= 1 for r in rows.values())
    (tmp_path / "q.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match="line 1 of"):
        llava_answers.main(*arguments)
