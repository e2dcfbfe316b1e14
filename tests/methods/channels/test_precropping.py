"""PreCropping: widths of every kind of block in closed form and by brute force, budgets, controls, users' mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune import importance
from jprune.budget import Target
from jprune.data import load_digits
from jprune.methods.channels.precrop import controls as claims
from jprune.methods.channels.precrop import precrop as pc
from jprune.methods.channels.precrop.free_widths import width_variables
from jprune.models import build, rebuild, resnet, vgg
from jprune.tracing.connections import connections
from jprune.training import TrainConfig, evaluate, train


def conv(x, k, groups=1):
    return jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def shape(*s):
    return jax.ShapeDtypeStruct(s, jnp.float32)


X = shape(2, 8, 8, 3)


def around(block, stream):
    """(fn, shapes) of stem - x + block(x) - head."""
    fn, inner = block
    p = {"stem": shape(3, 3, 3, stream), **inner, "head": shape(stream, 10)}

    def whole(p, x):
        h = jax.nn.relu(conv(x, p["stem"]))
        h = jax.nn.relu(h + fn(p, h))
        return h.mean((1, 2)) @ p["head"]

    return whole, p


def basic(c=16, m=16):
    return lambda p, h: conv(jax.nn.relu(conv(h, p["1"])), p["2"]), {"1": shape(3, 3, c, m), "2": shape(3, 3, m, c)}


def bottleneck(c=256, m=64, m2=None, groups=1):
    m2 = m2 or m

    def fn(p, h):
        h = jax.nn.relu(conv(h, p["1"]))
        return conv(jax.nn.relu(conv(h, p["2"], groups)), p["3"])

    return fn, {"1": shape(1, 1, c, m), "2": shape(3, 3, m // groups, m2), "3": shape(1, 1, m2, c)}


def inverted(c=32, h=192, squeeze=0):
    def fn(p, x):
        y = jax.nn.relu(conv(x, p["1"]))
        y = jax.nn.relu(conv(y, p["dw"], h))
        if squeeze:
            s = jax.nn.relu(y.mean((1, 2)) @ p["down"])
            y = y * jax.nn.sigmoid(s @ p["up"])[:, None, None]
        return conv(y, p["3"])

    p = {"1": shape(1, 1, c, h), "dw": shape(3, 3, 1, h), "3": shape(1, 1, h, c)}
    return fn, p | ({"down": shape(h, squeeze), "up": shape(squeeze, h)} if squeeze else {})


def traced(block, stream):
    fn, p = around(block, stream)
    return jprune.trace(fn, p, X), p


# --- closed forms ------------------------------------------------------------------------------------------------


def test_a_basic_block():
    graph, _ = traced(basic(), 16)
    assert pc.ratios(graph, {"1": 0.3, "2": 0.5}) == {"1:3": pytest.approx(0.4)}


def test_an_inverted_bottleneck():
    graph, _ = traced(inverted(), 32)
    rho = pc.ratios(graph, {"1": 0.5, "dw": 1.0, "3": 0.25})
    assert rho == {"1:3": pytest.approx(6336 / 14016)}
    assert round(192 * rho["1:3"]) == 87


def test_depthwise_kernels_ask_nothing_of_a_free_width():
    graph, _ = traced(inverted(), 32)
    rule = pc.WidthRule(stage_width="scale")
    one, two = (pc.ratios(graph, {"1": 0.5, "dw": d, "3": 0.25}, rule)["1:3"] for d in (1.0, 0.1))
    assert one == two == pytest.approx((0.5 * 0.25) ** 0.25)


def test_a_tied_bottleneck():
    graph, _ = traced(bottleneck(), 256)
    d = {"1": 0.5, "2": 3712 / 36864, "3": (20000 - 8192 - 3712) / 16384}
    rho = pc.ratios(graph, d)
    root = (-32768 + np.sqrt(32768**2 + 4 * 36864 * 20000)) / (2 * 36864)
    assert rho == {"1:3": pytest.approx(root), "2:3": pytest.approx(root)}
    assert round(64 * root) == 27


def test_an_untied_bottleneck():
    graph, _ = traced(bottleneck(m2=32), 256)
    d = {"1": 0.3, "2": 0.2, "3": 0.6}
    rho = pc.ratios(graph, d, pc.WidthRule(tied=False))
    r1, r2 = rho["1:3"], rho["2:3"]
    assert r1 / r2 == pytest.approx(np.sqrt(0.3 * np.sqrt(0.2)) / np.sqrt(0.6 * np.sqrt(0.2)))
    n1, n2, n3 = 256 * 64, 9 * 64 * 32, 32 * 256
    assert n1 * r1 + n2 * r1 * r2 + n3 * r2 == pytest.approx(0.3 * n1 + 0.2 * n2 + 0.6 * n3)


def test_grouped_convolutions_keep_their_cardinality():
    graph, p = traced(bottleneck(64, 32, groups=8), 64)
    found = pc.widths(graph, {"1": 0.5, "2": 0.5, "3": 0.5}, Target.params(0.7))
    small = graph.resize(p, found.widths)
    assert small["1"].shape[3] % 8 == 0 and small["1"].shape[3] == 8 * small["2"].shape[2] < 32
    assert set(found.widths) == {g for g, i in graph.groups.items() if i.size == 4}


def test_squeeze_excite_takes_the_mean_of_its_densities_and_does_not_move_the_rest():
    plain, _ = traced(inverted(), 32)
    graph, _ = traced(inverted(squeeze=8), 32)
    d = {"1": 0.5, "dw": 1.0, "3": 0.25}
    for mode in ("keep", "scale"):
        rule = pc.WidthRule(stage_width=mode)
        rho = pc.ratios(graph, {**d, "down": 0.3, "up": 0.9}, rule)
        assert rho.pop("down:1") == pytest.approx(0.6)
        assert rho == pytest.approx(pc.ratios(plain, d, rule))


def mlp(p, x):
    for k in sorted(p):
        x = jax.nn.relu(x) @ p[k]
    return x


def test_a_free_chain_by_the_sqrt_rule():
    p = {"1": shape(3, 8), "2": shape(8, 8), "3": shape(8, 8), "4": shape(8, 5)}
    graph = jprune.trace(mlp, p, shape(6, 3))
    rho = pc.ratios(graph, {"1": 1.0, "2": 0.25, "3": 0.5, "4": 0.3})
    assert rho["1:1"] == pytest.approx(np.sqrt(1.0 * 0.5))
    assert rho["2:1"] == pytest.approx(np.sqrt(0.5 * np.sqrt(0.5)))
    assert rho["3:1"] == pytest.approx(np.sqrt(np.sqrt(0.5) * 0.3))
    ends = jprune.trace(mlp, {k: p[k] for k in "12"}, shape(6, 3), output_free=[(".", 1)])
    rho = pc.ratios(ends, {"1": 1.0, "2": 0.25})
    assert [round(rho[g], 4) for g in ("1:1", "2:1")] == [0.7071, 0.5]


def test_least_squares_zig_zags_where_the_sqrt_rule_does_not():
    p = {str(i): shape(16, 16) for i in range(1, 7)} | {"0": shape(3, 16), "9": shape(16, 16)}
    graph = jprune.trace(mlp, p, shape(6, 3))
    d = {"0": 1.0, **{str(i): 0.02 for i in range(1, 7)}}
    sqrt, lsq = (np.log(list(pc.ratios(graph, d, pc.WidthRule(rule)).values())) for rule in ("sqrt", "lsq"))
    residual = [sum((r[i] + r[i + 1] - np.log(0.02)) ** 2 for i in range(6)) for r in (sqrt, lsq)]
    assert residual[1] < residual[0]
    assert np.abs(np.diff(lsq)).mean() > 2 * np.abs(np.diff(sqrt)).mean()


def test_concatenated_inputs_are_asked_piece_by_piece():
    def fn(p, x):
        h = jnp.concatenate([jax.nn.relu(x @ p["a"]), jax.nn.relu(x @ p["b"])], -1)
        return jax.nn.relu(h @ p["c"]) @ p["d"]

    p = {"a": shape(3, 4), "b": shape(3, 6), "c": shape(10, 8), "d": shape(8, 2)}
    graph = jprune.trace(fn, p, shape(5, 3))
    rho = pc.ratios(graph, {"a": 0.5, "b": 1.0, "c": 0.25, "d": 1.0}, pc.WidthRule(stage_width="scale"))
    assert rho == pytest.approx({"a:1": np.sqrt(0.5 * 0.5), "b:1": np.sqrt(0.5), "c:1": np.sqrt(0.5)})


# --- which widths are free -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "free", "sizes"),
    [
        ("resnet20", 9, {16, 32, 64}),
        ("resnet56_pad", 27, {16, 32, 64}),
        ("resnet18", 8, {64, 128, 256, 512}),
        ("resnet50", 32, {64, 128, 256, 512}),
        ("mobilenet_v2_small", 16, {96, 144, 192, 384, 576, 960}),
        ("shufflenet_v2_small", 16, {58, 116, 232}),
    ],
)
def test_widths_inside_blocks_are_found_in_the_zoo(name, free, sizes):
    module, x = build(name, 10), shape(2, 32, 32, 3)
    graph = jprune.trace(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)
    found = width_variables(graph)
    assert found.mode == "keep"
    assert {graph.groups[g].size for g in found.groups} == sizes
    names = {g.split("/")[1] for g in found.groups}
    assert len(names) == free if name != "resnet50" else len(names) == free // 2 and len(found.groups) == free
    assert all(len(b.groups) == (2 if name == "resnet50" else 1) for b in found.blocks)


def test_chains_are_free_everywhere_and_connections_say_why_others_are_not():
    module, x = build("vgg16_bn", 10), shape(2, 32, 32, 3)
    graph = jprune.trace(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)
    assert width_variables(graph).mode == "scale" and set(width_variables(graph).groups) == set(graph.groups)
    graph, _ = traced(inverted(squeeze=8), 32)
    facts = connections(graph)
    assert facts.summed == {"stem:3"} or len(facts.summed) == 1
    assert facts.gates == {"up"} and not facts.concatenated


def test_normalising_connects_nothing():
    def fn(p, x):
        h = x @ p["a"]
        h = jax.nn.softmax(h - h.mean(1, keepdims=True), axis=1)  # both keep the channels, neither is a skip
        return h @ p["b"]

    graph = jprune.trace(fn, {"a": shape(3, 8), "b": shape(8, 2)}, shape(5, 7, 3))
    assert not connections(graph).summed and connections(graph).nonlinear == {"a:1"}


def test_two_branches_that_are_added_are_joined():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"] + jnp.tanh(x @ p["b"])) @ p["c"]

    graph = jprune.trace(fn, {"a": shape(3, 8), "b": shape(3, 8), "c": shape(8, 2)}, shape(5, 3))
    assert connections(graph).summed == set(graph.groups)


# --- budgets -----------------------------------------------------------------------------------------------------


def chain(widths=(8, 12, 16), bias=False):
    module = vgg.VGG(vgg.VGGConfig(tuple((w,) for w in widths), (), 10, bias, pools=(1,)))
    x = shape(2, 8, 8, 1)
    v = jax.eval_shape(module.init, jax.random.key(0), x)
    return module, v, x, jprune.trace(module.apply, v, x)


MODULE, SHAPES, IMAGE, CHAIN = chain()
KERNELS = importance.weight_leaves(CHAIN)


@given(st.lists(st.floats(0.02, 1.0), min_size=4, max_size=4), st.floats(0.1, 1.0), st.sampled_from(["params", "macs"]),
       st.sampled_from([1, 2, 4]), st.sampled_from([1.0, 2.0]), st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_budget_holds_and_one_more_channel_would_break_it(d, amount, quantity, step, cap, count_bn):
    rule = pc.WidthRule(round_to=step, cap=cap, count_bn=count_bn)
    found = pc.widths(CHAIN, dict(zip(KERNELS, d, strict=True)), getattr(Target, quantity)(amount), rule)
    small = {g: w for g, w in found.widths.items()}

    def count(widths):
        if quantity == "macs" or count_bn:
            return getattr(CHAIN.cost(widths=widths), quantity)
        shapes = importance.at_init.weights_of(CHAIN.resize(SHAPES, widths), KERNELS)
        return sum(int(np.prod(s.shape)) for s in shapes.values())

    assert found.achieved[quantity] == count(small) <= found.asked[quantity] == pytest.approx(amount * count({}))
    for g, w in small.items():
        size, top = CHAIN.groups[g].size, int(cap * CHAIN.groups[g].size)
        assert w <= top and (w % step == 0 or w in (size, top) or w == 1)
        larger = min((w // step + 1) * step, top)
        assert larger == w or count({**small, g: larger}) > found.asked[quantity]


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2))
@settings(max_examples=15, deadline=None)
def test_block_widths_against_all_integers(d):
    """The width whose block has the number of weights nearest sum(d n) is the rounded one (linear in the width)."""
    graph, _ = traced(basic(6, 9), 6)
    rho = pc.ratios(graph, dict(zip("12", d, strict=True)))["1:3"]
    target = sum(d) * 9 * 6 * 9
    best = min(range(10), key=lambda m: abs(2 * 9 * 6 * m - target))
    assert abs(9 * rho - best) <= 0.5 + 1e-9


def test_bottleneck_widths_against_all_integers():
    graph, _ = traced(bottleneck(16, 8), 16)
    d = {"1": 0.5, "2": 0.3, "3": 0.8}
    n = {"1": 128, "2": 576, "3": 128}
    target = sum(d[k] * n[k] for k in n)
    best = min(range(1, 9), key=lambda m: abs(16 * m + 9 * m * m + 16 * m - target))
    assert best == round(8 * pc.ratios(graph, d)["1:3"])


def test_everything_kept_changes_nothing():
    for rule in (pc.WidthRule(), pc.WidthRule("lsq"), pc.WidthRule(round_to=5)):
        found = pc.widths(CHAIN, dict.fromkeys(KERNELS, 1.0), Target.params(1.0), rule)
        assert found.widths == {g: i.size for g, i in CHAIN.groups.items()}


def test_two_budgets_hold_together():
    found = pc.precrop(MODULE, SHAPES, IMAGE, [Target.params(0.5), Target.macs(0.2)], "synexp")
    cost, dense = CHAIN.cost(widths=found.widths), CHAIN.cost()
    assert cost.params <= 0.5 * dense.params and cost.macs <= 0.2 * dense.macs


def test_preconfig_widens_some_layers_within_the_same_budgets():
    budgets = [Target.params(0.8), Target.macs(1.0)]
    wide, narrow = (
        pc.preconfig(MODULE, SHAPES, IMAGE, budgets),
        pc.precrop(MODULE, SHAPES, IMAGE, budgets, "synexp"),
    )
    assert any(w > CHAIN.groups[g].size for g, w in wide.widths.items())
    assert all(w <= CHAIN.groups[g].size for g, w in narrow.widths.items())
    assert sum(np.log(list(wide.densities.values()))) >= sum(np.log(list(narrow.densities.values())))
    cost, dense = CHAIN.cost(widths=wide.widths), CHAIN.cost()
    assert cost.params <= 0.8 * dense.params and cost.macs <= dense.macs
    fresh = jax.eval_shape(rebuild(MODULE, CHAIN.resize(SHAPES, wide.widths)).init, jax.random.key(0), IMAGE)
    assert jprune.trace(MODULE.apply, SHAPES, IMAGE).cost(widths=wide.widths).params == sum(
        int(np.prod(s.shape)) for s in jax.tree.leaves(fresh["params"])
    )


def test_a_budget_out_of_reach_says_what_is_reachable():
    graph, _ = traced(basic(), 16)
    least = graph.cost(widths={"1:3": 1}).params
    with pytest.raises(ValueError, match=f"{least:,} is the least with stage_width='keep'.*stage_width='scale'"):
        pc.widths(graph, {"1": 0.1}, Target.params(least - 1))
    assert pc.widths(graph, {"1": 0.1}, Target.params(least)).widths == {"1:3": 1}


LONG = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("resnet50", "resnet56", "mobilenet_v2_small", "vgg19_bn", "shufflenet_v2_small")
]


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", *LONG])
def test_every_group_stays_coupled_at_every_budget(name):
    """Also at budgets that stages of full width cannot meet, which say so."""
    module, x = build(name, 10), shape(2, 32, 32, 3)
    v = jax.eval_shape(module.init, jax.random.key(0), x)
    graph = jprune.trace(module.apply, v, x)
    d = importance.erk({p: graph.leaves[p].shape for p in importance.weight_leaves(graph)}, 0.1)
    for keep, mode in ((0.7, "keep"), (0.5, "scale"), (0.1, "keep"), (0.1, "scale"), (0.02, "scale")):
        if mode == "keep" and name.startswith("vgg"):
            continue
        try:
            found = pc.widths(graph, d, Target.params(keep), pc.WidthRule(stage_width=mode))
        except ValueError as error:
            assert (keep, mode) == (0.1, "keep") and "is the least" in str(error)
            continue
        assert found.achieved["params"] <= found.asked["params"]
        shapes = graph.resize(v, found.widths)
        counted = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes["params"]))
        assert counted == found.achieved["params"]
        assert jax.eval_shape(rebuild(module, shapes).apply, shapes, x).shape == (2, 10)


# --- the whole thing ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    module = resnet.small((1,), 4, widths=(8,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 4, 1)), jnp.float32)
    return module, jax.jit(module.init)(jax.random.key(0), x), x, [(x, jnp.arange(16) % 4)]


@pytest.mark.parametrize("method", [*pc.METHODS, *pc.CONTROLS])
def test_every_method_meets_the_budget(small, method):
    module, v, x, batches = small
    found = pc.precrop(module, v, x, Target.params(0.6), method, batches=batches, key=jax.random.key(1),
                       scoring=pc.Scoring(rounds=5, bn="train"))  # fmt: skip
    cost, dense = found.graph.cost(widths=found.widths).params, found.graph.cost().params
    assert 0.45 * dense < cost <= 0.6 * dense
    assert set(found.widths) == {"params/stage1_block1/conv1/kernel:3"}
    if method not in pc.CONTROLS:
        n = {p: found.graph.leaves[p].shape for p in found.densities}
        total = sum(np.prod(s) for s in n.values())
        kept = sum(d * np.prod(n[p]) for p, d in found.densities.items())
        assert abs(kept / total - 0.6) < 2 / total


def test_densities_are_averaged_over_initialisations_and_exempt_leaves_are_ignored(small):
    module, v, x, _ = small
    other = jax.jit(module.init)(jax.random.key(7), x)
    scoring = pc.Scoring(exempt=("params/head/kernel",), rounds=3)
    one, two, both = (
        pc.precrop(module, a, x, Target.params(0.6), "magnitude", scoring=scoring, more=more).densities
        for a, more in ((v, ()), (other, ()), (v, (other,)))
    )
    assert "params/head/kernel" not in both
    assert both == pytest.approx({p: (one[p] + two[p]) / 2 for p in one})


def test_synexp_over_paths_and_grasp_with_fresh_matrices(small):
    """With a skip around them the block's own layers are worth less than as a chain; Xavier changes GraSP's densities."""
    module, v, x, batches = small
    graph, ask = jprune.trace(module.apply, v, x), Target.params(0.6)
    chain, paths = (
        pc.layer_densities(module, graph, v, x, "synexp", (Target.params(0.1),), scoring=pc.Scoring(paths=p))
        for p in (False, True)
    )
    conv = "params/stage1_block1/conv1/kernel"
    assert paths[conv] < 0.9 * chain[conv]
    found = pc.precrop(module, v, x, ask, "synexp", scoring=pc.Scoring(paths=True))
    assert found.achieved["params"] <= found.asked["params"]
    plain, drawn = (
        pc.precrop(module, v, x, ask, "grasp", batches=batches, key=jax.random.key(0), scoring=pc.Scoring(xavier=on))
        for on in (False, True)
    )
    assert plain.densities != drawn.densities
    with pytest.raises(ValueError, match="give key="):
        pc.precrop(module, v, x, ask, "grasp", batches=batches, scoring=pc.Scoring(xavier=True))


def test_one_ratio_for_all_is_what_uniform_width_means():
    found = pc.precrop(MODULE, SHAPES, IMAGE, Target.params(0.25), "uniform_width")
    ratio = [w / CHAIN.groups[g].size for g, w in found.widths.items()]
    assert max(ratio) - min(ratio) < 0.2


def test_a_function_of_ones_own_from_widths_to_a_fresh_start():
    rng = np.random.default_rng(0)
    p = {"1": rng.normal(size=(3, 40)) * 0.5, "2": rng.normal(size=(40, 60)) * 0.2, "3": rng.normal(size=(60, 4)) * 0.1}
    p = {k: jnp.asarray(a, jnp.float32) for k, a in p.items()}
    x = jnp.ones((5, 3))
    found = pc.precrop(mlp, p, x, Target.params(0.3))
    fresh = claims.initialise(found.graph, p, found.widths, jax.random.key(0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(lambda s: s.shape, found.graph.resize(p, found.widths))
    assert mlp(fresh, x).shape == (5, 4)
    want = np.std(np.asarray(p["2"])) * np.sqrt(40 / found.widths["1:1"])
    assert np.std(np.asarray(fresh["2"])) == pytest.approx(want, rel=0.2)
    cut = claims.first_channels(found.graph, p, found.widths)
    np.testing.assert_array_equal(cut["1"], p["1"][:, : found.widths["1:1"]])


def test_fresh_leaves_that_are_no_weights_keep_their_values():
    def fn(p, x):
        return jax.nn.relu(x @ p["w"] * p["scale"] + p["shift"]) @ p["v"]

    p = {"w": jnp.ones((3, 8)), "scale": jnp.full(8, 2.0), "shift": jnp.arange(8.0), "v": jnp.eye(8)[:, :2]}
    graph = jprune.trace(fn, p, jnp.ones((5, 3)))
    fresh = claims.initialise(graph, p, {"w:1": 20}, jax.random.key(0))
    assert (fresh["scale"] == 2).all() and fresh["scale"].shape == (20,)
    assert set(np.asarray(fresh["shift"])) <= set(range(8)) and len(set(np.asarray(fresh["shift"]))) > 3


def test_masks_hold_through_training():
    data = load_digits(0, n_train=64)
    module = vgg.VGG(vgg.VGGConfig(((4,), (6,)), (), 10, False, pools=(1,)))
    x = jnp.zeros((2, 8, 8, 1))
    v = jax.jit(module.init)(jax.random.key(0), x)
    paths = importance.weight_leaves(jprune.trace(module.apply, v, x))
    masks = importance.weight_masks(importance.weight_magnitude(v, paths), 0.3)
    model, start = claims.masked(module), claims.with_masks(v, masks)
    trained, _ = train(model, start, data, TrainConfig(epochs=1, batch_size=32, weight_decay=0.0), progress=False)
    for p, m in masks.items():
        before, after = (importance.at_init.weights_of(t, (p,))[p] for t in (v, trained))
        np.testing.assert_array_equal(np.asarray(after)[~m], np.asarray(before)[~m])  # no gradient reached them
        assert (np.asarray(after)[m] != np.asarray(before)[m]).any()
    zeroed = importance.at_init.with_weights(
        {k: a for k, a in trained.items() if k != claims.MASKS},
        {p: importance.at_init.weights_of(trained, (p,))[p] * m for p, m in masks.items()},
    )
    assert evaluate(model, trained, data) == pytest.approx(evaluate(module, zeroed, data), rel=1e-5)


def test_mistakes_are_named(small):
    module, v, x, _ = small
    graph, p = traced(basic(), 16)
    with pytest.raises(ValueError, match="method is one of"):
        pc.precrop(module, v, x, Target.params(0.5), "synaptic")
    with pytest.raises(ValueError, match="no batches"):
        pc.precrop(module, v, x, Target.params(0.5), "snip")
    with pytest.raises(ValueError, match="give key="):
        pc.precrop(module, v, x, Target.params(0.5), "random")
    with pytest.raises(ValueError, match="at least one budget"):
        pc.precrop(module, v, x, [], "erk")
    with pytest.raises(ValueError, match="rule is 'sqrt' or 'lsq'"):
        pc.WidthRule("cubic")
    with pytest.raises(ValueError, match="at least 1"):
        pc.WidthRule(cap=0.5)
    with pytest.raises(ValueError, match="bn is"):
        pc.Scoring(bn="both")
    with pytest.raises(ValueError, match="no kernel or matrix"):
        pc.ratios(graph, {"stem:3": 0.5})
    with pytest.raises(ValueError, match="initialise afresh"):
        claims.first_channels(graph, p, {"1:3": 17})
    with pytest.raises(ValueError, match="masks travel beside"):
        claims.with_masks({"w": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match="mask of 'params/w' has shape"):
        claims.with_masks({"params": {"w": jnp.ones(2)}}, {"params/w": np.ones(3)})
    with pytest.raises(ValueError, match="stage_width='scale'"):
        width_variables(jprune.trace(mlp, {"1": shape(3, 8), "2": shape(8, 5)}, shape(4, 3)), "keep")
