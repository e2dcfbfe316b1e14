"""LAPP: closed forms, what must not change, slicing of any network, and the run from start to end."""

import dataclasses
import itertools
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from few_digits import few_digits
from four_devices import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from laws import lively, relative, same_numbers

import jprune
from jprune.methods.channels.lapp import bypass, lapp
from jprune.methods.channels.lapp.export import merge_bypass
from jprune.methods.channels.lapp.gates import gates, ratio, scores
from jprune.methods.channels.lapp.lapp import LappConfig, common_offset, gate, hinge, standardise, target_at
from jprune.methods.channels.lapp.layers import original, sliceable
from jprune.methods.channels.lapp.network import finalise, gated_forward, init, prepare, slice_lapp, update_rules
from jprune.methods.channels.lapp.run import LappRunConfig, run
from jprune.models import rebuild, resnet, vgg
from jprune.surgery.sites import SiteError, select
from jprune.training import TrainConfig, evaluate, sgd, with_own_updates

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)
Z = [-1.3416408, -0.4472136, 0.4472136, 1.3416408]
TERMS = 400  # products behind an output of the networks below


def sigmoid_slope(v):
    s = 1 / (1 + math.exp(-v))
    return s * (1 - s)


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_standardised_scores_gates_and_their_derivative():
    z = standardise(jnp.asarray([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(z, [-1.341641, -0.447214, 0.447214, 1.341641], atol=1e-6)
    np.testing.assert_array_equal(gate(z, 0.0), [0, 0, 1, 1])
    slope = jax.grad(lambda t: gate(z, t, 1.0).sum())(0.0)
    np.testing.assert_allclose(slope, -0.804394, atol=2e-6)
    np.testing.assert_allclose(slope, -2 * (sigmoid_slope(1.341641) + sigmoid_slope(0.447214)), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda t: gate(z, t, 0.5).sum())(0.3),
                               -sum(sigmoid_slope((v - 0.3) / 0.5) for v in Z) / 0.5, rtol=1e-5)  # fmt: skip
    np.testing.assert_array_equal(gate(z, z[2]), [0, 0, 0, 1])  # strictly above
    np.testing.assert_array_equal(gate(z, 9.0, min_keep=2), [0, 0, 1, 1])
    np.testing.assert_array_equal(gate(jnp.zeros(4), 9.0, min_keep=1), [1, 0, 0, 0])
    assert set(np.unique(gate(z, -0.123, 0.7))) <= {0.0, 1.0}  # exactly, not 1 + rounding


def test_the_hinge_and_its_pressure():
    assert float(hinge(0.5, 0.4, 20.0)) == pytest.approx(2.0)
    assert float(hinge(0.39, 0.4, 20.0)) == 0.0 and jax.grad(hinge)(0.39, 0.4, 20.0) == 0.0
    # a_l / F_0 = 0.1, two filters at their threshold
    z = jnp.asarray([0.7, 0.7])
    pressure = jax.grad(lambda t: hinge(0.5 + 0.1 * gate(z, t).sum(), 0.4, 20.0))(0.7)
    np.testing.assert_allclose(pressure, -20 * 0.1 * 2 * 0.25, rtol=1e-6)


def test_schedules():
    for name, half in (("linear", 0.7), ("cubic", 1 - 0.6 * 0.875), ("constant", 0.4)):
        assert target_at(0.5, 0.4, name) == pytest.approx(half) and target_at(1.0, 0.4, name) == pytest.approx(0.4)
    assert target_at(0.0, 0.4) == target_at(0.0, 0.4, "cubic") == 1.0


def two_layers(keep):
    return sum(float(k.sum()) for k in keep.values()) / 8


def test_the_common_offset():
    z, t = {"a": Z, "b": Z}, {"a": 0.0, "b": 0.0}
    half = common_offset(z, t, two_layers, 0.5)
    assert half.offset == 0.0 and half.ratio == 0.5 and sum(k.sum() for k in half.keep.values()) == 4
    quarter = common_offset(z, t, two_layers, 0.25)
    assert 0.4472 <= quarter.offset < 0.45 and sum(k.sum() for k in quarter.keep.values()) == 2
    more = common_offset(z, t, two_layers, 0.8)  # thresholds that went too far come back
    assert -1.3417 <= more.offset <= -0.4472 and more.ratio == 0.75
    assert common_offset(z, t, two_layers, 0.7, nearest=True).ratio == 0.75
    assert common_offset(z, t, two_layers, 0.6, nearest=True).ratio == 0.5
    assert common_offset(z, {"a": -3.0, "b": -3.0}, two_layers, 1.0).ratio == 1.0
    with pytest.raises(lapp.Infeasible, match=r"0\.2 cannot be reached: 0\.25 is left"):
        common_offset(z, t, two_layers, 0.2, min_keep=1)
    assert issubclass(lapp.Infeasible, ValueError)
    with pytest.raises(ValueError, match="layer 'a' are not finite"):
        common_offset({"a": [np.nan, 1.0]}, {"a": 0.0}, two_layers, 0.5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), target=st.floats(0.0, 1.0), least=st.integers(0, 2))
def test_the_offset_against_all_cuts(seed, target, least):
    """Of all cuts of the sorted distances to the thresholds the dearest that meets the target, and the nearest one."""
    rng = np.random.default_rng(seed)
    sizes, price = rng.integers(2, 7, 3), rng.integers(1, 9, 3)
    z = {f"layer{k}": rng.normal(size=n) for k, n in enumerate(sizes)}
    price = dict(zip(z, price.tolist(), strict=True))
    t = {k: rng.uniform(-4, 4) for k in z}
    total = float(sum(price[k] * v.size for k, v in z.items()))

    def cost(keep):
        return sum(price[k] * int(v.sum()) for k, v in keep.items()) / total

    cuts = [-99.0, *sorted(np.concatenate([z[k] - t[k] for k in z]))]
    possible = []
    for o in cuts:
        keep = {k: z[k] - t[k] > o for k in z}
        for k, v in keep.items():
            v[np.argsort(-z[k])[:least]] = True
        possible.append(cost(keep))
    if min(possible) > target:
        with pytest.raises(lapp.Infeasible):
            common_offset(z, t, cost, target, least)
        return
    found = common_offset(z, t, cost, target, least)
    assert found.ratio == max(c for c in possible if c <= target) == cost(found.keep)
    for k in z:  # the offset that is reported gives these masks
        own = z[k] - t[k] > found.offset
        own[np.argsort(-z[k])[:least]] = True
        np.testing.assert_array_equal(found.keep[k], own)
    best = min(possible, key=lambda c: (abs(c - target), c))
    assert abs(common_offset(z, t, cost, target, least, nearest=True).ratio - target) == pytest.approx(
        abs(best - target)
    )


@pytest.mark.parametrize(("kind", "rest"), [("pw", 4_899_456), ("dw", 1_991_296), ("none", 443_008)])
def test_multiply_accumulates_of_resnet20(kind, rest):
    model, x = resnet.cifar(20, shortcut="pad"), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    net = prepare(model, variables, x, LappConfig(0.12, kind))
    assert len(net.layers) == 18 and net.macs == 2 * 40_551_040
    assert {layer.min_keep for layer in net.layers.values()} == {0}
    cost = net.graph.cost({layer.group: np.zeros(layer.size, bool) for layer in net.layers.values()})
    assert cost.macs == 2 * rest
    overhead = {"pw": 0.1099, "dw": 0.0382, "none": 0.0}[kind]
    whole = float(ratio(net, {n: layer.size for n, layer in net.layers.items()}))
    np.testing.assert_allclose(whole, 1 + overhead, atol=5e-5)
    per_filter = [147_456] * 6 + [36_864] + [73_728] * 5 + [18_432] + [36_864] * 5
    slope = jax.grad(lambda w: ratio(net, w))({n: float(layer.size) for n, layer in net.layers.items()})
    np.testing.assert_allclose([float(slope[n]) * 40_551_040 for n in net.layers], per_filter, rtol=1e-6)
    if kind == "pw":  # 12.08 % are left, so this target is out of reach
        shapes = jax.eval_shape(lambda v: init(KEY, net, v), variables)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        with pytest.raises(lapp.Infeasible, match=r"0\.1208 is left"):
            finalise(net, zeros)


def test_the_fraction_of_a_large_network_is_exact_in_float32():
    """1.8e9 MACs lose integers in float32; their fraction does not lose more than its last bits."""
    model, x = resnet.imagenet(18), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    net = prepare(model, jax.eval_shape(model.init, KEY, x), x, LappConfig(0.444))
    assert net.macs == 2 * 1_814_073_344
    rng = np.random.default_rng(0)
    keep = {n: rng.random(layer.size) < 0.4 for n, layer in net.layers.items()}
    exact = net.graph.cost({net.layers[n].group: k for n, k in keep.items()}).macs / net.macs
    soft = jax.jit(lambda w: ratio(net, w))({n: jnp.float32(k.sum()) for n, k in keep.items()})
    assert soft.dtype == jnp.float32
    np.testing.assert_allclose(soft, exact, rtol=5e-7)


# -- the gated and the sliced network --------------------------------------------------------------------------------


def conv(x, w, stride=1):
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def channels_first(v, x, train=False, mutable=False):
    """A plain function: NCHW, OIHW kernels, 'VALID' and dilated windows, a BatchNorm of its own, no residual path."""
    p, stats, new = v["params"], v["batch_stats"], {}

    def block(x, i, **how):
        y = lax.conv_general_dilated(x, p[f"w{i}"], dimension_numbers=("NCHW", "OIHW", "NCHW"), **how)
        mean, var = (y.mean((0, 2, 3)), y.var((0, 2, 3))) if train else (stats[f"m{i}"], stats[f"v{i}"])
        new[f"m{i}"], new[f"v{i}"] = (0.9 * stats[k] + 0.1 * s for k, s in ((f"m{i}", mean), (f"v{i}", var)))
        b = (slice(None), None, None)
        return jax.nn.relu((y - mean[b]) * lax.rsqrt(var[b] + 1e-5) * p[f"g{i}"][b] + p[f"b{i}"][b])

    x = block(x, 0, window_strides=(1, 1), padding="SAME")
    x = block(x, 1, window_strides=(2, 2), padding=[(0, 1), (1, 0)])
    x = block(x, 2, window_strides=(1, 1), padding="VALID", rhs_dilation=(1, 2))
    y = x.mean((2, 3)) @ p["out"]
    return (y, {"batch_stats": new}) if train else y


def plain_variables(rng):
    widths = (3, 4, 8, 8)
    params, stats = {"out": rng.normal(size=(8, 5))}, {}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        params |= {
            f"w{i}": rng.normal(size=(b, a, 3, 2)) / a**0.5,
            f"g{i}": rng.uniform(0.5, 1.5, b),
            f"b{i}": rng.normal(size=b),
        }
        stats |= {f"m{i}": rng.normal(size=b), f"v{i}": rng.uniform(0.5, 1.5, b)}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"params": params, "batch_stats": stats})


def residual():
    model = resnet.small((1, 1), widths=(4, 8))
    return model, lively(jax.eval_shape(model.init, KEY, IMAGES)), IMAGES


def one_block():
    model = resnet.small((1,), widths=(4,))
    return model, lively(jax.eval_shape(model.init, KEY, IMAGES)), IMAGES


def sequential():
    return channels_first, plain_variables(np.random.default_rng(1)), jnp.moveaxis(IMAGES, 3, 1)


NETWORKS = {"residual": residual, "plain function": sequential}


def gated(build, config, thresholds, seed=0):
    """A prepared network whose bypasses, statistics and thresholds are anything but what they start as."""
    model, variables, x = build()
    net = prepare(model, variables, x, config)
    v = init(jax.random.key(seed), net, variables)
    if v["params"]["bypass"]:
        v["params"]["bypass"] = lively(v["params"]["bypass"], seed)
        v["batch_stats"]["bypass"] = lively(v["batch_stats"]["bypass"], seed + 1)
    v["params"]["threshold"] = {n: jnp.float32(thresholds(n)) for n in net.layers}
    v["lapp"]["step"] = jnp.asarray(7, jnp.int32)
    return net, v, x, gated_forward(net, 5, 10)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("residual", kind) for kind in bypass.KINDS), ("plain function", "dw"), ("plain function", "none")],
)
def test_slicing_changes_nothing(name, kind):
    """In both modes, strided or not, with a layer that lost everything; cost and parameters are those promised."""
    first = []

    def thresholds(layer):
        first.append(layer)
        return {1: 4.0, 2: 0.2}.get(len(first), -0.3)

    net, v, x, forward = gated(NETWORKS[name], LappConfig(0.5, kind, min_keep=0), thresholds)
    keep = {n: np.asarray(m) > 0 for n, m in gates(net, v["params"]).items()}
    assert min(k.sum() for k in keep.values()) == 0 and any(0 < k.sum() < k.size for k in keep.values())
    small = slice_lapp(net, v, keep)
    want = jax.jit(forward.evaluate)(v, x)
    assert relative(jax.jit(small.forward.evaluate)(small.variables, x), want) < 1e-5
    plain = jax.jit(net.forward.evaluate)(original(net, v), x)
    assert (kind == "none" and name != "residual") or relative(plain, want) > 1e-2  # masks and bypasses matter
    logits, updates = jax.jit(forward.train)(v, x, KEY)
    got, after = jax.jit(small.forward.train)(small.variables, x, KEY)
    assert relative(got, logits) < 1e-5
    np.testing.assert_allclose(updates["metrics"]["ratio"], net.graph.cost(small.keep).macs / net.macs, rtol=1e-6)
    if kind != "none":  # its statistics do not depend on masks of its own layer
        layer = next(iter(net.layers))
        assert relative(after["batch_stats"]["bypass"][layer], updates["batch_stats"]["bypass"][layer]) < 1e-5
    counted = jprune.trace(
        small.forward.evaluate, small.variables, x, is_param=lambda p: p.startswith("params/")
    ).cost()
    assert counted == net.graph.cost(small.keep)
    sites, params = net.sites[0], sum(w.size for w in jax.tree.leaves(v["params"]["network"]))
    per_filter = {
        n: math.prod(sites[layer.kernels[0]].kernel_shape) // layer.size + 2 for n, layer in net.layers.items()
    }
    beside = sum(w.size for w in jax.tree.leaves(v["params"]["bypass"]))
    assert counted.params == params + beside - sum(per_filter[n] * int((~k).sum()) for n, k in keep.items())
    whole = slice_lapp(net, v, {n: np.ones_like(k) for n, k in keep.items()})
    evaluate_whole = jax.jit(whole.forward.evaluate)
    assert relative(evaluate_whole(whole.variables, x[:2]), evaluate_whole(whole.variables, x)[:2]) < 1e-5


def test_open_masks_without_bypass_are_the_plain_network():
    for build in NETWORKS.values():
        net, v, x, forward = gated(build, LappConfig(0.5, "none"), lambda n: -4.0)
        plain = jax.jit(net.forward.evaluate)(original(net, v), x)
        same_numbers(jax.jit(forward.evaluate)(v, x), plain, terms=TERMS)
        silent, v, x, forward = gated(build, LappConfig(0.5, "pw", bypass_scale=0.0), lambda n: -4.0)
        v = {**init(KEY, silent, original(silent, v)), "lapp": v["lapp"]}  # scale 0, shift 0
        v["params"]["threshold"] = dict.fromkeys(silent.layers, jnp.float32(-4.0))
        same_numbers(jax.jit(forward.evaluate)(v, x), plain, terms=TERMS)


@pytest.mark.parametrize("kind", ["pw", "dw", "lowrank"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_closed_layer_is_its_bypass(kind, stride):
    """Against the bypass written out by hand in float64."""
    rng = np.random.default_rng(stride)
    params = {"s": rng.normal(size=(3, 3, 3, 4)), "w": rng.normal(size=(3, 3, 4, 32))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def fn(p, x):
        return conv(conv(x, p["s"]), p["w"], stride)

    net = prepare(fn, params, IMAGES, LappConfig(0.9, kind))
    (name,) = net.layers
    assert not net.traces[0].groups.get("w:3")  # the output is the user's: it may not shrink, and need not
    v = init(KEY, net, params)
    v["params"]["bypass"], v["batch_stats"]["bypass"] = (
        lively(t["bypass"], 3) for t in (v["params"], v["batch_stats"])
    )
    v["params"]["threshold"][name], v["lapp"]["step"] = jnp.float32(99.0), jnp.asarray(9)
    b, s = v["params"]["bypass"][name], v["batch_stats"]["bypass"][name]
    x = np.asarray(conv(IMAGES, params["s"]), np.float64)
    w = np.asarray(b["kernel"], np.float64)
    h, pad = 8 // stride, (1, 1) if stride == 1 else (0, 1)  # "SAME" at stride 2 pads behind only
    padded = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    if kind == "pw":
        at = 1 - pad[0]
        y = np.einsum("nhwi,io->nhwo", x[:, at::stride, at::stride], w[0, 0])
    else:
        y = np.zeros((3, h, h, w.shape[3]))
        for i in range(3):
            for j in range(3):
                seen = padded[:, i : i + stride * h : stride, j : j + stride * h : stride][:, :h, :h]
                y += np.repeat(seen, 8, axis=3) * w[i, j, 0] if kind == "dw" else seen @ w[i, j]
    if kind == "lowrank":
        assert w.shape[3] == 2  # 32 / 16
        y = y @ np.asarray(b["mix"], np.float64)[0, 0]
    want = (y - np.asarray(s["mean"])) / np.sqrt(np.asarray(s["var"]) + 1e-5) * np.asarray(b["scale"]) + np.asarray(
        b["bias"]
    )
    forward = gated_forward(net, 5, 10)
    assert relative(forward.evaluate(v, IMAGES), want) < 1e-5
    batch = forward.train(v, IMAGES, KEY)
    norm = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * np.asarray(b["scale"]) + np.asarray(b["bias"])
    assert relative(batch[0], norm) < 1e-4
    running = batch[1]["batch_stats"]["bypass"][name]
    np.testing.assert_allclose(running["var"], 0.9 * s["var"] + 0.1 * y.var((0, 1, 2)), rtol=1e-4)
    share = {"pw": 1 / 9, "dw": 1 / 4, "lowrank": 2 / 32 * (1 + 32 / (9 * 4))}[kind]
    own = 3 * (8 // stride) ** 2 * 9 * 4 * 32
    assert net.graph.cost().macs == net.macs + round(share * own)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100.0))
def test_masks_follow_filters_and_not_their_scale(seed, factor):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(3, 3, 5, 11)) * rng.uniform(0.5, 2, 11), jnp.float32)
    s = jnp.abs(w).mean((0, 1, 2))
    t = float(rng.uniform(-1, 1))
    z = standardise(s)
    if float(jnp.abs(z - t).min()) < 1e-3:
        return
    m = np.asarray(gate(z, t))
    np.testing.assert_array_equal(gate(standardise(jnp.abs(factor * w).mean((0, 1, 2))), t), m)
    order = rng.permutation(11)
    np.testing.assert_array_equal(gate(standardise(s[order]), t), m[order])


def test_the_cost_never_grows_with_a_threshold():
    net, v, _, _ = gated(residual, LappConfig(0.5), lambda n: -3.0)

    def at(name, t):
        params = {**v["params"], "threshold": {**v["params"]["threshold"], name: jnp.float32(t)}}
        return float(ratio(net, {n: m.sum() for n, m in gates(net, params).items()}))

    for name in net.layers:
        costs = [at(name, t) for t in np.linspace(-4, 4, 17)]
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


# -- options ---------------------------------------------------------------------------------------------------------


def test_what_moves_thresholds_and_weights():
    """The surrogate's gradient by hand; the ablation cuts the task; "dense" lets masked filters learn."""
    net, v, x, forward = gated(one_block, LappConfig(0.2, beta=0.0), lambda n: 0.1)
    labels = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), jnp.float32)

    def task(forward):
        def loss(params):
            logits, updates = forward.train({**v, "params": params}, x, KEY)
            return (logits * labels).sum() + sum(updates["losses"].values())

        return jax.jit(jax.grad(loss))(v["params"])

    grads = task(forward)
    assert all(abs(float(g)) > 0 for g in grads["threshold"].values())
    alone = dataclasses.replace(net, config=dataclasses.replace(net.config, task_to_threshold=False))
    assert all(float(g) == 0 for g in task(gated_forward(alone, 5, 10))["threshold"].values())
    # the constraint alone: -(beta / tau) sum sig' * a_l / F_0
    pressed = dataclasses.replace(
        alone, config=dataclasses.replace(alone.config, beta=20.0, tau=0.8, schedule="constant")
    )
    z = scores(net, v["params"])
    unit = jax.grad(lambda w: ratio(net, w))({n: float(layer.size) for n, layer in net.layers.items()})
    for n, g in task(gated_forward(pressed, 5, 10))["threshold"].items():
        want = -20 / 0.8 * sum(sigmoid_slope((float(a) - 0.1) / 0.8) for a in z[n]) * float(unit[n])
        np.testing.assert_allclose(g, want, rtol=1e-4)
    name = next(iter(net.layers))
    closed = np.asarray(gates(net, v["params"])[name]) == 0
    block, layer = name.split(".")[:2]
    assert closed.any() and float(jnp.abs(grads["network"][block][layer]["kernel"][..., closed]).max()) == 0
    dense = dataclasses.replace(net, config=dataclasses.replace(net.config, regrow="dense"))
    again = gated_forward(dense, 5, 10)
    same_numbers(jax.jit(again.train)(v, x, KEY)[0], jax.jit(forward.train)(v, x, KEY)[0], terms=TERMS)
    assert float(jnp.abs(task(again)["network"][block][layer]["kernel"][..., closed]).max()) > 0
    # the score's own gradient is off unless asked for

    def first(c):
        gradient = jax.jit(jax.grad(lambda p: gates(c, p)[name].sum() * 1.0))(v["params"])
        return gradient["network"][block][layer]["kernel"]

    scored = dataclasses.replace(net, config=dataclasses.replace(net.config, score_grad=True))
    assert float(jnp.abs(first(net)).max()) == 0 and float(jnp.abs(first(scored)).max()) > 0


def test_warm_up_keeps_masks_open_and_thresholds_where_they_are():
    net, v, x, forward = gated(one_block, LappConfig(0.2), lambda n: 1.0)
    v["lapp"]["step"] = jnp.asarray(4, jnp.int32)

    def loss(params):
        logits, updates = forward.train({**v, "params": params}, x, KEY)
        return (logits**2).sum() + updates["losses"]["constraint"], updates

    grads, updates = jax.jit(jax.grad(loss, has_aux=True))(v["params"])
    assert all(float(g) == 0 for g in grads["threshold"].values())
    assert float(updates["losses"]["constraint"]) == 0 and int(updates["lapp"]["step"]) == 5
    assert float(updates["metrics"]["ratio"]) > 1  # the bypasses
    open_masks = {**v, "params": {**v["params"], "threshold": dict.fromkeys(net.layers, jnp.float32(-4.0))}}
    run = jax.jit(forward.evaluate)
    np.testing.assert_array_equal(run(v, x), run(open_masks, x))


def test_other_scores():
    model, variables, x = residual()
    net = prepare(model, variables, x, LappConfig(0.5, score="bn"))
    v = init(KEY, net, variables)
    s = variables["params"]["stage1_block1"]["bn2"]["scale"]
    np.testing.assert_allclose(
        scores(net, v["params"])["stage1_block1.conv2.kernel"], standardise(jnp.abs(s)), rtol=1e-6
    )
    bare = {"a": jnp.ones((3, 3, 3, 4)), "b": jnp.ones((3, 3, 4, 4))}
    with pytest.raises(ValueError, match="no normalisation scale follows 'b'"):
        prepare(lambda p, x: conv(conv(x, p["a"]), p["b"]), bare, x, LappConfig(0.9, score="bn"))

    net = prepare(model, variables, x, LappConfig(0.5, score="taylor", memory=0.75))
    v = init(KEY, net, variables)
    assert np.all(np.asarray(gates(net, v["params"])["stage1_block1.conv1.kernel"]) == 1)  # nothing is known yet
    grads = jax.tree.map(lambda w: jnp.full_like(w, 2.0), v["params"])
    moved = update_rules(net)["importance"](grads, v["params"])["stage1_block1.conv1.kernel"]
    w = v["params"]["network"]["stage1_block1"]["conv1"]["kernel"]
    np.testing.assert_allclose(moved, 0.25 * jnp.abs((2.0 * w).sum((0, 1, 2))), rtol=1e-5)
    step = update_rules(net)["threshold"]({"threshold": {"a": 3.0, "b": -99.0}}, {"threshold": {"a": 1.0, "b": 0.5}})
    assert float(step["a"]) == -1.5 and float(step["b"]) == 3.5  # rate 0.5; clamped at 4


def test_which_convolutions_are_pruned():
    blocks = resnet.Block((4, 4), 16, 1, "projection"), resnet.Block((4, 4), 16)
    model = resnet.ResNet(resnet.ResNetConfig(4, (blocks,), 10))
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((2, 8, 8, 3)))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    assert list(prepare(model, variables, x, LappConfig(0.9)).layers) == [
        f"stage1_block{i}.conv2.kernel" for i in (1, 2)
    ]
    only = LappConfig(0.9, prune_1x1=True, only=("*block2*",))
    assert list(prepare(model, variables, x, only).layers) == [f"stage1_block2.conv{i}.kernel" for i in (1, 2, 3)]
    net = prepare(model, variables, x, LappConfig(0.9, prune_1x1=True))
    kinds = {n: layer.bypass for n, layer in net.layers.items()}
    assert len(kinds) == 6 and not any("shortcut" in n or "stem" in n for n in kinds)
    assert {kinds[n] for n in kinds if "conv2" in n} == {"pw"}
    assert {kinds[n] for n in kinds if "conv2" not in n} == {"dw"}
    with pytest.raises(SiteError, match="'nowhere'"):
        prepare(model, variables, x, LappConfig(0.9, only=("nowhere",)))
    # without a way around a layer one filter stays, unless a bypass is beside it
    fn, plain, y = sequential()
    least = {
        kind: {layer.min_keep for layer in prepare(fn, plain, y, LappConfig(0.9, kind)).layers.values()}
        for kind in ("none", "pw")
    }
    assert least == {"none": {1}, "pw": {0}}
    assert {layer.min_keep for layer in prepare(fn, plain, y, LappConfig(0.9, min_keep=3)).layers.values()} == {3}
    shared = {"a": jnp.ones((3, 3, 3, 3)), "out": jnp.ones((3, 2))}
    with pytest.raises(SiteError, match=r"(?s)'a'.*used 2 times.*test_lapp.py"):
        prepare(lambda p, x: conv(conv(x, p["a"]), p["a"]), shared, IMAGES, LappConfig(0.9))
    narrow = {"a": jnp.ones((3, 3, 3, 6)), "b": jnp.ones((3, 3, 6, 4))}
    with pytest.raises(ValueError, match="'b' makes 4 channels of 6"):
        prepare(lambda p, x: conv(conv(x, p["a"]), p["b"]), narrow, IMAGES, LappConfig(0.9, "dw"))
    with pytest.raises(ValueError, match="no convolution"):
        prepare(lambda p, x: x @ p["out"], {"out": jnp.ones((3, 2))}, IMAGES, LappConfig(0.9))


def test_coupled_layers_shrink_their_consumers():
    """One threshold a group of the original graph; the result is an ordinary module of smaller widths."""
    net, v, x, forward = gated(residual, LappConfig(0.5, "none", couple=True), lambda n: 0.1)
    assert list(net.layers) == ["stage1_block1.conv1.kernel", "stage2_block1.conv1.kernel"]  # streams have a stem
    assert net.graph is net.traces[0]
    keep = {n: np.asarray(m) > 0 for n, m in gates(net, v["params"]).items()}
    small = slice_lapp(net, v, keep)
    want = jax.jit(forward.evaluate)(v, x)
    assert relative(jax.jit(small.forward.evaluate)(small.variables, x), want) < 1e-5
    assert relative(jax.jit(rebuild(residual()[0], small.variables).apply)(small.variables, x), want) < 1e-5
    assert (
        small.variables["params"]["stage1_block1"]["conv2"]["kernel"].shape[2]
        == keep["stage1_block1.conv1.kernel"].sum()
    )
    # shared thresholds: the mean of the standardised scores; the polynomial is no longer linear in the widths
    p = {"s": jnp.ones((3, 3, 3, 4)), "a": None, "b": None, "c": None}
    rng = np.random.default_rng(0)
    p |= {k: jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32) for k in "abc"}

    def tied(p, x):
        h = conv(x, p["s"])
        return conv(conv(h, p["a"]) + conv(h, p["b"]), p["c"])

    net = prepare(tied, p, IMAGES, LappConfig(0.9, "none", couple=True))
    (layer,) = net.layers.values()
    assert layer.kernels == ("a", "b")
    mean = sum(standardise(jnp.abs(p[k]).mean((0, 1, 2))) for k in "ab") / 2
    np.testing.assert_allclose(scores(net, {"network": p})["a"], mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="bypass='none'"):
        LappConfig(0.5, couple=True)


@pytest.mark.parametrize(("name", "kind"), [("residual", "dw"), ("plain function", "pw")])
def test_merged_bypasses_compute_the_same_with_fewer_operations(name, kind):
    net, v, x, _ = gated(NETWORKS[name], LappConfig(0.5, kind), lambda n: -4.0)
    keep = {n: np.arange(layer.size) % 2 + (i % 2) > 0 for i, (n, layer) in enumerate(net.layers.items())}
    small = slice_lapp(net, v, keep)
    merged, variables = merge_bypass(net, small, small.variables)
    assert relative(jax.jit(merged)(variables, x), jax.jit(small.forward.evaluate)(small.variables, x)) < 1e-5
    macs = [
        jprune.trace(f, p, x).cost().macs for f, p in ((merged, variables), (small.forward.evaluate, small.variables))
    ]
    assert macs[0] < macs[1]
    with pytest.raises(ValueError, match="only a 'pw' or 'dw'"):
        bypass.as_kernel(next(iter(net.sites[0].values())), "lowrank", {}, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("target", 0.0), ("target", 1.5), ("bypass", "rw"), ("score", "l2"), ("schedule", "step"), ("regrow", "yes"),
     ("tau", 0.0), ("start", 5.0), ("beta", -1.0), ("memory", 1.0), ("min_keep", -1)],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(field, value):
    with pytest.raises(ValueError, match=f"LappConfig.{field} is {value!r}"):
        LappConfig(**{"target": 0.5, field: value})


# -- the run ---------------------------------------------------------------------------------------------------------

RECIPE = TrainConfig(epochs=5, batch_size=32, learning_rate=0.1, eval_every_epochs=0)


def ingredients():
    model = resnet.small((1, 1), widths=(4, 8))
    return model, jax.jit(model.init)(KEY, jnp.zeros((1, 8, 8, 1))), few_digits(576, 96)


@pytest.mark.parametrize("kind", ["pw", pytest.param("none", marks=pytest.mark.slow)])
def test_a_run_meets_its_target_and_resumes(kind, tmp_path):
    model, variables, data = ingredients()
    config = LappRunConfig(LappConfig(0.5, kind, schedule="constant"), RECIPE, 1, 4)
    result = run(model, variables, data, config, out=tmp_path, progress=False)
    net = result.network
    step = max(jax.tree.leaves(jax.grad(lambda w: ratio(net, w))({n: 1.0 for n in net.layers})))
    assert 0.5 - float(step) < result.ratio <= 0.5
    assert result.macs[1] == pytest.approx(result.ratio * result.macs[0]) and abs(result.offset) < 0.5
    assert result.accuracy["final"] > 0.3  # three times chance: it has learned
    assert [r["epoch"] for r in result.history] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([r["learning_rate"] for r in result.history],
                               [0.05 * (1 + math.cos(math.pi * (18 * e - 1) / 90)) for e in range(1, 6)], rtol=1e-4)  # fmt: skip
    assert all(t[0] == -3.0 and len(t) == 4 and t[-1] > -3.0 for t in result.thresholds.values())
    assert evaluate(result.model, result.variables, data, 32).accuracy == result.accuracy["final"]
    assert json.loads((tmp_path / "lapp.json").read_text())["kept"] == result.kept
    again = run(model, variables, data, config, out=tmp_path, resume=True, progress=False)
    for a, b in zip(jax.tree.leaves(result.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (again.kept, again.offset, again.thresholds) == (result.kept, result.offset, result.thresholds)


@pytest.mark.slow
def test_thresholds_that_do_not_learn_are_reported():
    model, variables, data = ingredients()
    config = LappRunConfig(LappConfig(0.5, "none", threshold_rate=1e-4), dataclasses.replace(RECIPE, epochs=4), 1, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = run(model, variables, data, config, progress=False)
    assert "no threshold has moved by 0.05" in result.warnings[0] and "final offset" in result.warnings[1]
    assert [str(w.message) for w in seen if "offset" in str(w.message)] and abs(result.offset) > 0.5


@pytest.mark.slow
def test_baselines_choose_their_thresholds_and_train_with_open_masks():
    model, variables, data = ingredients()
    config = LappRunConfig(
        LappConfig(0.5, "none"), dataclasses.replace(RECIPE, epochs=3), 0, 2, learn=False, nearest=True
    )
    result = run(model, variables, data, config, choose=lambda net: dict.fromkeys(net.layers, 0.0), progress=False)
    assert {t for ts in result.thresholds.values() for t in ts} == {-3.0}
    np.testing.assert_allclose([r["ratio"] for r in result.history[:2]], 1.0, rtol=1e-6)
    assert abs(result.ratio - 0.5) < 0.1 and not result.warnings
    with pytest.raises(lapp.Infeasible, match="cannot be reached"):
        run(model, variables, data, dataclasses.replace(config, lapp=LappConfig(0.05, "pw")), progress=False)
    with pytest.raises(ValueError, match="this has to increase"):
        LappRunConfig(LappConfig(0.5), RECIPE, 3, 3)
    assert LappRunConfig(LappConfig(0.5), dataclasses.replace(RECIPE, epochs=200)).stop == 10


def test_neither_decay_nor_momentum_reaches_a_threshold():
    model, variables, _ = ingredients()
    x = jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.float32)
    net = prepare(model, variables, x, LappConfig(0.5, "none"))
    optimizer = with_own_updates(sgd(0.5, 0.9, True), update_rules(net))
    params = init(KEY, net, variables)["params"]
    state, grads = optimizer.init(params), jax.tree.map(lambda w: jnp.full_like(w, -0.1), params)
    for k in range(1, 5):
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(0.1))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(list(params["threshold"].values()), -3.0 + 0.05 * k, rtol=1e-6)


SCRIPT = """
import json, dataclasses, jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh
from jprune.methods.channels.lapp.lapp import LappConfig
from jprune.methods.channels.lapp.run import LappRunConfig, run
from jprune.data import load_digits
from jprune.models import resnet
from jprune.training import TrainConfig
assert jax.device_count() == 4
model = resnet.small((1, 1), widths=(4, 8))
variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
data = load_digits(n_train=256)
config = LappRunConfig(LappConfig(0.5, schedule="constant"),
                 TrainConfig(epochs=4, batch_size=64, learning_rate=0.05, eval_every_epochs=0), 1, 3)
out = []
for mesh in (None, Mesh(np.array(jax.devices()), ("data",))):
    r = run(model, variables, data, config, mesh=mesh, progress=False)
    out.append({"keep": {n: k.tolist() for n, k in r.keep.items()}, "thresholds": r.thresholds})
print(json.dumps(out))
"""


@pytest.mark.slow
def test_four_devices_keep_the_filters_that_one_keeps():
    one, four = run_script(SCRIPT)
    assert one["keep"] == four["keep"] and any(not all(k) for k in one["keep"].values())
    for n, t in one["thresholds"].items():
        np.testing.assert_allclose(four["thresholds"][n], t, atol=1e-3)


def test_a_vgg_is_sliced_like_any_other():
    """Deep and without a residual path; every layer keeps a filter without bypass."""
    model = vgg.vgg(16, pools=(1, 2, 3))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    net = prepare(model, jax.eval_shape(model.init, KEY, x), x, LappConfig(0.3, "none"))
    assert len(net.layers) == 12 and {layer.min_keep for layer in net.layers.values()} == {1}
    assert select(net.traces[0], [net.layers["block5_conv3.kernel"].kernels[0]])
    assert jax.tree.structure(
        sliceable(net, jax.eval_shape(lambda v: init(KEY, net, v), jax.eval_shape(model.init, KEY, x)))
    )
