"""Stored forms of sparse weights: back bit for bit, laid out as said, refused with the place that does not fit."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import normal

import jprune
from jprune.budget import choose
from jprune.surgery import packed
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.packed import bcoo, stored_bytes, to_dense, two_of_four, whole_blocks
from jprune.surgery.patterns import NM, Blocks, PatternError, apply, conventional

DTYPES = ("float32", "bfloat16", "float16")


def test_the_examples_run():
    assert doctest.testmod(packed).failed == 0


def bits(x):
    return np.asarray(x).tobytes(), np.shape(x), x.dtype


def same_bits(stored, params, masks):
    back, want = to_dense(stored), apply(params, masks)
    assert back.keys() == masks.keys() and [p for p in back if bits(back[p]) != bits(want[p])] == []


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([((3, 3, 4, 2), "bfloat16"), ((7, 2), "float16")]),
    st.integers(0, 2**32 - 1),
)
def test_every_form_comes_back_with_its_bits(leaf, seed):
    (shape, dtype), rng = leaf, np.random.default_rng(seed)
    w = rng.normal(size=shape)
    w[0], w[-1] = -0.0, np.inf
    params = {"w": jnp.asarray(w, dtype), "b": jnp.ones(3)}
    scores = {"w": jnp.asarray(rng.random(shape), jnp.float32)}
    groups = {"w": np.asarray(choose(scores, NM(2, 4, pad=True))["w"]) & (rng.random(shape) < 0.8)}  # some keep fewer
    loose, whole = choose(scores, "unstructured", 0.6), choose(scores, Blocks((2, 3)), 0.5)
    same_bits(bcoo(params, loose), params, loose)
    same_bits(two_of_four(params, groups, pad=True), params, groups)
    same_bits(whole_blocks(params, whole, (2, 3)), params, whole)


def test_two_of_four_as_a_loop_packs_it():
    w, mask = np.array(normal(0, 5, 12)), np.zeros((5, 12), bool)  # outputs first
    rng = np.random.default_rng(1)
    values, positions = np.zeros((5, 6), np.float32), np.zeros((5, 2), np.uint8)
    for o in range(5):
        for g in range(3):
            i, j = sorted(rng.choice(4, 2, replace=False).tolist())
            mask[o, 4 * g + i] = mask[o, 4 * g + j] = True
            values[o, 2 * g : 2 * g + 2] = w[o, 4 * g + i], w[o, 4 * g + j]
            positions[o, g // 2] |= (i + 4 * j) * 16 ** (g % 2)
    for leaf, own, views in ((w, mask, {"w": conventional((5, 12), 0, 1)}), (w.T, mask.T, None)):
        found = two_of_four({"w": jnp.asarray(leaf)}, {"w": own}, views)["w"]
        np.testing.assert_array_equal(found.values, values)
        np.testing.assert_array_equal(found.positions, positions)
        assert stored_bytes({"w": found}) == {"w": 5 * 6 * 4 + 5 * 2}


@pytest.mark.reference
def test_two_of_four_is_what_pytorch_hands_to_sparse_tensor_cores():
    import torch
    from torch.sparse._semi_structured_conversions import (
        _calculate_meta_reordering_scatter_offsets,
        sparse_semi_structured_from_dense_cutlass,
    )

    w = jnp.asarray(normal(0, 64, 64), jnp.float16)
    mask = choose({"w": jnp.abs(w).astype(jnp.float32)}, "2:4", views={"w": conventional((64, 64), 0, 1)})["w"]
    mask &= np.random.default_rng(1).uniform(size=(64, 64)) > 0.3  # some groups keep one or none
    assert set(np.asarray(mask).reshape(-1, 4).sum(1).tolist()) == {0, 1, 2}
    w = jnp.where(mask, w, 0)
    found = two_of_four({"w": w}, {"w": np.asarray(mask)}, {"w": conventional((64, 64), 0, 1)})["w"]
    values, reordered = sparse_semi_structured_from_dense_cutlass(torch.from_numpy(np.array(w)))
    np.testing.assert_array_equal(values.numpy(), found.values)
    metadata = np.array(found.positions).view("<i2")
    to = _calculate_meta_reordering_scatter_offsets(64, metadata.shape[1], torch.int16, "cpu")
    np.testing.assert_array_equal(reordered.numpy().ravel()[to.numpy()], metadata.ravel())


def test_products_with_coordinates_are_the_dense_ones():
    params = {"w": normal(0, 16, 8)}
    masks = choose({"w": jnp.abs(params["w"])}, "unstructured", 0.75)
    stored, x = bcoo(params, masks), normal(1, 3, 16)
    assert stored["w"].nse == 32 and stored_bytes(stored) == {"w": 32 * (4 + 2 * 4)}
    want = x @ apply(params, masks)["w"]
    np.testing.assert_allclose(x @ stored["w"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda s, x: x @ s["w"])(stored, x), want, rtol=1e-5, atol=1e-6)


def test_a_compiled_function_takes_what_is_stored():
    params = {"w": normal(0, 16, 8), "v": normal(1, 16, 8)}
    masks = choose({p: jnp.abs(x) for p, x in params.items()}, {"w": "2:4", "v": "block:4x4"}, {"v": 64})
    stored = {
        **two_of_four(params, {"w": masks["w"]}),
        **whole_blocks(params, {"v": masks["v"]}, (4, 4)),
    }
    back = jax.jit(to_dense)(stored)
    want = apply(params, masks)
    assert bits(back["w"]) == bits(want["w"]) and bits(back["v"]) == bits(want["v"])
    assert stored["v"].blocks.shape == (4, 4, 4)
    leaves, treedef = jax.tree.flatten(stored)  # as a checkpoint takes them apart
    assert bits(to_dense(jax.tree.unflatten(treedef, leaves))["w"]) == bits(want["w"])


def test_matrices_may_be_those_of_a_traced_function():
    params, x = {"w": normal(0, 8, 2, 6)}, normal(1, 4, 2, 6)  # outputs, then two axes that are summed over
    graph = jprune.trace(lambda p, x: jnp.einsum("oij,bij->bo", p["w"], x), params, x)
    views = weight_matrices(graph, ["w"])
    masks = choose({"w": jnp.abs(params["w"])}, NM(2, 4, pad=True), views=views)
    same_bits(two_of_four(params, masks, views, pad=True), params, masks)
    blocks = choose({"w": jnp.abs(params["w"])}, "block:2x4", 0.5, views)
    same_bits(whole_blocks(params, blocks, (2, 4), views), params, blocks)


def test_what_does_not_fit_is_named():
    params = {"a": {"w": normal(0, 8, 3)}}
    mask = np.zeros((8, 3), bool)
    mask[4:7, 1] = True
    with pytest.raises(PatternError, match="'a/w': output 1 keeps 3 of the weights of inputs 4 to 7"):
        two_of_four(params, {"a/w": mask})
    with pytest.raises(PatternError, match="'a/w': the block at output 0, input 4 is kept in part"):
        whole_blocks(params, {"a/w": mask}, (2, 4))
    with pytest.raises(PatternError, match="6 entries, which 4 does not divide"):
        two_of_four({"w": normal(0, 6, 2)}, {"w": np.zeros((6, 2), bool)})
    for pack in (bcoo, two_of_four, lambda p, m: whole_blocks(p, m, (2, 2))):
        with pytest.raises(PatternError, match="'w', which is no leaf"):
            pack(params, {"w": np.zeros((8, 3), bool)})
        with pytest.raises(PatternError, match=r"mask of 'a/w' is bool\[8, 4\]"):
            pack(params, {"a/w": np.zeros((8, 4), bool)})
