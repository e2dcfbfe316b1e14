"""A question about a picture: answers, kept tokens and counts are those of the functions; mistakes are said."""

import json

import jax
import numpy as np
import pytest
from llava_folders import Words, write
from PIL import Image

from jprune.checkpoint import llava as folders
from jprune.jobs.llava import ChatConfig, chat, rows
from jprune.methods.tokens import reducers_by_name as methods
from jprune.methods.tokens.decoder_cost import true_macs
from jprune.methods.tokens.divprune import divprune_select
from jprune.methods.tokens.llava_answer import ABOUT, METHODS, VisualPruning, answer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The small model's folder and a picture; the tokenizers package need not be there."""
    write(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(folders, "load_tokenizer", lambda folder: Words(True))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(tmp_path / "cat.png")
    return tmp_path


def options(place, **more):
    return ChatConfig(str(place / "model"), str(place / "cat.png"), "what is it?", **{"steps": 3, "count": 4, **more})


def test_an_answer(place):
    said = chat(options(place), place / "out", rounds=1)
    assert said == json.loads((place / "out" / "answer.json").read_text())
    module, variables, processor = folders.load_llava(place / "model")
    ids, mask = processor.prompts(["what is it?"])
    with Image.open(place / "cat.png") as picture:
        images = processor.images([[picture]])
    for name, pruning in (("all", None), ("reduced", VisualPruning(4))):
        made = np.asarray(answer(module, variables, ids, images, 3, mask, pruning=pruning))[0]
        assert said["answers"][name] == " ".join(f"w{i}" for i in made)

    @jax.jit
    def project(x):
        return module.apply(variables, module.apply(variables, x, method="features"), method="project")

    visual = project(images)
    assert said["kept_tokens"] == sorted(np.asarray(divprune_select(visual[0, 0], 4).order).tolist())
    text = ids.shape[1] - 9
    language = module.config.language
    assert said["tmacs"]["reduced"] == true_macs(language, text, 9, 4) / 1e12 < said["tmacs"]["all"]
    assert (place / "out" / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert [r[1:3] for r in rows(said)[1:2]] == [("9", "4")]
    assert set(ABOUT) == set(METHODS) and set(methods.ABOUT) == set(methods.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, place):
    inside = name in ("fastv", "vtw")
    jax.clear_caches()
    said = chat(options(place, tokens=name, layer=int(inside)), place / "out", rounds=1)
    added = name == "visionzip"  # the class token is one of its four and no patch
    assert len(set(said["kept_tokens"])) == (said["kept"] - added) < said["visual_tokens"]
    assert (place / "out" / "kept.png").exists()
    assert said["kept"] == (0 if name == "vtw" else 4)


def test_mistakes(place):
    (place / "note.txt").write_text("no picture")
    for changes, message in (
        ({"count": 10}, "count is 10: a picture has 9 visual tokens"),
        ({"tokens": "fastv"}, "give layer, at least 1"),
        ({"tokens": "dvprune"}, "method must be one of"),
        ({"image": str(place / "note.txt")}, "cannot decode"),
    ):
        with pytest.raises(ValueError, match=message):
            chat(ChatConfig(**{**vars(options(place)), **changes}), place / "o")
    with pytest.raises(ValueError, match=r"holds no answer\.json"):
        chat(options(place), place / "model")
    (place / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer"):
        chat(options(place), place / "o")
