"""Primitives that users teach the tracer, those it does not know, and constants that are sliced like parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from laws import check_laws, members, normal

import jprune
from jprune.tracing import rules
from jprune.tracing.tags import Sum

X = normal(99, 5, 6)
HIDDEN = {"A": normal(0, 6, 8), "C": normal(4, 8, 3)}


@pytest.fixture
def user_rules():
    """`register_rule` is for good: what a test registers is taken back after it."""
    before = dict(rules.USER_RULES)
    yield rules.USER_RULES
    rules.USER_RULES.clear()
    rules.USER_RULES.update(before)


def primitive(name, implementation, shape):
    """A new primitive from its jax implementation and the shape of its result."""
    p = Primitive(name)
    p.def_impl(implementation)
    p.def_abstract_eval(lambda x, **params: jax.core.ShapedArray(shape(x.shape, **params), x.dtype))
    mlir.register_lowering(p, mlir.lower_fun(implementation, multiple_results=False))
    return p


def shrink_by_one(x):
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.1, 0)


SHRINK = primitive("soft_threshold", shrink_by_one, lambda shape: shape)
ad.defjvp(SHRINK, lambda g, x: g * (jnp.abs(x) > 0.1))


def as_operand(keeps_zero):
    """The propagation of an elementwise function: the result has the operand's axes."""

    def propagate(a, eqn, vals):
        (x,) = vals
        return [a.value(eqn.outvars[0].aval, x.tags, [keeps_zero and z for z in x.zero])]

    return propagate


def thresholded(p, x):
    return SHRINK.bind(x @ p["A"]) @ p["C"]


@pytest.mark.smoke
def test_a_primitive_without_a_rule_is_frozen_and_named():
    graph = jprune.trace(thresholded, HIDDEN, X)
    assert not graph.groups
    for leaf, axis in (("A", 1), ("C", 0)):
        reason = graph.leaves[leaf].frozen[axis]
        assert (reason.code, reason.detail) == ("UNSUPPORTED", "soft_threshold")
    line = thresholded.__code__.co_firstlineno + 1
    assert list(graph.unsupported) == ["soft_threshold"]
    assert f"test_rules.py:{line} (thresholded)" in graph.unsupported["soft_threshold"][0]
    text = graph.explain()
    assert f"no rule for primitive 'soft_threshold', used at {__file__}:{line}" in text and "register_rule" in text
    assert f"UNSUPPORTED(soft_threshold) at {__file__}:{line}" in graph.explain("A", 1)
    assert "UNSUPPORTED(soft_threshold): 2 axes of leaves with 72 entries" in graph.summary()
    with pytest.raises(jprune.NotPrunable, match=r"UNSUPPORTED\(soft_threshold\)"):
        graph.compact(HIDDEN, {"A:1": np.arange(8) < 4})
    # what it does not know it can still run, and the axes around it stay prunable
    np.testing.assert_allclose(graph.dense(HIDDEN, X), thresholded(HIDDEN, X), rtol=1e-6)
    deeper = {**HIDDEN, "B": normal(5, 3, 9), "D": normal(6, 9, 2)}
    check_laws(lambda p, x: jax.nn.relu(thresholded(p, x) @ p["B"]) @ p["D"], deeper, (X,))


def test_a_registered_rule_obeys_the_laws(user_rules):
    jprune.register_rule("soft_threshold", as_operand(True))
    graph = check_laws(thresholded, HIDDEN, (X,))
    assert members(graph, "A:1") == {("A", 1), ("C", 0)} and graph.groups["A:1"].exact
    assert check_laws(lambda p, x: SHRINK.bind(x @ p["A"]).sum(-1), HIDDEN, (X,)).groups["A:1"].exact


def test_rules_of_one_trace_do_not_outlive_it(user_rules):
    rules = {"soft_threshold": jprune.Rule(as_operand(True))}
    graph = check_laws(thresholded, HIDDEN, (X,), graph=jprune.trace(thresholded, HIDDEN, X, rules=rules))
    assert graph.groups and not jprune.trace(thresholded, HIDDEN, X).groups
    # they also go before registered and built-in ones
    jprune.register_rule("soft_threshold", as_operand(True))
    mistrusted = {"soft_threshold": jprune.Rule(as_operand(False))}
    summed = jprune.trace(lambda p, x: SHRINK.bind(x @ p["A"]).sum(-1), HIDDEN, X, rules=mistrusted)
    assert not summed.groups["A:1"].exact


def test_the_laws_find_a_rule_that_lies():
    """A claim that a shifted value is zero where its operand is: the same check that guards the built-in rules."""
    shifted = primitive("shifted_value", lambda x: x + 1.0, lambda shape: shape)

    def f(p, x):
        return shifted.bind(x @ p["A"]).sum(-1)

    for honest in (True, False):
        graph = jprune.trace(f, HIDDEN, X, rules={"shifted_value": jprune.Rule(as_operand(not honest))})
        assert graph.groups["A:1"].exact != honest
        keep = {"A:1": np.arange(8) < 4}
        if honest:
            assert any("test_rules.py" in n for n in graph.groups["A:1"].notes)
        else:
            with pytest.raises(AssertionError, match="1 groups with 8 prunable units"):
                check_laws(f, HIDDEN, (X,), keep=keep, graph=graph, gradients=False)


def beside_itself(x, *, width):
    assert x.shape[-1] == width, "the parameter has to follow the operand"
    return jnp.concatenate([x, -x], -1)


TWICE = primitive("beside_itself", beside_itself, lambda shape, width: (*shape[:-1], 2 * width))


def test_a_rule_rewrites_parameters_that_hold_sizes(user_rules):
    def propagate(a, eqn, vals):
        (x,) = vals
        both = (Sum((x.tags[-1], x.tags[-1])),)
        return [a.value(eqn.outvars[0].aval, [*x.tags[:-1], both], x.zero)]

    params = {"A": normal(0, 6, 8), "C": normal(4, 16, 3)}

    def f(p, x):
        return TWICE.bind(x @ p["A"], width=8) @ p["C"]

    jprune.register_rule("beside_itself", propagate)
    keep = {"A:1": np.arange(8) % 3 == 0}
    graph = jprune.trace(f, params, X)
    with pytest.raises(AssertionError, match="has to follow"):
        graph.replay(keep)(graph.compact(params, keep, verify=None), X)
    with pytest.raises(TypeError, match=r"got \(16,\) and \(6,\)"):  # compact looks at the shapes, and stops here
        graph.compact(params, keep)
    jprune.register_rule("beside_itself", propagate, lambda eqn, sizes: {**eqn.params, "width": sizes.in_shape(0)[-1]})
    graph = check_laws(f, params, (X,), keep=keep, gradients=False)
    (group,) = graph.groups.values()
    assert next(m for m in group.members if m.path == "C").positions.tolist() == [[j, j + 8] for j in range(8)]


def gate_kernel(x_ref, y_ref, out_ref):
    out_ref[...] = jax.nn.silu(x_ref[...]) * y_ref[...]


@jax.jit
def gate(x, y):
    rows, width = x.shape
    block = pl.BlockSpec((1, width), lambda i: (i, 0))
    return pl.pallas_call(
        gate_kernel,
        grid=(rows,),
        in_specs=[block, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=True,
        name="gate",
    )(x, y)


GATED = {"A": normal(0, 6, 8), "B": normal(1, 6, 8), "C": normal(4, 8, 3)}


def gated(p, x):
    return gate(x @ p["A"], x @ p["B"]) @ p["C"]


def test_a_pallas_kernel_is_opaque_until_it_has_a_rule():
    graph = jprune.trace(gated, GATED, X)
    assert not graph.groups
    assert {graph.leaves[n].frozen[1].detail for n in "AB"} == {"pallas_call"}
    assert "test_rules.py" in graph.unsupported["pallas_call"][0]
    np.testing.assert_allclose(graph.dense(GATED, X), gated(GATED, X), rtol=1e-6)

    def propagate(a, eqn, vals):
        x, y = vals
        for t, u in zip(x.tags, y.tags, strict=True):
            a.unify(t, u)
        return [a.value(eqn.outvars[0].aval, x.tags, [b or c for b, c in zip(x.zero, y.zero, strict=True)])]

    # block shapes are baked into the equation: the kernel is built anew at the sizes of its operands
    rule = jprune.Rule(propagate, evaluate=lambda ev, eqn, args, path: [gate(*args)])
    graph = jprune.trace(gated, GATED, X, rules={"pallas_call": rule})
    check_laws(gated, GATED, (X,), graph=graph, gradients=False)
    assert members(graph, "A:1") == {("A", 1), ("B", 1), ("C", 0)}
    summed = jprune.trace(lambda p, x: gate(x @ p["A"], x @ p["B"]).sum(-1), GATED, X, rules={"pallas_call": rule})
    assert summed.groups["A:1"].exact  # zero times anything


def test_a_rule_with_its_own_evaluation_inside_a_scan():
    """Call paths inside loops: the rule is asked for each of its calls, at the sizes of that call."""
    params = {"A": normal(0, 2, 6, 8), "B": normal(1, 2, 6, 8), "C": normal(4, 2, 8, 6), "D": normal(5, 6, 3)}

    def f(p, x):
        def layer(h, w):
            return h + gate(h @ w[0], h @ w[1]) @ w[2], None

        return jax.lax.scan(layer, x, (p["A"], p["B"], p["C"]))[0] @ p["D"]

    shapes = []

    def evaluate(ev, eqn, args, path):
        shapes.append(args[0].shape)
        return [gate(*args)]

    def propagate(a, eqn, vals):
        for t, u in zip(vals[0].tags, vals[1].tags, strict=True):
            a.unify(t, u)
        return [a.value(eqn.outvars[0].aval, vals[0].tags, vals[0].zero)]

    graph = jprune.trace(f, params, X, rules={"pallas_call": jprune.Rule(propagate, evaluate=evaluate)})
    (group,) = graph.groups.values()
    assert group.shape == (2, 8)
    keep = {group.id: np.stack([np.arange(8) < 3, np.arange(8) < 5])}
    check_laws(f, params, (X,), keep=keep, graph=graph, gradients=False, stacked="unstack")
    assert {(5, 3), (5, 5)} <= set(shapes)


# -- constants that are folded -----------------------------------------------------------------------------------------


TABLE = np.linspace(1, 2, 8, dtype=np.float32)


@jax.custom_jvp
def times_table(z):
    """Closes over an array, and so does its derivative."""
    return jnp.square(z) * TABLE


@times_table.defjvp
def _(primals, tangents):
    return times_table(*primals), 3 * primals[0] * tangents[0] * TABLE


@jax.custom_vjp
def turned(z):
    return z * TABLE


turned.defvjp(lambda z: (turned(z), None), lambda _, g: (-g * TABLE,))


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h * TABLE,
        lambda h: h * jnp.cos(jnp.arange(8) / 3),
        lambda h: h * jnp.where(jnp.arange(8) < 4, 1.0, -1.0),
        lambda h: jax.nn.relu(h) * jnp.linspace(0.5, 1, 5)[:, None] * jnp.outer(jnp.arange(1.0, 6), TABLE),
        lambda h: h * TABLE * TABLE.sum() * jnp.arange(8.0).sum(),
        lambda h: jax.jit(lambda z: z * jnp.exp(-jnp.arange(8.0)))(h),
        lambda h: jax.lax.map(jax.jit(lambda z: z * TABLE), h),
        lambda h: jax.lax.scan(lambda z, _: (jnp.tanh(z) * TABLE * jnp.cos(jnp.arange(8.0)), None), h, None, length=2)[
            0
        ],
        lambda h: jax.lax.cond(h.sum() > 0, lambda z: z * TABLE, jnp.tanh, h),
        lambda h: jax.lax.map(times_table, h),
        lambda h: jax.lax.map(turned, h),
    ],
    ids=["captured", "computed", "mask", "outer", "numbers", "jit", "jit of a row", "scan", "cond", "jvp", "vjp"],
)
def test_constants_freeze_the_axes_they_meet_unless_they_are_folded(use):
    def f(p, x):
        return use(x @ p["A"]) @ p["C"]

    graph = jprune.trace(f, HIDDEN, X)
    assert not graph.groups and graph.leaves["A"].frozen[1].code in ("CONST_IOTA", "CONST_CAPTURED")
    folded = jprune.trace(f, HIDDEN, X, fold_constants=True)
    check_laws(f, HIDDEN, (X,), graph=folded)
    assert members(folded, "A:1") == {("A", 1), ("C", 0)} and folded.groups["A:1"].exact


def test_a_folded_constant_that_is_not_zero_counts_as_such():
    graph = jprune.trace(lambda p, x: (x @ p["A"] + TABLE).sum(-1), HIDDEN, X, fold_constants=True)
    assert not graph.groups["A:1"].exact
    exact = jprune.trace(lambda p, x: (x @ p["A"] * TABLE).sum(-1), HIDDEN, X, fold_constants=True)
    assert exact.groups["A:1"].exact


def rotate(z, size):
    """Rotary positions on (batch, time, heads, size): halves are rotated against each other."""
    angle = jnp.arange(z.shape[1])[:, None] * 1e2 ** (-jnp.arange(size // 2) / (size // 2))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(z, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def interleaved(z, size):
    """The other convention: neighbours (2j, 2j + 1) are rotated against each other."""
    angle = jnp.arange(z.shape[1])[:, None] * 1e2 ** (-jnp.arange(size // 2) / (size // 2))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.moveaxis(z.reshape(*z.shape[:-1], size // 2, 2), -1, 0)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(z.shape)


@pytest.mark.parametrize(
    ("turn", "pairs"),
    [
        (rotate, [[j, j + 4] for j in range(4)]),
        (interleaved, [[2 * j, 2 * j + 1] for j in range(4)]),
    ],
)
def test_rotated_pairs_are_units(turn, pairs):
    params = {"q": normal(0, 6, 16), "k": normal(1, 6, 16), "v": normal(2, 6, 16), "o": normal(3, 16, 6)}
    x = normal(7, 2, 5, 6)

    def f(p, x, size=8):
        b, t, _ = x.shape
        q, k, v = ((x @ p[n]).reshape(b, t, 2, size) for n in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", turn(q, size), turn(k, size)) / size**0.5
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(b, t, -1) @ p["o"]

    plain = check_laws(f, params, (x,))
    assert sorted(i.size for i in plain.groups.values()) == [2, 8]  # heads, value channels
    graph = check_laws(f, params, (x,), graph=jprune.trace(f, params, x, fold_constants=True), gradients=False)
    assert sorted(i.size for i in graph.groups.values()) == [2, 4, 8]
    group = next(i for i in graph.groups.values() if i.size == 4)
    assert {m.path for m in group.members} == {"q", "k"}
    for m in group.members:
        assert m.positions[:, :2].tolist() == pairs and m.positions[:, 2:].tolist() == [
            [a + 8 for a in pair] for pair in pairs
        ]
    # against the definition: the pair is cut from the kernels, and its frequency from the tables
    keep = {group.id: np.array([True, False, True, True])}
    small = graph.compact(params, keep)
    assert small["q"].shape == (6, 12)
    masked = {**params, **{n: params[n].at[:, np.ravel(group.members[0].positions[1])].set(0) for n in "qk"}}
    np.testing.assert_allclose(jax.jit(graph.replay(keep))(small, x), jax.jit(f)(masked, x), rtol=1e-5, atol=1e-6)
