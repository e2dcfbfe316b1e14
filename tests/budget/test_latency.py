"""Latency tables: with a clock that counts MACs the table is the cost polynomial itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.budget import LatencyTable, Target, allocate, measure_latency
from jprune.importance import random
from jprune.models import build


def counting(fn, args):
    """MACs of everything the function contracts, as a clock."""
    p = {str(i): a for i, a in enumerate(args)} if not isinstance(args[0], dict) else args[0]
    rest = () if not isinstance(args[0], dict) else args[1:]
    call = (lambda q: fn(*(q[str(i)] for i in range(len(args))))) if not rest else fn
    return float(jprune.trace(call, p, *rest).cost().macs)


@pytest.fixture(scope="module")
def resnet():
    model = build("resnet_digits")
    x = jnp.zeros((2, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    graph = jprune.trace(model.apply, variables, x)
    table = measure_latency(graph, model.apply, (variables, x), timer=counting, progress=False)
    return graph, model, variables, x, table


def test_a_clock_that_counts_gives_the_cost_polynomial(resnet):
    graph, _, _, _, table = resnet
    assert table.whole == graph.cost().macs
    assert table.scale == 1.0 and table.rest == 0.0
    rng = np.random.default_rng(0)
    for _ in range(5):
        widths = {g: int(rng.integers(max(1, i.size // 8), i.size + 1)) for g, i in graph.groups.items()}
        assert table(widths) == pytest.approx(graph.cost(widths=widths).macs, rel=1e-9)


@pytest.mark.parametrize("widths", [(9, 7), (11, 13), (27, 5), (3, 1)])
def test_widths_that_no_fraction_divides_are_measured_too(widths):
    """The share of a width comes out of different products, which differ in their last bits, in every row of the table."""

    def mlp(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]

    a, b = widths
    params = {"a": jnp.ones((3, a)), "b": jnp.ones((a, b)), "c": jnp.ones((b, 5))}
    x = jnp.ones((2, 3))
    graph = jprune.trace(mlp, params, x)
    table = measure_latency(graph, mlp, (params, x), timer=counting, progress=False)
    for share in (0.3, 0.6, 1.0):
        narrow = {g: max(1, round(share * i.size)) for g, i in graph.groups.items()}
        assert table(narrow) == pytest.approx(graph.cost(widths=narrow).macs, rel=1e-6)


def test_equal_shapes_are_timed_once(resnet):
    graph, model, variables, x, _ = resnet
    shapes = []

    def timer(fn, args):
        shapes.append(tuple(np.shape(a) for a in jax.tree.leaves(args)))
        return 1.0

    table = measure_latency(graph, model.apply, (variables, x), (0.5, 1.0), timer=timer, progress=False)
    points = sum(len(g.contracted) * len(g.free) for g in table.grids)
    assert len(shapes) < 0.7 * points  # repeated blocks have the same shapes


def test_a_latency_target_is_met_from_below(resnet):
    graph, _, _, _, table = resnet
    scores = random(graph, jax.random.key(1))
    for target, limit in (
        (Target.latency(table, 0.5), 0.5 * table({})),
        (Target.latency(table, 0.4 * table({}), absolute=True), 0.4 * table({})),
    ):
        found = allocate(graph, scores, target)
        assert found.achieved <= limit < found.achieved + found.next_unit
        assert table(found.widths) == pytest.approx(found.achieved)
        assert graph.cost(found.keep).macs == pytest.approx(found.achieved)


def test_stacked_layers_are_counted_once_each():
    def net(p, x):
        def layer(x, w):
            return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    p = {"up": jnp.ones((3, 4, 8)), "down": jnp.ones((3, 8, 4))}
    graph = jprune.trace(net, p, jnp.ones((2, 4)))
    table = measure_latency(graph, lambda p, x: x, (p, jnp.ones((2, 4))), timer=lambda f, a: 1.0, progress=False)
    assert table.scale * 6 == pytest.approx(table.whole)  # two products in each of three layers, 1 ms each
    counted = measure_latency(graph, net, (p, jnp.ones((2, 4))), timer=counting, progress=False)
    (g,) = graph.groups
    for widths in ({g: 4}, {g: np.array([8, 4, 2])}):
        assert counted(widths) == pytest.approx(graph.cost(widths=widths).macs)


def test_real_timings_survive_a_file(tmp_path):
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    p, x = {"a": jnp.ones((16, 32)), "b": jnp.ones((32, 8))}, jnp.ones((4, 16))
    graph = jprune.trace(net, p, x)
    table = measure_latency(graph, net, (p, x), (0.5, 1.0), progress=False)
    assert table({}) > 0 and table({"a:1": 16}) > 0
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json", graph)
    assert again == table and again({"a:1": 20}) == table({"a:1": 20})
    other = jprune.trace(lambda p, x: x @ p["a"], {"a": jnp.ones((16, 32))}, x)
    with pytest.raises(ValueError, match="another function"):
        LatencyTable.load(tmp_path / "table.json", other)
    (tmp_path / "table.json").write_text(json.dumps({"format": 9, "grids": []}))
    with pytest.raises(ValueError, match="format 9"):
        LatencyTable.load(tmp_path / "table.json", graph)
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(ValueError, match="not a latency table"):
        LatencyTable.load(tmp_path / "table.json", graph)


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0)])
def test_fractions_must_increase_to_one(resnet, fractions):
    graph, model, variables, x, _ = resnet
    with pytest.raises(ValueError, match="increase"):
        measure_latency(graph, model.apply, (variables, x), fractions, timer=counting)
