"""Gradients of single samples: the same as vmap(grad), of any kind of function, without an array of samples times leaf."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jprune.importance.sample_gradients import block_gradients, entry_gradients, sample_gradients
from jprune.tracing.paths import flatten, with_leaves


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], 1)[:, 0]


def of(apply):
    return lambda variables, batch: cross_entropy(apply(variables, batch[0]), batch[1])


class ScannedLayers(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(3, (3, 3))(x).reshape(len(x), -1)
        layer = linen.scan(lambda m, x, _: (jnp.tanh(m(x)), None), variable_axes={"params": 0},
                           split_rngs={"params": True}, length=2)  # fmt: skip
        return layer(linen.Dense(x.shape[-1]), x, None)[0][:, :4]


def linen_model():
    model = ScannedLayers()
    return of(model.apply), model.init(jax.random.key(0), jnp.ones((1, 3, 3, 1)))


def nnx_model():
    definition, state = nnx.split(nnx.Linear(9, 4, rngs=nnx.Rngs(0)))
    return of(lambda state, x: nnx.merge(definition, state)(x.reshape(len(x), -1))), state


def equinox_model():
    arrays, static = eqx.partition(eqx.nn.Linear(9, 4, key=jax.random.key(0)), eqx.is_array)
    return of(lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x.reshape(len(x), -1))), arrays


def some_batch(size=7):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(size, 3, 3, 1)), jnp.float32), jnp.asarray(rng.integers(0, 4, size))


def by_vmap(losses, variables, paths, batch):
    weights = {p: dict(flatten(variables))[p] for p in paths}

    def one(w, x, y):
        return losses(with_leaves(variables, w), (x[None], y[None]))[0]

    return jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(weights, *batch)


@pytest.mark.parametrize("model", [linen_model, nnx_model, equinox_model])
def test_of_every_kind_of_function_they_are_those_of_vmap(model):
    losses, variables = model()
    paths, batch = [p for p, _ in flatten(variables)], some_batch()
    index = {p: jnp.arange(x.size)[::2][::-1] for p, x in flatten(variables)}
    wanted = by_vmap(losses, variables, paths, batch)
    got = sample_gradients(losses, variables, paths, batch)
    chosen, mean = entry_gradients(losses, variables, index, batch, chunk=3)  # 7 = 3 + 3 + 1
    for p in paths:
        np.testing.assert_allclose(got[p], wanted[p], atol=1e-5)
        np.testing.assert_allclose(chosen[p], wanted[p].reshape(7, -1)[:, index[p]], atol=1e-5)
        np.testing.assert_allclose(mean[p], wanted[p].mean(0), atol=1e-5)


def linear(v, batch):
    return jnp.sum((batch @ v["a"] @ v["b"]) ** 2, axis=-1)


def matrices(width=64, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {"a": jnp.asarray(rng.normal(size=(width, width)), dtype), "b": jnp.asarray(rng.normal(size=(width, 2)))}


def test_chunks_change_nothing_and_one_leaf_is_as_several():
    v, x = matrices(6), jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.float32)
    index = jnp.array([3, 3, 35, 0])
    wanted, mean = block_gradients(linear, v, "a", index, x)
    for chunk in (1, 2, 5, 9):
        got = block_gradients(linear, v, "a", index, x, chunk=chunk)
        np.testing.assert_allclose(got[0], wanted, atol=1e-5)
        np.testing.assert_allclose(got[1], mean, atol=1e-5)
    np.testing.assert_allclose(sample_gradients(linear, v, ["a"], x, chunk=2)["a"].mean(0), mean, atol=1e-5)


def test_no_array_holds_the_leaf_once_for_every_sample():
    v, x, index = matrices(), jnp.ones((32, 64)), jnp.arange(10)

    def run(v, x, i):
        return block_gradients(linear, v, "a", i, x, chunk=2)

    whole = 32 * v["a"].size
    assert max(s.size for s in shapes(jax.make_jaxpr(run)(v, x, index).jaxpr)) <= 2 * v["a"].size
    assert jax.jit(run).lower(v, x, index).compile().memory_analysis().temp_size_in_bytes < 4 * whole / 4
    everything = jax.make_jaxpr(lambda v, x: sample_gradients(linear, v, ["a"], x))(v, x).jaxpr
    assert max(s.size for s in shapes(everything)) == whole  # what the first line would see


def shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def test_only_the_leaves_that_are_asked_for_are_differentiated():
    """The other leaf goes through an operation that has no derivative."""

    def losses(v, x):
        return linear({"a": v["a"], "b": hidden(v["b"])}, x)

    hidden = jax.custom_jvp(lambda b: b * 1)
    hidden.defjvp(lambda *_: pytest.fail("differentiated"))
    assert set(sample_gradients(losses, matrices(4), ["a"], jnp.ones((2, 4)))) == {"a"}


def test_bfloat16_leaves_have_float32_gradients_whose_mean_does_not_stall():
    v, x = {"w": jnp.zeros((), jnp.bfloat16)}, jnp.concatenate([jnp.ones(1), jnp.full(512, 2.0**-9)])
    got, mean = block_gradients(lambda v, x: v["w"] * x, v, "w", jnp.array([0]), x, chunk=1)
    assert got.dtype == mean.dtype == jnp.float32
    assert float(mean) * 513 == pytest.approx(2.0)  # one summand after the other, bfloat16 would stay at 1


def test_a_traced_index_outside_the_leaf_is_not_a_number():
    run = jax.jit(lambda i: block_gradients(linear, matrices(4), "a", i, jnp.ones((2, 4)))[0])
    assert jnp.isnan(run(jnp.array([2, 16]))).tolist() == [[False, True]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["aa"]}, "no leaf 'aa'; did you mean 'a'"),
        ({"paths": []}, "at least one path"),
        ({"variables": {"a": jnp.ones((4, 4), jnp.int32), "b": jnp.ones((4, 2))}}, "'a' holds int32"),
        ({"chunk": 0}, "chunk is 0"),
        ({"batch": {"x": jnp.ones((2, 4)), "y": jnp.ones(3)}}, "x: 2, y: 3"),
        ({"batch": jnp.ones((0, 4))}, "at least one"),
        ({"losses": lambda v, x: linear(v, x).mean()}, "one float loss for every sample"),
    ],
)
def test_bad_input(change, message):
    asked = {"losses": linear, "variables": matrices(4), "paths": ["a"], "batch": jnp.ones((2, 4))} | change
    with pytest.raises(ValueError, match=message):
        sample_gradients(**asked)


@pytest.mark.parametrize(
    ("index", "message"), [([16], "from 16 to 16"), ([-1], "from -1"), ([0.5], "integers"), (3, "integers")]
)
def test_an_index_that_the_leaf_does_not_have(index, message):
    with pytest.raises(ValueError, match=message):
        block_gradients(linear, matrices(4), "a", np.array(index), jnp.ones((2, 4)))
