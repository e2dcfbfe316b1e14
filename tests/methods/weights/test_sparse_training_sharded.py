"""Sparse training on four simulated devices: masks lie as their parameters do, no leaf is gathered, one device agrees."""

from pathlib import Path

import pytest
from four_devices import run_script

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from four_devices import most_moved
from laws import normal
from jprune.methods.weights.sparse_training import SET, Magnitude, MaskSteps, RigL, masks_of, sparsify

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
PARAMS = {"up": normal(0, 8, 16), "down": normal(1, 16, 8), "bias": normal(2, 16)}
SPECS = {"up": P("data", "model"), "down": P(("data", "model"), None), "bias": P("model")}
split = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in PARAMS.items()}
result = {"placed": [], "moved": {}, "equal": []}

def placed(name, masks, like=split):
    result["placed"] += [(name, k, m.sharding.is_equivalent_to(like[k].sharding, 2)) for k, m in masks.items()]

for name, method, steps, how in (
    ("RigL", RigL(0.5), MaskSteps("constant", 0, 4, 2), {}),
    ("SET", SET(0.5), MaskSteps("constant", 0, 4, 2), {"pattern": "row"}),
    ("global", Magnitude(normalise=True), MaskSteps("cubic", 0, 3), {"pattern": "model"}),
    ("2:4", Magnitude(), MaskSteps("linear", 0, 2), {"pattern": "2:4"}),
):
    tx = sparsify(optax.adam(1e-2), None if name == "2:4" else 0.75, method, steps, **how)
    gradient = {k: jnp.roll(x, 1, 0) for k, x in PARAMS.items()}

    @jax.jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(split)
    placed(name + " at first", masks_of(state))
    if name in ("RigL", "global"):
        placed(name + " at first, jitted", masks_of(jax.jit(tx.init)(split)))
    there = {k: jax.device_put(g, split[k].sharding) for k, g in gradient.items()}
    result["moved"][name] = most_moved(step.lower(there, state, split).compile())
    one, other = (PARAMS, tx.init(PARAMS)), (split, state)
    for _ in range(4):
        one = step(gradient, one[1], one[0])
        other = step(there, other[1], other[0])
    placed(name + " at last", masks_of(other[1]))
    result["equal"] += [(name, k, bool((np.asarray(a) == np.asarray(masks_of(other[1])[k])).all()))
                        for k, a in masks_of(one[1]).items()]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result():
    return run_script(SCRIPT, Path(__file__).parents[2])


def test_masks_lie_where_their_parameters_do(result):
    assert len(result["placed"]) == 20 and [row for row in result["placed"] if not row[-1]] == []


def test_no_leaf_is_gathered(result):
    assert set(result["moved"]) == {"RigL", "SET", "global", "2:4"}
    assert max(result["moved"].values()) <= 4  # one number of each device, of leaves with 128


def test_one_device_chooses_the_same(result):
    assert len(result["equal"]) == 8 and [row for row in result["equal"] if not row[-1]] == []
