"""LoRA on traced decoders: which products, what initial factors, merged weights, ranks per layer, masks, files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import FAMILIES, prompt, tiny, weights
from laws import normal, relative

import jprune
from jprune.language import lora as L
from jprune.language.lora import LoraConfig
from jprune.models.llama import Llama, stack_layers
from jprune.surgery.products import TapError
from jprune.tracing.paths import flatten

IDS, MASK = prompt(tokens=6)
SEVEN = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


@functools.cache
def decoder(family="llama", scanned=False):
    module = Llama(tiny(family), scanned)
    v = weights(module.config, scanned=scanned)
    return module, v, jprune.trace(module.apply, v, IDS, MASK)


def lively(tree, seed=0):
    """B is not zero: the adapters do something."""
    rng = np.random.default_rng(seed)
    some = {t: {"a": f["a"], "b": jnp.asarray(rng.normal(size=f["b"].shape) / 4, jnp.float32)} for t, f in tree.items()}
    return L.Lora(some, tree.scales)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(
    "family", [f if f in ("llama", "qwen2") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_the_targets_are_the_seven_products_of_every_layer(family, scanned):
    _, _, graph = decoder(family, scanned)
    layers = ["layers"] if scanned else [f"layer{l}" for l in range(3)]
    assert set(L.targets(graph)) == {f"params/{l}/{n}/kernel" for l in layers for n in SEVEN}


def test_fresh_factors():
    _, _, graph = decoder()
    lora = L.init(jax.random.key(0), graph, LoraConfig(rank=3))
    sizes = {"attn/q": (32, 32), "attn/k": (16, 32), "attn/o": (32, 32), "mlp/gate": (48, 32), "mlp/down": (32, 48)}
    for name, (o, i) in sizes.items():
        f = lora[f"params/layer1/{name}/kernel"]
        assert f["a"].shape == (3, i) and f["b"].shape == (o, 3) and f["a"].dtype == jnp.float32
        assert not f["b"].any() and 0.8 * i**-0.5 < np.abs(f["a"]).max() <= i**-0.5
        assert abs(float(f["a"].std()) / (i**-0.5 / 3**0.5) - 1) < 0.25
    firsts = {f["a"].tobytes() for f in map(lambda f: jax.tree.map(np.asarray, f), lora.values())}
    assert len(firsts) == len(lora)
    np.testing.assert_array_equal(*[x["params/layer0/mlp/up/kernel"]["a"] for x in (
        lora, L.init(jax.random.key(0), graph, LoraConfig(rank=3)))])  # fmt: skip


CONFIG = LoraConfig(rank=2, alpha=6.0)


@functools.cache
def compiled(scanned, adapters=True):
    """The decoder with adapters, or as it is; compiled once for all tests."""
    module, _, graph = decoder("llama", scanned)
    return jax.jit(L.adapted(graph) if adapters else module.apply)


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_merged_weights_do_the_same(scanned):
    _, v, graph = decoder("llama", scanned)
    lora = lively(L.init(jax.random.key(1), graph, CONFIG))
    got = compiled(scanned)(v, lora, IDS, MASK)
    merged = jax.jit(lambda v, f: L.merge(graph, v, f))(v, lora)
    assert relative(got, compiled(scanned, False)(merged, IDS, MASK)) < 1e-5
    assert relative(got, compiled(scanned, False)(v, IDS, MASK)) > 0.1
    t = "params/layers/mlp/up/kernel" if scanned else "params/layer1/mlp/up/kernel"
    before, after = (dict(flatten(x))[t] for x in (v, merged))
    f = {k: np.asarray(x, np.float64)[(1,) if scanned else ()] for k, x in lora[t].items()}
    at = (1,) if scanned else ()
    want = np.asarray(before, np.float64)[at] + 6.0 / 2 * (f["b"] @ f["a"]).T
    np.testing.assert_allclose(np.asarray(after)[at], want, atol=1e-6)


def test_merging_rounds_once():
    """bfloat16 weights take up the sum, not a rounded delta."""
    params = {"w": normal(0, 16, 24).astype(jnp.bfloat16)}
    graph = jprune.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 16), jnp.bfloat16))
    lora = lively(L.init(jax.random.key(0), graph, taps=["w"]))
    got = L.merge(graph, params, lora)["w"]
    delta = 2 * np.asarray(lora["w"]["b"], np.float64) @ np.asarray(lora["w"]["a"], np.float64)
    want = jnp.asarray(np.asarray(params["w"], np.float64) + delta.T, jnp.float32).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    twice = params["w"] + jnp.asarray(delta.T, jnp.bfloat16)
    wrong = [np.mean(np.asarray(x != want)) for x in (got, twice)]  # a sum in float32 may round the other way, rarely
    assert wrong[0] <= 0.01 < 0.05 < wrong[1]
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7)


def test_only_the_factors_are_differentiated():
    """No array of a weight's shape and no gradient of one is made."""
    params = {"w": normal(0, 40, 50), "v": normal(1, 50, 3)}

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    x = normal(2, 7, 40)
    graph = jprune.trace(fn, params, x)
    lora = L.init(jax.random.key(0), graph, LoraConfig(rank=2), ["w"])
    run = L.adapted(graph)
    gradient = jax.grad(lambda f: jnp.sum(run(params, f, x) ** 2))
    assert jax.tree.map(jnp.shape, gradient(lora)).factors == {"w": {"a": (2, 40), "b": (50, 2)}}
    made = [v.aval.shape for e in jax.make_jaxpr(gradient)(lora).jaxpr.eqns for v in e.outvars]
    assert (50, 2) in made and not {(40, 50), (50, 40)} & set(made)


def test_ranks_per_layer_in_a_stack():
    """Layers of ranks 3, 1 and 0: what is beyond a layer's rank is zero and has no gradient."""
    params, x = {"w": normal(0, 3, 4, 5), "v": normal(1, 3, 5, 4)}, normal(2, 6, 4)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, (p["w"], p["v"]))[0]

    graph = jprune.trace(fn, params, x)
    config = LoraConfig(rank=2, alpha=4.0, ranks=dict.fromkeys(params, (3, 1, 0)))
    lora = L.init(jax.random.key(2), graph, config, list(params))
    run = L.adapted(graph)
    step = jax.jit(jax.grad(lambda f: jnp.sum(jnp.sin(run(params, f, x)))))
    for _ in range(2):
        lora = jax.tree.map(lambda x, g: x - 0.1 * jnp.sign(g), lora, step(lora))
    for f in lora.values():
        assert [int((jnp.abs(f["a"][l]).sum(-1) > 0).sum()) for l in range(3)] == [3, 1, 0]
        assert [int((jnp.abs(f["b"][l]).sum(0) > 0).sum()) for l in range(3)] == [3, 1, 0] and f["a"].shape[1] == 3


@pytest.mark.parametrize("scanned", [False, True])
def test_one_rank_per_layer_of_a_decoder(scanned):
    _, _, graph = decoder("llama", scanned)
    ranks = L.layer_ranks(graph, [3, 1, 0])
    assert set(ranks) == set(L.targets(graph))
    assert {r for t, r in ranks.items() if "layer1" in t or scanned} == ({(3, 1, 0)} if scanned else {1})
    lora = L.init(jax.random.key(2), graph, LoraConfig(2, ranks=ranks))
    t = "params/layers/mlp/up/kernel" if scanned else "params/layer2/mlp/up/kernel"
    assert lora[t]["a"].shape == ((3, 3, 32) if scanned else (0, 32))
    with pytest.raises(ValueError, match="2 ranks are given for 3 layers"):
        L.layer_ranks(graph, [3, 1])


@pytest.mark.slow
def test_a_stack_has_the_same_function_as_its_layers():
    _, v, graph = decoder()
    lora = lively(L.init(jax.random.key(3), graph, CONFIG))
    want = compiled(False)(v, lora, IDS, MASK)
    stacked = {f"params/layers/{n}/kernel": jax.tree.map(lambda *x: jnp.stack(x), *[
        lora[f"params/layer{l}/{n}/kernel"] for l in range(3)]) for n in SEVEN}  # fmt: skip
    stacked = L.Lora(stacked, dict.fromkeys(stacked, CONFIG.scale))
    assert relative(compiled(True)(stack_layers(v), stacked, IDS, MASK), want) < 1e-5


def test_masks_remove_units_of_adapted_weights():
    """Gates in front of o and down equal the rows of q, k, v, gate and up being zero, adapters included."""
    _, v, graph = decoder("llama", True)
    lora = lively(L.init(jax.random.key(4), graph, CONFIG))
    groups = [g for g in graph.groups if "/mlp/" in g or "attn/k" in g]
    rng = np.random.default_rng(1)
    keep = {g: rng.random(graph.groups[g].shape) < 0.6 for g in groups}
    for g in keep:
        keep[g][:, 0] = True
    got = compiled(True)(v, lora, IDS, MASK, masks=keep)
    merged = jax.jit(lambda v, f: L.merge(graph, v, f))(v, lora)
    small = graph.compact(merged, keep, verify=None)
    assert relative(got, jax.jit(graph.replay(keep))(small, IDS, MASK)) < 1e-5
    assert relative(got, compiled(True, False)(merged, IDS, MASK)) > 1e-2


def test_dropout_drops_inputs_of_adapters_only():
    params = {"w": normal(0, 400, 3)}
    graph = jprune.trace(lambda p, x: x @ p["w"], params, normal(1, 5, 400))
    config = LoraConfig(dropout=0.25, alpha=8.0)
    lora = lively(L.init(jax.random.key(0), graph, config, ["w"]))
    x = normal(1, 5, 400)
    plain = x @ params["w"]
    run = jax.jit(L.adapted(graph, config.dropout))
    whole = run(params, lora, x) - plain
    some = [run(params, lora, x, key=jax.random.key(k)) - plain for k in range(64)]
    assert not np.allclose(some[0], whole, atol=1e-3) and not np.allclose(some[0], some[1], atol=1e-3)
    np.testing.assert_allclose(np.mean(some, 0), whole, atol=4 * np.std(some) / 8 + 1e-3)
    eyes = L.Lora({"w": {"a": jnp.eye(8, 400), "b": jnp.eye(3, 8)}}, {"w": 1.0})
    kept = run({"w": 0 * params["w"]}, eyes, x + 1e3, key=jax.random.key(0))
    assert set(np.unique(np.round(np.asarray(kept) / (1e3 / 0.75), 1))) == {0.0, 1.0}


def test_the_scale_travels_with_the_factors():
    """Through jit, gradients, optimizers and maps; nothing that takes adapters asks for it again."""
    params = {"w": normal(0, 3, 4, 4)}
    graph = jprune.trace(
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0], params, normal(1, 2, 4)
    )
    lora = lively(L.init(jax.random.key(0), graph, LoraConfig(rank=2, alpha=7.0), ["w"]))
    state = optax.adam(1e-2).init(lora)
    grads = jax.jit(jax.grad(lambda f: (L.adapted(graph)(params, f, normal(1, 2, 4)) ** 2).sum()))(lora)
    updates, state = jax.jit(optax.adam(1e-2).update)(grads, state, lora)
    moved = jax.tree.map(lambda x: 2 * x, optax.apply_updates(lora, updates))
    for tree in (lora, grads, updates, moved, state[0].mu, jax.device_get(lora)):
        assert isinstance(tree, L.Lora) and tree.scales == {"w": 3.5}
        assert len(jax.tree.leaves(tree)) == 2  # the scale is no leaf: nothing trains it
    other = L.Lora(lora.factors, {"w": (3.5, 0.0, -1.0)})  # of each layer
    for scales, some in (((3.5,) * 3, lora), ((3.5, 0.0, -1.0), other)):
        merged = L.merge(graph, params, some)["w"] - params["w"]
        for l, s in enumerate(scales):
            p = np.asarray(some["w"]["b"][l], np.float64) @ np.asarray(some["w"]["a"][l])
            np.testing.assert_allclose(merged[l], s * p.T, atol=1e-5)
        x = normal(2, 2, 4)
        want = graph.dense(L.merge(graph, params, some), x)
        np.testing.assert_allclose(jax.jit(L.adapted(graph))(params, some, x), want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="adapters are a Lora"):
        L.merge(graph, params, dict(lora.factors))
    with pytest.raises(ValueError, match="'v' has one without the other"):
        L.Lora(lora.factors, {"w": 1.0, "v": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        L.Lora(lora.factors, {"w": float("nan")})


def test_what_is_refused():
    _, _, graph = decoder("llama3")  # tied: the embedding is looked up and multiplied with
    key = jax.random.key(0)
    with pytest.raises(TapError, match="is used 2 times"):
        L.init(key, graph, taps=["params/embed/embedding#1"])
    with pytest.raises(ValueError, match="which gets no adapter"):
        L.init(key, graph, LoraConfig(ranks={"params/layer0/mlp/gates": 2}))
    with pytest.raises(ValueError, match="one of at least 0"):
        L.init(key, graph, LoraConfig(ranks={"params/layer0/mlp/gate/kernel": (2, 2)}))
    with pytest.raises(ValueError, match="a rank is at least 1"):
        LoraConfig(rank=0)
