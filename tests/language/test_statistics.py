"""Calibration of decoders against activations computed by hand in double precision, however text and layers are split."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoders as plain
import pytest
from decoders import tiny, weights
from four_devices import run_script

import jprune
from jprune.language import statistics as S
from jprune.language.blocks import BlockError, blocks
from jprune.models.llama import Llama
from jprune.models.llama_blocks import pieces

slow = pytest.mark.slow
PARAMS = plain.params(depth=3)
GRAPH = jprune.trace(plain.decoder(), PARAMS, plain.IDS)
IDS = np.random.default_rng(2).integers(0, plain.V, (8, plain.TOKENS))


def numbers(stats):
    return jax.tree.leaves((stats.change, stats.ffn, stats.attention))


def apart(a, b):
    """Largest difference of any statistic, over its largest entry."""
    assert a.tokens == b.tokens
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(numbers(a), numbers(b), strict=True))


@functools.cache
def whole():
    return S.block_stats(GRAPH, PARAMS, [IDS])


# -- how far a vector turns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "angle"),
    [((1, 0), (1, 0), 0.0), ((1, 0), (0, 1), 0.5), ((1, 0), (-1, 0), 1.0), ((1, 0), (1, 1), 0.25), ((0, 0), (1, 1), 1 / 3)],
)  # fmt: skip
def test_angles(before, after, angle):
    """Also of the zero vector, whose cosine is said to be one half."""
    out = S.turned(jnp.asarray([before], jnp.float32), jnp.asarray([after], jnp.float32))
    assert out["angular"][0] == pytest.approx(angle, abs=1e-7)
    assert out["cosine"][0] == pytest.approx(1 - np.cos(np.pi * angle), abs=1e-6)
    difference = np.subtract(after, before)
    assert out["mse"][0] == pytest.approx(np.mean(difference**2)) and out["mae"][0] == np.mean(abs(difference))


def test_small_angles_keep_their_digits():
    """arccos of a float32 cosine would say 0 below 3e-4."""
    rng = np.random.default_rng(0)
    planes = np.linalg.qr(rng.normal(size=(64, 16, 2)))[0]
    u, v = planes[..., 0], planes[..., 1]
    angles = 10.0 ** rng.uniform(-6, 0, (64, 1))
    a, b = np.float32(3 * u), np.float32(u * np.cos(angles) + v * np.sin(angles))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a.astype(np.float64), b.astype(np.float64)))
    true = 2 / np.pi * np.arctan2(np.linalg.norm(x - y, axis=1), np.linalg.norm(x + y, axis=1))
    np.testing.assert_allclose(S.turned(jnp.asarray(a), jnp.asarray(b))["angular"], true, rtol=1e-4, atol=1e-7)
    assert true.min() < 1e-5


# -- against numpy -----------------------------------------------------------------------------------------------------


def by_hand(params, ids):
    """Streams, and the inputs of down and o, of the plain decoder in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["table"][ids]
    streams, zs, heads = [x], [], []
    mask = np.tril(np.ones((ids.shape[1],) * 2, bool))
    for w in p["layers"]:
        y = w["n1"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        q, k, v = ((y @ w[n]).reshape(*ids.shape, -1, plain.H) for n in "qkv")
        k, v = (np.repeat(a, 2, axis=2) for a in (k, v))
        logits = np.where(mask, np.einsum("bthd,bshd->bhts", q, k) / plain.H**0.5, -np.inf)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        a = np.einsum("bhts,bshd->bthd", e / e.sum(-1, keepdims=True), v).reshape(*ids.shape, -1)
        heads.append(a)
        x = x + a @ w["o"]
        y = w["n2"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        gate = y @ w["gate"]
        zs.append(gate / (1 + np.exp(-gate)) * (y @ w["up"]))
        x = x + zs[-1] @ w["down"]
        streams.append(x)
    return streams, zs, heads


def test_against_double_precision():
    streams, zs, heads = by_hand(PARAMS, IDS)
    stats = whole()
    assert stats.tokens == IDS.size
    for got, acts in ((stats.ffn, zs), (stats.attention, heads)):
        for m, z in zip(got, acts, strict=True):
            z = z.reshape(-1, z.shape[-1])
            np.testing.assert_allclose(m.x2, (z * z).sum(0), rtol=2e-5)
            np.testing.assert_allclose(m.mean, z.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(m.var, z.var(0), rtol=1e-4)
    for l in range(3):
        h, g = streams[l], streams[l + 1]
        cos = (h * g).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(g, axis=-1)
        d = g - h
        want = {"angular": np.arccos(cos) / np.pi, "cosine": 1 - cos, "mse": (d**2).mean(-1), "mae": abs(d).mean(-1)}
        want = {name: v.mean() for name, v in want.items()}
        assert {name: v[l] for name, v in stats.change.items()} == pytest.approx(want, rel=1e-5)
    m = stats.ffn[1]
    assert stats.x2[1] is m.x2 and stats.z_mean[1] is m.mean and stats.z_var[1] is m.var


@slow
@pytest.mark.parametrize("layer", [plain.behind, plain.beside_in_turn])
def test_the_stream_is_compared_around_the_whole_block(layer):
    """Norms behind the branches, or branches beside each other."""
    params = plain.params(depth=2)
    graph = jprune.trace(plain.decoder(layer), params, plain.IDS)
    x = params["table"][IDS]
    stats = S.block_stats(graph, params, [IDS])
    run = jax.jit(functools.partial(layer, heads=4, kv=2))
    for l, p in enumerate(params["layers"]):
        y = run(p, x)
        assert stats.change["mse"][l] == pytest.approx(float(((y - x) ** 2).mean()), rel=1e-4)
        x = y


# -- streams of batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(2, 4, 6), pytest.param((1, 2, 5), marks=slow)])
def test_batches_add_up(cuts):
    parts = S.block_stats(GRAPH, PARAMS, np.split(IDS, cuts))
    assert apart(parts, whole()) < 2e-6
    halves = [S.block_stats(GRAPH, PARAMS, [part]) for part in (IDS[:2], IDS[2:4], IDS[4:6], IDS[6:])]
    assert apart(halves[0] + halves[1] + (halves[2] + halves[3]), whole()) < 2e-6


def test_seeing_the_text_twice_changes_only_the_sums():
    twice = S.block_stats(GRAPH, PARAMS, [IDS, IDS])
    assert twice.tokens == 2 * whole().tokens
    np.testing.assert_allclose(twice.change["angular"], whole().change["angular"], rtol=1e-12)
    for a, b in zip(twice.ffn, whole().ffn, strict=True):
        np.testing.assert_allclose(a.x2, 2 * b.x2, rtol=1e-12)
        np.testing.assert_allclose(a.var, b.var, rtol=1e-6)


def test_empty_batches_are_skipped():
    assert apart(S.block_stats(GRAPH, PARAMS, [IDS[:0], IDS, IDS[8:]]), whole()) == 0
    with pytest.raises(ValueError, match="only empty ones"):
        S.block_stats(GRAPH, PARAMS, [IDS[:0]])


def test_states_of_the_step_add_up_too():
    """What is compiled ahead of time carries its sums along."""
    run, states = S.step_of(GRAPH)
    jax.tree.map(np.testing.assert_array_equal, run(states, PARAMS, IDS[:0])[1], states)
    step = jax.jit(lambda states, ids: run(states, PARAMS, ids)[1])
    for part in np.split(IDS, 4):
        states = step(states, part)
    assert apart(S.stats_of(GRAPH, states), whole()) < 2e-6
    lowered = jax.jit(run).lower(states, PARAMS, plain.IDS)
    assert "func.func" in lowered.as_text()


def test_half_precision_is_squared_and_summed_in_single():
    """Thousands of equal squares: bfloat16 sums would stop growing at 256 of them, and round every square."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain.params(depth=1))
    graph = jprune.trace(plain.decoder(), params, plain.IDS)
    ids = np.full((256, plain.TOKENS), 3)
    one, many = (S.block_stats(graph, params, [x]) for x in (ids[:1], ids))
    np.testing.assert_allclose(many.x2[0], 256 * one.x2[0], rtol=1e-3)
    probe = S._moments(graph.taps["layers/0/down"])  # called by itself: a compiler may leave roundings out
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50, plain.F)), jnp.bfloat16)
    _, squares, mean, _ = probe.update(probe.init, z)
    wide = np.asarray(z, np.float64).reshape(-1, plain.F)
    np.testing.assert_allclose(squares, (wide**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(mean, wide.mean(0), atol=1e-6)
    assert many.change["angular"] == pytest.approx(one.change["angular"], rel=1e-3)


# -- scans, layers, devices --------------------------------------------------------------------------------------------


@functools.cache
def decoder(family, scanned=False, remat=False):
    module = Llama(tiny(family), scanned, remat)
    v = weights(module.config, scanned=scanned)
    return module, v, S.block_stats(jprune.trace(module.apply, v, IDS[:2]), v, [IDS])


@pytest.mark.parametrize(
    ("family", "scanned", "remat"), [("qwen2", True, True), pytest.param("qwen2", True, False, marks=slow)]
)
def test_scanned_layers_are_rows(family, scanned, remat):
    assert apart(decoder(family, scanned, remat)[2], decoder(family)[2]) < 2e-6


@pytest.mark.parametrize(("scanned", "hold"), [pytest.param(False, "device", marks=slow), (True, "host")])
def test_one_layer_at_a_time(scanned, hold):
    """Windows differ between the layers; parameters lie in host memory."""
    module, _, stats = decoder("qwen2")
    tree = jax.tree.map(np.asarray, weights(module.config, scanned=scanned))
    embed, fns, params = pieces(module.config, tree)
    assert fns[1] is fns[2] and fns[0] is not fns[1] and len(params) == 3
    alone = S.layerwise_stats(embed, fns, params, [IDS[:4], IDS[4:]], hold=hold)
    assert apart(alone, stats) < 2e-6


def test_layers_see_what_was_made_of_those_before_them():
    revised = []

    def revise(i, graph, params, stats):
        revised.append((i, stats.tokens, blocks(graph)[0].down))
        return {**params, "down": params["down"] * (i != 1)}

    layer = functools.partial(plain.sequential, heads=4, kv=2)
    args = (lambda ids: PARAMS["table"][ids], layer, PARAMS["layers"], [IDS])
    got, plain_stats = S.layerwise_stats(*args, revise=revise), S.layerwise_stats(*args)
    assert revised == [(i, IDS.size, "down") for i in range(3)]
    cut = {**PARAMS, "layers": [{**p, "down": p["down"] * (i != 1)} for i, p in enumerate(PARAMS["layers"])]}
    want = S.block_stats(GRAPH, cut, [IDS])
    for l in range(3):
        np.testing.assert_allclose(got.x2[l], want.x2[l], rtol=1e-5)
    np.testing.assert_allclose(got.change["mse"][1], plain_stats.change["mse"][1], rtol=1e-6)  # before it is revised
    assert np.abs(got.x2[2] / plain_stats.x2[2] - 1).max() > 0.1


SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import plain_decoders as plain, jprune
from jprune.language import statistics as S
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
params = plain.params(depth=1)
graph = jprune.trace(plain.decoder(), params, plain.IDS)
ids = np.random.default_rng(2).integers(0, plain.V, (8, plain.TOKENS))
split = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "model") if x.ndim == 2 else P())), params)
here = S.block_stats(graph, params, [ids])
there = S.block_stats(graph, split, [jax.device_put(ids, NamedSharding(mesh, P("data")))])
pairs = zip(jax.tree.leaves((here.change, here.ffn)), jax.tree.leaves((there.change, there.ffn)))
print(json.dumps([here.tokens == there.tokens, max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)]))
"""


@slow
def test_sharded_text_and_weights():
    same, error = run_script(SCRIPT, Path(__file__).parent, Path(__file__).parents[1])
    assert same and error < 2e-6


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_no_text_and_no_block():
    with pytest.raises(ValueError, match="no batches"):
        S.block_stats(GRAPH, PARAMS, [])
    layer = functools.partial(plain.sequential, heads=4, kv=2)
    embed = PARAMS["table"].__getitem__
    with pytest.raises(ValueError, match="no batches"):
        S.layerwise_stats(embed, layer, PARAMS["layers"], [])
    with pytest.raises(ValueError, match="only empty ones"):
        S.layerwise_stats(embed, layer, PARAMS["layers"], [IDS[:0]])
    with pytest.raises(ValueError, match="'device' or 'host'"):
        S.layerwise_stats(embed, layer, PARAMS["layers"], [IDS], hold="disk")

    def two(p, x):
        return layer(p, layer(p, x))

    with pytest.raises(BlockError, match="holds 2 blocks"):
        S.layerwise_stats(embed, two, PARAMS["layers"], [IDS])
