"""Single weights in one shot: Wanda, SparseGPT and refitting against their definitions, of any traced function."""

import doctest
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import prompt, tiny, weights
from laws import normal

import jprune
from jprune.importance.output_norm import output_norm_gradients
from jprune.methods.weights import one_shot
from jprune.methods.weights.elimination import SparseGPTConfig, eliminate
from jprune.methods.weights.least_squares import refit
from jprune.methods.weights.one_shot import in_turn, layer_by_layer, magnitude, prunable, random, sparsegpt, wanda
from jprune.models.llama import Llama
from jprune.models.llama_blocks import pieces
from jprune.surgery.patterns import NM, Unstructured, apply, check
from jprune.tracing.errors import TraceError
from jprune.tracing.paths import flatten


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x)).mean((1, 2))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(16, name="hidden")(x)))


NET, X = Net(), normal(5, 16, 5, 5, 4)
PARAMS = jax.jit(NET.init)(jax.random.key(0), X)
GRAPH = jprune.trace(NET.apply, PARAMS, X)
LEAVES = prunable(GRAPH)


def matrix_problem(seed, out, into, samples=50):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, into)) @ rng.normal(size=(into, into))
    return rng.normal(size=(out, into)).astype(np.float32), (2 / samples * x.T @ x).astype(np.float32)


def by_direct_elimination(w, h, mask, damping):
    """Optimal brain surgeon, one column after the other, with the inverse of what is left (float64)."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    h = h + damping * h.diagonal().mean() * np.eye(len(h))
    for i in range(len(h)):
        inverse = np.linalg.inv(h[i:, i:])
        error = np.where(mask[:, i], 0.0, w[:, i]) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
        w[:, i] = np.where(mask[:, i], w[:, i], 0.0)
    return w


@pytest.mark.parametrize("block", [2, 4, 128])
def test_sparsegpt_is_the_elimination_of_one_column_after_the_other(block):
    w, h = matrix_problem(0, 5, 6)
    out = eliminate(w, h, 15, Unstructured("row"), SparseGPTConfig(block_size=block))
    assert (np.asarray(out.mask).sum(1) == 3).all() and float(out.damping) == pytest.approx(0.01)
    np.testing.assert_allclose(
        out.matrix, by_direct_elimination(w, h, np.asarray(out.mask), 0.01), rtol=2e-3, atol=2e-4
    )
    damped = h + 0.01 * h.diagonal().mean() * np.eye(6)
    moved = np.asarray(out.matrix) - w
    assert float(out.loss) == pytest.approx(0.5 * np.einsum("oi,ij,oj", moved, damped, moved), rel=1e-3)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(2, 4), NM(1, 4)])
def test_sparsegpt_keeps_its_pattern_and_beats_the_mask_alone(pattern):
    w, h = matrix_problem(1, 12, 16)
    kept = 12 * 16 * (pattern.keep if isinstance(pattern, NM) else 2) // 4
    out = eliminate(w, h, kept, pattern, SparseGPTConfig(block_size=8))
    assert int(out.mask.sum()) == kept and not np.asarray(out.matrix)[~np.asarray(out.mask)].any()

    def error(new):
        return np.einsum("oi,ij,oj", new - w, h, new - w)

    assert error(np.asarray(out.matrix)) < 0.95 * error(np.where(out.mask, w, 0))


def test_inputs_that_are_always_zero_lose_their_weights_first():
    w, h = matrix_problem(2, 4, 8)
    h[3], h[:, 3] = 0, 0
    out = eliminate(w, h, 16)
    assert not np.asarray(out.mask)[:, 3].any() and np.isfinite(out.matrix).all()


def test_a_damping_that_is_too_small_is_raised_and_told():
    w, _ = matrix_problem(3, 4, 8)
    x = np.ones((3, 8), np.float32) * 1e3
    out = eliminate(w, x.T @ x, 16, config=SparseGPTConfig(damping=1e-12))
    assert np.isfinite(out.matrix).all() and float(out.damping) > 1e-9
    params, x = {"w": w.T}, jnp.asarray(x)
    graph = jprune.trace(lambda p, x: x @ p["w"], params, x)
    found = sparsegpt(graph, params, [x], ["w"], 0.5, config=SparseGPTConfig(damping=1e-12))
    assert found.notes["raised_damping"]["w"] > 1e-9


def test_patterns_that_it_cannot_follow_are_refused():
    w, h = matrix_problem(4, 4, 6)
    for pattern, why in ((NM(2, 4), "does not divide 6 inputs"), (Unstructured("column"), "cannot follow column")):
        with pytest.raises(ValueError, match=why):
            eliminate(w, h, 12, pattern)
    with pytest.raises(ValueError, match="damping is 0"):
        SparseGPTConfig(damping=0.0)


def test_wanda_weighs_each_weight_with_its_input_and_keeps_as_many_of_every_output():
    found = wanda(GRAPH, PARAMS, [X[:9], X[9:]], LEAVES, 0.5)
    assert LEAVES == ("params/conv/kernel", "params/hidden/kernel")
    kernel = np.asarray(PARAMS["params"]["conv"]["kernel"])
    padded = np.pad(np.asarray(X), ((0, 0), (1, 1), (1, 1), (0, 0)))
    squares = np.stack([[(padded[:, i : i + 5, j : j + 5] ** 2).sum((0, 1, 2)) for j in range(3)] for i in range(3)])
    score = (np.abs(kernel) * np.sqrt(squares)[..., None]).reshape(-1, 8)
    mask = np.asarray(found.masks["params/conv/kernel"]).reshape(-1, 8)
    for o in range(8):
        assert mask[:, o].sum() == 18 and score[mask[:, o], o].min() >= score[~mask[:, o], o].max()
    new = dict(flatten(found.params))
    for p, m in found.masks.items():
        np.testing.assert_array_equal(new[p], np.where(m, dict(flatten(PARAMS))[p], 0))
    np.testing.assert_array_equal(found.params["params"]["head"]["kernel"], PARAMS["params"]["head"]["kernel"])


def test_a_whole_leaf_is_compared_where_that_is_asked_for():
    path = "params/hidden/kernel"
    kept = {
        p: np.asarray(wanda(GRAPH, PARAMS, [X], [path], 0.5, p).masks[path]).sum(0)
        for p in ("unstructured", "row", "leaf")
    }
    np.testing.assert_array_equal(kept["unstructured"], kept["row"])
    assert len(set(kept["row"])) == 1 and len(set(kept["leaf"])) > 1 and kept["leaf"].sum() == kept["row"].sum()


def test_the_score_of_wanda_plus_plus_adds_gradients_of_the_outputs_norm():
    params, x = {"w": normal(1, 12, 8)}, normal(3, 6, 5, 12)  # six samples of five rows
    graph = jprune.trace(lambda p, x: x @ p["w"], params, x)
    w, rows = np.asarray(params["w"], np.float64), np.asarray(x, np.float64)
    gradients = [a.T @ (a @ w) / np.linalg.norm(a @ w) for a in rows]  # of |a w|_2, sample by sample
    rms = np.sqrt(np.mean(np.square(gradients), 0))
    score = np.abs(w) * (np.linalg.norm(rows.reshape(-1, 12), axis=0)[:, None] + 100 * rms)
    found = wanda(graph, params, [x[:4], x[4:]], ["w"], 0.5, gradient_weight=100.0)
    np.testing.assert_array_equal(found.masks["w"], np.argsort(np.argsort(-score, 0), 0) < 6)
    plain = wanda(graph, params, [x], ["w"], 0.5)
    assert not np.array_equal(plain.masks["w"], found.masks["w"])
    np.testing.assert_allclose(output_norm_gradients(graph, params, [x[:4], x[4:]], ["w"])["w"], rms, rtol=1e-4)
    zero = output_norm_gradients(graph, {"w": jnp.zeros((12, 8))}, [x], ["w"])
    assert not np.asarray(zero["w"]).any()
    with pytest.raises(ValueError, match="gradient_weight is -1"):
        wanda(graph, params, [x], ["w"], 0.5, gradient_weight=-1)
    with pytest.raises(ValueError, match="'w' hold NaN or infinity"):
        output_norm_gradients(graph, {"w": params["w"].at[0, 0].set(jnp.inf)}, [x], ["w"])
    with pytest.raises(TraceError, match="no batches"):
        output_norm_gradients(graph, params, [], ["w"])


def test_the_examples_run():
    assert doctest.testmod(one_shot).failed == 0


def by_bisected_share(score, sparsity):
    """The mask that the authors' loop ends with: alpha in [0, 0.8], until the sparsity is within 0.001 (float64)."""
    ordered = np.sort(score, 1)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        removed = (np.cumsum(ordered, 1) <= alpha * ordered.sum(1, keepdims=True)).sum(1)
        if abs(removed.sum() / score.size - sparsity) < 1e-3 or high - low < 1e-3:
            return np.argsort(np.argsort(score, 1), 1) >= removed[:, None]
        low, high = (low, alpha) if removed.sum() / score.size > sparsity else (alpha, high)
        alpha = (low + high) / 2


def test_wanda_by_share_removes_the_same_share_of_every_output_and_an_exact_number():
    params, x = {"w": normal(1, 40, 24), "head": normal(2, 24, 2)}, normal(3, 30, 40)
    params["w"] = params["w"] * jnp.exp(normal(4, 24)) * jnp.exp(2 * normal(5, 40, 24))  # rows that differ in kind
    graph = jprune.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"], params, x)
    score = np.abs(np.asarray(params["w"], np.float64).T) * np.linalg.norm(np.asarray(x, np.float64), axis=0)
    want = by_bisected_share(score, 0.5)
    assert 0.4 < want.mean() < 0.6 and len(set(want.sum(1).tolist())) > 5
    found = wanda(graph, params, [x[:11], x[11:]], ["w"], float(1 - want.mean()), by_share=True)
    np.testing.assert_array_equal(np.asarray(found.masks["w"]).T, want)
    exact = wanda(graph, params, [x], ["w"], 0.5, by_share=True)
    assert int(exact.masks["w"].sum()) == 480
    for refused in ("2:4", "row", "block:2x2"):
        with pytest.raises(ValueError, match="different numbers of weights"):
            wanda(graph, params, [x], ["w"], None if refused == "2:4" else 0.5, refused, by_share=True)


@pytest.mark.parametrize("prune", [magnitude, wanda, sparsegpt, random])
def test_two_of_every_four_inputs_stay(prune):
    found = prune(GRAPH, PARAMS, [X], ["params/hidden/kernel"], None, "2:4")
    assert check(found.masks, "2:4") == {"params/hidden/kernel": "2:4 holds"}
    assert all(int(m.sum()) * 2 == m.size for m in found.masks.values())


def test_a_decoder_layer_by_layer_sees_what_the_pruned_layers_pass_on():
    config, params = tiny(), weights(tiny())
    ids, _ = prompt(tokens=5)
    embed, blocks, layers = pieces(config, params)
    found = layer_by_layer(wanda, (embed, blocks, layers), [ids[:1], ids[1:]], 0.5, hold="host")
    stream = dense = embed(ids)
    run, graph = jax.jit(blocks[0]), jprune.trace(blocks[0], layers[0], stream)
    for own, got in zip(layers, found, strict=True):
        want = wanda(graph, own, [stream], tuple(got.masks), 0.5)
        jax.tree.map(np.testing.assert_array_equal, want.masks, got.masks)
        stream, dense = run(got.params, stream), run(own, dense)
    assert float(jnp.abs(stream - dense).max()) > 1e-3  # or the order could not matter
    with pytest.raises(ValueError, match="no batches"):
        layer_by_layer(wanda, (embed, blocks, layers), [], 0.5)
    with pytest.raises(ValueError, match="hold is 'device' or 'host'"):
        layer_by_layer(wanda, (embed, blocks, layers), [ids], 0.5, hold="disk")
    assert "head" not in " ".join(prunable(jprune.trace(Llama(config).apply, params, ids)))


@pytest.mark.slow
def test_gradients_beside_inputs_are_those_of_each_layers_own_outputs():
    config, params = tiny(), weights(tiny())
    ids, _ = prompt(tokens=5)
    embed, blocks, layers = pieces(config, params)
    plus = functools.partial(wanda, gradient_weight=100.0)
    found = layer_by_layer(plus, (embed, blocks, layers), [ids[:1], ids[1:]], 0.5)
    graph = jprune.trace(blocks[0], layers[0], embed(ids))
    masks = [p(graph, layers[0], [embed(ids)], tuple(found[0].masks), 0.5).masks for p in (plus, wanda)]
    jax.tree.map(np.testing.assert_array_equal, masks[0], found[0].masks)
    assert any(not np.array_equal(m, masks[1][p]) for p, m in masks[0].items())


def test_leaves_in_turn_see_what_the_pruned_ones_before_them_pass_on():
    got = in_turn(wanda, GRAPH, PARAMS, [X], LEAVES, 0.6)
    first = wanda(GRAPH, PARAMS, [X], LEAVES[:1], 0.6)
    second = wanda(GRAPH, first.params, [X], LEAVES[1:], 0.6)
    dense = wanda(GRAPH, PARAMS, [X], LEAVES, 0.6)
    jax.tree.map(np.testing.assert_array_equal, got.masks, first.masks | second.masks)
    jax.tree.map(np.testing.assert_array_equal, got.params, second.params)
    assert (got.masks[LEAVES[1]] != dense.masks[LEAVES[1]]).any()
    assert [int(m.sum()) for m in got.masks.values()] == [int(m.sum()) for m in dense.masks.values()]
    with pytest.raises(ValueError, match="over the whole model"):
        in_turn(magnitude, GRAPH, PARAMS, [X], LEAVES, 0.6, "model")


def test_refitting_solves_the_normal_equations_of_every_output():
    masks = magnitude(GRAPH, PARAMS, [X], LEAVES, 0.7).masks
    new = refit(GRAPH, PARAMS, masks, [X[:8], X[8:]])

    def hidden_inputs(params):
        return np.asarray(
            nn.relu(nn.Conv(8, (3, 3)).apply({"params": params["params"]["conv"]}, X)).mean((1, 2)), np.float64
        )

    a, x = hidden_inputs(new), hidden_inputs(PARAMS)
    w0, got = (np.asarray(p["params"]["hidden"]["kernel"], np.float64) for p in (PARAMS, new))
    mask = np.asarray(masks["params/hidden/kernel"])
    h, r = a.T @ a, 0.01 * np.diagonal(a.T @ a).mean()
    assert not got[~mask].any()
    for o in range(16):
        s = mask[:, o]
        left, right = h[np.ix_(s, s)] + r * np.eye(s.sum()), (a.T @ (x @ w0[:, o]))[s] + r * w0[s, o]
        np.testing.assert_allclose(got[s, o], np.linalg.solve(left, right), rtol=1e-3, atol=1e-5)
    out = jax.jit(NET.apply)
    errors = [float(((out(p, X) - out(PARAMS, X)) ** 2).mean()) for p in (new, apply(PARAMS, masks))]
    assert errors[0] < 0.7 * errors[1]
    with pytest.raises(ValueError, match="at least one batch"):
        refit(GRAPH, PARAMS, masks, [])
