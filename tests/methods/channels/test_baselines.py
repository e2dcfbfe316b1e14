"""The baselines against plain numpy, and that all of them are given the same budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoders as plain
import pytest
from decoders import tiny, weights
from test_cfsp import by_hand

import jprune
from jprune.language.blocks import blocks
from jprune.language.perplexity import next_token_loss
from jprune.language.statistics import block_stats
from jprune.methods.channels import decoder_baselines as baselines
from jprune.models.llama import Llama, with_biases
from jprune.models.llama_blocks import pieces
from jprune.tracing.paths import flatten

PARAMS = plain.params(depth=3)
IDS = np.random.default_rng(2).integers(0, plain.V, (8, plain.TOKENS))
FN = plain.decoder()
GRAPH = jprune.trace(FN, PARAMS, plain.IDS)
FOUND = blocks(GRAPH)
F = plain.F


@functools.cache
def stats():
    return block_stats(GRAPH, PARAMS, [IDS])


@functools.cache
def grads():
    return jax.jit(jax.grad(lambda p: next_token_loss(FN(p, IDS), jnp.asarray(IDS)).mean()))(PARAMS)


def matrices(l):
    return [np.asarray(PARAMS["layers"][l][n], np.float64).T for n in ("down", "up", "gate")]


def best(scores, n):
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:n]).tolist()


def z_scores(x):
    return (x - x.mean()) / x.std(ddof=1)


def test_magnitude_and_wanda_keep_the_best_of_every_layer():
    a = baselines.magnitude(GRAPH, PARAMS, 0.5)
    b = baselines.wanda_sp(GRAPH, PARAMS, stats(), 0.25, multiple_of=6)
    for l, x in enumerate(FOUND):
        assert np.flatnonzero(a[x.ffn]).tolist() == best(by_hand("magnitude", *matrices(l), None), 12)
        assert np.flatnonzero(b[x.ffn]).tolist() == best(by_hand("wanda", *matrices(l), np.sqrt(stats().x2[l])), 18)


def test_one_threshold_over_standardised_scores():
    keep = baselines.wanda_sp(GRAPH, PARAMS, stats(), 0.4, "global")
    scores = [z_scores(by_hand("wanda", *matrices(l), np.sqrt(stats().x2[l]))) for l in range(3)]
    threshold = np.sort(np.concatenate(scores))[::-1][round(0.6 * 3 * F) - 1]
    assert [keep[b.ffn].tolist() for b in FOUND] == [(s >= threshold).tolist() for s in scores]
    assert len({int(k.sum()) for k in keep.values()}) > 1


def test_in_turn_every_layer_sees_the_pruned_ones_before_it():
    layer = functools.partial(plain.sequential, heads=4, kv=2)
    args = (GRAPH, PARAMS["table"].__getitem__, layer, PARAMS["layers"], [IDS], 0.5)
    keep = baselines.wanda_sp_in_turn(*args)
    so_far = {}
    for b in FOUND:  # calibrate the whole model anew for every layer
        now = block_stats(GRAPH, GRAPH.mask(PARAMS, so_far), [IDS])
        so_far[b.ffn] = baselines.wanda_sp(GRAPH, PARAMS, now, 0.5)[b.ffn]
    assert {g: k.tolist() for g, k in keep.items()} == {g: k.tolist() for g, k in so_far.items()}
    assert any((keep[g] != k).any() for g, k in baselines.wanda_sp(GRAPH, PARAMS, stats(), 0.5).items())


@pytest.mark.slow
def test_in_turn_on_scanned_layers():
    module = Llama(tiny("qwen2"), True)
    v = weights(module.config, scanned=True)
    graph = jprune.trace(module.apply, v, IDS[:2])
    (keep,) = baselines.wanda_sp_in_turn(graph, *pieces(module.config, v), [IDS], 0.5).values()
    assert keep.shape == (3, 48) and keep.sum(1).tolist() == [24] * 3


# -- FLAP --------------------------------------------------------------------------------------------------------------


def heads_by_hand(var, o):
    """Means over the features of key-value head 0 (queries 0 and 1) and 1 of the standardised fluctuations."""
    return z_scores(var * (np.asarray(o, np.float64) ** 2).sum(1)).reshape(2, -1).mean(1)


def test_channels_that_fluctuate_least_go():
    keep = baselines.flap(GRAPH, PARAMS, stats(), 0.5, heads=False)
    scores = [z_scores(stats().z_var[l] * (matrices(l)[0] ** 2).sum(0)) for l in range(3)]
    threshold = np.sort(np.concatenate(scores))[3 * F // 2]
    assert [keep[b.ffn].tolist() for b in FOUND] == [(s >= threshold).tolist() for s in scores]


def test_heads_compete_with_channels_by_their_parameters(monkeypatch):
    seen = {}
    ranked = baselines.budget.ranked
    monkeypatch.setattr(baselines.budget, "ranked", lambda g, s, *a, **k: seen.update(s) or ranked(g, s, *a, **k))
    keep = baselines.flap(GRAPH, PARAMS, stats(), 0.5)
    for l, b in enumerate(FOUND):
        np.testing.assert_allclose(
            seen[b.kv], heads_by_hand(stats().attention[l].var, PARAMS["layers"][l]["o"]), rtol=1e-4
        )
    a_head, a_channel = (2 + 2 * 2) * plain.H * plain.D, 3 * plain.D
    gone = a_head * sum(int((~keep[b.kv]).sum()) for b in FOUND) + a_channel * sum(
        int((~keep[b.ffn]).sum()) for b in FOUND
    )
    assert 0 <= gone - 0.5 * 3 * F * a_channel < a_head
    assert any((~keep[b.kv]).any() for b in FOUND) and all(k.any() for k in keep.values())


@pytest.mark.parametrize("scanned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_features_of_several_axes_find_their_heads(monkeypatch, scanned):
    """Heads and channels are axes of their own, summed over in another order than they are stored."""
    seen = []
    monkeypatch.setattr(baselines.budget, "ranked", lambda g, s, *a, **k: seen.append(s) or type("A", (), {"keep": {}}))
    module = Llama(tiny("llama"), scanned)
    v = weights(module.config, scanned=scanned)
    graph = jprune.trace(module.apply, v, IDS[:2])
    s = block_stats(graph, v, [IDS])
    baselines.flap(graph, v, s, 0.3)
    b = blocks(graph)[0 if scanned else 1]
    tap = graph.taps[b.out]
    shape = [tap.use.eqn.invars[tap.use.data_operand].aval.shape[a] for a in tap.use.data_features]
    var = np.asarray(s.attention[1].var).reshape(shape)
    var = var if shape == [4, 8] else var.T
    p = v["params"]
    o = p["layers"]["attn"]["o"]["kernel"][1] if scanned else p["layer1"]["attn"]["o"]["kernel"]
    (scores,) = seen
    np.testing.assert_allclose(
        scores[b.kv][1 if scanned else ...], heads_by_hand(var.reshape(-1), o.reshape(32, 32)), rtol=1e-4
    )


@functools.cache
def biased(scanned):
    config, v = with_biases(weights(tiny("llama"), scanned=scanned), tiny("llama"))
    module = Llama(config, scanned)
    graph = jprune.trace(module.apply, v, IDS[:2])
    s = block_stats(graph, v, [IDS])
    keep = baselines.flap(graph, v, s, 0.5)
    return module, v, graph, s, keep, baselines.flap_biases(graph, v, s, keep)


@pytest.mark.slow
def test_new_biases_change_nothing():
    plain_model = Llama(tiny("llama"))
    v = weights(plain_model.config)
    config, more = with_biases(v, plain_model.config)
    assert config.mlp_bias and config.o_bias and with_biases(more, config) == (config, more)
    want = jax.jit(plain_model.apply)(v, IDS[:2])
    np.testing.assert_allclose(jax.jit(Llama(config).apply)(more, IDS[:2]), want, atol=1e-5)


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_removed_moves_into_biases(scanned):
    module, v, graph, s, keep, out = biased(scanned)
    assert not out.skipped
    b = blocks(graph)[0 if scanned else 1]

    def mlp(tree):
        p = tree["params"]["layers"] if scanned else tree["params"]["layer1"]
        return jax.tree.map(lambda x: np.asarray(x[1] if scanned else x, np.float64), p["mlp"]["down"])

    gone = ~keep[b.ffn][1 if scanned else ...]
    assert gone.any()
    np.testing.assert_allclose(mlp(out.params)["bias"], (s.z_mean[1] * gone) @ mlp(v)["kernel"], atol=1e-5)
    fn = jax.jit(module.apply)
    dense, repaired, bare = (fn(graph.mask(p, k), IDS[:2]) for p, k in ((v, {}), (out.params, keep), (v, keep)))
    assert jnp.mean((repaired - dense) ** 2) < jnp.mean((bare - dense) ** 2)


# -- gradients, chance -------------------------------------------------------------------------------------------------


def test_taylor_sums_products_of_weights_and_gradients():
    keep = baselines.taylor(GRAPH, PARAMS, grads(), 0.5)
    for l, b in enumerate(FOUND):
        p, g = (jax.tree.map(lambda x: np.asarray(x, np.float64), t["layers"][l]) for t in (PARAMS, grads()))
        score = sum(abs(p[n] * g[n]).sum(0) for n in ("up", "gate")) + abs(p["down"] * g["down"]).sum(1)
        assert np.flatnonzero(keep[b.ffn]).tolist() == best(score, F // 2)


@pytest.mark.parametrize("heads", [False, True])
def test_gradients_are_made_of_what_is_scored_only(heads):
    """Summed over batches in place; no gradient of an embedding or the head, nor of anything of its size."""

    def loss(p, ids):
        return next_token_loss(FN(p, ids), jnp.asarray(ids)).mean()

    found = baselines.taylor_gradients(GRAPH, loss, PARAMS, [IDS, IDS], heads=heads)
    whole = dict(flatten(grads()))
    names = ("up", "gate", "down", *("qkvo" if heads else ""))
    assert set(found) == {f"layers/{l}/{n}" for l in range(3) for n in names}
    for path, g in found.items():
        np.testing.assert_allclose(g, 2 * whole[path], rtol=1e-4, atol=1e-5)
    assert jax.tree.map(np.ndarray.tolist, baselines.taylor(GRAPH, PARAMS, found, 0.5, heads=heads)) == jax.tree.map(
        np.ndarray.tolist, baselines.taylor(GRAPH, PARAMS, grads(), 0.5, heads=heads)
    )
    compiled = (
        jax.jit(baselines.taylor_step(loss), donate_argnums=0).lower(found, PARAMS, IDS).compile().memory_analysis()
    )
    scored, every = (sum(x.size * 4 for x in jax.tree.leaves(t)) for t in (found, PARAMS))
    assert scored < 0.9 * every and compiled.output_size_in_bytes < scored + 1024
    assert compiled.alias_size_in_bytes >= scored  # sums are made where they were
    with pytest.raises(ValueError, match="no batches"):
        baselines.taylor_gradients(GRAPH, loss, PARAMS, [])


def test_taylor_prunes_heads_by_the_same_fraction():
    params = plain.params(kv=4, depth=2)
    graph = jprune.trace(plain.decoder(kv=4), params, plain.IDS)
    keep = baselines.taylor(graph, params, jax.tree.map(jnp.ones_like, params), 0.5, heads=True)
    for p, b in zip(params["layers"], blocks(graph), strict=True):
        score = sum(abs(np.asarray(p[n])).reshape(plain.D, 4, -1).sum((0, 2)) for n in "qkv")
        score += abs(np.asarray(p["o"])).reshape(4, -1).sum(1)
        assert np.flatnonzero(keep[b.kv]).tolist() == best(score, 3)
        assert F / 2 < keep[b.ffn].sum() < F


def test_chance_comes_from_the_key():
    a, b, c = (baselines.random(GRAPH, jax.random.key(k), 0.5) for k in (0, 0, 1))
    assert all((a[g] == b[g]).all() and a[g].sum() == F // 2 for g in a) and any((a[g] != c[g]).any() for g in a)


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_all_have_the_same_budget(sparsity):
    """Parameters left differ by less than the largest unit."""
    keeps = [
        baselines.random(GRAPH, jax.random.key(0), sparsity),
        baselines.magnitude(GRAPH, PARAMS, sparsity),
        baselines.wanda_sp(GRAPH, PARAMS, stats(), sparsity),
        baselines.wanda_sp(GRAPH, PARAMS, stats(), sparsity, "global"),
        baselines.flap(GRAPH, PARAMS, stats(), sparsity, heads=False),
        baselines.flap(GRAPH, PARAMS, stats(), sparsity),
        baselines.taylor(GRAPH, PARAMS, grads(), sparsity),
        baselines.taylor(GRAPH, PARAMS, grads(), sparsity, heads=True),
    ]
    left = [GRAPH.cost(k).params for k in keeps]
    dense = GRAPH.cost().params
    want = dense - sparsity * 3 * F * 3 * plain.D
    assert all(abs(n - want) <= (2 + 2 * 2) * plain.H * plain.D for n in left), (left, want)
    assert len({tuple(np.concatenate(list(k.values())).tolist()) for k in keeps}) >= 7


def test_another_scope_is_refused():
    with pytest.raises(ValueError, match="'layer' or 'global'"):
        baselines.wanda_sp(GRAPH, PARAMS, stats(), 0.5, "everywhere")
