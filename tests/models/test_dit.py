"""Video diffusion transformers: layouts of tokens, positions, the attention hook, and that pruned ones are models again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, lively, relative, same_numbers, subset

import jprune
from jprune.models import dit, rebuild
from jprune.models.dit import DiTBlock, DiTConfig, VideoDiT

VIDEO, WORDS = (2, 2, 4, 4, 1), 3


@functools.cache
def tiny(kinds=("double", "expert", "single"), text_first=False):
    """(module, variables, inputs); nothing is zero."""
    blocks = tuple(DiTBlock(k, 2, 6, 12, 8 if k == "double" else None) for k in kinds)
    module = VideoDiT(DiTConfig(12, (1, 2, 2), 1, 5, blocks, (1, 1, 1), text_first=text_first, frequencies=8))
    rng = np.random.default_rng(0)
    inputs = (jnp.asarray(rng.normal(size=VIDEO), jnp.float32), jnp.array([0.3, 0.9]),
              jnp.asarray(rng.normal(size=(2, WORDS, 5)), jnp.float32))  # fmt: skip
    return module, lively(jax.eval_shape(module.init, jax.random.key(0), *inputs)), inputs


def test_patches_are_tokens_and_back():
    video = jnp.arange(2 * 4 * 6 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 6, 4, 3)
    tokens = dit.patchify(video, (2, 3, 2))
    assert tokens.shape == (2, 2 * 2 * 2, 36)
    np.testing.assert_array_equal(tokens[1, 3], video[1, :2, 3:6, 2:4].reshape(-1))  # t 0, row 1, column 1
    np.testing.assert_array_equal(dit.unpatchify(tokens, (2, 2, 2), (2, 3, 2)), video)
    with pytest.raises(ValueError, match="do not divide"):
        dit.grid_of((4, 6, 5), (2, 3, 2))


def test_positions_turn_by_time_row_and_column():
    cos, sin = dit.rotary_table((2, 3, 4), (1, 2, 1), 16.0)
    angle = np.arctan2(sin, cos)
    at = (1 * 3 + 2) * 4 + 3  # frame 1, row 2, column 3
    np.testing.assert_allclose(angle[at], [1, 2, 2 / 4, 3], rtol=1e-5)
    with pytest.raises(ValueError, match="heads of 8"):
        DiTConfig(12, (1, 2, 2), 1, 5, (DiTBlock("double", 2, 8, 12),), (1, 1, 1))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("kind", ["double", "single", "expert"])
def test_the_hook_sees_joint_tokens_and_padding_does_not_count(kind, text_first):
    module, v, inputs = tiny((kind,), text_first)
    valid, seen = jnp.array([[True, True, False], [True, True, True]]), []

    def watched(layer, q, k, v, known, state):
        seen.append((layer, q.shape))
        return *dit.dense_attention(layer, q, k, v, known, state)[:1], (state + 1, known)

    run = jax.jit(module.apply, static_argnums=5)
    got, ((steps, known),) = run(v, *inputs, valid, watched, (jnp.zeros(()),))
    assert seen == [(0, (2, 2, 8 + WORDS, 6))] and steps == 1
    pads = np.flatnonzero(~np.asarray(known[0]))
    assert pads.tolist() == ([2] if text_first else [8 + 2])
    noise = inputs[2].at[0, 2].add(7.0)  # a padded word's content
    other = run(v, inputs[0], inputs[1], noise, valid)
    same_numbers(other, got, terms=200)  # sums of 12, 36 and 13 in attention and MLP of one block
    assert relative(run(v, inputs[0], inputs[1], noise), got) > 1e-3
    with pytest.raises(ValueError, match="0 attention states"):
        module.apply(v, *inputs, valid, watched, ())


def test_text_first_or_last_is_only_an_order():
    """Without positions of its own, text may stand on either side."""
    module, v, inputs = tiny()
    other = module.clone(config=tiny(text_first=True)[0].config)
    np.testing.assert_allclose(jax.jit(other.apply)(v, *inputs), jax.jit(module.apply)(v, *inputs), atol=1e-5)


def test_a_fresh_model_predicts_nothing_and_blocks_pass_through():
    module, _, inputs = tiny()
    assert not np.any(jax.jit(module.apply)(jax.jit(module.init)(jax.random.key(1), *inputs), *inputs))


def test_time_and_text_matter():
    module, v, (video, time, text) = tiny()
    base = jax.jit(module.apply)(v, video, time, text)
    assert relative(jax.jit(module.apply)(v, video, time + 0.05, text), base) > 1e-3
    assert relative(jax.jit(module.apply)(v, video, time, text + 0.1), base) > 1e-3


@pytest.mark.slow
def test_pruned_transformers_are_transformers_again():
    """Heads of text and video go together, their MLPs do not; all laws hold."""
    module, v, inputs = tiny()
    graph = jprune.trace(module.apply, v, *inputs)
    assert all(g.exact for g in graph.groups.values()) and not graph.unsupported
    # heads and value channels of three attentions; MLPs, one of text's own; stream and two widths of the time's embedding
    assert sorted(g.size for g in graph.groups.values()) == [2, 2, 2, 6, 6, 6, 8, *[12] * 6]
    check_laws(module.apply, v, inputs, graph=graph, gradients=False)
    keep = subset(graph, np.random.default_rng(0))
    small = graph.compact(v, keep)
    smaller = rebuild(module, small)
    assert relative(jax.jit(smaller.apply)(small, *inputs), jax.jit(graph.replay(keep))(small, *inputs)) < 1e-5


@pytest.mark.slow
def test_the_known_shapes_have_their_parameters():
    video = jax.ShapeDtypeStruct((1, 2, 4, 4, 16), jnp.float32)
    rest = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, 8, 4096), jnp.float32)
    for make, billions in ((dit.hunyuan_video, 12.5), (dit.cogvideox_5b, 5.57)):
        shapes = jax.eval_shape(make().init, jax.random.key(0), video, *rest)
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
        assert count / 1e9 == pytest.approx(billions, rel=0.01)
