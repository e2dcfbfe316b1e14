"""Shapes at any widths: against compaction where narrower, against freshly built modules where wider."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.models import build, rebuild, resnet
from jprune.tracing.errors import KeepError, NotPrunable
from jprune.tracing.paths import flatten


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"] + p["bias"])
    return jnp.concatenate([h, jnp.tanh(x @ p["b"])], -1) @ p["c"]


PARAMS = {"a": jnp.ones((3, 4)), "bias": jnp.ones(4), "b": jnp.ones((3, 5)), "c": jnp.ones((9, 2))}
X = jnp.ones((6, 3))
GRAPH = jprune.trace(mlp, PARAMS, X)


def shapes(tree):
    return {p: tuple(leaf.shape) for p, leaf in flatten(tree)}


def test_leaves_grow_and_shrink_with_their_groups_concatenations_included():
    got = GRAPH.resize(PARAMS, {"a:1": 7, "b:1": np.int64(2)})
    assert shapes(got) == {"a": (3, 7), "bias": (7,), "b": (3, 2), "c": (9, 2)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    assert shapes(GRAPH.resize(PARAMS, {})) == shapes(PARAMS)


@given(st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_narrower_shapes_are_those_of_compaction(a, b):
    keep = {"a:1": np.arange(4) < a, "b:1": np.arange(5) < b}
    assert shapes(GRAPH.resize(PARAMS, {"a:1": a, "b:1": b})) == shapes(GRAPH.compact(PARAMS, keep))


@pytest.mark.parametrize(
    ("widths", "error", "says"),
    [
        ({"nothing": 3}, KeepError, "no group is called 'nothing'"),
        ({"c:1": 3}, NotPrunable, "may not be pruned"),
        ({"a:1": 0}, KeepError, "at least one unit"),
        ({"a:1": -2}, KeepError, "at least one unit"),
        ({"a:1": 2.0}, KeepError, "whole number"),
        ({"a:1": True}, KeepError, "whole number"),
        ({"a:1": np.array([2, 3])}, KeepError, "one width per layer"),
    ],
)
def test_widths_that_mean_nothing_are_refused(widths, error, says):
    with pytest.raises(error, match=says):
        GRAPH.resize(PARAMS, widths)


def test_a_tree_that_was_not_traced_is_refused():
    with pytest.raises(KeepError, match="was traced"):
        GRAPH.resize({**PARAMS, "bias": jnp.ones(5)}, {"a:1": 2})


def test_stacked_layers_get_one_width():
    def stacked(p, x):
        def layer(h, w):
            return h + jax.nn.relu(h @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    params = {"up": jnp.ones((2, 3, 8)), "down": jnp.ones((2, 8, 3))}
    graph = jprune.trace(stacked, params, X)
    (group,) = (g for g, i in graph.groups.items() if i.size == 8)
    got = graph.resize(params, {group: 11})
    assert shapes(got) == {"up": (2, 3, 11), "down": (2, 11, 3)}


@pytest.mark.parametrize(
    "name",
    [
        *("resnet20", "resnet18", "vgg16_bn", "vit_digits"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50", "mobilenet_v2_small", "shufflenet_v2_small")),
    ],
)
def test_the_zoo_is_rebuilt_at_other_widths_and_runs(name):
    module = build(name, 10)
    x = jnp.zeros((2, *((8, 8, 1) if name == "vit_digits" else (32, 32, 3))))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    graph = jprune.trace(module.apply, variables, x)
    for factor in (0.6, 1.7):
        widths = {g: max(1, round(i.size * factor)) for g, i in graph.groups.items()}
        target = graph.resize(variables, widths)
        other = rebuild(module, target)
        fresh = jax.eval_shape(other.init, jax.random.key(0), x)
        assert shapes(fresh) == shapes(target) != shapes(variables)
        assert jax.eval_shape(other.apply, fresh, x).shape == (2, 10)
        cost, again = graph.cost(widths=widths), jprune.trace(other.apply, fresh, x).cost()
        assert (cost.params, cost.macs, cost.state) == (again.params, again.macs, again.state)


def test_the_widened_module_is_the_one_built_wider():
    narrow, wide = resnet.small((1, 1, 1), widths=(4, 8, 16)), resnet.small((1, 1, 1), widths=(6, 12, 24))
    x = jnp.zeros((2, 8, 8, 1))
    variables = jax.eval_shape(narrow.init, jax.random.key(0), x)
    graph = jprune.trace(narrow.apply, variables, x)
    got = graph.resize(variables, {g: i.size * 3 // 2 for g, i in graph.groups.items()})
    assert rebuild(narrow, got) == wide
