"""Groups against two brute-force searches that know nothing of tags, on functions that take every size from their leaves.

Which axes are cut together, and by how many positions: every way to shorten a few axes is tried, and kept if the Python
code still accepts the shapes and returns the outputs it returned before; those that contain no smaller way are groups.
Which positions: every choice of that many positions is tried, and kept if the Python code on the shortened leaves gives
what it gives on the whole leaves with zeros there; exactly one choice is left for every unit.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import normal

import jprune
from jprune.tracing.paths import flatten

X = normal(99, 5, 3)


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def two_layers(p, x):
    return jax.nn.silu(x @ p["A"] + p["b"]) @ p["C"]


def residual(p, x):
    h = jax.nn.silu(x @ p["A"])
    return (h + jax.nn.silu(h @ p["B"]) @ p["D"]) @ p["C"]


def concatenated(p, x):
    return jnp.concatenate([x @ p["A"], jnp.tanh(x @ p["B"])], -1) @ p["C"]


def twice(p, x):
    h = x @ p["A"]
    return jnp.concatenate([h, jax.nn.sigmoid(h)], -1) @ p["C"]


def flattened(p, x):
    h = jax.nn.silu(conv(x, p["A"]))
    return h.reshape(x.shape[0], -1) @ p["C"]


def gate(p, x):
    a, b = jnp.split(x @ p["A"], 2, -1)
    return (jax.nn.silu(a) * b) @ p["C"]


def depthwise(p, x):
    h = conv(jax.nn.silu(conv(x, p["A"])), p["K"], p["K"].shape[3])
    return (h * p["s"]).mean((1, 2)) @ p["C"]


def attention(p, x):
    """Grouped queries: q and o are (width, key-value heads, queries each, size) and its transpose."""
    q, k, v = jnp.einsum("te,ekgd->tkgd", x, p["q"]), x @ p["k"].swapaxes(0, 1), x @ p["v"].swapaxes(0, 1)
    a = jax.nn.softmax(jnp.einsum("tkgd,ksd->kgts", q, k))
    return jnp.einsum("kgts,ksd,kgde->te", a, v, p["o"])


def normed(p, x):
    """The mean of squares: the Python code would divide by the new width."""
    h = x @ p["A"]
    return (h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * p["s"]) @ p["C"]


def summed(p, x):
    """The same with the sum of squares, which has no width to divide by."""
    h = x @ p["A"]
    return (h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) + 1e-6) * p["s"]) @ p["C"]


def recurrent(p, x):
    """An LSTM over the rows of x."""

    def cell(state, x):
        h, c = state
        i, g, o, f = jnp.einsum("e,ekh->kh", x, p["x"]) + jnp.einsum("h,hkj->kj", h, p["h"]) + p["b"]
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zero = jnp.zeros(p["b"].shape[1])
    return jax.lax.scan(cell, (zero, zero), x)[0][0] @ p["C"]


def stacked(p, x):
    """Layers of one scan; shapes alone would also let whole layers go, which the library treats as its own question."""
    x = x @ p["E"]
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None), x, (p["A"], p["B"]))
    return x @ p["C"]


def tied(p, x):
    h = jnp.tanh(x @ p["A"])
    return jnp.tanh(h @ p["B"] @ p["B"].T) @ p["C"] + h @ p["C"]


class Case(NamedTuple):
    """A function, the shapes of its leaves, its input and the most positions one unit owns on all axes together."""

    function: Any
    shapes: dict
    x: Any = X
    most: int = 4


IMAGE = normal(98, 3, 2, 2, 3)
CASES = {
    "two layers": Case(two_layers, {"A": (3, 4), "b": (4,), "C": (4, 2)}),
    "residual": Case(residual, {"A": (3, 4), "B": (4, 5), "D": (5, 4), "C": (4, 2)}),
    "concatenated": Case(concatenated, {"A": (3, 3), "B": (3, 4), "C": (7, 2)}),
    "twice": Case(twice, {"A": (3, 4), "C": (8, 2)}),
    "flattened": Case(flattened, {"A": (1, 1, 3, 4), "C": (16, 2)}, IMAGE, 5),
    "gate": Case(gate, {"A": (3, 8), "C": (4, 2)}),
    "depthwise": Case(depthwise, {"A": (1, 1, 3, 4), "K": (1, 1, 1, 4), "s": (4,), "C": (4, 2)}, IMAGE),
    "attention": Case(attention, {"q": (3, 3, 3, 4), "k": (3, 3, 4), "v": (3, 3, 4), "o": (3, 3, 4, 2)}),
    "normed": Case(normed, {"A": (3, 4), "s": (4,), "C": (4, 2)}),
    "summed": Case(summed, {"A": (3, 4), "s": (4,), "C": (4, 2)}),
    "recurrent": Case(recurrent, {"x": (3, 4, 3), "h": (3, 4, 3), "b": (4, 3), "C": (3, 2)}, X, 5),
    "stacked": Case(stacked, {"E": (3, 4), "A": (3, 4, 5), "B": (3, 5, 4), "C": (4, 2)}, X, 5),
    "tied": Case(tied, {"A": (3, 4), "B": (4, 5), "C": (4, 2)}),
}


@functools.cache
def traced(name):
    case = CASES[name]
    params = {n: normal(i, *s) for i, (n, s) in enumerate(case.shapes.items())}
    return case, params, jprune.trace(case.function, params, case.x)


def ways_to_shorten(case):
    """{frozenset of (leaf, axis, positions)}: the smallest ways to shorten axes that leave the outputs' shapes alone."""
    axes = [(n, a) for n, s in case.shapes.items() for a, size in enumerate(s) if size > 1]
    whole = jax.eval_shape(case.function, structs(case.shapes), case.x)
    found: list[dict] = []
    for total in range(1, case.most + 1):
        for chosen in itertools.combinations_with_replacement(axes, total):
            cut = {a: chosen.count(a) for a in chosen}
            # an axis of one would broadcast, and what contains a smaller way is no smallest one
            if any(case.shapes[n][a] - k < 2 for (n, a), k in cut.items()):
                continue
            if any(all(cut.get(a, 0) >= k for a, k in way.items()) for way in found):
                continue
            shapes = {n: tuple(size - cut.get((n, a), 0) for a, size in enumerate(s)) for n, s in case.shapes.items()}
            if accepted(case, shapes, whole):
                found.append(cut)
    return {frozenset((n, a, k) for (n, a), k in way.items()) for way in found}


def structs(shapes):
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def accepted(case, shapes, whole):
    """Whether the Python code runs on leaves of these shapes and returns what it returned before."""
    try:
        got = jax.eval_shape(case.function, structs(shapes), case.x)
    except (TypeError, ValueError):  # what jax raises for shapes that do not fit
        return False
    return got == whole


def signature(group):
    """{(leaf, axis, positions per unit)} of a group."""
    return frozenset((m.path, m.axis, m.positions.shape[1]) for m in group.members)


@pytest.mark.parametrize("name", CASES)
def test_groups_are_the_smallest_ways_to_shorten_axes(name):
    case, _, graph = traced(name)
    assert sum(n for s in case.shapes.values() for n in s if n > 1) <= 60
    ways = ways_to_shorten(case)
    if name == "stacked":
        layers = frozenset({("A", 0, 1), ("B", 0, 1)})
        assert layers in ways and graph.leaves["A"].frozen[0].code == "SCAN_LENGTH"
        ways.remove(layers)
    assert {signature(g) for g in graph.groups.values()} == ways
    owned = {(n, a) for way in ways for n, a, _ in way}
    for path, leaf in graph.leaves.items():
        for axis, size in enumerate(leaf.shape):
            assert size == 1 or (path, axis) in owned or leaf.frozen[axis] is not None


# -- positions ---------------------------------------------------------------------------------------------------------


def removed(params, positions):
    """Leaves without these positions: {(leaf, axis): positions}."""
    for (n, a), at in positions.items():
        params = {**params, n: np.delete(params[n], at, a)}
    return params


def zeroed(params, positions):
    """Leaves with zeros at these positions."""
    for (n, a), at in positions.items():
        keep = np.ones(params[n].shape[a])
        keep[list(at)] = 0
        params = {**params, n: params[n] * keep.reshape([-1 if i == a else 1 for i in range(params[n].ndim)])}
    return params


def agreeing(case, params, choices):
    """Of many choices of positions, those at which zeros do the same as removal."""
    f = jax.jit(jax.vmap(lambda p: case.function(p, case.x)))
    params = {n: np.asarray(p) for n, p in params.items()}

    def run(change):
        many = [change(params, c) for c in choices]
        return np.asarray(f({n: np.stack([m[n] for m in many]).astype(np.float32) for n in params}))

    a, b = run(removed), run(zeroed)
    error = np.abs(a - b).reshape(len(choices), -1).max(axis=1) / np.abs(b).max()
    return [c for c, e in zip(choices, error, strict=True) if e < 1e-5]


def choices_of(case, group, unit):
    """Every choice of as many positions as the group's units own, with the unit's own first one on its first axis."""
    first, *others = group.members
    size = case.shapes[first.path][first.axis]
    start = int(first.positions[unit][0])
    k = first.positions.shape[1]
    options = [
        [(start, *rest) for rest in itertools.combinations([i for i in range(size) if i != start], k - 1)],
        *(
            list(itertools.combinations(range(case.shapes[m.path][m.axis]), m.positions.shape[1]))
            for m in others
        ),
    ]  # fmt: skip
    axes = [(m.path, m.axis) for m in group.members]
    return [dict(zip(axes, picks, strict=True)) for picks in itertools.product(*options)]


@pytest.mark.parametrize("name", [n for n in CASES if n != "normed"])
def test_units_own_the_only_positions_that_can_go_together(name):
    case, params, graph = traced(name)
    for group in graph.groups.values():
        assert group.exact
        for unit in range(0, group.size, 2):
            own = {(m.path, m.axis): tuple(m.positions[unit].tolist()) for m in group.members}
            choices = choices_of(case, group, unit)
            assert own in choices and len(choices) <= 2000
            left = agreeing(case, params, choices)
            assert [{a: tuple(sorted(at)) for a, at in c.items()} for c in left] == [own]


def test_removal_and_zeros_differ_where_only_replay_is_exact():
    """No choice of positions agrees: the code divides by the new width, and the group says so."""
    case, params, graph = traced("normed")
    (group,) = graph.groups.values()
    assert group.exact and not group.reconfigure_exact
    assert not agreeing(case, params, choices_of(case, group, 0))
    assert graph.verify(params, {group.id: np.arange(4) > 0}, X) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_replay_is_the_python_code_at_the_new_widths(name):
    """Several units of all groups at once."""
    case, params, graph = traced(name)
    keep = {g: np.arange(i.size) > 0 for g, i in graph.groups.items()}
    small = graph.compact(params, keep)
    for path, x in flatten(small):
        want = np.asarray(params[path])
        for axis in range(want.ndim):
            gone = [
                m.positions[0] for g in graph.groups.values() for m in g.members if (m.path, m.axis) == (path, axis)
            ]
            want = np.delete(want, np.unique(gone).astype(int), axis)
        np.testing.assert_array_equal(x, want)
    got, whole = jax.jit(graph.replay(keep))(small, case.x), jax.jit(case.function)
    if name != "normed":
        np.testing.assert_allclose(got, whole(small, case.x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, whole(graph.mask(params, keep), case.x), rtol=1e-5, atol=1e-6)
