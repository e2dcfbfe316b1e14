"""MaskSparsity: penalties, thresholds, votes against closed forms; invariants; what users may get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.models import build
from jprune.training import TrainConfig, learning_rates

GAMMA = jnp.array([0.5, -0.2, 0.0, 0.01])
KEEP = np.array([1, 0, 0, 1], bool)


def added(kind, gamma=GAMMA, keep=KEEP, s=0.1, rate=5.0, grad=None):
    tx = ms.masked_penalty({"g": 1.0 - keep}, s, kind)
    params = {"g": gamma}
    grads = {"g": jnp.zeros_like(gamma) if grad is None else grad}
    return np.asarray(tx.update(grads, tx.init(params), params, learning_rate=rate)[0]["g"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("l1", [0, -0.1, 0, 0]), ("l2", [0, -0.02, 0, 0]), ("smooth_l1", [0, -0.02, 0, 0])],
)
def test_the_penalty_in_closed_form(kind, expected):
    np.testing.assert_allclose(added(kind), expected, atol=1e-7)


def test_smooth_l1_is_l1_above_its_kink():
    np.testing.assert_allclose(added("smooth_l1", rate=1.0), [0, -0.1, 0, 0], atol=1e-7)  # kink at 0.1 < 0.2


@pytest.mark.parametrize("kind", ms.KINDS)
def test_channels_without_penalty_keep_their_gradient_bitwise(kind):
    grad = jnp.asarray(np.random.default_rng(0).normal(size=4), jnp.float32)
    with_penalty, without = added(kind, grad=grad, s=0.3), added(kind, grad=grad, s=0.0)
    np.testing.assert_array_equal(with_penalty[KEEP], without[KEEP])
    assert (with_penalty[~KEEP & (np.asarray(GAMMA) != 0)] != without[~KEEP & (np.asarray(GAMMA) != 0)]).all()


def test_l1_walks_to_zero_and_flutters_while_smooth_l1_decays():
    rate, s = 0.1, 0.5

    def walk(kind, steps):
        tx = optax.chain(ms.masked_penalty({"g": np.ones(1)}, s, kind), optax.sgd(rate))
        params = {"g": jnp.ones(1)}
        state, seen = tx.init(params), []
        for _ in range(steps):
            updates, state = tx.update({"g": jnp.zeros(1)}, state, params, learning_rate=rate)
            params = optax.apply_updates(params, updates)
            seen.append(float(params["g"][0]))
        return np.array(seen)

    l1 = walk("l1", 60)
    np.testing.assert_allclose(l1[:19], 1 - 0.05 * np.arange(1, 20), atol=1e-5)
    assert (np.abs(l1[19:]) <= 0.05 + 1e-6).all()
    smooth = walk("smooth_l1", 60)
    tail = smooth[np.abs(smooth) < 0.049]
    np.testing.assert_allclose(tail[1:] / tail[:-1], 1 - rate * s, rtol=1e-4)


def test_global_is_masked_with_every_channel_and_strength_does_not_recompile():
    graph, _ = small_network()
    listed = ms.listed_scales(graph)
    everything = ms.leaf_masks(listed, {g: np.zeros(graph.groups[g].size, bool) for g in listed})
    assert everything.keys() == ms.all_masked(graph, listed).keys()
    for path, mask in ms.all_masked(graph, listed).items():
        np.testing.assert_array_equal(mask, everything[path])
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(1)
        return ms.masked_penalty({}, 0.0, "l1").update({"g": jnp.zeros(4)}, state, params)[0]

    for s, keep in ((0.1, KEEP), (0.7, ~KEEP)):
        tx = ms.masked_penalty({"g": 1.0 - keep}, s)
        out = step(tx.init(None), {"g": GAMMA})["g"]
        np.testing.assert_allclose(out, s * np.sign(GAMMA) * (1 - keep), rtol=1e-6)
    assert len(traces) == 1


def test_half_precision_gradients_keep_their_dtype():
    out = added("l1", gamma=GAMMA.astype(jnp.bfloat16), grad=jnp.zeros(4, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), [0, -0.1, 0, 0], atol=1e-3)


def mask_of(*gammas, **rule):
    paths = [f"p{i}" for i in range(len(gammas))]
    gammas = [np.asarray(g, np.float64) for g in gammas]
    return ms.make_mask(dict(zip(paths, gammas, strict=True)), {"group": paths}, ms.MaskRule(**rule))


def test_the_threshold_is_strict():
    np.testing.assert_array_equal(mask_of([0.01, -0.02, 0.0099]).keep["group"], [0, 1, 0])


@pytest.mark.parametrize(
    ("gamma", "keep"),
    [([0.001, 0.003, 0.002], [0, 1, 0]), ([0.002, 0.002, 0.001], [1, 0, 0]), ([5e-4] * 3, [1, 0, 0])],
)
def test_a_layer_keeps_its_minimum(gamma, keep):
    np.testing.assert_array_equal(mask_of(gamma).keep["group"], keep)
    assert not mask_of(gamma, min_keep=0).keep["group"].any()


def test_the_optimal_threshold():
    assert ms.optimal_threshold(np.full(8, 1e-4)) == 1.0
    assert ms.optimal_threshold(np.array([3.0, 4.0]), 0.3) == 0.0
    assert ms.optimal_threshold(np.array([3.0, 4.0]), 0.5) == 3.5
    np.testing.assert_array_equal(mask_of([3.0, 4.0], method="optimal", delta=0.5).keep["group"], [0, 1])


def test_votes_go_from_unanimity_down_and_never_empty_a_group():
    keep, back = ms.vote(np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool), np.ones(4))
    np.testing.assert_array_equal(keep, [0, 1, 1, 1])
    assert back == 0
    torn = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool)
    keep, back = ms.vote(torn, np.array([1.0, 2.0, 9.0, 3.0, 2.5]))
    np.testing.assert_array_equal(keep, [0, 0, 0, 1, 0])  # one vote each but for channel 2: the largest score returns
    assert back == 1
    keep, back = ms.vote(torn, np.ones(5), minimum=0)
    assert not keep.any() and back == 0


def test_a_vote_that_the_minimum_corrects_is_reported():
    g = [0.001, 0.002, 0.003, 1.0, 1.0], [1.0, 1.0, 0.003, 0.002, 0.001]
    out = mask_of(*g)
    assert out.keep["group"].sum() == 1 and out.given_back == {"group": 1}
    assert mask_of(*g, reduce="mean").given_back == {}
    np.testing.assert_array_equal(mask_of(*g, reduce="first").keep["group"], [0, 0, 0, 1, 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_votes_prune_at_least_what_the_most_reluctant_layer_asked(data):
    k, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    prune = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=k, max_size=k)))
    minimum = data.draw(st.integers(0, n))
    keep, back = ms.vote(prune, np.arange(n, dtype=float), minimum)
    assert keep.sum() >= minimum
    assert (~keep).sum() + back >= prune.sum(axis=1).min()
    unanimous = prune.all(axis=0)
    if not back:
        assert (~keep)[unanimous].all()


def test_a_ratio_is_of_all_channels_together():
    a, b = np.linspace(1, 2, 6), np.linspace(0.1, 0.4, 4)
    masks = ms.make_mask({"a": a, "b": b}, {"A": ["a"], "B": ["b"]}, ms.MaskRule("sparsity", sparsity=0.5, min_keep=0))
    np.testing.assert_array_equal(masks.keep["A"], [0, 1, 1, 1, 1, 1])
    assert not masks.keep["B"].any()
    with_minimum = ms.make_mask({"a": a, "b": b}, {"A": ["a"], "B": ["b"]}, ms.MaskRule("sparsity", sparsity=0.5))
    np.testing.assert_array_equal(with_minimum.keep["B"], [0, 0, 0, 1])


def small_network():
    model = build("resnet_digits")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    return jprune.trace(model.apply, variables, x), variables


def test_listed_scales_are_found_by_use():
    graph, _ = small_network()
    inner = ms.listed_scales(graph, coupled=False)
    assert [s for paths in inner.values() for s in paths] == [
        f"params/stage{s}_block{b}/bn1/scale" for s in (1, 2, 3) for b in (1, 2)
    ]
    everything = ms.listed_scales(graph)
    assert sorted(map(len, everything.values())) == [1] * 6 + [3, 3, 3]  # each stage's stream has three BatchNorms
    assert list(ms.listed_scales(graph, only=["*stage2_block1/conv1*"])) == ["params/stage2_block1/conv1/kernel:3"]
    with pytest.raises(ValueError, match="matches no group"):
        ms.listed_scales(graph, only=["stage9*"])
    bare = jprune.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))},
                        jnp.ones((2, 2)))  # fmt: skip
    with pytest.raises(ValueError, match="no normalisation scale"):
        ms.listed_scales(bare)


def test_resnet50_lists_the_published_layers():
    model = build("resnet50")
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    graph = jprune.trace(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)
    assert len(ms.listed_scales(graph, coupled=False)) == 33
    coupled = {len(s): graph.groups[g].size for g, s in ms.listed_scales(graph).items() if len(s) > 1}
    assert sorted(len(s) for s in ms.listed_scales(graph).values() if len(s) > 1) == [4, 4, 5, 7]
    assert coupled[5] == 512 and coupled[7] == 1024


def test_pruned_network_equals_the_one_with_scale_and_shift_zero():
    graph, variables = small_network()
    rng = np.random.default_rng(3)
    variables = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.uniform(size=a.shape), jnp.float32), variables)
    listed = ms.listed_scales(graph)
    masks = ms.make_mask(variables, listed, ms.MaskRule("sparsity", sparsity=0.4))
    zeroed = jax.tree.map(jnp.array, variables)
    for g, paths in listed.items():
        for path in paths:
            layer = zeroed["params"]
            for key in path.split("/")[1:-1]:
                layer = layer[key]
            layer["scale"] = layer["scale"] * masks.keep[g]
            layer["bias"] = layer["bias"] * masks.keep[g]
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
    whole = jax.jit(graph.dense)
    small = jax.jit(graph.replay(masks.keep))(graph.compact(variables, masks.keep), x)
    np.testing.assert_allclose(small, whole(zeroed, x), atol=1e-5 * float(jnp.abs(small).max()))
    assert np.abs(whole(variables, x) - small).max() > 1e-2 * np.abs(small).max()
    everything = {g: np.ones(graph.groups[g].size, bool) for g in listed}
    for old, new in zip(jax.tree.leaves(variables), jax.tree.leaves(graph.compact(variables, everything)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_mask_and_threshold_agree_when_the_scales_are_apart():
    gammas = {"p": np.array([1.0, 1e-5, 0.8, 2e-5])}
    mask = {"G": np.array([1, 0, 1, 0], bool)}
    a = ms.decide_pruning(gammas, {"G": ["p"]}, mask)
    b = ms.decide_pruning(gammas, {"G": ["p"]}, mask, prune_by="mask")
    np.testing.assert_array_equal(a.keep["G"], b.keep["G"])
    assert a.masked_survivors == a.unmasked_losses == 0
    odd = ms.decide_pruning({"p": np.array([1e-5, 1e-5, 0.8, 0.5])}, {"G": ["p"]}, mask)
    np.testing.assert_array_equal(odd.keep["G"], [0, 0, 1, 1])
    assert (odd.masked_survivors, odd.unmasked_losses) == (1, 1)


def test_the_largest_masked_scale():
    variables = {"params": {"a": {"scale": jnp.array([0.5, -2.0, 0.1])}}}
    assert ms.largest_masked(variables, {"params/a/scale": np.array([1, 0, 1.0])}) == pytest.approx(0.5)


def test_the_suggested_strength_brings_a_scale_to_zero_in_a_third_of_the_schedule():
    rates = learning_rates(TrainConfig(epochs=15, learning_rate=0.05), 18)
    s = ms.suggest_s(rates, 0.9, gamma_max=1.0, safety=3.0)
    assert np.sum(rates) * s / (1 - 0.9) == pytest.approx(3.0)
    tx = optax.chain(ms.masked_penalty({"g": np.ones(1)}, s), optax.trace(0.9))
    params, state = {"g": jnp.ones(1)}, None
    state = tx.init(params)
    least = 1.0
    for rate in rates:
        step, state = tx.update({"g": jnp.zeros(1)}, state, params)
        params = {"g": params["g"] - rate * step["g"]}
        least = min(least, abs(float(params["g"][0])))
    assert least < 0.02
    with pytest.raises(ValueError, match="momentum"):
        ms.suggest_s(rates, 1.0)


def test_errors_name_the_offender():
    for broken, message in [
        (lambda: ms.masked_penalty({}, 0.1, "l3"), "kind"),
        (lambda: ms.masked_penalty({}, -1.0), "strength"),
        (lambda: ms.MaskRule("otsu"), "otsu"),
        (lambda: ms.MaskRule(sparsity=1.0), "sparsity"),
        (lambda: ms.decide_pruning({}, {}, {}, prune_by="luck"), "luck"),
        (lambda: ms.make_mask({"p": [1.0, np.nan]}, {"G": ["p"]}, ms.MaskRule()), "'p' is not finite at channel 1"),
        (lambda: ms.make_mask({"p": [1.0]}, {"G": ["q"]}, ms.MaskRule()), "'q'"),
    ]:
        with pytest.raises(ValueError, match=message):
            broken()
    params = {"layer": {"scale": jnp.ones(3)}}
    for path, mask, message in [("layer/scael", np.ones(3), "layer/scael"), ("layer/scale", np.ones(2), "shape")]:
        tx = ms.masked_penalty({path: mask}, 0.1)
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params), params)
    tx = ms.masked_penalty({"layer/scale": np.ones(3)}, 0.1, "smooth_l1")
    with pytest.raises(ValueError, match="learning_rate"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
