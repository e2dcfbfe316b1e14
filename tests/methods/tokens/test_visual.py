"""What is left of a prompt: against plain lists, for one and several images, anywhere in the row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.methods.tokens.divprune import divprune_select
from jprune.methods.tokens.prompt import kept_length, kept_source, prune_visual_tokens

M, K, TOKENS, D = 5, 3, 16, 4


def by_list(starts, chosen, order, joint):
    """One row: (source)."""
    none = M * (len(starts) if joint else 1)
    groups = []
    for g, row in enumerate(chosen):
        row = row if order == "selection" else sorted(row)
        images = starts if joint else [starts[g]]
        groups.append([images[i // M] + i % M if i < none else -1 for i in row])
    if joint:  # every kept token's place is where its image was; contents in the order asked for
        flat = groups[0]
        places = sorted(i for i in flat if i >= 0)
        out, told = [], iter(flat)
        for l in range(TOKENS):
            if not any(s <= l < s + M for s in starts) or l in places:
                out.append(next(told) if l in places else l)
            if l == starts[-1] + M - 1:
                out += [next(told) for _ in range(flat.count(-1))]
        return out
    out = []
    for l in range(TOKENS):
        if l in starts:
            out += groups[list(starts).index(l)]
        if not any(s <= l < s + M for s in starts):
            out.append(l)
    return out


@functools.cache
def compiled(order):
    return jax.jit(lambda start, chosen: kept_source(start, M, chosen, TOKENS, order))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(["raster", "selection"]), st.booleans(), st.integers(1, 2))
def test_places(seed, order, joint, images):
    rng = np.random.default_rng(seed)
    batch = 2
    slack = TOKENS - images * M
    start = np.stack([np.sort(rng.choice(slack + 1, images)) + M * np.arange(images) for _ in range(batch)])
    pool, groups = (images * M, 1) if joint else (M, images)
    chosen = np.stack([[rng.permutation(pool)[:K] for _ in range(groups)] for _ in range(batch)])
    cut = rng.integers(0, K + 1, chosen.shape[:2])  # so many are tokens, the rest of the places is empty
    if joint and order == "selection":
        cut[:] = K  # then empty places would be told among others' places
    chosen = np.where(np.arange(K) < cut[..., None], chosen, pool)
    got = compiled(order)(jnp.asarray(start), jnp.asarray(chosen))
    assert got.shape[1] == kept_length(TOKENS, images, M, K, "sample" if joint else "image")
    for b in range(batch):
        assert got[b].tolist() == by_list(start[b].tolist(), chosen[b].tolist(), order, joint)


def prompt(seed=0, batch=2):
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, TOKENS), bool)
    mask[1, :2] = False  # padded on the left
    return jnp.asarray(rng.normal(size=(batch, TOKENS, D)), jnp.float32), jnp.asarray(mask)


START = jnp.array([[1, 8], [4, 11]])


@pytest.mark.parametrize("order, positions", [("raster", "packed"), ("selection", "original")])
def test_every_image_of_every_row_by_itself(order, positions):
    x, mask = prompt()
    prune = jax.jit(lambda x, mask: prune_visual_tokens(x, START, M, K, mask, order=order, positions=positions))
    got = prune(x, mask)
    assert got.embeddings.shape == (2, TOKENS - 2 * (M - K), D)
    for b in range(2):
        chosen = [divprune_select(x[b, s : s + M], K).order.tolist() for s in START[b].tolist()]
        assert got.chosen[b].tolist() == chosen
        source = by_list(START[b].tolist(), chosen, order, joint=False)
        assert got.source[b].tolist() == source
        np.testing.assert_array_equal(got.embeddings[b], x[b, np.array(source)])
        np.testing.assert_array_equal(got.mask[b], mask[b, np.array(source)])
        old = np.maximum(np.cumsum(mask[b]) - 1, 0)
        new = np.maximum(np.cumsum(got.mask[b]) - 1, 0)
        np.testing.assert_array_equal(got.positions[b], old[np.array(source)] if positions == "original" else new)
    if order == "raster":
        assert (np.diff(got.source, axis=1) > 0).all()


def test_frames_of_a_video_together():
    x, mask = prompt()
    got = jax.jit(lambda x: prune_visual_tokens(x, START, M, 4, mask, scope="sample"))(x)
    for b in range(2):
        frames = jnp.concatenate([x[b, s : s + M] for s in START[b].tolist()])
        assert got.chosen[b, 0].tolist() == divprune_select(frames, 4).order.tolist()
        assert got.source[b].tolist() == by_list(START[b].tolist(), got.chosen[b].tolist(), "raster", True)
    assert got.embeddings.shape[1] == TOKENS - 2 * M + 4


def test_fewer_than_k_leave_masked_places():
    x, mask = prompt()
    mask = mask.at[0, 2:5].set(False)  # of the first image of the first row only two are tokens
    got = jax.jit(lambda x: prune_visual_tokens(x, START, M, K, mask, counts=jnp.array([[3, 1], [3, 3]])))(x)
    kept = got.source[0].tolist()
    assert [i in kept for i in range(1, 6)] == [True, False, False, False, True]
    assert kept.count(-1) == 1 + 2 and not got.mask[0, [kept.index(-1)]].any()
    empty = np.array(kept) < 0
    assert not got.mask[0, empty].any() and (got.embeddings[0, empty] == 0).all()
    real = np.asarray(got.mask[0])
    assert got.positions[0, real].tolist() == list(range(real.sum()))
    assert kept[0] == 0 and kept[3] == -1 and kept[-1] == TOKENS - 1


def test_another_selector():
    x, mask = prompt()
    got = jax.jit(lambda x: prune_visual_tokens(x, START, M, 2, mask, select=lambda x, k, v: jnp.arange(k)[::-1]))(x)
    assert got.source[0].tolist() == [0, 1, 2, 6, 7, 8, 9, 13, 14, 15]


def test_errors_name_what_is_allowed():
    x, mask = prompt()
    for more, said in (
        ({"order": "sorted"}, "raster, selection"),
        ({"positions": "new"}, "packed, original"),
        ({"scope": "batch"}, "image, sample"),
        ({"mask": mask[:, 1:]}, r"mask is \(2, 15\)"),
        ({"k": 6}, "1 to 5"),
        ({"k": 0}, "1 to 5"),
        ({"k": 11, "scope": "sample"}, "1 to 10"),
    ):
        with pytest.raises(ValueError, match=said):
            prune_visual_tokens(x, START, M, **{"k": 2, **more})
    with pytest.raises(ValueError, match="one for each, or one for all"):
        kept_source(START, M, jnp.zeros((2, 3, 1), jnp.int32), TOKENS)
