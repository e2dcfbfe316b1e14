"""Exact partitions and certificates of small functions, derivable by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, members, normal

import jprune

X = normal(99, 5, 6)


def positions(graph, group):
    """{(leaf, axis): positions per unit} of a group."""
    return {(m.path, m.axis): m.positions.tolist() for m in graph.groups[group].members}


def conv(x, kernel, groups=1, stride=1, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.smoke
def test_two_layers_share_the_hidden_axis():
    params = {"W1": normal(0, 6, 8), "b1": normal(1, 8), "W2": normal(2, 8, 3)}

    def f(p, x):
        return jax.nn.relu(x @ p["W1"] + p["b1"]) @ p["W2"]

    graph = check_laws(f, params, (X,))
    assert list(graph.groups) == ["W1:1"]
    assert members(graph, "W1:1") == {("W1", 1), ("b1", 0), ("W2", 0)}
    keep = {"W1:1": np.arange(8) != 3}
    small = graph.compact(params, keep)
    want = jax.nn.relu(X @ np.delete(params["W1"], 3, 1) + np.delete(params["b1"], 3)) @ np.delete(params["W2"], 3, 0)
    np.testing.assert_allclose(jax.jit(graph.replay(keep))(small, X), want, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_residual_stream_and_its_branch_are_two_groups():
    params = {"W0": normal(0, 6, 8), "W1": normal(1, 8, 5), "W2": normal(2, 5, 8), "W3": normal(3, 8, 2)}

    def f(p, x):
        h = jax.nn.relu(x @ p["W0"])
        return (h + jax.nn.relu(h @ p["W1"]) @ p["W2"]) @ p["W3"]

    graph = check_laws(f, params, (X,))
    assert members(graph, "W0:1") == {("W0", 1), ("W1", 0), ("W2", 1), ("W3", 0)}
    assert members(graph, "W1:1") == {("W1", 1), ("W2", 0)}
    assert len(graph.groups) == 2


def test_concatenation_keeps_its_parts_apart():
    params = {"A": normal(0, 6, 4), "B": normal(1, 6, 5), "C": normal(2, 9, 3)}
    graph = check_laws(lambda p, x: jnp.concatenate([x @ p["A"], x @ p["B"]], -1) @ p["C"], params, (X,))
    assert {g: i.size for g, i in graph.groups.items()} == {"A:1": 4, "B:1": 5}
    assert positions(graph, "A:1")["C", 0] == [[i] for i in range(4)]
    assert positions(graph, "B:1")["C", 0] == [[i] for i in range(4, 9)]


def test_the_same_value_twice_in_a_concatenation_is_one_group():
    params = {"A": normal(0, 6, 4), "C": normal(2, 8, 3)}

    def f(p, x):
        h = x @ p["A"]
        return jnp.concatenate([h, h], -1) @ p["C"]

    graph = check_laws(f, params, (X,))
    assert positions(graph, "A:1")["C", 0] == [[j, j + 4] for j in range(4)]


def test_flattening_spreads_a_channel_over_rows():
    params = {"K": normal(0, 3, 3, 3, 4), "D": normal(1, 16, 2)}
    x = normal(5, 3, 4, 4, 3)

    def f(p, x):
        return conv(x, p["K"], stride=2).reshape(x.shape[0], -1) @ p["D"]

    graph = check_laws(f, params, (x,))
    assert positions(graph, "K:3")["D", 0] == [[c, c + 4, c + 8, c + 12] for c in range(4)]


def test_grouped_convolutions_have_three_groups():
    params = {"A": normal(0, 1, 1, 6, 6), "K": normal(1, 3, 3, 2, 12), "D": normal(2, 1, 1, 12, 3)}
    x = normal(5, 2, 4, 4, 6)

    def f(p, x):
        return conv(jax.nn.relu(conv(jax.nn.relu(conv(x, p["A"])), p["K"], 3)), p["D"])

    graph = check_laws(f, params, (x,))
    assert sorted(i.size for i in graph.groups.values()) == [2, 3, 4]
    whole = next(g for g, i in graph.groups.items() if i.size == 3)
    assert positions(graph, whole)["A", 3] == [[0, 1], [2, 3], [4, 5]]
    assert positions(graph, whole)["D", 2] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    inside = next(g for g, i in graph.groups.items() if i.size == 2)
    assert positions(graph, inside) == {("A", 3): [[0, 2, 4], [1, 3, 5]], ("K", 2): [[0], [1]]}
    outside = next(g for g, i in graph.groups.items() if i.size == 4)
    assert positions(graph, outside)["K", 3] == [[j, j + 4, j + 8] for j in range(4)]


def test_depthwise_convolutions_pass_their_channels_on():
    params = {"A": normal(0, 1, 1, 6, 6), "K": normal(1, 3, 3, 1, 6), "D": normal(2, 1, 1, 6, 3)}
    x = normal(5, 2, 4, 4, 6)
    graph = check_laws(lambda p, x: conv(jax.nn.relu(conv(conv(x, p["A"]), p["K"], 6)), p["D"]), params, (x,))
    assert list(graph.groups) == ["A:3"]
    assert members(graph, "A:3") == {("A", 3), ("K", 3), ("D", 2)}


def test_dilated_and_transposed_convolutions():
    params = {"A": normal(0, 3, 3, 6, 5), "B": normal(1, 2, 2, 5, 4), "C": normal(2, 1, 1, 4, 2)}
    x = normal(5, 2, 6, 6, 6)

    def f(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["A"], (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return conv(jax.lax.conv_transpose(jax.nn.relu(y), p["B"], (2, 2), "VALID"), p["C"])

    graph = check_laws(f, params, (x,))
    assert {g: i.size for g, i in graph.groups.items()} == {"A:3": 5, "B:3": 4}


def test_a_padded_shortcut_cuts_the_stream_in_three():
    params = {"A": normal(0, 1, 1, 6, 4), "K": normal(1, 3, 3, 6, 8), "D": normal(2, 1, 1, 8, 3)}
    x = normal(5, 2, 4, 4, 6)

    def f(p, x):
        return conv(jnp.pad(conv(x, p["A"]), ((0, 0), (0, 0), (0, 0), (2, 2))) + conv(x, p["K"]), p["D"])

    graph = check_laws(f, params, (x,))
    assert sorted(i.size for i in graph.groups.values()) == [2, 2, 4]
    carried = next(g for g, i in graph.groups.items() if i.size == 4)
    assert positions(graph, carried)["K", 3] == [[u + 2] for u in range(4)]


def test_a_fused_gate_owns_two_columns():
    params = {"K": normal(0, 6, 16), "D": normal(1, 8, 3)}

    def f(p, x):
        a, g = jnp.split(x @ p["K"], 2, axis=-1)
        return (jax.nn.silu(a) * g) @ p["D"]

    graph = check_laws(f, params, (X,))
    assert positions(graph, "K:1") == {("K", 1): [[j, j + 8] for j in range(8)], ("D", 0): [[j] for j in range(8)]}


def gqa(p, x, rope=False, heads=6, kv=2, size=4):
    b, t, _ = x.shape
    q = (x @ p["q"]).reshape(b, t, heads, size)
    k, v = (x @ p["k"]).reshape(b, t, kv, size), (x @ p["v"]).reshape(b, t, kv, size)
    if rope:
        angle = jnp.arange(t)[:, None] * 1e4 ** (-jnp.arange(size // 2) / (size // 2))
        cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]

        def turn(z):
            a, c = jnp.split(z, 2, -1)
            return jnp.concatenate([a * cos - c * sin, a * sin + c * cos], -1)

        q, k = turn(q), turn(k)
    q = q.reshape(b, t, kv, heads // kv, size)
    s = jnp.einsum("btkgd,bskd->bkgts", q, k) / jnp.sqrt(size)
    s = jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -1e9)
    return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(s, -1), v).reshape(b, t, heads * size) @ p["o"]


GQA = {"q": normal(0, 6, 24), "k": normal(1, 6, 8), "v": normal(2, 6, 8), "o": normal(3, 24, 6)}
TOKENS = normal(7, 2, 5, 6)


def test_grouped_query_attention_has_four_groups():
    graph = check_laws(gqa, GQA, (TOKENS,))
    sizes = {frozenset(p for p, _ in members(graph, g)): i.size for g, i in graph.groups.items()}
    assert sizes == {frozenset("qkvo"): 2, frozenset("qo"): 3, frozenset("qk"): 4, frozenset("vo"): 4}
    kv = next(g for g, i in graph.groups.items() if i.size == 2)
    assert positions(graph, kv) == {
        ("q", 1): [list(range(12 * i, 12 * i + 12)) for i in range(2)],
        ("k", 1): [list(range(4 * i, 4 * i + 4)) for i in range(2)],
        ("v", 1): [list(range(4 * i, 4 * i + 4)) for i in range(2)],
        ("o", 0): [list(range(12 * i, 12 * i + 12)) for i in range(2)],
    }


def test_rotary_tables_freeze_head_dims_unless_they_are_folded():
    def f(p, x):
        return gqa(p, x, rope=True)

    graph = check_laws(f, GQA, (TOKENS,))
    assert sorted(i.size for i in graph.groups.values()) == [2, 3, 4]
    assert graph.leaves["k"].frozen[1].code == "CONST_IOTA"
    folded = check_laws(f, GQA, (TOKENS,), graph=jprune.trace(f, GQA, TOKENS, fold_constants=True))
    assert sorted(i.size for i in folded.groups.values()) == [2, 2, 3, 4]
    pair = next(g for g in folded.groups if members(folded, g) == {("q", 1), ("k", 1)})
    assert positions(folded, pair)["k", 1] == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]  # rotated pairs (j, j + size/2) of both heads


def test_repeated_keys_and_library_attention():
    def f(p, x):
        b, t, _ = x.shape
        q = (x @ p["q"]).reshape(b, t, 6, 4)
        k, v = (jnp.repeat((x @ p[n]).reshape(b, t, 2, 4), 3, 2) for n in "kv")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1) @ p["o"]

    graph = check_laws(f, GQA, (TOKENS,))
    assert sorted(i.size for i in graph.groups.values()) == [2, 3, 4, 4]


def test_multi_query_attention_prunes_query_heads():
    params = {"q": normal(0, 6, 24), "k": normal(1, 6, 4), "v": normal(2, 6, 4), "o": normal(3, 24, 6)}

    def f(p, x):
        return gqa(p, x, kv=1)

    graph = check_laws(f, params, (TOKENS,))
    assert sorted(i.size for i in graph.groups.values()) == [4, 4, 6]


def test_shuffled_channels_follow_the_permutation():
    params = {"A": normal(0, 6, 8), "B": normal(1, 4, 4), "C": normal(2, 8, 3)}

    def f(p, x):
        left, right = jnp.split(x @ p["A"], 2, -1)
        z = jnp.concatenate([left, jax.nn.relu(right @ p["B"])], -1)
        return z.reshape(-1, 2, 4).swapaxes(1, 2).reshape(-1, 8) @ p["C"]

    graph = check_laws(f, params, (X,))
    assert sorted(i.size for i in graph.groups.values()) == [4, 4]
    outer = next(g for g in graph.groups if ("C", 0) in members(graph, g))
    assert positions(graph, outer) == {
        ("A", 1): [[j] for j in range(4)],
        ("B", 1): [[j] for j in range(4)],
        ("C", 0): [[2 * j, 2 * j + 1] for j in range(4)],
    }


HIDDEN = {"A": normal(0, 6, 8), "C": normal(4, 8, 3)}


def layer_norm(h):
    mean = h.mean(-1, keepdims=True)
    variance = (h * h).mean(-1, keepdims=True) - mean * mean
    return (h - mean) * jax.lax.rsqrt(variance + 1e-6)


EXACT = {
    "sigmoid": lambda p, h: jax.nn.sigmoid(h) @ p["C"],
    "shifted": lambda p, h: (h + 1) @ p["C"],
    "centred weights": lambda p, h: jax.nn.relu(h) @ (p["C"] - p["C"].mean(0)),
    "normalised by its sum of squares": lambda p, h: (h / jnp.sqrt((h * h).sum(-1, keepdims=True) + 1e-6)) @ p["C"],
    "Gram matrix": lambda p, h: jax.nn.relu(h @ h.T) @ (h @ p["C"]),
    "one-pass layer norm": lambda p, h: layer_norm(h) @ p["C"],
    "loop": lambda p, h: jax.lax.fori_loop(0, 3, lambda i, z: jax.nn.relu(z @ p["C"] @ p["C"].T), h).sum(-1),
    "rematerialised": lambda p, h: jax.checkpoint(jax.nn.relu)(h) @ p["C"],
    "pixel shuffle": lambda p, h: h.reshape(-1, 2, 2, 2).transpose(0, 3, 1, 2).reshape(-1, 8) @ p["C"],
    "tiled": lambda p, h: jnp.tile(h, (1, 2)) @ jnp.concatenate([p["C"], 2 * p["C"]]),
    "negative maximum": lambda p, h: jnp.maximum(h, -1.0) @ p["C"],
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_uses_of_a_hidden_axis(name):
    graph = check_laws(lambda p, x: EXACT[name](p, x @ p["A"]), HIDDEN, (X,))
    assert graph.groups and all(g.exact for g in graph.groups.values())
    sizes = {"pixel shuffle": [2, 2, 2], "loop": [3, 8]}  # the loop multiplies by both sides of C
    assert sorted(g.size for g in graph.groups.values()) == sizes.get(name, [8])


INEXACT = {
    "sum of sigmoids": lambda p, h: jax.nn.sigmoid(h).sum(-1),
    "shifted sum": lambda p, h: (h + 1).sum(-1),
    "select a one": lambda p, h: jnp.where(h > 0, h, 1).sum(-1),
    "softmax": lambda p, h: jax.nn.softmax(h) @ p["C"],
    "maximum": lambda p, h: h.max(-1),
    "two-pass layer norm": lambda p, h: ((h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-3)) @ p["C"],
    "exponential Gram matrix": lambda p, h: jnp.exp(0.1 * jnp.exp(h) @ jnp.exp(h).T) @ (h @ p["C"]),
    "sigmoid against centred weights": lambda p, h: jax.nn.sigmoid(h) @ (p["C"] - p["C"].mean(0)),
}


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_uses_name_the_equation(name):
    graph = jprune.trace(lambda p, x: INEXACT[name](p, x @ p["A"]), HIDDEN, X)
    group = graph.groups["A:1"]
    assert not group.exact and group.notes
    assert any("test_closed_forms.py" in n for n in group.notes)
    keep = {"A:1": np.arange(8) % 2 == 0}
    with pytest.raises(jprune.NotPrunable, match="allow_inexact"):
        graph.compact(HIDDEN, keep)
    graph.compact(HIDDEN, graph.decide(keep, allow_inexact=True))
    if name != "maximum":  # flagged conservatively: it may agree
        assert graph.verify(HIDDEN, graph.decide(keep, allow_inexact=True), X) > 1e-3


FROZEN = {
    "sort": (lambda p, h: jnp.sort(h) @ p["C"], "ORDER_OR_MIX"),
    "cumsum": (lambda p, h: jnp.cumsum(h, -1) @ p["C"], "ORDER_OR_MIX"),
    "prod": (lambda p, h: jnp.prod(h, -1), "ORDER_OR_MIX"),
    "argmax": (lambda p, h: jnp.argmax(h, -1), "ORDER_OR_MIX"),
    "gathered": (lambda p, h: h[:, np.arange(8) - (p["C"][0, 0] > 9)] @ p["C"], "DATA_INDEXED"),
    "captured constant": (lambda p, h: (h * np.linspace(1, 2, 8, dtype=np.float32)) @ p["C"], "CONST_CAPTURED"),
    "output": (lambda p, h: h, "MODEL_OUTPUT"),
    "fft": (lambda p, h: jnp.abs(jnp.fft.fft(h)) @ p["C"], None),
    "inverse": (lambda p, h: jnp.linalg.inv(h[:5].T @ h[:5] + jnp.eye(8)).sum(), None),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_axes_say_why(name):
    f, code = FROZEN[name]
    graph = jprune.trace(lambda p, x: f(p, x @ p["A"]), HIDDEN, X)
    assert "A:1" not in graph.groups
    reason = graph.leaves["A"].frozen[1]
    assert reason is not None and (code is None or reason.code == code), reason
    with pytest.raises(jprune.NotPrunable, match=reason.code):
        graph.compact(HIDDEN, {"A:1": np.arange(8) % 2 == 0})


def test_a_roll_freezes_the_one_it_takes_round():
    graph = check_laws(lambda p, x: jnp.roll(x @ p["A"], 1, -1) @ p["C"], HIDDEN, (X,))
    (group,) = graph.groups.values()
    assert group.size == 7
    assert graph.leaves["A"].frozen[1].code == "SINGLE_INDEX"


def test_leaves_that_reach_no_output_are_not_offered():
    graph = jprune.trace(lambda p, x: x @ p["A"], HIDDEN, X)
    assert not graph.groups and graph.leaves["C"].frozen[0].code == "UNUSED" and not graph.leaves["C"].used


def test_the_reason_names_the_users_line():
    def f(p, x):
        return jnp.sort(x @ p["A"]) @ p["C"]  # this line

    reason = str(jprune.trace(f, HIDDEN, X).leaves["A"].frozen[1])
    line = f.__code__.co_firstlineno + 1
    assert f"test_closed_forms.py:{line}" in reason
