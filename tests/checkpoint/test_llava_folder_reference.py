"""Beside transformers' LLaVA with random weights: logits of whole and pruned prompts, answers, pictures, prompts' ids."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.peers import peer
from jprune.checkpoint import load_tokenizer
from jprune.checkpoint.llava import load_llava
from jprune.methods.tokens.llava_answer import VisualPruning, answer, read_prompt

pytestmark = pytest.mark.reference
IMAGE, SIDE, M = 45, 24, 9


@functools.cache
def theirs():
    tf, torch = peer("transformers"), peer("torch")
    vision = tf.CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                                 image_size=SIDE, patch_size=8)  # fmt: skip
    text = tf.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                          num_key_value_heads=2, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=M)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3 if p.ndim == 1 else 0.2)
    return model


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "m"
    theirs().save_pretrained(folder)
    return load_llava(folder)


@functools.cache
def prompt():
    rng = np.random.default_rng(0)
    rows = [
        np.concatenate([rng.integers(3, IMAGE, a), np.full(M, IMAGE), rng.integers(3, IMAGE, b)])
        for a, b in ((4, 6), (2, 3))
    ]
    tokens = max(map(len, rows))
    ids = np.stack([np.pad(r, (tokens - len(r), 0)) for r in rows])
    mask = np.stack([np.arange(tokens) >= tokens - len(r) for r in rows]).astype(np.int64)
    return ids, mask, rng.normal(size=(2, 1, SIDE, SIDE, 3)).astype(np.float32)


def pixels():
    return peer("torch").tensor(prompt()[2][:, 0].transpose(0, 3, 1, 2).copy())


def test_logits_of_whole_prompts(ours):
    torch = peer("torch")
    ids, mask, images = prompt()
    with torch.no_grad():
        positions = torch.clamp(torch.tensor(mask).cumsum(1) - 1, min=0)
        want = theirs()(input_ids=torch.tensor(ids), pixel_values=pixels(), attention_mask=torch.tensor(mask),
                        position_ids=positions).logits.numpy()  # fmt: skip
    got = jax.jit(ours.module.apply)(ours.variables, jnp.asarray(ids), jnp.asarray(images), jnp.asarray(mask))
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("positions", ["packed", "original"])
@pytest.mark.parametrize("order", ["raster", "selection"])
def test_logits_of_pruned_prompts(ours, positions, order):
    """Their decoder on their projected tokens, gathered by our choice."""
    torch = peer("torch")
    ids, mask, images = prompt()
    pruning = VisualPruning(4, order=order, positions=positions)
    read = functools.partial(read_prompt, ours.module, pruning=pruning)
    got = jax.jit(read)(ours.variables, jnp.asarray(ids), jnp.asarray(images), jnp.asarray(mask))
    source = np.asarray(got.prompt.source)
    with torch.no_grad():
        model = theirs()
        x = model.get_input_embeddings()(torch.tensor(ids))
        features = model.model.vision_tower(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = model.model.multi_modal_projector(features)
        x[torch.tensor(ids) == IMAGE] = projected.reshape(-1, projected.shape[-1])
        rows = torch.arange(2)[:, None]
        kept, real = x[rows, torch.tensor(source)], torch.tensor(np.take_along_axis(mask, source, 1))
        old = np.take_along_axis(np.maximum(mask.cumsum(1) - 1, 0), source, 1)
        places = torch.tensor(old) if positions == "original" else torch.clamp(real.cumsum(1) - 1, min=0)
        want = model.lm_head(
            model.model.language_model(inputs_embeds=kept, attention_mask=real, position_ids=places)[0]
        )
    np.testing.assert_allclose(got.logits, want[:, -1].numpy(), atol=1e-4)
    np.testing.assert_allclose(
        got.prompt.embeddings[np.asarray(real, bool)], kept.numpy()[np.asarray(real, bool)], atol=1e-5
    )


def test_answers(ours):
    torch = peer("torch")
    ids, mask, images = prompt()
    model = theirs()
    model.generation_config.eos_token_id = None
    want = model.generate(input_ids=torch.tensor(ids), pixel_values=pixels(), attention_mask=torch.tensor(mask),
                          max_new_tokens=6, do_sample=False, pad_token_id=0).numpy()[:, ids.shape[1] :]  # fmt: skip
    np.testing.assert_array_equal(answer(ours.module, ours.variables, ids, images, 6, mask), want)
    assert len(set(want.ravel().tolist())) > 2


def test_the_processor_prepares_what_theirs_does(ours, tmp_path):
    tf, torch, tokenizers = peer("transformers"), peer("torch"), peer("tokenizers")
    words = {
        w: i
        for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "USER", ":", "ASSISTANT", "what", "is", "this", "?"])
    }
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    plain.add_tokens([f"w{i}" for i in range(IMAGE - len(words))])
    plain.add_special_tokens(["<image>"])
    assert plain.token_to_id("<image>") == IMAGE
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", padding_side="left",
                                      extra_special_tokens={"image_token": "<image>"})  # fmt: skip
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    both = tf.LlavaProcessor(
        pictures, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    theirs().save_pretrained(tmp_path / "m")
    both.save_pretrained(tmp_path / "m")
    processor = load_llava(tmp_path / "m").processor
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (40, 61, 3), np.uint8))
    texts = [processor.template.format(question=q) for q in ("what is this?", "what?")]
    want = both(images=[wide, wide], text=texts, return_tensors="np", padding=True)
    ids, mask = processor.prompts(["what is this?", "what?"])
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"].astype(bool))
    got = processor.images([[wide], [wide]])[:, 0].transpose(0, 3, 1, 2)
    difference = np.abs(got - want["pixel_values"])
    assert difference.max() < 0.05, difference.max()  # one grey value is 0.015; their resizing may be torch's
    assert torch.is_tensor(pixels()) and load_tokenizer(tmp_path / "m").token_to_id("<image>") == IMAGE
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llava"
