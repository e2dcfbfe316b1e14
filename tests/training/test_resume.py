"""A run that was killed goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import ToyCNN, init, small_dataset

from jprune.training import TrainConfig, train

# A read that fails leaves others behind, whose threads complain, in a later test, that orbax has closed its event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = TrainConfig(epochs=4, batch_size=16, checkpoint_every_steps=4)  # 6 steps an epoch: saves fall inside epochs
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))  # which share the threads, and so order sums
from conftest import ToyCNN, init, small_dataset
from jprune.training import TrainConfig, train
config = TrainConfig(epochs=4, batch_size=16, checkpoint_every_steps=4)
train(ToyCNN(), init(), small_dataset(), config, out=sys.argv[2], on_step=lambda *_: time.sleep(0.05))
"""


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_time(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, *train(ToyCNN(), init(), small_dataset(), CONFIG, out=out)


@pytest.fixture
def whole(tmp_path, finished):
    """(variables, history, metrics) of a whole run; its folder is `whole`."""
    out, trained, history = finished
    shutil.copytree(out, tmp_path / "whole")
    return trained, history, lines(out)


def test_killed_run_ends_with_the_same_bits(tmp_path, model, variables, dataset, whole):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out), str(jax.device_count())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )
    while not (out / "metrics.jsonl").exists() or len(lines(out)) < 12:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 12 <= len(lines(out)) < 28
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # as torn as a killed writer can leave it

    trained, history = train(model, variables, dataset, CONFIG, out=out, resume=True)
    assert_same_bits(trained, whole[0])
    assert without_time(history) == without_time(whole[1])
    assert without_time(lines(out)) == without_time(whole[2])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 11])
def test_an_exception_loses_nothing_either(tmp_path, model, variables, dataset, whole, stop_at):
    def stop(step, metrics):
        if step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        train(model, variables, dataset, CONFIG, out=tmp_path / "run", on_step=stop)
    trained, _ = train(model, variables, dataset, CONFIG, out=tmp_path / "run", resume=True)
    assert_same_bits(trained, whole[0])
    assert without_time(lines(tmp_path / "run")) == without_time(whole[2])


def test_every_saved_step_is_the_state_of_that_step(tmp_path, model, variables, dataset):
    """Steps give their buffers away while the checkpoint before is being written; it must not see that."""
    config = TrainConfig(epochs=2, batch_size=16, checkpoint_every_steps=1)
    whole, _ = train(model, variables, dataset, config)

    def stop(step, metrics):
        if step == 9:
            raise Stop

    with pytest.raises(Stop):
        train(model, variables, dataset, config, out=tmp_path, on_step=stop)
    trained, _ = train(model, variables, dataset, config, out=tmp_path, resume=True)
    assert_same_bits(trained, whole)


@pytest.mark.parametrize("bare", [False, True])
def test_other_optimisers_and_bare_trees_resume_too(tmp_path, model, variables, dataset, bare):
    def stop(step, metrics):
        if step == 8:
            raise Stop

    stats = variables["batch_stats"]
    fn, tree = (lambda p, x: model.apply({"params": p, "batch_stats": stats}, x)), variables["params"]
    args = (fn, tree, dataset, CONFIG) if bare else (model, variables, dataset, CONFIG)
    frozen = jax.tree_util.tree_map_with_path(lambda path, _: "Dense_0" in str(path), variables["params"])
    options = {"optimizer": optax.adam(1e-3), "transform": optax.masked(optax.set_to_zero(), frozen)}
    whole, _ = train(*args, **options)
    with pytest.raises(Stop):
        train(*args, **options, out=tmp_path, on_step=stop)
    trained, _ = train(*args, **options, out=tmp_path, resume=True)
    assert_same_bits(trained, whole)


def test_a_finished_run_is_returned_as_it_is(tmp_path, model, variables, dataset, whole):
    trained, history = train(model, variables, dataset, CONFIG, out=tmp_path / "whole", resume=True)
    assert_same_bits(trained, whole[0])
    assert history == whole[1] and lines(tmp_path / "whole") == whole[2]


def test_a_run_is_not_overwritten_or_mixed_with_another(tmp_path, model, variables, dataset, whole):
    out = tmp_path / "whole"
    with pytest.raises(ValueError, match="resume=True, or another folder"):
        train(model, variables, dataset, CONFIG, out=out)
    other = TrainConfig(epochs=4, batch_size=16, checkpoint_every_steps=4, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"learning_rate was 0.05, is 0.01"):
        train(model, variables, dataset, other, out=out, resume=True)
    with pytest.raises(ValueError, match="another optimiser"):
        train(model, variables, dataset, CONFIG, out=out, resume=True, optimizer=optax.adam(1e-3))
    assert lines(out) == whole[2]


def test_a_damaged_checkpoint_is_named(tmp_path, model, variables, dataset, whole):
    os.truncate(tmp_path / "whole" / "checkpoints" / "24" / "state" / "manifest.ocdbt", 10)
    with pytest.raises(ValueError, match=r"checkpoints/24 .*damaged.* delete it"):
        train(model, variables, dataset, CONFIG, out=tmp_path / "whole", resume=True)


def test_a_foreign_metrics_file_is_named(tmp_path, model, variables, dataset):
    (tmp_path / "metrics.jsonl").write_text("hello\nworld\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1"):
        train(model, variables, dataset, CONFIG, out=tmp_path)
