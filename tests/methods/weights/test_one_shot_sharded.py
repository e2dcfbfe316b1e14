"""Wanda, SparseGPT and iCBS on four simulated devices: masks lie as their parameters do, one device chooses the same."""

from pathlib import Path

import pytest
from four_devices import run_script

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from laws import normal
import jprune
from jprune.importance.at_init import weight_magnitude
from jprune.methods.weights import magnitude, sparsegpt, wanda
from jprune.methods.weights.icbs import ICBSConfig, icbs, initial, orders_of
from jprune.surgery.kernels import weight_matrices

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
PARAMS = {"up": normal(0, 8, 16), "mid": normal(1, 16, 16), "head": normal(2, 16, 4)}
SPECS = {"up": P(None, "model"), "mid": P("data", "model"), "head": P("model", None)}
X = normal(3, 64, 8)
split = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in PARAMS.items()}
there = jax.device_put(X, NamedSharding(mesh, P("data", None)))

def fn(p, x):
    return jnp.tanh(jnp.tanh(x @ p["up"]) @ p["mid"]) @ p["head"]

graph = jprune.trace(fn, PARAMS, X)
leaves = ("up", "mid")
result = {"placed": [], "equal": [], "close": []}
for name, prune, pattern in (("wanda", wanda, "row"), ("wanda", wanda, "2:4"), ("sparsegpt", sparsegpt, "unstructured")):
    sparsity = None if pattern == "2:4" else 0.5
    one = prune(graph, PARAMS, [X], leaves, sparsity, pattern)
    other = prune(graph, split, [there], leaves, sparsity, pattern)
    for k in leaves:
        result["equal"].append([name, k, bool((np.asarray(one.masks[k]) == np.asarray(other.masks[k])).all())])
        result["close"].append([name, k, float(abs(np.asarray(one.params[k]) - np.asarray(other.params[k])).max())])
        result["placed"].append([name, k, other.masks[k].sharding.is_equivalent_to(split[k].sharding, 2)])

y = fn(PARAMS, X)
def losses(p, batch):
    return jnp.mean((fn(p, batch[0]) - batch[1]) ** 2, axis=-1)

config = ICBSConfig(steps=4, block_size=32, solver="descent", samples=64)
orders = orders_of(PARAMS, leaves, weight_matrices(graph, leaves))
ends = []
for params, batch in ((PARAMS, (X, y)), (split, (there, jax.device_put(y, there.sharding)))):
    masks = magnitude(graph, params, [], leaves, 0.7).masks
    state = initial(weight_magnitude(params, leaves), masks, config, orders)
    ends.append(icbs(losses, params, state, lambda k: batch, config, orders).state)
for k in leaves:
    result["equal"].append(["icbs", k, bool((np.asarray(ends[0].masks[k]) == np.asarray(ends[1].masks[k])).all())])
    result["placed"].append(["icbs", k, ends[1].masks[k].sharding.is_equivalent_to(split[k].sharding, 2)])
result["moved"] = int((ends[1].masks["mid"] != masks["mid"]).sum())
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result():
    return run_script(SCRIPT, Path(__file__).parents[2])


def test_one_device_chooses_the_same(result):
    assert len(result["equal"]) == 8 and [row for row in result["equal"] if not row[-1]] == []
    assert max(row[-1] for row in result["close"]) < 1e-4 and result["moved"] > 0


def test_masks_lie_where_their_parameters_do(result):
    assert len(result["placed"]) == 8 and [row for row in result["placed"] if not row[-1]] == []
