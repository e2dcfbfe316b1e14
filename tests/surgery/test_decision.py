"""Decisions: every wrong keep set is refused by name with the remedy; masks are what a decision means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import normal

import jprune

LAYERS = 3
PARAMS = {
    "stem": normal(0, 5, 6),
    "bias": normal(1, 6),
    "up": normal(2, LAYERS, 6, 8),
    "gain": normal(3, 8, LAYERS),
    "down": normal(4, LAYERS, 8, 6),
    "wide": normal(5, 6, 4),
    "soft": normal(6, 4, 7),
    "head": normal(7, 7, 2),
    "sorted": normal(8, 2, 5),
}
X = normal(90, 4, 5)


def network(p, x):
    def layer(h, w):
        up, gain, down = w
        return h + (jax.nn.relu(h @ up) * gain) @ down, None

    h = jax.lax.scan(layer, x @ p["stem"] + p["bias"], (p["up"], p["gain"].T, p["down"]))[0]
    return jnp.sort(jax.nn.softmax(jax.nn.relu(h @ p["wide"]) @ p["soft"]) @ p["head"] @ p["sorted"]).sum(-1)


GRAPH = jprune.trace(network, PARAMS, X)
STREAM, LOCAL, WIDE, SOFT = "down:2", "up:2", "wide:1", "soft:1"


def some(group, least=1):
    keep = np.ones(GRAPH.groups[group].shape, bool)
    keep[..., least:] = False
    return keep


def test_the_groups_of_this_file():
    assert {g: (i.shape, i.exact) for g, i in GRAPH.groups.items() if g != "head:1"} == {
        STREAM: ((6,), True),
        LOCAL: ((LAYERS, 8), True),
        WIDE: ((4,), True),
        SOFT: ((7,), False),
    }
    assert GRAPH.leaves["sorted"].frozen[1].code == "ORDER_OR_MIX"


def test_only_what_is_cut_is_listed():
    decision = GRAPH.decide({STREAM: np.ones(6, bool), WIDE: np.arange(4) != 1, LOCAL: np.ones((LAYERS, 8), bool)})
    assert list(decision.keep) == [WIDE] and decision.widths() == {WIDE: 3}
    np.testing.assert_array_equal(decision.slots[WIDE], [0, 2, 3])
    assert GRAPH.decide({}).keep == {}
    assert GRAPH.widths({WIDE: np.arange(4) != 1})[STREAM] == 6


def test_unknown_groups_suggest_near_names():
    for name, near in (("wide:11", "wide:1"), ("params/wide:1", "wide:1"), ("Up:2", "up:2")):
        with pytest.raises(jprune.KeepError, match=f"no group is called '{name}'; did you mean .*'{near}'"):
            GRAPH.decide({name: np.ones(4, bool)})
        with pytest.raises(jprune.KeepError, match=f"'{near}'"):
            GRAPH.mask(PARAMS, {name: np.ones(4)})
    with pytest.raises(jprune.KeepError, match="known are 'down:2'"):
        GRAPH.decide({"zzzzzz": np.ones(4, bool)})
    with pytest.raises(jprune.KeepError, match=r"'stem:1' is cut into groups \['down:2'\]; give keep sets for those"):
        GRAPH.decide({"stem:1": np.ones(6, bool)})
    with pytest.raises(jprune.KeepError, match="no group is called 3"):
        GRAPH.decide({3: np.ones(6, bool)})


@pytest.mark.parametrize(
    ("group", "shape", "want"),
    [
        (WIDE, (3,), r"shape \(3,\); group 'wide:1' wants \(4,\)"),
        (WIDE, (4, 1), r"shape \(4, 1\); group 'wide:1' wants \(4,\)"),
        (WIDE, (), r"shape \(\); group 'wide:1' wants \(4,\)"),
        (LOCAL, (8, LAYERS), r"shape \(8, 3\); group 'up:2' wants \(3, 8\)"),
        (LOCAL, (LAYERS,), r"shape \(3,\); group 'up:2' wants \(3, 8\)"),
    ],
)
def test_wrong_shapes(group, shape, want):
    for check in (GRAPH.decide, lambda keep: GRAPH.mask(PARAMS, keep), lambda keep: GRAPH.compact(PARAMS, keep)):
        with pytest.raises(jprune.KeepError, match=want):
            check({group: np.ones(shape, bool)})


def test_one_row_stands_for_all_layers():
    row = np.arange(8) % 3 == 0
    decision = GRAPH.decide({LOCAL: row})
    np.testing.assert_array_equal(decision.keep[LOCAL], np.tile(row, (LAYERS, 1)))
    jax.tree.map(
        np.testing.assert_array_equal,
        GRAPH.mask(PARAMS, {LOCAL: row}),
        GRAPH.mask(PARAMS, {LOCAL: np.tile(row, (LAYERS, 1))}),
    )


def test_an_emptied_group_needs_permission():
    with pytest.raises(jprune.KeepError, match=r"removes every unit of group 'wide:1'; keep at least one"):
        GRAPH.compact(PARAMS, {WIDE: np.zeros(4, bool)})
    keep = some(LOCAL, 3)
    keep[1] = False
    with pytest.raises(jprune.KeepError, match="removes every unit of group 'up:2'"):
        GRAPH.decide({LOCAL: keep})
    small = GRAPH.compact(PARAMS, GRAPH.decide({LOCAL: keep}, allow_empty=True))
    run = GRAPH.replay(GRAPH.decide({LOCAL: keep}, allow_empty=True))
    np.testing.assert_allclose(run(small, X), network(GRAPH.mask(PARAMS, {LOCAL: keep}), X), rtol=1e-5, atol=1e-6)


def test_frozen_axes_say_why():
    with pytest.raises(jprune.NotPrunable, match=r"'sorted:1' may not be pruned: .*ORDER_OR_MIX"):
        GRAPH.decide({"sorted:1": np.arange(5) < 3})
    with pytest.raises(jprune.NotPrunable, match=r"'stem:0' may not be pruned: .*MODEL_INPUT"):
        GRAPH.mask(PARAMS, {"stem:0": np.ones(5)})
    with pytest.raises(jprune.NotPrunable, match=r"'up:0' may not be pruned: .*SCAN_LENGTH"):
        GRAPH.decide({"up:0": np.ones(LAYERS, bool)}, allow_inexact=True)


def test_inexact_groups_need_permission():
    with pytest.raises(jprune.NotPrunable, match=r"'soft:1' is inexact: .*test_decision\.py.*allow_inexact=True"):
        GRAPH.decide({SOFT: some(SOFT, 3)})
    assert list(GRAPH.decide({SOFT: some(SOFT, 3)}, allow_inexact=True).keep) == [SOFT]
    assert GRAPH.decide({SOFT: np.ones(7, bool)}).keep == {}  # nothing is cut
    GRAPH.mask(PARAMS, {SOFT: np.ones(7) * 0.5})  # masking makes no claim about sizes


def test_keep_sets_are_truth_values():
    for good in (
        np.array([1, 0, 1, 1]),
        np.array([1.0, 0, 1, 1]),
        [True, False, True, True],
        jnp.array([1, 0, 1, 1]) > 0,
    ):
        decision = GRAPH.decide({WIDE: good})
        assert decision.keep[WIDE].dtype == bool and decision.widths() == {WIDE: 3}
    for bad in (
        np.array([0.5, 1, 1, 1]),  # a soft gate
        np.array([0, 1, 2, 3]),  # indices
        np.array([np.nan, 1, 1, 1]),
        np.array([-1, 0, 1, 1]),
        np.array(["1", "0", "1", "1"]),
        np.array([None, True, True, True]),
    ):
        with pytest.raises(jprune.KeepError, match=r"keep\['wide:1'\] must be boolean \(True = keep\)"):
            GRAPH.decide({WIDE: bad})


def hand_mask(keep):
    """The masked parameters, one unit at a time."""
    p = {k: np.array(v, np.float64) for k, v in PARAMS.items()}
    for u, v in enumerate(keep[STREAM]):
        for name, axis in (("stem", 1), ("bias", 0), ("up", 1), ("down", 2), ("wide", 0)):
            at = [slice(None)] * p[name].ndim
            at[axis] = u
            p[name][tuple(at)] *= v
    for layer in range(LAYERS):
        for u, v in enumerate(keep[LOCAL][layer]):
            p["up"][layer, :, u] *= v
            p["gain"][u, layer] *= v
            p["down"][layer, u] *= v
    return p


def gates(seed, soft):
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.random(s).astype(np.float32)) if soft else (lambda s: rng.random(s) < 0.6)
    return {STREAM: draw(6), LOCAL: draw((LAYERS, 8))}


@pytest.mark.parametrize("soft", [False, True])
def test_masks_multiply_every_member_once_per_axis(soft):
    keep = gates(0, soft)
    got = GRAPH.mask(PARAMS, keep)
    for name, want in hand_mask(keep).items():
        assert got[name].dtype == PARAMS[name].dtype
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-7, err_msg=name)
        if not soft:  # exactly zero where removed, untouched where kept
            np.testing.assert_array_equal(got[name], np.where(want == 0, 0, PARAMS[name]), err_msg=name)


def test_masks_compile_once_for_all_decisions():
    traces = []

    @jax.jit
    def masked(params, keep):
        traces.append(1)
        return GRAPH.mask(params, keep)

    for seed in range(3):
        keep = gates(seed, False)
        jax.tree.map(np.testing.assert_array_equal, masked(PARAMS, keep), GRAPH.mask(PARAMS, keep))
    assert len(traces) == 1
    stack = jax.tree.map(lambda *k: np.stack(k), gates(0, False), gates(1, False))
    both = jax.vmap(GRAPH.mask, (None, 0))(PARAMS, stack)
    np.testing.assert_array_equal(both["up"][1], GRAPH.mask(PARAMS, gates(1, False))["up"])


def test_masks_are_differentiable_in_the_gates():
    keep = gates(3, True)

    def loss(k):
        return (network(GRAPH.mask(PARAMS, k), X) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(keep)
    total = jax.jit(loss)
    for g, k in keep.items():
        direction = np.random.default_rng(1).normal(size=k.shape).astype(np.float32)
        step = 1e-2
        up, down = (float(total({**keep, g: k + s * step * direction})) for s in (1, -1))
        assert float((grads[g] * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=3e-2)
        assert np.abs(grads[g]).max() > 0


def test_masks_keep_half_precision():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    got = GRAPH.mask(half, gates(0, False))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))


@pytest.mark.parametrize("kind", [bool, np.float32])
def test_what_a_mask_removes_is_zero_even_if_it_was_not_finite(kind):
    keep = {g: k.astype(kind) for g, k in gates(0, False).items()}
    fates = (jnp.nan, jnp.inf, -jnp.inf)
    masked = jax.jit(GRAPH.mask)
    whole = masked(PARAMS, keep)
    broken = {n: jnp.where((whole[n] == 0) & (x != 0), fates[i % 3], x) for i, (n, x) in enumerate(PARAMS.items())}
    assert not all(bool(jnp.isfinite(x).all()) for x in broken.values())
    jax.tree.map(np.testing.assert_array_equal, masked(broken, keep), whole)

    def loss(p, k):
        return sum((x**2).sum() for x in GRAPH.mask(p, k).values())

    if kind is bool:
        gradient = jax.jit(jax.grad(loss))
        found, want = (gradient(p, keep) for p in (broken, PARAMS))
    else:  # and in the gates, where a gate of 0 keeps the gradient of the finite
        gradient = jax.jit(jax.grad(lambda k, p: loss(p, k) + sum(x.sum() for x in GRAPH.mask(p, k).values())))
        found, want = (gradient(keep, p) for p in (broken, PARAMS))
        assert all(float(jnp.abs(w[k == 0]).max()) > 0 for w, k in zip(want.values(), keep.values(), strict=True))
        want = {g: jnp.where(keep[g] == 0, found[g], w) for g, w in want.items()}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, want)


EXACT = ["int32", "int8", "int4", "uint32", "bool", "float8_e4m3fn", "float8_e5m2", "bfloat16", "complex64"]


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_masks_and_slices_keep_every_bit_of_every_dtype(promotion):
    bits = jnp.asarray(np.random.default_rng(0).integers(0, 2**31 - 1, (3, 6, 4)), jnp.int32)
    p = {d: (bits if d in ("int32", "uint32") else bits % 7).astype(d) for d in EXACT}  # float32 holds not all of those
    p |= {"o": jnp.ones((3, 4, 6), jnp.float32), "e": jnp.ones((6, 2), jnp.float32)}

    def f(p, x):
        def layer(h, w):
            made = sum(h @ w[d].real.astype(jnp.float32) for d in EXACT)
            return h + jnp.tanh(made) @ w["o"], None

        return jax.lax.scan(layer, x, {k: v for k, v in p.items() if k != "e"})[0] @ p["e"]

    rows = np.array([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]], bool)
    with jax.numpy_dtype_promotion(promotion):
        graph = jprune.trace(f, p, jnp.ones((2, 6)))
        (name,) = (g for g, info in graph.groups.items() if info.layers is not None)

        def check(got):
            for d in EXACT:
                assert got[d].dtype == p[d].dtype
                np.testing.assert_array_equal(got[d], np.where(rows[:, None], p[d], np.zeros((), p[d].dtype)), d)

        for kind in (bool, np.float32, np.int32):
            check(jax.jit(graph.mask)(p, {name: rows.astype(kind)}))
        for how in ("pad", "unstack"):
            small = graph.compact(p, graph.decide({name: rows}, stacked=how), verify=None)
            check(jax.jit(lambda t, how=how: graph.expand(t, graph.decide({name: rows}, stacked=how)))(small))


def test_soft_gates_of_whole_numbers_round():
    p = {"w": jnp.array([7, -7, 100, 3], jnp.int8), "o": jnp.ones((4, 2))}
    graph = jprune.trace(lambda p, x: (x * p["w"].astype(jnp.float32)) @ p["o"], p, jnp.ones((2, 1)))
    got = graph.mask(p, {"w:0": jnp.array([0.5, 0.9, 1.0, 0.0])})["w"]
    assert got.tolist() == [4, -6, 100, 0] and got.dtype == jnp.int8


def test_masks_of_other_trees_are_refused_by_name():
    keep = gates(0, False)
    with pytest.raises(jprune.KeepError, match="leaf 'extra' was not among the traced parameters"):
        GRAPH.mask({**PARAMS, "extra": jnp.ones(3)}, keep)
    with pytest.raises(jprune.KeepError, match=r"leaf 'bias' has shape \(1,\), but \(6,\) was traced"):
        GRAPH.mask({**PARAMS, "bias": jnp.ones(1)}, keep)  # would broadcast


def test_a_decision_says_once_what_every_method_is_to_do():
    """A bare keep set means the defaults; a decision in its place carries its own flags, and fits its own graph only."""
    keep = {WIDE: np.arange(4) != 1, LOCAL: np.arange(8) < np.array([[3], [5], [5]])}
    padded, runs = GRAPH.decide(keep), GRAPH.decide(keep, stacked="bucket")
    small, lists = GRAPH.compact(PARAMS, keep), GRAPH.compact(PARAMS, runs)
    jax.tree.map(np.testing.assert_array_equal, GRAPH.compact(PARAMS, padded), small)
    assert [x.shape for x in lists["up"]] == [(1, 6, 3), (2, 6, 5)]
    for decision, tree in ((padded, small), (runs, lists)):
        jax.tree.map(np.testing.assert_array_equal, GRAPH.compact_like(PARAMS, decision), tree)
        jax.tree.map(np.testing.assert_array_equal, GRAPH.expand(tree, decision), GRAPH.mask(PARAMS, decision))
        assert GRAPH.cost(decision).params == sum(x.size for x in jax.tree.leaves(tree))
        assert GRAPH.plan(decision) == GRAPH.plan(keep) and GRAPH.verify(PARAMS, decision, X) < 1e-6
        assert GRAPH.decide(decision) is decision
    jax.tree.map(np.testing.assert_array_equal, GRAPH.restack(small, padded, source="pad", target="bucket"), lists)
    assert GRAPH.widths(padded)[LOCAL] == 5 and GRAPH.widths(runs)[LOCAL].tolist() == [3, 5, 5]
    assert GRAPH.padding_waste(runs) == GRAPH.padding_waste(keep) > 0
    assert GRAPH.layer_costs(padded) == GRAPH.layer_costs(keep) != GRAPH.layer_costs(runs)

    soft = {SOFT: some(SOFT, 3)}
    for method in (lambda k: GRAPH.compact(PARAMS, k), GRAPH.replay, GRAPH.plan, lambda k: GRAPH.verify(PARAMS, k, X)):
        with pytest.raises(jprune.NotPrunable, match=r"graph\.decide\(keep, allow_inexact=True\)"):
            method(soft)
        method(GRAPH.decide(soft, allow_inexact=True))

    other = jprune.trace(network, PARAMS, X)
    for method in (lambda k: GRAPH.mask(PARAMS, k), GRAPH.cost, GRAPH.replay, lambda k: GRAPH.expand(small, k)):
        with pytest.raises(jprune.KeepError, match="made for another graph"):
            method(other.decide(keep))


def test_expand_undoes_compact_up_to_the_mask():
    keep = gates(0, False)
    keep[STREAM][0] = keep[LOCAL][:, 0] = True
    assert len(set(keep[LOCAL].sum(-1).tolist())) > 1
    for stacked in ("pad", "bucket", "unstack"):
        small = GRAPH.compact(PARAMS, GRAPH.decide(keep, stacked=stacked))
        back = jax.jit(lambda t, how=stacked: GRAPH.expand(t, GRAPH.decide(keep, stacked=how)))(small)
        jax.tree.map(np.testing.assert_array_equal, back, GRAPH.mask(PARAMS, keep))
        again = GRAPH.compact(back, GRAPH.decide(keep, stacked=stacked))
        jax.tree.map(np.testing.assert_array_equal, again, small)
    with pytest.raises(jprune.KeepError, match="axis 0 of leaf 'bias' has size 6"):
        GRAPH.expand(PARAMS, keep)
    with pytest.raises(ValueError, match="stacked must be one of"):
        GRAPH.compact(PARAMS, GRAPH.decide(keep, stacked="list"))
    with pytest.raises(jprune.KeepError, match="leaf 'wide' is missing"):
        GRAPH.compact({k: v for k, v in PARAMS.items() if k != "wide"}, keep)
