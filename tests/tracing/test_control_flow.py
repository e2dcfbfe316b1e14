"""Loops, branches, nested functions, custom derivatives, rematerialisation and state, all under the same laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, members, normal, relative

import jprune

X = normal(99, 5, 6)
HIDDEN = {"A": normal(0, 6, 8), "C": normal(4, 8, 3)}


# -- loops -------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_while_loop_runs_as_often_as_before():
    """The trip count depends on the values of the pruned stream; the cost of the body is counted once, and says so."""
    params = {"A": normal(0, 6, 8), "B": normal(1, 8, 10), "D": normal(2, 10, 8), "C": normal(4, 8, 3)}

    def f(p, x):
        def body(state):
            h, n = state
            return h + jax.nn.relu(h @ p["B"]) @ p["D"], n + 1

        h, n = jax.lax.while_loop(lambda s: (s[0] ** 2).sum() < 1e4, body, (x @ p["A"], 0))
        return h @ p["C"], n

    graph = check_laws(f, params, (X,), gradients=False)
    assert {g: i.size for g, i in graph.groups.items()} == {"A:1": 8, "B:1": 10}
    assert all(i.exact for i in graph.groups.values())
    assert "is counted once" in graph.explain() and "test_control_flow.py" in graph.loops_counted_once[0]
    assert graph.cost().macs == 5 * (6 * 8 + 2 * 8 * 10 + 8 * 3)
    counts = {int(jax.jit(graph.replay(k))(graph.compact(params, k), X)[1])
              for k in ({}, {"A:1": np.arange(8) < 3}, {"A:1": np.arange(8) == 1})}  # fmt: skip
    assert len(counts) > 1  # it did depend on what was kept


def test_a_loop_with_static_bounds_is_differentiable():
    params = {"A": normal(0, 6, 8), "B": normal(1, 8, 10), "D": normal(2, 10, 8), "C": normal(4, 8, 3)}

    def f(p, x):
        return jax.lax.fori_loop(0, 4, lambda i, h: h + 0.3 * jnp.tanh(h @ p["B"]) @ p["D"], x @ p["A"]) @ p["C"]

    graph = check_laws(f, params, (X,))
    assert graph.cost().macs == 5 * (6 * 8 + 4 * 2 * 8 * 10 + 8 * 3)
    assert graph.cost({"B:1": np.arange(10) < 4}).macs == 5 * (6 * 8 + 4 * 2 * 8 * 4 + 8 * 3)


LATE = {  # what is nonzero at removed positions only from a later turn of the loop on
    "first turn": lambda h: jax.lax.fori_loop(0, 3, lambda i, z: jax.nn.sigmoid(z), h),
    "third turn": lambda h: jax.lax.fori_loop(0, 3, lambda i, s: (s[1], s[2], jax.nn.sigmoid(s[2])), (h, h, h))[0],
    "while": lambda h: jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[2], s[2] + 1.0), (0, h, h)
    )[1],
    "scan": lambda h: jax.lax.scan(lambda s, x: ((s[1], jnp.cos(s[1])), None), (h, h), jnp.arange(3.0))[0][0],
    "stacked results": lambda h: jax.lax.scan(lambda s, x: (jnp.exp(s), s), h, None, length=3)[1].sum(0),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_a_carry_that_becomes_nonzero_later_is_found_out(name):
    def f(p, x):
        return LATE[name](x @ p["A"]).sum(-1)

    graph = jprune.trace(f, HIDDEN, X)
    keep = {"A:1": np.arange(8) < 4}
    assert not graph.groups["A:1"].exact and "test_control_flow.py" in graph.groups["A:1"].notes[0]
    assert graph.verify(HIDDEN, graph.decide(keep, allow_inexact=True), X) > 1e-2  # and it was indeed inexact
    exact = check_laws(lambda p, x: LATE[name](x @ p["A"]) @ p["C"], HIDDEN, (X,), gradients=name != "while")
    assert exact.groups["A:1"].exact  # where the next kernel owns the axis it does no harm


def test_recurrent_networks_share_their_weights_over_time():
    """An LSTM: the fused gates own four columns a unit, the carry and the recurrent rows belong to the same unit."""
    params = {"x": normal(0, 6, 32), "h": normal(1, 8, 32), "b": normal(2, 32), "out": normal(3, 8, 3)}
    sequence = normal(4, 7, 5, 6)

    def f(p, xs):
        def cell(state, x):
            h, c = state
            i, g, o, forget = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4, -1)
            c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((xs.shape[1], 8))
        return jax.lax.scan(cell, (zero, zero), xs)[1] @ p["out"]

    graph = check_laws(f, params, (sequence,))
    (group,) = graph.groups.values()
    assert members(graph, group.id) == {("x", 1), ("h", 0), ("h", 1), ("b", 0), ("out", 0)}
    gates = next(m for m in group.members if m.path == "b")
    assert gates.positions.tolist() == [[j, j + 8, j + 16, j + 24] for j in range(8)]
    assert group.layers is None


def test_reverse_scans_and_loops_in_loops():
    params = {"A": normal(0, 6, 8), "W": normal(1, 3, 8, 8), "C": normal(2, 8, 3)}

    def f(p, x):
        def layer(h, w):
            return jax.lax.fori_loop(0, 2, lambda i, z: jnp.tanh(z @ w) + h, h), h.mean(0)

        h, means = jax.lax.scan(layer, x @ p["A"], p["W"], reverse=True)
        return h @ p["C"], means @ p["C"]

    graph = check_laws(f, params, (X,))
    assert list(graph.groups) == ["A:1"]
    assert graph.cost().macs == 5 * 6 * 8 + 3 * 2 * 5 * 8 * 8 + 5 * 8 * 3 + 3 * 8 * 3


# -- branches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_branches_tie_their_results_and_the_dearest_is_paid(sign):
    params = {"A": normal(0, 6, 8), "B": normal(1, 8, 10), "D": normal(2, 10, 8), "s": normal(3, 8), "C": HIDDEN["C"]}

    def f(p, x):
        h = x @ p["A"]
        h = jax.lax.cond(
            sign * x.sum() > 0, lambda z: jax.nn.relu(z @ p["B"]) @ p["D"], lambda z: jnp.tanh(z) * p["s"], h
        )
        return h @ p["C"]

    graph = check_laws(f, params, (X,), keep={"A:1": np.arange(8) % 3 > 0, "B:1": np.arange(10) % 2 > 0})
    assert {g: i.size for g, i in graph.groups.items()} == {"A:1": 8, "B:1": 10}
    assert members(graph, "A:1") == {("A", 1), ("B", 0), ("D", 1), ("s", 0), ("C", 0)}
    assert graph.cost().macs == 5 * (6 * 8 + 2 * 8 * 10 + 8 * 3)


def test_a_switch_of_three_branches():
    params = {"A": normal(0, 6, 8), "W": normal(1, 2, 8, 8), "C": HIDDEN["C"]}

    def f(p, x, which):
        branches = [jnp.tanh, lambda h: h @ p["W"][0], lambda h: jax.nn.relu(h @ p["W"][1])]
        return jax.lax.switch(which, branches, x @ p["A"]) @ p["C"]

    for which in range(3):
        graph = check_laws(f, params, (X, jnp.int32(which)), keep={"A:1": np.arange(8) % 3 > 0})
    assert members(graph, "A:1") == {("A", 1), ("W", 1), ("W", 2), ("C", 0)}


def test_one_branch_that_is_not_zero_at_zero_makes_the_result_inexact():
    def f(p, x):
        return jax.lax.cond(x.sum() > 0, jnp.tanh, jnp.cos, x @ p["A"]).sum(-1)

    assert not jprune.trace(f, HIDDEN, X).groups["A:1"].exact


def test_a_vectorised_branch_is_a_selection():
    def f(p, x):
        return jax.vmap(lambda h: jax.lax.cond(h.sum() > 0, jnp.tanh, lambda z: 0.5 * z, h))(x @ p["A"]) @ p["C"]

    assert check_laws(f, HIDDEN, (X,)).groups["A:1"].exact


# -- functions in functions --------------------------------------------------------------------------------------------


@jax.jit
def helper(x, w):
    return jax.nn.relu(x) * w


@pytest.mark.smoke
def test_one_jitted_helper_at_two_widths():
    """jax keeps one jaxpr for both calls, as their shapes agree; after pruning they no longer do."""
    params = {"A": normal(0, 6, 8), "s": normal(1, 8), "B": normal(2, 8, 8), "t": normal(3, 8), "C": HIDDEN["C"]}

    def f(p, x):
        return helper(helper(x @ p["A"], p["s"]) @ p["B"], p["t"]) @ p["C"]

    keep = {"A:1": np.arange(8) < 3, "B:1": np.arange(8) < 5}
    graph = check_laws(f, params, (X,), keep=keep)
    calls = [e.params["jaxpr"] for e in graph.jaxpr.jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert len(calls) == 2 and calls[0] is calls[1]  # else this test shows nothing
    assert members(graph, "A:1") == {("A", 1), ("s", 0), ("B", 0)}
    assert members(graph, "B:1") == {("B", 1), ("t", 0), ("C", 0)}


def test_one_helper_inside_a_helper_at_three_widths():
    @jax.jit
    def inner(x):
        return jax.nn.silu(x) * jax.nn.sigmoid(x)

    @jax.jit
    def layer(x, w, v):
        return inner(inner(x @ w) @ v)

    params = {f"{n}{i}": normal(10 * i + ord(n), 8, 8) for i in range(2) for n in "wv"} | {"C": HIDDEN["C"]}

    def f(p, x):
        return layer(layer(x, p["w0"], p["v0"]), p["w1"], p["v1"]) @ p["C"]

    keep = {f"{n}:1": np.arange(8) < k for n, k in {"w0": 3, "v0": 5, "w1": 4, "v1": 6}.items()}
    graph = check_laws(f, params, (normal(7, 5, 8),), keep=keep, alive=1e-3)
    assert sorted(graph.groups) == ["v0:1", "v1:1", "w0:1", "w1:1"]


def test_a_jitted_function_that_donates_its_arguments():
    f = jax.jit(lambda p, x: jax.nn.relu(x @ p["A"]) @ p["C"], donate_argnums=0)
    graph = jprune.trace(f, HIDDEN, X)
    keep = {"A:1": np.arange(8) % 2 == 0}
    small = graph.compact(HIDDEN, keep)
    want = jax.nn.relu(X @ HIDDEN["A"][:, ::2]) @ HIDDEN["C"][::2]
    run = jax.jit(graph.replay(keep))
    for _ in range(2):  # replay inlines the call: nothing is taken from the caller
        np.testing.assert_allclose(run(small, X), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_rematerialisation_stays(policy):
    params = {"A": normal(0, 6, 8), "B": normal(1, 8, 10), "D": normal(2, 10, 8), "C": HIDDEN["C"]}

    def f(p, x):
        block = jax.checkpoint(lambda h: h + jnp.sin(h @ p["B"]) @ p["D"], policy=policy)
        return block(block(x @ p["A"])) @ p["C"]

    graph = check_laws(f, params, (X,))
    keep = {"B:1": np.arange(10) < 4}
    small = graph.compact(params, keep)
    inside = [e.primitive.name for e in jax.make_jaxpr(graph.replay(keep))(small, X).jaxpr.eqns]
    assert sum(n in ("checkpoint", "remat2", "remat") for n in inside) == 2


# -- derivatives of the author's own -----------------------------------------------------------------------------------


def test_relu_keeps_its_derivative_at_zero():
    """The derivative of max(x, 0) at 0 is 1/2; jax.nn.relu says 0, and so has its replay to."""
    params = {"A": jnp.zeros((6, 8)), "b": jnp.zeros(8), "C": normal(4, 8, 3)}
    graph = jprune.trace(lambda p, x: jax.nn.relu(x @ p["A"] + p["b"]) @ p["C"], params, X)
    keep = {"A:1": np.arange(8) < 5}
    small = graph.compact(params, keep)
    gradient = jax.jit(jax.grad(lambda p: graph.replay(keep)(p, X).sum()))(small)
    np.testing.assert_array_equal(gradient["b"], np.zeros(5))
    # forward mode as well, and the reverse of what a bare maximum gives
    tangents = {**jax.tree.map(jnp.zeros_like, small), "b": jnp.ones(5)}
    np.testing.assert_array_equal(jax.jvp(lambda p: graph.replay(keep)(p, X), (small,), (tangents,))[1], 0)
    bare = jax.grad(lambda p: (jnp.maximum(X @ p["A"] + p["b"], 0) @ p["C"]).sum())(small)
    assert np.abs(bare["b"]).min() > 0


@jax.custom_vjp
def rounded(x):
    """Rounding whose derivative is that of the identity (a straight-through estimator)."""
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def test_a_straight_through_estimator_keeps_its_derivative():
    params = {"A": 5 * normal(0, 6, 8), "C": normal(4, 8, 3)}

    def f(p, x):
        return rounded(x @ p["A"]) @ p["C"]

    graph = check_laws(f, params, (X,))
    keep = {"A:1": np.arange(8) < 5}
    small = graph.compact(params, keep)
    gradient = jax.jit(jax.grad(lambda p: graph.replay(keep)(p, X).sum()))(small)["A"]
    want = X.T @ (jnp.ones((5, 3)) @ small["C"].T)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


@jax.custom_vjp
def scaled_gate(x, s):
    return jax.nn.sigmoid(s) * x


def _scaled_gate_forward(x, s):
    return scaled_gate(x, s), (x, s, jax.nn.sigmoid(s))


def _scaled_gate_backward(saved, g):
    x, s, y = saved
    doubled = jnp.broadcast_to(jnp.full((), 2.0), x.shape)  # holds the traced sizes: they have to shrink
    return doubled * g * y, jnp.clip((g * x).sum(0), -0.5, 0.5) * jnp.ones(s.shape)


scaled_gate.defvjp(_scaled_gate_forward, _scaled_gate_backward)


def test_a_custom_derivative_with_residuals_runs_at_the_small_sizes():
    params = {"A": normal(0, 6, 8), "s": normal(1, 8), "C": normal(4, 8, 3)}

    def f(p, x):
        return scaled_gate(x @ p["A"], p["s"]) @ p["C"]

    graph = check_laws(f, params, (X,))
    keep = {"A:1": np.arange(8) < 5}
    small = graph.compact(params, keep)
    grads = jax.jit(jax.grad(lambda p: graph.replay(keep)(p, X).sum()))(small)
    cotangent = jnp.ones((5, 3)) @ small["C"].T
    want = np.clip((cotangent * (X @ small["A"])).sum(0), -0.5, 0.5)
    np.testing.assert_allclose(grads["s"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["A"], X.T @ (2 * cotangent * jax.nn.sigmoid(small["s"])), rtol=1e-5, atol=1e-5)


def test_a_custom_forward_derivative_keeps_its_author_s_values():
    @jax.custom_jvp
    def soft(x):
        return jnp.log1p(jnp.square(x))

    @soft.defjvp
    def _(primals, tangents):
        return soft(*primals), 3.0 * tangents[0] * jnp.ones(primals[0].shape)

    params = {"A": normal(0, 6, 8), "C": normal(4, 8, 3)}
    graph = check_laws(lambda p, x: soft(x @ p["A"]) @ p["C"], params, (X,))
    keep = {"A:1": np.arange(8) < 5}
    small = graph.compact(params, keep)
    gradient = jax.jit(jax.grad(lambda p: graph.replay(keep)(p, X).sum()))(small)["A"]
    np.testing.assert_allclose(gradient, 3 * X.T @ (jnp.ones((5, 3)) @ small["C"].T), rtol=1e-5, atol=1e-5)


def test_custom_derivatives_inside_loops_and_branches():
    params = {"A": normal(0, 6, 8), "W": normal(1, 2, 8, 8), "C": normal(4, 8, 3)}

    def f(p, x):
        def layer(h, w):
            h = jax.checkpoint(lambda z: jax.nn.relu(z @ w) + rounded(z))(h)
            return jax.lax.cond(h.sum() > 0, jax.nn.relu6, jax.nn.silu, h), None

        return jax.lax.scan(layer, x @ p["A"], p["W"])[0] @ p["C"]

    check_laws(f, params, (X,))


# -- state -------------------------------------------------------------------------------------------------------------


def running(p, x):
    """A layer that returns its updated running mean under the path it came in by."""
    h = x @ p["A"]
    mean = 0.9 * p["stats"]["mean"] + 0.1 * h.mean(0)
    return {"y": (h - p["stats"]["mean"]) @ p["C"], "stats": {"mean": mean}}


STATEFUL = {**HIDDEN, "stats": {"mean": normal(5, 8)}}


def test_state_that_is_returned_shrinks_with_its_leaf():
    graph = jprune.trace(running, STATEFUL, X, is_param=lambda p: not p.startswith("stats"))
    assert members(graph, "A:1") == {("A", 1), ("stats/mean", 0), ("C", 0)} and graph.groups["A:1"].exact
    keep = {"A:1": np.arange(8) % 2 == 0}
    small = graph.compact(STATEFUL, keep)
    out = jax.jit(graph.replay(keep))(small, X)
    want = running(graph.mask(STATEFUL, keep), X)
    assert out["stats"]["mean"].shape == (4,)
    np.testing.assert_allclose(out["stats"]["mean"], want["stats"]["mean"][::2], rtol=1e-5, atol=1e-6)
    assert relative(out["y"], want["y"]) < 1e-5
    assert graph.verify(STATEFUL, keep, X) < 1e-5
    # and the step can be taken again with what it returned
    out = jax.jit(graph.replay(keep))({**small, "stats": out["stats"]}, X)
    assert out["stats"]["mean"].shape == (4,)


def test_state_of_another_name_is_an_output_unless_it_is_declared_free():
    def f(p, x):
        out = running(p, x)
        return {"y": out["y"], "new": out["stats"]["mean"]}

    graph = jprune.trace(f, STATEFUL, X)
    assert "A:1" not in graph.groups and graph.leaves["A"].frozen[1].code == "MODEL_OUTPUT"
    graph = jprune.trace(f, STATEFUL, X, output_free=[("new", 0)])
    keep = {"A:1": np.arange(8) < 3}
    out = jax.jit(graph.replay(keep))(graph.compact(STATEFUL, keep), X)
    assert out["new"].shape == (3,) and out["y"].shape == (5, 3)
    with pytest.raises(jprune.TraceError, match=r"output_free names.*nwe.*the outputs are.*'new' with 1 axes"):
        jprune.trace(f, STATEFUL, X, output_free=[("nwe", 0)])


def test_outputs_that_only_happen_to_have_a_leaf_s_place_and_shape_keep_their_sizes():
    """Neither a bare matrix nor the first of a tuple is state that returns: no name says so."""
    square, x = normal(0, 6, 6), normal(1, 6, 6)
    assert not jprune.trace(lambda w, x: x @ w, square, x).groups
    assert not jprune.trace(lambda p, x: (x @ p[0], x.sum()), [square], x).groups
    assert not jprune.trace(lambda p, x: (x.sum(), (x @ p[0], 1.0)), [square], x).groups


def test_state_that_is_written_but_never_read_shrinks_with_what_replaces_it():
    """A layer's last statistics: training writes them, and only evaluation reads them."""

    def f(p, x):
        h = x @ p["A"]
        return {"y": h @ p["C"], "last": h.mean(0)}

    params = {**HIDDEN, "last": jnp.zeros(8)}
    graph = jprune.trace(f, params, X)
    assert members(graph, "A:1") == {("A", 1), ("C", 0), ("last", 0)}
    assert not graph.leaves["last"].used and "last axis 0 [written]" in graph.explain()
    keep = {"A:1": np.arange(8) < 5}
    small = graph.compact(params, keep)
    assert small["last"].shape == graph.replay(keep)(small, X)["last"].shape == (5,)
    assert graph.verify(params, keep, X) < 1e-5


def hidden_layer(p, x):
    return jax.nn.relu(x @ p["A"])


ACTIVATIONS = {  # each is returned under the name, and happens to have the shape and type, of a leaf that is read
    "in a flat tree": (lambda p, x: {"y": hidden_layer(p, x) @ p["C"], "A": hidden_layer(p, x)}, normal(3, 6, 6)),
    "of another input axis": (lambda p, x: {"A": hidden_layer(p, x), "C": p["C"] * 2}, normal(3, 6, 6)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_with_a_leaf_s_name_and_shape_keeps_its_size(name):
    f, x = ACTIVATIONS[name]
    graph = jprune.trace(f, HIDDEN, x)
    keep = {g: np.arange(i.size) < 5 for g, i in graph.groups.items()}
    assert graph.replay(keep)(graph.compact(HIDDEN, keep), x)["A"].shape == (6, 8)
    assert graph.leaves["A"].frozen[1].code == "MODEL_OUTPUT"


def test_a_whole_collection_that_is_returned_is_state_whatever_it_is_computed_from():
    def step(p, x):
        h = x @ p["A"] + p["carry"]["h"]
        return h @ p["C"], {"carry": {"h": jnp.tanh(h).mean(0), "n": p["carry"]["n"] + 1}}

    params = {**HIDDEN, "carry": {"h": jnp.zeros(8), "n": jnp.zeros(())}}
    graph = jprune.trace(step, params, X)
    keep = {"A:1": np.arange(8) < 5}
    assert ("carry/h", 0) in members(graph, "A:1")
    assert graph.replay(keep)(graph.compact(params, keep), X)[1]["carry"]["h"].shape == (5,)


def test_state_that_only_another_mode_reads_is_cut_along():
    """Evaluation reads the averages; training also reads biased ones beside them, and a copy of the weights exists."""
    params = {
        "params": {"up": {"w": HIDDEN["A"], "b": normal(6, 8)}, "out": {"w": HIDDEN["C"]}},
        "stats": {"up": {"average": normal(7, 8), "hidden": normal(8, 8), "count": jnp.zeros((), jnp.int32)}},
        "last": {"up": {"mean": normal(9, 8)}},
        "slow": {"up": {"w": HIDDEN["A"], "b": normal(6, 8)}, "out": {"w": HIDDEN["C"]}},
        "other": {"table": normal(1, 8, 8)},
    }

    def f(v, x):
        p = v["params"]
        return jax.nn.relu(x @ p["up"]["w"] + p["up"]["b"] - v["stats"]["up"]["average"]) @ p["out"]["w"]

    graph = jprune.trace(f, params, X)
    keep = {"params/up/w:1": np.arange(8) % 2 == 0}
    small = graph.compact(params, keep)
    for tree in (small["params"], small["slow"]):
        assert tree["up"]["w"].shape == (6, 4) and tree["up"]["b"].shape == (4,) and tree["out"]["w"].shape == (4, 3)
    np.testing.assert_array_equal(small["slow"]["up"]["w"], HIDDEN["A"][:, ::2])
    assert small["stats"]["up"]["hidden"].shape == small["last"]["up"]["mean"].shape == (4,)
    assert small["other"]["table"].shape == (8, 8) and graph.leaves["other/table"].frozen[0].code == "UNUSED"
    assert "stats/up/hidden axis 0 [unread; follows stats/up/average]" in graph.explain()
    assert "params/up/w:1" in graph.groups, "groups are named after what the function reads"


def test_unread_parameters_beside_read_ones_stay_whole():
    """A second bias of the same length may belong to another layer of another mode: nothing says which."""
    params = {"params": {"net": {"A": HIDDEN["A"], "C": HIDDEN["C"], "b": jnp.ones(8), "b2": jnp.ones(8)}}}

    def f(v, x):
        p = v["params"]["net"]
        return jax.nn.relu(x @ p["A"] + p["b"]) @ p["C"]

    graph = jprune.trace(f, params, X)
    small = graph.compact(params, {"params/net/A:1": np.arange(8) < 3})["params"]["net"]
    assert small["b"].shape == (3,) and small["b2"].shape == (8,)


def test_averages_of_a_flat_tree_and_twins_of_a_tree_without_collections():
    """What lies under the parameters' own paths is a copy of them; two towers built alike are not."""
    flat = {"params": {"A": HIDDEN["A"], "C": HIDDEN["C"]}, "slow": {"A": HIDDEN["A"], "C": HIDDEN["C"]}}
    graph = jprune.trace(lambda v, x: hidden_layer(v["params"], x) @ v["params"]["C"], flat, X)
    small = graph.compact(flat, {"params/A:1": np.arange(8) < 3})
    assert jax.tree.map(jnp.shape, small["slow"]) == jax.tree.map(jnp.shape, small["params"])
    towers = {"image": {"net": {**HIDDEN, "b": jnp.ones(8)}}, "text": {"net": {**HIDDEN, "b": jnp.ones(8)}}}
    graph = jprune.trace(lambda v, x: hidden_layer(v["image"]["net"], x) @ v["image"]["net"]["C"], towers, X)
    small = graph.compact(towers, {"image/net/A:1": np.arange(8) < 3})
    assert jax.tree.map(jnp.shape, small["text"]) == jax.tree.map(jnp.shape, towers["text"])
