"""The cost polynomial: XLA's own count, exact differences, soft widths, sizes beyond 32 and 53 bits."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import normal
from scipy.signal import correlate

import jprune


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, k, padding="VALID", groups=1, stride=1):
    return jax.lax.conv_general_dilated(
        x, k, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def flops(fn, *args):
    """What XLA counts for the compiled function."""
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


# functions of contractions only; without padding XLA counts what the polynomial counts
PURE = {
    "two products": (lambda p, x: (x @ p["a"]) @ p["b"], {"a": (6, 8), "b": (8, 3)}, (5, 6)),
    "batched product": (lambda p, x: jnp.einsum("bti,hij->bhtj", x, p["a"]), {"a": (3, 6, 4)}, (2, 5, 6)),
    "activations": (
        lambda p, x: jnp.einsum("bti,bsi->bts", x @ p["a"], x @ p["b"]),
        {"a": (6, 4), "b": (6, 4)},
        (2, 5, 6),
    ),
    "valid convolutions": (
        lambda p, x: conv(conv(x, p["a"]), p["b"], stride=2),
        {"a": (3, 3, 2, 8), "b": (2, 2, 8, 4)},
        (2, 8, 8, 2),
    ),
    "grouped convolution": (lambda p, x: conv(x, p["a"], groups=2), {"a": (3, 3, 3, 8)}, (2, 6, 6, 6)),
    "depthwise convolution": (lambda p, x: conv(x, p["a"], groups=6), {"a": (3, 3, 1, 6)}, (2, 6, 6, 6)),
}


@pytest.mark.parametrize("name", PURE)
def test_macs_are_half_of_the_flops_that_xla_counts(name):
    f, shapes, x = PURE[name]
    params = {k: struct(*s) for k, s in shapes.items()}
    graph = jprune.trace(f, params, struct(*x))
    assert 2 * graph.cost().macs == flops(f, params, struct(*x))
    keep = {g: np.arange(i.size) >= i.size // 2 for g, i in graph.groups.items() if i.size > 1}
    if keep:
        assert 2 * graph.cost(keep).macs == flops(graph.replay(keep), graph.compact(params, keep), struct(*x))


def test_padding_positions_count_as_work():
    # the convention of the literature: every output pixel costs all taps; XLA leaves the padding out
    params, x = {"k": struct(3, 3, 2, 4)}, struct(2, 5, 5, 2)
    graph = jprune.trace(lambda p, x: conv(x, p["k"], "SAME"), params, x)
    assert graph.cost().macs == 2 * 25 * 9 * 2 * 4
    inside = correlate(np.ones((5, 5)), np.ones((3, 3)), mode="same").sum()  # taps that meet a pixel
    assert flops(lambda p, x: conv(x, p["k"], "SAME"), params, x) == 2 * 2 * inside * 2 * 4


LAYERS = 4


def decoder(p, tokens):
    def layer(h, w):
        up, down = w
        return h + jax.nn.relu(h @ up) @ down, None

    return jax.lax.scan(layer, p["embed"][tokens], (p["up"], p["down"]))[0] @ p["head"]


def decoder_shapes(width=8, hidden=12, layers=LAYERS, words=11, dtype=jnp.float32):
    shapes = {
        "embed": (words, width),
        "up": (layers, width, hidden),
        "down": (layers, hidden, width),
        "head": (width, words),
    }
    return {k: struct(*s, dtype=dtype) for k, s in shapes.items()}


def by_hand(width, hidden, layers=LAYERS, words=11, tokens=10):
    """(macs, params) with one hidden width per layer."""
    hidden = [hidden] * layers if np.ndim(hidden) == 0 else [int(h) for h in hidden]
    inner = sum(2 * width * h for h in hidden)
    return tokens * (inner + width * words), inner + 2 * width * words


GRAPH = jprune.trace(decoder, decoder_shapes(), struct(2, 5, dtype=jnp.int32))
WIDTH, HIDDEN = "down:2", "up:2"


def test_a_stacked_decoder_by_hand():
    assert {g: i.shape for g, i in GRAPH.groups.items()} == {WIDTH: (8,), HIDDEN: (LAYERS, 12)}
    for width, hidden in ((8, 12), (5, 7), (1, 1), (3, np.array([1, 12, 5, 2]))):
        cost = GRAPH.cost(widths={WIDTH: width, HIDDEN: hidden})
        assert (cost.macs, cost.params) == by_hand(width, hidden)
        assert cost.bytes == 4 * cost.params and cost.state == 0
        rows = [hidden] * LAYERS if np.ndim(hidden) == 0 else hidden
        assert cost.activation_bytes == 4 * 10 * (sum(int(h) + width for h in rows) + 11)
        assert all(type(getattr(cost, n)) is int for n in ("macs", "params", "bytes", "activation_bytes"))


def test_uneven_layers_cost_what_they_keep_or_what_padding_makes_of_them():
    keep = {HIDDEN: np.arange(12)[None] < np.array([1, 12, 5, 2])[:, None]}
    assert GRAPH.cost(keep).macs == by_hand(8, 12)[0]
    assert GRAPH.cost(GRAPH.decide(keep, stacked="bucket")).macs == by_hand(8, [1, 12, 5, 2])[0]
    assert GRAPH.widths(keep) == {WIDTH: 8, HIDDEN: 12}
    np.testing.assert_array_equal(GRAPH.widths(GRAPH.decide(keep, stacked="unstack"))[HIDDEN], [1, 12, 5, 2])


def test_state_and_mixed_precision_bytes():
    variables = {
        "params": {"a": struct(6, 8, dtype=jnp.bfloat16), "b": struct(8, 3)},
        "batch_stats": {"mean": struct(8)},
    }
    graph = jprune.trace(
        lambda v, x: (x @ v["params"]["a"] - v["batch_stats"]["mean"]) @ v["params"]["b"], variables, struct(5, 6)
    )
    cost = graph.cost(widths={"params/a:1": 5})
    assert (cost.params, cost.state, cost.bytes) == (6 * 5 + 5 * 3, 5, 2 * 30 + 4 * 15 + 4 * 5)
    assert cost.activation_bytes == 4 * (5 * 5 + 5 * 3)


def convolutional():
    shapes = {"a": (3, 3, 2, 8), "b": (3, 3, 8, 6), "c": (1, 1, 6, 8), "d": (128, 5)}

    def f(p, x):
        h = jax.nn.relu(conv(x, p["a"], "SAME"))
        h = h + conv(jax.nn.relu(conv(h, p["b"], "SAME")), p["c"])
        return h.reshape(h.shape[0], -1) @ p["d"]

    return jprune.trace(f, {k: struct(*s) for k, s in shapes.items()}, struct(2, 4, 4, 2))


CNN = convolutional()


@pytest.mark.parametrize("graph", [CNN, GRAPH], ids=["convolutional", "decoder"])
def test_layer_costs_add_up(graph):
    rng = np.random.default_rng(0)
    for keep in (None, {g: rng.permutation(i.size) < 3 for g, i in graph.groups.items()}):
        rows = graph.layer_costs(keep)
        assert sum(r.macs for r in rows) == graph.cost(keep).macs
        assert all(r.macs > 0 and r.primitive in ("dot_general", "conv_general_dilated") for r in rows)
    assert {r.name for r in CNN.layer_costs()} == set("abcd")
    assert {r.name: r.out_widths for r in CNN.layer_costs()}["b"] == (2, 4, 4, 6)


@pytest.mark.parametrize("graph", [CNN, GRAPH], ids=["convolutional", "decoder"])
def test_the_last_unit_costs_the_difference_of_two_counts(graph):
    rng = np.random.default_rng(1)
    for _ in range(5):
        widths = {g: int(rng.integers(2, i.size + 1)) for g, i in graph.groups.items()}
        last = graph.marginal_cost(widths)
        assert set(last) == set(graph.groups)
        for g, costs in last.items():
            now, less = graph.cost(widths=widths), graph.cost(widths={**widths, g: widths[g] - 1})
            for field, value in costs.items():
                assert value == getattr(now, field) - getattr(less, field) and type(value) is int
            assert costs["macs"] > 0 and costs["params"] > 0
    assert graph.marginal_cost() == graph.marginal_cost({g: i.size for g, i in graph.groups.items()})


@pytest.mark.parametrize("graph", [CNN, GRAPH], ids=["convolutional", "decoder"])
def test_soft_widths_are_differentiable(graph):
    fields = ("macs", "params", "bytes", "activation_bytes")
    widths = {g: 0.7 * i.size for g, i in graph.groups.items()}
    for field in fields:
        grads = jax.jit(jax.grad(lambda w, field=field: getattr(graph.cost(widths=w), field)))(widths)
        for g in graph.groups:
            # the cost is linear in one width alone, so the central difference is exact
            up, down = (getattr(graph.cost(widths={**widths, g: widths[g] + d}), field) for d in (1, -1))
            assert float(grads[g]) == pytest.approx((up - down) / 2, rel=1e-5)
    pair = list(graph.groups)[:2]
    mixed = jax.hessian(lambda w: graph.cost(widths=w).macs)(widths)[pair[0]][pair[1]]
    corners = {
        (a, b): graph.cost(widths={**widths, pair[0]: widths[pair[0]] + a, pair[1]: widths[pair[1]] + b}).macs
        for a, b in itertools.product((0, 1), repeat=2)
    }
    assert float(mixed) == pytest.approx(corners[1, 1] - corners[1, 0] - corners[0, 1] + corners[0, 0], rel=1e-4)


def test_soft_widths_per_layer():
    soft = jnp.asarray([2.5, 11.0, 6.25, 1.0])
    cost = jax.jit(lambda h: GRAPH.cost(widths={HIDDEN: h, WIDTH: 8}).macs)(soft)
    assert float(cost) == pytest.approx(10 * (2 * 8 * float(soft.sum()) + 8 * 11), rel=1e-6)
    grad = jax.grad(lambda h: GRAPH.cost(widths={HIDDEN: h}).macs)(soft)
    np.testing.assert_allclose(grad, np.full(4, 10 * 2 * 8), rtol=1e-6)


def test_sizes_of_large_language_models_stay_exact():
    width, hidden, layers, words, tokens = 4096 + 1, 11008 + 1, 32, 32001, 4096 * 1025
    graph = jprune.trace(
        decoder, decoder_shapes(width, hidden, layers, words, jnp.bfloat16), struct(1025, 4096, dtype=jnp.int32)
    )
    (inner,) = [g for g, i in graph.groups.items() if i.layers]
    (stream,) = [g for g, i in graph.groups.items() if not i.layers]
    cost = graph.cost()
    macs, params = by_hand(width, hidden, layers, words, tokens)
    assert macs > 2**53  # beyond where a double is sure to be exact
    assert (cost.macs, cost.params, cost.bytes) == (macs, params, 2 * params)
    per_layer = np.arange(hidden - layers, hidden)
    for vector in (per_layer, per_layer.astype(np.int32), jnp.asarray(per_layer)):
        cost = graph.cost(widths={inner: vector, stream: np.int32(width - 2)})
        assert (cost.macs, cost.params) == by_hand(width - 2, per_layer, layers, words, tokens)
    assert (
        graph.cost(widths={stream: jnp.asarray(width - 2)}).macs == by_hand(width - 2, hidden, layers, words, tokens)[0]
    )
    traced = jax.jit(lambda w: graph.cost(widths={stream: w}).macs)(width - 2)
    assert float(traced) == pytest.approx(by_hand(width - 2, hidden, layers, words, tokens)[0], rel=1e-6)
    last = graph.marginal_cost({inner: per_layer})
    assert last[inner]["params"] == 2 * width * layers


def test_nested_scans_multiply():
    def f(p, x):
        def outer(h, w):
            return jax.lax.scan(lambda h, _: (h + jax.nn.relu(h @ w[0]) @ w[1], None), h, length=5)[0], None

        return jax.lax.scan(outer, x, (p["a"], p["b"]))[0]

    graph = jprune.trace(f, {"a": struct(3, 6, 8), "b": struct(3, 8, 6)}, struct(2, 6))
    assert graph.cost().macs == 3 * 5 * 2 * 2 * 6 * 8
    (g,) = graph.groups
    assert graph.cost(widths={g: np.array([8, 4, 1])}).macs == 5 * 2 * 2 * 6 * (8 + 4 + 1)
    assert graph.cost(widths={g: np.array([8, 4, 1])}).params == 2 * 6 * (8 + 4 + 1)


def test_unknown_groups_and_truth_values_are_refused():
    with pytest.raises(jprune.KeepError, match=r"'upp:2'; did you mean 'up:2'"):
        GRAPH.cost(widths={"upp:2": 3})
    with pytest.raises(ValueError, match="not a truth value"):
        GRAPH.cost(widths={HIDDEN: True})
    with pytest.raises(jprune.KeepError, match=r"shape \(5,\)"):
        GRAPH.cost({WIDTH: np.ones(5, bool)})


def test_while_loops_are_named():
    def f(p, x):
        return jax.lax.while_loop(lambda h: h.sum() < 10, lambda h: h @ p["a"] + 1, x)

    params = {"a": normal(0, 4, 4)}
    graph = jprune.trace(f, params, struct(2, 4))
    assert graph.cost().macs == 2 * 4 * 4
    assert len(graph.loops_counted_once) == 1 and "test_cost.py" in graph.loops_counted_once[0]


# -- branches: the dearest one is paid for, at the widths asked about ---------------------------------------------------


def two_ways(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ p["a"]) @ p["b"], lambda: jnp.tanh(x @ p["c"]) @ p["d"])


WAYS = {"a": normal(0, 3, 10), "b": normal(1, 10, 2), "c": normal(2, 3, 9), "d": normal(3, 9, 2)}


@pytest.mark.parametrize(("a", "c"), [(10, 9), (2, 9), (9, 9), (8, 9), (10, 1)])
def test_a_cond_costs_its_dearest_branch_after_pruning(a, c):
    x = normal(4, 5, 3)
    graph = jprune.trace(two_ways, WAYS, x)
    keep = {"a:1": np.arange(10) < a, "c:1": np.arange(9) < c}
    cost = graph.cost(keep)
    assert cost.macs == 5 * (3 + 2) * max(a, c)
    again = jprune.trace(graph.replay(keep), graph.compact(WAYS, keep), x)
    assert dataclasses.astuple(again.cost()) == dataclasses.astuple(cost)
    assert sum(row.macs for row in graph.layer_costs(keep)) == cost.macs
    soft = jax.jit(lambda w: graph.cost(widths=w).macs)({"a:1": jnp.float32(a), "c:1": jnp.float32(c)})
    assert float(soft) == cost.macs


def test_every_layer_of_a_scan_pays_for_its_own_dearest_branch():
    layers = {k: jnp.stack([v, v + 1, v - 1]) for k, v in WAYS.items()}
    layers = {**layers, "b": jnp.ones((3, 10, 3)), "d": jnp.ones((3, 9, 3))}

    def f(p, x):
        return jax.lax.scan(lambda h, w: (h + two_ways(w, h), None), x, p)[0]

    x = normal(4, 5, 3)
    graph = jprune.trace(f, layers, x)
    kept = {"a:2": (10, 2, 5), "c:2": (9, 7, 5)}
    keep = {g: np.arange(graph.groups[g].size) < np.array(n)[:, None] for g, n in kept.items()}
    by_hand = sum(5 * (3 + 3) * max(a, c) for a, c in zip(*kept.values(), strict=True))
    assert graph.cost(graph.decide(keep, stacked="unstack")).macs == by_hand
    again = jprune.trace(
        graph.replay(graph.decide(keep, stacked="unstack")),
        graph.compact(layers, graph.decide(keep, stacked="unstack")),
        x,
    )
    assert again.cost().macs == by_hand
    assert graph.cost(keep).macs == 3 * 5 * 6 * 10  # padded to the widest
