"""Importance criteria against plain loops over a table of members that is written by hand, not taken from the graph.

One network has everything that changes a sum: a convolution with a bias and BatchNorm, a residual, a flattening
(several rows per unit) and a scan (scores per layer, one leaf stacked on its last axis).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import importance
from jprune.importance import check_scores, normalised
from jprune.importance.reduce import NORMALISERS, REDUCTIONS

LAYERS = 3


def network(variables, x):
    p, s = variables["params"], variables["batch_stats"]

    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    h = conv(x, p["conv"]) + p["bias"]
    h = jax.nn.relu((h - s["mean"]) * jax.lax.rsqrt(s["var"] + 1e-5) * p["scale"] + p["shift"])
    h = h + conv(jax.nn.relu(conv(h, p["inner"])), p["outer"])
    h = h.reshape(h.shape[0], -1) @ p["rows"]

    def layer(h, w):
        up, gain, down = w
        return h + (jax.nn.relu(h @ up) * gain) @ down, None

    return jax.lax.scan(layer, h, (p["up"], p["gain"].T, p["down"]))[0] @ p["head"]


SHAPES = {
    "params/bias": (4,),
    "params/conv": (3, 3, 2, 4),
    "params/down": (LAYERS, 8, 6),
    "params/gain": (8, LAYERS),
    "params/head": (6, 2),
    "params/inner": (1, 1, 4, 5),
    "params/outer": (1, 1, 5, 4),
    "params/rows": (16, 6),
    "params/scale": (4,),
    "params/shift": (4,),
    "params/up": (LAYERS, 6, 8),
    "batch_stats/mean": (4,),
    "batch_stats/var": (4,),
}
# group -> its members that count, in the order of the leaves: (leaf, axis, role, positions of unit u, layer axis)
OWN = {
    "params/conv:3": [
        ("params/conv", 3, "out", lambda u: [u], None),
        ("params/inner", 2, "in", lambda u: [u], None),
        ("params/outer", 3, "out", lambda u: [u], None),
        ("params/rows", 0, "in", lambda u: [u, u + 4, u + 8, u + 12], None),
        ("params/scale", 0, "scale", lambda u: [u], None),
    ],
    "params/inner:3": [
        ("params/inner", 3, "out", lambda u: [u], None),
        ("params/outer", 2, "in", lambda u: [u], None),
    ],
    "params/down:2": [
        ("params/down", 2, "out", lambda u: [u], None),
        ("params/head", 0, "in", lambda u: [u], None),
        ("params/rows", 1, "out", lambda u: [u], None),
        ("params/up", 1, "in", lambda u: [u], None),
    ],
    "params/up:2": [
        ("params/down", 1, "in", lambda u: [u], 0),
        ("params/gain", 0, "scale", lambda u: [u], 1),
        ("params/up", 2, "out", lambda u: [u], 0),
    ],
}
SIZES = {"params/conv:3": (4,), "params/inner:3": (5,), "params/down:2": (6,), "params/up:2": (LAYERS, 8)}
SHIFTS = [("params/bias", 0, "shift", lambda u: [u], None), ("params/shift", 0, "shift", lambda u: [u], None)]


def tree_of(flat):
    out = {"params": {}, "batch_stats": {}}
    for path, value in flat.items():
        collection, name = path.split("/")
        out[collection][name] = value
    return out


def flat_of(tree):
    return {f"{c}/{n}": np.asarray(v, np.float64) for c, leaves in tree.items() for n, v in leaves.items()}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    flat = {path: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
    flat["batch_stats/var"] = jnp.abs(flat["batch_stats/var"]) + 0.5
    return tree_of(flat)


X = jnp.asarray(np.random.default_rng(9).normal(size=(3, 2, 2, 2)), jnp.float32)
VARIABLES = weights()
GRAPH = jprune.trace(network, VARIABLES, X)


def loss(variables, x):
    return (network(variables, x[None]) ** 2).sum()


@functools.cache
def grads():
    return jax.jit(jax.grad(lambda v: sum(loss(v, x) for x in X)))(VARIABLES)


def of_unit(leaf, axis, positions, layer_axis, layer):
    """All entries of a leaf that one unit (of one layer) owns, by slicing them out one position at a time."""
    out = []
    for position in positions:
        at = [slice(None)] * leaf.ndim
        at[axis] = position
        if layer_axis is not None:
            at[layer_axis] = layer
        out.append(leaf[tuple(at)].ravel())
    return np.concatenate(out)


def loops(local, members=OWN):
    """{group: (members, *layers, size)} of local(member, layer, unit) by loops."""
    found = {}
    for gid, shape in SIZES.items():
        rows = np.zeros((len(members[gid]), *shape))
        for k, member in enumerate(members[gid]):
            for index in itertools.product(*map(range, shape)):
                rows[(k, *index)] = local(member, index[0] if len(shape) == 2 else None, index[-1])
        found[gid] = rows
    return found


def sums(per_entry, *trees, members=OWN):
    """Rows of the sum over a unit's entries of per_entry(entries of each tree)."""
    flat = [flat_of(t) for t in trees]

    def local(member, layer, unit):
        leaf, axis, _, positions, layer_axis = member
        return per_entry(*(of_unit(f[leaf], axis, positions(unit), layer_axis, layer) for f in flat))

    return loops(local, members)


def reduced(rows, how):
    functions = {"mean": np.mean, "sum": np.sum, "max": np.max, "prod": np.prod, "first": lambda r, axis: r[0]}
    return {g: functions[how](r, axis=0) for g, r in rows.items()}


def normal_by_hand(row, how):
    if how == "none":
        return row
    if how in ("mean", "sum", "max"):
        return row / {"mean": np.mean, "sum": np.sum, "max": np.max}[how](row)
    if how == "standard":
        return (row - row.min()) / (row.max() - row.min())
    if how == "gaussian":
        return (row - row.mean()) / np.sqrt(((row - row.mean()) ** 2).mean())
    return np.array([s / sum(t for t in row if t >= s) for s in row])


def normal_of(scores, how):
    return {g: np.apply_along_axis(normal_by_hand, -1, s, how) for g, s in scores.items()}


def assert_scores(got, want, rtol=2e-5, atol=1e-6):
    assert got.keys() == want.keys()
    for g, w in want.items():
        assert got[g].dtype == jnp.float32 and got[g].shape == GRAPH.groups[g].shape
        np.testing.assert_allclose(got[g], w, rtol=rtol, atol=atol * np.abs(w).max(), err_msg=g)


def test_the_graph_has_the_members_of_the_table():
    assert {g: i.shape for g, i in GRAPH.groups.items()} == SIZES
    for g, info in GRAPH.groups.items():
        got = {(m.path, m.axis, m.role, m.layer_axis) for m in info.members if m.role in importance.reduce.WEIGHTS}
        assert got == {(path, axis, role, layer) for path, axis, role, _, layer in OWN[g]}, g


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_magnitude_is_the_sum_over_a_units_weights(p, reduce):
    want = reduced(sums(lambda w: (np.abs(w) ** p).sum(), VARIABLES), reduce)
    assert_scores(importance.magnitude(GRAPH, VARIABLES, p, reduce=reduce, normalise="none"), want)


@pytest.mark.parametrize("how", NORMALISERS)
def test_normalisers_work_on_every_layer_by_itself(how):
    want = normal_of(reduced(sums(lambda w: (w**2).sum(), VARIABLES), "mean"), how)
    assert_scores(importance.magnitude(GRAPH, VARIABLES, normalise=how), want, rtol=1e-4)


@pytest.mark.parametrize("how", NORMALISERS)
def test_normalisers_stay_finite_on_dead_and_constant_scores(how):
    for s in (np.zeros(4), np.full(4, 2.0), np.zeros((2, 3))):
        assert np.isfinite(normalised(jnp.asarray(s, jnp.float32), how)).all()


def test_lamp_divides_by_the_scores_that_are_not_smaller():
    want = normal_of(reduced(sums(lambda w: (w**2).sum(), VARIABLES), "sum"), "lamp")
    got = importance.lamp(GRAPH, VARIABLES, reduce="sum")
    assert_scores(got, want)
    for s in got.values():
        np.testing.assert_allclose(np.asarray(s).max(-1), 1)  # the largest is divided by itself


def test_biases_count_only_when_asked():
    louder = jax.tree.map(lambda x: x, VARIABLES)
    louder["params"]["bias"] = louder["params"]["bias"] * 10
    louder["params"]["shift"] = louder["params"]["shift"] * 10
    plain = importance.magnitude(GRAPH, VARIABLES, normalise="none")
    jax.tree.map(np.testing.assert_array_equal, importance.magnitude(GRAPH, louder, normalise="none"), plain)
    roles = (*importance.reduce.WEIGHTS, "shift")
    members = {**OWN, "params/conv:3": [*OWN["params/conv:3"], *SHIFTS]}
    want = reduced(sums(lambda w: (w**2).sum(), louder, members=members), "mean")
    assert_scores(importance.magnitude(GRAPH, louder, normalise="none", roles=roles), want)


def test_state_never_counts():
    other = jax.tree.map(lambda x: x, VARIABLES)
    other["batch_stats"] = jax.tree.map(lambda x: x + 7, other["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal,
        importance.magnitude(GRAPH, other, roles=("out", "in", "scale", "shift", "other")),
        importance.magnitude(GRAPH, VARIABLES, roles=("out", "in", "scale", "shift", "other")),
    )


def test_first_member_judges_the_producer_alone():
    producers = {g: [m for m in members if m[2] == "out"][:1] for g, members in OWN.items()}
    want = reduced(sums(lambda w: np.abs(w).sum(), VARIABLES, members=producers), "first")
    assert_scores(importance.first_member(GRAPH, VARIABLES), want)


def test_fpgm_is_the_sum_of_all_distances():
    flat = flat_of(VARIABLES)

    def local(member, layer, unit):
        leaf, axis, _, positions, layer_axis = member
        me = of_unit(flat[leaf], axis, positions(unit), layer_axis, layer)
        units = range(flat[leaf].shape[axis] // len(positions(0)))
        others = (of_unit(flat[leaf], axis, positions(v), layer_axis, layer) for v in units)
        return sum(np.sqrt(((me - other) ** 2).sum()) for other in others)

    for reduce in ("mean", "max"):
        want = normal_of(reduced(loops(local), reduce), "mean")
        got = jax.jit(lambda v, reduce=reduce: importance.fpgm(GRAPH, v, reduce=reduce))(VARIABLES)
        assert_scores(got, want, rtol=1e-4)


def test_fpgm_ranks_a_twin_lowest():
    w = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    w[:, 3] = w[:, 1]
    graph = jprune.trace(lambda p, x: (x @ p["w"]).sum(-1), {"w": w}, jnp.ones((2, 6)))
    s = np.asarray(importance.fpgm(graph, {"w": w})["w:1"])
    np.testing.assert_allclose(s[3], s[1], rtol=1e-3)
    assert set(np.argsort(s)[:2]) == {1, 3}


def test_batchnorm_scale_is_found_by_its_use():
    scales = {"params/conv:3": [OWN["params/conv:3"][4]], "params/up:2": [OWN["params/up:2"][1]]}
    got = importance.batchnorm_scale(GRAPH, VARIABLES)
    assert set(got) == set(scales)  # groups without a scale get no score
    flat = flat_of(VARIABLES)
    np.testing.assert_allclose(got["params/conv:3"], np.abs(flat["params/scale"]), rtol=1e-6)
    np.testing.assert_allclose(got["params/up:2"], np.abs(flat["params/gain"]).T, rtol=1e-6)
    assert importance.scale_leaves(GRAPH) == {"params/scale": "params/conv:3"}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_taylor_in_both_forms(reduce):
    want = reduced(sums(lambda w, g: np.abs(w * g).sum(), VARIABLES, grads()), reduce)
    assert_scores(importance.taylor(GRAPH, VARIABLES, grads(), reduce=reduce, normalise="none"), want)
    want = reduced(sums(lambda w, g: np.abs((w * g).sum()), VARIABLES, grads()), reduce)
    got = importance.taylor(GRAPH, VARIABLES, grads(), signed_sum=True, reduce=reduce, normalise="none")
    assert_scores(got, want, rtol=1e-3, atol=1e-5)  # sums of mixed sign cancel


def test_fisher_is_the_mean_over_samples_of_squared_gradients():
    one = jax.jit(jax.grad(loss))
    rows = [flat_of(one(VARIABLES, x)) for x in X]
    squared = {path: np.mean([r[path] ** 2 for r in rows], axis=0) for path in rows[0]}
    got = jax.jit(lambda v: importance.mean_squared_gradients(loss, v, X))(VARIABLES)
    for path, value in flat_of(got).items():
        scale = np.abs(squared[path]).max()
        np.testing.assert_allclose(value, squared[path], rtol=1e-4, atol=1e-5 * scale, err_msg=path)
    want = reduced(sums(lambda w, g: (w**2 * g).sum(), VARIABLES, tree_of(squared)), "mean")
    assert_scores(importance.fisher(GRAPH, VARIABLES, got, normalise="none"), want, rtol=1e-4)
    total = flat_of(grads())  # the square of the mean is something else: the samples must not be added up first
    assert not np.allclose(squared["params/head"], (total["params/head"] / len(X)) ** 2, rtol=0.1)


def test_random_scores_are_a_function_of_the_key():
    a, b, c = (importance.random(GRAPH, jax.random.key(k)) for k in (0, 0, 1))
    assert {g: s.shape for g, s in a.items()} == SIZES
    for g in SIZES:
        np.testing.assert_array_equal(a[g], b[g])
        assert np.abs(np.asarray(a[g]) - np.asarray(c[g])).max() > 0.05
        assert (np.asarray(a[g]) >= 0).all() and (np.asarray(a[g]) < 1).all()
    twins = {"a": jnp.ones((4, 400)), "b": jnp.ones((400, 400)), "c": jnp.ones((400, 2))}
    graph = jprune.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] @ p["c"], twins, jnp.ones((2, 4)))
    first, second = (np.asarray(s) for s in importance.random(graph, jax.random.key(0)).values())
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2  # four standard deviations of independent streams


CRITERIA = {
    "magnitude": lambda v, g: importance.magnitude(GRAPH, v),
    "lamp": lambda v, g: importance.lamp(GRAPH, v),
    "fpgm": lambda v, g: importance.fpgm(GRAPH, v),
    "batchnorm": lambda v, g: importance.batchnorm_scale(GRAPH, v),
    "taylor": lambda v, g: importance.taylor(GRAPH, v, g),
    "fisher": lambda v, g: importance.fisher(GRAPH, v, jax.tree.map(jnp.square, g)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_jit_and_vmap_change_nothing(name):
    stack = jax.tree.map(lambda *x: jnp.stack(x), VARIABLES, weights(1), weights(2))
    compiled = jax.jit(CRITERIA[name])
    together = jax.jit(jax.vmap(CRITERIA[name], (0, None)))(stack, grads())
    for k in range(3):
        variables = jax.tree.map(lambda x, k=k: x[k], stack)
        eager = CRITERIA[name](variables, grads()) if k == 0 else compiled(variables, grads())
        assert_scores(compiled(variables, grads()), eager, rtol=1e-5)
        assert_scores({g: s[k] for g, s in together.items()}, eager, rtol=1e-4)


def test_half_precision_weights_add_up_in_single_precision():
    # 4096 squares of 0.25 after 1: bfloat16 sums stop growing at 256 times the addend
    w = np.full((4096, 3), 0.25)
    w[:, 1] = np.random.default_rng(0).integers(1, 16, 4096) / 16
    w[0] = 1.0
    graph = jprune.trace(lambda p, x: (x @ p["w"]).sum(-1), {"w": jnp.asarray(w, jnp.bfloat16)}, jnp.ones((2, 4096)))
    half = {"w": jnp.asarray(w, jnp.bfloat16)}
    for got, want in (
        (importance.magnitude(graph, half, normalise="none"), (w**2).sum(0)),
        (importance.magnitude(graph, half, 1, normalise="none"), np.abs(w).sum(0)),
        (importance.taylor(graph, half, half, normalise="none"), (w**2).sum(0)),
        (importance.fisher(graph, half, half, normalise="none"), (w**3).sum(0)),
    ):
        assert got["w:1"].dtype == jnp.float32
        np.testing.assert_allclose(got["w:1"], want, rtol=1e-5)
    pairs = np.sqrt(((w[:, :, None] - w[:, None, :]) ** 2).sum(0)).sum(1)
    np.testing.assert_allclose(importance.fpgm(graph, half, normalise="none")["w:1"], pairs, rtol=1e-3)

    def sample_loss(p, x):
        return (x * p["w"]).astype(jnp.float32).sum()

    grads = importance.mean_squared_gradients(sample_loss, half, jnp.asarray([[1.0], [300.0]], jnp.bfloat16))
    assert grads["w"].dtype == jnp.float32
    np.testing.assert_allclose(grads["w"], (1 + 300.0**2) / 2)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"reduce must be one of .*'average'"):
        importance.magnitude(GRAPH, VARIABLES, reduce="average")
    with pytest.raises(ValueError, match=r"normalise must be one of .*'l2'"):
        importance.magnitude(GRAPH, VARIABLES, normalise="l2")
    with pytest.raises(ValueError, match=r"roles must be among .*'bias'"):
        importance.magnitude(GRAPH, VARIABLES, roles=("out", "bias"))


def test_trees_that_do_not_fit_are_refused_by_name():
    keep = {"params/conv:3": np.arange(4) != 1}
    small = GRAPH.compact(VARIABLES, keep)
    with pytest.raises(
        ValueError, match=r"'params/conv' of the parameters has shape \(3, 3, 2, 3\), but \(3, 3, 2, 4\)"
    ):
        importance.magnitude(GRAPH, small)
    with pytest.raises(ValueError, match="params/conv"):
        importance.fpgm(GRAPH, small)
    with pytest.raises(ValueError, match=r"params/conv.*\(3, 3, 2, 3\)"):
        importance.taylor(GRAPH, VARIABLES, GRAPH.compact(grads(), keep))
    with pytest.raises(ValueError, match="lack leaf 'params/"):
        importance.fisher(GRAPH, VARIABLES, {"params": {}})
    with pytest.raises(ValueError, match="lack leaf 'params/"):
        importance.magnitude(GRAPH, VARIABLES["params"])


def test_bad_scores_are_refused_by_name():
    scores = {g: np.ones(shape) for g, shape in SIZES.items()}
    checked = check_scores(GRAPH, scores)
    assert all(s.dtype == np.float64 for s in checked.values())
    for bad, where in ((np.nan, (2, 5)), (-np.inf, (0, 3))):
        broken = {**scores, "params/up:2": scores["params/up:2"].copy()}
        broken["params/up:2"][where] = bad
        with pytest.raises(ValueError, match=rf"'params/up:2'.* is {bad} at unit \({where[0]}, {where[1]}\).*gain"):
            check_scores(GRAPH, broken)
    with pytest.raises(jprune.KeepError, match=r"'params/up:3'; did you mean 'params/up:2'"):
        check_scores(GRAPH, {"params/up:3": np.ones(8)})
    with pytest.raises(jprune.KeepError, match=r"\(8,\); group 'params/up:2' wants \(3, 8\)"):
        check_scores(GRAPH, {"params/up:2": np.ones(8)})


def test_nan_weights_reach_the_check():
    variables = jax.tree.map(lambda x: x, VARIABLES)
    variables["params"]["outer"] = variables["params"]["outer"].at[0, 0, 2, 1].set(jnp.nan)
    scores = importance.magnitude(GRAPH, variables, normalise="none")
    with pytest.raises(ValueError, match=r"at unit \(1,\).*params/outer"):
        check_scores(GRAPH, {"params/conv:3": scores["params/conv:3"]})
