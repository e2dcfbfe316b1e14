"""Every layout of LLaVA-1.5's files gives the same model; pictures and questions are prepared as each kind wants them."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from llava_folders import CONTAINERS, TEXT, Words, write
from PIL import Image
from small_llava import IMAGE, VOCAB, config, model

from jprune.checkpoint.llava import PROMPTS, LlavaProcessor, load_llava, pad_to_square
from jprune.data.images import Preprocess


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_the_same_model(tmp_path, container):
    more = write(tmp_path / "m", container)
    module, variables, processor = load_llava(tmp_path / "m", **more)
    placeholder = VOCAB if container == "authors" else IMAGE  # the authors' vocabulary has none
    assert module.config == dataclasses.replace(config(), image_token=placeholder)
    jax.tree.map(np.testing.assert_array_equal, variables, model()[1])
    assert processor.pad == (container == "authors")
    assert processor.template == PROMPTS["original" if container == "authors" else "hf"]
    assert processor.tokenizer is None


def test_dtypes(tmp_path):
    write(tmp_path / "m", dtype=ml_dtypes.bfloat16)
    kept = load_llava(tmp_path / "m")
    assert {x.dtype.name for x in jax.tree.leaves(kept.variables)} == {"bfloat16"}
    cast = load_llava(tmp_path / "m", dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(cast.variables)} == {"float32"}
    assert cast.module.config.language.dtype == "float32"


def test_what_is_refused(tmp_path):
    head, first = "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"
    odd = {"audio_tower.weight": np.zeros(1, np.float32)}
    cases = {
        "next": ({"hf": {"model_type": "llava_next"}}, "only LLaVA-1.5 is read"),
        "newline": ({"more": {"image_newline": np.zeros(16, np.float32)}}, "LLaVA-1.6"),
        "odd": ({"more": odd}, "audio_tower.weight.*belongs to no part"),
        "half": ({"without": [first]}, "lacks linear_1.weight"),
        "relu": ({"hf": {"projector_hidden_act": "relu"}}, "projector_hidden_act 'relu'"),
        "layers": ({"hf": {"vision_feature_layer": [-2, -5]}}, "one layer"),
        "norm": ({"without": ["language_model.model.norm.weight"]}, "no tensor 'model.norm.weight'"),
        "untied": ({"without": [head], "hf": {"text_config": {**TEXT, "tie_word_embeddings": False}}}, "lm_head"),
    }
    for name, (how, said) in cases.items():
        write(tmp_path / name, **how)
        with pytest.raises(ValueError, match=said):
            load_llava(tmp_path / name)
    write(tmp_path / "blind", "authors")
    with pytest.raises(ValueError, match="download openai/clip and give its folder as vision"):
        load_llava(tmp_path / "blind")


def processor(placeholder=True, pad=False):
    return LlavaProcessor(config(), Preprocess(12, 12, interpolation="bicubic"), pad, PROMPTS["hf"], Words(placeholder))


def test_prompts_hold_a_placeholder_for_every_visual_token():
    for placeholder in (True, False):
        ids, mask = processor(placeholder).prompts(["what?", "what is it, then?"], images=2)
        assert (ids == IMAGE).sum(1).tolist() == [18, 18]
        assert (ids[0] != 0).tolist() == mask[0].tolist() and mask[1].all() and not mask[0].all()
        assert ids[1, 0] == 1 and (ids == 1).sum() == 2  # each text begins once
        where = np.flatnonzero(ids[1] == IMAGE)
        assert where[8] - where[0] == 8
    with pytest.raises(ValueError, match="leave it out"):
        processor().prompts(["<image>?"])
    with pytest.raises(ValueError, match="there is no tokenizer"):
        LlavaProcessor(config(), Preprocess(12, 12), False, PROMPTS["hf"]).prompts(["what?"])


def test_pictures():
    wide = Image.fromarray(np.full((6, 12, 3), 200, np.uint8))
    square = np.asarray(pad_to_square(wide, (1, 2, 3)))
    assert square.shape == (12, 12, 3) and (square[3:9] == 200).all()
    assert (square[:3] == [1, 2, 3]).all() and (square[9:] == [1, 2, 3]).all()
    padded = processor(pad=True).images([[wide], [wide]])
    assert padded.shape == (2, 1, 12, 12, 3)
    np.testing.assert_allclose(padded[0, 0, 0], 0, atol=0.02)  # the mean colour is 0 to the tower
    cut = processor().images([[wide, wide]])
    assert cut.shape == (1, 2, 12, 12, 3) and np.ptp(cut[0, 0], axis=(0, 1)).max() < 0.05
    with pytest.raises(ValueError, match="equally many"):
        processor().images([[wide], [wide, wide]])
