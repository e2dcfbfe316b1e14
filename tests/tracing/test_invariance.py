"""What must not change the partition: names, order, jit and checkpoint around parts, a loop or a scan, another batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, lively, members, normal, relative, same_numbers, subset

import jprune
from jprune.tracing import taps

X = normal(99, 5, 6)
TERMS = 6 + 12 + 4 + 5 + 8 + 12 + 10 + 12  # products behind an output of the model below
PARAMS = {
    "embed": normal(0, 6, 12),
    "scale": jnp.linspace(0.5, 1.5, 12),
    "q": normal(1, 12, 2, 4),
    "k": normal(2, 12, 2, 4),
    "v": normal(3, 12, 2, 4),
    "o": normal(4, 2, 4, 12),
    "gate": normal(5, 12, 20),
    "down": normal(6, 10, 12),
    "head": normal(7, 12, 3),
}


def identity(f):
    return f


def norm(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def attend(x, q, k, v, o):
    q, k, v = (jnp.einsum("te,ehd->thd", x, w) for w in (q, k, v))
    return jnp.einsum("hts,shd,hde->te", jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k)), v, o)


def feed(x, gate, down):
    a, b = jnp.split(x @ gate, 2, -1)
    return (jax.nn.silu(a) * b) @ down


def model(p, x, wrap=identity, inner=identity):
    x = x @ p["embed"]
    x = x + wrap(attend)(inner(norm)(x, p["scale"]), p["q"], p["k"], p["v"], p["o"])
    return (x + wrap(feed)(x, p["gate"], p["down"])) @ p["head"]


def partition(graph, rename=lambda path: path):
    """{(unit count, exactness, {(leaf, axis, positions)})}: all there is to groups but their names."""
    return {
        (
            g.size,
            g.exact,
            g.reconfigure_exact,
            g.layers,
            frozenset((rename(m.path), m.axis, m.role, tuple(m.positions.ravel().tolist())) for m in g.members),
        )
        for g in graph.groups.values()
    }


def reasons(graph, rename=lambda path: path):
    """{(leaf, axis): why it is unprunable}."""
    return {
        (rename(leaf.path), axis): why and why.code
        for leaf in graph.leaves.values()
        for axis, why in enumerate(leaf.frozen)
    }


GRAPH = jprune.trace(model, PARAMS, X)
WHOLE = jax.jit(model)


def same(graph, rename=lambda path: path):
    assert partition(graph, rename) == partition(GRAPH)
    assert reasons(graph, rename) == reasons(GRAPH)
    assert (graph.cost().macs, graph.cost().params) == (GRAPH.cost().macs, GRAPH.cost().params)


@pytest.mark.smoke
def test_the_model_itself():
    assert len(GRAPH.groups) == 5 and all(g.exact for g in GRAPH.groups.values())
    check_laws(model, PARAMS, (X,), graph=GRAPH)


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_names_of_leaves_do_not_matter(order):
    """New names change the order in which jax lists the leaves, and with it which of them starts a group."""
    names = list(PARAMS)
    targets = [f"{i:02d}" for i in range(len(names))]
    if order == "backward":
        targets.reverse()
    elif order == "shuffled":
        targets = np.random.default_rng(0).permutation(targets).tolist()
    new = dict(zip(names, targets, strict=True))
    old = {b: a for a, b in new.items()}
    params = {"tree": {new[n]: w for n, w in PARAMS.items()}}
    graph = jprune.trace(lambda p, x: model({n: p["tree"][new[n]] for n in PARAMS}, x), params, X)
    same(graph, lambda path: old[path.removeprefix("tree/")])


def nothing_saved(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)


WRAPPERS = {"plain": identity, "jit": jax.jit, "checkpoint": jax.checkpoint, "policy": nothing_saved,
            "jit of jit": lambda f: jax.jit(jax.jit(f)), "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
            "named": lambda f: jax.named_call(f, name="part")}  # fmt: skip


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(WRAPPERS, ("plain", "jit", "checkpoint"))))
def test_functions_around_parts_do_not_matter(outer, inner):
    same(jprune.trace(lambda p, x: model(p, x, WRAPPERS[outer], WRAPPERS[inner]), PARAMS, X))


def test_a_function_around_the_whole_does_not_matter():
    for wrap in WRAPPERS.values():
        same(jprune.trace(wrap(model), PARAMS, X))


def test_vectorising_over_the_batch_does_not_matter():
    """One example at a time: the axis that vmap adds is no input's feature axis."""
    batch = normal(8, 3, 5, 6)
    graph = jprune.trace(lambda p, x: jax.vmap(lambda one: model(p, one))(x), PARAMS, batch)
    assert {(size, frozenset((p, a) for p, a, *_ in m)) for size, *_, m in partition(graph)} == {
        (size, frozenset((p, a) for p, a, *_ in m)) for size, *_, m in partition(GRAPH)
    }


def test_shapes_suffice_and_give_the_same():
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), PARAMS)
    same(jprune.trace(model, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)))
    same(jprune.trace(model, jax.tree.map(np.asarray, PARAMS), np.asarray(X)))


def test_the_order_of_independent_equations_does_not_matter():
    """Four branches that share widths, in every order: with splits, concatenations, reshapes."""
    params = {
        "a": normal(0, 6, 12), "b": normal(1, 6, 12), "c": normal(2, 6, 8), "d": normal(3, 12, 4), "s": normal(4, 12),
        "out": normal(5, 28, 3),
    }  # fmt: skip

    def steps():
        return {
            "a": lambda p, v, x: jax.nn.relu(x @ p["a"]).reshape(-1, 3, 4).sum(1) @ jnp.ones((4, 1)) * p["s"],
            "b": lambda p, v, x: jnp.concatenate(jnp.split(x @ p["b"], 3, -1)[::-1], -1),
            "c": lambda p, v, x: jnp.concatenate([x @ p["c"], x @ p["b"] @ p["d"]], -1),
            "d": lambda p, v, x: jnp.tanh(x @ p["b"] @ p["d"]),
        }

    def f(order):
        def run(p, x):
            v = {}
            for name in order:
                v[name] = steps()[name](p, v, x)
            return jnp.concatenate([v["a"] + v["c"], v["b"], v["d"]], -1) @ p["out"]

        return run

    graphs = [jprune.trace(f(o), params, X) for o in itertools.permutations("abcd")]
    for graph in graphs[1:]:
        assert partition(graph) == partition(graphs[0]) and reasons(graph) == reasons(graphs[0])
    assert len(graphs[0].groups) >= 2
    check_laws(f("dcba"), params, (X,), graph=graphs[-1], gradients=False)


@pytest.mark.parametrize("unroll", [1, 3, True])
def test_a_loop_over_layers_or_a_scan_carry_the_same_groups(unroll):
    """The carried stream is one group either way, and so are the loop's groups of every layer and the scan's."""
    params = {"e": normal(0, 6, 8), "a": normal(1, 3, 8, 10), "b": normal(2, 3, 10, 8), "head": normal(3, 8, 3)}

    def layer(h, w):
        return h + jnp.tanh(h @ w[0]) @ w[1]

    def scan(p, x):
        h, _ = jax.lax.scan(lambda h, w: (layer(h, w), None), x @ p["e"], (p["a"], p["b"]), unroll=unroll)
        return h @ p["head"]

    def loop(p, x):
        h = x @ p["e"]
        for w in p["layers"]:
            h = layer(h, w)
        return h @ p["head"]

    separate = {"e": params["e"], "head": params["head"], "layers": list(zip(params["a"], params["b"], strict=True))}
    a, b = jprune.trace(scan, params, X), jprune.trace(loop, separate, X)

    def plain(path):
        return {"0": "a", "1": "b"}.get(path.split("/")[-1], path)

    def carried(graph, rename, axis):
        (group,) = [g for g in graph.groups.values() if g.size == 8]
        return {(rename(p), i - axis * (p in "ab")) for p, i in members(graph, group.id)}

    assert carried(a, lambda p: p, 1) == carried(b, plain, 0) == {("e", 1), ("a", 0), ("b", 1), ("head", 0)}
    assert {g.size: g.layers for g in a.groups.values()} == {8: None, 10: 3}
    assert [g.size for g in b.groups.values()].count(10) == 3
    assert a.cost().macs == b.cost().macs and a.cost().params == b.cost().params
    keep = subset(a, np.random.default_rng(0))
    check_laws(scan, params, (X,), keep=keep, graph=a, gradients=False)


# -- keeping everything ------------------------------------------------------------------------------------------------


def test_keeping_everything_is_the_function_itself():
    for keep in (None, {}, {g: np.ones(i.shape, bool) for g, i in GRAPH.groups.items()}):
        same_numbers(jax.jit(GRAPH.replay(keep))(PARAMS, X), WHOLE(PARAMS, X), terms=TERMS)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), GRAPH.compact(PARAMS, keep or {}), PARAMS))
    same_numbers(jax.jit(GRAPH.dense)(PARAMS, X), WHOLE(PARAMS, X), terms=TERMS)


def test_kept_units_add_up_to_the_sizes_of_the_leaves():
    keep = subset(GRAPH, np.random.default_rng(4))
    small = GRAPH.compact(PARAMS, keep)
    kept = {frozenset(members(GRAPH, g)): int(k.sum()) for g, k in keep.items()}
    for n, w in PARAMS.items():
        for axis, size in enumerate(w.shape):
            mine = [k for m, k in kept.items() if (n, axis) in m]
            each = 2 if n == "gate" and axis == 1 else 1
            assert small[n].shape[axis] == (mine[0] * each if mine else size)


# -- other batches -----------------------------------------------------------------------------------------------------


def image_model(p, x):
    conv = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jax.nn.relu(conv * p["scale"])
    h = h.reshape(h.shape[0], -1) @ p["up"]
    return jax.nn.log_softmax(jnp.tanh(h) @ p["head"])


IMAGE = lively({
    "kernel": jnp.zeros((3, 3, 3, 6)), "scale": jnp.zeros(6), "up": jnp.zeros((96, 7)), "head": jnp.zeros((7, 4))
})  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_replay_takes_other_batches_than_the_traced_one(batch):
    graph = jprune.trace(image_model, IMAGE, jnp.zeros((2, 4, 4, 3)))
    keep = subset(graph, np.random.default_rng(1))
    run, small = graph.replay(keep), graph.compact(IMAGE, keep)
    assert run.free_dimensions == [("0", 0)]
    x = normal(11, batch, 4, 4, 3)
    got = jax.jit(run)(small, x)
    assert got.shape == (batch, 4)
    assert relative(got, jax.jit(image_model)(graph.mask(IMAGE, keep), x)) < 1e-5


def rows(p, x):
    """The feed-forward part alone: every row for itself."""
    return feed(jnp.tanh(x @ p["embed"]), p["gate"], p["down"]) @ p["head"]


def test_several_dimensions_of_several_inputs_are_free():
    def f(p, x, weight):
        return rows(p, x) * weight[:, None, None]

    graph = jprune.trace(f, PARAMS, jnp.zeros((2, 5, 6)), jnp.zeros(2))
    keep = subset(graph, np.random.default_rng(2))
    run, small, masked = graph.replay(keep), graph.compact(PARAMS, keep), graph.mask(PARAMS, keep)
    assert run.free_dimensions == [("0", 0), ("0", 1), ("1", 0)]
    for batch, length in ((3, 5), (2, 9), (4, 2)):
        x, weight = normal(12, batch, length, 6), normal(13, batch)
        assert relative(jax.jit(run)(small, x, weight), jax.jit(f)(masked, x, weight)) < 1e-5
    with pytest.raises(jprune.TraceError, match="axis 0 of input 1 has size 2; another input has 3"):
        run(small, normal(12, 3, 5, 6), normal(13, 2))


FREE = {
    "flattened": lambda p, x: rows(p, x).reshape(-1),
    "beside itself": lambda p, x: jnp.concatenate([rows(p, x), x @ p["embed"] @ p["head"]]),
    "every row twice": lambda p, x: jnp.repeat(rows(p, x), 2, 0),
    "zeros of its size": lambda p, x: rows(p, x) + jnp.zeros((x.shape[0], 3)),
}
PINNED = {  # a mean divides by a number, a table has a length, the last row a position
    "mean": lambda p, x: rows(p, x).mean(0),
    "table": lambda p, x: rows(p, x) + np.arange(len(x), dtype=np.float32)[:, None],
    "positions": lambda p, x: rows(p, x) + jnp.arange(x.shape[0])[:, None],
    "first rows": lambda p, x: rows(p, x)[:2],
    "last row": lambda p, x: rows(p, x)[-1],
    "loop over rows": lambda p, x: jax.lax.scan(lambda c, r: (c + rows(p, r), None), jnp.zeros(3), x)[0],
    "attention between rows": model,
}


@pytest.mark.parametrize("name", FREE)
def test_what_leaves_the_batch_free(name):
    graph = jprune.trace(FREE[name], PARAMS, X)
    keep = subset(graph, np.random.default_rng(2))
    run, small, masked = graph.replay(keep), graph.compact(PARAMS, keep), graph.mask(PARAMS, keep)
    for x in (X, normal(12, 7, 6), normal(12, 2, 6)):
        assert relative(jax.jit(run)(small, x), jax.jit(FREE[name])(masked, x)) < 1e-5


@pytest.mark.parametrize("name", PINNED)
def test_what_depends_on_the_traced_batch_is_refused_at_another(name):
    f, x = PINNED[name], normal(12, 7, 6)
    graph = jprune.trace(f, PARAMS, X)
    same_numbers(jax.jit(graph.dense)(PARAMS, X), jax.jit(f)(PARAMS, X), terms=TERMS)
    with pytest.raises(
        jprune.TraceError, match=r"size 7, but 5 was traced and the function depends on it; trace again"
    ):
        graph.dense(PARAMS, x)
    again = jprune.trace(f, PARAMS, x)
    assert partition(again) == partition(graph)
    assert relative(again.dense(PARAMS, x), f(PARAMS, x)) < 1e-6


@jax.custom_vjp
def averaged(x):
    return x


averaged.defvjp(lambda x: (x, None), lambda _, g: (g / g.shape[0],))


BAKED = {  # Python made a number, a shape or a choice of the size: nothing in the jaxpr tells it from another
    "divided by the size": lambda p, x: rows(p, x) / x.shape[0],
    "mean by hand": lambda p, x: rows(p, x) - rows(p, x).sum(0) / len(x),
    "table of the size": lambda p, x: rows(p, x) * np.linspace(0, 1, len(x), dtype=np.float32).sum(),
    "choice": lambda p, x: rows(p, x) if len(x) > 6 else 2 * rows(p, x),
    "loop": lambda p, x: jax.lax.fori_loop(0, len(x), lambda i, h: h / 2, rows(p, x)),
    "inside jit": lambda p, x: jax.jit(lambda h: h / h.shape[0])(rows(p, x)),
    "derivative": lambda p, x: averaged(rows(p, x)),
    "rows beside": lambda p, x: (rows(p, x), jnp.concatenate([p["scale"][None]] * len(x))),
}


@pytest.mark.parametrize("name", BAKED)
def test_a_number_made_of_the_batch_s_size_is_refused_at_another(name):
    """Silently wrong it would be: the batch looks free, for no axis of anything has its size but its own."""
    f = BAKED[name]
    graph = jprune.trace(f, PARAMS, X)
    keep = subset(graph, np.random.default_rng(3))
    run, small, masked = graph.replay(keep), graph.compact(PARAMS, keep), graph.mask(PARAMS, keep)
    assert relative(run(small, X), f(masked, X)) < 1e-5
    assert run.free_dimensions == []
    with pytest.raises(jprune.TraceError, match=r"axis 0 of input 0(: 7 instead of 5| has size 7).*trace again"):
        run(small, normal(12, 7, 6))
    with pytest.raises(jprune.TraceError, match="trace again"):
        graph.calibrate(PARAMS, [X, normal(12, 7, 6)], {"m": taps.absolute_maximum()})


def test_the_refusal_names_the_line_where_the_number_is_used():
    graph = jprune.trace(BAKED["divided by the size"], PARAMS, X)
    with pytest.raises(jprune.TraceError, match=r"the number 5\.0 becomes 7\.0 in div at .*test_invariance\.py:\d+"):
        graph.dense(PARAMS, normal(12, 7, 6))


def test_folded_constants_follow_the_batch_or_refuse_it():
    """A causal mask is the same for every row of a batch, a table of positions along the batch is not."""

    def masked_scores(p, x):
        h = jnp.tanh(x @ p["embed"])
        a = jnp.einsum("btd,bsd->bts", h, h)
        return jnp.where(jnp.tril(jnp.ones(a.shape[-2:], bool)), a, 0.0)

    def positions(p, x):  # as flax.linen.make_causal_mask makes it: a grid of positions for each row of the batch
        grid = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return jnp.where(grid[:, :, None] >= grid[:, None], masked_scores(p, x), 1.0)

    def numbered(p, x):
        return masked_scores(p, x) + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None, None]

    params, x = {"embed": PARAMS["embed"]}, normal(14, 3, 5, 6)
    for f in (masked_scores, positions):
        graph = jprune.trace(f, params, x, fold_constants=True)
        keep = subset(graph, np.random.default_rng(3))
        run, small, masked = graph.replay(keep), graph.compact(params, keep), graph.mask(params, keep)
        assert run.free_dimensions == [("0", 0)]
        for batch in (3, 7, 1):
            other = normal(15, batch, 5, 6)
            assert relative(run(small, other), f(masked, other)) < 1e-5
    graph = jprune.trace(numbered, params, normal(14, 3, 5, 6), fold_constants=True)
    assert graph.replay().free_dimensions == []
    with pytest.raises(jprune.TraceError, match="trace again"):
        graph.dense(params, normal(15, 7, 5, 6))
