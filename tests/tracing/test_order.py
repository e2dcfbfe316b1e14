"""Constant positions written as indexing: permutations, repeats, reversals, strides are followed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, check_values, members, normal

import jprune
from jprune.tracing import refine
from jprune.tracing import tags as T

X = normal(99, 5, 6)
PERM = np.array([3, 1, 0, 7, 2, 5, 4, 6])
CHOICE = np.array([6, 1, 1, 4, 0, 1, 4])
A, B = normal(0, 6, 8), normal(1, 8, 3)


def positions(graph, group, leaf):
    return next(m for m in graph.groups[group].members if m.path == leaf).positions.tolist()


ONE_TO_ONE = {
    "permutation": (lambda h: h[:, PERM], PERM),
    "of jnp": (lambda h: h[:, jnp.asarray(PERM)], PERM),
    "take": (lambda h: jnp.take(h, PERM, axis=1), PERM),
    "clip": (lambda h: jnp.take(h, PERM, axis=-1, mode="clip"), PERM),
    "fill": (lambda h: h.at[:, PERM].get(mode="fill", fill_value=3.0), PERM),
    "negative": (lambda h: h[:, PERM - 8], PERM),
    "computed": (lambda h: h[:, (jnp.arange(8) * 3 + 1) % 8], (np.arange(8) * 3 + 1) % 8),
    "argsort": (lambda h: h[:, jnp.argsort(jnp.asarray(PERM))], np.argsort(PERM)),
    "reversed": (lambda h: h[:, ::-1], np.arange(8)[::-1]),
    "flipped": (lambda h: jnp.flip(h, 1), np.arange(8)[::-1]),
    "rolled": (lambda h: jnp.roll(h, 3, axis=1), (np.arange(8) - 3) % 8),
    "twice": (lambda h: h[:, PERM][:, ::-1], PERM[::-1]),
    "and back": (lambda h: h[:, PERM][:, np.argsort(PERM)], np.arange(8)),
    "under vmap": (lambda h: jax.vmap(lambda r: r[PERM])(h), PERM),
    "under jit": (lambda h: jax.jit(lambda r, i: r[:, i])(h, PERM), PERM),
    "blocks": (lambda h: h.reshape(-1, 4, 2)[:, [2, 0, 3, 1]].reshape(-1, 8), np.array([4, 5, 0, 1, 6, 7, 2, 3])),
}


@pytest.mark.parametrize("name", ONE_TO_ONE)
def test_members_follow_the_order(name):
    step, order = ONE_TO_ONE[name]
    graph = check_values(lambda p, x: jax.nn.relu(step(x @ p["a"])) @ p["b"], {"a": A, "b": B}, (X,), tolerance=2e-5)
    for group in (g for g in graph.groups if ("a", 1) in members(graph, g)):
        ours, theirs = positions(graph, group, "a"), positions(graph, group, "b")
        assert [sorted(order[j] for j in unit) for unit in theirs] == ours
    assert sum(i.size for i in graph.groups.values()) == (4 + 2 if name == "blocks" else 8)
    assert all(i.exact for i in graph.groups.values())
    # along an axis that is summed: the certificate holds in the new order too
    assert all(i.exact for i in jprune.trace(lambda p, x: (step(x @ p["a"]) ** 2).sum(-1), {"a": A}, X).groups.values())


def test_a_plan_of_a_reordered_axis_comes_back(tmp_path):
    graph = jprune.trace(lambda p, x: (x @ p["a"])[:, PERM] @ p["b"], {"a": A, "b": B}, X)
    (group,) = graph.groups
    keep, file = {group: np.arange(8) % 3 > 0}, tmp_path / "plan.json"
    graph.plan(keep).save(file)
    small = jprune.Plan.load(file).apply({"a": A, "b": B})
    jax.tree.map(np.testing.assert_array_equal, small, graph.compact({"a": A, "b": B}, keep))
    text = file.read_text()
    file.write_text(text.replace('"order": [', '"order": [0, 0, '))
    with pytest.raises(ValueError, match="order"):
        jprune.Plan.load(file)


def test_units_that_a_residual_joins_are_the_cycles_of_the_permutation():
    """h + h[perm]: 0 -> 3 -> 7 -> 6 -> 4 -> 2 -> 0 is one unit, 1 and 5 are two others."""

    def f(p, x):
        h = jax.nn.relu(x @ p["a"])
        return (h + h[:, PERM]) @ p["b"]

    graph = jprune.trace(f, {"a": A, "b": B}, X)
    found = sorted(tuple(u) for g in graph.groups for u in positions(graph, g, "a"))
    assert found == [(0, 2, 3, 4, 6, 7), (1,), (5,)]
    for g, i in graph.groups.items():
        if i.size > 1:
            check_values(f, {"a": A, "b": B}, (X,), keep={g: np.arange(i.size) > 0}, graph=graph)


def test_a_mirror_joins_pairs():
    def f(p, x):
        h = x @ p["a"]
        return jnp.tanh(h + h[:, ::-1]) @ p["b"]

    graph = check_laws(f, {"a": A, "b": B}, (X,))
    (group,) = graph.groups
    assert positions(graph, group, "a") == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_a_choice_takes_some_positions_several_times():
    """Units are grouped by how often they are taken: widths stay polynomials."""
    params = {"a": A, "b": normal(1, 7, 3)}

    def f(p, x):
        return jax.nn.relu((x @ p["a"])[:, CHOICE]) @ p["b"]

    graph = jprune.trace(f, params, X)
    owned = {tuple(u): (g, k) for g in graph.groups for k, u in enumerate(positions(graph, g, "a"))}
    assert {(0,), (1,), (2,), (3,), (4,), (5,), (6,)} <= set(owned)
    assert owned[0,][0] == owned[6,][0] != owned[4,][0] != owned[1,][0] and owned[2,][0] == owned[3,][0]
    keep = {owned[0,][0]: np.array([False, True]), owned[2,][0]: np.array([True, False, False, True])}
    check_values(f, params, (X,), keep=keep, graph=graph)
    everything = {owned[1,][0]: np.array([False]), owned[4,][0]: np.array([False])}
    small = graph.compact(params, graph.decide(everything, allow_empty=True))
    assert small["b"].shape == (2, 3)
    np.testing.assert_allclose(
        graph.replay(graph.decide(everything, allow_empty=True))(small, X),
        f(graph.mask(params, everything), X),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("repeat", [
    lambda k: k[:, :, jnp.arange(6) // 3], lambda k: jnp.take(k, np.repeat(np.arange(2), 3), axis=2),
    lambda k: jnp.repeat(k, 3, axis=2)], ids=["floor", "take", "repeat"])  # fmt: skip
def test_key_heads_repeated_by_indexing(repeat):
    params = {n: normal(k, 6, h, 4) for k, (n, h) in enumerate({"q": 6, "k": 2, "v": 2}.items())}
    params["o"] = normal(5, 6, 4, 6)
    x = normal(3, 2, 5, 6)

    def f(p, x):
        q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, repeat(k)))
        return jnp.einsum("bhts,bshd,hdo->bto", a, repeat(v), p["o"])

    graph = check_laws(f, params, (x,))
    heads = next(g for g in graph.groups if ("k", 1) in members(graph, g))
    assert members(graph, heads) == {("q", 1), ("k", 1), ("v", 1), ("o", 0)}
    assert positions(graph, heads, "q") == [[0, 1, 2], [3, 4, 5]]
    assert sorted(i.size for i in graph.groups.values()) == [2, 3, 4, 4]  # query heads of each key head, channels


@pytest.mark.parametrize("split", [
    lambda h: (h[..., ::2], h[..., 1::2]),
    lambda h: (h[..., jnp.arange(0, 16, 2)], h[..., jnp.arange(1, 16, 2)]),
    lambda h: (h[..., ::-1][..., ::2], h[..., ::-1][..., 1::2])], ids=["strides", "indices", "backwards"])  # fmt: skip
def test_interleaved_gates_are_pairs(split):
    params = {"gate_up": normal(0, 6, 16), "down": B}

    def f(p, x):
        gate, up = split(x @ p["gate_up"])
        return (jax.nn.silu(gate) * up) @ p["down"]

    graph = check_laws(f, params, (X,))
    (group,) = graph.groups
    assert sorted(positions(graph, group, "gate_up")) == [[2 * j, 2 * j + 1] for j in range(8)]
    assert graph.cost({group: np.arange(8) < 5}).macs == 5 * 6 * 10 + 5 * 5 * 3


def test_interleaved_gates_of_stacked_layers_keep_different_units():
    params = {"gate_up": normal(0, 2, 6, 16), "down": normal(1, 2, 8, 6), "head": normal(2, 6, 3)}

    def f(p, x):
        def layer(h, w):
            y = h @ w["gate_up"]
            return h + (jax.nn.silu(y[:, ::2]) * y[:, 1::2]) @ w["down"], None

        return jax.lax.scan(layer, x, {n: p[n] for n in ("gate_up", "down")})[0] @ p["head"]

    graph = jprune.trace(f, params, X)
    (group,) = (g for g, i in graph.groups.items() if i.layers)
    keep = {group: np.stack([np.arange(8) < 5, np.arange(8) % 3 > 0])}
    check_laws(f, params, (X,), keep=keep, graph=graph, gradients=False)
    keep = {group: np.stack([np.arange(8) < 3, np.arange(8) > 1])}
    check_laws(f, params, (X,), keep=keep, graph=graph, gradients=False, stacked="unstack")


def test_an_order_inside_a_scan_is_one_for_all_layers():
    params = {"a": normal(0, 2, 6, 8), "b": normal(1, 2, 8, 6), "head": normal(2, 6, 3)}

    def f(p, x):
        def layer(h, w):
            return h + jax.nn.relu((h @ w["a"])[:, PERM]) @ w["b"], None

        return jax.lax.scan(layer, x, {n: p[n] for n in ("a", "b")})[0] @ p["head"]

    graph = check_laws(f, params, (X,), keep={"a:2": np.arange(8) % 3 > 0})
    assert graph.groups["a:2"].layers is None and members(graph, "a:2") == {("a", 2), ("b", 1)}


def test_layers_that_are_reversed_are_not_the_layers_of_another_scan():
    params = {"a": normal(0, 3, 4, 6), "b": normal(1, 3, 6, 4)}

    def f(p, x):
        _, skips = jax.lax.scan(lambda h, w: (h, jnp.tanh(h @ w)), x, p["a"])
        return jax.lax.scan(lambda h, s: (h + s[0] @ s[1], None), x, (skips[::-1], p["b"]))[0]

    graph = jprune.trace(f, params, normal(3, 5, 4))
    assert all(i.layers is None for i in graph.groups.values())
    for g, i in graph.groups.items():
        check_values(f, params, (normal(3, 5, 4),), keep={g: np.arange(i.size) < 4}, graph=graph)


@pytest.mark.parametrize("stride", [2, 3])
def test_strides_that_do_not_divide_the_axis(stride):
    n = len(range(1, 8, stride))
    params = {"a": A, "b": normal(1, n, 3), "c": B}

    def f(p, x):
        h = jnp.tanh(x @ p["a"])
        return h[:, 1::stride] @ p["b"] + h @ p["c"]

    graph = check_values(f, params, (X,))
    assert sum(i.size for i in graph.groups.values()) == {2: 4, 3: 8}[stride]  # pairs where the step divides


def test_slices_of_an_axis_in_another_order():
    params = {"a": A, "b": normal(1, 3, 3), "c": normal(2, 5, 3)}

    def f(p, x):
        h = jnp.tanh(x @ p["a"])[:, PERM]
        return h[:, :3] @ p["b"] + h[:, 3:] @ p["c"]

    check_values(f, params, (X,))

    def g(p, x):
        h = jnp.concatenate([jnp.tanh(x @ p["a"])[:, PERM], jnp.ones((5, 2))], 1)
        h = jnp.pad(h[:, 1:], ((0, 0), (1, 0)))
        return h[:, 2:5] @ p["b"] + h[:, 5:] @ p["c"]

    check_values(g, params, (X,))


def test_a_position_that_nobody_owns_stays_with_those_it_meets():
    """The padded column 7 is added to 1, 4 and 0, in turn: none of them can be removed alone."""
    params = {"a": A, "b": B}
    order = np.array([1, 4, 3, 2, 7, 6, 5, 0])

    def f(p, x):
        h = jnp.pad(jnp.tanh(x @ p["a"])[:, 1:], ((0, 0), (0, 1)))
        return (h + h[:, order]) @ p["b"]

    graph = check_values(f, params, (X,))
    owned = sorted(tuple(u) for g in graph.groups for u in positions(graph, g, "a"))
    assert owned == [(0,), (3, 4), (6, 7)] and graph.leaves["a"].frozen[1].code == "SINGLE_INDEX"


def test_an_order_is_kept_by_flattening_and_by_concatenation():
    params = {"a": normal(0, 6, 4, 2), "b": normal(1, 8, 3), "c": normal(2, 12, 3)}

    def f(p, x):
        h = jnp.tanh(jnp.einsum("be,ehd->bhd", x, p["a"]))[:, [2, 0, 3, 1]]
        flat = h.reshape(5, 8)
        return flat @ p["b"] + jnp.concatenate([flat, flat[:, ::2]], 1) @ p["c"]

    check_values(f, params, (X,))


def test_rows_of_a_table_that_constants_name():
    """A constant choice of rows of a leaf: those that nobody reads go for nothing."""
    params = {"table": normal(0, 6, 8), "b": normal(1, 6, 3)}

    def f(p, x):
        return (x @ p["table"].T[:, ::-1]) @ p["b"] + p["table"][np.array([1, 3])].sum()

    check_values(f, params, (normal(3, 5, 8),))


def test_what_cannot_be_followed_is_frozen_with_a_reason():
    """A permutation that mixes heads with channels leaves no units; positions that data says, neither."""
    params = {"a": normal(0, 6, 4, 2), "b": B}

    def f(p, x):
        return jnp.einsum("be,ehd->bhd", x, p["a"]).reshape(5, 8)[:, PERM] @ p["b"]

    graph = jprune.trace(f, params, X)
    assert not graph.groups and graph.leaves["a"].frozen[1].code == "ORDER_OR_MIX"
    graph = jprune.trace(lambda p, x: (x @ p["a"])[:, PERM.reshape(2, 4)].reshape(5, 8) @ p["b"], {"a": A, "b": B}, X)
    assert not graph.groups and graph.leaves["a"].frozen[1].code == "MISALIGNED_RESHAPE"
    for g in (
        lambda p, x, i: (x @ p["a"])[:, i] @ p["b"],
        lambda p, x, i: (x @ p["a"])[:, jnp.clip(i, 0, 3)] @ p["b"],
        lambda p, x, i: (x @ p["a"]).at[:, PERM + i[0]].get(mode="clip") @ p["b"],
    ):
        graph = jprune.trace(g, {"a": A, "b": B}, X, jnp.asarray(PERM))
        assert not graph.groups and graph.leaves["a"].frozen[1].code == "DATA_INDEXED"
    # an index outside is filled: a row of another kind than the others
    graph = jprune.trace(
        lambda p, x: (x @ p["a"]).at[:, PERM + 1].get(mode="fill", fill_value=2.0) @ p["b"], {"a": A, "b": B}, X
    )
    assert not graph.groups


def test_ties_go_position_by_position():
    """Against the definition: units are the connected components of the positions that meet."""
    import networkx as nx

    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 9))
        a, net = T.Atom(n), nx.Graph()
        net.add_nodes_from(range(n))
        tag = (a,)
        for _ in range(rng.integers(1, 4)):
            p = rng.permutation(n)
            refine.unify(tag, refine.take(tag, p))
            net.add_edges_from(enumerate(p.tolist()))
        live: list[T.Atom] = []
        owner, unit = refine.owners(tag, live)
        found = {}
        for j in range(n):
            found.setdefault((owner[j], unit[j]), set()).add(j)
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, nx.connected_components(net)))
        assert T.size(T.norm(tag)) == n
