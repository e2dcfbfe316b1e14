"""Patterns and masks of single weights: what is refused, what holds, exact counts, bits, and masks that meet channels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import lively, normal, relative, subset

import jprune
from jprune.surgery.patterns import (
    NM,
    Blocks,
    PatternError,
    Unstructured,
    apply,
    check,
    conventional,
    density,
    pack,
    pattern,
    sparse_cost,
    unpack,
)
from jprune.surgery.products import product
from jprune.tracing.paths import flatten


def test_words_name_patterns_and_others_are_refused():
    words = ["unstructured", "matrix", "row", "column", "model", "2:4", "1:8", "block:4x16"]
    assert [str(pattern(w)) for w in words] == words
    assert pattern(" 2:4 ") == NM(2, 4) and pattern("block:4x16") == Blocks((4, 16))
    for wrong, said in {
        "rows": "did you mean 'row'",
        "4:2": "0 < N < M",
        "4:4": "0 < N < M",
        "0:4": "0 < N < M",
        "block:0x4": "at least 1",
        "block:4": "names no sparsity pattern",
        "2:4:8": "names no sparsity pattern",
        "": "names no sparsity pattern",
        "9" * 9 + ":" + "9" * 10: "names no sparsity pattern",
    }.items():
        with pytest.raises(ValueError, match=said):
            pattern(wrong)
    for wrong in (lambda: Unstructured("layer"), lambda: NM(2, 4, "out"), lambda: Blocks((2, 2), "sum")):
        with pytest.raises(ValueError, match="not '"):
            wrong()


@pytest.mark.parametrize(
    "shape, how, out",
    [
        ((6, 4), {}, lambda x: x.T),
        ((3, 2, 6, 4), {}, lambda x: np.moveaxis(x, -1, 0).reshape(4, 36)),
        ((4, 6), {"output": 0, "input": 1}, lambda x: x),
        ((4, 6, 3, 2), {"output": 0, "input": 1}, lambda x: x.transpose(0, 2, 3, 1).reshape(4, 36)),
        ((5, 6, 4), {"stacked": 1}, lambda x: x.transpose(0, 2, 1)),
    ],
)
def test_leaves_by_convention_are_matrices_and_come_back(shape, how, out):
    x, view = np.arange(math.prod(shape)).reshape(shape), conventional(shape, **how)
    matrix = view.matrix(x)
    assert np.array_equal(matrix, out(x)) and matrix.shape == (*view.lead, 4, math.prod(view.inputs))
    assert view.inputs[-1] == 6 and np.array_equal(view.leaf_like(matrix, shape), x)


def test_leaves_that_are_no_matrices_are_refused():
    for shape, how in (
        ((5,), {}),
        ((5, 6), {"stacked": 1}),
        ((5, 6), {"output": 1, "input": 1}),
        ((5, 6), {"input": 2}),
    ):
        with pytest.raises(ValueError, match=r"is no matrix|not two axes"):
            conventional(shape, **how)


def test_what_a_mask_removes_is_zero_even_where_it_was_nan():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = {"a": {"w": jnp.array([[1, jnp.nan], [jnp.inf, -2]], dtype)}, "b": jnp.ones(3, dtype)}
        out = jax.jit(apply)(params, {"a/w": jnp.array([[True, False], [False, True]])})
        assert out["a"]["w"].tolist() == [[1, 0], [0, -2]] and out["a"]["w"].dtype == dtype
        assert out["b"].tolist() == [1, 1, 1]
    ok = np.ones((2, 2), bool)
    for masks, said in (
        ({"a/x": ok}, "no leaf; did you mean 'a/w'"),
        ({"a/w": ok[:1]}, r"bool\[1, 2\]"),
        ({"a/w": ok.astype(int)}, r"int64\[2, 2\]"),
    ):
        with pytest.raises(PatternError, match=said):
            apply(params, masks)


def test_a_pattern_holds_or_the_place_where_it_does_not_is_named():
    good = np.tile([True, False, False, True], (3, 2)).T  # (in, out): two groups for each of three outputs
    assert check({"w": good, "free": good}, {"w": "2:4", "free": None}) == {"w": "2:4 holds"}
    bad = good.copy()
    bad[5, 1] = True
    with pytest.raises(PatternError, match="'w': output 1 keeps 3 of the weights of inputs 4 to 7"):
        check({"w": bad}, "2:4")
    with pytest.raises(PatternError, match="2:4 along outputs does not hold in 'w': input 1 keeps 3"):
        check({"w": bad.T}, NM(2, 4, "output"))
    conv = np.stack([good[:4], bad[4:]])[None]  # (1, 2, 4, 3): groups lie in the channels of one position
    with pytest.raises(PatternError, match="output 1 keeps 3 of the weights of inputs 4 to 7"):
        check({"w": conv}, "2:4")
    stacked = np.stack([good, bad])
    with pytest.raises(PatternError, match=r"matrix \(1,\), output 1 keeps 3"):
        check({"w": stacked}, "2:4", {"w": conventional(stacked.shape, stacked=1)})
    with pytest.raises(PatternError, match=r"innermost input axis has 3 entries.*last group 3 long"):
        check({"w": good.T}, "2:4")
    assert check({"w": np.ones((6, 2), bool) & (np.arange(6) % 4 < 2)[:, None]}, NM(2, 4, pad=True))
    uneven = bad.copy()
    uneven[0, 0] = False  # output 0 keeps 3, output 1 five
    with pytest.raises(PatternError, match="rows of 'w' differ: row 1 keeps 5 weights and row 0 keeps 3"):
        check({"w": uneven}, "row")
    assert check({"w": bad}, "row") == {"w": "row holds"}
    block = np.kron([[1, 0, 1], [0, 1, 1]], np.ones((2, 4)))[:3, :11].astype(bool)  # (out, in), ends cut off
    assert check({"w": block.T}, "block:2x4") == {"w": "block:2x4 holds"}
    block[2, 5] = False
    with pytest.raises(PatternError, match="the block at output 2, input 4 is kept in part"):
        check({"w": block.T}, "block:2x4")
    with pytest.raises(ValueError, match="pattern for 'v' fits no leaf"):
        check({"w": good}, {"v": "2:4"})
    with pytest.raises(PatternError, match="no inputs and outputs"):
        check({"b": np.ones(4, bool)}, "2:4")


def test_counts_are_exact_integers():
    masks = {"a": np.eye(5, dtype=bool), "b": jnp.zeros((2, 3, 4), bool), "c": jnp.array(True)}
    found = density(masks)
    assert found.kept == {"a": 5, "b": 0, "c": 1} and found.size == {"a": 25, "b": 24, "c": 1}
    assert found.total == 6 / 50 and found.of["a"] == 0.2
    assert all(type(n) is int for n in (*found.kept.values(), *found.size.values()))


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**30))
def test_bits_come_back(shape, seed):
    masks = {"a/b": np.random.default_rng(seed).random(shape) < 0.5}
    back = unpack(pack(masks), masks)
    assert back["a/b"].dtype == bool and np.array_equal(back["a/b"], masks["a/b"]) and back["a/b"].shape == tuple(shape)


def test_hostile_bits_are_refused_by_name():
    good = pack({"w": np.ones((3, 3), bool)})["w"]
    assert good["bits"].nbytes == 2
    for wrong, said in (
        ({"shape": np.array([2**40, 2**40])}, "do not hold"),
        ({"shape": np.array([-3, -3])}, "do not hold"),
        ({"shape": np.array([3, 6])}, "do not hold"),
        ({"shape": np.array([3.0, 3.0])}, "list of sizes"),
        ({"shape": np.array([1] * 40 + [9])}, "do not hold"),
        ({"bits": np.ones(2, np.int8)}, "list of bytes"),
        ({"bits": np.array([255, 255], np.uint8)}, "behind its last weight"),
        ({"more": 1}, "nothing else"),
    ):
        with pytest.raises(PatternError, match=f"of 'w'.*{said}"):
            unpack({"w": {**good, **wrong}})
    with pytest.raises(PatternError, match="of 'w' must have"):
        unpack({"w": np.ones(3)})
    with pytest.raises(PatternError, match=r"'w' has shape \(9,\)"):
        unpack({"w": good}, {"w": np.ones(9)})
    with pytest.raises(PatternError, match="no leaf"):
        unpack({"w": good}, {"v": np.ones(9)})


# -- with a graph ------------------------------------------------------------------------------------------------------


def network(p, x):
    h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jax.nn.relu(h + p["b"]).mean((1, 2))

    def layer(h, w):
        return h + jax.nn.relu(h @ w[0]) @ w[1], None

    q, k = jnp.split(jax.lax.scan(layer, h, (p["up"], p["down"]))[0] @ p["qk"], 2, axis=1)
    return (q * k) @ p["head"].T


SHAPES = {"conv": (3, 3, 4, 8), "b": (8,), "up": (2, 8, 12), "down": (2, 12, 8), "qk": (8, 8), "head": (3, 4)}
PARAMS = lively({k: np.zeros(s, np.float32) for k, s in SHAPES.items()})
X = normal(3, 2, 4, 4, 4)
GRAPH = jprune.trace(network, PARAMS, X)
MASKED = ("conv", "up", "down", "qk", "head")
MASKS = {k: np.random.default_rng(7).random(SHAPES[k]) < 0.4 for k in MASKED}


def test_cut_channels_first_or_mask_first_the_function_is_the_same():
    keep = subset(GRAPH, np.random.default_rng(0))
    assert len(keep) >= 2
    sparse = apply(PARAMS, MASKS)
    then_cut = GRAPH.compact(sparse, keep)
    then_masked = apply(GRAPH.compact(PARAMS, keep), GRAPH.compact_like(MASKS, keep))
    for (p, a), (_, b) in zip(flatten(then_cut), flatten(then_masked), strict=True):
        assert np.array_equal(a, b), p
    assert any(a.shape != SHAPES[p] for p, a in flatten(then_cut))
    want = network(GRAPH.mask(sparse, keep), X)
    assert relative(GRAPH.replay(keep)(then_masked, X), want) < 1e-5
    assert relative(network(GRAPH.mask(PARAMS, keep), X), want) > 0.1  # the masks matter


def test_cost_left_is_counted_per_weight():
    cost, left = GRAPH.cost(), sparse_cost(GRAPH, MASKS)
    n = {k: int(m.sum()) for k, m in MASKS.items()}
    uses = {"conv": 2 * 4 * 4, "up": 2, "down": 2, "qk": 2, "head": 2}  # each weight once per row, at every position
    assert left.macs == sum(uses[k] * n[k] for k in MASKED)
    assert left.params == 8 + sum(n.values())
    assert (sparse_cost(GRAPH, {}).macs, sparse_cost(GRAPH, {}).params) == (cost.macs, cost.params)
    whole = {k: np.ones(SHAPES[k], bool) for k in MASKED}
    assert (sparse_cost(GRAPH, whole).macs, sparse_cost(GRAPH, whole).params) == (cost.macs, cost.params)
    with pytest.raises(PatternError, match="no leaf"):
        sparse_cost(GRAPH, {"x": whole["up"]})
    with pytest.raises(PatternError, match="mask of 'up'"):
        sparse_cost(GRAPH, {"up": whole["down"]})


def test_a_part_of_a_leaf_in_use_is_counted_by_its_own_zeros():
    def halves(p, x):
        return x @ p["w"][:, :2], x @ p["w"][:, 2:]

    graph = jprune.trace(halves, {"w": jnp.ones((4, 5))}, jnp.ones((3, 4)))
    mask = np.ones((4, 5), bool)
    mask[:, :2] = False
    assert sparse_cost(graph, {"w": mask}).macs == graph.cost().macs - 3 * 4 * 2

    def made(p, x):
        return x @ (p["w"] + 1)

    graph = jprune.trace(made, {"w": jnp.ones((4, 5))}, jnp.ones((3, 4)))
    assert sparse_cost(graph, {"w": mask}).macs == graph.cost().macs  # zeros do not stay zeros


def test_products_are_views():
    view = product(GRAPH, "up")
    mask = np.zeros(SHAPES["up"], bool)
    mask[:, ::4] = mask[:, 1::4] = True
    assert view.lead == (2,) and check({"up": mask}, "2:4", {"up": view}) == {"up": "2:4 holds"}
    mask[1, 6, 3] = True
    with pytest.raises(PatternError, match=r"matrix \(1,\), output 3 keeps 3 of the weights of inputs 4 to 7"):
        check({"up": mask}, "2:4", {"up": view})
    turned = product(GRAPH, "head")  # stored (out, in)
    assert check({"head": np.array([[1, 1, 0, 0]] * 3, bool)}, "2:4", {"head": turned})
