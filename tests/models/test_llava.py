"""A prompt that lost visual tokens: equal to the whole prompt with these masked, and decoded as it is read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_llava import IMAGE, config, model, prompt

from jprune.methods.tokens import visual_selectors as selectors
from jprune.methods.tokens.divprune import divprune_select
from jprune.methods.tokens.llava_answer import VisualPruning, _answer, answer, read_prompt
from jprune.models.llava import check_prompt, image_places
from jprune.models.vit import ViT

M = 9


@functools.cache
def compiled():
    return jax.jit(model()[0].apply)


def run(method, *args):
    return model()[0].apply(model()[1], *args, method=method)


@functools.cache
def visual():
    """Projected tokens (batch, images, M, stream)."""
    return jax.jit(lambda pixels: run("project", run("features", pixels)))(prompt()[1])


@functools.cache
def read(pruning, room=0):
    ids, pixels, mask = prompt()
    module, v = model()
    return jax.jit(
        lambda p, m, v: read_prompt(module, v, ids, p, m, pruning=pruning, room=room, key=jax.random.key(3))
    )(pixels, mask, v)


def test_visual_tokens_stand_at_the_placeholders():
    ids, module = prompt()[0], model()[0]
    tower = ViT(module.config.vision)  # the output of the last block but one, without class token
    read = jax.jit(lambda p, v: tower.apply({"params": v}, p, -2, method="features").x)
    want = read(prompt()[1].reshape(4, 12, 12, 3), model()[1]["params"]["vision"])
    got = jax.jit(lambda p: run("features", p))(prompt()[1])
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)
    x = jax.jit(lambda v: run("embed", ids, v))(visual())
    table = model()[1]["params"]["language"]["embed"]["embedding"]
    for b in range(2):
        flat = iter(np.asarray(visual()[b]).reshape(-1, x.shape[-1]))
        for t, token in enumerate(ids[b].tolist()):
            np.testing.assert_array_equal(x[b, t], next(flat) if token == IMAGE else table[token])
    assert image_places(ids, IMAGE, 2, M)[0, :, 0].tolist() == [2, 12]


@pytest.mark.parametrize("positions", ["original", pytest.param("packed", marks=pytest.mark.slow)])
def test_gathered_is_masked(positions):
    """The whole prompt with the dropped tokens masked in every layer has the logits of the shorter prompt."""
    ids, pixels, mask = prompt()
    got = read(VisualPruning(3, positions=positions))
    source = got.prompt.source
    there = jnp.zeros(ids.shape, bool).at[jnp.arange(2)[:, None], source].set(True) & mask
    counted = mask if positions == "original" else there
    places = jnp.maximum(jnp.cumsum(counted, 1) - 1, 0)
    whole = compiled()(model()[1], ids, pixels, there, places)
    np.testing.assert_allclose(got.logits, whole[:, -1], atol=1e-4)
    for b in range(2):
        for i in range(2):
            np.testing.assert_array_equal(got.prompt.chosen[b, i], divprune_select(visual()[b, i], 3).order)
    assert got.prompt.embeddings.shape[1] == ids.shape[1] - 2 * (M - 3)
    assert np.abs(np.asarray(whole[:, -1])).max() > 1


def test_nothing_pruned_is_the_whole_model():
    ids, pixels, mask = prompt()
    whole = compiled()(model()[1], ids, pixels, mask, jnp.maximum(jnp.cumsum(mask, 1) - 1, 0))
    got = read(None)
    np.testing.assert_allclose(got.logits, whole[:, -1], atol=1e-5)
    np.testing.assert_array_equal(got.position, mask.sum(1))


@pytest.mark.slow
def test_methods_before_the_decoder():
    joint = read(VisualPruning(4, "cls_attention", scope="sample"))
    features, aux = jax.jit(lambda p: run("features_and_aux", p))(prompt()[1])
    np.testing.assert_allclose(features, run("features", prompt()[1]), atol=1e-5)
    seen = np.asarray(aux.cls_attention.sum(2)).reshape(2, -1)
    np.testing.assert_array_equal(joint.prompt.chosen[:, 0], np.argsort(-seen, axis=1)[:, :4])
    chance = read(VisualPruning(4, "random")).prompt.chosen.reshape(4, 4)
    assert len({tuple(sorted(row)) for row in chance.tolist()}) > 1  # every image draws for itself


@pytest.mark.slow
@pytest.mark.parametrize("method, added", [("visionzip", 0), ("prumerge", 1)])
def test_merged_tokens_are_read(method, added):
    got = read(VisualPruning(4, method))
    last = method != "visionzip"
    features, aux = jax.jit(lambda p: run("features_and_aux", p, last))(prompt()[1])
    one = jax.tree.map(lambda a: a[1, 0], (features, aux))
    want = run("project", getattr(selectors, method)(*one, 4).features)
    n = 4 + added
    start = int(image_places(prompt()[0], IMAGE, 2, M)[1, 0, 0])
    np.testing.assert_allclose(got.prompt.embeddings[1, start : start + n], want, atol=1e-5)
    assert got.prompt.embeddings.shape[1] == prompt()[0].shape[1] - 2 * (M - n)
    np.testing.assert_array_equal(got.prompt.positions[0], np.arange(got.prompt.positions.shape[1]))
    built = np.asarray(getattr(selectors, method)(*one, 4).index)
    np.testing.assert_array_equal(got.prompt.chosen[1, 0], np.where(built < 0, M, built))
    np.testing.assert_array_equal(got.prompt.source[1, start : start + n], np.where(built < 0, -1, start + built))
    assert (np.asarray(got.prompt.source[1, :start]) == np.arange(start)).all()


def test_answers_are_repeated_reading():
    """Every token of an answer is the likeliest behind the prompt and the tokens before."""
    ids, pixels, mask = prompt()
    module, v = model()
    steps, pruning = 4, VisualPruning(3, positions="original")
    got = answer(module, v, ids, pixels, steps, mask, pruning=pruning)
    compilations = _answer._cache_size()
    answer(module, v, ids, pixels + 1, steps, mask, pruning=pruning)
    assert _answer._cache_size() == compilations
    source = read(pruning).prompt.source
    there = jnp.zeros(ids.shape, bool).at[jnp.arange(2)[:, None], source].set(True) & mask
    n = steps - 1
    longer, seen, counted = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in (
        (ids, got[:, :n]), (there, jnp.ones((2, n))), (mask, jnp.ones((2, n)))))  # fmt: skip
    logits = compiled()(v, longer, pixels, seen, jnp.maximum(jnp.cumsum(counted, 1) - 1, 0))
    np.testing.assert_array_equal(got, jnp.argmax(logits[:, -steps:], -1))
    assert len(set(np.asarray(got).ravel().tolist())) > 2


@pytest.mark.parametrize("method, k", [("fastv", 5), ("divprune", 5), ("vtw", 0)])
def test_what_is_told_to_be_kept_behind_a_layer_is_what_goes_on(method, k):
    """The second layer's keys are those that the whole prompt has there at text and kept tokens, and at no others."""
    ids, _, mask = prompt()
    got, whole = read(VisualPruning(k, method, layer=1)), read(None)
    assert got.prompt.chosen.shape == (2, 1, k)
    start = np.asarray(image_places(ids, IMAGE, 2, M)[:, :, 0])
    every, left = np.asarray(whole.caches[0].k[1]), np.asarray(got.caches[1].k[0])
    for b in range(2):
        chosen = np.asarray(got.prompt.chosen[b, 0])
        assert len(set(chosen.tolist())) == k
        kept = start[b][chosen // M] + chosen % M
        places = sorted({*np.flatnonzero(np.asarray(ids[b]) != IMAGE).tolist(), *kept.tolist()})
        real = [i for i, place in enumerate(places) if mask[b, place]]
        np.testing.assert_allclose(left[b, real], every[b, [places[i] for i in real]], atol=1e-5)
        assert k == 0 or np.abs(left[b, real] - every[b, real]).max() > 1e-2


@pytest.mark.slow
def test_behind_a_layer_the_first_caches_stay_long():
    ids = prompt()[0]
    got = read(VisualPruning(3, "fastv", layer=1), 5)
    assert [c.k[0].shape[1] for c in got.caches] == [ids.shape[1] + 5, ids.shape[1] - 2 * M + 3 + 5]
    none = read(VisualPruning(0, "vtw", layer=1))
    assert none.caches[1].k[0].shape[1] == ids.shape[1] - 2 * M
    np.testing.assert_array_equal(none.position, prompt()[2].sum(1))
    assert np.abs(np.asarray(got.logits - none.logits)).max() > 1e-3


def test_prompts_that_do_not_fit_are_named():
    c, (ids, pixels, mask) = config(), prompt()
    for args, said in (
        ((ids, pixels[:, :1], mask), "prompt 0 has 18 placeholders 40; 1 images of 9"),
        ((ids, pixels[:, :, :8], mask), r"height and width \(12, 12\)"),
        ((ids[:, ::-1], pixels, mask), "not runs of 9 with text behind"),
        ((ids[:, :-3], pixels, None), "not runs of 9|has 18 placeholders|text behind"),
        ((ids, pixels, mask[:, ::-1]), "pad prompts on the left"),
        ((ids, pixels, mask[:, 1:]), "the mask is"),
    ):
        with pytest.raises(ValueError, match=said):
            check_prompt(c, *args)
    check_prompt(c, ids, pixels, mask)


def test_settings_that_make_no_sense_are_named():
    for build, said in (
        (lambda: VisualPruning(3, "dip"), "method must be one of divprune"),
        (lambda: VisualPruning(3, "fastv"), "give layer, at least 1"),
        (lambda: VisualPruning(3, "random", layer=2), "at layer 0"),
        (lambda: VisualPruning(0), "at least 1"),
        (lambda: VisualPruning(2, "vtw", layer=1), "vtw keeps 0"),
        (lambda: VisualPruning(3, "visionzip", positions="original"), "no old order"),
        (lambda: config(select="all"), "default, full"),
        (lambda: config(activation="relu"), "only gelu"),
        (lambda: read(VisualPruning(10)), "1 to 9"),
        (lambda: answer(*model(), *prompt()[:2], 0), "at least one token"),
        (lambda: answer(*model(), *prompt()[:2], 1, pruning=VisualPruning(3, "random")), "needs a key"),
    ):
        with pytest.raises(ValueError, match=said):
            build()
