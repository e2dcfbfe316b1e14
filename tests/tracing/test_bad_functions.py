"""What users do wrong, and what they are told: functions that cannot be traced, trees that do not fit, NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws import check_laws, normal

import jprune

X = normal(99, 5, 6)
HIDDEN = {"A": normal(0, 6, 8), "C": normal(4, 8, 3)}
HALF = {"A:1": np.arange(8) < 4}


def good(p, x):
    return jax.nn.relu(x @ p["A"]) @ p["C"]


GRAPH = jprune.trace(good, HIDDEN, X)


# -- functions ---------------------------------------------------------------------------------------------------------


NEEDS_VALUES = {
    "branch": lambda p, x, n: good(p, x) if x.sum() > 0 else x,
    "branch on an option": lambda p, x, n: good(p, x) if n else x,
    "loop": lambda p, x, n: sum(good(p, x) for _ in range(n)),
    "number": lambda p, x, n: good(p, x) * int(n),
    "item": lambda p, x, n: good(p, x) * x.sum().item(),
    "numpy": lambda p, x, n: np.maximum(x @ p["A"], 0) @ p["C"],
    "selection": lambda p, x, n: good(p, x)[x[:, 0] > 0],
    "size of the data": lambda p, x, n: jnp.nonzero(good(p, x)),
}


@pytest.mark.parametrize("name", NEEDS_VALUES)
def test_functions_that_need_values_cannot_be_traced(name):
    with pytest.raises(jprune.TraceError, match=r"needs concrete values.*close over static arguments") as caught:
        jprune.trace(NEEDS_VALUES[name], HIDDEN, X, jnp.int32(1))
    assert isinstance(caught.value.__cause__, jax.errors.JAXTypeError | jax.errors.JAXIndexError)  # and where


def test_the_remedy_helps():
    for name in ("branch on an option", "loop", "number"):
        check_laws(lambda p, x, f=NEEDS_VALUES[name]: f(p, x, 1), HIDDEN, (X,), gradients=False)


def test_the_user_s_own_error_comes_through():
    with pytest.raises(TypeError, match=r"contracting dimensions to have the same shape, got \(6,\) and \(8,\)"):
        jprune.trace(lambda p, x: x @ p["C"], HIDDEN, X)
    with pytest.raises(KeyError, match="missing"):
        jprune.trace(lambda p, x: x @ p["missing"], HIDDEN, X)


def test_inputs_may_be_numbers_but_not_words():
    def scaled(p, x, by, way=None):
        return good(p, x) * by

    graph = jprune.trace(scaled, HIDDEN, X, 3.0, None)
    small = graph.compact(HIDDEN, HALF)
    want = scaled(graph.mask(HIDDEN, HALF), X, 7.0)
    np.testing.assert_allclose(graph.replay(HALF)(small, X, 7.0, None), want, rtol=1e-5, atol=1e-6)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), HIDDEN)  # a number does not widen the type it meets
    graph = jprune.trace(scaled, half, X.astype(jnp.bfloat16), 3.0)
    assert graph.dense(half, X.astype(jnp.bfloat16), 2.0).dtype == jnp.bfloat16
    with pytest.raises(jprune.TraceError, match="input 1 is a str, not an array or a number; close over it"):
        jprune.trace(scaled, HIDDEN, X, "gelu")


def test_a_function_of_nothing_offers_nothing():
    for f in (lambda p, x: 3.0, lambda p, x: None, lambda p, x: x, lambda p, x: {}):
        graph = jprune.trace(f, HIDDEN, X)
        assert not graph.groups and graph.summary().endswith("UNUSED: 4 axes of leaves with 72 entries")


# -- parameters --------------------------------------------------------------------------------------------------------


def test_parameters_that_are_not_arrays():
    for leaf, kind in ((3, "int"), ("relu", "str"), (jnp.tanh, "function|PjitFunction|ufunc")):
        with pytest.raises(jprune.TraceError, match=f"leaf 'layers/n' is a .*({kind}).*not an array; partition"):
            jprune.trace(good, {**HIDDEN, "layers": {"n": leaf}}, X)
    with pytest.raises(jprune.TraceError, match="no leaves"):
        jprune.trace(good, {}, X)
    with pytest.raises(jprune.TraceError, match="two leaves share the path 'a/b'"):
        jprune.trace(good, {**HIDDEN, "a": {"b": X}, "a/b": X}, X)


def test_leaves_without_axes_or_entries():
    params = {**HIDDEN, "scale": jnp.float32(2), "nothing": jnp.zeros((0, 4)), "one": jnp.ones((1, 1))}
    graph = check_laws(lambda p, x: good(p, x) * p["scale"] * p["one"] + p["nothing"].sum(), params, (X,))
    assert list(graph.groups) == ["A:1", "nothing:1"]


def test_random_keys_among_the_parameters():
    """What nnx.split returns of a module with dropout, without a filter: keys and counters besides the weights."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.out = nnx.Linear(6, 12, rngs=rngs), nnx.Linear(12, 5, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.out(self.drop(nnx.relu(self.up(x))))

    definition, state = nnx.split(Net(nnx.Rngs(0)))
    graph = jprune.trace(lambda s, x: nnx.merge(definition, s)(x), state, X)
    keys = [p for p, leaf in graph.leaves.items() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert keys and all(not graph.leaves[p].used for p in keys)
    keep = {"up/kernel/value:1": np.arange(12) < 5}
    assert graph.verify(state, keep, X) < 1e-5
    small = graph.compact(state, keep)
    assert jax.tree.structure(graph.expand(small, keep)) == jax.tree.structure(state)
    assert jax.tree.structure(graph.plan(keep).apply(state)) == jax.tree.structure(small)
    assert graph.cost(keep).bytes < graph.cost().bytes


def test_unused_parameters_are_said_to_be_so():
    params = {**HIDDEN, "old": {"kernel": normal(5, 8, 4)}}
    graph = jprune.trace(good, params, X)
    text = graph.explain()
    assert "old/kernel axis 0 (8): unprunable: UNUSED(no output depends on this leaf)" in text
    assert "UNUSED: 2 axes of leaves with 32 entries" in graph.summary()
    assert not graph.leaves["old/kernel"].used and list(graph.groups) == ["A:1"]
    with pytest.raises(jprune.NotPrunable, match="UNUSED"):
        graph.compact(params, {"old/kernel:0": np.arange(8) < 4})
    assert graph.compact(params, HALF)["old"]["kernel"].shape == (8, 4)
    # multiplied into something that is thrown away is unused as well
    dropped = jprune.trace(lambda p, x: (good(p, x), x @ p["B"])[0], {**HIDDEN, "B": normal(5, 6, 4)}, X)
    assert dropped.leaves["B"].frozen[1].code == "UNUSED"


# -- questions about what is not there ---------------------------------------------------------------------------------


def test_explain_suggests_what_may_have_been_meant():
    params = {"encoder": {"kernel": HIDDEN["A"], "bias": normal(1, 8)}, "head": {"kernel": HIDDEN["C"]}}
    graph = jprune.trace(
        lambda p, x: (x @ p["encoder"]["kernel"] + p["encoder"]["bias"]) @ p["head"]["kernel"], params, X
    )
    with pytest.raises(jprune.TraceError, match="no leaf 'encoder/kernal'; did you mean 'encoder/kernel'"):
        graph.explain("encoder/kernal")
    with pytest.raises(jprune.TraceError, match="no leaf 'zzz'; known are 'encoder/bias', 'encoder/kernel'"):
        graph.explain("zzz")
    with pytest.raises(jprune.TraceError, match=r"'encoder/kernel' has shape \(6, 8\): there is no axis 2"):
        graph.explain("encoder/kernel", 2)
    assert graph.explain("encoder/kernel", 1) == "encoder/kernel axis 1 (8): group encoder/kernel:1"
    assert "unprunable: MODEL_INPUT(input 0 axis 1)" in graph.explain("encoder/kernel", 0)


# -- replay and verify -------------------------------------------------------------------------------------------------


def test_replay_takes_only_what_its_decision_makes():
    run = GRAPH.replay(HALF)
    small = GRAPH.compact(HIDDEN, HALF)
    with pytest.raises(jprune.KeepError, match=r"leaf 'A' has shape \(6, 8\), but this decision makes \(6, 4\)"):
        run(HIDDEN, X)
    with pytest.raises(jprune.KeepError, match=r"leaf 'C' has shape \(8, 3\), but this decision makes \(4, 3\)"):
        run({**small, "C": HIDDEN["C"]}, X)
    with pytest.raises(jprune.KeepError, match="leaf 'C' is missing"):
        run({"A": small["A"]}, X)
    with pytest.raises(jprune.KeepError, match=r"\(6, 4\), but this decision makes \(6, 8\)"):
        GRAPH.dense(small, X)
    with pytest.raises(jprune.KeepError):  # the same under jit: shapes are known there
        jax.jit(run)(HIDDEN, X)


def test_replay_takes_inputs_of_the_traced_shapes():
    run, small = GRAPH.replay(HALF), GRAPH.compact(HIDDEN, HALF)
    with pytest.raises(jprune.TraceError, match=r"axis 1 of input 0 has size 7, but 6 was traced"):
        run(small, jnp.ones((5, 7)))
    with pytest.raises(jprune.TraceError, match="input 0 has 1 axes, 2 were traced"):
        run(small, X[0])
    with pytest.raises(jprune.TraceError, match="2 input arrays given, 1 were traced"):
        run(small, X, X)
    with pytest.raises(jprune.TraceError, match="0 input arrays given"):
        run(small)


def test_a_reference_that_is_not_a_number_is_no_reference():
    """Weights normalised by their own length: a masked column is divided by zero, so nothing can be compared."""

    def f(p, x):
        return (x @ (p["A"] / jnp.linalg.norm(p["A"], axis=0))) @ p["C"]

    graph = jprune.trace(f, HIDDEN, X)
    with pytest.raises(ValueError, match="NAN_REFERENCE"):
        graph.verify(HIDDEN, graph.decide(HALF, allow_inexact=True), X)
    with pytest.raises(ValueError, match="NAN_REFERENCE"):
        graph.compact(HIDDEN, graph.decide(HALF, allow_inexact=True), verify="numeric", inputs=(X,))
    with pytest.raises(ValueError, match="NAN_REFERENCE"):  # NaN of the user's own
        GRAPH.compact({**HIDDEN, "C": HIDDEN["C"].at[0, 0].set(jnp.nan)}, HALF, verify="numeric", inputs=(X,))


def test_numeric_verification_tells_exact_from_inexact():
    small = GRAPH.compact(HIDDEN, HALF, verify="numeric", inputs=(X,))
    assert small["A"].shape == (6, 4)
    graph = jprune.trace(lambda p, x: jax.nn.softmax(x @ p["A"]) @ p["C"], HIDDEN, X)
    with pytest.raises(ValueError, match="differs from the masked one by"):
        graph.compact(HIDDEN, graph.decide(HALF, allow_inexact=True), verify="numeric", inputs=(X,))
    with pytest.raises(ValueError, match="needs inputs="):
        GRAPH.compact(HIDDEN, HALF, verify="numeric")
    with pytest.raises(ValueError, match="verify must be 'shape', 'numeric' or None, not 'shapes'"):
        GRAPH.compact(HIDDEN, HALF, verify="shapes")


# -- inputs other than the traced ones ---------------------------------------------------------------------------------


def optional(p, x, mask=None, bias=None):
    x = x if mask is None else x * mask
    return good(p, x if bias is None else x + bias)


def test_inputs_are_told_apart_by_their_places():
    """As many arrays as were traced, in other places: the bias is no mask."""
    graph = jprune.trace(optional, HIDDEN, X, X, None)
    np.testing.assert_allclose(graph.dense(HIDDEN, X, X, None), optional(HIDDEN, X, X), rtol=1e-5, atol=1e-6)
    with pytest.raises(jprune.TraceError, match="input 2 was not traced: the inputs traced with are 0, 1"):
        graph.dense(HIDDEN, X, None, X)
    named = jprune.trace(lambda p, i: optional(p, i["x"], i.get("mask"), i.get("bias")), HIDDEN, {"x": X, "mask": X})
    with pytest.raises(jprune.TraceError, match="input 0/bias was not traced"):
        named.dense(HIDDEN, {"x": X, "bias": X})


def test_inputs_of_another_type_are_refused():
    """A cast to the traced type leaves nothing in the trace; without it whole numbers wrap around."""

    def squares(p, x):
        return good(p, x.astype(jnp.float32) ** 2)

    whole = (jnp.arange(X.size) * 5).astype(jnp.uint8).reshape(X.shape)
    with pytest.raises(jprune.TraceError, match=r"input 0 is uint8, but float32 was traced.*cast it, or trace again"):
        jprune.trace(squares, HIDDEN, X).dense(HIDDEN, whole)
    graph = jprune.trace(squares, HIDDEN, whole)
    np.testing.assert_allclose(graph.dense(HIDDEN, whole), squares(HIDDEN, whole), rtol=1e-5)


def test_random_numbers_for_each_of_an_array_of_keys():
    """Dropout under vmap, as Equinox has it: one key for each sample."""

    def f(p, x, key):
        def one(row, key):
            return good(p, row * jax.random.bernoulli(key, 0.5, row.shape))

        return jax.vmap(one)(x, jax.random.split(key, len(x)))

    graph = jprune.trace(f, HIDDEN, X, jax.random.key(0))
    assert list(graph.groups) == ["A:1"]
    assert graph.verify(HIDDEN, HALF, X, jax.random.key(1)) < 1e-5
