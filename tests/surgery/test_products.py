"""Adapters at taps: what is replaced, gated and read as a matrix, for products of any layout, in loops and out of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import prompt, tiny, weights
from laws import normal, relative, same_numbers

import jprune
from jprune.models.llama import Llama, stack_layers
from jprune.surgery.products import TapError, adapt, consumers, gate, gates, product
from jprune.tracing.paths import flatten

IDS, MASK = prompt(tokens=5)


def low_rank(graph, taps, rank=2, seed=0):
    """{tap: (a, b)}: small random factors of every tap."""
    rng = np.random.default_rng(seed)
    out = {}
    for t in taps:
        p = product(graph, t)
        o, i = p.shape
        out[t] = (
            jnp.asarray(rng.normal(size=(*p.lead, rank, i)) / i**0.5, jnp.float32),
            jnp.asarray(rng.normal(size=(*p.lead, o, rank)) / 2, jnp.float32),
        )
    return out


def with_factors(graph, taps):
    """The function with y = x (W + b a) at the taps."""
    products = {t: product(graph, t) for t in taps}

    def join(tap, x, y, again, extra):
        a, b = extra
        p = products[tap.id]
        return y + p.up(p.down(x, a), b, x.dtype)

    return adapt(graph, taps, join)


def merged(graph, params, factors):
    """The parameters with W + b a, leaf by leaf."""
    out = dict(flatten(params))
    for t, (a, b) in factors.items():
        p = product(graph, t)
        delta = jnp.einsum("...or,...ri->...oi", b, a)
        out[p.tap.leaf] = out[p.tap.leaf] + p.leaf_like(delta, out[p.tap.leaf].shape).astype(out[p.tap.leaf].dtype)
    return jax.tree.unflatten(jax.tree.structure(params), [out[p] for p, _ in flatten(params)])


def check_merged(fn, params, inputs, tolerance=1e-5, graph=None, taps=None):
    """The adapted function and its gradients equal those of merged weights; returns the graph."""
    graph = graph or jprune.trace(fn, params, *inputs)
    taps = taps or [t for t, tap in graph.taps.items() if tap.primitive == "dot_general"]
    factors = low_rank(graph, taps)
    adapted = with_factors(graph, taps)

    def loss(run):
        return lambda e: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(run(e)))

    def by_merging(e):
        return fn(merged(graph, params, e), *inputs)

    got, got_grad = jax.jit(
        lambda e: (adapted(params, e, *inputs), jax.grad(loss(lambda e: adapted(params, e, *inputs)))(e))
    )(factors)
    want, want_grad = jax.jit(lambda e: (by_merging(e), jax.grad(loss(by_merging))(e)))(factors)
    assert relative(got, want) < tolerance
    assert relative(got_grad, want_grad) < 10 * tolerance
    assert relative(fn(params, *inputs), want) > 1e-2, "the adapters change nothing: the test is blind"
    nothing = {t: (a, jnp.zeros_like(b)) for t, (a, b) in factors.items()}
    same_numbers(jax.jit(adapted)(params, nothing, *inputs), jax.jit(graph.dense)(params, *inputs), terms=100)
    return graph


def shapes_of_products(p, x):
    """Every way a kernel can be stored and meet the data."""
    b = x.shape[0]
    h = jnp.einsum("bte,ehd->bthd", x, p["split"])  # heads split off
    y = jnp.einsum("bthd,hde->bte", h, p["join"])
    y = jnp.tanh(y @ p["stored_out_in"].T)  # PyTorch's orientation
    y = jnp.tensordot(p["first"], y, ((2,), (2,))).transpose(2, 3, 0, 1)  # the kernel comes first
    y = jnp.einsum("bthd,hdf->bthf", y, p["per_head"])  # one matrix per head
    y = jnp.reshape(y, (b, -1, 6)) @ jnp.reshape(p["reshaped"], (6, 5))
    return jnp.einsum("bte,fe->btf", y, p["fused"][1:8])


@functools.cache
def products_example():
    shapes = {"split": (6, 2, 3), "join": (2, 3, 6), "stored_out_in": (4, 6), "first": (2, 3, 4), "per_head": (2, 3, 3),
              "reshaped": (2, 3, 5), "fused": (9, 5)}  # fmt: skip
    params = {k: normal(i, *s) for i, (k, s) in enumerate(shapes.items())}
    x = normal(9, 2, 3, 6) * 2
    return params, x, jprune.trace(shapes_of_products, params, x)


def test_products_of_every_layout():
    params, x, graph = products_example()
    check_merged(shapes_of_products, params, (x,), graph=graph)
    assert product(graph, "per_head").lead == (2,) and product(graph, "first").tap.use.data_operand == 1


def test_the_matrix_is_what_the_product_multiplies_with():
    params, _, graph = products_example()
    m = {t: np.asarray(product(graph, t).matrix(params[t])) for t in params}
    np.testing.assert_array_equal(m["split"], params["split"].reshape(6, 6).T)
    np.testing.assert_array_equal(m["join"], params["join"].reshape(6, 6).T)
    np.testing.assert_array_equal(m["stored_out_in"], params["stored_out_in"])
    np.testing.assert_array_equal(m["first"], params["first"].reshape(6, 4))
    np.testing.assert_array_equal(m["per_head"], params["per_head"].transpose(0, 2, 1))
    np.testing.assert_array_equal(m["reshaped"], params["reshaped"].reshape(6, 5).T)
    np.testing.assert_array_equal(m["fused"], params["fused"][1:8])
    for t in params:
        back = product(graph, t).leaf_like(jnp.asarray(m[t]), params[t].shape)
        want = params[t].at[jnp.array([0, 8])].set(0) if t == "fused" else params[t]
        np.testing.assert_array_equal(back, want)


def scanned(p, x):
    """A leaf stacked on axis 1, one transposed in every layer, one shared by all layers, rematerialised, with a branch."""

    def layer(x, own):
        w, v = own
        y = jnp.tanh(x @ w + x @ p["shared"])
        return jax.lax.cond(jnp.sum(y) > -1e9, lambda y: x + y @ v.T, lambda y: x, y), None

    return jax.lax.scan(jax.checkpoint(layer), x, (jnp.moveaxis(p["w"], 1, 0), p["v"]))[0]


def unrolled(p, x):
    for i in range(p["v"].shape[0]):
        x = x + jnp.tanh(x @ p["w"][:, i] + x @ p["shared"]) @ p["v"][i].T
    return x


def test_in_loops_every_layer_has_its_own():
    params = {"w": normal(0, 4, 3, 5), "v": normal(1, 3, 4, 5), "shared": normal(2, 4, 5)}
    x = normal(3, 2, 4)
    graph = check_merged(scanned, params, (x,))
    assert product(graph, "w").lead == (3,) and product(graph, "shared").lead == ()
    np.testing.assert_array_equal(product(graph, "w").matrix(params["w"]), params["w"].transpose(1, 2, 0))
    np.testing.assert_array_equal(product(graph, "v").matrix(params["v"]), params["v"])
    factors = low_rank(graph, ["w", "v", "shared"])
    want = unrolled(merged(graph, params, factors), x)
    assert relative(jax.jit(with_factors(graph, list(factors)))(params, factors, x), want) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_under_jit_vmap_and_in_low_precision(dtype):
    params = {"w": normal(0, 4, 6).astype(dtype), "v": normal(1, 6, 4).astype(dtype)}

    def fn(p, x):
        return jax.nn.silu(x @ p["w"]) @ p["v"]

    x = normal(2, 3, 4).astype(dtype)
    graph = jprune.trace(fn, params, x)
    factors = low_rank(graph, ["w", "v"])
    run = with_factors(graph, ["w", "v"])
    got = run(params, factors, x)
    assert got.dtype == jnp.dtype(dtype)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), merged(graph, jax.tree.map(jnp.float32, params), factors))
    h = np.asarray(x, np.float64) @ exact["w"]
    want = h / (1 + np.exp(-h)) @ exact["v"]
    assert relative(got, want) < (0.03 if dtype == "bfloat16" else 1e-5)
    many = jnp.stack([x, 2 * x])
    assert relative(jax.vmap(run, (None, None, 0))(params, factors, many)[1], run(params, factors, 2 * x)) < 0.02
    a, b = factors["w"]
    assert jax.grad(lambda f: run(params, f, x).astype(jnp.float32).sum())(factors)["w"][0].dtype == a.dtype == b.dtype


@functools.cache
def decoder(scanned=False, remat=False):
    module = Llama(tiny("qwen2"), scanned, remat)
    v = weights(module.config, scanned=scanned)
    return module, v, jprune.trace(module.apply, v, IDS, MASK)


@pytest.mark.slow
def test_decoders_scanned_rematerialised_and_unrolled():
    _, flat, graph = decoder()
    taps = [t for t in graph.taps if t.endswith(("q/kernel", "o/kernel", "down/kernel"))]
    factors = low_rank(graph, taps)
    want = jax.jit(with_factors(graph, taps))(flat, factors, IDS, MASK)
    assert relative(jax.jit(graph.dense)(merged(graph, flat, factors), IDS, MASK), want) < 1e-5
    names = ["attn/q/kernel", "attn/o/kernel", "mlp/down/kernel"]
    stacked = {f"params/layers/{n}": jax.tree.map(lambda *x: jnp.stack(x), *[factors[f"params/layer{l}/{n}"] for l in range(3)])
               for n in names}  # fmt: skip
    _, v, graph = decoder(True, True)
    run = with_factors(graph, list(stacked))
    assert relative(jax.jit(run)(stack_layers(flat), stacked, IDS, MASK), want) < 1e-5
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(jnp.sin(run(v, f, IDS, MASK)))))
    assert all(
        float(jnp.abs(g).min(axis=(1, 2)).max()) >= 0 and float(jnp.abs(g).max()) > 0
        for g in jax.tree.leaves(gradient(stacked))
    )


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gates_remove_units(scanned):
    """Gating what consumes a group is masking the group."""
    _, v, graph = decoder(scanned)
    ids = [g for g, i in graph.groups.items() if "/mlp/" in g or "/attn/k/" in g]
    rng = np.random.default_rng(0)
    keep = {g: jnp.asarray(rng.random(graph.groups[g].shape) < 0.6) for g in ids}
    taps = consumers(graph, ids)
    assert {t.split("/", 2)[2] for t in taps} == {"attn/o/kernel", "mlp/down/kernel"}
    run = adapt(graph, taps, gating)
    extras = {t: gates(graph.taps[t], keep) for t in taps}
    want = jax.jit(graph.dense)(graph.mask(v, keep), IDS, MASK)
    assert relative(jax.jit(run)(v, extras, IDS, MASK), want) < 1e-5
    assert relative(jax.jit(graph.dense)(v, IDS, MASK), want) > 1e-2


def gating(tap, x, y, again, extra):
    return again(gate(tap, x, extra))


def test_what_is_refused():
    params, x, graph = products_example()
    with pytest.raises(TapError, match=r"there is no tap 'splitt'.*split"):
        product(graph, "splitt")
    run = adapt(graph, ["split"], gating)
    with pytest.raises(TapError, match=r"exactly the adapted taps.*join"):
        run(params, {"join": ()}, x)
    with pytest.raises(TapError, match="has shape"):
        adapt(graph, ["split"], drop_an_axis)(params, {"split": ()}, x)
    params = {"w": normal(0, 3, 4, 4), "s": jnp.ones(4)}

    @jax.custom_jvp
    def own(w, x):
        return x @ w

    own.defjvp(lambda p, t: (own(*p), t[1] @ p[0]))

    def fn(p, x):
        return own(p["w"][0], x) * p["s"] + x @ (2 * p["w"][1])

    graph = jprune.trace(fn, params, normal(1, 2, 4))
    with pytest.raises(TapError, match="is mul, no matrix product"):
        product(graph, "s")
    with pytest.raises(TapError, match=r"a derivative of its own, at .*test_products"):
        adapt(graph, ["w"], gating)
    graph = jprune.trace(
        scanned, {"w": normal(0, 4, 3, 5), "v": normal(1, 3, 4, 5), "shared": normal(2, 4, 5)}, normal(3, 2, 4)
    )
    with pytest.raises(TapError, match="its 3 layers come first"):
        adapt(graph, ["v"], gating)({"w": normal(0, 4, 3, 5), "v": normal(1, 3, 4, 5), "shared": normal(2, 4, 5)},
                                    {"v": (jnp.ones(5),)}, normal(3, 2, 4))  # fmt: skip


def drop_an_axis(tap, x, y, again, extra):
    return y[0]


def test_leaves_that_are_computed_with_have_no_matrix():
    params = {"w": normal(0, 2, 1, 4)}

    def fn(p, x):
        return x @ jnp.broadcast_to(p["w"][0], (4, 4))

    graph = jprune.trace(fn, params, normal(1, 2, 4))
    with pytest.raises(TapError, match="between the leaf and its use lies broadcast_in_dim"):
        product(graph, "w")
