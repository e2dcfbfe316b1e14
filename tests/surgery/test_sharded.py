"""Sharded parameters on four simulated devices: the slices of one device, on the mesh they came from."""

from pathlib import Path

import pytest
from four_devices import run_script

SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from laws import normal
import jprune

assert jax.device_count() == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
PARAMS = {
    "stem": normal(0, 6, 8), "bias": normal(1, 8),
    "up": normal(2, 4, 8, 16), "down": normal(3, 4, 16, 8), "head": normal(4, 8, 2),
}
SPECS = {
    "stem": P(None, "model"), "bias": P(), "up": P(None, "data", "model"),
    "down": P("data", "model"), "head": P(("data", "model"), None),
}

def network(p, x):
    def layer(h, w):
        return h + jax.nn.relu(h @ w[0]) @ w[1], None
    return jax.lax.scan(layer, x @ p["stem"] + p["bias"], (p["up"], p["down"]))[0] @ p["head"]

X = normal(9, 4, 6)
graph = jprune.trace(network, PARAMS, X)
STREAM, LOCAL = "down:2", "up:2"
assert set(graph.groups) == {STREAM, LOCAL}
keep = {STREAM: np.array([1, 0, 1, 0, 1, 0, 1, 0], bool), LOCAL: np.stack([np.roll(np.arange(16) < 6, 5 * k) for k in range(4)])}
uneven = {**keep, LOCAL: np.arange(16)[None] < np.array([[4], [6], [2], [6]])}
split = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in PARAMS.items()}
result = {"equal": [], "placed": []}

def compare(name, got, want, specs=SPECS):
    for k, x in got.items():
        same = x.shape == want[k].shape and bool((np.asarray(x) == np.asarray(want[k])).all())
        result["equal"].append((name, k, same))
        result["placed"].append((name, k, x.sharding.is_equivalent_to(NamedSharding(mesh, specs[k]), x.ndim)))
        assert isinstance(x.sharding, NamedSharding), (name, k, x.sharding)

for name, k in (("even", keep), ("uneven", uneven)):
    small = graph.compact(split, k)
    compare(name, small, graph.compact(PARAMS, k))
    compare(name + " expanded", graph.expand(small, k), graph.mask(PARAMS, k))
    compare(name + " masked", graph.mask(split, k), graph.mask(PARAMS, k))
    compare(name + " planned", graph.plan(k).apply(split), graph.compact(PARAMS, k))
    state = optax.adam(1e-2).init(split)[0]
    compare(name + " moments", graph.compact_like(state, k).mu, optax.adam(1e-2).init(graph.compact(PARAMS, k))[0].mu)

small = graph.compact(split, keep)
run = jax.jit(graph.replay(keep))
got, want = run(small, X), network(graph.mask(PARAMS, keep), X)
result["function"] = float(np.abs(got - want).max() / np.abs(want).max())
shards = {k: sorted({s.data.shape for s in x.addressable_shards}) for k, x in small.items()}
result["shards"] = shards
compare("whole", graph.compact(split, {}), PARAMS)

one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
there = graph.compact({k: jax.device_put(x, one) for k, x in PARAMS.items()}, keep)
result["stayed"] = all(x.sharding.device_set == {jax.devices()[3]} for x in there.values())

def message(keep, tree=split):
    try:
        graph.compact(tree, keep)
    except ValueError as e:
        return str(e)
    return "no error"

result["odd"] = message({STREAM: np.arange(8) < 7})
result["pair"] = message({STREAM: np.arange(8) < 6}, {**PARAMS, "head": split["head"]})
result["fits"] = message({STREAM: np.arange(8) < 6}, {**split, "head": PARAMS["head"]})
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result():
    return run_script(SCRIPT, Path(__file__).parent.parent)


def test_the_slices_are_those_of_one_device(result):
    assert len(result["equal"]) == 2 * 5 * 5 + 5
    assert [row for row in result["equal"] if not row[2]] == []
    assert result["function"] <= 1e-5


def test_every_leaf_stays_on_its_mesh(result):
    assert [row for row in result["placed"] if not row[2]] == []
    # each device really holds a part of the smaller array
    assert result["shards"] == {
        "stem": [[6, 2]],
        "bias": [[4]],
        "up": [[4, 2, 3]],
        "down": [[2, 3, 4]],
        "head": [[1, 2]],
    }
    assert result["stayed"]


def test_sizes_that_do_not_divide_name_leaf_and_remedy(result):
    assert "axis 0 of 'head' would have size 7" in result["odd"]
    assert "axis 0 of 'head' would have size 6" in result["pair"]
    assert "the 4 devices along mesh axes ('data', 'model') do not divide" in result["pair"]
    assert "allocate with multiple_of=4" in result["pair"]
    assert result["fits"] == "no error"
