"""Allocation: targets are met from below within one unit, by the rule each scope states, checked by brute force."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.budget import Target, allocate, isomorphic, ranked, uniform
from jprune.budget.allocate import isomorphism_class


def resnet():
    """Two stages of one block each, the second with a projection: five groups of 6 to 16 units."""
    shapes = {
        "stem": (3, 3, 2, 8),
        "a1": (3, 3, 8, 6),
        "a2": (3, 3, 6, 8),
        "b1": (3, 3, 8, 12),
        "b2": (3, 3, 12, 16),
        "short": (1, 1, 8, 16),
        "head": (16, 5),
    }

    def conv(x, k, stride=1):
        return jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def f(p, x):
        h = jax.nn.relu(conv(x, p["stem"]))
        h = h + conv(jax.nn.relu(conv(h, p["a1"])), p["a2"])
        h = conv(h, p["short"], 2) + conv(jax.nn.relu(conv(h, p["b1"], 2)), p["b2"])
        return h.mean((1, 2)) @ p["head"]

    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return jprune.trace(f, params, jax.ShapeDtypeStruct((2, 8, 8, 2), jnp.float32))


def decoder():
    """Four stacked layers with a gated unit each, between an embedding and a head."""
    shapes = {"embed": (11, 8), "gate": (4, 8, 12), "up": (4, 8, 12), "down": (4, 12, 8), "head": (8, 11)}

    def f(p, tokens):
        def layer(h, w):
            gate, up, down = w
            return h + (jax.nn.silu(h @ gate) * (h @ up)) @ down, None

        return jax.lax.scan(layer, p["embed"][tokens], (p["gate"], p["up"], p["down"]))[0] @ p["head"]

    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return jprune.trace(f, params, jax.ShapeDtypeStruct((2, 5), jnp.int32))


def mlp(*sizes):
    """A chain of matrices; group "Wi:1" has sizes[i + 1] units."""
    params = {f"W{i}": jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(itertools.pairwise(sizes))}

    def f(p, x):
        for i in range(len(p)):
            x = jax.nn.relu(x @ p[f"W{i}"])
        return x

    return jprune.trace(f, params, jax.ShapeDtypeStruct((2, sizes[0]), jnp.float32))


RESNET, DECODER = resnet(), decoder()
GRAPHS = {"resnet": RESNET, "decoder": DECODER}
SCOPES = {"global": ranked, "uniform": uniform, "isomorphic": isomorphic}


def table(graph):
    """A made-up monotone latency: the work plus a cost per unit."""
    return lambda widths: 1e-3 * graph.cost(widths=widths).macs ** 0.9 + 0.01 * sum(np.sum(w) for w in widths.values())


def target_of(graph, quantity, amount):
    if quantity == "latency":
        return Target.latency(table(graph), amount)
    return Target(quantity, amount)


def scores_of(graph, seed, levels=None):
    """Random scores; `levels` makes ties likely."""
    rng = np.random.default_rng(seed)
    draw = rng.random if levels is None else lambda shape: rng.integers(0, levels, shape).astype(float)
    return {g: draw(i.shape) for g, i in graph.groups.items()}


def price(graph, target, widths):
    """The cost by the graph's public methods, not by the target's."""
    if target.quantity == "latency":
        return target.measure(widths)
    return getattr(graph.cost(widths=widths), target.quantity)


def width_steps(graph, found, options):
    """Every way to give one unit (or multiple) back, as widths."""
    for g, w in found.widths.items():
        size, multiple = graph.groups[g].size, options.get("multiple_of", 1)
        if np.ndim(w):
            for layer in range(len(w)):
                if w[layer] < size:
                    more = np.array(w)
                    more[layer] = min(size, w[layer] + multiple)
                    yield {**found.widths, g: more}
        elif w < size:
            yield {**found.widths, g: min(size, w + multiple)}


def check(graph, scores, target, scope, **options):
    """What every allocation promises."""
    found = SCOPES[scope](graph, scores, target, **options)
    dense = price(graph, target, {})
    limit = target.amount if target.is_absolute else target.amount * dense
    assert found.quantity == target.quantity and found.dense == dense and found.limit == pytest.approx(limit)
    # the numbers reported are those of the keep sets
    widths = {g: k.sum(-1) for g, k in found.keep.items()}
    widths = {
        g: (w if np.ndim(w) and options.get("per_layer") == "free" else int(np.max(w))) for g, w in widths.items()
    }
    for g, w in widths.items():
        np.testing.assert_array_equal(found.widths[g], w)
    assert found.achieved == pytest.approx(price(graph, target, widths), rel=1e-12)
    assert found.achieved <= found.limit and found.gap == pytest.approx(found.limit - found.achieved)
    assert str(found).startswith(f"{target.quantity}: ")
    # no single unit more fits, and the cheapest is named
    more = [price(graph, target, w) - found.achieved for w in width_steps(graph, found, options)]
    assert (found.next_unit is None) == (not more)
    if more:
        assert found.next_unit == pytest.approx(min(more)) and found.next_unit > found.gap
    for g, k in found.keep.items():
        # within a group (and a layer) the lowest go first, ties by lowest index
        for row, s in zip(np.atleast_2d(k), np.atleast_2d(scores[g]), strict=True):
            gone = set(np.flatnonzero(~row).tolist())
            assert gone == set(np.argsort(s, kind="stable")[: len(gone)].tolist()), g
            assert row.sum() >= max(options.get("min_keep", 1), 1)
            multiple = options.get("multiple_of", 1)
            assert row.sum() % multiple == 0 or row.all()
            assert row.sum() >= math.ceil(len(row) * (1 - options.get("max_sparsity", 1.0)) - 1e-9)
    return found


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    levels=st.sampled_from([None, 1, 3]),
    quantity=st.sampled_from(["macs", "params", "bytes", "activation_bytes", "latency"]),
    amount=st.floats(0.6, 1.0),
    options=st.fixed_dictionaries(
        {},
        optional={
            "per_layer": st.sampled_from(["equal", "free"]),
            "min_keep": st.sampled_from([1, 2, 3]),
            "max_sparsity": st.sampled_from([1.0, 0.7]),
            "multiple_of": st.sampled_from([2, 3, 4]),
        },
    ),
)
def test_the_target_is_met_within_one_unit(name, scope, seed, levels, quantity, amount, options):
    graph = GRAPHS[name]
    check(graph, scores_of(graph, seed, levels), target_of(graph, quantity, amount), scope, **options)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", GRAPHS)
def test_tight_targets(name, scope):
    graph = GRAPHS[name]
    for amount in (0.1, 0.3, graph.cost().macs // 4):
        check(graph, scores_of(graph, 3), Target.macs(amount), scope)
    check(graph, scores_of(graph, 3), Target.bytes(graph.cost().bytes // 3), scope)


def test_a_global_ranking_removes_the_lowest_of_all():
    graph = mlp(4, 6, 6, 4)
    scores = {"W0:1": np.array([1, 9, 10, 11, 12, 13.0]), "W1:1": np.array([3, 4, 2, 14, 15, 16.0])}
    found = check(graph, scores, Target.params(graph.cost(widths={"W0:1": 5, "W1:1": 4}).params), "global")
    assert [np.flatnonzero(~found.keep[g]).tolist() for g in scores] == [[0], [0, 2]]


def test_uniform_removes_the_same_fraction_everywhere():
    graph = mlp(4, 8, 16, 4)
    scores = {"W0:1": np.arange(8) + 100.0, "W1:1": np.arange(16) / 100}  # all of W1 scores lower
    half = graph.cost(widths={"W0:1": 4, "W1:1": 8}).macs
    found = check(graph, scores, Target.macs(half), "uniform")
    # the fraction is of what may go (all but one unit): 4 of 7 and 8 of 15 both are above one half
    assert found.widths == {"W0:1": 4, "W1:1": 8} and found.achieved == half


def test_isomorphic_groups_compete_with_their_like_only():
    graph = RESNET
    classes = {g: isomorphism_class(graph, i) for g, i in graph.groups.items()}
    inner = [g for g in classes if len(graph.groups[g].members) == 2]
    assert sorted(inner) == ["a1:3", "b1:3"] and classes["a1:3"] == classes["b1:3"]
    assert len(set(classes.values())) == len(classes) - 1
    scores = {g: np.ones(i.size) + np.arange(i.size) for g, i in graph.groups.items()}
    scores["a1:3"] = scores["a1:3"] + 1000  # loud in its own class, so b1 pays for both
    found = check(graph, scores, Target.macs(0.7), "isomorphic")
    assert found.keep["a1:3"].all() and not found.keep["b1:3"].all()
    others = [g for g in classes if g not in inner]
    assert all(not found.keep[g].all() for g in others)
    louder = {g: s * (1000.0 if g in others else 1.0) for g, s in scores.items()}
    again = isomorphic(graph, louder, Target.macs(0.7))
    for g in scores:  # a class does not see the scores of the others
        np.testing.assert_array_equal(again.keep[g], found.keep[g])


def test_a_user_defined_class():
    graph = mlp(4, 6, 6, 6, 4)
    scores = {"W0:1": np.arange(6.0), "W1:1": np.arange(6) + 10.0, "W2:1": np.arange(6.0)}
    found = allocate(graph, scores, Target.macs(0.5), lambda g: g.id == "W2:1")
    by_id = allocate(graph, scores, Target.macs(0.5), "uniform")
    assert found.keep["W1:1"].all() and not by_id.keep["W1:1"].all()


def test_no_other_choice_of_a_chain_is_larger():
    """Brute force: of all cuts of the global ranking the largest that fits, then refilled from the most important."""
    graph = mlp(3, 4, 5, 3)
    rng = np.random.default_rng(5)
    for _ in range(20):
        scores = {g: rng.permutation(100)[: i.size].astype(float) for g, i in graph.groups.items()}
        target = Target.macs(float(rng.uniform(0.3, 0.95)))
        found = check(graph, scores, target, "global")
        order = sorted((s, g, u) for g, row in scores.items() for u, s in enumerate(row))
        last = {g: max(range(len(r)), key=lambda u, r=r: r[u]) for g, r in scores.items()}
        order = [(s, g, u) for s, g, u in order if u != last[g]]  # one unit always stays

        def cost(removed, scores=scores):
            return graph.cost(widths={g: len(r) - sum(h == g for _, h, _ in removed) for g, r in scores.items()}).macs

        cut = next(k for k in range(len(order) + 1) if cost(order[:k]) <= found.limit)
        removed = order[:cut]
        stuck = set()
        while candidates := [x for x in removed if x[1] not in stuck]:
            back = max(candidates)
            without = [x for x in removed if x != back]
            if cost(without) <= found.limit:
                removed = without
            else:
                stuck.add(back[1])
        for g in scores:
            assert set(np.flatnonzero(~found.keep[g]).tolist()) == {u for _, h, u in removed if h == g}


def test_one_group_is_cut_optimally():
    graph = mlp(5, 12, 5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        s = rng.random(12)
        target = Target.macs(float(rng.uniform(0.1, 1)))
        found = check(graph, {"W0:1": s}, target, "global")
        best = max(
            (k for r in range(1, 13) for k in itertools.combinations(range(12), r) if 2 * 10 * r <= found.limit),
            key=lambda k: s[list(k)].sum(),
        )
        assert set(np.flatnonzero(found.keep["W0:1"]).tolist()) == set(best)


def test_layers_compete_only_when_they_may():
    (ffn,) = [g for g, i in DECODER.groups.items() if i.layers]
    scores = {ffn: np.random.default_rng(0).random((4, 12))}
    scores[ffn][2] += 10
    equal = check(DECODER, scores, Target.macs(0.6), "global")
    assert len(set(equal.keep[ffn].sum(-1).tolist())) == 1
    free = check(DECODER, scores, Target.macs(0.6), "global", per_layer="free")
    assert free.keep[ffn][2].all() and len(set(free.keep[ffn].sum(-1).tolist())) > 1
    assert all(k >= 1 for k in free.keep[ffn].sum(-1))
    fair = check(DECODER, scores, Target.macs(0.6), "uniform", per_layer="free")
    counts = fair.keep[ffn].sum(-1)
    assert counts.max() - counts.min() <= 1


def test_multiples_of_eight():
    graph = mlp(8, 40, 64, 20, 8)
    scores = scores_of(graph, 1)
    found = check(graph, scores, Target.macs(0.5), "global", multiple_of=8)
    assert all(w % 8 == 0 or w == graph.groups[g].size for g, w in found.widths.items())
    by_name = allocate(graph, scores, Target.macs(0.5), multiple_of={"W1:*": 16})
    assert by_name.widths["W1:1"] % 16 == 0 and any(w % 8 for g, w in by_name.widths.items() if g != "W1:1")


def test_multiples_come_back_by_what_they_would_bring_back():
    # when the third group reaches 8 of 16, 11 units of the first have gone, of which rounding keeps 3
    graph = mlp(4, 16, 4, 16, 4, 16, 12)
    units = np.arange(16.0)
    scores = {
        "W0:1": np.where(units < 8, units, np.where(units < 11, units + 12, units + 100)),
        "W2:1": np.where(units < 8, units + 8, units + 200),
        "W4:1": np.where(units < 8, units + 30, units + 300),
    }
    # one of the first two may come back, the third is too large: the second brings back more (15 against 7)
    limit = graph.cost(widths={"W0:1": 8, "W2:1": 16, "W4:1": 8}).macs
    found = check(graph, scores, Target.macs(limit), "global", multiple_of=8)
    assert [found.widths[g] for g in scores] == [8, 16, 8]


def test_limits_by_pattern():
    graph = mlp(8, 20, 20, 20, 8)
    scores = scores_of(graph, 2)
    found = allocate(
        graph,
        scores,
        Target.macs(0.75),
        min_keep={"W0:*": 15, "W*": 2},
        max_sparsity={"W1:1": 0.25},
        frozen=["W2:*"],
    )
    assert found.widths["W0:1"] >= 15 and found.widths["W1:1"] >= 15 and found.widths["W2:1"] == 20
    assert found.keep["W2:1"].all()
    with pytest.raises(ValueError, match=r"frozen='V\*' matches no group"):
        allocate(graph, scores, Target.macs(0.5), frozen=["V*"])
    for options in ({"min_keep": -1}, {"multiple_of": 0}, {"max_sparsity": 1.5}):
        with pytest.raises(ValueError, match=r"group 'W0:1'.*max_sparsity in \[0, 1\]"):
            allocate(graph, scores, Target.macs(0.5), **options)
    with pytest.raises(ValueError, match="'by size'"):
        allocate(graph, scores, Target.macs(0.5), "by size")
    with pytest.raises(ValueError, match="'some'"):
        allocate(graph, scores, Target.macs(0.5), per_layer="some")


@pytest.mark.parametrize("scope", SCOPES)
def test_ties_never_remove_too_much(scope):
    for graph in GRAPHS.values():
        scores = {g: np.zeros(i.shape) for g, i in graph.groups.items()}
        for amount in (0.3, 0.5, 0.9):
            check(graph, scores, Target.macs(amount), scope)
        whole = SCOPES[scope](graph, scores, Target.macs(1.0))
        assert all(k.all() for k in whole.keep.values()) and whole.next_unit is None and whole.gap == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(2, 9), min_size=3, max_size=5), amount=st.floats(1e-4, 0.2), least=st.integers(1, 3))
def test_an_unreachable_target_names_what_is_reachable(sizes, amount, least):
    graph = mlp(*sizes)
    scores = scores_of(graph, 0)
    floor = graph.cost(widths={g: min(i.size, least) for g, i in graph.groups.items()}).macs
    dense = graph.cost().macs
    if floor <= amount * dense:
        assert allocate(graph, scores, Target.macs(amount), min_keep=least).achieved <= amount * dense
        return
    with pytest.raises(ValueError, match="can reach; choose a fraction") as caught:
        allocate(graph, scores, Target.macs(amount), min_keep=least)
    message = str(caught.value)
    assert f"{floor:,.6g} is the least" in message
    offered = float(message.split("[")[1].split(",")[0])
    assert floor / dense <= offered <= floor / dense + 1e-3
    assert allocate(graph, scores, Target.macs(offered), min_keep=least).achieved == floor


def test_groups_without_scores_stay_whole():
    scores = {"a1:3": np.arange(6.0)}
    found = check(RESNET, scores, Target.macs(0.97), "global")
    assert set(found.keep) == {"a1:3"}
    assert all(w == RESNET.groups[g].size for g, w in found.widths.items() if g != "a1:3")
    with pytest.raises(ValueError, match="is the least these groups"):
        allocate(RESNET, {}, Target.macs(0.5))


def test_inexact_groups_need_permission():
    params = {"A": jnp.ones((4, 6)), "B": jnp.ones((6, 3))}
    graph = jprune.trace(lambda p, x: jax.nn.softmax(x @ p["A"]) @ p["B"], params, jnp.ones((2, 4)))
    scores = {"A:1": np.arange(6.0)}
    with pytest.raises(jprune.NotPrunable, match=r"'A:1' is inexact.*allow_inexact=True"):
        allocate(graph, scores, Target.macs(0.5))
    assert allocate(graph, scores, Target.macs(0.5), allow_inexact=True).widths == {"A:1": 3}
    assert allocate(graph, scores, Target.macs(1.0), frozen=["A:*"]).widths == {"A:1": 6}


def test_nan_scores_are_refused_by_name():
    scores = scores_of(RESNET, 0)
    scores["b1:3"][4] = np.nan
    with pytest.raises(ValueError, match=r"scores\['b1:3'\] is nan at unit \(4,\)"):
        allocate(RESNET, scores, Target.macs(0.5))


def test_targets_say_what_is_wrong():
    for make, word in (
        (lambda: Target.macs(1.5), "fraction above 1"),
        (lambda: Target.macs(0.0), "above 0"),
        (lambda: Target.macs(-3), "above 0"),
        (lambda: Target.params(True), "above 0"),
        (lambda: Target.bytes(float("nan")), "above 0"),
        (lambda: Target("flops", 0.5), "not 'flops'"),
        (lambda: Target("latency", 0.5), "needs a table"),
        (lambda: Target("macs", 0.5, measure=lambda w: 1.0), "only a latency target"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
    assert Target.macs(10**9).is_absolute and not Target.macs(1.0).is_absolute
    assert Target.latency(lambda w: 3.0, 2.5, absolute=True).limit(9.0) == 2.5


def test_even_layers_keep_the_same_number_and_no_further_step_of_all_fits():
    """Six alike matrices: half of the parameters could be met more closely with widths that differ by one."""
    graph = mlp(7, 10, 10, 10, 10, 10, 10, 3)
    alike = [g for g, i in graph.groups.items() if i.size == 10]
    scores = scores_of(graph, 0)
    target = Target.params(0.5)
    apart = uniform(graph, scores, target)
    found = uniform(graph, scores, target, even=True)
    inner = {found.widths[g] for g in alike[1:-1]}
    assert len({apart.widths[g] for g in alike[1:-1]}) == 2 and len(inner) == 1
    assert found.achieved == price(graph, target, found.widths) <= found.limit
    one = {g: found.widths[g] + 1 for g in alike}
    steps = [[alike[0]], alike[1:-1], [alike[-1]]]
    if isomorphism_class(graph, graph.groups[alike[0]]) == isomorphism_class(graph, graph.groups[alike[1]]):
        steps = [alike]
    more = [price(graph, target, found.widths | {g: one[g] for g in step}) - found.achieved for step in steps]
    assert min(more) > found.gap and found.next_unit == pytest.approx(min(more))
    with pytest.raises(ValueError, match="even=True goes with scope 'uniform'"):
        ranked(graph, scores, target, even=True)
