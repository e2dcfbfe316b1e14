"""Sparse training: exact zeros in any loop, schedules that land, algorithms against numpy, states that are followed."""

import doctest
import importlib
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from laws import normal

from jprune.budget import counts
from jprune.methods.weights import (
    ACDC,
    SET,
    Magnitude,
    MaskSteps,
    Random,
    RigL,
    Saliency,
    Static,
    magnitude_masks,
    masked,
    masks_of,
    sparsify,
)
from jprune.methods.weights.sparse_training.follow import check_followed, restarted
from jprune.methods.weights.sparse_training.mask_steps import amounts
from jprune.methods.weights.sparse_training.once import once
from jprune.surgery.patterns import NM, Unstructured, apply, check, density, pack, unpack
from jprune.surgery.views import conventional
from jprune.tracing.paths import flatten

PARAMS = {
    "in": {"kernel": normal(0, 8, 12), "bias": normal(1, 12)},
    "out": {"kernel": normal(2, 12, 4), "bias": normal(3, 4)},
}
KERNELS = ("in/kernel", "out/kernel")
SHAPES = {"in/kernel": (8, 12), "out/kernel": (12, 4)}
X, Y = normal(4, 16, 8), normal(5, 16, 4)


def loss(params, x=X, y=Y):
    h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    return jnp.mean((h @ params["out"]["kernel"] + params["out"]["bias"] - y) ** 2)


GRADIENTS = jax.grad(loss)(PARAMS)


def trainer(tx, of=loss, start=PARAMS):
    """run(state or None, number of steps) -> (params, optimizer state), as any loop does it."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(of)(params), state, params)
        return optax.apply_updates(params, updates), state

    def run(steps, at=None):
        params, state = (start, tx.init(start)) if at is None else at
        for _ in range(steps):
            params, state = step(params, state)
        return params, state

    return run


def kept(params, paths=KERNELS):
    leaves = dict(flatten(params))
    return {p: int(np.count_nonzero(leaves[p])) for p in paths}


def same(a, b):
    return [p for (p, x), (_, y) in zip(flatten(a), flatten(b), strict=True) if not np.array_equal(x, y)]


@pytest.mark.parametrize("module", ["once", "transform", "mask_steps", "straight_through"])
def test_the_examples_run(module):
    assert doctest.testmod(importlib.import_module(f"jprune.methods.weights.sparse_training.{module}")).failed == 0


# -- every algorithm ends on the target, in a loop that knows nothing ------------------------------------------------------

RUNS = {
    "magnitude": (Magnitude(), MaskSteps("cubic", 0, 10, 4)),  # the end is no multiple of every
    "saliency": (Saliency(), MaskSteps("linear", 2, 11, 3)),
    "random": (Random(), MaskSteps("exponential", 1, 11, 5)),
    "static": (Static(), MaskSteps("constant")),
    "SET": (SET(0.5), MaskSteps("constant", 3, 9, 3)),
    "RigL": (RigL(0.5), MaskSteps("constant", 3, 9, 3)),
    "GraNet": (RigL(0.5), MaskSteps("cubic", 1, 10, 3)),  # the sparsity rises while weights regrow
    "AC/DC": (ACDC(), MaskSteps("one_shot", 2, 10, 4)),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_parameters_end_exactly_as_sparse_as_asked(name):
    method, steps = RUNS[name]
    run = trainer(sparsify(optax.adam(1e-2), 0.8, method, steps))
    params, state = run(12)
    assert density(masks_of(state)).kept == counts(SHAPES, 0.8)
    assert same(apply(params, masks_of(state)), params) == []
    assert all(0 <= n - kept(params)[p] <= 2 for p, n in counts(SHAPES, 0.8).items())  # a dead unit's weights stay 0
    assert loss(params) < loss(apply(PARAMS, masks_of(state)))  # what stays has been trained
    assert all(np.count_nonzero(params[k]["bias"]) == params[k]["bias"].size for k in ("in", "out"))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state)) and int(state.step) == 12
    assert all(m.dtype == bool for m in masks_of(state).values())


@pytest.mark.parametrize(
    "how, want",
    [
        ({"distribution": "erk"}, counts(SHAPES, 0.8, "erk")),
        ({"distribution": {"out*": 0.5}}, counts(SHAPES, 0.8, {"out*": 0.5})),
        ({"distribution": {"out*": None}}, counts(SHAPES, 0.8, {"out*": None})),
        ({"pattern": {"in/kernel": "row", "*/bias": "unstructured"}}, {"in/kernel": 19, "in/bias": 2, "out/bias": 1}),
        ({"pattern": {"in/kernel": "block:2x4"}}, {"in/kernel": 16}),
        ({"pattern": {"in/kernel": "2:4", "out/kernel": "unstructured"}}, {"in/kernel": 48, "out/kernel": 10}),
    ],
)  # fmt: skip
def test_leaves_have_their_own_patterns_and_shares(how, want):
    tx = sparsify(optax.sgd(0.1), 0.8, steps=MaskSteps("constant"), **how)
    masks = masks_of(tx.init(PARAMS))
    assert density(masks).kept == want
    if "pattern" in how:
        assert check(masks, how["pattern"])


def test_the_model_as_a_whole_may_be_compared():
    params = {"a": normal(0, 6, 6), "b": 1000 * normal(1, 6, 6)}
    for method, want in ((Magnitude(), {"a": 0, "b": 36}), (Magnitude(normalise=True), None)):
        tx = sparsify(optax.sgd(0.1), 0.5, method, MaskSteps("constant"), pattern="model")
        found = density(masks_of(tx.init(params))).kept
        assert sum(found.values()) == 36 and (found == want if want else 9 < found["a"] < 27)
    tx = sparsify(optax.sgd(0.1), 0.5, RigL(), MaskSteps("constant", 0, 4, 2), pattern="model")
    params, state = trainer(tx, lambda p: jnp.sum(jnp.sin(p["a"]) @ p["b"]), params)(3)
    assert sum(density(masks_of(state)).kept.values()) == 36 and same(apply(params, masks_of(state)), params) == []


def test_n_falls_step_by_step_to_its_target():
    """Iterative N:M: 8, 5, 3 and 2 of 8 for a linear schedule, and the pattern holds at each step."""
    tx = sparsify(optax.sgd(0.05), None, Magnitude(), MaskSteps("linear", 0, 6, 2), pattern={"in/kernel": NM(2, 8)})
    run, at, seen = trainer(tx), None, []
    for _ in range(4):
        at = run(2, at)
        n = np.asarray(masks_of(at[1])["in/kernel"]).sum(0)
        seen.append(sorted(set(n.tolist())))
    assert seen == [[math.ceil(8 * s)] for s in (1 - 0.75 / 4, 1 - 0.75 / 2, 1 - 0.75 * 3 / 4)] + [[2]]
    assert check({"w": dict(flatten(at[0]))["in/kernel"] != 0}, "2:8") and kept(at[0])["out/kernel"] == 48


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("gradients", [jnp.float32, jnp.bfloat16])
def test_zeros_are_exact_in_every_dtype(dtype, gradients):
    params = {"w": normal(0, 16, 16).astype(dtype)}
    tx = sparsify(optax.sgd(1e-2), 0.75, steps=MaskSteps("constant"))
    updates, state = tx.update({"w": normal(1, 16, 16).astype(gradients)}, tx.init(params), params)
    new = optax.apply_updates(params, updates)["w"]
    assert new.dtype == dtype and np.array_equal(np.asarray(new != 0), np.asarray(state.masks["w"]))


def test_masked_weights_are_no_parameters_for_the_optimizer():
    seen = optax.GradientTransformation(lambda p: None, lambda g, s, p=None: (g, s))
    tx = sparsify(optax.chain(seen, optax.trace(0.9)), 0.75, steps=MaskSteps("constant"))
    _, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    want = apply(GRADIENTS, masks_of(state))
    assert same(state.inner[1].trace, want) == []


# -- schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one_shot", "linear", "cubic", "exponential"])
def test_the_last_choice_is_the_target_and_none_brings_weights_back(kind):
    steps = MaskSteps(kind, 3, 99, 10)
    table = amounts(steps, tuple(SHAPES.items()), (("n", NM(1, 4)),), 0.9, "erk")
    due = [t for t in range(120) if steps.due(t)]
    assert due == [*range(3, 99, 10), 99] and len(due) == steps.number == len(table.kept)
    assert [int(steps.index(t)) for t in due] == list(range(steps.number))
    assert dict(zip(table.paths, table.kept[-1].tolist(), strict=True)) == counts(SHAPES, 0.9, "erk")
    assert (np.diff(table.kept.astype(int), axis=0) <= 0).all() and (np.diff(table.groups["n"]) <= 0).all()
    assert table.groups["n"][-1] == 1
    # where the largest remainders of a sparsity alone would bring one back
    sizes = (("a", (4, 3)), ("b", (7, 8)), ("c", (2, 2)))
    table = amounts(MaskSteps(kind, 0, 19), sizes, (), 0.9, "uniform").kept
    assert (np.diff(table.astype(int), axis=0) <= 0).all()
    if kind == "cubic":
        keep = 1 - 0.9 * (1 - (1 - np.arange(1, 12) / 11) ** 3)
        table = amounts(steps, tuple(SHAPES.items()), (), 0.9, "erk")
        assert np.abs(table.kept.sum(1) - 144 * keep).max() < 3


def test_leaves_go_to_their_own_sparsities_together():
    how = (("out*", None), ("in/kernel", 0.9), ("*", 0.5))
    for others in (0.8, 0.0):  # which no leaf is left to have
        table = amounts(MaskSteps("linear", 0, 3), (*SHAPES.items(), ("more", (10, 10))), (), others, how)
        assert table.paths == ("in/kernel", "more")
        assert table.kept.tolist() == [[74, 88], [53, 75], [31, 62], [10, 50]]


def test_masks_made_before_training_are_not_chosen_again_at_once():
    assert [t for t in range(9) if MaskSteps("constant", 0, 6, 3).due(t)] == [3, 6]
    assert not any(MaskSteps("constant").due(t) for t in range(3)) and MaskSteps().due(0)


@pytest.mark.parametrize(
    "wrong", [{"kind": "cube"}, {"every": 0}, {"start": -1}, {"start": 5, "end": 4}, {"end": 2.5}, {"start": True}]
)
def test_steps_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"masks (go|are)|is a number of steps"):
        MaskSteps(**wrong)


def test_tables_that_would_not_fit_are_refused():
    tx = sparsify(optax.sgd(0.1), 0.5, steps=MaskSteps("cubic", 0, 2_000_000_000))
    with pytest.raises(ValueError, match="choose them less often"):
        tx.init(PARAMS)


# -- algorithms against numpy --------------------------------------------------------------------------------------------


def top(scores, k):
    out = np.zeros(scores.size, bool)
    out[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return out.reshape(scores.shape)


def one_choice(method, weights, gradient, mask, step=3, last=9):
    """What a method makes of a mask at one step, by way of the transformation; without the optimizer's part."""
    tx = sparsify(optax.sgd(0.1), 0.75, method, MaskSteps("constant", step, last))
    params = {"w": jnp.where(mask, weights, 0)}
    state = tx.init(params)._replace(step=jnp.int32(step), masks={"w": mask})
    updates, state = tx.update({"w": gradient}, state, params)
    return np.asarray(state.masks["w"]), np.asarray(optax.apply_updates(params, updates)["w"]), params["w"]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    w, g = normal(0, 10, 12), normal(1, 10, 12)
    mask = jnp.asarray(top(np.random.default_rng(2).random((10, 12)), 30))
    got, after, before = one_choice(RigL(0.4), w, g, mask)
    share = 0.4 / 2 * (1 + math.cos(math.pi * 3 / 9))
    n = math.floor(share * 30)
    survive = top(np.where(mask, np.abs(w), -np.inf), 30 - n)
    want = survive | top(np.where(survive, -np.inf, np.abs(g)), n)
    assert n > 5 and np.array_equal(got, want) and got.sum() == 30 and (got & ~np.asarray(mask)).sum() > 3
    # at this step nothing trains: what is left keeps its value, what grows starts from zero
    assert np.array_equal(after, np.where(got, before, 0)) and not after[got & ~np.asarray(mask)].any()


def test_set_drops_the_smallest_and_grows_at_random():
    w, mask = normal(0, 10, 12), jnp.asarray(top(np.random.default_rng(2).random((10, 12)), 30))
    got, _, _ = one_choice(SET(0.4), w, normal(1, 10, 12), mask)
    again, _, _ = one_choice(SET(0.4), w, normal(9, 10, 12), mask)  # gradients do not matter
    survive = top(np.where(mask, np.abs(w), -np.inf), 30 - math.floor(0.4 / 2 * (1 + math.cos(math.pi / 3)) * 30))
    assert (
        np.array_equal(got, again)
        and got.sum() == 30
        and (got >= survive).all()
        and not (got == np.asarray(mask)).all()
    )


def test_saliency_and_magnitude_keep_the_largest_scores():
    w, g, everything = normal(0, 10, 12), normal(1, 10, 12), jnp.ones((10, 12), bool)
    tx = sparsify(optax.sgd(0.1), 0.75, Saliency())
    masks = masks_of(tx.update({"w": g}, tx.init({"w": w}), {"w": w})[1])
    assert np.array_equal(masks["w"], top(np.abs(np.asarray(w * g)), 30))
    got, after, before = one_choice(Magnitude(), w, g, everything)
    assert np.array_equal(got, top(np.abs(np.asarray(w)), 30))
    assert np.allclose(after, np.where(got, before - 0.1 * g, 0))  # these train at this step


def test_acdc_alternates_and_ends_sparse():
    run, at, seen = trainer(sparsify(optax.sgd(0.1), 0.75, ACDC(), MaskSteps("one_shot", 1, 7, 2))), None, []
    for _ in range(9):
        at = run(1, at)
        seen.append(int(masks_of(at[1])["out/kernel"].sum()))
    assert seen == [48, 48, 48, 12, 12, 48, 48, 12, 12]  # choices at 1, 3, 5, 7; the last one compresses


def test_n_m_holds_while_weights_regrow():
    tx = sparsify(optax.adam(1e-2), None, RigL(0.5), MaskSteps("constant", 1, 9, 2), pattern="2:4")
    first = masks_of(tx.init(PARAMS))
    params, state = trainer(tx)(4)
    assert check(masks_of(state), "2:4") and density(masks_of(state)).kept == {"in/kernel": 48, "out/kernel": 24}
    assert same(apply(params, masks_of(state)), params) == []
    assert not np.array_equal(first["in/kernel"], masks_of(state)["in/kernel"])


# -- optimizer states ----------------------------------------------------------------------------------------------------

LABELS = {"in": {"kernel": "a", "bias": "b"}, "out": {"kernel": "b", "bias": "a"}}
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "adafactor, unfactored": optax.adafactor(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "rmsprop": optax.rmsprop(1e-2, initial_scale=0.5, momentum=0.9),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "multi_transform": optax.multi_transform({"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, LABELS),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": optax.masked(optax.adam(1e-2), {"in": {"kernel": True, "bias": False}, "out": True}),
    "sm3": optax.sm3(1e-2),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "none": optax.identity(),
}
BACK = {"in/kernel": np.random.default_rng(0).random((8, 12)) < 0.3}


def as_used(state):
    """The state with other numbers in place of those of the beginning."""
    leaves, treedef = jax.tree.flatten(state)
    new = [np.full(x.shape, 7, x.dtype) if np.size(x) > 1 else x for x in leaves]
    return jax.tree.unflatten(treedef, new)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_knows_of_a_weight_starts_anew(name):
    tx = OPTIMIZERS[name]
    check_followed(tx, PARAMS)
    fresh, used = tx.init(PARAMS), as_used(tx.init(PARAMS))
    got = restarted(tx, used, PARAMS, BACK)
    assert jax.tree.structure(got) == jax.tree.structure(used)
    followed = 0
    for (path, x), (_, new), (_, old) in zip(flatten(got), flatten(fresh), flatten(used), strict=True):
        own = path.endswith("in/kernel") and np.shape(x) == (8, 12)
        followed += own
        assert np.array_equal(x, np.where(BACK["in/kernel"], new, old) if own else old), path
    assert followed == {"adam": 2, "adamw": 2, "lion": 1, "adafactor": 0, "adafactor, unfactored": 1, "amsgrad": 3,
                        "rmsprop": 2, "sgd": 1, "inject_hyperparams": 2, "multi_transform": 2, "MultiSteps": 3, "masked": 2,
                        "sm3": 1, "schedule_free": 2, "muon": 1, "chain": 2, "apply_if_finite": 2, "none": 0}[name]  # fmt: skip


def test_states_that_mix_weights_are_named():
    odd = optax.GradientTransformation(
        lambda p: optax.TraceState(jax.tree.map(lambda x: jnp.zeros((3, *x.shape, 2)), p)), optax.trace(0.9).update
    )
    halves = optax.GradientTransformation(
        lambda p: optax.TraceState(jnp.zeros(sum(x.size for x in jax.tree.leaves(p)))), optax.trace(0.9).update
    )
    for tx, said in (
        (optax.flatten(optax.adam(1e-2)), "cannot tell its parts"),
        (halves, r"'trace' of TraceState has shape \(160,\), which mixes"),
        (odd, r"'trace' of TraceState has shape \(3, 12, 2\) for 'in/bias', \(12,\)"),
    ):
        with pytest.raises(ValueError, match=f"(?s)cannot be started anew for single weights: .*{said}"):
            sparsify(tx, 0.5, RigL(), MaskSteps("constant", 1, 9, 2)).init(PARAMS)
        sparsify(tx, 0.5).init(PARAMS)  # where no weight regrows, nothing needs to be followed


@pytest.mark.parametrize("name", ["lion", "multi_transform", "MultiSteps"])
def test_rigl_trains_with_it(name):
    """Where jaxpruner stops: biases without masks, and states other than its five."""
    params, state = trainer(sparsify(OPTIMIZERS[name], 0.8, RigL(0.5), MaskSteps("constant", 2, 6, 2)))(8)
    assert density(masks_of(state)).kept == counts(SHAPES, 0.8) and loss(params) < loss(apply(PARAMS, masks_of(state)))


def test_extra_arguments_reach_the_optimizer():
    tx = sparsify(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)), 0.5)
    state = tx.init(PARAMS)
    for value in (1.0, 2.0, 3.0):
        _, state = tx.update(GRADIENTS, state, PARAMS, value=jnp.float32(value))
    assert float(state.inner[1].scale) < 1


# -- training loops of others --------------------------------------------------------------------------------------------


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=True)(nn.Dense(12)(x))
        return nn.Dense(4)(h)


def test_flax_train_states_need_no_change():
    model = Small()
    variables = model.init(jax.random.key(0), X)
    tx = sparsify(optax.adam(1e-2), 0.8, steps=MaskSteps("cubic", 0, 5, 2))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        of = lambda p: jnp.mean((model.apply({**variables, "params": p}, X) - Y) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(of)(state.params))

    for _ in range(7):
        state = step(state)
    paths = ("Dense_0/kernel", "Dense_1/kernel")
    assert kept(state.params, paths) == counts(dict(zip(paths, SHAPES.values(), strict=True)), 0.8)


def test_nnx_optimizers_need_no_change():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, sparsify(optax.adam(1e-2), 0.8, RigL(), MaskSteps("constant", 1, 5, 2)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model))

    for _ in range(4):
        step(model, optimizer)
    masks = masks_of(nnx.as_pure(optimizer.opt_state))
    assert density(masks).kept == {"up/kernel": 19, "down/kernel": 10}
    assert not np.any(np.where(masks["up/kernel"], 0, model.up.kernel[...])) and np.all(model.up.bias[...])
    assert optimizer.step[...] == 4


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    tx = sparsify(optax.adam(1e-2), 0.8, SET(0.5), MaskSteps("constant", 1, 9, 2))
    run = trainer(tx)
    at = run(4)
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "run", at)
        files.wait_until_finished()
        like = jax.eval_shape(lambda p: (p, tx.init(p)), PARAMS)
        back = files.restore(tmp_path / "run", like)
    assert same(back, at) == []
    one, other = run(5, at), trainer(sparsify(optax.adam(1e-2), 0.8, SET(0.5), MaskSteps("constant", 1, 9, 2)))(5, back)
    assert same(one, other) == [] and not np.array_equal(masks_of(one[1])["in/kernel"], masks_of(at[1])["in/kernel"])
    bits = pack(masks_of(one[1]))
    assert sum(b["bits"].nbytes for b in bits.values()) == 18  # of 144 weights
    assert same(unpack(bits, masks_of(one[1])), masks_of(one[1])) == []


def test_seeds_make_runs_differ():
    masks = [
        masks_of(sparsify(optax.sgd(0.1), 0.8, Static(), MaskSteps("constant"), seed=s).init(PARAMS)) for s in (0, 0, 1)
    ]
    assert same(masks[0], masks[1]) == [] and same(masks[0], masks[2]) == list(KERNELS)


# -- a step at which no masks are chosen -----------------------------------------------------------------------------------


def test_masks_are_not_copied_at_steps_that_choose_none():
    tx = sparsify(optax.adam(1e-2), 0.5, SET(), MaskSteps("constant", 5, 10, 5))

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, tx.init(PARAMS)).compile().as_text()
    always = text[text.index("\nENTRY ") :]  # what runs at every step; bodies of loops and branches stand before it
    assert "pred[8,12]" in always
    assert re.findall(r"= pred\[\d\S* copy\(", always) == []


def test_members_of_an_ensemble_change_each_when_it_is_due():
    members = jnp.array([True, False]), jnp.arange(1.0, 3)
    grown = jax.vmap(lambda due, x: once(due, lambda x, by: x * by, x, 3.0))(*members)
    assert grown.tolist() == [3, 2]


def test_derivatives_pass_a_step_that_chooses_masks():
    tx = sparsify(optax.sgd(0.1, momentum=0.9), 0.5, SET(0.5), MaskSteps("constant", 1, 2))
    state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)[1]

    @jax.jit
    def total(inner):
        after = tx.update(GRADIENTS, state._replace(inner=inner), PARAMS)[1]
        return sum(map(jnp.sum, jax.tree.leaves(after.inner[0].trace))), masks_of(after)

    slopes, masks = jax.grad(total, has_aux=True)(state.inner)
    slopes, before = dict(flatten(slopes[0].trace)), masks_of(state)
    assert (slopes["in/bias"] == np.float32(0.9)).all()
    for p in KERNELS:  # momentum is kept, but for that of weights that start anew
        fresh = np.asarray(masks[p] & ~before[p])
        assert fresh.any() and (slopes[p] == np.where(fresh, 0, np.float32(0.9))).all()


# -- straight through ----------------------------------------------------------------------------------------------------


def test_the_loss_sees_the_largest_weights_and_all_get_its_gradient():
    of = masked(loss, 0.75)
    masks = magnitude_masks(PARAMS, 0.75)
    assert density(masks).kept == counts(SHAPES, 0.75)
    sparse = apply(PARAMS, masks)
    value, got = jax.jit(jax.value_and_grad(of))(PARAMS)
    assert np.isclose(value, loss(sparse)) and not np.isclose(value, loss(PARAMS))
    want = jax.grad(loss)(sparse)
    for (p, a), (_, b) in zip(flatten(got), flatten(want), strict=True):
        assert np.allclose(a, b, atol=1e-6), p
    decayed = dict(flatten(jax.grad(masked(loss, 0.75, decay=0.5))(PARAMS)))["in/kernel"]
    w = PARAMS["in"]["kernel"]
    assert np.allclose(decayed - got["in"]["kernel"], np.where(masks["in/kernel"], 0, 0.5 * w), atol=1e-6)
    assert check(magnitude_masks(PARAMS, pattern="2:4"), "2:4")
    with pytest.raises(ValueError, match="decay is -1"):
        masked(loss, 0.5, decay=-1)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, how",
    [
        (r"in \[0, 1\)", {"sparsity": 1.0}),
        (r"in \[0, 1\)", {"sparsity": -0.2}),
        ("needs a sparsity", {}),
        ("fits no leaf; did you mean 'in/kernel'", {"sparsity": 0.5, "pattern": {"in/kernl": "unstructured"}}),
        ("fits no leaf", {"sparsity": 0.5, "distribution": {"in/kernl": 0.5}}),
        ("innermost input axis has 12 entries, which 8", {"pattern": {"out/kernel": "2:8"}}),
        ("say the sparsity themselves", {"sparsity": 0.5, "pattern": "2:4"}),
        ("no parameter has a pattern", {"sparsity": 0.5, "pattern": {"in/*": None}}),
        ("names no sparsity pattern", {"sparsity": 0.5, "pattern": "rows"}),
        ("saliency needs gradients", {"sparsity": 0.5, "method": Saliency(), "steps": MaskSteps("constant")}),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(said, how):
    with pytest.raises(ValueError, match=said):
        sparsify(optax.sgd(0.1), **how).init(PARAMS)


def test_wrong_calls_are_refused():
    tx = sparsify(optax.sgd(0.1), 0.5)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(GRADIENTS, state)
    with pytest.raises(ValueError, match="not of the same leaves: look at 'out/kernel'"):
        tx.update({"in": GRADIENTS["in"]}, state, {"in": PARAMS["in"]})
    with pytest.raises(ValueError, match="scores of 'w' hold NaN"):
        sparsify(optax.sgd(0.1), 0.5, steps=MaskSteps("constant")).init({"w": jnp.full((2, 2), jnp.nan)})
    for share in (-0.1, 1.5, True):
        with pytest.raises(ValueError, match="drop is"):
            RigL(share)
    with pytest.raises(ValueError, match="0 states of sparsify"):
        masks_of(optax.sgd(0.1).init(PARAMS))
    stacked = {"w": jnp.ones((3, 8, 4))}
    how = {"pattern": "matrix", "views": {"w": conventional((3, 8, 4), stacked=1)}, "steps": MaskSteps("constant")}
    masks = masks_of(sparsify(optax.sgd(0.1), 0.75, **how).init(stacked))
    assert np.asarray(masks["w"]).sum((1, 2)).tolist() == [8, 8, 8]
    assert Unstructured("matrix") == Unstructured(how["pattern"])


def test_the_state_of_no_parameters_is_told():
    """What `optax.tree_map_params` needs, so that this transformation may be wrapped as well."""
    tx = optax.chain(optax.clip(1.0), sparsify(optax.adam(1e-2), 0.5))
    doubled = optax.tree_map_params(tx, lambda x: x + 1, tx.init(PARAMS))
    assert float(doubled[1].inner[0].mu["in"]["bias"][0]) == 1 and masks_of(doubled).keys() == set(KERNELS)
