"""Scores of single weights at initialisation: closed forms, invariants, and references that share no code."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import jprune
from experiments.peers import peer
from jprune import importance
from jprune.importance import at_init
from jprune.importance.density import mean_densities, proportional, reverse
from jprune.models import MODELS, build, resnet
from jprune.models.vgg import VGG, vgg
from jprune.tracing.paths import flatten


def two_layers(v, x):
    return x @ v["a"] @ v["b"]


def mlp(v, x):
    return jnp.tanh(x @ v["a"] + v["shift"]) @ v["b"]


def some(seed=0, hidden=5):
    rng = np.random.default_rng(seed)
    v = {"a": rng.normal(size=(3, hidden)), "shift": rng.normal(size=hidden), "b": rng.normal(size=(hidden, 4))}
    batches = [(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, 6))) for _ in "ab"]
    return {k: jnp.asarray(a, jnp.float32) for k, a in v.items()}, batches


# --- closed forms ------------------------------------------------------------------------------------------------


def test_snip_and_synflow_of_two_numbers():
    v = {"a": jnp.full((1, 1), 2.0), "b": jnp.full((1, 1), 3.0)}
    got = importance.snip(two_layers, v, [(jnp.ones((1, 1)), None)], ("a", "b"), lambda out, y: out.sum())
    assert [float(got[p][0, 0]) for p in "ab"] == [0.5, 0.5]
    flow = importance.synflow(two_layers, v, jnp.ones((1, 1)), ("a", "b"), 1.0, rounds=1)
    assert [float(flow[p][0, 0]) for p in "ab"] == [6.0, 6.0]


def test_synflow_of_two_layers():
    v = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[1.0, 3.0], [-2.0, 1.0]])}
    got = importance.synflow(two_layers, v, jax.ShapeDtypeStruct((7, 1), jnp.float32), ("a", "b"), 1.0, rounds=1)
    np.testing.assert_array_equal(got["a"], [[4, 6]])
    np.testing.assert_array_equal(got["b"], [[1, 3], [4, 2]])


def test_grasp_of_a_quadratic_keeps_the_second():
    a = jnp.diag(jnp.array([1.0, 2.0]))
    got = importance.grasp(
        lambda v, x: v["w"], {"w": jnp.ones(2)}, [(None, None)], ("w",), lambda w, y: 0.5 * w @ a @ w, 1.0
    )
    np.testing.assert_allclose(got["w"], np.array([1.0, 4.0]) / 5, rtol=1e-6)  # w Hg = (1, 4), over their sum
    np.testing.assert_array_equal(importance.weight_masks(got, 0.5)["w"], [False, True])


def test_synexp_in_closed_form():
    one = importance.synexp(np.array([10, 100, 1000]), np.ones(3), params=120)
    np.testing.assert_allclose(one, [1, 0.55, 0.055], rtol=1e-9)
    n, f = np.array([100, 100]), np.array([100, 900])
    np.testing.assert_allclose(importance.synexp(n, f, macs=300), [1, 2 / 9], rtol=1e-9)
    np.testing.assert_allclose(importance.synexp(n, f, params=100, macs=300), [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(importance.synexp(n, f, params=1e6, macs=1e6), [1, 1])
    np.testing.assert_allclose(importance.synexp(n, f, params=200, cap=4.0), [1, 1])


def test_a_parameter_budget_alone_keeps_the_same_number_in_every_layer():
    n = np.array([10, 500, 700, 9000])
    kept = n * importance.synexp(n, n, params=400)
    np.testing.assert_allclose(kept, [10, 130, 130, 130], rtol=1e-9)


def test_erk_in_closed_form():
    shapes = {"a": (3, 3, 16, 16), "b": (3, 3, 32, 64)}
    got = importance.erk(shapes, 0.1)
    ratio = (38 / 2304) / (102 / 18432)
    assert got["a"] / got["b"] == pytest.approx(ratio)
    assert got["a"] * 2304 + got["b"] * 18432 == pytest.approx(0.1 * (2304 + 18432))
    full = importance.erk(shapes, 0.5)  # the small one is full, the other takes the rest
    assert full["a"] == 1 and full["b"] == pytest.approx((0.5 * 20736 - 2304) / 18432)
    back = reverse(shapes, 0.1)
    assert back["b"] / back["a"] == pytest.approx(18432 / 2304)


def test_the_threshold_is_strict_and_ties_go():
    masks = importance.weight_masks({"a": np.array([1.0, 2, 2, 3])}, 0.5)
    np.testing.assert_array_equal(masks["a"], [False, False, False, True])
    assert importance.weight_masks({"a": np.zeros(3)}, 1.0)["a"].all()
    assert importance.weight_masks({"a": np.arange(10.0)}, 0.9)["a"].sum() == 9  # (1 - 0.9) * 10 is 1


# --- which leaves, and what users get wrong -----------------------------------------------------------------------


def test_weights_are_kernels_and_matrices_of_the_graph_whatever_their_names():
    def fn(p, x):
        h = jax.nn.relu(x @ p[0] + p[1]) * p[2]
        return h @ p[3].T

    p = [jnp.ones((3, 5)), jnp.ones(5), jnp.ones(5), jnp.ones((4, 5))]
    assert at_init.weight_leaves(jprune.trace(fn, p, jnp.ones((6, 3)))) == ("0", "3")
    module = build("resnet20", 10)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    graph = jprune.trace(module.apply, variables, x)
    found = at_init.weight_leaves(graph)
    assert set(found) == {p for p in graph.leaves if p.endswith("kernel")}


@pytest.mark.parametrize(("name", "weights"), [("resnet20_pad", 268336), ("vgg16_bn", 14715584), ("vgg19_bn", 20024000),
                                               ("resnet56_pad", 848944), ("mobilenet_v2", 3469760),
                                               ("shufflenet_v2", 2261424), ("resnet18", 11678912)])  # fmt: skip
def test_the_number_of_weights_of_the_zoo(name, weights):
    module = build(name)
    x = jax.ShapeDtypeStruct((2, *MODELS[name].image), jnp.float32)
    graph = jprune.trace(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)
    assert sum(int(np.prod(graph.leaves[p].shape)) for p in at_init.weight_leaves(graph)) == weights


def test_errors_name_the_offender():
    v, batches = some()
    with pytest.raises(ValueError, match="no leaf 'aa'; did you mean"):
        importance.snip(mlp, v, batches, ("aa",))
    with pytest.raises(ValueError, match="no batches"):
        importance.snip(mlp, v, [], ("a",))
    with pytest.raises(ValueError, match="temperature is 0"):
        importance.grasp(mlp, v, batches, ("a",), temperature=0)
    with pytest.raises(ValueError, match="keep ratio is 0"):
        importance.synflow(mlp, v, batches[0][0], ("a",), 0.0)
    with pytest.raises(ValueError, match="rounds is at least 1"):
        importance.synflow(mlp, v, batches[0][0], ("a",), 0.5, rounds=0)
    with pytest.raises(ValueError, match="int32 is an index"):
        importance.synflow(mlp, v, jnp.zeros((2, 3), jnp.int32), ("a",), 0.5)
    with pytest.raises(ValueError, match="scores of 'a' are not finite"):
        importance.weight_masks({"a": np.array([1.0, np.nan])}, 0.5)
    with pytest.raises(ValueError, match="exempt names 'c'"):
        importance.densities({"a": np.ones(2)}, 0.5, ("c",))
    with pytest.raises(ValueError, match="without a budget"):
        importance.synexp(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="class 1 has 1 examples"):
        importance.class_balanced_batches(np.zeros((3, 2)), np.array([0, 0, 1]), 2)


def test_balanced_batches():
    labels = np.array([0, 1, 1, 0, 2, 2, 1, 0])
    batches = importance.class_balanced_batches(np.arange(8)[:, None], labels, 2, 4)
    assert [list(x[:, 0]) for x, _ in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [list(y) for _, y in batches] == [[0, 1, 1, 0], [2, 2]]


# --- invariants --------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(0.01, 1.0))
@settings(max_examples=20, deadline=None)
def test_densities_average_to_the_keep_ratio(seed, keep):
    rng = np.random.default_rng(seed)
    scores = {p: rng.uniform(size=n) for p, n in (("a", 13), ("b", 200), ("c", 57))}
    got = importance.densities(scores, keep)
    assert all(0 <= d <= 1 for d in got.values())
    assert abs(sum(d * scores[p].size for p, d in got.items()) / 270 - keep) <= 1 / 270 + 1e-12
    some_ = importance.densities(scores, keep, exempt=("b",))
    assert some_ == {p: got[p] for p in "ac"}
    assert mean_densities([got, got]) == pytest.approx(got)


@given(st.integers(0, 1000), st.floats(0.02, 1.0))
@settings(max_examples=20, deadline=None)
def test_proportional_densities_meet_the_ratio(seed, keep):
    rng = np.random.default_rng(seed)
    n = {p: int(k) for p, k in zip("abcd", rng.integers(5, 5000, 4), strict=True)}
    got = proportional({p: float(t) for p, t in zip(n, rng.uniform(0.1, 9, 4), strict=True)}, n, keep)
    assert max(got.values()) <= 1
    assert sum(got[p] * n[p] for p in n) == pytest.approx(keep * sum(n.values()))


def chain(v, x):
    for k in sorted(v):
        x = jax.nn.relu(x @ v[k])
    return x


def layers_of(widths, seed=0):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    return {f"{i:03d}": jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for i, s in enumerate(pairs)}


@given(st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_synaptic_flow_is_conserved_and_blind_to_signs(seed):
    v = layers_of((3, 7, 5, 9, 2), seed)
    got = importance.synflow(chain, v, jnp.ones((4, 3)), tuple(v), 1.0, rounds=1)
    sums = [s.sum() for s in got.values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-12)
    rng = np.random.default_rng(seed)
    flipped = jax.tree.map(lambda w: w * rng.choice([-1.0, 1.0], w.shape), v)
    again = importance.synflow(chain, flipped, jnp.ones((4, 3)), tuple(v), 1.0, rounds=1)
    for p in v:
        np.testing.assert_array_equal(got[p], again[p])


def test_a_deep_chain_neither_overflows_nor_needs_rescaling_and_rescaling_ranks_alike():
    v = {p: w * 100 for p, w in layers_of((16,) * 21).items()}  # column sums of about 300: R is about 1e50
    got = importance.synflow(chain, v, jnp.ones((1, 16)), tuple(v), 0.1, rounds=5)
    assert max(s.max() for s in got.values()) > np.finfo(np.float32).max
    scaled = importance.synflow(chain, v, jnp.ones((1, 16)), tuple(v), 0.1, rounds=5, rescale=True)
    top = max(s.max() for s in got.values()) / max(s.max() for s in scaled.values())
    for p in v:
        np.testing.assert_allclose(got[p], scaled[p] * top, rtol=1e-9)
        assert (importance.weight_masks(got, 0.1)[p] == importance.weight_masks(scaled, 0.1)[p]).all()


def test_an_overflow_is_reported_with_its_remedy():
    v = {p: w * 1e20 for p, w in layers_of((4,) * 21).items()}
    with pytest.raises(ValueError, match="pass rescale=True"):
        importance.synflow(chain, v, jnp.ones((1, 4)), tuple(v), 0.5, rounds=1)
    assert importance.synflow(chain, v, jnp.ones((1, 4)), tuple(v), 0.5, rounds=2, rescale=True)


def test_iterated_synflow_empties_no_layer_where_one_shot_does():
    v = layers_of((8, 8, 150, 150, 8, 8))  # every layer has the same flow, so the largest has the smallest scores
    empty = {}
    for rounds in (1, 100):
        scores = importance.synflow(chain, v, jnp.ones((1, 8)), tuple(v), 0.004, rounds=rounds)
        empty[rounds] = sum(d == 0 for d in importance.densities(scores, 0.004).values())
    assert empty[1] > 0 and empty[100] == 0


@pytest.mark.slow
def test_iterated_synflow_empties_no_layer_of_vgg16():
    """At a quarter of its widths; all at once empties some."""
    whole = vgg(16).config
    features = tuple(tuple(w // 4 for w in block) for block in whole.features)
    module, x = VGG(dataclasses.replace(whole, features=features)), jnp.zeros((1, 32, 32, 3))
    v = jax.jit(module.init)(jax.random.key(0), x)
    paths = at_init.weight_leaves(jprune.trace(module.apply, v, x))
    least = {}
    for rounds in (1, 100):
        scores = importance.synflow(module.apply, v, x, paths, 1e-3, rounds=rounds)
        least[rounds] = min(importance.densities(scores, 1e-3).values())
    assert least[1] == 0 < least[100]


def test_grasp_does_not_see_a_scale_that_the_temperature_takes_out():
    v, batches = some()
    a = importance.grasp(mlp, v, batches, ("a", "b"), temperature=2.0)
    b = importance.grasp(lambda v, x: 8 * mlp(v, x), v, batches, ("a", "b"), temperature=16.0)
    for p in a:
        np.testing.assert_allclose(a[p], b[p], rtol=1e-5)


def test_gradients_are_summed_over_batches_not_averaged_scores():
    v, batches = some()
    whole = [(jnp.concatenate([x for x, _ in batches]), jnp.concatenate([y for _, y in batches]))]
    for method in (importance.snip, importance.grasp):  # equal batches: twice the gradient of the mean over all
        a, b = method(mlp, v, batches, ("a", "b")), method(mlp, v, whole, ("a", "b"))
        for p in a:
            np.testing.assert_allclose(a[p], b[p], rtol=2e-3, atol=2e-5)
    alone = importance.snip(mlp, v, batches[:1], ("a", "b"))
    assert np.abs(np.asarray(alone["a"] - importance.snip(mlp, v, batches, ("a", "b"))["a"])).max() > 1e-3


def test_scores_are_float32_for_bfloat16_weights():
    v, batches = some()
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), v)
    for method in (importance.snip, importance.grasp):
        assert all(s.dtype == jnp.float32 for s in method(mlp, low, batches, ("a", "b")).values())
    assert importance.weight_magnitude(low, ("a",))["a"].dtype == jnp.float32


def test_random_scores_and_shuffled_masks():
    v, _ = some(hidden=400)
    scores = importance.weight_chance(v, ("a", "b"), jax.random.key(0))
    masks = importance.weight_masks(scores, 0.3)
    assert all(abs(m.mean() - 0.3) < 0.05 for m in masks.values())
    shuffled = importance.shuffled_masks(masks, np.random.default_rng(0))
    for p in masks:
        assert shuffled[p].sum() == masks[p].sum() and shuffled[p].shape == masks[p].shape
        assert (shuffled[p] != masks[p]).any()


def test_snip_can_be_jitted():
    v, batches = some()
    jitted = jax.jit(lambda v: importance.snip(mlp, v, batches, ("a", "b")))(v)
    for p, s in importance.snip(mlp, v, batches, ("a", "b")).items():
        np.testing.assert_allclose(jitted[p], s, rtol=1e-5)


# --- references --------------------------------------------------------------------------------------------------


def test_grasp_against_the_full_hessian():
    v, batches = some()
    shapes, sizes = {p: v[p].shape for p in "ab"}, {p: v[p].size for p in "ab"}

    def unflat(w):
        return {**v, "a": w[: sizes["a"]].reshape(shapes["a"]), "b": w[sizes["a"] :].reshape(shapes["b"])}

    def total(w):
        return sum(at_init.classification(mlp(unflat(w), x) / 3.0, y) for x, y in batches)

    w = jnp.concatenate([v["a"].ravel(), v["b"].ravel()])
    s = np.asarray(jax.jit(lambda w: w * (jax.hessian(total)(w) @ jax.grad(total)(w)))(w), np.float64)
    s /= abs(s.sum())
    got = importance.grasp(mlp, v, batches, ("a", "b"), temperature=3.0)
    np.testing.assert_allclose(np.concatenate([got[p].ravel() for p in "ab"]), s, rtol=2e-3, atol=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_synexp_against_a_general_solver(seed):
    rng = np.random.default_rng(seed)
    n, f, cap = rng.uniform(10, 1000, 5), rng.uniform(10, 1000, 5), float(rng.choice([1.0, 3.0]))
    params, macs = rng.uniform(0.1, 0.8) * n.sum(), rng.uniform(0.1, 0.8) * f.sum()
    got = importance.synexp(n, f, params, macs, cap)
    assert n @ got <= params * (1 + 1e-6) and f @ got <= macs * (1 + 1e-6) and got.max() <= cap
    solved = minimize(
        lambda p: -np.log(p).sum(), np.full(5, 0.05), jac=lambda p: -1 / p, method="SLSQP",
        bounds=[(1e-6, cap)] * 5, options={"maxiter": 500, "ftol": 1e-12},
        constraints=[{"type": "ineq", "fun": lambda p: 1 - n @ p / params},
                     {"type": "ineq", "fun": lambda p: 1 - f @ p / macs}],
    )  # fmt: skip
    assert np.log(got).sum() >= -solved.fun - 1e-5
    np.testing.assert_allclose(got, solved.x, rtol=2e-2)


def test_the_expected_flow_of_a_chain_is_synexp():
    v = {"a": jnp.ones((3, 8)), "b": -2 * jnp.ones((8, 5)), "c": jnp.full((5, 4), 0.1)}

    def chain(v, x):
        return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"]) @ v["c"]

    macs, x = {"a": 24, "b": 400, "c": 20}, jnp.zeros((2, 3))
    n = np.array([24.0, 40.0, 20.0])
    for budgets in ({"params": 30.0}, {"macs": 90.0}, {"params": 40.0, "macs": 100.0}):
        got = importance.synexp_of_paths(chain, v, x, macs, **budgets)
        want = importance.synexp(n, np.array([24.0, 400.0, 20.0]), **budgets)
        np.testing.assert_allclose([got[p] for p in macs], want, rtol=1e-3)


def test_the_expected_flow_with_a_skip_against_a_grid():
    """The flow of h = x a, y = h b + h c by brute force: a skip takes from both layers of the other path."""
    rng = np.random.default_rng(0)
    v = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in {"a": (20, 4), "b": (4, 6), "c": (6, 4)}.items()}

    def skip(v, x):
        h = x @ v["a"]
        return h + jax.nn.relu(h @ v["b"]) @ v["c"]

    n = np.array([80.0, 24.0, 24.0])
    got = importance.synexp_of_paths(
        skip, v, jnp.zeros((2, 20)), dict(zip("abc", (80, 24, 24), strict=True)), params=40.0
    )
    p = np.array([got[k] for k in "abc"])
    assert n @ p <= 40.0 * (1 + 1e-12) and p.max() <= 1
    a, b, c = (np.abs(np.asarray(v[k])).mean() for k in "abc")

    def flow(p):
        return 80 * a * p[0] * (1 + 24 * b * c * p[1] * p[2])

    grid = np.linspace(1e-3, 1, 400)
    pb, pc = np.meshgrid(grid, grid)
    pa = np.minimum(1, (40 - 24 * pb - 24 * pc) / 80)
    best = np.where(pa > 0, flow((pa, pb, pc)), 0).max()
    assert flow(p) >= best * (1 - 1e-3)
    assert flow(p) > flow(importance.synexp(n, n, params=40.0)) * 1.01


def test_xavier_draws_the_named_matrices_and_nothing_else():
    v = {"conv": jnp.ones((3, 3, 2, 4)), "head": jnp.ones((300, 100))}
    new = at_init.xavier(v, ["head"], jax.random.key(0))
    assert new["conv"] is v["conv"]
    np.testing.assert_allclose(np.std(new["head"]), np.sqrt(2 / 400), rtol=0.02)


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_growing_layers_never_lowers_the_objective(seed):
    rng = np.random.default_rng(seed)
    n, f = rng.uniform(10, 1000, 6), rng.uniform(10, 1000, 6)
    budgets = {"params": 0.8 * n.sum(), "macs": f.sum()}
    capped, free = (np.log(importance.synexp(n, f, **budgets, cap=cap)).sum() for cap in (1.0, 4.0))
    assert free >= capped - 1e-9


@pytest.mark.reference
def test_all_three_against_torch_on_a_residual_network():
    torch = peer("torch")
    module = resnet.small((1, 1), 5, widths=(4, 6))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 1)), jnp.float32)
    y = np.arange(8) % 5
    v = jax.jit(module.init)(jax.random.key(1), x)
    rng = np.random.default_rng(2)
    v["params"] = jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(np.float32), v["params"])
    paths = at_init.weight_leaves(jprune.trace(module.apply, v, x))
    batches = [(x[:4], jnp.asarray(y[:4])), (x[4:], jnp.asarray(y[4:]))]
    flow = importance.synflow(module.apply, v, x, paths, 0.2, rounds=4)
    snip, grasp = (m(module.apply, v, batches, paths) for m in (importance.snip, importance.grasp))

    def tensors(modulus):
        flat = {p: torch.tensor(np.asarray(a, np.float64)) for p, a in flatten(v)}
        flat = {p: t.abs() if modulus else t for p, t in flat.items()}
        return {p: t.requires_grad_(p in paths) for p, t in flat.items()}

    def run(t, image):
        def conv(h, p, stride=1):
            k = t[f"params/{p}/kernel"].permute(3, 2, 0, 1)
            return torch.nn.functional.conv2d(h, k, stride=stride, padding=k.shape[-1] // 2)

        def norm(h, p):
            mean, var = (t[f"batch_stats/{p}/{s}"][:, None, None] for s in ("mean", "var"))
            scale, bias = (t[f"params/{p}/{s}"][:, None, None] for s in ("scale", "bias"))
            return (h - mean) / torch.sqrt(var + 1e-5) * scale + bias

        h = torch.relu(norm(conv(image, "stem_conv"), "stem_bn"))
        for b, stride in (("stage1_block1", 1), ("stage2_block1", 2)):
            z = torch.relu(norm(conv(h, f"{b}/conv1", stride), f"{b}/bn1"))
            z = norm(conv(z, f"{b}/conv2"), f"{b}/bn2")
            if stride == 2:
                h = norm(conv(h, f"{b}/shortcut_conv", 2), f"{b}/shortcut_bn")
            h = torch.relu(h + z)
        return h.mean((2, 3)) @ t["params/head/kernel"] + t["params/head/bias"]

    def grads(value, t, **more):
        return dict(zip(paths, torch.autograd.grad(value, [t[p] for p in paths], **more), strict=True))

    nchw = torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)
    halves = [(nchw[:4], torch.tensor(y[:4])), (nchw[4:], torch.tensor(y[4:]))]

    t = tensors(False)
    each = [grads(torch.nn.functional.cross_entropy(run(t, a), b), t) for a, b in halves]
    want = {p: (t[p] * (each[0][p] + each[1][p])).abs().detach().numpy() for p in paths}
    total = sum(s.sum() for s in want.values())
    for p in paths:
        np.testing.assert_allclose(snip[p], want[p] / total, rtol=1e-3, atol=1e-7)

    each = [grads(torch.nn.functional.cross_entropy(run(t, a) / 200, b), t) for a, b in halves]
    g = {p: (each[0][p] + each[1][p]).detach() for p in paths}
    hg = dict.fromkeys(paths, 0.0)
    for a, b in halves:
        again = grads(torch.nn.functional.cross_entropy(run(t, a) / 200, b), t, create_graph=True)
        inner = sum((again[p] * g[p]).sum() for p in paths)
        hg = {p: hg[p] + h for p, h in grads(inner, t).items()}
    want = {p: (t[p] * hg[p]).detach().numpy() for p in paths}
    total = abs(sum(s.sum() for s in want.values())) + 1e-10
    biggest = max(np.abs(s).max() for s in want.values()) / total
    for p in paths:
        np.testing.assert_allclose(grasp[p], want[p] / total, rtol=5e-3, atol=2e-3 * biggest)

    t = tensors(True)
    masks = {p: torch.ones_like(t[p]) for p in paths}
    size = sum(m.numel() for m in masks.values())
    scores = {}
    for k in range(1, 5):
        masked = {**t, **{p: t[p] * masks[p] for p in paths}}
        slopes = grads(run(masked, torch.ones((1, 1, 8, 8), dtype=torch.float64)).sum(), t)
        scores = {p: (slopes[p] * t[p]).abs().detach() for p in paths}
        every = torch.cat([s.flatten() for s in scores.values()])
        threshold = torch.kthvalue(every, int((1 - 0.2 ** (k / 4)) * size)).values
        masks = {p: (scores[p] > threshold).double() for p in paths}
    for p in paths:
        np.testing.assert_allclose(flow[p], scores[p].numpy(), rtol=1e-5)
        np.testing.assert_array_equal(importance.weight_masks(flow, 0.2)[p], masks[p].numpy() > 0)
