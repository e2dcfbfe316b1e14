"""CFSP against closed forms, an implementation of its own in numpy, and the error that removing a channel really makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoders as plain
import pytest
from decoders import tiny, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import relative

import jprune
from jprune.budget import channel_counts, proportional_ranks
from jprune.language.blocks import blocks
from jprune.language.statistics import BlockStats, Moments, block_stats
from jprune.methods.channels.cfsp import CFSPConfig, allocate_keep_ratios, cfsp, cfsp_keep, lora_ranks
from jprune.methods.channels.decoder_channels import FINE, channel_scores, removed, select
from jprune.models.llama import Llama, unstack_layers

PARAMS = plain.params(depth=3)
IDS = np.random.default_rng(2).integers(0, plain.V, (8, plain.TOKENS))
GRAPH = jprune.trace(plain.decoder(), PARAMS, plain.IDS)
FOUND = blocks(GRAPH)
ANY = CFSPConfig(multiple_of=None)
importances = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(np.array)
sparsities = st.floats(0, 0.95)


@functools.cache
def stats():
    return block_stats(GRAPH, PARAMS, [IDS])


# -- budget over blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "keep", "plus_one", "multiples"),
    [
        (0.5, [0.78763361, 0.21236639, 0.5], [8671, 2338, 5505], [8704, 2304, 5504]),
        (0.2, [0.99047619, 0.60952381, 0.8], [10904, 6710, 8807], [10880, 6656, 8832]),
    ],
)
def test_three_blocks(sparsity, keep, plus_one, multiples):
    """Both branches; the widest block of the second keeps 1 - p / 21."""
    got = allocate_keep_ratios(np.array([0.3, 0.1, 0.2]), sparsity)
    np.testing.assert_allclose(got, keep, atol=5e-9)
    assert channel_counts(got, 11008, multiple_of=None, official_counts=True).tolist() == plus_one
    assert channel_counts(got, 11008).tolist() == multiples
    if sparsity == 0.2:
        assert got.max() == pytest.approx(1 - sparsity / 21, abs=1e-12)


@settings(deadline=None)
@given(importances, sparsities, st.floats(0.1, 8))
def test_the_mean_is_the_budget_and_nobody_keeps_more_than_all(m, sparsity, a):
    keep = allocate_keep_ratios(m, sparsity, a=a)
    assert keep.mean() == pytest.approx(1 - sparsity, abs=1e-12)
    assert (keep > 0).all() and (keep <= 1 + 1e-12).all()
    assert (np.diff(keep[np.argsort(m)]) >= -1e-12).all()  # never less for a more important block


@settings(deadline=None)
@given(importances, sparsities, st.floats(0, 1))
def test_a_floor_keeps_the_mean(m, sparsity, share):
    floor = share * (1 - sparsity)
    keep = allocate_keep_ratios(m, sparsity, min_keep=floor)
    assert keep.mean() == pytest.approx(1 - sparsity, abs=1e-9)
    assert keep.min() >= floor - 1e-12 and keep.max() <= 1 + 1e-9


def test_the_unit_of_importance_is_one_token():
    """Means over tokens: how much text there is does not matter; kappa is the authors' 131072 tokens over 1e4."""
    sums = np.array([0.3, 0.1, 0.2]) * 131072
    x = (sums - sums.mean()) / 1e4
    s = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(allocate_keep_ratios(np.array([0.3, 0.1, 0.2]), 0.5), s / s.mean() * 0.5, rtol=1e-12)
    twice = block_stats(GRAPH, PARAMS, [IDS, IDS])
    one, two = (cfsp_keep(GRAPH, PARAMS, s, 0.5, ANY)[1] for s in (stats(), twice))
    np.testing.assert_allclose(two.keep_ratios, one.keep_ratios, rtol=1e-12)
    assert two.counts == one.counts


# -- counts ------------------------------------------------------------------------------------------------------------


def test_no_block_is_emptied_or_overfilled():
    """Where the authors' rounding gives 0, their code keeps all channels; above the width it fails."""
    assert channel_counts(np.array([62.2 / 256]), 256).tolist() == [128]
    assert channel_counts(np.array([0.1, 0.9, 1.0]), 200).tolist() == [128, 128, 200]
    assert channel_counts(np.array([1.0]), 10, multiple_of=None, official_counts=True).tolist() == [10]
    assert channel_counts(np.array([0.5, 0.5]), [300, 512]).tolist() == [128, 256]


@settings(deadline=None)
@given(importances, sparsities, st.integers(1, 40), st.integers(1, 16))
def test_counts(m, sparsity, channels, step):
    keep = allocate_keep_ratios(m, sparsity)
    width = max(channels, step)
    counts, exact = (channel_counts(keep, width, multiple_of=step, exact_budget=e) for e in (False, True))
    for c in (counts, exact):
        assert ((c % step == 0) | (c == width)).all() and (c >= step).all() and (c <= width).all()
    free = (keep * width > step) & (keep * width < width // step * step)
    assert (abs(counts - keep * width)[free] <= step / 2 + 1e-6).all()
    target = width * keep.sum()
    assert abs(exact.sum() - target) <= abs(counts.sum() - target) + 1e-9
    if width % step == 0 and step * len(m) <= target:
        together = np.unique(keep, return_counts=True)[1].max()  # layers that ask for the same move together
        assert abs(exact.sum() - target) <= together * step / 2 + 1e-6


def test_layers_that_ask_for_the_same_keep_the_same():
    """30 layers of 1536 channels at 0.3: 1075.2 each, whose total only six layers of 1076 would meet."""
    assert set(channel_counts(np.full(30, 0.7), 1536, multiple_of=None, exact_budget=True).tolist()) == {1075}
    keep = np.array([0.53, 0.53, 0.53, 0.41])  # two classes of layers: three move together, one alone
    counts = channel_counts(keep, 100, multiple_of=10, exact_budget=True)
    assert counts[0] == counts[1] == counts[2] and abs(counts.sum() - 200) <= abs(50 * 3 + 40 - 200)


def test_an_exact_budget_takes_from_the_largest_residual():
    assert channel_counts(np.array([0.54, 0.56, 0.5]), 100, multiple_of=10).tolist() == [50, 60, 50]
    keep = np.array([0.56, 0.57, 0.58, 0.29])  # 60 60 60 30 is 10 too many: the first was rounded up most
    assert channel_counts(keep, 100, multiple_of=10, exact_budget=True).tolist() == [50, 60, 60, 30]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: channel_counts(np.array([0.5]), 96), "multiple of 128"),
        (lambda: channel_counts(np.array([0.5]), 96, multiple_of=8, official_counts=True, exact_budget=True), "design"),
        (lambda: allocate_keep_ratios(np.array([0.1]), 1.0), "in \\[0, 1\\)"),
        (lambda: allocate_keep_ratios(np.array([0.1]), 0.5, min_keep=0.6), "at most that"),
        (lambda: allocate_keep_ratios(np.array([0.1, np.nan]), 0.5), "layer 1 is not finite"),
        (lambda: CFSPConfig(coarse="angle"), "coarse must be one of"),
        (lambda: CFSPConfig(fine="l1"), "fine must be one of"),
        (lambda: CFSPConfig(slack=1.0), "slack above 1"),
        (lambda: lora_ranks(np.array([0.1]), direction="up"), "'important' or 'damaged'"),
        (lambda: lora_ranks(np.array([0.1]), 64), "must lie in"),
        (lambda: channel_scores(GRAPH, PARAMS, stats(), kind="random"), "need key"),
        (lambda: channel_scores(GRAPH, PARAMS, stats(), kind="norm"), "kind must be one of"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# -- scores ------------------------------------------------------------------------------------------------------------


def one_layer(wd, wu, wg, x):
    """Scores of a residual gated MLP with these matrices (outputs, inputs) and activation norms."""

    def fn(p, ids):
        h = p["table"][ids]
        return h + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    wd, wu, wg = (jnp.asarray(w, jnp.float32) for w in (wd, wu, wg))
    p = {"table": jnp.ones((5, wd.shape[0])), "gate": wg.T, "up": wu.T, "down": wd.T}
    graph = jprune.trace(fn, p, jnp.zeros((2, 3), jnp.int32))
    x = np.asarray(x, np.float64)
    made = BlockStats(1, {}, (Moments(x**2, 0 * x, 0 * x),), (None,))

    def score(kind, **options):
        (value,) = channel_scores(graph, p, made, kind=kind, **options).values()
        return value

    return score


def test_the_authors_score_is_the_activation_norm():
    """(3 / d) X^c, whatever the weights are and whatever b is."""
    rng = np.random.default_rng(0)
    wd, wu, wg = rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    score = one_layer(wd, wu, wg, [1, 2, 3])
    np.testing.assert_allclose(score("official"), [1, 2, 3], rtol=1e-6)  # d = 3
    np.testing.assert_allclose(score("official", b=5.0), [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(score("official", c=0.5), np.sqrt([1, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(one_layer(wd * [5, 0.1, 2], 7 * wu, wg, [1, 2, 3])("official"), [1, 2, 3], rtol=1e-6)


def test_scores_by_hand():
    wd, ones = [[1, 3], [2, 2]], [[1, 1], [1, 1]]
    score = one_layer(wd, ones, ones, [1, 3])
    np.testing.assert_allclose(score("eq8"), [2.1875, 2.9375], rtol=1e-6)
    np.testing.assert_allclose(score("relative3"), [2.75, 9.75], rtol=1e-6)
    np.testing.assert_allclose(score("wanda"), [1.5, 7.5], rtol=1e-6)
    np.testing.assert_allclose(score("magnitude"), np.sqrt([5, 13]), rtol=1e-6)


def test_zero_columns_score_zero():
    """The authors' score is NaN there."""
    wd, ones = [[0.0, 3], [0, 2]], [[1, 1], [1, 1]]
    score = one_layer(wd, ones, ones, [1, 3])
    np.testing.assert_allclose(score("official"), [0, 3 / 2 * 3], rtol=1e-6)
    dead = one_layer(wd, ones, [[0, 0], [1, 1]], [0, 3])
    for kind in ("official", "eq8", "relative3", "wanda", "magnitude"):
        assert np.isfinite(dead(kind)).all() and np.argmin(dead(kind)) == 0


def by_hand(kind, down, up, gate, x):
    """Scores from matrices (outputs, inputs) in double precision; 3.4 of its description, entry by entry."""
    d, (a, u, g) = len(down), (np.abs(w) for w in (down, up, gate))
    if kind == "official":
        s = a * x / (a * x).sum(0) + u.T / u.sum(1) + g.T / g.sum(1)
        return (s * x).mean(0)
    if kind == "eq8":
        return (a * x / (a.sum(1, keepdims=True) * x.sum())).sum(0) + 2
    if kind == "relative3":
        return x * ((a / a.sum(1, keepdims=True)).sum(0) + (u / u.sum(0)).sum(1) + (g / g.sum(0)).sum(1))
    return a.sum(0) / d * x if kind == "wanda" else np.linalg.norm(a, axis=0)


@pytest.mark.parametrize("kind", [k for k in FINE if k != "random"])
def test_scores_and_choice_against_double_precision(kind):
    options = CFSPConfig(multiple_of=4, fine=kind, exact_budget=True)
    keep, report = cfsp_keep(GRAPH, PARAMS, stats(), 0.4, options, FOUND)
    for l, (p, b) in enumerate(zip(PARAMS["layers"], FOUND, strict=True)):
        w = [np.asarray(p[n], np.float64).T for n in ("down", "up", "gate")]
        want = by_hand(kind, *w, np.sqrt(stats().x2[l]))
        np.testing.assert_allclose(channel_scores(GRAPH, PARAMS, stats(), FOUND, kind)[b.ffn], want, rtol=2e-5)
        best = np.sort(np.argsort(-want, kind="stable")[: report.counts[l]])
        assert np.flatnonzero(keep[b.ffn]).tolist() == best.tolist()
    assert report.widths == (24, 24, 24) and sum(report.counts) == 44  # the multiple of 4 nearest to 43.2
    assert report.drift == pytest.approx(0.8 / 72)


def fused(layout):
    """The same decoder with gate and up in one array, as other codebases keep them."""

    def mlp(p, x):
        if layout == "2Fd":
            gate, up = jnp.einsum("...d,nfd->n...f", x, p["wi"])
        elif layout == "d2F":
            gate, up = jnp.split(x @ p["wi"], 2, axis=-1)
        else:
            gate, up = jnp.einsum("...d,dnf->n...f", x, p["wi"])
        return (jax.nn.silu(gate) * up) @ p["down"]

    def layer(p, x, **heads):
        x = x + plain.attention(p, plain.norm(x, p["n1"]), **heads)
        return x + mlp(p, plain.norm(x, p["n2"]))

    def convert(p):
        both = jnp.stack([p["gate"], p["up"]])
        wi = {"2Fd": both.transpose(0, 2, 1), "d2F": jnp.concatenate(both, 1), "dnF": both.transpose(1, 0, 2)}[layout]
        return {**{n: x for n, x in p.items() if n not in ("gate", "up")}, "wi": wi}

    return layer, {**PARAMS, "layers": [convert(p) for p in PARAMS["layers"]]}


@pytest.mark.parametrize("layout", ["2Fd", "d2F", "dnF"])
def test_fused_matrices_give_the_same_channels(layout):
    layer, params = fused(layout)
    graph = jprune.trace(plain.decoder(layer), params, plain.IDS)
    for kind in ("official", "eq8", "relative3"):
        options = CFSPConfig(multiple_of=None, fine=kind)
        a, b = (cfsp_keep(g, p, stats(), 0.5, options)[0] for g, p in ((GRAPH, PARAMS), (graph, params)))
        for one, other in zip(blocks(GRAPH), blocks(graph), strict=True):
            assert a[one.ffn].tolist() == b[other.ffn].tolist()


def test_permuted_channels_permute_the_choice():
    order = np.random.default_rng(0).permutation(plain.F)
    moved = {**PARAMS, "layers": [
        {**p, "gate": p["gate"][:, order], "up": p["up"][:, order], "down": p["down"][order]} for p in PARAMS["layers"]
    ]}  # fmt: skip
    for kind in ("eq8", "relative3"):
        options = CFSPConfig(multiple_of=None, fine=kind)
        a, b = (cfsp(GRAPH, p, [IDS], 0.5, options)[0] for p in (PARAMS, moved))
        assert all(a[g][order].tolist() == b[g].tolist() for g in a)


def test_ties_go_to_the_lowest_index():
    scores = {b.ffn: np.ones(plain.F) for b in FOUND}
    keep = select(GRAPH, scores, [5, 24, 1], FOUND)
    assert [np.flatnonzero(keep[b.ffn]).tolist() for b in FOUND] == [list(range(5)), list(range(24)), [0]]


# -- what a score is worth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_scores_follow_the_error_that_removal_makes(seed):
    """Removing channel i alone changes the output by X_i |Wd_:i|_2 exactly; rank correlations with it."""
    rng = np.random.default_rng(seed)
    d, f, n = 32, 128, 512
    wu, wg, wd = (rng.normal(size=s) * np.exp(0.7 * rng.normal(size=k)) for s, k in
                  (((f, d), (f, 1)), ((f, d), (f, 1)), ((d, f), (1, f))))  # fmt: skip
    y = rng.normal(size=(n, d))
    gate = y @ wg.T / d**0.5
    z = gate / (1 + np.exp(-gate)) * (y @ wu.T / d**0.5)
    true = [np.linalg.norm(np.outer(z[:, i], wd[:, i])) for i in range(f)]
    score = one_layer(wd, wu, wg, np.linalg.norm(z, axis=0))

    def spearman(a, b):
        ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
        return np.corrcoef(*ranks)[0, 1]

    rho = {kind: spearman(score(kind), true) for kind in ("official", "eq8", "relative3", "wanda")}
    assert rho["eq8"] >= 0.99 and rho["wanda"] >= 0.99 and rho["official"] <= 0.9
    assert rho["official"] < rho["relative3"] < rho["eq8"]


# -- on decoders -------------------------------------------------------------------------------------------------------


@functools.cache
def decoder(scanned):
    module = Llama(tiny("qwen2"), scanned)
    v = weights(module.config, scanned=scanned)
    return module, v, jprune.trace(module.apply, v, IDS[:2])


def rows(graph, keep):
    return [k for b in blocks(graph) for k in np.atleast_2d(keep[b.ffn]).tolist()]


def test_scanned_and_unrolled_layers_keep_the_same_channels():
    (_, v, loop), (_, w, scan) = decoder(False), decoder(True)
    found = {}
    for kind in ("official", "relative3"):
        options = CFSPConfig(multiple_of=8, fine=kind, a=2.0)
        s = found.setdefault("stats", block_stats(loop, v, [IDS]))
        a, b = (cfsp_keep(g, p, s, 0.5, options) for g, p in ((loop, v), (scan, w)))
        assert rows(loop, a[0]) == rows(scan, b[0]) and a[1].counts == b[1].counts and len(set(a[1].counts)) > 1
        assert a[1].removed == pytest.approx(b[1].removed)


def test_the_masked_decoder_is_the_sliced_one():
    module, v, graph = decoder(True)
    keep, report = cfsp(graph, v, [IDS], 0.4, CFSPConfig(multiple_of=8))
    assert graph.groups[next(iter(keep))].exact
    want = jax.jit(module.apply)(graph.mask(v, keep), IDS[:2])
    small = graph.compact(v, graph.decide(keep, stacked="unstack"))
    sizes = [
        x["mlp"]["down"]["kernel"].shape[0] for n, x in sorted(unstack_layers(small)["params"].items()) if "layer" in n
    ]
    assert sizes == list(report.counts)
    assert relative(jax.jit(graph.replay(graph.decide(keep, stacked="unstack")))(small, IDS[:2]), want) < 1e-4
    n = {True: sum(x.size for x in jax.tree.leaves(small)), False: sum(x.size for x in jax.tree.leaves(v))}
    assert report.removed["parameters"] == pytest.approx(1 - n[True] / n[False], abs=1e-12)


def test_one_width_keeps_the_scan():
    _, v, graph = decoder(True)
    keep, report = cfsp(graph, v, [IDS], 0.5, CFSPConfig(multiple_of=8, uniform_width=True, a=8.0))
    assert report.counts == (24, 24, 24) and len(set(report.importance)) == 3
    (k,) = keep.values()
    assert k.sum(1).tolist() == [24] * 3 and k[0].tolist() != k[1].tolist()


def test_nothing_removed_at_zero():
    for options in (ANY, CFSPConfig(multiple_of=7), CFSPConfig(multiple_of=None, official_counts=True)):
        keep, report = cfsp_keep(GRAPH, PARAMS, stats(), 0.0, options)
        assert all(k.all() for k in keep.values()) and report.removed["parameters"] == 0 and report.drift == 0


@pytest.mark.parametrize("coarse", ["angular", "cosine", "mse", "mae", "uniform"])
def test_every_measure_of_a_block(coarse):
    _, report = cfsp_keep(GRAPH, PARAMS, stats(), 0.5, CFSPConfig(coarse=coarse, multiple_of=None, a=0.2))
    want = np.zeros(3) if coarse == "uniform" else stats().change[coarse]
    assert report.importance == tuple(want)
    assert (
        (np.argsort(report.keep_ratios) == np.argsort(want)).all()
        if coarse != "uniform"
        else len(set(report.counts)) == 1
    )


def test_sparsity_is_counted_three_ways():
    keep = {b.ffn: np.arange(plain.F) < n for b, n in zip(FOUND, (24, 12, 6), strict=True)}
    d, f = plain.D, plain.F
    gone = (12 + 18) * 3 * d
    attention = 2 * d * 16 + 2 * d * 8
    linear = 3 * (attention + 3 * d * f)
    every = linear + 3 * 2 * d + 2 * plain.V * d
    want = {"ffn_channels": 30 / 72, "block_linear_weights": gone / linear, "parameters": gone / every}
    assert removed(GRAPH, keep) == pytest.approx(want, abs=1e-12)


def test_random_scores_come_from_the_seed():
    options = [CFSPConfig(multiple_of=None, fine="random", seed=seed) for seed in (0, 0, 1)]
    a, b, c = (cfsp_keep(GRAPH, PARAMS, stats(), 0.5, o)[0] for o in options)
    assert all((a[g] == b[g]).all() for g in a) and any((a[g] != c[g]).any() for g in a)


def test_layers_that_share_channels_are_refused():
    def fn(p, ids):
        x = p["table"][ids]
        for _ in range(2):
            x = x + plain.mlp(p["layers"][0], plain.norm(x, p["layers"][0]["n2"]))
        return x

    graph = jprune.trace(fn, plain.params(depth=1), plain.IDS)
    with pytest.raises(ValueError, match="share the channels"):
        cfsp(graph, plain.params(depth=1), [IDS], 0.5, ANY)


# -- recovery ----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    assert proportional_ranks(np.array([3.0, 1.0]), 8).tolist() == [12, 4]
    assert proportional_ranks(np.array([3.0, 1.0]), 8, r_max=10).tolist() == [10, 6]
    assert proportional_ranks(np.array([1.0, 1.0, 1.0]), 8).tolist() == [8, 8, 8]
    assert proportional_ranks(np.array([12.6, 6.2, 5.2]), 8).tolist() == [13, 6, 5]  # to the largest remainder


@settings(deadline=None)
@given(importances, st.integers(1, 32), st.sampled_from(["important", "damaged"]))
def test_ranks_keep_their_sum_and_follow_importance(m, r_avg, direction):
    ranks = lora_ranks(m, r_avg, direction=direction, r_min=min(2, r_avg))
    assert ranks.sum() == r_avg * len(m) and ranks.min() >= min(2, r_avg) and ranks.max() <= 32
    order = np.argsort(m, kind="stable")
    steps = np.diff(ranks[order]) if direction == "important" else -np.diff(ranks[order])
    assert (steps >= -1).all()  # equal shares differ by the one that rounding leaves over
