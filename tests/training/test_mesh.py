"""Data parallelism on four simulated devices: the trajectory of one device."""

from pathlib import Path

import numpy as np
import pytest
from four_devices import run_script

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from conftest import ToyCNN, init, small_dataset
from jprune.training import TrainConfig, evaluate, train

assert jax.device_count() == 4
config, data, model, variables = TrainConfig(epochs=3, batch_size=32), small_dataset(), ToyCNN(), init()

def run(mesh, variables=variables):
    losses = []
    trained, history = train(model, variables, data, config, mesh=mesh, on_step=lambda s, m: losses.append(m["loss"]))
    return losses + [history[-1]["test_loss"], evaluate(model, trained, data, 7, mesh=mesh).loss], trained

one, _ = run(None)
four, _ = run(Mesh(np.array(jax.devices()), ("data",)))
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
kernel = variables["params"]["Dense_0"]["kernel"]
variables["params"]["Dense_0"]["kernel"] = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("model", None)))
split, trained = run(mesh, variables)
spec = trained["params"]["Dense_0"]["kernel"].sharding.spec
try:
    train(model, init(), data, TrainConfig(batch_size=30), mesh=Mesh(np.array(jax.devices()), ("data",)))
except ValueError as e:
    error = str(e)
print(json.dumps({"one": one, "four": four, "split": split, "spec": str(spec), "error": error}))
"""


@pytest.fixture(scope="module")
def result():
    return run_script(SCRIPT, Path(__file__).parent)


def test_four_devices_follow_the_trajectory_of_one(result):
    assert len(result["one"]) == 11 and result["one"][8] < result["one"][0]
    np.testing.assert_allclose(result["four"], result["one"], rtol=0, atol=1e-4)


def test_a_sharded_parameter_stays_sharded_and_changes_nothing(result):
    assert "model" in result["spec"]
    np.testing.assert_allclose(result["split"], result["one"], rtol=0, atol=1e-4)


def test_a_batch_that_does_not_divide_is_named(result):
    assert "batch_size 30 does not divide over 4 devices" in result["error"]
