"""The training loop: it learns, it is deterministic, and it does with gradients what its arguments say."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from laws import same_numbers
from rich.console import Console
from rich.progress import Progress

from jprune.data import epoch_batches, load_digits, stream
from jprune.training import Forward, TrainConfig, evaluate, sgd, train
from jprune.training.state import init_state

SHORT = TrainConfig(epochs=2, batch_size=32)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def test_the_digits_are_learned(model, variables):
    digits = load_digits(0)
    trained, history = train(model, variables, digits, TrainConfig(epochs=9), progress=False)
    assert evaluate(model, trained, digits).accuracy == history[-1]["test_accuracy"] > 0.9
    assert [r["epoch"] for r in history] == list(range(1, 10))
    assert history[-1]["loss"] < history[0]["loss"] / 2


def test_equal_seeds_give_equal_bits_and_the_callers_variables_stay(model, variables, dataset):
    before = jax.tree.map(np.array, variables)
    first, _ = train(model, variables, dataset, SHORT)
    second, _ = train(model.apply, variables, dataset, SHORT)
    other, _ = train(model, variables, dataset, TrainConfig(epochs=2, batch_size=32, seed=1))
    assert same(first, second) and not same(first, other)
    assert same(before, variables)


def test_one_compilation_serves_all_steps_and_phases(dataset):
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            traces.append(train)
            x = nn.Dense(10)(x.reshape(len(x), -1))
            return nn.BatchNorm(use_running_average=not train)(x)

    variables = Counting().init(jax.random.key(0), dataset.test.images[:1])
    traces.clear()
    trained, _ = train(Counting(), variables, dataset, SHORT)
    train(Counting(), trained, dataset, TrainConfig(epochs=3, batch_size=32, learning_rate=1e-3, seed=5))
    assert traces.count(True) == 1


def test_without_momentum_a_step_is_gradient_descent(dataset):
    variables = {"params": {"w": jnp.zeros((64, 10))}}

    def linear(v, x):
        return x.reshape(len(x), -1) @ v["params"]["w"]

    config = TrainConfig(epochs=1, batch_size=96, learning_rate=0.5, momentum=0.0, weight_decay=0.0, seed=3)
    quiet = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, noise=0.0))
    trained, _ = train(linear, variables, quiet, config)
    x, y = quiet.train.images.reshape(96, -1), np.eye(10)[quiet.train.labels]
    np.testing.assert_allclose(trained["params"]["w"], -0.5 * x.T @ (0.1 - y) / 96, rtol=1e-4, atol=1e-6)


def test_micro_batches_and_clipping_are_gradient_descent_too(dataset):
    """One step from zero weights in closed form: the mean gradient over all rows, scaled down to norm 0.01."""
    quiet = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, noise=0.0))
    config = TrainConfig(
        epochs=1, batch_size=96, learning_rate=0.5, momentum=0.0, weight_decay=0.0, accumulate=4, clip=0.01
    )
    x, y = quiet.train.images.reshape(96, -1), np.eye(10)[quiet.train.labels]
    gradient = x.T @ (0.1 - y) / 96
    trained, (record,) = train(
        lambda p, x: x.reshape(len(x), -1) @ p, jnp.zeros((64, 10)), quiet, config, progress=False
    )
    norm = np.linalg.norm(gradient)
    same_numbers(trained, -0.5 * 0.01 * gradient / norm, terms=96 * 640)
    same_numbers(np.float32(record["gradient_norm"]), np.float64(norm), terms=96 * 640)
    same_numbers(np.float32(record["loss"]), np.log(10.0), terms=96 * 10)


def test_micro_batches_average_the_statistics_of_batch_norm(model, variables, dataset):
    """Without a step of the weights: the mean over micro-batches of what each one makes of the old statistics."""
    config = TrainConfig(epochs=1, batch_size=96, accumulate=2, seed=2)
    trained, _ = train(model, variables, dataset, config, optimizer=optax.set_to_zero(), progress=False)
    (batch,) = stream(epoch_batches(dataset.train, 96, seed=2, epoch=0))
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]["batch_stats"])
    halves = [apply(variables, x) for x in np.split(batch["image"], 2)]
    want = jax.tree.map(lambda a, b: (np.float64(a) + np.float64(b)) / 2, *halves)
    same_numbers(trained["batch_stats"], want, terms=3 * 96 * 64 * 9)
    counting = Forward(
        lambda v, x, key: (x.reshape(len(x), -1) @ v["params"], {"seen": v["seen"] + 1}),
        lambda v, x: x.reshape(len(x), -1) @ v["params"],
    )
    counted = {"params": jnp.zeros((64, 10)), "seen": jnp.zeros((), jnp.int32)}
    with pytest.raises(ValueError, match="int32, which has no mean over micro-batches"):
        train(counting, counted, dataset, config, progress=False)


def test_the_transform_sees_gradients_parameters_and_the_rate_before_weight_decay(model, variables, dataset):
    def update(grads, state, params=None, *, learning_rate, **extra):
        return jax.tree.map(lambda p: 0.5 * p / learning_rate, params), state

    zero_then_half = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    config = TrainConfig(epochs=1, batch_size=96, momentum=0.0, weight_decay=0.0)
    trained, _ = train(model, variables, dataset, config, transform=zero_then_half)
    for p, q in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(trained["params"]), strict=True):
        np.testing.assert_allclose(q, 0.5 * p, rtol=1e-5, atol=1e-7)
    decayed, _ = train(
        model,
        variables,
        dataset,
        TrainConfig(epochs=1, batch_size=96, momentum=0.0, weight_decay=1.0),
        transform=optax.set_to_zero(),
    )
    kernel = variables["params"]["Conv_0"]["kernel"]
    np.testing.assert_allclose(decayed["params"]["Conv_0"]["kernel"], 0.95 * kernel, rtol=1e-5)


def test_transforms_that_differ_in_their_state_only_compile_once(dataset):
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            traces.append(train)
            return nn.Dense(10)(x.reshape(len(x), -1))

    def update(grads, strength, params=None):
        return jax.tree.map(lambda g, p: g + strength * jnp.sign(p), grads, params), strength

    variables = Counting().init(jax.random.key(0), dataset.test.images[:1])
    traces.clear()
    sizes = []
    for strength in (0.0, 0.3):
        transform = optax.GradientTransformation(lambda params, s=strength: jnp.float32(s), update)
        trained, _ = train(Counting(), variables, dataset, SHORT, transform=transform)
        sizes.append(jnp.abs(trained["params"]["Dense_0"]["kernel"]).sum())
    assert sizes[1] < 0.8 * sizes[0] and traces.count(True) == 1


def test_an_optimizer_replaces_the_recipes(model, variables, dataset):
    trained, _ = train(model, variables, dataset, SHORT, optimizer=optax.set_to_zero())
    assert same(trained["params"], variables["params"])
    assert not same(trained["batch_stats"], variables["batch_stats"])
    adam, _ = train(model, variables, dataset, TrainConfig(epochs=10, batch_size=32), optimizer=optax.adam(1e-2))
    assert evaluate(model, adam, dataset).accuracy > 0.8


def test_a_loss_may_use_parameters_and_report_more(model, variables, dataset):
    def loss(logits, batch, params):
        size = optax.tree.norm(params)
        return size, {"norm": size, "images": batch["image"].shape[0]}

    trained, history = train(model, variables, dataset, SHORT, loss=loss)
    assert history[0]["norm"] == history[0]["loss"] and history[0]["images"] == 32
    norm = jax.jit(optax.tree.norm)
    assert norm(trained["params"]) < norm(variables["params"])


def test_a_function_without_a_mode_keeps_its_batch_norm_statistics(model, variables, dataset):
    trained, _ = train(lambda v, x: model.apply(v, x), variables, dataset, SHORT)
    assert same(trained["batch_stats"], variables["batch_stats"]) and not same(trained["params"], variables["params"])


def test_a_bare_parameter_tree_comes_back_bare(model, variables, dataset):
    stats = variables["batch_stats"]
    trained, history = train(
        lambda p, x: model.apply({"params": p, "batch_stats": stats}, x), variables["params"], dataset, SHORT
    )
    assert jax.tree.structure(trained) == jax.tree.structure(variables["params"])
    assert "test_accuracy" in history[-1]


def test_an_explicit_forward_and_dropout_keys(dataset):
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1)))

    model = Dropping()
    variables = model.init(jax.random.key(0), dataset.test.images[:1])
    forward = Forward(
        lambda v, x, key: (model.apply(v, x, train=True, rngs={"dropout": key}), {}), lambda v, x: model.apply(v, x)
    )
    a, _ = train(model, variables, dataset, SHORT)
    b, _ = train(forward, variables, dataset, SHORT)
    assert same(a, b)


def test_every_step_has_a_key_of_its_own(dataset):
    forward = Forward(
        lambda v, x, key: (x.reshape(len(x), -1) @ v["params"], {"drawn": jax.random.uniform(key)}),
        lambda v, x: x.reshape(len(x), -1) @ v["params"],
    )
    variables = {"params": jnp.zeros((64, 10)), "drawn": jnp.zeros(())}
    drawn = []
    for seed in (0, 1):
        config = TrainConfig(epochs=3, batch_size=96, seed=seed)
        train(forward, variables, dataset, config, on_epoch=lambda _, v: drawn.append(float(v["drawn"])))
    assert len(set(drawn)) == 6


def test_bfloat16_computes_low_and_keeps_parameters_high(model, variables, dataset):
    seen = []

    class Spy(type(model)):
        def __call__(self, x, train=False):
            y = super().__call__(x, train)
            seen.append((x.dtype, y.dtype))
            return y

    trained, history = train(Spy(), variables, dataset, TrainConfig(epochs=2, batch_size=32, dtype="bfloat16"))
    assert (jnp.bfloat16, jnp.bfloat16) in seen
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    _, full = train(model, variables, dataset, SHORT)
    np.testing.assert_allclose([r["loss"] for r in history], [r["loss"] for r in full], rtol=0.02)
    with pytest.raises(ValueError, match="trace it in bfloat16"):
        train(lambda v, x: model.apply(v, x), variables, dataset, TrainConfig(dtype="bfloat16"))


def test_callbacks_see_every_step_and_join_the_record(model, variables, dataset):
    steps = []
    _, history = train(
        model,
        variables,
        dataset,
        SHORT,
        on_step=lambda step, metrics: steps.append((step, metrics["loss"])),
        on_epoch=lambda epoch, v: {"scale": float(jnp.abs(v["params"]["BatchNorm_0"]["scale"]).max())},
    )
    assert [s for s, _ in steps] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(history[0]["loss"], np.mean([loss for _, loss in steps[:3]]))
    assert history[-1]["scale"] > 0.5


def test_evaluation_may_wait_for_the_end(model, variables, dataset):
    _, history = train(model, variables, dataset, TrainConfig(epochs=3, batch_size=32, eval_every_epochs=0))
    assert ["test_accuracy" in r for r in history] == [False, False, True]


def test_divergence_is_named(model, variables, dataset):
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(ValueError, match="step 1: lower the learning rate"):
        train(model, broken, dataset, SHORT)


def test_what_does_not_fit_is_named(tmp_path, model, variables, dataset):
    with pytest.raises(ValueError, match="96 training examples"):
        train(model, variables, dataset, TrainConfig(batch_size=97))
    with pytest.raises(ValueError, match="needs out="):
        train(model, variables, dataset, SHORT, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        train(model, variables, dataset, SHORT, out=tmp_path / "file")
    with pytest.raises(ValueError, match="10 classes"):
        train(lambda v, x: model.apply(v, x)[:, :4], variables, dataset, SHORT)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ValueError, match='"data"'):
        train(model, variables, dataset, SHORT, mesh=mesh)


def test_the_callers_progress_bar_moves(model, variables, dataset):
    with Progress(console=Console(file=io.StringIO())) as progress:
        train(model, variables, dataset, SHORT, progress=progress, title="base")
        (task,) = progress.tasks
        assert task.finished and task.total == 6 and task.description.startswith("base epoch 2/2")


def test_the_shapes_of_a_state_are_asked_for_without_arrays(variables):
    """As programs that plan memory do: jit and eval_shape give tracers, which lie on no device."""
    stages = (sgd(1e-4, 0.9, True),)
    shapes = jax.eval_shape(lambda p: init_state(p, {}, stages), variables["params"])
    state = init_state(variables["params"], {}, stages)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
