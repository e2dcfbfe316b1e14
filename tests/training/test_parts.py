"""A training in parts, losses that the network itself adds, and parameters with an update rule of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ToyCNN, init, small_dataset

from jprune.training import Forward, TrainConfig, as_forward, sgd, train, with_own_updates

CONFIG = TrainConfig(epochs=4, batch_size=32, eval_every_epochs=0)
QUIET = {"progress": False}


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_two_parts_are_one_training():
    """Without momentum, the only thing that is not carried over, to the bit."""
    config, data = dataclasses.replace(CONFIG, momentum=0.0, nesterov=False), small_dataset()
    rates = []
    whole, history = train(
        ToyCNN(), init(), data, config, on_step=lambda s, m: rates.append(m["learning_rate"]), **QUIET
    )
    parts = []
    half, first = train(
        ToyCNN(), init(), data, config, epochs=(0, 3), on_step=lambda s, m: parts.append(m["learning_rate"]), **QUIET
    )
    both, second = train(
        ToyCNN(), half, data, config, epochs=(3, 4), on_step=lambda s, m: parts.append(m["learning_rate"]), **QUIET
    )
    same(whole, both)
    assert parts == rates and [r["epoch"] for r in (*first, *second)] == [r["epoch"] for r in history] == [1, 2, 3, 4]
    assert [r["step"] for r in second] == [history[-1]["step"]]
    for epochs in ((2, 2), (0, 5), (-1, 2)):
        with pytest.raises(ValueError, match="part of the recipe's 4"):
            train(ToyCNN(), init(), data, config, epochs=epochs, **QUIET)


def test_a_part_resumes_and_is_not_taken_for_another(tmp_path):
    data = small_dataset()
    done, _ = train(ToyCNN(), init(), data, CONFIG, epochs=(1, 3), out=tmp_path, **QUIET)
    again, history = train(ToyCNN(), init(), data, CONFIG, epochs=(1, 3), out=tmp_path, resume=True, **QUIET)
    same(done, again)
    assert [r["epoch"] for r in history] == [2, 3]
    with pytest.raises(ValueError, match=r"part was \[1, 3\]"):
        train(ToyCNN(), init(), data, CONFIG, epochs=(1, 4), out=tmp_path, resume=True, **QUIET)


def test_losses_of_the_network_are_added_and_metrics_logged():
    plain = as_forward(ToyCNN())

    def with_penalty(variables, x, key):
        logits, updates = plain.train(variables, x, key)
        size = sum((w**2).sum() for w in jax.tree.leaves(variables["params"]))
        return logits, {**updates, "losses": {"penalty": 0.05 * size}, "metrics": {"size": size}}

    config, seen = dataclasses.replace(CONFIG, epochs=1, weight_decay=0.0), []
    data = small_dataset()
    penalised, _ = train(
        Forward(with_penalty, plain.evaluate), init(), data, config, on_step=lambda s, m: seen.append(m), **QUIET
    )
    decayed, _ = train(ToyCNN(), init(), data, dataclasses.replace(config, weight_decay=0.1), **QUIET)
    for a, b in zip(jax.tree.leaves(penalised), jax.tree.leaves(decayed), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # the gradient of 0.05 |w|^2 is decay by 0.1
    np.testing.assert_allclose(seen[0]["penalty"], 0.05 * seen[0]["size"], rtol=1e-5)
    assert seen[0]["loss"] > seen[0]["penalty"]


def test_own_rules_see_everything_and_nothing_else_touches_their_entry():
    rules = {
        "level": lambda grads, params: -0.5 * grads["level"],
        "average": lambda grads, params: params["w"][0] - params["average"],
    }
    optimizer = with_own_updates(sgd(0.9, 0.9, True), rules)
    params = {"w": jnp.asarray([2.0, 3.0]), "level": jnp.asarray(4.0), "average": jnp.asarray(0.0)}
    state = optimizer.init(params)
    for _ in range(3):
        grads = {"w": jnp.zeros(2), "level": jnp.asarray(0.25), "average": jnp.asarray(7.0)}
        before = params
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.asarray(0.1))
        params = optax.apply_updates(params, updates)
        assert float(params["level"]) == float(before["level"]) - 0.125  # neither momentum nor decay
        assert float(params["average"]) == float(before["w"][0])
        assert float(params["w"][0]) < float(before["w"][0])
    with pytest.raises(ValueError, match="none called 'level'"):
        optimizer.update({"w": jnp.zeros(2)}, sgd(0.9, 0.9, True).init({"w": jnp.zeros(2)}), {"w": jnp.zeros(2)},
                         learning_rate=jnp.asarray(0.1))  # fmt: skip
