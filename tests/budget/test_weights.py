"""Counts of weights and the masks that keep the largest scores: numpy's stable sort, closed forms, four devices."""

import doctest
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_devices import run_script
from hypothesis import given
from hypothesis import strategies as st
from laws import normal

import jprune
from jprune.budget import choose, counts, weights
from jprune.surgery import patterns, views
from jprune.surgery.patterns import NM, Blocks, Unstructured, check, conventional
from jprune.surgery.products import product


@pytest.mark.parametrize("module", [weights, patterns, views])
def test_the_examples_run(module):
    assert doctest.testmod(module).failed == 0


# -- counts ------------------------------------------------------------------------------------------------------------

shapes_of = st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1)


@given(shapes_of, st.integers(0, 999), st.sampled_from(["uniform", "erk"]))
def test_counts_add_up_and_stay_near_their_shares(shapes, thousandths, how):
    s = Fraction(thousandths, 1000)
    size = {p: math.prod(x) for p, x in shapes.items()}
    found = counts(shapes, thousandths / 1000, how)
    total = (
        round(sum(size.values()) * (1 - s)) if how == "uniform" else sum(n - math.floor(n * s) for n in size.values())
    )
    assert sum(found.values()) == max(total, len(shapes))  # at least one each
    assert all(1 <= found[p] <= size[p] and type(found[p]) is int for p in size)
    shares = {p: n * (1 - s) for p, n in size.items()}
    if how == "uniform" and min(shares.values()) >= 1:
        assert all(abs(found[p] - share) < 1 for p, share in shares.items())


def test_counts_are_jaxpruners_where_it_counts_exactly():
    assert counts({"w": (50_000_001,)}, 0.9) == {"w": 5_000_000}  # float32 gives one more
    erk = counts({"a": (64, 64), "b": (64, 10)}, 0.8, "erk")
    assert erk == {"a": round(4096 * (1 - 0.8533415842)), "b": round(640 * (1 - 0.4573638614))} == {"a": 601, "b": 347}
    # a layer whose share passes one is whole, and the rest shares what is left
    erk = counts({"big": (100, 100), "small": (10, 2)}, 0.7, "erk")
    assert erk == {"big": 3000 + 6 - 20, "small": 20}


def test_counts_by_leaf_and_remainder():
    assert counts({"a": (3,), "b": (3,), "c": (3,)}, 0.5) == {"a": 2, "b": 1, "c": 1}  # 4.5 is rounded to even
    assert counts({"a": (10,), "b": (100,), "c": (10,)}, 0.5, {"b": 0.9, "c": None}) == {"a": 5, "b": 10}
    assert counts({"x/k": (10,), "y/k": (10,), "z": (4,)}, 0.5, {"*/k": 0.8}) == {"x/k": 2, "y/k": 2, "z": 2}
    assert counts({"a": (4,), "b": (1000,)}, 0.999) == {"a": 1, "b": 1} and counts({"a": (4,)}, 0.0) == {"a": 4}


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), True, "0.5", None])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        counts({"a": (4,)}, sparsity)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        counts({"a": (4,)}, 0.5, {"a": 1.5})


def test_unknown_distributions_and_leaves_are_refused():
    with pytest.raises(ValueError, match="not 'ERK'"):
        counts({"a": (4,)}, 0.5, "ERK")
    with pytest.raises(ValueError, match="sparsity for 'kernels' fits no leaf; did you mean 'kernel'"):
        counts({"kernel": (4,)}, 0.5, {"kernels": 0.1})


# -- masks: numpy says which -------------------------------------------------------------------------------------------

VALUES = np.array([-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 1e-30, 0.5, 0.5000001, 2.0, np.inf], np.float32)


def stable(scores, k):
    """The k largest of a vector, ties to the first."""
    out = np.zeros(len(scores), bool)
    out[np.argsort(-scores, kind="stable")[:k]] = True
    return out


seeds = st.integers(0, 2**31)


def drawn(seed, *shape):
    """Scores with many ties, both zeros and infinities among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    return np.where(
        rng.random(shape) < rng.choice([0.0, 0.5, 1.0]), rng.choice(VALUES[[0, 1, 3, 4, 6, 7, 8, 9, 10]], shape), x
    )


@given(seeds, st.integers(0, 35))
def test_a_leaf_keeps_its_largest(seed, k):
    x = drawn(seed, 5, 7)
    (mask,) = choose({"w": x}, "unstructured", {"w": k}).values()
    assert mask.dtype == bool and np.array_equal(np.asarray(mask).ravel(), stable(x.ravel(), k))


@given(seeds, st.integers(0, 24))
def test_rows_columns_and_matrices_keep_theirs(seed, k):
    x = drawn(seed, 2, 3, 4)  # two layers, three inputs, four outputs
    seen = dict.fromkeys("rcm", conventional(x.shape, stacked=1))
    found = choose(dict.fromkeys("rcm", x), {"r": "row", "c": "column", "m": "matrix"}, dict.fromkeys("rcm", k), seen)
    for name, lines in {
        "r": lambda x: x.transpose(0, 2, 1).reshape(8, 3),
        "c": lambda x: x.reshape(6, 4),
        "m": lambda x: x.transpose(0, 2, 1).reshape(2, 12),
    }.items():
        own = lines(x)
        share = k // len(own) + (np.arange(len(own)) < k % len(own))
        want = np.stack([stable(v, n) for v, n in zip(own, share, strict=True)])
        assert np.array_equal(lines(np.asarray(found[name])), want), name


@given(seeds, st.integers(0, 43), st.booleans())
def test_the_whole_model_is_compared(seed, k, normalise):
    x = {"b": drawn(seed, 7), "a": drawn(seed + 1, 4, 9)}
    if normalise:
        x = {p: np.nan_to_num(v, posinf=9.0, neginf=-9.0) for p, v in x.items()}
    found = choose(x, "model", {"a": min(k, 36), "b": k - min(k, 36)}, normalise=normalise)
    scaled = {p: v / (np.sqrt(np.sum(v * v)) + np.float32(1e-8)) if normalise else v for p, v in x.items()}
    got = np.concatenate([np.asarray(found[p]).ravel() for p in "ab"])
    values = np.concatenate([scaled[p].ravel() for p in "ab"])
    assert got.sum() == k
    if normalise:  # up to the last bit of the norm
        assert k in (0, 43) or values[got].min() >= values[~got].max() - 1e-6
    else:
        assert np.array_equal(got, stable(values, k))


@given(seeds, st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 8)]), st.booleans())
def test_each_group_keeps_its_best(seed, nm, outputs):
    n, m = nm
    x = drawn(seed, 8, 16)
    p = NM(n, m, "output" if outputs else "input")
    mask = np.asarray(choose({"w": x}, p)["w"])
    own = (lambda v: v.reshape(-1, m)) if outputs else (lambda v: v.T.reshape(-1, m))
    assert np.array_equal(own(mask), np.stack([stable(g, n) for g in own(x)]))
    assert check({"w": mask}, p)


def test_groups_of_kernels_lie_in_the_channels_and_padding_is_asked_for():
    x = drawn(0, 3, 3, 8, 2)
    mask = np.asarray(choose({"w": x}, "2:4", 0.5)["w"])
    assert (mask.reshape(9, 2, 4, 2).sum(2) == 2).all()
    head = drawn(1, 10, 3)
    with pytest.raises(ValueError, match=r"2:4 does not fit leaf 'w'.*input axis has 10 entries.*pad=True"):
        choose({"w": head}, "2:4")
    mask = np.asarray(choose({"w": head}, NM(2, 4, pad=True))["w"])
    assert (mask[:4].sum(0) == 2).all() and (mask[4:8].sum(0) == 2).all() and mask[8:].all()
    mask = np.asarray(choose({"w": drawn(2, 3, 3, 6, 2)}, NM(1, 4, pad=True))["w"])  # 4 + 2 channels at each position
    assert (mask[:, :, :4].sum(2) == 1).all() and (mask[:, :, 4:].sum(2) == 1).all()


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_blocks_stay_whole(pool):
    x = np.abs(drawn(3, 7, 6)).clip(0, 5)  # 6 outputs, 7 inputs: 2 x 4 blocks end in 2 x 3
    mask = np.asarray(choose({"w": x}, Blocks((2, 4), pool), 0.5)["w"])
    score = [getattr(np, pool)(x.T[i : i + 2, j : j + 4]) for i in (0, 2, 4) for j in (0, 4)]
    want = np.kron(stable(np.array(score), 3).reshape(3, 2), np.ones((2, 4), bool))[:, :7].T
    assert np.array_equal(mask, want) and check({"w": mask}, "block:2x4")
    assert jax.jit(lambda k: choose({"w": x}, Blocks((2, 4), pool), {"w": k})["w"])(21).tolist() == mask.tolist()


def test_the_graph_says_what_rows_are():
    """Stored (out, in) and used transposed: the same masks as of the usual layout."""
    w = normal(0, 8, 12)
    graph = jprune.trace(lambda p, x: x @ p["w"].T, {"w": w}, normal(1, 2, 12))
    seen = {"w": product(graph, "w")}
    for p, amount in (("row", 0.75), ("column", 0.75), ("2:4", None), ("block:2x3", 0.5)):
        turned = choose({"w": w}, p, amount, seen)["w"]
        assert turned.tolist() == choose({"w": w.T}, p, amount)["w"].T.tolist(), p

    halves = jprune.trace(lambda p, x: x @ p["w"][:, :6], {"w": w}, normal(1, 2, 8))
    with pytest.raises(ValueError, match="'w' shows a part of the leaf"):
        choose({"w": w}, "2:4", None, {"w": product(halves, "w")})


def test_halves_and_traced_counts():
    x = {"w": jnp.asarray(drawn(4, 6, 6)), "h": jnp.asarray(drawn(5, 40), jnp.bfloat16)}
    step = jax.jit(lambda x, k: choose(x, "unstructured", {"w": k, "h": k}))
    for k in (0, 1, 17, 36):
        found = step(x, k)
        assert found["w"].ravel().tolist() == stable(np.asarray(x["w"]).ravel(), k).tolist()
        assert found["h"].tolist() == stable(np.asarray(x["h"], np.float32), k).tolist()


def test_double_precision_is_told_apart():
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0])
        assert choose({"w": x}, "unstructured", {"w": 2})["w"].tolist() == [True, True, False, False]


def test_sums_over_leaves_pass_32_bits():
    a, b = (weights._limbs([jnp.uint32(2**32 - 1)] * n) for n in (3, 2))
    assert [int(h) * 2**16 + int(low) for h, low in (a, b, weights._minus(a, b))] == [
        3 * (2**32 - 1), 2 * (2**32 - 1), 2**32 - 1]  # fmt: skip
    assert weights._not_less(a, b) and not weights._not_less(b, a) and weights._not_less(a, a)


def test_the_sparsity_is_met_over_all_leaves():
    x = {"a": drawn(0, 3), "b": drawn(1, 3), "m": drawn(2, 3), "n": drawn(3, 4, 4), "free": drawn(4, 2)}
    how = {"m": "model", "n": "2:4", "[ab]": Unstructured(), "free": None}
    found = choose(x, how, 0.5)
    assert {p: int(m.sum()) for p, m in found.items()} == {"a": 2, "b": 1, "m": 2, "n": 8} and "free" not in found
    assert choose(x, "unstructured", {"a": 1}).keys() == {"a"}  # without a number: dense


def test_what_cannot_be_chosen_is_refused_by_name():
    x = {"w": np.ones((4, 4), np.float32)}
    bad = x["w"].copy()
    bad[1, 2] = np.nan
    for scores, pattern, amount, said in (
        ({"w": bad}, "unstructured", 0.5, "scores of 'w' hold NaN"),
        ({"w": jnp.asarray(bad)}, "2:4", None, "scores of 'w' hold NaN"),
        ({"w": x["w"].astype(int)}, "unstructured", 0.5, "scores of 'w' are int64"),
        (x, "unstructured", 1.0, r"in \[0, 1\)"),
        (x, "unstructured", None, "needs a sparsity or counts"),
        (x, "unstructured", {"v": 3}, "count for 'v', which has no scores"),
        (x, "unstructured", {"w": 17}, "count for 'w' is 17"),
        (x, "unstructured", {"w": 0.5}, "count for 'w' is 0.5"),
        (x, {"v": "2:4"}, None, "pattern for 'v' fits no leaf"),
        (x, "2:4", 0.75, "2:4 removes 0.5 of the weights, not 0.75"),
        ({"b": np.ones(4, np.float32)}, "row", 0.5, "'b' of shape .* no inputs and outputs"),
    ):
        with pytest.raises(ValueError, match=said):
            choose(scores, pattern, amount)
    assert int(jax.jit(lambda s: choose({"w": s}, "unstructured", {"w": 15}))(bad)["w"][1, 2]) == 0  # the lowest


# -- four devices ------------------------------------------------------------------------------------------------------

SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from four_devices import most_moved
from jprune.budget import choose

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
rng = np.random.default_rng(0)
x = {"a": rng.integers(0, 9, (8, 16)).astype(np.float32), "b": rng.integers(0, 9, (16, 8)).astype(np.float32)}
specs = {"a": P("data", "model"), "b": P(None, ("data", "model"))}
split = {p: jax.device_put(v, NamedSharding(mesh, specs[p])) for p, v in x.items()}
result = {"equal": [], "placed": [], "moved": {}}
for pattern, amount in (("unstructured", 0.7), ("model", 0.7), ("row", 0.75), ("2:4", None), ("matrix", 0.5)):
    f = lambda s: choose(s, pattern, amount)
    compiled = jax.jit(f).lower(split).compile()
    result["moved"][pattern] = most_moved(compiled)
    for name, got in (("eager", f(split)), ("jitted", compiled(split))):
        want = f(x)
        result["equal"] += [(pattern, name, p, bool((np.asarray(got[p]) == np.asarray(want[p])).all())) for p in x]
        result["placed"] += [(pattern, name, p, got[p].sharding.is_equivalent_to(split[p].sharding, 2)) for p in x]
result["sorted"] = most_moved(jax.jit(lambda s: jnp.argsort(s["a"].ravel())).lower(split).compile())
print(json.dumps(result))
"""


def test_on_four_devices_masks_are_those_of_one_and_no_leaf_is_gathered():
    result = run_script(SCRIPT)
    assert len(result["equal"]) == 20 and [row for row in result["equal"] if not row[-1]] == []
    assert [row for row in result["placed"] if not row[-1]] == []
    assert set(result["moved"]) == {"unstructured", "model", "row", "2:4", "matrix"}
    assert max(result["moved"].values()) <= 4  # one number of each device, of leaves with 128
    assert result["sorted"] >= 128  # what a sort takes, so that the line above can fail
