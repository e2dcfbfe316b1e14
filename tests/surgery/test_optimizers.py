"""Every optimizer and transformation of optax: its state is cut as the parameters are, or refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from laws import normal

import jprune
from jprune.tracing.paths import flatten

pytestmark = pytest.mark.filterwarnings("ignore")  # optax's, of what it deprecates


@functools.cache
def every_optimizer():
    """{name: optimizer} of all functions of optax that make one, the wrappers around Adam."""
    adam, named = optax.adam(1e-2), lambda tree: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", tree)
    given = {
        "adafactor": lambda f: f(1e-2, min_dim_size_to_factor=3),
        "adaptive_grad_clip": lambda f: f(0.1),
        "apply_if_finite": lambda f: f(adam, 3),
        "chain": lambda f: f(optax.trace(0.9), adam),
        "conditionally_mask": lambda f: f(adam, lambda step: step < 3),
        "conditionally_transform": lambda f: f(adam, lambda step: step < 3),
        "flatten": lambda f: f(adam),
        "inject_hyperparams": lambda f: f(optax.adam)(learning_rate=1e-2),
        "inject_stateful_hyperparams": lambda f: f(optax.adam)(learning_rate=1e-2),
        "masked": lambda f: f(adam, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        "mechanize": lambda f: f(adam),
        "multi_transform": lambda f: f({"a": adam, "b": optax.sgd(1e-2, 0.9)}, named),
        "named_chain": lambda f: f(("one", optax.trace(0.9)), ("two", adam)),
        "partition": lambda f: f({"a": adam, "b": optax.sgd(1e-2, 0.9)}, named),
        "rmsprop": lambda f: f(1e-2, centered=True, momentum=0.9),
        "sam": lambda f: f(adam, optax.sgd(1e-2), sync_period=3, reset_state=False),
        "schedule_free": lambda f: f(adam, 1e-2),
        "sgd": lambda f: f(1e-2, momentum=0.9, nesterov=True),
        "split_real_and_imaginary": lambda f: f(adam),
        "trace": lambda f: f(0.9),
        "lookahead": lambda f: f(adam, 3, 0.5),
    }
    out = {
        "MultiSteps": optax.MultiSteps(adam, 2),
        "skip_not_finite": optax.MultiSteps(adam, 2, True, optax.skip_not_finite),
    }
    for module in (optax, optax.contrib):
        for name, f in vars(module).items():
            if "GradientTransformation" not in str(getattr(f, "__annotations__", {}).get("return")):
                continue
            tries = [given[name]] if name in given else [lambda f: f(1e-2), lambda f: f(), lambda f: f(0.9, 1e-3, 0)]
            for make in tries:
                try:
                    out[name] = make(f)
                    jax.eval_shape(out[name].init, {"w": jnp.ones((2, 2))})
                    break
                except (TypeError, ValueError, AttributeError, IndexError):
                    out.pop(name, None)
    return out


def filled(shapes):
    """A state in which every entry says where it was, on the host: nothing is compiled."""

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return np.arange(1, 1 + np.prod(x.shape)).reshape(x.shape).astype(x.dtype)

    return jax.tree.map(fill, shapes)


def matrices(size=6):
    params = {
        "one": normal(0, size, size),
        "two": normal(1, size, size),
        "last": normal(2, size, 5),
        "rate": normal(3, size),
    }
    graph = jprune.trace(
        lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["one"] * p["rate"]) @ p["two"]) @ p["last"],
        params,
        normal(4, 4, size),
    )
    kept, other = np.array([0, 1, 3, 4]), np.array([1, 2, 3, 4, 5])
    keep = {"one:1": np.isin(np.arange(size), kept), "two:1": np.isin(np.arange(size), other)}
    axes = {"one": {1: kept}, "rate": {0: kept}, "two": {0: kept, 1: other}, "last": {0: other}}

    def cut(name, x, only=None, ahead=0):
        for axis, index in axes[name].items():
            if only in (None, axis):
                x = np.take(x, index, axis=axis + ahead if only is None else 0)
        return x

    return graph, params, keep, cut


REFUSED = {"flatten", "galore", "scale_by_galore"}  # whose states have no slices
LEFT_OPEN = {"adafactor", "mechanize", "scale_by_muon"}  # which may be refused where `init` is not given


@pytest.mark.slow
def test_every_optimizer_of_optax_is_sliced_or_refused_by_name():
    graph, params, keep, cut = matrices()
    small, optimizers = graph.compact(params, keep), every_optimizer()
    assert len(optimizers) > 80
    sliced, refused = set(), set()
    for name, optimizer in optimizers.items():
        shapes = jax.eval_shape(optimizer.init, params)
        state, want = filled(shapes), jax.eval_shape(optimizer.init, small)
        try:
            got = graph.compact_like(state, keep, init=optimizer.init)
        except jprune.KeepError as error:
            assert "start the optimizer anew" in str(error), name
            refused.add(name)
            continue
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want), name
        try:
            assert jax.tree.map(jnp.shape, graph.compact_like(state, keep)) == jax.tree.map(jnp.shape, want), name
        except jprune.KeepError as error:
            assert name in LEFT_OPEN and "pass init=" in str(error), (name, error)
        before, after = dict(flatten(state)), dict(flatten(got))
        for path, x in before.items():
            keys = path.split("/")
            own = next((k for k in reversed(keys) if k in params), None)
            if own is None or np.size(x) == 1 or "v_row" in keys or "v_col" in keys:
                assert np.shape(after[path]) == np.shape(x) or own is not None, (name, path)
                continue
            ahead, only = np.ndim(x) - params[own].ndim, None
            if own != keys[-1]:  # sm3 has a vector for every axis
                ahead, only = 0, int(keys[-1])
            np.testing.assert_array_equal(after[path], cut(own, x, only, ahead), err_msg=f"{name} {path}")
            sliced.add(name)
    assert refused == REFUSED
    assert {
        "adam",
        "adafactor",
        "lbfgs",
        "sm3",
        "muon",
        "sophia",
        "prodigy",
        "lookahead",
        "MultiSteps",
        "mechanize",
    } <= sliced


@pytest.mark.parametrize("name", ["adam", "adafactor", "sm3", "lbfgs", "novograd", "muon"])
def test_states_of_stacked_layers_are_sliced_or_refused_by_name(name):
    """A scan over three layers, which keep the same number of other units, or different numbers."""
    optimizer = every_optimizer()[name]
    params = {"up": normal(0, 3, 6, 8), "down": normal(1, 3, 8, 6), "head": normal(2, 6, 4)}

    def network(p, x):
        return (
            jax.lax.scan(lambda h, w: (h + jax.nn.relu(h @ w[0]) @ w[1], None), x @ jnp.eye(6), (p["up"], p["down"]))[0]
            @ p["head"]
        )

    graph = jprune.trace(network, params, normal(3, 4, 6))
    state = filled(jax.eval_shape(optimizer.init, params))
    rows = np.stack([np.roll(np.arange(8) < 5, 3 * k) for k in range(3)])
    same, other = {"up:2": rows}, {"up:2": np.arange(8) < np.array([[5], [8], [2]])}
    for keep in (same, other):
        small = jax.eval_shape(lambda k=keep: graph.compact(params, k))
        want = jax.tree.map(jnp.shape, jax.eval_shape(optimizer.init, small))
        if name == "sm3":
            with pytest.raises(
                jprune.KeepError, match=r"mu/down/1' has no axis for the layers.*start the optimizer anew"
            ):
                graph.compact_like(state, keep, init=optimizer.init)
            continue
        assert jax.tree.map(jnp.shape, graph.compact_like(state, keep, init=optimizer.init)) == want
    if name == "adafactor":
        with pytest.raises(jprune.KeepError, match="stacked='pad' only"):
            graph.compact_like(state, graph.decide(other, stacked="bucket"))
