"""Training of any loss: closed forms of linear regression, micro-batches, runs that go on to the bit, examples in docstrings."""

import doctest
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import same_numbers

from jprune.training import TuningConfig, accumulated, clipped, fit, run_steps
from jprune.training.state import init_state
from jprune.training.steps import Epochs

ROWS, WIDTH = 12, 4
RNG = np.random.default_rng(0)
X, NOISE = RNG.normal(size=(5, ROWS, WIDTH)).astype(np.float32), 0.1 * RNG.normal(size=(5, ROWS)).astype(np.float32)
Y = X @ np.float32([1, -2, 3, 0.5]) + NOISE
START = {"w": np.zeros(WIDTH, np.float32), "b": np.float32(0)}
CONFIG = TuningConfig(9, 0.05, "cosine", warmup=0.3, clip=0.7, weight_decay=0.1, accumulate=3)


def batches(step):
    return {"x": X[step % 5], "y": Y[step % 5]}


def regression(params, batch, key, scale):
    """Mean squared error of a line, and the mean prediction."""
    said = scale * (batch["x"] @ params["w"]) + params["b"]
    return jnp.mean((said - batch["y"]) ** 2), {"mean": jnp.mean(said)}


def noisy(params, batch, key, scale):
    """The same with noise on the inputs, which depends on the key."""
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return regression(params, {**batch, "x": x}, key, scale)


run = functools.partial(fit, params=START, batches=batches, config=CONFIG, frozen=(np.float32(2.0),), progress=False)


def test_regression_follows_numpy():
    """AdamW with clipping, warm-up, half a cosine and decoupled decay, written out in float64."""
    got, losses = run(regression)
    w, b, m, v, want = np.zeros(WIDTH), 0.0, np.zeros(WIDTH + 1), np.zeros(WIDTH + 1), []
    for t in range(9):
        x, y = 2.0 * X[t % 5].astype(np.float64), Y[t % 5].astype(np.float64)
        error = x @ w + b - y
        want.append(np.mean(error**2))
        g = np.append(2 * x.T @ error, 2 * error.sum()) / ROWS
        g *= min(1, 0.7 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        direction = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        rate = 0.05 * min((t + 1) / 3, 1) * 0.5 * (1 + np.cos(np.pi * max(t - 3, 0) / 6))
        w, b = w - rate * (direction[:-1] + 0.1 * w), b - rate * (direction[-1] + 0.1 * b)
    same_numbers({"w": got["w"], "b": got["b"]}, {"w": w, "b": b}, terms=9 * ROWS * WIDTH)
    same_numbers(np.float32(losses), np.array(want), terms=9 * ROWS * WIDTH)
    assert not START["w"].any()


def test_micro_batches_are_the_whole_batch():
    whole, losses = run(regression, config=TuningConfig(9, 0.05))
    parts, same = run(regression, config=TuningConfig(9, 0.05, accumulate=4))
    same_numbers(parts, whole, terms=9 * ROWS * WIDTH)
    same_numbers(np.float32(same), np.float32(losses), terms=9 * ROWS * WIDTH)
    with pytest.raises(ValueError, match="12 rows cannot be cut into 5"):
        run(regression, config=TuningConfig(9, accumulate=5))


def test_accumulated_and_clipped():
    """Everything that is returned is averaged, in float32, and every part has a key of its own."""

    def of(part, key):
        return {"mean": part.mean(), "low": jnp.bfloat16(1.5), "n": 1, "drawn": jax.random.uniform(key)}

    got = accumulated(of, np.arange(6.0, dtype=np.float32), 3, jax.random.key(1))
    drawn = [float(jax.random.uniform(k)) for k in jax.random.split(jax.random.key(1), 3)]
    assert {k: float(v) for k, v in got.items()} == {
        "mean": 2.5, "low": 1.5, "n": 1.0, "drawn": pytest.approx(np.mean(drawn))
    }  # fmt: skip
    assert {v.dtype for v in got.values()} == {jnp.dtype("float32")} and len(set(drawn)) == 3
    small, norm = clipped({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, 1.0)
    np.testing.assert_allclose([small["a"][0], small["b"][0], norm], [0.6, 0.8, 5.0], rtol=1e-6)
    np.testing.assert_array_equal(clipped({"a": jnp.array([0.3, 0.4])}, 1.0)[0]["a"], np.float32([0.3, 0.4]))


class Stop(Exception):
    pass


def stop_at(last):
    def on_step(step, metrics):
        if step == last:
            raise Stop

    return on_step


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed between checkpoints; its metrics are those of a whole run too, and a finished run is returned as it is."""
    seen = []
    want, losses = run(noisy, out=tmp_path / "whole", on_step=lambda step, metrics: seen.append((step, metrics)))
    with pytest.raises(Stop):
        run(noisy, out=tmp_path / "killed", save_every=2, on_step=stop_at(6))
    got, rest = run(noisy, out=tmp_path / "killed", save_every=2, resume=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert rest == losses[4:]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert lines == [{"kind": "step", "step": step, **metrics} for step, metrics in seen]
    assert seen[0][1].keys() == {"loss", "gradient_norm", "mean"} and [s for s, _ in seen] == list(range(1, 10))
    again, none = run(noisy, out=tmp_path / "whole", resume=True)
    jax.tree.map(np.testing.assert_array_equal, again, want)
    assert none == []
    with pytest.raises(ValueError, match="holds a run, up to step 9: give resume=True"):
        run(noisy, out=tmp_path / "whole")
    with pytest.raises(ValueError, match="another recipe"):
        run(noisy, out=tmp_path / "whole", resume=True, recipe={"data": "other"})


def test_what_belongs_to_the_run_is_in_its_checkpoints(tmp_path):
    """Of two masks, the resumed run has the one that it began with."""

    def masked(params, batch, key, scale, mask):
        return regression({**params, "w": params["w"] * mask}, batch, key, scale)

    mask = np.float32([1, 0, 1, 1])
    want, _ = run(masked, rest={"mask": mask})
    assert want["w"][1] == 0 and want["w"][0] != 0
    with pytest.raises(Stop):
        run(masked, rest={"mask": mask}, out=tmp_path, save_every=3, on_step=stop_at(5))
    got, _ = run(masked, rest={"mask": 1 - mask}, out=tmp_path, save_every=3, resume=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_optimiser_of_your_own():
    """One with a rate of its own, and one that is given the recipe's."""
    config = TuningConfig(4, 0.5, "constant", clip=float("inf"))
    own, _ = run(regression, config=config, optimizer=optax.sgd(0.5))
    given = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda grads, state, params=None, *, learning_rate, **_: (
            jax.tree.map(lambda g: -learning_rate * g, grads),
            state,
        ),
    )
    same_numbers(run(regression, config=config, optimizer=given)[0], own, terms=4 * ROWS * WIDTH)
    w, b = np.zeros(WIDTH), 0.0
    for t in range(4):
        x, error = 2.0 * X[t], 2.0 * X[t] @ w + b - Y[t]
        w, b = w - x.T @ error / ROWS, b - error.mean()
    same_numbers(own, {"w": w, "b": b}, terms=4 * ROWS * WIDTH)


def test_a_loss_that_is_no_loss_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the loss has the shape \(4,\): it must be a scalar"):
        run(lambda params, batch, key, scale: batch["x"] @ params["w"])
    with pytest.raises(ValueError, match="the loss is nan at step 1: lower the learning rate"):
        run(regression, frozen=(np.float32(np.inf),), out=tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        run(regression, out=tmp_path / "file")
    with pytest.raises(ValueError, match="needs out="):
        run(regression, resume=True)


def test_one_compilation_serves_equal_losses():
    traces = []

    def counting(params, batch, key, scale):
        traces.append(scale)
        return regression(params, batch, key, scale)

    run(counting, config=TuningConfig(2))
    run(counting, config=TuningConfig(3, 0.1, "cosine", seed=4), frozen=(np.float32(1.0),))
    assert len(traces) == 1


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch, key, scale):
        return regression(params, batch, key, scale)


def test_a_loss_that_does_not_hash_works():
    jax.tree.map(np.testing.assert_array_equal, run(Unhashable())[0], run(regression)[0])


def count(state, step, batch):
    return state._replace(params=state.params + batch, step=state.step + 1), {"loss": np.float32(batch)}


def test_the_loop_knows_steps_and_epochs_only(tmp_path):
    """Its state is a sum, its batches end too early or at the right place, its epochs change the state."""

    def end(state, epoch):
        return state._replace(params=10 * state.params), {"of": epoch}

    def counted(steps, **more):
        state = init_state(np.int32(0), {}, ())
        return run_steps(state, count, lambda start: range(start + 1, 7), steps, recipe={}, **more)

    done = counted(6, epochs=Epochs(3, 2, end))
    assert int(done.state.params) == 10 * (10 * (1 + 2 + 3) + 4 + 5 + 6) and done.losses == [1, 2, 3, 4, 5, 6]
    means = [{k: v for k, v in r.items() if k != "seconds"} for r in done.history]
    assert means == [{"kind": "epoch", "step": s, "epoch": e, "loss": m, "of": e} for s, e, m in ((3, 1, 2), (6, 2, 5))]
    with pytest.raises(ValueError, match="the batches end after step 6, and 7 are to be done"):
        counted(7)
    with pytest.raises(Stop):
        counted(6, epochs=Epochs(3, 2, end), out=tmp_path, save_every=2, on_step=stop_at(6))
    again = counted(6, epochs=Epochs(3, 2, end), out=tmp_path, save_every=2, resume=True)
    assert int(again.state.params) == int(done.state.params) and again.losses == [5, 6]
    resumed = [{k: v for k, v in r.items() if k != "seconds"} for r in again.history]
    assert resumed == means


@pytest.mark.parametrize("module", ["fit", "gradients", "schedules"])
def test_the_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"jprune.training.{module}"))
    assert results.attempted and not results.failed
