"""iCBS: the block objective, its solvers and the steps, against closed forms, brute force and their own laws."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import normal
from scipy.optimize import Bounds, LinearConstraint, milp

from jprune.importance.sample_gradients import sample_gradients
from jprune.methods.weights.icbs import qubo
from jprune.methods.weights.icbs.problem import (
    Dense,
    LowRank,
    bend,
    block_form,
    block_matrix,
    dense,
    drop_negative,
    energy,
    step_energy,
)
from jprune.methods.weights.icbs.run import icbs
from jprune.methods.weights.icbs.solve import betas, solve
from jprune.methods.weights.icbs.steps import (
    ICBSConfig,
    _Chosen,
    _decide,
    choose_block,
    free_set,
    initial,
    orders_of,
    schedule,
    step,
)
from jprune.surgery.patterns import apply

KEY = jax.random.key(0)
SMALL = Dense(jnp.array([[2.0, 1.0], [1.0, 1.0]]))
# the pair (0, 1) cancels: removing both changes nothing, removing one of them much
PAIR = {"w0": jnp.array([1.0, -1.0, 0.6, 0.6]), "dw": jnp.zeros(4), "gbar": jnp.zeros(4), "a": 1.0, "ridge": 0.0}
PAIR_H = jnp.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def ones(n, k):
    return jnp.asarray((np.arange(n) < k).astype(np.float32))


def brute(q, k):
    """The least energy of all states with k ones, in float64."""
    n = len(q)
    states = np.zeros((len(list(itertools.combinations(range(n), k))), n))
    for row, chosen in enumerate(itertools.combinations(range(n), k)):
        states[row, list(chosen)] = 1
    return np.einsum("si,ij,sj->s", states, np.asarray(q, np.float64), states).min()


def instance(seed, n, rank=12):
    rng = np.random.default_rng(seed)
    w0, g = rng.normal(size=n).astype(np.float32), rng.normal(size=(rank, n)).astype(np.float32)
    dw = np.where(np.arange(n) < n // 2, -w0, 0).astype(np.float32)
    return w0, dw, g, g.mean(0)


# -- the objective ---------------------------------------------------------------------------------------------------


def test_the_form_of_two_weights_by_hand():
    h = jnp.eye(2)
    w0, gbar = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
    form, c = block_matrix(w0, jnp.zeros(2), h, gbar)
    np.testing.assert_allclose(form.q, [[0.0, 0], [0, 4]], atol=1e-6)
    assert float(c) == 0 and float(energy(form, jnp.array([1.0, 0]))) == pytest.approx(0)
    form, c = block_matrix(w0, jnp.array([-1.0, 0]), h, gbar)  # weight 0 is pruned already
    assert float(form.q[0, 0]) == pytest.approx(-1) and float(c) == pytest.approx(1)
    assert float(c + energy(form, jnp.array([1.0, 0]))) == pytest.approx(0, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 2.0), st.floats(0.0, 0.1))
def test_the_form_is_the_energy_of_the_step_and_zero_where_nothing_moves(seed, a, ridge):
    w0, dw, g, gbar = instance(seed, 9)
    form, c = block_form(*map(jnp.asarray, (w0, dw, g, gbar)), a, ridge)
    other, c2 = block_matrix(*map(jnp.asarray, (w0, dw, g.T @ g / len(g), gbar)), a, ridge)
    np.testing.assert_allclose(dense(form).q, other.q, rtol=2e-3, atol=1e-4)
    assert float(c) == pytest.approx(float(c2), rel=1e-3, abs=1e-4)
    now = (dw != 0).astype(np.float32)
    for x in (now, np.random.default_rng(seed).permutation(now)):
        delta = -(dw + w0 * x)
        want, _ = step_energy(jnp.asarray(delta), bend(jnp.asarray(delta), jnp.asarray(g)), jnp.asarray(gbar), a, ridge)
        got = float(c + energy(form, jnp.asarray(x)))
        assert got == pytest.approx(float(want), rel=1e-3, abs=2e-4 * float(abs(c) + 1))
        if a == 0:
            assert float(want) >= 0  # so that no step moves


def test_weights_that_cancel_go_together_and_the_published_form_does_not_see_it():
    form, _ = block_matrix(PAIR["w0"], PAIR["dw"], PAIR_H, PAIR["gbar"])
    found = solve(KEY, form, jnp.array([0.0, 0, 1, 1]), method="exact")
    assert found.x.tolist() == [1, 1, 0, 0] and float(found.energy) == pytest.approx(0)
    published = drop_negative(form)
    assert float(energy(published, jnp.array([1.0, 1, 0, 0]))) == pytest.approx(1.0)
    assert solve(KEY, published, jnp.array([1.0, 1, 0, 0]), method="exact").x.tolist() == [0, 0, 1, 1]


# -- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sa", "descent", "tabu", "exact"])
def test_solvers_on_what_is_known(method):
    assert len(betas()) == 121
    for k, want in ((1, ([0, 1], 1)), (2, ([1, 1], 5))):
        found = solve(KEY, SMALL, ones(2, k), method=method)
        assert (found.x.tolist(), float(found.energy)) == want
    diagonal = np.random.default_rng(3).permutation(14).astype(np.float32) - 5
    found = solve(KEY, Dense(jnp.diag(jnp.asarray(diagonal))), ones(14, 5), method=method)
    assert float(found.energy) == np.sort(diagonal)[:5].sum() and int(found.x.sum()) == 5


@pytest.mark.parametrize("method", ["sa", "tabu"])
def test_annealing_and_tabu_find_the_best_of_all_states_nearly_always(method):
    run = jax.jit(jax.vmap(functools.partial(solve, method=method, restarts=10)))
    forms, starts, best = [], [], []
    for seed in range(40):
        w0, dw, g, gbar = instance(seed, 14)
        form, _ = block_form(*map(jnp.asarray, (w0, dw, g, gbar)), 0.75, 1e-3)
        forms.append(dense(form).q)
        starts.append(ones(14, 7))
        best.append(brute(forms[-1], 7))
    found = run(jax.random.split(KEY, 40), Dense(jnp.stack(forms)), jnp.stack(starts))
    gap = np.asarray(found.energy) - np.array(best)
    assert (gap < 1e-3 * (np.abs(best) + 1)).mean() >= 0.95 and (gap > -1e-2).all()
    assert (np.asarray(found.x).sum(1) == 7).all()


def test_the_best_of_all_states_is_that_of_an_integer_program():
    n = 12
    w0, dw, g, gbar = instance(4, n)
    q = np.asarray(dense(block_form(*map(jnp.asarray, (w0, dw, g, gbar)), 0.75, 1e-3)[0]).q, np.float64)
    pairs = list(itertools.combinations(range(n), 2))  # y_ij = x_i x_j, by McCormick's inequalities
    cost = np.concatenate([np.diag(q), [2 * q[i, j] for i, j in pairs]])
    rows, upper = [], []
    for k, (i, j) in enumerate(pairs, n):
        for of, limit in (((-1, 0, 1), 0), ((0, -1, 1), 0), ((1, 1, -1), 1)):
            row = np.zeros(len(cost))
            row[[i, j, k]] = of
            rows.append(row)
            upper.append(limit)
    ones_ = np.concatenate([np.ones(n), np.zeros(len(pairs))])
    limits = [LinearConstraint(np.array(rows), -np.inf, upper), LinearConstraint(ones_[None], 6, 6)]
    binary = np.concatenate([np.ones(n), np.zeros(len(pairs))])
    best = milp(cost, constraints=limits, integrality=binary, bounds=Bounds(0, 1))
    found = solve(KEY, Dense(jnp.asarray(q, jnp.float32)), ones(n, 6), method="sa", restarts=10)
    assert best.success and float(found.energy) == pytest.approx(best.fun, rel=1e-3)
    np.testing.assert_array_equal(found.x, best.x[:n].round())


@pytest.mark.slow
def test_low_rank_is_the_same_problem():
    w0, dw, g, gbar = instance(5, 40, rank=6)
    form, _ = block_form(*map(jnp.asarray, (w0, dw, g, gbar)), 0.75, 1e-3)
    assert isinstance(form, LowRank)
    x, (i, j) = ones(40, 9), (jnp.array([3, 5]), jnp.array([5, 30]))
    np.testing.assert_allclose(form.times(x), dense(form).times(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(form.entries(i, j), dense(form).entries(i, j), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(form.diagonal(), dense(form).diagonal(), rtol=1e-4, atol=1e-5)
    for method in ("sa", "descent"):
        one, two = (float(solve(KEY, f, ones(40, 20), method=method).energy) for f in (form, dense(form)))
        assert one == pytest.approx(two, rel=0.05) and one < 0.5 * float(energy(form, ones(40, 20)))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["sa", "descent", "tabu"]))
def test_no_solver_makes_it_worse_or_touches_the_padding(seed, method):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(24, 24)).astype(np.float32)
    valid = jnp.arange(24) < 17
    start = jnp.asarray(rng.permutation(17) < 6).astype(jnp.float32)
    start = jnp.concatenate([start, jnp.zeros(7)])
    found = solve(KEY, Dense(jnp.asarray(q + q.T)), start, valid, method=method, restarts=2)
    assert float(found.energy) <= float(found.start) + 1e-5 and float(found.x.sum()) == 6
    assert not np.asarray(found.x)[17:].any()
    assert float(energy(Dense(jnp.asarray(q + q.T)), found.x)) == pytest.approx(float(found.energy), rel=1e-4, abs=1e-4)


def test_more_restarts_are_never_worse_and_a_factor_changes_nothing():
    w0, dw, g, gbar = instance(9, 30)
    form = dense(block_form(*map(jnp.asarray, (w0, dw, g, gbar)), 0.75, 1e-3)[0])
    one, many = (solve(KEY, form, ones(30, 15), restarts=r) for r in (1, 6))
    assert float(many.energy) <= float(one.energy) + 1e-4
    np.testing.assert_array_equal(solve(KEY, form.scaled(8.0), ones(30, 15), restarts=1).x, one.x)
    with pytest.raises(ValueError, match="up to 20 variables; these are 30"):
        solve(KEY, form, ones(30, 15), method="exact")


# -- problems in files -----------------------------------------------------------------------------------------------


def test_a_block_goes_out_as_a_file_and_its_solution_comes_back(tmp_path):
    w0, dw, g, gbar = instance(2, 8)
    form = dense(block_form(*map(jnp.asarray, (w0, dw, g, gbar)), 0.75, 1e-3)[0])
    start = ones(8, 4)
    qubo.save_qubo(tmp_path / "block.json", form, start)
    again, x0 = qubo.load_qubo(tmp_path / "block.json")
    np.testing.assert_allclose(again.q, form.q, rtol=1e-6)
    matrix, constant = qubo.penalised(again, int(x0.sum()))
    states = np.array(list(itertools.product((0, 1), repeat=8)))
    best = states[np.einsum("si,ij,sj->s", states, matrix, states).argmin()]  # what a solver without conditions finds
    assert best.sum() == 4 and best @ matrix @ best + constant == pytest.approx(brute(form.q, 4), rel=1e-4)
    (tmp_path / "x.json").write_text(json.dumps({"x": best.tolist()}))
    found = qubo.read_solution(tmp_path / "x.json", form, start)
    assert float(found.energy) == pytest.approx(brute(form.q, 4), rel=1e-3)
    for wrong, why in (
        ([1, 0], "2 variables, not of 8"),
        ([1] * 8, "8 ones"),
        ([0.5] * 8, "zeros and ones"),
        (max(states[states.sum(1) == 4], key=lambda s: s @ np.asarray(form.q) @ s).tolist(), "above"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({"x": wrong}))
        with pytest.raises(ValueError, match=why):
            qubo.read_solution(tmp_path / "x.json", form, start)


@pytest.mark.parametrize(
    ("change", "why"),
    [({"n": 9}, "another size"), ({"ones": 1}, "asks for 1 ones"), ({"format": "x"}, "no jprune-qubo-1 file"),
     ({"matrix": [[1, 2], [3, 4]], "n": 2, "start": [1, 0], "ones": 1}, "not symmetric"),
     ({"start": [2, 0, 0]}, "zeros and ones"), ({"matrix": [["a"] * 3] * 3}, "no numbers")],
)  # fmt: skip
def test_damaged_problem_files_are_refused(change, why, tmp_path):
    qubo.save_qubo(tmp_path / "q.json", Dense(jnp.eye(3)), ones(3, 2))
    said = json.loads((tmp_path / "q.json").read_text())
    (tmp_path / "q.json").write_text(json.dumps({**said, **change}))
    with pytest.raises(ValueError, match=why):
        qubo.load_qubo(tmp_path / "q.json")


# -- steps -----------------------------------------------------------------------------------------------------------


def test_shares_that_are_fixed_by_hand():
    scores = np.random.default_rng(0).permutation(100).astype(float)
    mask = scores >= 70
    free = free_set(scores, mask, ICBSConfig())
    assert ((~free) & ~mask).sum() == 29 and ((~free) & mask).sum() == 10 and free.sum() == 41 + 20
    assert scores[free].min() == 29 and scores[free].max() == 89
    every = free_set(scores, scores >= 99, ICBSConfig(fix_kept=0.35))  # round(0.35) of one kept weight is none
    assert every[scores == 99].all()


def test_the_block_is_the_pruned_of_highest_and_the_kept_of_lowest_score():
    scores = jnp.array([5.0, 1, 4, 2, 9, 3, 8, 7, 7, 6])
    mask = jnp.array([False, False, False, False, True, True, True, True, True, False])
    config = ICBSConfig(block_size=4, tabu=0.5)
    args = scores, mask, jnp.ones(10, bool)
    b = choose_block(*args, jnp.zeros(10, jnp.int32), 0, config)
    assert b.index.tolist() == [9, 0, 5, 7] and b.pruned.tolist() == [True, True, False, False]  # 7 before 8: a tie
    pushed = jnp.zeros(10, jnp.int32).at[b.index].set(jnp.arange(1, 5))
    after = choose_block(*args, pushed, 4, config)  # 5 of 10 are held back
    assert after.index.tolist() == [2, 3, 8, 6]
    few = jnp.zeros(10, bool).at[jnp.array([0, 1, 4])].set(True)
    small = choose_block(scores, mask, few, pushed, 4, config)  # all fit: what was chosen lately does not matter
    assert sorted(np.asarray(small.index)[np.asarray(small.valid)]) == [0, 1, 4] and int(small.pruned.sum()) == 2


def network():
    params = {"one": normal(0, 12, 20), "two": 20 * normal(1, 20, 4), "b": normal(2, 4)}

    def losses(p, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ p["one"]) @ p["two"] + p["b"], y)

    return params, losses


PARAMS, LOSSES = network()
DATA = normal(3, 64, 12)
LABELS = jnp.argmax(jnp.tanh(DATA @ PARAMS["one"]) @ PARAMS["two"], axis=1)
CONFIG = ICBSConfig(steps=6, block_size=32, samples=64, solver="descent")


def started(config=CONFIG, keep=0.3):
    paths = ["one", "two"]
    scores = {p: jnp.abs(normal(9 + i, *PARAMS[p].shape)) for i, p in enumerate(paths)}  # a bad mask to begin with
    masks = {p: s >= jnp.sort(s.ravel())[-round(keep * s.size)] for p, s in scores.items()}
    orders = orders_of(PARAMS, paths)
    return initial(scores, masks, config, orders), orders, masks


def test_steps_lower_the_loss_at_the_same_density_and_leave_what_is_fixed():
    state, orders, masks = started()
    before = float(LOSSES(apply(PARAMS, masks), (DATA, LABELS)).mean())
    config = dataclasses.replace(CONFIG, steps=20)
    trained = icbs(LOSSES, PARAMS, state, lambda k: (DATA, LABELS), config, orders)
    end = trained.state
    now = apply(PARAMS, end.masks)
    assert float(LOSSES(now, (DATA, LABELS)).mean()) < 0.85 * before
    for p, m in masks.items():
        fixed = ~np.asarray(state.free[p])
        assert int(end.masks[p].sum()) == int(m.sum()) and (end.masks[p] != m).any()
        np.testing.assert_array_equal(np.asarray(end.masks[p])[fixed], np.asarray(m)[fixed])
        np.testing.assert_array_equal(np.asarray(now[p])[end.masks[p]], np.asarray(PARAMS[p])[end.masks[p]])


def test_a_step_says_what_it_does_and_without_a_gradient_nothing_moves():
    state, orders, masks = started()
    new, info = step(KEY, LOSSES, PARAMS, state, {"one": [0]}, (DATA, LABELS), CONFIG, orders)
    changed = np.argwhere(np.asarray(new.masks["one"] != masks["one"]).ravel()).ravel()
    assert len(changed) == int(info.flips["one"][0]) > 0 and int(info.chosen["one"][0]) == 32
    g = sample_gradients(LOSSES, apply(PARAMS, masks), ["one"], (DATA, LABELS))["one"].reshape(64, -1)
    delta = (apply(PARAMS, new.masks)["one"] - apply(PARAMS, masks)["one"]).ravel()
    want, predicted = step_energy(delta, bend(delta, g), g.mean(0), CONFIG.gradient_weight, CONFIG.ridge)
    assert float(info.energy["one"][0]) == pytest.approx(float(want), rel=1e-3) and want < 0
    assert float(info.predicted["one"][0]) == pytest.approx(float(predicted), rel=1e-3)
    assert (np.asarray(new.pushed["one"]) > 0).sum() == 32 == int(new.counts["one"][0])
    assert new.masks["two"] is state.masks["two"]
    for config in (ICBSConfig(gradient_weight=0.0, block_size=32, solver=s) for s in ("descent", "tabu")):
        still, _ = step(KEY, LOSSES, PARAMS, state, {"one": [0]}, (DATA, LABELS), config, orders)
        np.testing.assert_array_equal(still.masks["one"], masks["one"])


@pytest.mark.slow
def test_the_exact_hessian_and_that_of_the_mean_gradient():
    state, orders, masks = started()
    now = apply(PARAMS, masks)
    for hessian in ("exact", "fisher_mean"):
        config = dataclasses.replace(CONFIG, hessian=hessian)
        new, info = step(KEY, LOSSES, PARAMS, state, {"one": [0], "two": [0]}, (DATA, LABELS), config, orders)
        for p in ("one", "two"):

            def moved(v, p=p):
                return LOSSES({**now, p: now[p] + v.reshape(now[p].shape)}, (DATA, LABELS)).mean()

            delta = (apply(PARAMS, new.masks)[p] - now[p]).ravel()
            g = jax.grad(moved)(jnp.zeros(delta.size))
            bent = delta @ jax.hessian(moved)(jnp.zeros(delta.size)) @ delta if hessian == "exact" else (g @ delta) ** 2
            want, _ = step_energy(delta, bent, g, CONFIG.gradient_weight, CONFIG.ridge)
            assert float(info.energy[p][0]) == pytest.approx(float(want), rel=2e-3) and want < 0
            assert int(info.flips[p][0]) > 0


def test_how_blocks_are_selected():
    state, orders, masks = started()
    seen = {}
    for selection in ("gradient", "magnitude", "random", "wanda"):
        given = (lambda now, batch: {"one": -jnp.abs(PARAMS["one"])}) if selection == "wanda" else None
        config = dataclasses.replace(CONFIG, selection=selection, fix_pruned=0.0, fix_kept=0.0)
        state = initial({p: jnp.abs(PARAMS[p]) for p in masks}, masks, config, orders)
        new, _ = step(KEY, LOSSES, PARAMS, state, {"one": [0]}, (DATA, LABELS), config, orders, given)
        seen[selection] = np.asarray(new.pushed["one"] > 0)
    size, mask = np.abs(np.asarray(PARAMS["one"])), np.asarray(masks["one"])
    assert all(s.sum() == 32 for s in seen.values())
    by_size = seen["magnitude"]
    assert size[by_size & ~mask].min() >= size[~by_size & ~mask].max()  # the largest pruned, the smallest kept
    assert size[by_size & mask].max() <= size[~by_size & mask].min()
    turned = seen["wanda"]  # scores of the caller's own: here the other way round
    assert size[turned & ~mask].max() <= size[~turned & ~mask].min()
    assert len({s.tobytes() for s in seen.values()}) == 4
    with pytest.raises(ValueError, match="needs importance"):
        config = dataclasses.replace(CONFIG, selection="wanda")
        step(KEY, LOSSES, PARAMS, state, {"one": [0]}, (DATA, LABELS), config, orders)


def test_weights_that_the_loss_does_not_see_go_first():
    dead = DATA.at[:, :3].set(0)  # three inputs that are always 0
    state, orders, masks = started(dataclasses.replace(CONFIG, fix_pruned=0.0, fix_kept=0.0))
    kept = np.asarray(masks["one"])[:3].sum()
    config = dataclasses.replace(CONFIG, prune_idle=True, ridge=0.0, block_size=240)
    new, info = step(KEY, LOSSES, PARAMS, state, {"one": [0]}, (dead, LABELS), config, orders)
    assert kept > 3 and not np.asarray(new.masks["one"])[:3].any()
    assert int(new.masks["one"].sum()) == int(masks["one"].sum()) and info.energy["one"][0] < 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 9))
def test_idle_weights_go_first_and_the_others_are_the_best_that_is_left(seed, many):
    n, k = 10, 5
    w0, _, g, _ = instance(seed, n)
    dead = np.random.default_rng(seed).permutation(n) < many
    g = np.where(dead, 0, g)
    block = _Chosen(jnp.arange(n), jnp.ones(n, bool), jnp.arange(n) < k)
    config = ICBSConfig(block_size=n, ridge=0.0, solver="exact", prune_idle=True)
    pruned, energy_, _ = _decide(KEY, block, jnp.asarray(w0), jnp.asarray(g), jnp.asarray(g.mean(0)), config)
    best = 0.0  # of the current state, which stays where idle weights first is worse
    for chosen in itertools.combinations(range(n), k):
        x = np.isin(np.arange(n), chosen)
        if x[dead].sum() == min(many, k):
            delta = w0 * ~x - w0 * (np.arange(n) >= k)
            value = 0.75 * g.mean(0) @ delta + np.mean((g @ delta) ** 2) / 2
            best = min(best, value)
    assert int(pruned.sum()) == k and float(energy_) == pytest.approx(best, rel=1e-3, abs=1e-4)


def test_a_run_that_was_interrupted_ends_with_the_same_masks(tmp_path):
    state, orders, _ = started()

    def draws(k):
        return tuple(x[np.random.default_rng(k).permutation(64)[:40]] for x in (DATA, LABELS))

    whole = icbs(LOSSES, PARAMS, state, draws, CONFIG, orders, seed=1)

    def stops(k):
        if k == 4:
            raise KeyboardInterrupt
        return draws(k)

    with pytest.raises(KeyboardInterrupt):
        icbs(LOSSES, PARAMS, state, stops, CONFIG, orders, seed=1, out=tmp_path / "o", save_every=2)
    again = icbs(LOSSES, PARAMS, state, draws, CONFIG, orders, seed=1, out=tmp_path / "o", save_every=2, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.state, again.state)
    assert len(again.losses) < len(whole.losses) == 6
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and {"energy", "predicted", "flips"} <= set(lines[0])


def test_every_part_has_its_turn():
    orders = {"a": np.zeros((2, 1000)), "b": np.zeros((1, 10))}
    for parts in (1, 2):
        found = schedule(orders, 14, parts, seed=0)
        turns = [(p, i) for s in found for p, which in s.items() for i in which]
        assert len(found) == 14 and len(turns) == 14 * parts
        assert all(len({(p, i) for p, w in s.items() for i in w}) == parts for s in found)
        assert turns.count(("a", 0)) == turns.count(("a", 1)) == 6 * parts and turns.count(("b", 0)) == 2 * parts
    assert schedule(orders, 2, 0, seed=0) == [{"a": [0, 1], "b": [0]}] * 2


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"block_size": 1}, "at least 2"), ({"tabu": 1.0}, r"in \[0, 1\)"), ({"pruned_share": 0.0}, r"in \(0, 1\)"),
     ({"ridge": -1.0}, "at least 0"), ({"solver": "x"}, "sa, descent, tabu or exact"), ({"hessian": "x"}, "fisher, exact"),
     ({"selection": "x"}, "gradient, magnitude")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        ICBSConfig(**settings)
    _, orders, masks = started()
    with pytest.raises(ValueError, match="not finite"):
        initial({p: jnp.full(m.shape, jnp.nan) for p, m in masks.items()}, masks, CONFIG, orders)
