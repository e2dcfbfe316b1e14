"""Where a zero stays a zero: every claim of the rules is compared with the primitive itself, evaluated at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from laws import check_values, members, normal

import jprune
from jprune.tracing.rules.elementwise import RULES, ZERO_LOST, ZERO_STAYS

X = normal(9, 5, 6)
ZEROS = jnp.zeros((3, 4))
INTEGERS = ("population_count", "clz", "not", "or", "xor", "and", "shift_left", "shift_right_logical",
            "shift_right_arithmetic", "nextafter")  # fmt: skip
UNARY = {
    name: getattr(lax, name)
    for name in (*ZERO_STAYS.split(), *ZERO_LOST.split())
    if hasattr(lax, name) and name not in ("conj", "bitcast_convert_type", *INTEGERS)
}


def claims(f, *operands, flags=None):
    """(zero the last equation claims for its result, the result) where the first operand is zero at a cut channel."""
    flags = flags or [True] + [False] * (len(operands) - 1)
    seen = []

    def spy(rule):
        def propagate(a, eqn, vals):
            seen.append(rule.propagate(a, eqn, vals))
            return seen[-1]

        return jprune.Rule(propagate)

    params = {"w": jnp.zeros((4,), operands[0].dtype)}
    rules = {n: spy(r) for n, r in RULES.items()}

    def g(p, *rest):
        full = [jnp.broadcast_to(p["w"], (3, 4)) if z else y for z, y in zip(flags, [None, *rest], strict=True)]
        return f(*full)

    jprune.trace(g, params, *operands[1:], rules=rules)
    return seen[-1][0].zero[-1], f(*operands)


@pytest.mark.parametrize("name", sorted(UNARY))
def test_functions_of_one_number(name):
    f, arity = UNARY[name], 1
    for arity in (1, 2, 3):
        try:
            value = f(*[ZEROS] * arity)
            break
        except TypeError:
            continue
    else:
        pytest.skip(f"{name} takes other arguments")
    if arity > 1:
        claimed = False  # comparisons and special functions of several numbers claim nothing
        assert name in ZERO_LOST.split()
    else:
        claimed, value = claims(f, ZEROS)
    assert not claimed or not np.asarray(value).any(), f"{name}(0) is {np.ravel(value)[0]}, and said to be 0"
    assert claimed == (name in ZERO_STAYS.split())


@pytest.mark.parametrize("y", [-2, -1, 0, 1, 2, 3])
def test_powers(y):
    claimed, value = claims(lambda x: lax.integer_pow(x, y), ZEROS)
    assert claimed == (y > 0) == (not np.asarray(value).any())
    claimed, value = claims(lambda x: lax.pow(x, float(y)), ZEROS)
    assert claimed == (y > 0) == (not np.asarray(value).any())


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "rem", "max", "min", "atan2", "pow", "or", "xor", "and"])
@pytest.mark.parametrize("flags", [(True, False), (True, True)])
def test_functions_of_two_numbers(name, flags):
    f = getattr(lax, {"or": "bitwise_or", "xor": "bitwise_xor", "and": "bitwise_and"}.get(name, name))
    kind = jnp.int32 if name in ("or", "xor", "and") else jnp.float32
    zeros, others = jnp.zeros((3, 4), kind), jnp.asarray([[-2, -1, 1, 3]] * 3, kind)
    if flags == (True, True) and name in ("div", "rem"):
        return  # 0 / 0 is the reader's own mistake, which `verify` names
    claimed, value = claims(f, zeros, zeros if flags[1] else others, flags=flags)
    assert not claimed or not np.asarray(value).any()
    assert claimed or name in ("add", "sub", "max", "min", "atan2", "pow", "or", "xor")


@pytest.mark.parametrize(("low", "high", "stays"), [(0.0, 6.0, True), (-1.0, 1.0, True), (0.5, 2.0, False)])
def test_clamp(low, high, stays):
    claimed, value = claims(lambda x: lax.clamp(low, x, high), ZEROS)
    assert claimed == stays == (not np.asarray(value).any())


def test_a_zero_raised_to_the_power_zero_is_one():
    """A known zero on the way: integer_pow makes ones of it, and they are added to what is cut."""
    params = {"a": normal(0, 6, 4)}

    def f(p, x):
        return (x @ p["a"] + lax.integer_pow(jnp.zeros((5, 4)), 0)).sum(-1)

    assert not jprune.trace(f, params, X).groups["a:1"].exact
    assert jprune.trace(lambda p, x: (x @ p["a"] + jnp.zeros((5, 4)) ** 2).sum(-1), params, X).groups["a:1"].exact


# -- along other axes: orderings, products, windows -------------------------------------------------------------------

CUBE = {"a": normal(0, 6, 4, 3), "out": normal(1, 3, 2)}

ALONG = {
    "cumsum": (lambda h: lax.cumsum(h, 1), True),
    "cumprod": (lambda h: lax.cumprod(h, 1), True),
    "cummax": (lambda h: lax.cummax(h, 1, reverse=True), True),
    "cummin": (lambda h: lax.cummin(h, 1), True),
    "cumlogsumexp": (lambda h: lax.cumlogsumexp(h, 1), False),
    "sort": (lambda h: lax.sort(h, dimension=1), True),
    "top_k": (lambda h: lax.top_k(h, 2, axis=1)[0], True),
    "top_k's places": (lambda h: lax.top_k(h, 2, axis=1)[1].astype(jnp.float32), False),
    "product": (lambda h: h.prod(1, keepdims=True), True),
    "largest": (lambda h: h.max(1, keepdims=True), True),
    "largest of a window": (lambda h: lax.reduce_window(
        h, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), ((0, 0), (1, 1), (0, 0))), True),
    "smallest of a window": (lambda h: lax.reduce_window(
        h, jnp.inf, lax.min, (1, 2, 1), (1, 2, 1), "VALID"), True),
    "sum of a window": (lambda h: lax.reduce_window(
        h, 0.0, lax.add, (1, 2, 1), (1, 1, 1), ((0, 0), (3, 0), (0, 0))), True),
    "padded with ones": (lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0)), constant_values=1.0), False),
    "padded with zeros": (lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0))), True),
    "rolled": (lambda h: jnp.roll(h, 1, 1), True),
    "where": (lambda h: jnp.where(h > 0, h, 0.0), True),
    "where not": (lambda h: jnp.where(h > 0, h, 1.0), False),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONG)
def test_what_is_done_along_one_axis_leaves_the_zeros_of_another(name):
    step, stays = ALONG[name]

    def f(p, x):
        return (step(jnp.einsum("be,etc->btc", x, p["a"])) ** 3).sum(-1)

    graph = jprune.trace(f, CUBE, X)
    channels = next(g for g, i in graph.groups.items() if ("a", 2) in members(graph, g))
    assert graph.groups[channels].exact == stays
    if stays:
        check_values(f, CUBE, (X,), keep={channels: np.arange(3) < 2}, graph=graph, alive=1e-6)

    def g(p, x):  # and where the zeros are not needed, everything is exact
        return step(jnp.einsum("be,etc->btc", x, p["a"])) @ p["out"]

    check_values(g, CUBE, (X,), keep={channels: np.arange(3) < 2}, alive=1e-6)


def test_a_window_of_padding_alone_is_not_zero():
    def f(p, x):
        h = jnp.einsum("be,etc->btc", x, p["a"])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), ((0, 0), (3, 0), (0, 0)))
        return jnp.maximum(h, -5.0).sum((1, 2))

    graph = jprune.trace(f, CUBE, X)
    assert not next(i for g, i in graph.groups.items() if ("a", 2) in members(graph, g)).exact


def test_the_axis_of_top_k_is_frozen_and_no_other():
    params = {"a": normal(0, 6, 4, 3), "out": normal(1, 3, 2)}
    graph = check_values(
        lambda p, x: lax.top_k(jnp.einsum("be,etc->btc", x, p["a"]), 2, axis=1)[0][:, 0] @ p["out"], params, (X,)
    )
    assert graph.leaves["a"].frozen[1].code == "ORDER_OR_MIX" and {g.size for g in graph.groups.values()} == {3}


# -- nothing left -----------------------------------------------------------------------------------------------------


def conv(x, k, groups=1, **more):
    return lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups, **more)  # fmt: skip


IMAGES = normal(3, 2, 4, 4, 3)


def heads(p, x):
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")
    return jnp.einsum("bhts,bshd,hdo->bto", jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)), v, p["o"])


EMPTY = {
    "depthwise": (
        {"a": (1, 1, 3, 8), "g": (3, 3, 1, 8), "o": (8, 4)},
        lambda p, x: conv(conv(x, p["a"]), p["g"], 8).mean((1, 2)) @ p["o"],
        IMAGES,
    ),
    "grouped": (
        {"a": (1, 1, 3, 8), "g": (3, 3, 2, 12), "o": (12, 4)},
        lambda p, x: conv(conv(x, p["a"]), p["g"], 4).mean((1, 2)) @ p["o"],
        IMAGES,
    ),
    "plain": (
        {"a": (3, 3, 3, 8), "b": (3, 3, 8, 6), "o": (6, 4)},
        lambda p, x: conv(conv(x, p["a"]), p["b"], rhs_dilation=(2, 2)).mean((1, 2)) @ p["o"],
        IMAGES,
    ),
    "heads": ({"q": (4, 2, 3), "k": (4, 2, 3), "v": (4, 2, 3), "o": (2, 3, 4)}, heads, normal(4, 2, 5, 4)),
    "embedding": (
        {"table": (7, 6), "o": (6, 4)},
        lambda p, x: jax.vmap(lambda i: p["table"][i])(x) @ p["o"],
        jnp.array([1, 4, 2]),
    ),
    "window": (
        {"a": (3, 8), "o": (8, 4)},
        lambda p, x: lax.reduce_window(
            x @ p["a"], -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").mean((1, 2)) @ p["o"],
        IMAGES,
    ),
    "normalised groups": (
        {"a": (3, 8), "s": (8,), "o": (8, 4)},
        lambda p, x: (jax.nn.standardize((x @ p["a"]).reshape(2, 4, 4, 4, 2), (1, 2, 4)).reshape(2, 4, 4, 8) * p["s"]).sum(
            (1, 2)) @ p["o"],
        IMAGES,
    ),
    "gate": (
        {"a": (3, 8), "o": (4, 4)},
        lambda p, x: (jax.nn.silu((x @ p["a"])[..., :4]) * (x @ p["a"])[..., 4:]).sum((1, 2)) @ p["o"],
        IMAGES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_groups_that_lose_everything_give_what_masking_gives(name):
    shapes, f, x = EMPTY[name]
    params = {n: normal(k, *s) for k, (n, s) in enumerate(shapes.items())}
    graph = jprune.trace(f, params, x)
    exact = [g for g, i in graph.groups.items() if i.exact and i.size > 1]
    assert exact, graph.explain()
    for group in exact:
        keep = {group: np.zeros(graph.groups[group].size, bool)}
        small = graph.compact(params, graph.decide(keep, allow_empty=True))
        want = f(graph.mask(params, keep), x)
        got = jax.jit(graph.replay(graph.decide(keep, allow_empty=True)))(small, x)
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5, err_msg=group)
        again = jprune.trace(graph.replay(graph.decide(keep, allow_empty=True)), small, x)
        assert again.cost() == graph.cost(keep), group


def test_experts_without_hidden_channels():
    params = {"up": normal(0, 3, 6, 8), "down": normal(1, 3, 8, 4)}
    sizes = jnp.array([3, 1, 1], jnp.int32)

    def f(p, x):
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes) + 1

    keep = {"up:2": np.zeros(8, bool)}
    graph = jprune.trace(f, params, X)
    got = jax.jit(graph.replay(graph.decide(keep, allow_empty=True)))(
        graph.compact(params, graph.decide(keep, allow_empty=True)), X
    )
    np.testing.assert_array_equal(got, f(graph.mask(params, keep), X))
