"""Second-order pruning of single weights against the formulas in float64 NumPy, brute force, and what must always hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.importance.sample_gradients import sample_gradients
from jprune.methods.weights import second_order as so
from jprune.methods.weights.second_order.fisher import inverse, refit
from jprune.methods.weights.second_order.stages import kept, second_order, sparsities
from jprune.surgery import patterns


def a_case(seed=0, samples=20, shape=(6, 4)):
    """Weights of one matrix (inputs, outputs) and its samples' gradients."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(shape[0], shape[0])) / 2 + np.eye(shape[0])  # inputs that go together
    g = np.einsum("nio,ij->njo", rng.normal(size=(samples, *shape)), mix)
    return {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}, {"w": jnp.asarray(g, jnp.float32)}


def rows(x):
    """As the methods lay a matrix out: output after output."""
    return np.moveaxis(np.asarray(x, np.float64), -1, -2).reshape(*np.shape(x)[:-2], -1)


def fisher(g, damp):
    return damp * np.eye(g.shape[1]) + g.T @ g / len(g)


def lowest(scores, n):
    gone = np.zeros(len(scores), bool)
    gone[np.argsort(scores, kind="stable")[:n]] = True
    return gone


def surgeon(w, inv, gone):
    """The joint update of optimal brain surgery."""
    p = np.flatnonzero(gone)
    return w - inv[:, p] @ np.linalg.solve(inv[np.ix_(p, p)], w[p])


def agree(found, wanted, gone, atol=2e-4):
    np.testing.assert_array_equal(rows(found.masks["w"]), ~gone)
    np.testing.assert_allclose(rows(found.weights["w"]), np.where(gone, 0, wanted), atol=atol)
    assert (np.asarray(found.weights["w"])[~np.asarray(found.masks["w"])] == 0).all()


# --- the inverse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [9, 3])  # F itself, and by Woodbury
def test_a_blocks_inverse_times_its_fisher_matrix_is_the_identity_and_is_that_of_the_recursion(samples):
    g = np.random.default_rng(0).normal(size=(samples, 2, 6))
    with jax.enable_x64(True):
        found = inverse(jnp.asarray(g), 1e-3)
        results = found.matrix(), found.diagonal(), found.times(jnp.arange(12.0).reshape(2, 6))
        matrices, diagonal, product = map(np.asarray, results)
    assert found.woodbury == (samples < 6) and np.all(np.asarray(found.damp) == 1e-3)
    for b in range(2):
        recursion = np.eye(6) / 1e-3
        for s in g[:, b]:
            v = recursion @ s
            recursion -= np.outer(v, v) / (samples + s @ v)
        np.testing.assert_allclose(matrices[b] @ fisher(g[:, b], 1e-3), np.eye(6), atol=1e-9)
        np.testing.assert_allclose(matrices[b], recursion, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(diagonal[b], np.diag(recursion), rtol=1e-6)
        np.testing.assert_allclose(product[b], recursion @ np.arange(12.0).reshape(2, 6)[b], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", [20, 3])
def test_a_damping_that_is_too_small_for_the_arithmetic_is_raised_tenfold_and_said(samples):
    w, g = a_case(samples=samples)
    same = {"w": jnp.ones_like(g["w"]) * 1e3}  # all weights do the same: F has rank 1
    found = so.obert(w, same, 12, so.OBERTConfig(damp=1e-7, block=24))
    assert bool(jnp.isfinite(found.weights["w"]).all()) and 1e-6 < float(found.damp["w"]) < 1e3
    assert np.log10(float(found.damp["w"]) / 1e-7) == pytest.approx(
        round(np.log10(float(found.damp["w"]) / 1e-7)), abs=1e-3
    )
    assert float(so.obert(w, g, 12, so.OBERTConfig(damp=1e-3)).damp["w"]) == pytest.approx(1e-3)


def test_a_damping_below_the_rounding_of_what_the_samples_leave_of_a_weight_is_raised():
    """Each sample is about a weight of its own: the Cholesky factor exists, and the diagonal of the inverse rounds to 0."""
    g = jnp.concatenate([1e3 * jnp.eye(3), jnp.zeros((3, 3))], axis=1).reshape(3, 6, 1)
    found = so.obert({"w": jnp.arange(1.0, 7.0)[:, None]}, {"w": g}, 3, so.OBERTConfig(damp=1e-7, block=6))
    assert 0.1 < float(found.damp["w"]) < 11 and bool(jnp.isfinite(found.weights["w"]).all())
    assert found.masks["w"][:, 0].tolist() == [True] * 3 + [False] * 3  # nothing depends on the other three


# --- WoodFisher and oBERT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "samples"), [(None, 20), (24, 40), (10, 20)])
def test_woodfisher_is_its_formula(block, samples):
    w, g = a_case(samples=samples)
    flat, grads, wanted, scores = rows(w["w"]), rows(g["w"]), [], []
    parts = np.split(np.arange(24), range(block or 24, 24, block or 24))
    inv = [np.linalg.inv(fisher(grads[:, i], 1e-2)) for i in parts]
    scores = np.concatenate([flat[i] ** 2 / np.diag(f) for i, f in zip(parts, inv)])
    gone = lowest(scores, 17)
    for i, f in zip(parts, inv):
        wanted.append(flat[i] - f @ np.where(gone[i], flat[i] / np.diag(f), 0))
    found = so.woodfisher(w, g, 7, so.WoodFisherConfig(damp=1e-2, block=block))
    agree(found, np.concatenate(wanted), gone)


def test_woodtaylor_finds_the_minimum_of_a_quadratic_loss_without_the_weight_that_goes():
    w, g = a_case(samples=60)
    flat, grads = rows(w["w"]), rows(g["w"]) + 0.3
    f, mean = fisher(grads, 1e-2), grads.mean(0)
    losses, best = [], []
    for q in range(24):  # minimise mean d + d F d / 2 with w_q + d_q = 0
        others = np.delete(np.arange(24), q)
        d = np.zeros(24)
        d[q] = -flat[q]
        d[others] = np.linalg.solve(f[np.ix_(others, others)], -mean[others] - f[others, q] * d[q])
        losses.append(mean @ d + d @ f @ d / 2)
        best.append(flat + d)
    q = int(np.argmin(losses))
    config = so.WoodFisherConfig(damp=1e-2, taylor=True)
    found = so.woodfisher(w, {"w": g["w"] + 0.3}, 23, config)
    agree(found, best[q], np.arange(24) == q, atol=1e-3)


def test_obert_in_groups_of_four_is_its_formula_and_single_weights_are_woodfishers():
    w, g = a_case(shape=(8, 3), samples=40)
    flat, grads = rows(w["w"]), rows(g["w"])
    inv = [np.linalg.inv(fisher(grads[:, i : i + 8], 1e-2)) for i in (0, 8, 16)]
    of = {q: np.linalg.inv(inv[q // 2][(s := slice(4 * (q % 2), 4 * (q % 2) + 4)), s]) for q in range(6)}
    parts = flat.reshape(6, 4)
    gone = lowest(np.array([parts[q] @ of[q] @ parts[q] for q in range(6)]), 4)
    step = np.where(gone[:, None], np.stack([of[q] @ parts[q] for q in range(6)]), 0).reshape(3, 8)
    wanted = flat - np.concatenate([f @ s for f, s in zip(inv, step)])
    found = so.obert(w, g, 8, so.OBERTConfig(damp=1e-2, block=8, group=4))
    agree(found, wanted, np.repeat(gone, 4))
    single = so.obert(w, g, 11, so.OBERTConfig(damp=1e-2, block=8))
    same = so.woodfisher(w, g, 11, so.WoodFisherConfig(damp=1e-2, block=8))
    np.testing.assert_array_equal(single.masks["w"], same.masks["w"])
    np.testing.assert_allclose(single.weights["w"], same.weights["w"], atol=1e-5)


def test_a_gradient_may_be_the_mean_of_several_samples():
    w, g = a_case()
    pairs = {"w": g["w"].reshape(10, 2, 6, 4).mean(1)}
    found, wanted = (
        so.obert(w, g, 8, so.OBERTConfig(damp=1e-2, average=2)),
        so.obert(w, pairs, 8, so.OBERTConfig(damp=1e-2)),
    )
    np.testing.assert_allclose(found.weights["w"], wanted.weights["w"], atol=1e-5)


def test_on_a_quadratic_loss_the_joint_update_is_best():
    for seed in range(5):
        w, g = a_case(seed, samples=60)
        found = so.obert(w, g, 8, so.OBERTConfig(damp=1e-3, block=24))
        flat, stays = rows(w["w"]), rows(found.masks["w"]) > 0
        f = fisher(rows(g["w"]), 1e-3)
        joint = np.asarray(refit(jnp.asarray(flat), jnp.asarray(rows(g["w"])), jnp.asarray(stays), 60e-3)[0])
        np.testing.assert_allclose(joint, surgeon(flat, np.linalg.inv(f), ~stays), atol=1e-3)
        d = {"joint": joint - flat, "summed": rows(found.weights["w"]) - flat, "mask": np.where(stays, 0, -flat)}
        loss = {k: x @ f @ x for k, x in d.items()}
        assert loss["joint"] <= min(loss["summed"], loss["mask"]) and loss["joint"] < 0.9 * loss["mask"]


@pytest.mark.slow
def test_counts_per_leaf_and_weights_that_are_already_gone():
    w, g = a_case()
    both_w, both_g = {**w, "v": 10 * w["w"][:, 0]}, {**g, "v": g["w"][:, :, 0]}
    together = so.obert(both_w, both_g, 10)
    each = so.obert(both_w, both_g, {"w": 7, "v": 3})
    assert {p: int(m.sum()) for p, m in each.masks.items()} == {"w": 7, "v": 3}
    assert sum(int(m.sum()) for m in together.masks.values()) == 10 and int(together.masks["v"].sum()) == 6
    masks = {"w": jnp.asarray(np.random.default_rng(1).random((6, 4)) < 0.5)}
    for prune, config in ((so.woodfisher, so.WoodFisherConfig(damp=1e-2)), (so.cap, so.CAPConfig(damp=1e-2)),
                          (so.cbs, so.CBSConfig()), (so.chita, so.CHITAConfig())):  # fmt: skip
        less = prune(w, g, 5, config, masks=masks)
        assert int(less.masks["w"].sum()) == 5 and not bool(jnp.any(less.masks["w"] & ~masks["w"]))
        cleared = {"w": jnp.where(masks["w"], w["w"], 0)}, {"w": jnp.where(masks["w"], g["w"], 0)}
        np.testing.assert_allclose(less.weights["w"], prune(*cleared, 5, config).weights["w"], atol=1e-5)


# --- CAP -----------------------------------------------------------------------------------------------------------


def greedy(w, f, allowed=lambda left: left):
    """One block by the book: [(loss so far, weight that went, weights after it)]."""
    w, inv, left, loss, trace = w.copy(), np.linalg.inv(f), np.ones(len(w), bool), 0.0, []
    while (may := allowed(left)).any():
        score = np.where(may, w**2 / np.where(left, np.diag(inv), 1), np.inf)
        q = int(np.argmin(score))
        loss += score[q] / 2
        w = w - inv[:, q] * w[q] / inv[q, q]
        inv = inv - np.outer(inv[:, q], inv[q]) / inv[q, q]
        inv[q], inv[:, q], w[q], left[q] = 0, 0, 0, False
        trace.append((loss, q, w))
    return trace


@pytest.mark.parametrize("samples", [40, 5])
def test_cap_reads_every_blocks_trace_where_the_common_threshold_cuts_it(samples):
    w, g = a_case(samples=samples)
    flat, grads = rows(w["w"]), rows(g["w"])
    traces = [greedy(flat[i : i + 10], fisher(grads[:, i : i + 10], 1e-2)) for i in (0, 10, 20)]  # the last has 4
    steps = sorted((loss, b, k) for b, t in enumerate(traces) for k, (loss, _, _) in enumerate(t))[:16]
    counts = [sum(b == c for _, b, _ in steps) for c in range(3)]
    assert min(counts) > 0 and max(counts) < 10
    wanted = np.concatenate([t[n - 1][2] for t, n in zip(traces, counts)])
    found = so.cap(w, g, 8, so.CAPConfig(damp=1e-2, block=10))
    agree(found, wanted, wanted == 0, atol=1e-3)


def test_cap_with_two_of_four_removes_greedily_within_the_groups_that_are_still_full():
    w, g = a_case(shape=(8, 3), samples=40)

    def full_groups(left):
        return left & np.repeat(left.reshape(-1, 4).sum(-1) > 2, 4)

    flat, grads = rows(w["w"]), rows(g["w"])
    wanted = [greedy(flat[i : i + 16], fisher(grads[:, i : i + 16], 1e-2), full_groups)[-1][2] for i in (0, 16)]
    found = so.cap(w, g, None, so.CAPConfig(damp=1e-2, block=16, pattern=patterns.NM(2, 4)))
    agree(found, np.concatenate(wanted), np.concatenate(wanted) == 0, atol=1e-3)
    assert patterns.check(found.masks, "2:4") == {"w": "2:4 holds"} and int(found.masks["w"].sum()) == 12
    other = {"w": patterns.conventional((3, 8), output=0, input=1)}  # the same matrix as Equinox stores it
    turned = so.cap({"w": w["w"].T}, {"w": g["w"].swapaxes(1, 2)}, None,
                    so.CAPConfig(damp=1e-2, block=16, pattern=patterns.NM(2, 4)), views=other)  # fmt: skip
    np.testing.assert_array_equal(turned.weights["w"], found.weights["w"].T)


# --- CBS -----------------------------------------------------------------------------------------------------------


def objective(v, gone, block=None):
    block = block or v.shape[1]
    return sum(float((np.where(gone, v, 0)[:, i : i + block].sum(1) ** 2).mean()) for i in range(0, v.shape[1], block))


def a_pass(v, gone, eps, rho, tau):
    """One pass as the paper says it, with gains from the objective itself."""

    def after(i, j):
        new = gone.copy()
        new[i], new[j] = False, True
        return new

    def alone(i, value):
        new = gone.copy()
        new[i] = value
        return new

    first = sorted(np.flatnonzero(gone), key=lambda i: objective(v, alone(i, False)))
    second = sorted(np.flatnonzero(~gone), key=lambda j: objective(v, after(first[0], j)))
    used, misses = set(), 0
    for a, i in enumerate(first):
        near = [c for c in range(max(0, a - rho), min(len(second), a + rho + 1)) if c not in used and (a or not c)]
        good = [c for c in near if objective(v, gone) - objective(v, after(i, second[c])) >= eps]
        if good:
            gone = after(i, second[good[0]])
            used.add(good[0])
        else:
            misses += 1
        if misses == tau or not used:
            return gone
    return gone


def test_a_pass_of_swaps_is_the_one_by_the_book():
    swaps = 0
    for seed in range(8):
        w, g = a_case(seed, samples=20)
        v, start = rows(g["w"]) * rows(w["w"]), lowest(abs(rows(w["w"])), 14)
        wanted = a_pass(v, start, 1e-3, 3, 2)
        found = so.cbs(w, g, 10, so.CBSConfig(update=False, eps=1e-3, rho=3, tau=2, passes=1))
        np.testing.assert_array_equal(rows(found.masks["w"]) == 0, wanted)
        swaps += (start & ~wanted).sum()
    assert swaps >= 16


def test_swaps_are_never_worse_than_the_start_and_often_as_good_as_the_best_of_all_choices():
    best, config = 0, so.CBSConfig(update=False, eps=1e-6)
    for seed in range(12):
        w, g = a_case(seed, samples=6, shape=(4, 2))
        v = rows(g["w"]) * rows(w["w"])
        gone = rows(so.cbs(w, g, 4, config).masks["w"]) == 0
        start = lowest(abs(rows(w["w"])), 4)
        every = [np.isin(np.arange(8), c) for c in itertools.combinations(range(8), 4)]
        least = min(objective(v, c) for c in every)
        assert least - 1e-5 <= objective(v, gone) <= objective(v, start) + 1e-5
        best += objective(v, gone) < least + 1e-5
        # no swap of the best pair is left: the search ends where its own rule says so
    assert best >= 6


@pytest.mark.parametrize("block", [None, 2, 1])
def test_a_swap_is_taken_from_its_gain_on_with_a_fisher_matrix_in_blocks(block):
    """The two smallest of three go; to swap the second for the first gains when the blocks see what couples them."""
    w, g = np.array([1.0, 0.9, 0.8]), np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]])
    gain = objective(g * w, [False, True, True], block) - objective(g * w, [True, False, True], block)
    assert gain > 0.3
    for eps, swapped in ((gain - 1e-3, True), (gain + 1e-3, False)):
        config = so.CBSConfig(update=False, eps=eps, block=block)
        found = so.cbs(
            {"w": jnp.asarray(w[:, None], jnp.float32)}, {"w": jnp.asarray(g[..., None], jnp.float32)}, 1, config
        )
        assert bool(found.masks["w"][1, 0]) == swapped


@pytest.mark.parametrize("samples", [60, 5])
def test_the_update_of_cbs_is_the_joint_one_whose_removed_entries_are_zero_before_masking(samples):
    w, g = a_case(samples=samples)
    found = so.cbs(w, g, 8, so.CBSConfig(damp=1e-2))
    gone = rows(found.masks["w"]) == 0
    wanted = surgeon(rows(w["w"]), np.linalg.inv(fisher(rows(g["w"]), 1e-2)), gone)
    np.testing.assert_allclose(wanted[gone], 0, atol=1e-9)
    agree(found, wanted, gone, atol=1e-3)


def test_rmp_starts_from_the_division_with_the_least_loss_and_the_loss_ends_the_search():
    w, g = a_case(samples=60)
    seen = []

    def loss(weights):  # likes every weight but those of output 2
        seen.append(float(jnp.sum(jnp.abs(weights["w"][:, 2]))))
        return seen[-1]

    found = so.cbs(w, g, 9, so.CBSConfig(start="rmp", divisions=20, update=False, passes=0), loss=loss)
    assert len(seen) == 21 and min(seen[:20]) == seen[20] < max(seen[:20])
    assert seen[20] == pytest.approx(float(jnp.sum(jnp.abs(found.weights["w"][:, 2]))))
    seen.clear()
    so.cbs(w, g, 9, so.CBSConfig(update=False, eps=1e-9, patience=1), loss=lambda weights: seen.append(1) or 1.0)
    assert len(seen) == 2  # the start, and one pass that did not lower it


# --- CHITA ---------------------------------------------------------------------------------------------------------


def regression(w, g, b, l2, alpha=0.0):
    return ((g @ (w - b)) ** 2).sum() / 2 + l2 * len(g) / 2 * ((b - w) ** 2).sum() + (alpha * b).sum()


def solved(w, g, stays, l2, alpha=0.0):
    a, rest = g[:, stays], g @ np.where(stays, 0, w)
    alpha = np.broadcast_to(alpha, w.shape)[stays]
    d = np.linalg.solve(a.T @ a + l2 * len(g) * np.eye(stays.sum()), a.T @ rest - alpha)
    out = np.zeros_like(w)
    out[stays] = w[stays] + d
    return out


@pytest.mark.parametrize(("samples", "first_order"), [(40, False), (5, False), (40, True), (5, True)])
def test_chita_solves_the_normal_equations_on_its_support(samples, first_order):
    w, g = a_case(samples=samples)
    found = so.chita(w, g, 9, so.CHITAConfig(l2=1e-2, first_order=first_order))
    stays, flat, grads = rows(found.masks["w"]) > 0, rows(w["w"]), rows(g["w"])
    assert stays.sum() == 9
    agree(found, solved(flat, grads, stays, 1e-2, first_order * grads.mean(0)), ~stays, atol=1e-3)


def test_chita_is_never_worse_than_magnitude_and_often_the_best_of_all_supports_with_any_active_set():
    best, better = dict.fromkeys((1.0, 2.0), 0), dict.fromkeys((1.0, 2.0), 0)
    for seed in range(12):
        w, g = a_case(seed, samples=12, shape=(4, 2))
        flat, grads = rows(w["w"]), rows(g["w"])

        def value(stays, flat=flat, grads=grads):
            return regression(flat, grads, solved(flat, grads, stays, 1e-3), 1e-3)

        every = [np.isin(np.arange(8), c) for c in itertools.combinations(range(8), 4)]
        least, start = min(map(value, every)), value(~lowest(abs(flat), 4))
        for active in best:  # 1.0: nobody outside takes part until a step of all of them brings it in
            now = value(rows(so.chita(w, g, 4, so.CHITAConfig(active=active)).masks["w"]) > 0)
            assert now <= start * (1 + 1e-5)
            best[active] += now < least + 1e-4
            better[active] += now < start - 1e-4
    assert min(best.values()) >= 6 and min(better.values()) >= 2


def test_further_active_sets_bring_in_who_was_missing():
    """Weights of nearly the same size: which of them the active set begins with says little."""
    values = []
    for seed in range(6):
        w, g = a_case(seed)
        w = {"w": jnp.sign(w["w"]) * (0.9 + 0.1 * jnp.abs(w["w"]))}
        found = [so.chita(w, g, 8, so.CHITAConfig(active=1.0, rounds=n)).weights["w"] for n in (1, 20)]
        values.append([regression(rows(w["w"]), rows(g["w"]), rows(b), 1e-3) for b in found])
    one, many = np.array(values).T
    assert (many <= one * (1 + 1e-4)).all() and (many < 0.9 * one).sum() >= 3


def test_chita_in_blocks_keeps_the_largest_and_solves_every_block():
    w, g = a_case(samples=40)
    found = so.chita(w, g, 9, so.CHITAConfig(l2=1e-2, block=10))
    flat, grads, gone = rows(w["w"]), rows(g["w"]), lowest(abs(rows(w["w"])), 15)
    wanted = [solved(flat[i : i + 10], grads[:, i : i + 10], ~gone[i : i + 10], 1e-2) for i in (0, 10, 20)]
    agree(found, np.concatenate(wanted), gone, atol=1e-3)


# --- from a loss, and by name --------------------------------------------------------------------------------------


def losses(v, batch):
    x, y = batch
    out = jnp.tanh(x @ v["a"]["kernel"] + v["a"]["bias"]) @ v["b"]["kernel"].astype(jnp.float32)
    return jnp.sum((out - y) ** 2, axis=-1)


def a_model():
    rng = np.random.default_rng(4)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    v = {"a": {"kernel": draw(6, 4), "bias": draw(4)}, "b": {"kernel": draw(4, 2).astype(jnp.bfloat16)}}
    return v, ["a/kernel", "b/kernel"], (draw(16, 6), draw(16, 2))


@pytest.mark.parametrize("name", ["woodfisher", "obert", "cap", "cbs", "chita"])
def test_every_method_prunes_a_model_to_the_exact_count(name):
    v, paths, batch = a_model()
    found = second_order(name)(losses, v, paths, batch, 0.7, stages=2)
    sizes = {p: (int(m.sum()), m.shape) for p, m in found.masks.items()}
    assert sum(n for n, _ in sizes.values()) == 10 and [s for _, s in sizes.values()] == [(6, 4), (4, 2)]
    assert found.variables["b"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.variables["a"]["bias"], v["a"]["bias"])
    for p, m in found.masks.items():
        assert (np.asarray(found.variables[p[0]]["kernel"], np.float32)[~np.asarray(m)] == 0).all()
    assert set(found.damp) == set(paths)


def test_stages_land_on_the_sparsity_and_what_is_gone_stays_gone():
    assert sparsities(0.9, 1) == [0.9] and sparsities(0.9, 3, 0.3) == [0.3, 0.825, 0.9]
    np.testing.assert_allclose(np.diff([1 - s for s in sparsities(0.984375, 3, schedule="exp")]), [-0.1875, -0.046875])
    v, paths, batch = a_model()
    assert kept({"w": np.zeros((10, 10)), "v": np.zeros(40)}, 0.9, True) == {"w": 10, "v": 4}
    assert kept({"w": np.zeros((10, 10))}, 0.87, False, 4) == 12
    first = second_order("woodfisher")(losses, v, paths, batch, 0.3)
    both = second_order("woodfisher")(losses, v, paths, batch, 0.7, stages=2)
    gradients = sample_gradients(losses, first.variables, paths, batch)
    weights = {"a/kernel": first.variables["a"]["kernel"], "b/kernel": first.variables["b"]["kernel"]}
    by_hand = so.woodfisher(weights, gradients, 10, masks=first.masks)
    for p in paths:
        assert not bool(jnp.any(both.masks[p] & ~first.masks[p]))
        np.testing.assert_array_equal(both.masks[p], by_hand.masks[p])
        np.testing.assert_allclose(both.variables[p[0]]["kernel"], by_hand.weights[p], rtol=1e-3, atol=1e-4)
    each = second_order("obert")(losses, v, paths, batch, 0.5, per_leaf=True)
    assert [int(each.masks[p].sum()) for p in paths] == [12, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {}}, "no weights"),
        ({"weights": {"v": jnp.ones((6, 4))}}, "gradients for 'w', which is no leaf"),
        ({"weights": {"w": jnp.ones((6, 4), jnp.int32)}}, "holds int32"),
        ({"weights": {"w": jnp.full((6, 4), jnp.nan)}}, "weights of 'w' are not finite"),
        ({"gradients": {}}, "'w' has no gradients"),
        ({"gradients": {"w": jnp.ones((6, 4))}}, "samples come first"),
        ({"gradients": {"w": jnp.full((3, 6, 4), jnp.inf)}}, "gradients of 'w' are not finite"),
        ({"keep": 0}, "count for 'all leaves' is 0"),
        ({"keep": 25}, "1 to 24"),
        ({"keep": {"x": 3}}, "counts for 'x'"),
        ({"keep": 0.5}, "whole number"),
        ({"masks": {"w": jnp.zeros((6, 4), bool)}}, "1 to 0"),
        ({"config": so.OBERTConfig(average=7)}, "whole groups of 7"),
        ({"config": so.OBERTConfig(block=8, group=4), "keep": 6}, "groups of 4 weights stay or go together"),
        ({"config": so.OBERTConfig(block=10, group=5), "keep": 5}, "not whole groups of 5"),
    ],
)
def test_bad_input(change, message):
    w, g = a_case()
    asked = {"weights": w, "gradients": g, "keep": 8, "config": so.OBERTConfig(), "masks": None} | change
    with pytest.raises(ValueError, match=message):
        so.obert(asked["weights"], asked["gradients"], asked["keep"], asked["config"], masks=asked["masks"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: so.WoodFisherConfig(damp=0.0), "damp is 0.0"),
        (lambda: so.OBERTConfig(group=4), "divisor of the block, 50"),
        (lambda: so.CAPConfig(pattern=patterns.NM(2, 4, axis="output")), "along the inputs"),
        (lambda: so.CAPConfig(block=10, pattern=patterns.NM(2, 4)), "multiple of 4"),
        (lambda: so.cap(*a_case(), None), "give one of them"),
        (lambda: so.cap(*a_case(), None, so.CAPConfig(pattern=patterns.NM(2, 4))), "4 does not"),
        (lambda: so.CBSConfig(eps=0.0), "eps is 0.0"),
        (lambda: so.CHITAConfig(l2=-1.0), "l2 is -1.0"),
        (lambda: second_order("chitta"), "did you mean 'chita'"),
        (lambda: second_order("chita")(losses, *a_model(), 0.5, so.CBSConfig()), "takes CHITAConfig"),
        (lambda: second_order("obert")(losses, *a_model(), 1.0), "sparsity is 1.0"),
        (lambda: sparsities(0.5, 3, 0.6), "between 0 and the last"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_under_jit_as_without():
    w, g = a_case()
    for prune, config in ((so.obert, so.OBERTConfig(block=8)), (so.cap, so.CAPConfig(damp=1e-3, block=12))):
        eager, jitted = prune(w, g, 9, config), jax.jit(lambda w, g: prune(w, g, 9, config))(w, g)  # noqa: B023
        np.testing.assert_array_equal(eager.masks["w"], jitted.masks["w"])
        np.testing.assert_allclose(eager.weights["w"], jitted.weights["w"], atol=1e-4)
