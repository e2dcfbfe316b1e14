"""Layers stacked for lax.scan, on a decoder with grouped queries, rotary positions, RMS norms and a gated MLP.

Written twice: a Python loop over layers, and one rematerialised scan over stacked leaves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, members, normal, relative, subset

import jprune
from jprune.tracing.paths import flatten

STREAM, HEADS, KV, SIZE, HIDDEN, LAYERS, WORDS = 32, 4, 2, 8, 48, 3, 11
LAYER = {
    "norm1": (STREAM,),
    "q": (STREAM, HEADS * SIZE),
    "k": (STREAM, KV * SIZE),
    "v": (STREAM, KV * SIZE),
    "o": (HEADS * SIZE, STREAM),
    "norm2": (STREAM,),
    "gate": (STREAM, HIDDEN),
    "up": (STREAM, HIDDEN),
    "down": (HIDDEN, STREAM),
}


def leaf(seed, *shape):
    """Kernels normal by their inputs, norm scales near one."""
    if len(shape) == 1:
        return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 1.5, shape), jnp.float32)
    return normal(seed, *shape)


LOOP = {
    "embed": 6 * normal(1, WORDS, STREAM),
    "layers": [{n: leaf(10 * i + j, *s) for j, (n, s) in enumerate(LAYER.items())} for i in range(LAYERS)],
    "norm": leaf(2, STREAM),
    "head": normal(3, STREAM, 7),
}
SCAN = {**LOOP, "layers": jax.tree.map(lambda *x: jnp.stack(x), *LOOP["layers"])}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, WORDS, (2, 5)), jnp.int32)


def norm(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotate(z):
    angle = jnp.arange(z.shape[1])[:, None] * 1e2 ** (-jnp.arange(SIZE // 2) / (SIZE // 2))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(z, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def layer(w, x, rope):
    b, t, _ = x.shape
    y = norm(x, w["norm1"])
    q = (y @ w["q"]).reshape(b, t, HEADS, SIZE)
    k, v = ((y @ w[n]).reshape(b, t, KV, SIZE) for n in "kv")
    if rope:
        q, k = rotate(q), rotate(k)
    q = q.reshape(b, t, KV, HEADS // KV, SIZE)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / SIZE**0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    a = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, -1), v).reshape(b, t, HEADS * SIZE)
    x = x + a @ w["o"]
    y = norm(x, w["norm2"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def loop(p, tokens, rope=True):
    x = p["embed"][tokens]
    for w in p["layers"]:
        x = layer(w, x, rope)
    return norm(x, p["norm"]) @ p["head"]


def scan(p, tokens, rope=True):
    body = jax.checkpoint(lambda x, w: (layer(w, x, rope), None))
    x, _ = jax.lax.scan(body, p["embed"][tokens], p["layers"])
    return norm(x, p["norm"]) @ p["head"]


def unscaled(f):
    """Without rotary positions."""
    return functools.partial(f, rope=False)


class Traced(NamedTuple):
    function: Callable  # compiled
    params: Any
    graph: jprune.Graph


@functools.cache
def traced(which, rope=True):
    f = {"loop": loop, "scan": scan}[which]
    f = f if rope else unscaled(f)
    params = {"loop": LOOP, "scan": SCAN}[which]
    return Traced(jax.jit(f), params, jprune.trace(f, params, TOKENS))


def pruned(graph, params, keep, mode, inputs=TOKENS):
    """Outputs of the compacted model, after checking that expanding it gives the masked one."""
    decision = graph.decide(keep, stacked=mode)
    small = graph.compact(params, decision)
    for (path, a), (_, b) in zip(
        flatten(graph.expand(small, decision)), flatten(graph.mask(params, keep)), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)
    return jax.jit(graph.replay(decision))(small, inputs)


def units(graph):
    """Units of all groups, those of stacked groups counted once for all layers."""
    return sum(g.size for g in graph.groups.values())


PER_LAYER = KV + HEADS // KV + SIZE + HIDDEN  # key-value heads, queries of each, value channels, hidden units
COUNTS = {
    ("loop", True): (1 + 4 * LAYERS, STREAM + LAYERS * PER_LAYER),
    ("scan", True): (1 + 4, STREAM + PER_LAYER),
    ("loop", False): (1 + 5 * LAYERS, STREAM + LAYERS * (PER_LAYER + SIZE)),  # query/key channels are free
    ("scan", False): (1 + 5, STREAM + PER_LAYER + SIZE),
}


def test_the_counts_above_are_the_numbers_of_the_network():
    assert COUNTS["loop", True] == (13, 212)
    assert COUNTS["scan", True] == (5, 92)
    assert COUNTS["loop", False] == (16, 236)


@pytest.mark.smoke
@pytest.mark.parametrize(("which", "rope"), COUNTS)
def test_groups_and_units(which, rope):
    graph = traced(which, rope).graph
    assert (len(graph.groups), units(graph)) == COUNTS[which, rope]
    assert all(g.exact for g in graph.groups.values()) and not graph.unsupported
    layers = {g.size: g.layers for g in graph.groups.values()}
    assert layers[STREAM] is None
    assert {n for s, n in layers.items() if s != STREAM} == ({LAYERS} if which == "scan" else {None})
    codes = {r.code for leaf in graph.leaves.values() for r in leaf.frozen if r is not None}
    assert ("CONST_IOTA" in codes) == rope


def test_loop_and_scan_find_the_same_groups():
    """Renaming layers/2/q to layers/q makes the groups of the loop those of the scan."""

    def shape(graph, rename):
        out = set()
        for g, i in graph.groups.items():
            out.add((i.size, frozenset(rename(p, a) for p, a in members(graph, g))))
        return out

    def of_loop(path, axis):
        first, *rest = path.split("/")
        return ("/".join([first, *rest[1:]]) if rest else first, axis)

    def of_scan(path, axis):
        return (path, axis - 1 if path.startswith("layers/") else axis)

    for rope in (True, False):
        assert shape(traced("loop", rope).graph, of_loop) == shape(traced("scan", rope).graph, of_scan)


def test_loop_and_scan_cost_the_same():
    keep = {"stream": np.arange(STREAM) % 3 > 0, "hidden": np.stack([np.arange(HIDDEN) < k for k in (20, 20, 20)])}
    costs = []
    for which in ("loop", "scan"):
        graph = traced(which).graph
        chosen = {}
        for g, i in graph.groups.items():
            if i.size == STREAM:
                chosen[g] = keep["stream"]
            elif i.size == HIDDEN:
                chosen[g] = keep["hidden"][0]
        costs += [(graph.cost(k).macs, graph.cost(k).params) for k in ({}, chosen)]
    assert costs[0] == costs[2] and costs[1] == costs[3] and costs[1] < costs[0]
    per_token = LAYERS * (STREAM * SIZE * (2 * HEADS + 2 * KV) + 3 * STREAM * HIDDEN) + STREAM * 7
    attention = LAYERS * 2 * HEADS * SIZE * 5 * 5
    assert costs[0][0] == 2 * (5 * per_token + attention)


@pytest.mark.smoke
@pytest.mark.parametrize(("which", "rope"), [("scan", True), ("loop", True), ("scan", False)])
def test_the_decoder_obeys_the_laws(which, rope):
    f, params, graph = traced(which, rope)
    check_laws(f, params, (TOKENS,), graph=graph, gradients=which == "scan" and rope)


@pytest.mark.parametrize("group", ["layers/down:2", "layers/gate:2", "layers/k:2", "layers/q:2", "layers/v:2"])
def test_every_group_of_the_scan_alone(group):
    f, params, graph = traced("scan")
    assert group in graph.groups
    keep = subset(graph, np.random.default_rng(3), groups={group})
    want = f(graph.mask(params, keep), TOKENS)
    assert relative(pruned(graph, params, keep, "pad"), want) < 1e-5
    assert relative(f(params, TOKENS), want) > 1e-2


def test_rotary_pairs_when_constants_are_folded():
    """The tables are made inside the body of the scan, one for all layers: these keep the same pairs."""
    graph = jprune.trace(scan, SCAN, TOKENS, fold_constants=True)
    pairs = [i for i in graph.groups.values() if {m.path for m in i.members} == {"layers/q", "layers/k"}]
    (pairs,) = [i for i in pairs if i.size == SIZE // 2]
    assert next(m for m in pairs.members if m.path == "layers/k").positions.tolist() == [
        [j, j + 4, j + 8, j + 12] for j in range(4)
    ]
    assert pairs.layers is None and len(graph.groups) == 6
    keep = {pairs.id: np.array([True, False, True, True]), "layers/gate:2": rows(HIDDEN, 20, 31, 7)}
    check_laws(scan, SCAN, (TOKENS,), graph=graph, gradients=False, keep=keep)


# -- other indices per layer, other widths per layer -------------------------------------------------------------------


def rows(size, *kept, seed=0):
    """(layers, size) keep sets with these numbers of units, other ones in every layer."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(size) < k for k in kept])


def choice(hidden, values, kv=(2, 2, 2), stream=None):
    """A keep set over the groups of the scanned decoder."""
    keep = {
        "layers/gate:2": rows(HIDDEN, *hidden),
        "layers/v:2": rows(SIZE, *values, seed=1),
        "layers/k:2": rows(KV, *kv, seed=2),
    }
    return keep if stream is None else {**keep, "layers/down:2": stream}


CHOICES = {
    "equal": ((20, 20, 20), (5, 5, 5)),
    "two of a kind": ((20, 20, 7), (5, 5, 5)),
    "unequal": ((20, 31, 7), (5, 3, 6)),
    "everything": ((20, 31, 7), (5, 5, 6), (2, 1, 2), np.arange(STREAM) % 4 > 0),
}


@pytest.mark.parametrize(
    "name", ["equal", "unequal", *(pytest.param(n, marks=pytest.mark.slow) for n in ("two of a kind", "everything"))]
)
def test_layers_may_differ_in_every_arrangement(name):
    f, params, graph = traced("scan")
    keep = choice(*CHOICES[name])
    want = f(graph.mask(params, keep), TOKENS)
    assert relative(f(params, TOKENS), want) > 1e-2
    pad, bucket, unstack = (pruned(graph, params, keep, m) for m in ("pad", "bucket", "unstack"))
    for got in (pad, bucket, unstack):
        assert relative(got, want) < 1e-5
    assert relative(bucket, pad) < 1e-5 and relative(unstack, bucket) < 1e-5


@pytest.mark.parametrize("mode", ["pad", "bucket", "unstack"])
def test_every_arrangement_obeys_the_laws(mode):
    f, params, graph = traced("scan")
    keep = choice(*CHOICES["everything"])
    check_laws(f, params, (TOKENS,), keep=keep, graph=graph, stacked=mode, gradients=False)


def test_other_units_in_every_layer_are_those_of_the_loop():
    """Against the loop, whose layers are separate leaves: the stacked keep set is one row of it per layer."""
    _, params, graph = traced("scan")
    keep = choice(*CHOICES["everything"])
    small = graph.compact(params, graph.decide(keep, stacked="unstack"))
    g, whole, flat = traced("loop")
    separate = {}
    for gid, i in graph.groups.items():
        if gid not in keep:
            continue
        if i.layers is None:
            (same,) = [j for j, o in flat.groups.items() if o.size == i.size and ("embed", 1) in members(flat, j)]
            separate[same] = keep[gid]
            continue
        for n in range(LAYERS):
            wanted = {(p.replace("layers/", f"layers/{n}/"), a - 1) for p, a in members(graph, gid)}
            (same,) = [j for j in flat.groups if members(flat, j) == wanted and flat.groups[j].size == i.size]
            separate[same] = keep[gid][n]
    other = flat.compact(whole, separate)
    for n in range(LAYERS):
        for name in LAYER:
            part = small["layers"][name]
            got = part[n][0] if isinstance(part, list) else part[n]
            np.testing.assert_array_equal(got, other["layers"][n][name], err_msg=f"layer {n} {name}")
    got = jax.jit(graph.replay(graph.decide(keep, stacked="unstack")))(small, TOKENS)
    assert relative(got, jax.jit(flat.replay(separate))(other, TOKENS)) < 1e-5
    assert relative(got, g(flat.mask(whole, separate), TOKENS)) < 1e-5


def test_what_the_arrangements_look_like():
    _, params, graph = traced("scan")
    keep = choice(*CHOICES["two of a kind"])
    pad, bucket, unstack = (
        graph.compact(params, graph.decide(keep, stacked=m))["layers"] for m in ("pad", "bucket", "unstack")
    )
    assert pad["gate"].shape == (LAYERS, STREAM, 20)
    assert [x.shape for x in bucket["gate"]] == [(2, STREAM, 20), (1, STREAM, 7)]
    assert [x.shape for x in unstack["down"]] == [(1, 20, STREAM), (1, 20, STREAM), (1, 7, STREAM)]
    assert (np.asarray(pad["gate"][2, :, 7:]) == 0).all() and (np.asarray(pad["down"][2, 7:]) == 0).all()
    kept = np.flatnonzero(keep["layers/gate:2"][2])
    np.testing.assert_array_equal(pad["gate"][2, :, :7], params["layers"]["gate"][2][:, kept])


def test_costs_follow_the_arrangement():
    _, params, graph = traced("scan")
    keep = choice((20, 31, 7), (8, 8, 8))
    per_unit = 3 * STREAM * 10  # gate, up, down for two times five tokens
    whole = graph.cost().macs
    assert graph.cost(graph.decide(keep, stacked="pad")).macs == whole - LAYERS * (HIDDEN - 31) * per_unit
    assert (
        graph.cost(graph.decide(keep, stacked="unstack")).macs == whole - (LAYERS * HIDDEN - (20 + 31 + 7)) * per_unit
    )
    for decision in (graph.decide(keep, stacked="pad"), graph.decide(keep, stacked="unstack")):
        entries = sum(x.size for _, x in flatten(graph.compact(params, decision)))
        assert graph.cost(decision).params == entries


def test_gradients_of_unequal_layers():
    """The gradient of a bucketed model is the bucketed gradient of the masked one."""
    f, params, graph = traced("scan")
    keep = choice(*CHOICES["two of a kind"])

    def loss(f):
        return jax.jit(jax.grad(lambda p: (f(p, TOKENS) ** 2).sum()))

    decision = graph.decide(keep, stacked="bucket")
    want = graph.compact(loss(f)(graph.mask(params, keep)), decision, verify=None)
    got = loss(graph.replay(decision))(graph.compact(params, decision))
    assert relative(got, want) < 1e-4


def test_a_keep_vector_for_all_layers():
    _, params, graph = traced("scan")
    one = np.arange(HIDDEN) % 3 == 0
    a = graph.compact(params, {"layers/gate:2": one})
    b = graph.compact(params, {"layers/gate:2": np.stack([one] * LAYERS)})
    for (path, x), (_, y) in zip(flatten(a), flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def test_the_wrong_arrangement_is_named():
    _, params, graph = traced("scan")
    keep = choice(*CHOICES["unequal"])
    padded = graph.compact(params, keep)
    with pytest.raises(jprune.KeepError, match=r"leaf 'layers/down'.*stacked='bucket'"):
        graph.replay(graph.decide(keep, stacked="bucket"))(padded, TOKENS)
    with pytest.raises(jprune.KeepError, match=r"'layers/down' is cut into runs of layers.*stacked='pad'"):
        graph.replay(keep)(graph.compact(params, graph.decide(keep, stacked="bucket")), TOKENS)
    with pytest.raises(ValueError, match="stacked must be one of"):
        graph.compact(params, graph.decide(keep, stacked="buckets"))
    with pytest.raises(jprune.KeepError, match=r"wants \(3, 48\)"):
        graph.compact(params, {"layers/gate:2": np.ones((2, HIDDEN), bool)})


def test_two_scans_over_the_same_layers_and_a_result_per_layer():
    """Per-layer results that a second scan reads again: their channels belong to the layers of both."""
    params = {"a": normal(0, 4, 6, 8), "b": normal(1, 4, 8, 6), "c": normal(2, 4, 8, 6), "head": normal(3, 6, 2)}
    x = normal(9, 5, 6)

    def f(p, x):
        def down(h, w):
            a, b = w
            z = jnp.tanh(h @ a)
            return h + z @ b, z

        h, saved = jax.lax.scan(down, x, (p["a"], p["b"]))
        h, _ = jax.lax.scan(lambda h, w: (h + w[0] @ w[1], None), h, (saved, p["c"]), reverse=True)
        return h @ p["head"]

    graph = check_laws(f, params, (x,))
    (group,) = [i for i in graph.groups.values() if ("a", 2) in members(graph, i.id)]
    assert members(graph, group.id) == {("a", 2), ("b", 1), ("c", 1)} and group.layers == 4
    keep = {group.id: rows(8, 3, 5, 5, 2)}
    want = jax.jit(f)(graph.mask(params, keep), x)
    for mode in ("pad", "bucket", "unstack"):
        assert relative(pruned(graph, params, keep, mode, x), want) < 1e-5


def test_channels_that_leave_the_scan_are_common_to_all_layers():
    """What is averaged over the layers, or enters every layer from outside, has one index set."""
    params = {"a": normal(0, 3, 6, 8), "b": normal(1, 3, 8, 6), "shift": normal(2, 8), "head": normal(3, 8, 2)}
    x = normal(9, 5, 6)

    def averaged(p, x):
        def body(h, w):
            z = jnp.tanh(h @ w[0])
            return h + z @ w[1], z

        return jax.lax.scan(body, x, (p["a"], p["b"]))[1].mean(0) @ p["head"]

    def shifted(p, x):
        def body(h, w):
            return h + jnp.tanh(h @ w[0] + p["shift"]) @ w[1], None

        return jax.lax.scan(body, x, (p["a"], p["b"]))[0]

    for f in (averaged, shifted):
        graph = check_laws(f, params, (x,), gradients=False)
        assert graph.groups["a:2"].layers is None and graph.groups["a:2"].size == 8


def test_layers_that_are_indexed_by_hand_are_not_rows_of_a_group():
    """p["w"][i] in a Python loop: no scan names the layers, so the stacked leaf has one index set and a fixed axis 0."""
    params = {"a": normal(0, 3, 6, 8), "b": normal(1, 3, 8, 6)}
    x = normal(9, 5, 6)

    def f(p, x):
        for i in range(3):
            x = x + jnp.tanh(x @ p["a"][i]) @ p["b"][i]
        return x

    graph = check_laws(f, params, (x,))
    assert {g: (i.size, i.layers) for g, i in graph.groups.items()} == {"a:2": (8, None)}
    assert graph.leaves["a"].frozen[0].code == "SINGLE_INDEX"


def per_layer_constant(p, tokens):
    """Each layer is given a number of its own that no parameter holds."""
    strength = jnp.asarray([0.5, 2.0, 1.5])

    def body(x, row):
        w, s = row
        return x + s * (layer(w, x, True) - x), None

    x, _ = jax.lax.scan(body, p["embed"][tokens], (p["layers"], strength))
    return norm(x, p["norm"]) @ p["head"]


@pytest.mark.parametrize("mode", ["pad", "bucket", "unstack"])
def test_constants_that_differ_by_layer_follow_their_layers(mode):
    graph = jprune.trace(per_layer_constant, SCAN, TOKENS)
    keep = choice((20, 20, 7), (5, 5, 5))
    want = per_layer_constant(graph.mask(SCAN, keep), TOKENS)
    assert relative(pruned(graph, SCAN, keep, mode), want) < 1e-5


# -- layers that are no longer in their order ---------------------------------------------------------------------------


def emitted(p, x):
    return jax.lax.scan(lambda h, w: (h, jnp.tanh(h @ w)), x, p["a"])[1]


def consumed(p, x, skips):
    return jax.lax.scan(lambda h, s: (h + s[0] @ s[1], None), x, (skips, p["b"]))[0]


REORDERED = {  # what an encoder's scan emits, before a decoder's scan reads it
    "reversed": lambda p, x: consumed(p, x, emitted(p, x)[::-1]),
    "summed up": lambda p, x: consumed(p, x, jnp.cumsum(emitted(p, x), 0)),
    "sorted": lambda p, x: consumed(p, x, jnp.sort(emitted(p, x), 0)),
    "rolled": lambda p, x: consumed(p, x, jnp.roll(emitted(p, x), 1, 0)),
    "permuted": lambda p, x: consumed(p, x, emitted(p, x)[np.array([2, 0, 1])]),
    "weights reversed": lambda p, x: consumed({"b": p["b"][::-1]}, x, emitted(p, x)),
}


@pytest.mark.parametrize("name", REORDERED)
def test_layers_out_of_order_keep_the_same_units(name):
    """One keep set for all layers: the third layer of the one scan is not the third of the other."""
    f = REORDERED[name]
    params, x = {"a": normal(0, 3, 4, 6), "b": normal(1, 3, 6, 4)}, normal(2, 5, 4)
    graph = jprune.trace(f, params, x)
    assert all(g.layers is None for g in graph.groups.values())
    for gid, info in graph.groups.items():
        if info.exact:
            assert graph.verify(params, {gid: np.arange(info.size) % 2 == 0}, x) < 1e-5


def test_layers_in_order_may_keep_different_units():
    def f(p, x):
        return consumed(p, x, 2 * emitted(p, x))

    params, x = {"a": normal(0, 3, 4, 6), "b": normal(1, 3, 6, 4)}, normal(2, 5, 4)
    graph = jprune.trace(f, params, x)
    (gid,) = graph.groups
    assert graph.groups[gid].layers == 3
    keep = {gid: np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1]], bool)}
    assert graph.verify(params, keep, x) < 1e-5


AROUND = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda p, x: jax.lax.cond(x.sum() > -1e9, f, lambda p, x: x, p, x),
    "loop": lambda f: lambda p, x: jax.lax.fori_loop(0, 2, lambda i, h: f(p, h), x),
}


@pytest.mark.parametrize("around", AROUND)
def test_uneven_layers_of_a_scan_inside_a_call(around):
    def layers(p, x):
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None), x, (p["a"], p["b"]))[0]

    params, x = {"a": normal(0, 3, 4, 6), "b": normal(1, 3, 6, 4)}, normal(2, 5, 4)
    f = AROUND[around](layers)
    graph = jprune.trace(f, params, x)
    (gid,) = graph.groups
    keep = {gid: np.arange(6) < np.array([[2], [4], [4]])}
    masked = f(graph.mask(params, keep), x)
    for stacked in ("unstack", "bucket", "pad"):
        small = graph.compact(params, graph.decide(keep, stacked=stacked))
        assert relative(graph.replay(graph.decide(keep, stacked=stacked))(small, x), masked) < 1e-5
