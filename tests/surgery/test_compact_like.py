"""Trees that travel with the parameters: what optax keeps per parameter is sliced as the parameter is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from laws import normal, relative

import jprune
from jprune.tracing.paths import flatten

LAYERS = 3


def network(variables, x):
    p, s = variables["params"], variables["batch_stats"]

    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    h = conv(x, p["conv"]["kernel"]) + p["conv"]["bias"]
    h = jax.nn.relu((h - s["norm"]["mean"]) * p["norm"]["scale"])
    h = h.reshape(h.shape[0], -1) @ p["rows"]["kernel"] + p["rows"]["bias"]

    def layer(h, w):
        return h + jax.nn.relu(h @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, h, p["layers"])[0] @ p["head"]["kernel"]


def weights(seed=0):
    return {
        "params": {
            "conv": {"kernel": normal(seed, 3, 3, 2, 4), "bias": normal(seed + 1, 4)},
            "norm": {"scale": 1 + normal(seed + 2, 4)},
            "rows": {"kernel": normal(seed + 3, 16, 6), "bias": normal(seed + 4, 6)},
            "layers": {"up": normal(seed + 5, LAYERS, 6, 8), "down": normal(seed + 6, LAYERS, 8, 6)},
            "head": {"kernel": normal(seed + 7, 6, 3)},
        },
        "batch_stats": {"norm": {"mean": normal(seed + 8, 4)}},
    }


VARIABLES = weights()
X = normal(90, 5, 2, 2, 2)
GRAPH = jprune.trace(network, VARIABLES, X)
CONV, STREAM, LOCAL = "params/conv/kernel:3", "params/layers/down:2", "params/layers/up:2"
KEEP = {
    CONV: np.array([1, 0, 1, 1], bool),
    STREAM: np.array([0, 1, 1, 1, 0, 1], bool),
    LOCAL: np.stack([np.roll(np.arange(8) < 5, 3 * k) for k in range(LAYERS)]),
}
UNEVEN = {**KEEP, LOCAL: np.arange(8)[None] < np.array([[5], [8], [2]])}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def take(leaf, path, keep=KEEP, drop=None):
    """Slices by hand; `drop` is an axis that the leaf has lost."""
    c, s = np.flatnonzero(keep[CONV]), np.flatnonzero(keep[STREAM])
    rows = np.concatenate([c + 4 * k for k in range(4)])
    axes = {
        "params/conv/kernel": {3: c},
        "params/conv/bias": {0: c},
        "params/norm/scale": {0: c},
        "batch_stats/norm/mean": {0: c},
        "params/rows/kernel": {0: rows, 1: s},
        "params/rows/bias": {0: s},
        "params/layers/up": {1: s, 2: keep[LOCAL]},
        "params/layers/down": {1: keep[LOCAL], 2: s},
        "params/head/kernel": {0: s},
    }[path]
    leaf = np.asarray(leaf)
    for axis, index in axes.items():
        if axis == drop:
            continue
        at = axis - (drop is not None and drop < axis)
        if index.ndim == 1:
            leaf = np.take(leaf, index, axis=at)
        else:
            leaf = np.stack([np.take(x, np.flatnonzero(k), axis=at - 1) for x, k in zip(leaf, index, strict=True)])
    return leaf


def loss(run, variables, x):
    return (run(variables, x) ** 2).mean()


def step(optimizer, run, variables, state):
    """One training step on the parameters; running statistics stay."""
    grads = jax.grad(lambda p: loss(run, {**variables, "params": p}, X))(variables["params"])
    updates, state = optimizer.update(grads, state, variables["params"])
    return {**variables, "params": optax.apply_updates(variables["params"], updates)}, state


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "chain": optax.chain(optax.trace(0.5), optax.scale_by_schedule(lambda n: 0.1 / (1 + n)), optax.ema(0.9)),
    "masked": optax.chain(
        optax.masked(optax.scale_by_adam(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), optax.scale(-1e-2)
    ),
    "by name": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)},
        lambda p: {k: ("b" if k == "head" else "a") for k in p},
    ),
}


def trained(run, optimizer, steps=2):
    """Masked parameters and their optimizer's state after some steps."""
    masked = GRAPH.mask(VARIABLES, KEEP)
    state = optimizer.init(masked["params"])
    for _ in range(steps):
        masked, state = run(masked, state)
        masked = GRAPH.mask(masked, KEEP)  # nothing may grow back
    return masked, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_commutes_with_slicing(name):
    optimizer, pruned = OPTIMIZERS[name], GRAPH.replay(KEEP)
    run = jax.jit(lambda v, s: step(optimizer, network, v, s))
    run_small = jax.jit(lambda v, s: step(optimizer, pruned, v, s))
    variables, state = trained(run, optimizer)
    small, small_state = GRAPH.compact(variables, KEEP), GRAPH.compact_like(state, KEEP)
    fresh = optimizer.init(small["params"])
    assert jax.tree.structure(small_state) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, fresh)
    forgot, _ = run_small(small, fresh)
    for k in range(2):
        variables, state = run(variables, state)
        variables = GRAPH.mask(variables, KEEP)
        small, small_state = run_small(small, small_state)
        assert relative(small, GRAPH.compact(variables, KEEP)) < 1e-4
        if k == 0:  # and it matters: an optimizer that forgot its state goes elsewhere
            assert relative(small, forgot) > 1e-3


def random_state(optimizer):
    rng = np.random.default_rng(0)
    state = optimizer.init(VARIABLES["params"])
    return jax.tree.map(lambda x: jnp.asarray(10 * rng.normal(size=x.shape), x.dtype), state)


def mirror(state, prefix):
    """{parameter path: leaf} of one tree inside a state."""
    return {p.removeprefix(prefix): x for p, x in flatten(state) if p.startswith(prefix)}


def test_moments_are_sliced_as_by_hand():
    state = random_state(optax.adam(1e-2))
    small = GRAPH.compact_like(state, KEEP)
    assert small[0].count == state[0].count
    for moment in ("mu", "nu"):
        whole = mirror(state, f"0/{moment}/")
        assert len(whole) == 8
        for path, x in mirror(small, f"0/{moment}/").items():
            np.testing.assert_array_equal(x, take(whole[path], f"params/{path}"), err_msg=path)


def test_averages_and_gradients():
    other = weights(40)
    assert_same(GRAPH.compact_like(other, KEEP), GRAPH.compact(other, KEEP))
    assert_same(GRAPH.compact_like({"ema": other["params"]}, KEEP)["ema"], GRAPH.compact(other, KEEP)["params"])
    both = (other, {"seen": jnp.zeros(()), "average": other})
    assert_same(GRAPH.compact_like(both, KEEP)[1]["average"], GRAPH.compact(other, KEEP))
    as_numpy = GRAPH.compact_like(jax.tree.map(np.asarray, other), KEEP)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(as_numpy))
    assert_same(jax.jit(lambda t: GRAPH.compact_like(t, KEEP))(other), GRAPH.compact(other, KEEP))


def test_factored_moments_lose_the_axes_that_the_parameter_loses():
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=3)
    state = random_state(optimizer)
    small = GRAPH.compact_like(state, KEEP)
    dropped = {  # optax averages rows over the largest axis, columns over the second largest
        "rows/kernel": (0, 1),
        "layers/up": (2, 1),
        "layers/down": (1, 2),
        "head/kernel": (0, 1),
    }
    for which, drop in (("v_row", 0), ("v_col", 1)):
        whole, cut = mirror(state, f"0/{which}/"), mirror(small, f"0/{which}/")
        assert set(cut) == set(whole) and len(cut) == 8
        for path, x in cut.items():
            if path in dropped:
                axis = dropped[path][drop]
                assert list(whole[path].shape) == np.delete(SHAPES[path], axis).tolist()
                np.testing.assert_array_equal(x, take(whole[path], f"params/{path}", drop=axis), err_msg=path)
    for path, x in mirror(small, "0/v/").items():
        whole = mirror(state, "0/v/")[path]
        np.testing.assert_array_equal(x, whole if whole.shape == (1,) else take(whole, f"params/{path}"), err_msg=path)


SHAPES = {p.removeprefix("params/"): x.shape for p, x in flatten(VARIABLES)}


def square(width=3, size=8):
    params = {"a": {"kernel": normal(0, size, size)}, "b": {"kernel": normal(1, size, width)}}
    return params, jprune.trace(
        lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"], params, normal(2, 4, size)
    )


@pytest.mark.parametrize("least", [4, 5, 6, 8])  # the smallest size that is factored: below, at and above the new width
@pytest.mark.parametrize("side", [0, 1])
def test_factored_moments_of_square_kernels(least, side):
    """Columns go from one kernel, rows from the other; the larger axis becomes the other one, or there is no factoring."""
    params = {"a": {"kernel": normal(0, 8, 8)}, "b": {"kernel": normal(1, 8, 8)}}
    graph = jprune.trace(lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"], params, normal(2, 4, 8))
    keep = {"a/kernel:1": np.arange(8) % 3 != side}
    kept = np.flatnonzero(keep["a/kernel:1"])
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=least)
    grads = {"a": {"kernel": normal(3, 8, 8)}, "b": {"kernel": normal(4, 8, 8)}}
    state = optimizer.update(grads, optimizer.init(params), params)[1]
    small = graph.compact_like(state, keep, init=optimizer.init)
    fresh = optimizer.init(graph.compact(params, keep))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, fresh)
    for name, axis in (("a", 1), ("b", 0)):
        squares = np.asarray(grads[name]["kernel"], np.float64) ** 2
        rows, columns = squares.mean(1), squares.mean(0)  # one entry a row, one a column
        whole = rows[:, None] * columns[None] / squares.mean()
        rows, columns = (v[kept] if k == axis else v for k, v in enumerate((rows, columns)))
        got = {k: np.asarray(getattr(small, k)[name]["kernel"]) for k in ("v_row", "v_col", "v")}
        if least <= len(kept):
            of = {len(rows): rows, len(columns): columns}
            for k in ("v_row", "v_col"):
                np.testing.assert_allclose(got[k], of[len(got[k])], rtol=1e-5)
        else:
            np.testing.assert_allclose(got["v"], np.take(whole, kept, axis), rtol=1e-5)


def test_what_an_optimizer_factors_is_not_guessed():
    params, graph = square()
    keep = {"a/kernel:1": np.arange(8) < 5}
    state = optax.adafactor(1e-2, min_dim_size_to_factor=8).init(params)
    with pytest.raises(jprune.KeepError, match=r"v_row/a/kernel'.*lies above 3 and not above 8: pass init="):
        graph.compact_like(state, keep)
    params, graph = square(128, 128)
    with pytest.raises(jprune.KeepError, match=r"not above 128: pass init="):  # optax's default
        graph.compact_like(optax.adafactor(1e-2).init(params), {"a/kernel:1": np.arange(128) < 100})
    params, graph = square(8)
    with pytest.warns(UserWarning, match="every matrix is factored, and stays so"):
        graph.compact_like(optax.adafactor(1e-2, min_dim_size_to_factor=8).init(params), keep)
    # vectors that fit an axis of a square kernel in two ways, in a tree of nobody's
    with pytest.raises(jprune.KeepError, match=r"row/a/kernel' of shape \(8,\) mirrors 'a/kernel'.*several ways"):
        graph.compact_like({"row": {"a": {"kernel": jnp.ones(8)}}}, keep)


def test_memory_of_lbfgs():
    """Slices of its pairs, weighed by the products of what is left; curvature that was lost makes a pair rest."""
    params, graph = square(8)
    keep = {"a/kernel:1": np.arange(8) < 5}
    optimizer = optax.scale_by_lbfgs(memory_size=3)
    state = optimizer.init(params)
    for k in range(3):
        p, g = (jax.tree.map(lambda x, k=k, s=s: x + normal(10 + k + s, *x.shape), params) for s in (0, 5))
        state = optimizer.update(g, state, p)[1]
    small = graph.compact_like(state, keep, init=optimizer.init)
    cut = {"a": lambda x: x[..., :5], "b": lambda x: x[..., :5, :]}
    for n in ("diff_params_memory", "diff_updates_memory", "params", "updates"):
        for name, f in cut.items():
            np.testing.assert_array_equal(getattr(small, n)[name]["kernel"], f(getattr(state, n)[name]["kernel"]))
    products = [
        sum(np.vdot(*(np.asarray(getattr(small, n)[k]["kernel"][i], np.float64)
                      for n in ("diff_params_memory", "diff_updates_memory"))) for k in cut)
        for i in range(3)
    ]  # fmt: skip
    old = np.asarray(state.weights_memory)
    want = [1 / c if c * o > 0 else 0.0 for c, o in zip(products, old, strict=True)]
    np.testing.assert_allclose(small.weights_memory, want, rtol=1e-5)
    assert np.abs(np.asarray(small.weights_memory) - old).max() > 1e-3
    same = graph.compact_like(state, {})
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("stacked", ["pad", "bucket", "unstack"])
def test_layers_of_different_widths(stacked):
    variables, state = weights(20), random_state(optax.adam(1e-2))
    want = GRAPH.compact(variables, GRAPH.decide(UNEVEN, stacked=stacked))
    assert_same(GRAPH.compact_like(variables, GRAPH.decide(UNEVEN, stacked=stacked)), want)
    small = GRAPH.compact_like(state, GRAPH.decide(UNEVEN, stacked=stacked))
    shapes = jax.tree.map(jnp.shape, want["params"])
    assert jax.tree.map(jnp.shape, small[0].mu) == jax.tree.map(jnp.shape, small[0].nu) == shapes
    factors = GRAPH.compact_like(
        {"params": {"layers": {"up": jnp.ones((LAYERS, 8))}}}, GRAPH.decide(UNEVEN, stacked=stacked)
    )
    got = factors["params"]["layers"]["up"]
    whole = want["params"]["layers"]["up"]
    if stacked == "pad":
        np.testing.assert_array_equal(got, np.ones((LAYERS, 8)) * UNEVEN[LOCAL])
    else:
        assert [x.shape for x in got] == [(x.shape[0], x.shape[2]) for x in whole]


def test_what_mirrors_nothing_passes_through():
    tree = {"count": jnp.zeros((), jnp.int32), "key": jax.random.key(0), "history": jnp.ones(3), "note": "text", "n": 3}
    got = GRAPH.compact_like(tree, KEEP)
    assert got["note"] == "text" and got["n"] == 3 and got["history"].shape == (3,)
    assert jax.random.key_data(got["key"]).shape == (2,)
    assert GRAPH.compact_like({"state": {"conv": {"kernel": jnp.ones(1)}}}, KEEP)["state"]["conv"]["kernel"].shape == (
        1,
    )
    assert_same(GRAPH.compact_like(VARIABLES, {}), VARIABLES)


def test_what_may_hold_parameters_under_another_name_is_refused():
    """Unless `init` tells that its size does not depend on theirs."""
    message = "mirrors no parameter by its path, but may hold entries of"
    for shape in ((72,), (6, 2), (2, 8)):
        with pytest.raises(jprune.KeepError, match=f"'0/history' .*{message}"):
            GRAPH.compact_like([{"history": jnp.ones(shape)}], KEEP)
    tree = {"history": jnp.ones(100), "mu": VARIABLES}
    got = GRAPH.compact_like(tree, KEEP, init=lambda v: {"history": jnp.ones(100), "mu": v})
    assert got["history"].shape == (100,)
    flat = {"flat": ravel_pytree(VARIABLES)[0]}
    with pytest.raises(jprune.KeepError, match=r"'flat' .*init makes it"):
        GRAPH.compact_like(flat, KEEP, init=lambda v: {"flat": ravel_pytree(v)[0]})
    with pytest.raises(jprune.KeepError, match=r"'mu/conv/bias' is \(3,\) after slicing and absent"):
        GRAPH.compact_like({"mu": {"conv": VARIABLES["params"]["conv"]}}, KEEP, init=lambda v: {})


def test_mirrors_that_do_not_fit_are_refused_by_name():
    with pytest.raises(jprune.KeepError, match=r"'mu/params/conv/kernel' of shape \(3, 5\) mirrors .*does not fit"):
        GRAPH.compact_like({"mu": {"params": {"conv": {"kernel": jnp.ones((3, 5))}}}}, KEEP)
    with pytest.raises(
        jprune.KeepError, match=r"'mu/rows/kernel' of shape \(9, 6\).*does not fit it; slice it by hand"
    ):
        GRAPH.compact_like({"mu": {"rows": {"kernel": jnp.ones((9, 6))}}}, KEEP)
    small = GRAPH.compact(VARIABLES, KEEP)
    with pytest.raises(jprune.KeepError, match="does not fit"):
        GRAPH.compact_like(small, KEEP)  # a second time
    with pytest.raises(jprune.KeepError, match="no axis for the layers of 'params/layers/up'"):
        GRAPH.compact_like({"layers": {"up": jnp.ones(8)}}, KEEP)
    with pytest.raises(jprune.KeepError, match="did you mean"):
        GRAPH.compact_like(VARIABLES, {"params/conv/kernel:4": np.ones(4, bool)})


def test_two_leaves_of_the_same_name_are_not_confused():
    params = {"a": {"w": normal(0, 4, 6)}, "b": {"w": normal(1, 6, 6)}, "c": {"a": {"w": normal(2, 6, 4)}}}

    def f(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"]) @ p["c"]["a"]["w"]

    graph = jprune.trace(f, params, normal(3, 5, 4))
    keep = {"a/w:1": np.arange(6) < 2, "b/w:1": np.arange(6) < 4}
    state = optax.adam(1e-2).init(params)
    got = graph.compact_like(state, keep)
    assert jax.tree.map(jnp.shape, got[0].mu) == jax.tree.map(jnp.shape, graph.compact(params, keep))
