"""LoRAPrune: scores, moving averages, schedule and masks against closed forms and element loops; and the whole loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import tiny, weights
from four_devices import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import normal, relative

import jprune
from jprune.checkpoint.layouts import LINEN, LINEN_SCAN, view
from jprune.language.finetune import next_token
from jprune.language.lora import Lora, LoraConfig, adapted, init
from jprune.methods.channels.loraprune import loraprune as lp
from jprune.methods.channels.loraprune import masks as lm
from jprune.methods.channels.loraprune import run
from jprune.methods.channels.loraprune.loraprune import group_importance, lora_sensitivity, weight_sensitivity
from jprune.models.llama import Llama
from jprune.surgery.products import product
from jprune.tracing.paths import flatten
from jprune.training import TuningConfig
from jprune.training.state import init_state

SMALL = {"vocab": 20, "stream": 16, "ffn": 12, "depth": 4}
CONFIG = LoraConfig(rank=2, alpha=3.0)
OPTIONS = run.LoraPruneConfig(every=2, skip_first=1, lora=CONFIG, chunk=7)


def ids(step, rows=4, tokens=6):
    return jnp.asarray(np.random.default_rng(step).integers(0, 20, (rows, tokens)), jnp.int32)


@functools.cache
def decoder(scanned=True, kv=2):
    """(module, variables, graph)."""
    module = Llama(tiny("llama", kv_heads=kv, **SMALL), scanned)
    v = weights(module.config, scanned=scanned)
    return module, v, jprune.trace(module.apply, v, ids(0))


@functools.cache
def learnt(scanned=True, kv=2):
    """(adapters, gradients of them): any numbers of the right shapes."""
    _, _, graph = decoder(scanned, kv)
    rng = np.random.default_rng(5)
    lora = init(jax.random.key(0), graph, CONFIG)
    some = {t: {"a": f["a"], "b": jnp.asarray(rng.normal(size=f["b"].shape) / 9, jnp.float32)} for t, f in lora.items()}
    lora = Lora(some, lora.scales)
    return lora, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 5, jnp.float32), lora)


# -- one matrix ------------------------------------------------------------------------------------------------------

W = jnp.array([[1.0, 2], [3, 4]])
A, B, GA, GB = jnp.array([[1.0, 0]]), jnp.array([[0.0], [1]]), jnp.array([[0.5, -1]]), jnp.array([[2.0], [1]])


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_sensitivity_in_closed_form(chunk):
    score = functools.partial(lora_sensitivity, W, A, B, GA, GB, scale=2.0, chunk=chunk)
    np.testing.assert_allclose(score(side="out"), [5, 5])
    np.testing.assert_allclose(score(side="in"), [6, 4])
    np.testing.assert_allclose(score(side="out", power=2), [17, 25])
    np.testing.assert_allclose(score(side="out", cross_term=False), [2, 11.5])
    whole = functools.partial(weight_sensitivity, a=A, b=B, scale=2.0, chunk=chunk)
    np.testing.assert_allclose(whole([W], side="out"), [3, 9])
    np.testing.assert_allclose(whole([W, jnp.array([[1.0, -1], [0, 2]])], side="in"), [1, 10])


def test_scores_are_divided_by_their_norm():
    graph = jprune.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], {"w": W.T, "v": W.T}, jnp.ones((3, 2)))
    f = {"a": A, "b": B}
    (g,) = [g for g in graph.groups if g.startswith("w")]
    one = group_importance(graph, {"w": W.T, "v": W.T}, Lora({"w": f}, {"w": 2.0}), {"w": {"a": GA, "b": GB}}, [g])
    np.testing.assert_allclose(one[g], [0.70710678, 0.70710678], rtol=1e-6)
    other = group_importance(graph, {"w": W.T, "v": W.T}, Lora({"v": f}, {"v": 2.0}), {"v": {"a": GA, "b": GB}}, [g])
    np.testing.assert_allclose(other[g], [0.83205029, 0.55470020], rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 7, 9]))
@settings(max_examples=6)
def test_sensitivity_is_the_element_loop(seed, chunk):
    rank, rng = 3, np.random.default_rng(seed)
    w, a, b, ga, gb = (rng.normal(size=s) for s in ((7, 5), (rank, 5), (7, rank), (rank, 5), (7, rank)))
    want = np.zeros((7, 5))
    for i in range(7):
        for j in range(5):
            g = sum(gb[i, k] * a[k, j] + b[i, k] * ga[k, j] - gb[i, k] * ga[k, j] for k in range(rank))
            want[i, j] = abs(g * (w[i, j] + 1.5 * sum(b[i, k] * a[k, j] for k in range(rank))))
    got = functools.partial(lora_sensitivity, *map(jnp.float32, (w, a, b, ga, gb)), scale=1.5, chunk=chunk)
    np.testing.assert_allclose(got(side="out"), want.sum(1), rtol=1e-4)
    np.testing.assert_allclose(got(side="in"), want.sum(0), rtol=1e-4)


def test_the_gradient_it_stands_for():
    """gB = s D A^T, gA = s B^T D, G = s (D A^T A + B B^T D) - s^2 D A^T B^T D, with the true gradient D."""
    w, x, s = normal(0, 6, 4), normal(1, 5, 4), 1.5
    graph = jprune.trace(lambda p, x: jnp.tanh(x @ p["w"].T), {"w": w}, x)
    lora = Lora({"w": {"a": normal(2, 3, 4), "b": normal(3, 6, 3)}}, {"w": s})
    forward = adapted(graph)
    grads = jax.grad(lambda f: jnp.sum(jnp.sin(forward({"w": w}, f, x))))(lora)["w"]
    a, b = lora["w"]["a"], lora["w"]["b"]
    d = jax.grad(lambda m: jnp.sum(jnp.sin(jnp.tanh(x @ m.T))))(w + s * b @ a)
    np.testing.assert_allclose(grads["b"], s * d @ a.T, atol=1e-5)
    np.testing.assert_allclose(grads["a"], s * b.T @ d, atol=1e-5)
    g = grads["b"] @ a + b @ grads["a"] - grads["b"] @ grads["a"]
    np.testing.assert_allclose(g, s * (d @ a.T @ a + b @ b.T @ d) - s**2 * d @ a.T @ b.T @ d, atol=1e-5)
    zero = jax.grad(lambda f: jnp.sum(jnp.sin(forward({"w": w}, f, x))))(Lora({"w": {"a": a, "b": 0 * b}}, {"w": s}))[
        "w"
    ]
    d = jax.grad(lambda m: jnp.sum(jnp.sin(jnp.tanh(x @ m.T))))(w)
    assert not zero["a"].any()
    got = lora_sensitivity(w, a, 0 * b, zero["a"], zero["b"], scale=s, side="out")
    np.testing.assert_allclose(got, np.abs(s * d @ a.T @ a * w).sum(1), rtol=1e-5)


@pytest.mark.parametrize("cross_term", [False, True])
def test_the_cross_term_makes_scores_depend_on_the_gradients_scale(cross_term):
    w, a, b, ga, gb = (normal(k, *s) for k, s in enumerate([(6, 5), (2, 5), (6, 2), (2, 5), (6, 2)]))
    score = functools.partial(lora_sensitivity, scale=2.0, side="out", cross_term=cross_term)
    one = score(w, a, b, ga, gb)
    two = score(3 * (w + 2 * b @ a) - 2 * b @ a, a, b, 5 * ga, 5 * gb)  # three times the merged weight
    unit = [np.asarray(v) / np.linalg.norm(v) for v in (one, two)]
    assert np.allclose(*unit, rtol=1e-4) is not cross_term


def test_only_blocks_of_rows_are_wide():
    """A matrix of 4 MB is scored with far less than its 8 MB in float32 (XLA's CPU widens all bfloat16 by itself)."""
    w, f = jax.ShapeDtypeStruct((2048, 1024), jnp.float16), jax.ShapeDtypeStruct
    factors = [f((4, 1024), jnp.float32), f((2048, 4), jnp.float32)]
    for side in ("out", "in"):
        score = functools.partial(lora_sensitivity, scale=2.0, side=side, chunk=64)
        memory = jax.jit(score).lower(w, *factors, *factors).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1e6


# -- groups ----------------------------------------------------------------------------------------------------------

MATRICES = {
    "attention": (("q", "out"), ("k", "out"), ("v", "out"), ("o", "in")),
    "mlp": (("gate", "out"), ("up", "out"), ("down", "in")),
}


def by_hand(scanned, kv, layer, part, criterion, weight_grads=None, only=None):
    """Group scores of one layer by element loops in float64, matrices read by name."""
    module, v, _ = decoder(scanned, kv)
    lora, grads = learnt(scanned, kv)
    layout = LINEN_SCAN if scanned else LINEN
    c, total = module.config, 0
    units = kv if part == "attention" else c.ffn[0]
    for name, side in MATRICES[part]:
        if only and name not in only:
            continue
        where = f"params/{'layers' if scanned else f'layer{layer}'}/{'attn' if part == 'attention' else 'mlp'}/{name}/kernel"
        at = (layer,) if scanned else ()
        a, b, ga, gb = (np.asarray(x, np.float64)[at] for x in (
            lora[where]["a"], lora[where]["b"], grads[where]["a"], grads[where]["b"]))  # fmt: skip
        w = np.asarray(view(v["params"], layout, name, layer), np.float64)
        if criterion == "lora":
            g = gb @ a + b @ ga - gb @ ga
        elif criterion == "grad":
            g = np.asarray(view(weight_grads["params"], layout, name, layer), np.float64)
        else:
            g = np.ones_like(w)
        s = np.abs(g * (w + CONFIG.scale * b @ a))
        sums = s.sum(1 if side == "out" else 0).reshape(units, -1)
        score = np.array([sum(row) for row in sums])
        total = total + score / (np.sqrt((score**2).sum()) + 1e-8)
    return total


@pytest.mark.parametrize(
    ("scanned", "kv"),
    [(True, 2), pytest.param(True, 4, marks=pytest.mark.slow), pytest.param(False, 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("criterion", ["lora", "grad", "magnitude"])
def test_group_scores_by_hand(scanned, kv, criterion):
    _, v, graph = decoder(scanned, kv)
    lora, grads = learnt(scanned, kv)
    groups = lm.prunable(graph, skip_first=0, skip_last=0)
    weight_grads = None
    if criterion == "grad":
        weight_grads = jax.tree.map(lambda x: jnp.sin(17 * x), v)
    score = functools.partial(group_importance, graph, groups=list(groups), criterion=criterion, chunk=5)
    got = jax.jit(score)(v, lora, grads, weight_grads=weight_grads and dict(flatten(weight_grads)))
    for g, scores in got.items():
        part = "mlp" if "/mlp/" in g else "attention"
        for layer in range(4) if scanned else [int(g.split("/")[1][5:])]:
            want = by_hand(scanned, kv, layer, part, criterion, weight_grads)
            np.testing.assert_allclose(scores[layer] if scanned else scores, want, rtol=2e-5)


def test_query_heads_of_every_group_are_scored_by_q_and_o():
    """The unit is one position in each of the two groups: heads 0 and 2, or 1 and 3."""
    _, v, graph = decoder()
    lora, grads = learnt()
    (g,) = lm.prunable(graph, unit="q_head_balanced", parts=("attention",), skip_first=0, skip_last=0)
    score = functools.partial(group_importance, graph, groups=[g], normalize=False)
    got = jax.jit(score)(v, lora, grads)[g]
    assert got.shape == (4, 2)
    total = 0
    for name, side in (("q", "out"), ("o", "in")):
        t = f"params/layers/attn/{name}/kernel"
        p, f, d = product(graph, t), lora[t], grads[t]
        w = np.asarray(p.matrix(dict(flatten(v))[t]))[2]
        s = np.abs(
            (d["b"][2] @ f["a"][2] + f["b"][2] @ d["a"][2] - d["b"][2] @ d["a"][2]) * (w + 1.5 * f["b"][2] @ f["a"][2])
        )
        heads = s.sum(1 if side == "out" else 0).reshape(4, -1).sum(1)
        total = total + heads[:2] + heads[2:]
    np.testing.assert_allclose(got[2], total, rtol=1e-4)


@pytest.mark.slow
def test_permuted_channels_have_permuted_scores():
    _, v, graph = decoder()
    lora, grads = learnt()
    (g,) = lm.prunable(graph, parts=("mlp",), skip_first=0, skip_last=0)
    score = jax.jit(functools.partial(group_importance, graph, groups=[g]))
    order = np.random.default_rng(0).permutation(12)

    def moved(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = {
            "gate/kernel": 2,
            "up/kernel": 2,
            "down/kernel": 1,
            "gate/kernel/b": 1,
            "up/kernel/b": 1,
            "down/kernel/a": 2,
        }
        key = "/".join(name.split("/mlp/")[-1:])
        return jnp.take(x, order, axis[key]) if key in axis else x

    permuted = [jax.tree_util.tree_map_with_path(moved, x) for x in (v, lora, grads)]
    np.testing.assert_allclose(score(*permuted)[g], score(v, lora, grads)[g][:, order], rtol=1e-5)


def test_moving_averages():
    ema = {"x": jnp.zeros(3), "y": jnp.zeros((2, 2))}
    same = {"x": jnp.array([1.0, 2, 4]), "y": jnp.ones((2, 2))}
    for _ in range(7):
        ema = lp.ema_update(ema, same)
    np.testing.assert_allclose(ema["x"], same["x"] * (1 - 0.9**7), rtol=1e-6)
    broken = lp.ema_update(ema, {"x": same["x"].at[1].set(jnp.nan), "y": same["y"]})
    jax.tree.map(np.testing.assert_array_equal, broken, ema)
    np.testing.assert_allclose(lp.ema_update(ema, same, 0.25)["y"], 0.25 * ema["y"] + 0.75, rtol=1e-6)


# -- schedule and masks ------------------------------------------------------------------------------------------------


def test_the_schedule():
    at = {10: 0.0, 11: 0.0185166016, 20: 0.1650390625, 50: 0.4375, 80: 0.4990234375, 89: 0.4999990234, 90: 0.5, 91: 0.5}
    for t, share in at.items():
        assert lm.cubic_sparsity(t, 100) == pytest.approx(share, abs=1e-10)
    options = run.LoraPruneConfig(final_exact=False)
    assert list(run.pruning_steps(options, 100)) == [20, 30, 40, 50, 60, 70, 80]
    assert run.pruning_steps(run.LoraPruneConfig(), 100) == run.pruning_steps(options, 100) | {90: 0.5}
    published = run.pruning_steps(options, 313)
    assert len(published) == 25 and min(published) == 40 and max(published) == 280
    assert published[40] == pytest.approx(0.0503268, abs=1e-7) and published[280] == pytest.approx(0.49999984, abs=1e-8)
    short = run.pruning_steps(run.LoraPruneConfig(every=2), 8)  # the plateau would begin at 7.2
    assert list(short) == [2, 4, 6, 7] and short[7] == 0.5
    assert run.pruning_steps(run.LoraPruneConfig(sparsity=0.0), 100) == {}
    assert run.pruning_steps(run.LoraPruneConfig(initial=0.5), 100) == {0: 0.5}  # all at once


def test_how_many_units_go():
    counted = {
        n: [int(np.floor(n * s)) for s in run.pruning_steps(run.LoraPruneConfig(final_exact=False), 313).values()]
        for n in (32, 11008)
    }
    assert (counted[32][-1], counted[11008][-1]) == (15, 5503)
    assert (lm.pruned_units(32, 0.5), lm.pruned_units(11008, 0.5), lm.pruned_units(5, 0.5)) == (16, 5504, 2)
    assert lm.pruned_units(10, 0.3) == 3 and lm.pruned_units(4, 1.0) == 3 and lm.pruned_units(1, 0.5) == 0
    assert lm.pruned_units(100, 0.5, 32) == 36 and lm.pruned_units(100, 0.5, 128) == 0
    _, _, graph = decoder()
    rows = lm.prunable(graph)
    ffn, kv = sorted(rows, key=lambda g: "/attn/" in g)
    counts = [run.unit_counts(graph, dataclasses.replace(OPTIONS, multiple_of=4), rows, s) for s in (0.3, 0.45, 0.5)]
    assert [int(c[ffn]) for c in counts] == [3, 4, 4] and [int(c[kv]) for c in counts] == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "steps"),
    [(run.LoraPruneConfig(final_exact=False), 10), (run.LoraPruneConfig(cooldown=0.0, every=50), 40)],
)
def test_schedules_without_pruning_are_refused(options, steps):
    with pytest.raises(ValueError, match="steps is a pruning step"):
        run.pruning_steps(options, steps)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6), min_size=1, max_size=5))
@settings(max_examples=30)
def test_masks_are_nested_and_take_the_lowest(scores):
    mask = np.ones(6)
    for k, row in enumerate(scores):
        new = np.asarray(UPDATE({"g": jnp.array(row)}, {"g": jnp.array(mask)}, {"g": np.int32(k)})["g"])
        assert ((new == 0) | (new == 1)).all() and (new <= mask).all() and (new == 0).sum() == k
        order = sorted(
            range(6), key=lambda i: (mask[i] > 0, row[i] if mask[i] else 0, i)
        )  # what is gone, then the lowest
        assert {i for i in range(6) if not new[i]} == set(order[:k]) or k < (mask == 0).sum()
        mask = new
    assert UPDATE._cache_size() == 1  # the number of units is traced


UPDATE = jax.jit(lambda ema, masks, counts: lm.update_masks(ema, masks, counts))


def test_layers_that_stay_whole():
    ema, masks = {"g": jnp.array([[1.0, 2], [2, 1], [1, 1]])}, {"g": jnp.ones((3, 2))}
    got = lm.update_masks(ema, masks, {"g": 1}, {"g": np.array([True, True, False])})
    np.testing.assert_array_equal(got["g"], [[0, 1], [1, 0], [1, 1]])
    _, _, flat = decoder(False)
    rows = lm.prunable(flat, skip_first=0.3, skip_last=1)  # floor(1.2) = 1 of four
    assert {g.split("/")[1] for g in rows} == {"layer1", "layer2"} and len(rows) == 4
    _, _, graph = decoder()
    assert [r.tolist() for r in lm.prunable(graph, skip_first=2, skip_last=0).values()] == [
        [False, False, True, True]
    ] * 2
    with pytest.raises(ValueError, match="nothing is left"):
        lm.prunable(graph, skip_first=3)


def test_units_that_an_attention_has():
    _, _, grouped = decoder()
    _, _, plain = decoder(True, 4)
    jax.tree.map(np.testing.assert_array_equal, lm.prunable(plain, unit="head"), lm.prunable(plain, unit="kv_group"))
    assert set(lm.prunable(grouped)) == set(lm.prunable(grouped, unit="kv_group"))
    with pytest.raises(ValueError, match="share key-value heads: choose unit 'kv_group'"):
        lm.prunable(grouped, unit="head")
    with pytest.raises(ValueError, match="choose unit 'head'"):
        lm.prunable(plain, unit="q_head_balanced")
    with pytest.raises(ValueError, match="choose among"):
        lm.prunable(plain, parts=("heads",))


# -- the loop ----------------------------------------------------------------------------------------------------------

TUNING = TuningConfig(10, 0.02, accumulate=2)


@functools.cache
def pruned():
    """(result, kept units after every step)."""
    _, v, graph = decoder()
    kept = []
    got = run.loraprune(graph, v, ids, OPTIONS, TUNING, on_step=lambda t, m: kept.append(m["kept"]))
    return got, kept


def test_the_loop_prunes_what_it_says():
    got, kept = pruned()
    for g, mask in got.masks.items():
        assert set(np.unique(mask)) == {0.0, 1.0}
        assert np.asarray(mask == 0).sum(-1).tolist() == [0, *[6 if "/mlp/" in g else 1] * 2, 0]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1 and len(set(kept)) > 2
    assert all(np.isfinite(got.losses)) and len(got.losses) == 10
    assert any(jnp.abs(f["b"]).max() > 0 for f in got.lora.values())


def test_the_end_is_a_smaller_model_of_the_same_function():
    _, v, graph = decoder()
    got, _ = pruned()
    merged, keep = run.finalize(graph, v, got.lora, got.masks)
    want = jax.jit(adapted(graph))(v, got.lora, ids(3), masks=got.masks)
    small = graph.compact(merged, graph.decide(keep, stacked="unstack"))
    assert relative(jax.jit(graph.replay(graph.decide(keep, stacked="unstack")))(small, ids(3)), want) < 1e-4
    for g, k in keep.items():  # merged weights of units that are gone are gone: sparsity is that of the masks
        np.testing.assert_array_equal(k, np.asarray(got.masks[g]) == 1)
    (ffn,) = [g for g in keep if "/mlp/" in g]
    widths = [x.shape[-1] for x in small["params"]["layers"]["mlp"]["gate"]["kernel"]]
    assert widths == keep[ffn].sum(-1).tolist() == [12, 6, 6, 12]


def test_masks_enter_the_next_step():
    """A loss that counts the units it is given; without gradients all scores are 0 and the lowest indices go."""
    _, v, graph = decoder()

    def units(params, lora, masks, batch, key):
        return sum(jnp.sum(m) for m in masks.values()) + 0 * sum(jnp.sum(f["b"]) for f in lora.values())

    got = run.loraprune(graph, v, ids, OPTIONS, TUNING, loss=units)
    want, gone = [], 0
    for t in range(TUNING.steps):
        want.append(4 * (12 + 2) - gone)
        if t in (due := run.pruning_steps(OPTIONS, TUNING.steps)):
            gone = 2 * sum(int(k) for k in run.unit_counts(graph, OPTIONS, got.masks, due[t]).values())
    assert got.losses == want and gone == 14
    for mask in got.masks.values():
        half = mask.shape[1] // 2
        assert mask[1].tolist() == mask[2].tolist() == [0.0] * half + [1.0] * half


def test_adapters_alone_are_differentiated():
    _, v, graph = decoder()
    lora = init(jax.random.key(0), graph, CONFIG)
    loss = next_token(graph)
    rows = lm.prunable(graph)
    of = run.gradient(graph, OPTIONS, lora, loss)
    ones = {g: jnp.ones(graph.groups[g].shape) for g in rows}
    _, (grads, frozen) = jax.eval_shape(of, v, lora, ones, ids(0), jax.random.key(0))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, lora) and frozen == {}
    weights = {x.shape for x in jax.tree.leaves(v["params"]["layers"]) if x.ndim > 2}
    assert not weights & {g.shape for g in jax.tree.leaves(grads)}
    grad = run.gradient(graph, dataclasses.replace(OPTIONS, criterion="grad"), lora, loss)
    _, (_, frozen) = jax.eval_shape(grad, v, lora, ones, ids(0), jax.random.key(0))
    assert {p: x.shape for p, x in frozen.items()} == {p: dict(flatten(v))[p].shape for p in lora}


@pytest.mark.slow
def test_masks_and_rates_compile_nothing_again():
    _, v, graph = decoder()
    lora, rows, loss = init(jax.random.key(0), graph, CONFIG), lm.prunable(graph), next_token(graph)
    ones = {g: jnp.ones(graph.groups[g].shape) for g in rows}
    step = jax.jit(run.step_of(graph, OPTIONS, TUNING, lora, loss))
    state = init_state(lora, {"masks": ones, "ema": jax.tree.map(jnp.zeros_like, ones)}, TUNING.stages)
    for t in range(2):
        state, _ = step(state, v, ids(t), TUNING.rates[t])
        rest = {
            **state.rest,
            "masks": lm.update_masks(state.rest["ema"], state.rest["masks"], dict.fromkeys(rows, 1), rows),
        }
        state = state._replace(rest=rest)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_a_killed_run_prunes_the_same_bits(tmp_path):
    _, v, graph = decoder()

    def dies(step):
        if step == 7:
            raise KeyboardInterrupt
        return ids(step)

    with pytest.raises(KeyboardInterrupt):
        run.loraprune(graph, v, dies, OPTIONS, TUNING, out=tmp_path, save_every=3)
    got = run.loraprune(graph, v, ids, OPTIONS, TUNING, out=tmp_path, resume=True)
    assert len(got.losses) == 4
    want, _ = pruned()
    jax.tree.map(np.testing.assert_array_equal, got[:3], want[:3])


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["grad", "magnitude", "random"])
def test_other_criteria_run_in_the_same_loop(criterion):
    _, v, graph = decoder()
    got = run.loraprune(graph, v, ids, dataclasses.replace(OPTIONS, criterion=criterion), TUNING)
    assert all(np.asarray(m == 0).sum(-1).tolist()[1] > 0 for m in got.masks.values())
    if criterion == "random":
        assert any((np.asarray(got.masks[g]) != np.asarray(m)).any() for g, m in pruned()[0].masks.items())


@pytest.mark.slow
def test_an_8_bit_base_keeps_the_same_units():
    _, v, graph = decoder()

    def quantized(x):
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return {"int8": jnp.round(x / scale).astype(jnp.int8), "scale": scale} if x.ndim > 2 else x

    def dequantized(q):
        return jax.tree.map(lambda x: x["int8"] * x["scale"] if isinstance(x, dict) else x, q,
                            is_leaf=lambda x: isinstance(x, dict) and "int8" in x)  # fmt: skip

    small = jax.tree.map(quantized, v)
    got = run.loraprune(graph, small, ids, OPTIONS, TUNING, dequantize=dequantized)
    same = [np.asarray(got.masks[g] == m).mean() for g, m in pruned()[0].masks.items()]
    assert min(same) >= 0.95


ON_A_MESH = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jprune
from jprune.methods.channels.loraprune.run import loraprune
from jprune.models.llama_placement import placement
from test_loraprune import OPTIONS, TUNING, decoder, ids

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
place, rows = placement(mesh), NamedSharding(mesh, P("data"))
_, v, graph = decoder()
split = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.device_put(x, place(jax.tree_util.keystr(path, simple=True, separator="/"), x)), v)
cut = [x for x in jax.tree.leaves(split) if not x.sharding.is_fully_replicated]
got = loraprune(graph, split, lambda t: jax.device_put(ids(t), rows), OPTIONS, TUNING)
want = loraprune(graph, v, ids, OPTIONS, TUNING)
print(json.dumps({
    "cut": len(cut),
    "masks": [bool((np.asarray(m) == np.asarray(want.masks[g])).all()) for g, m in got.masks.items()],
    "ema": [float(np.abs(np.asarray(e) - np.asarray(want.ema[g])).max()) for g, e in got.ema.items()],
    "losses": float(np.abs(np.array(got.losses) - np.array(want.losses)).max()),
}))
"""


@pytest.mark.slow
def test_sharded_weights_and_rows_prune_the_same_units():
    got = run_script(ON_A_MESH)
    assert got["cut"] >= 7 and all(got["masks"]) and max(got["ema"]) < 1e-3 and got["losses"] < 1e-4


def test_what_is_refused():
    _, v, graph = decoder()
    lora, grads = learnt()
    groups = list(lm.prunable(graph))
    with pytest.raises(ValueError, match="criterion must be one of"):
        group_importance(graph, v, lora, grads, groups, criterion="taylor")
    with pytest.raises(ValueError, match="takes weight_grads"):
        group_importance(graph, v, lora, grads, groups, criterion="grad")
    with pytest.raises(ValueError, match="needs a key"):
        group_importance(graph, v, lora, grads, groups, criterion="random")
    few = {t: f for t, f in lora.items() if "/mlp/" in t}
    few = Lora(few, {t: lora.scales[t] for t in few})
    with pytest.raises(ValueError, match="no adapted product makes or consumes"):
        group_importance(graph, v, few, grads, groups)
    with pytest.raises(ValueError, match=r"LoraPruneConfig.sparsity is 1.0"):
        run.LoraPruneConfig(sparsity=1.0)
    with pytest.raises(ValueError, match=r"LoraPruneConfig.warmup is 0.9"):
        run.LoraPruneConfig(warmup=0.9)
