"""Functions of every module library: each is traced as it is, and its statistics are cut with its parameters."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from laws import check_laws, lively, members, relative

import jprune
from jprune.tracing.paths import flatten

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6, 3)), jnp.float32)
ROWS = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)), jnp.float32)


def alive(tree, seed=0):
    """Random values for every leaf that keep signals alive, whatever the library calls its leaves: positive scales and
    variances, small shifts."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        name = jax.tree_util.keystr(path).lower()
        if "var" in name or "scale" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        return jnp.asarray(rng.normal(size=x.shape) * (0.4 if x.ndim < 2 else (2 / np.prod(x.shape[:-1])) ** 0.5))

    return jax.tree.map(lambda x: x.astype(jnp.float32), jax.tree_util.tree_map_with_path(one, tree))


class Linen(nn.Module):
    hidden: int = 12

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dense(self.hidden, name="up")(x.mean((1, 2)))
        return nn.Dense(5, name="out")(nn.relu(x))


@pytest.mark.smoke
def test_linen():
    module = Linen()
    variables = lively(jax.eval_shape(module.init, jax.random.key(0), IMAGES))
    graph = check_laws(module.apply, variables, (IMAGES,))
    assert members(graph, "params/conv/kernel:3") == {
        ("params/conv/kernel", 3),
        ("params/norm/scale", 0),
        ("params/norm/bias", 0),
        ("batch_stats/norm/mean", 0),
        ("batch_stats/norm/var", 0),
        ("params/up/kernel", 0),
    }
    assert {p for p, leaf in graph.leaves.items() if not leaf.is_param} == {
        "batch_stats/norm/mean",
        "batch_stats/norm/var",
    }
    cost = graph.cost()
    assert cost.state == 16 and cost.params == 27 * 8 + 16 + 9 * 12 + 13 * 5


def test_a_linen_module_reads_its_width_from_the_compacted_tree():
    """The pruned tree is an ordinary tree: the module of the smaller width takes it."""
    module = Linen()
    variables = lively(jax.eval_shape(module.init, jax.random.key(0), IMAGES))
    graph = jprune.trace(module.apply, variables, IMAGES)
    keep = {"params/up/kernel:1": np.arange(12) % 3 > 0}
    small = graph.compact(variables, keep)
    assert relative(Linen(hidden=8).apply(small, IMAGES), jax.jit(graph.replay(keep))(small, IMAGES)) < 1e-6


def test_statistics_that_a_training_step_returns_shrink_with_their_leaf():
    module = Linen()
    variables = lively(jax.eval_shape(module.init, jax.random.key(0), IMAGES))

    def step(v, x):
        y, state = module.apply(v, x, train=True, mutable=["batch_stats"])
        return y, state

    graph = check_laws(step, variables, (IMAGES,), keep={"params/up/kernel:1": np.arange(12) < 7})
    channels = graph.groups["params/conv/kernel:3"]
    assert ("batch_stats/norm/var", 0) in members(graph, channels.id) and channels.exact
    keep = {channels.id: np.arange(8) % 2 == 0}
    small, masked = graph.compact(variables, keep), graph.mask(variables, keep)
    y, state = jax.jit(graph.replay(keep))(small, IMAGES)
    want, whole = jax.jit(step)(masked, IMAGES)
    assert relative(y, want) < 1e-5
    for name in ("mean", "var"):
        got = state["batch_stats"]["norm"][name]
        assert got.shape == (4,)
        np.testing.assert_allclose(got, whole["batch_stats"]["norm"][name][::2], rtol=1e-5, atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.out = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(self.drop(nnx.relu(self.up(x))))


def test_nnx_state_travels_as_one_tree():
    definition, state, rest = nnx.split(Nnx(nnx.Rngs(0)), (nnx.Param, nnx.BatchStat), ...)
    state = alive(state)

    def f(state, x):
        return nnx.merge(definition, state, rest)(x)

    graph = check_laws(f, state, (IMAGES,))
    stem = next(g for g in graph.groups if g.startswith("conv/kernel"))
    touched = {p.removesuffix("/value") for p, _ in members(graph, stem)}
    assert touched == {"conv/kernel", "conv/bias", "norm/scale", "norm/bias", "norm/mean", "norm/var", "up/kernel"}
    small = graph.compact(state, {stem: np.arange(8) < 3})
    assert isinstance(small, nnx.State)
    merged = nnx.merge(definition, small, rest)  # the pruned model is an nnx module again
    assert merged.conv.kernel[...].shape == (3, 3, 3, 3) and merged.norm.var[...].shape == (3,)


def test_nnx_statistics_updated_in_place_shrink_with_their_leaf():
    """The step returns the state it changed, under the paths it came in by."""
    definition, state, rest = nnx.split(Nnx(nnx.Rngs(0)), (nnx.Param, nnx.BatchStat), ...)
    state = alive(state)

    def step(state, x):
        model = nnx.merge(definition, state, rest)
        model.norm.use_running_average = False
        y = model(x)
        return y, nnx.state(model, (nnx.Param, nnx.BatchStat))

    graph = jprune.trace(step, state, IMAGES)
    stem = next(g for g in graph.groups if g.startswith("conv/kernel"))
    keep = {stem: np.arange(8) % 2 == 1}
    small = graph.compact(state, keep)
    y, new = jax.jit(graph.replay(keep))(small, IMAGES)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, small)
    masked = graph.mask(state, keep)
    want, whole = step(masked, IMAGES)
    assert relative(y, want) < 1e-5
    assert relative(new, graph.compact(whole, keep)) < 1e-5


def test_equinox():
    class Model(eqx.Module):
        embed: eqx.nn.Linear
        norm: eqx.nn.RMSNorm
        mlp: eqx.nn.MLP
        activation: callable = eqx.field(static=True)

        def __call__(self, x):
            return self.mlp(self.norm(self.activation(self.embed(x))))

    k1, k2 = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Linear(6, 8, key=k1), eqx.nn.RMSNorm(8), eqx.nn.MLP(8, 4, 10, 2, key=k2), jnp.tanh)
    arrays, static = eqx.partition(model, eqx.is_array)

    def f(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    graph = check_laws(f, arrays, (ROWS,))
    assert members(graph, "embed/weight:0") == {
        ("embed/weight", 0),
        ("embed/bias", 0),
        ("norm/weight", 0),
        ("norm/bias", 0),
        ("mlp/layers/0/weight", 1),
    }
    assert graph.groups["embed/weight:0"].exact and not graph.groups["embed/weight:0"].reconfigure_exact
    keep = {"mlp/layers/0/weight:0": np.arange(10) < 4}
    small = graph.compact(arrays, keep)
    model = eqx.combine(small, static)  # a module again; linear layers read no widths from their static fields
    assert relative(jax.vmap(model)(ROWS), jax.jit(graph.replay(keep))(small, ROWS)) < 1e-6


def test_equinox_module_with_its_static_fields_in_is_refused():
    model = eqx.nn.MLP(6, 4, 10, 1, key=jax.random.key(0))
    with pytest.raises(jprune.TraceError, match=r"activation.*partition static fields out"):
        jprune.trace(lambda m, x: jax.vmap(m)(x), model, ROWS)


def test_haiku():
    def net(x, train, width=8):
        x = hk.Linear(width, name="embed")(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training=train))
        return hk.Linear(4, name="out")(x)

    module = hk.without_apply_rng(hk.transform_with_state(net))
    params, state = module.init(jax.random.key(0), ROWS, True)
    variables = alive({"params": params, "state": state})
    variables["state"] = jax.tree.map(jnp.abs, variables["state"])

    def f(v, x, width=8):
        return module.apply(v["params"], v["state"], x, False, width)[0]

    graph = check_laws(f, variables, (ROWS,))
    (group,) = graph.groups
    touched = {p for p, _ in members(graph, group)}
    # haiku keeps hidden (biased) averages too, which only training reads: they are cut along
    assert touched == {
        "params/embed/w",
        "params/embed/b",
        "params/norm/scale",
        "params/norm/offset",
        "params/out/w",
        "state/norm/~/mean_ema/average",
        "state/norm/~/var_ema/average",
        "state/norm/~/mean_ema/hidden",
        "state/norm/~/var_ema/hidden",
    }
    hidden = graph.leaves["state/norm/~/mean_ema/hidden"]
    assert not hidden.used and hidden.follows == "state/norm/~/mean_ema/average"
    keep = {group: np.arange(8) < 5}
    small = graph.compact(variables, keep)
    assert relative(f(small, ROWS, width=5), jax.jit(graph.replay(keep))(small, ROWS)) < 1e-6
    # so the same net of width 5 trains on what was compacted from the trace of its evaluation
    out, after = module.apply(small["params"], small["state"], ROWS, True, 5)
    assert out.shape == (len(ROWS), 4) and jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, small["state"])

    def training(v, x):
        return module.apply(v["params"], v["state"], x, True)

    trained = jprune.trace(lambda v, x: dict(zip(("y", "state"), training(v, x), strict=True)), variables, ROWS)
    assert members(trained, group) == members(graph, group)  # there `average` is written and `hidden` is read
    assert jax.tree.map(jnp.shape, trained.compact(variables, keep)) == jax.tree.map(jnp.shape, small)


def test_plain_functions_over_any_pytree():
    """Lists, tuples and dataclass-like nodes: the paths in messages are those of jax.tree_util."""
    rng = np.random.default_rng(0)
    params = [(jnp.asarray(rng.normal(size=(6, 8))), jnp.asarray(rng.normal(size=8))), {"w": rng.normal(size=(8, 3))}]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    graph = check_laws(lambda p, x: jax.nn.relu(x @ p[0][0] + p[0][1]) @ p[1]["w"], params, (ROWS,))
    assert members(graph, "0/0:1") == {("0/0", 1), ("0/1", 0), ("1/w", 0)}
    assert [p for p, _ in flatten(params)] == list(graph.leaves)


def test_one_leaf_alone():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    graph = check_laws(lambda w, x: jax.nn.relu(x @ w) @ w.T, matrix, (ROWS,))
    assert members(graph, ".:1") == {(".", 1)}
