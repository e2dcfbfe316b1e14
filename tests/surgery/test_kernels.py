"""Every weight as a matrix: its product with the rows of data is what the traced function computes."""

import jax.numpy as jnp
import numpy as np
import pytest
from decoders import prompt, tiny, weights
from jax import lax
from laws import normal

import jprune
from jprune.importance.at_init import weight_leaves
from jprune.importance.weight_inputs import gram, input_rows, input_sums, squares
from jprune.models.llama import Llama, stack_layers
from jprune.surgery.kernels import weight_matrices, weight_matrix
from jprune.surgery.products import TapError
from jprune.tracing.errors import TraceError

CONVOLUTIONS = {
    "plain": ((3, 3, 4, 6), {"padding": "SAME"}),
    "strided, dilated": ((2, 3, 4, 6), {"window_strides": (2, 1), "padding": "VALID", "rhs_dilation": (2, 1)}),
    "groups": ((3, 3, 2, 6), {"padding": "SAME", "feature_group_count": 2}),
    "depthwise": ((3, 3, 1, 4), {"padding": ((1, 1), (0, 2)), "feature_group_count": 4}),
    "transposed": ((3, 3, 4, 2), {"padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_its_matrix_times_its_patches(name):
    shape, options = CONVOLUTIONS[name]
    options = {"window_strides": (1, 1), **options}

    def fn(params, x):
        return lax.conv_general_dilated(x, params["k"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    params, x = {"k": normal(0, *shape)}, normal(1, 2, 6, 5, 4)
    graph = jprune.trace(fn, params, x)
    m = weight_matrix(graph, "k")
    rows = input_rows(graph, {"k": m})(params, x)["k"]
    y = jnp.einsum("...si,...oi->s...o", rows, m.matrix(params["k"]), precision="highest")
    want = fn(params, x)
    np.testing.assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(m.leaf_like(m.matrix(params["k"]), shape), params["k"])
    assert (m.lead, len(m.shape)) == (
        () if "feature_group_count" not in options else (options["feature_group_count"],),
        2,
    )


def test_every_matrix_of_a_decoder_stacked_or_not_says_the_same_of_its_inputs():
    config, params = tiny(), weights(tiny())
    ids, _ = prompt(tokens=5)
    loose, stacked = Llama(config), Llama(config, scanned=True)
    one, two = jprune.trace(loose.apply, params, ids), jprune.trace(stacked.apply, stack_layers(params), ids)
    a, b = ({p: x for p, x in zip(weight_leaves(g), weight_leaves(g)) if "layer" in p} for g in (one, two))
    sums = input_sums(one, params, [ids[:1], ids[1:]], weight_matrices(one, a), squares)
    rows = input_sums(two, stack_layers(params), [ids], weight_matrices(two, b), squares)
    for path, found in rows.items():
        for i, layer in enumerate(found):
            own = sums[path.replace("layers", f"layer{i}")]
            np.testing.assert_allclose(layer, own, rtol=2e-4, atol=1e-6)


def test_second_moments_are_those_of_the_rows():
    params, x = {"w": normal(0, 3, 4)}, normal(1, 7, 3)
    graph = jprune.trace(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    m = weight_matrices(graph, ["w"])
    np.testing.assert_allclose(input_sums(graph, params, [x], m, gram)["w"], np.asarray(x).T @ np.asarray(x), rtol=1e-5)
    with pytest.raises(ValueError, match="'w' hold NaN"):
        input_sums(graph, params, [x.at[0, 0].set(jnp.nan)], m, squares)
    with pytest.raises(TraceError, match="no batches"):
        input_sums(graph, params, [], m, squares)


def test_weights_without_a_matrix_of_their_own_are_named():
    params = {"w": normal(0, 3, 3), "v": normal(1, 3, 3), "b": normal(2, 3)}
    graph = jprune.trace(lambda p, x: x @ p["w"] @ p["w"] @ jnp.sin(p["v"]) + p["b"], params, normal(3, 2, 3))
    for leaf, why in {"w": "used 2 times", "v": "not multiplied", "b": "not multiplied"}.items():
        with pytest.raises(TapError, match=why):
            weight_matrix(graph, leaf)
