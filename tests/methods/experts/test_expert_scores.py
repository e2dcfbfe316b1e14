"""Scores of experts against loops over tokens; removing experts changes no token that used none of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from laws import same_numbers

from jprune.methods.contract import Amount, DecoderTask
from jprune.methods.experts.fewer import take_experts
from jprune.methods.experts.for_decoders import METHODS, ExpertConfig, lowest
from jprune.methods.experts.over_devices import experts_over
from jprune.methods.experts.scores import expert_stats, frequency, reap, router_weight, sums_of_layer
from jprune.models.llama import Llama, llama_config
from jprune.models.llama_placement import placement
from jprune.models.moe import (
    Experts,
    ReluNorm,
    TopK,
    all_experts,
    blockffn,
    sorted_experts,
    tile_experts,
    union_experts,
)
from jprune.tracing.paths import flatten, path_str

E, K, D, F, VOCAB = 5, 2, 16, 6, 11
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, VOCAB, (4, 7))


@functools.cache
def model(renormalised=True, count=E):
    module = Llama(llama_config(VOCAB, D, F, 2, 4, experts=Experts(count, TopK(K, renormalised), gated=True)))
    v = jax.jit(module.init)(jax.random.key(0), IDS[:, :2])
    return module, jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, v)


def layer(gated=True, seed=0):
    rng = np.random.default_rng(seed)
    out = {
        "router": {"kernel": rng.normal(size=(D, E))},
        "up": rng.normal(size=(E, D, F)),
        "down": rng.normal(size=(E, F, D)),
    }
    out |= {"gate": rng.normal(size=(E, D, F))} if gated else {"router_norm": {"scale": rng.normal(size=E)}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), out)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("gated", [True, False])
def test_a_layer_is_a_loop_over_tokens_and_so_are_its_sums(gated):
    router = TopK(K) if gated else ReluNorm()
    params, x = layer(gated), RNG.normal(size=(9, D)).astype(np.float32)
    y, routed = jax.jit(lambda x: blockffn(params, x, router))(x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    wanted, sums = np.zeros(x.shape), np.zeros((4, E))
    for t, row in enumerate(x.astype(np.float64)):
        z = row @ p["router"]["kernel"]
        if gated:
            chosen = np.argsort(-z)[:K]
            g = np.exp(z[chosen]) / np.exp(z[chosen]).sum()
        else:
            r = np.maximum(z, 0)
            chosen = np.flatnonzero(r)
            g = (r / np.sqrt((r**2).mean() + 1e-5) * p["router_norm"]["scale"])[chosen]
        for e, weight in zip(chosen, g):
            h = row @ p["up"][e]
            f = (silu(row @ p["gate"][e]) * h if gated else silu(h)) @ p["down"][e]
            wanted[t] += weight * f
            sums[:, e] += 1, abs(weight), abs(weight) * np.linalg.norm(f), np.linalg.norm(f)
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    room = int(routed.active.sum(0).max())
    for r in (room, room + 2):  # more room than tokens changes nothing
        np.testing.assert_allclose(sums_of_layer(params, x, routed.scores, routed.active, r), sums, rtol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_sorted_experts_are_all_experts(gated):
    """Values and gradients, for a router that takes k, and where a token goes to more."""
    params, x = layer(gated), RNG.normal(size=(9, D)).astype(np.float32)

    def loss(params, x, fn, router):
        y, _ = blockffn(params, x, router, experts_fn=fn)
        return (y * np.arange(D)).sum(), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=(2, 3))
    (_, wanted), slopes = run(params, x, all_experts, TopK(K))
    (_, y), found = run(params, x, sorted_experts(K), TopK(K))
    same_numbers(y, wanted, terms=K * F)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(np.abs(b).max()) + 1e-6)
    (_, y), found = run(params, x, sorted_experts(K - 1), TopK(K))  # more pairs than room: all experts
    same_numbers(y, wanted, terms=K * F)
    same_numbers(found[0]["up"], slopes[0]["up"], terms=9 * D)
    with pytest.raises(ValueError, match="k is 6: there are 5 experts"):
        blockffn(params, jnp.asarray(x), TopK(K), experts_fn=sorted_experts(6))
    if gated:
        for fn in (tile_experts, union_experts, experts_over(Mesh(np.array(jax.devices()[:1]), ("expert",)))):
            with pytest.raises(ValueError, match="for experts without gates"):
                blockffn(params, jnp.asarray(x), TopK(K), experts_fn=fn)


def test_scores_follow_their_definitions_however_the_text_is_cut():
    module, v = model()
    whole = expert_stats(module, v, [IDS])
    parts = expert_stats(module, v, [IDS[:1], IDS[1:2], IDS[2:]])
    for a, b in zip(whole[:4], parts[:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert whole.seen == parts.seen == IDS.size and (whole.tokens.sum(1) == K * IDS.size).all()
    np.testing.assert_allclose(whole.weight.sum(1), IDS.size, rtol=1e-4)  # a token's weights add up to 1
    assert (reap(whole) == np.where(whole.tokens > 0, whole.output / np.maximum(whole.tokens, 1), 0)).all()
    assert frequency(whole) is whole.tokens and router_weight(whole) is whole.weight
    louder = jax.tree.map(lambda x: x, v)
    louder["params"]["layer1"]["experts"]["down"] = v["params"]["layer1"]["experts"]["down"].at[3].multiply(4.0)
    again = expert_stats(module, louder, [IDS])
    np.testing.assert_allclose(reap(again)[1], reap(whole)[1] * np.where(np.arange(E) == 3, 4, 1), rtol=1e-4)
    plain, official = (expert_stats(module, v, [IDS], gate) for gate in ("combine", "official"))
    assert (official.weight < plain.weight).all()  # of a softmax over all experts
    with pytest.raises(ValueError, match="no experts"):
        expert_stats(Llama(llama_config(VOCAB, D, F, 1, 4)), v, [IDS])
    with pytest.raises(ValueError, match="stacked"):
        expert_stats(Llama(module.config, scanned=True), v, [IDS])
    with pytest.raises(ValueError, match="no batches"):
        expert_stats(module, v, [])


def test_tokens_whose_experts_stay_get_what_they_got():
    params, x = layer(), RNG.normal(size=(40, D)).astype(np.float32)
    run = jax.jit(lambda p, r, x: blockffn(p, x, r), static_argnums=1)
    y, routed = run(params, TopK(K), x)
    keep = [4, 0, 2]
    small, router = take_experts(params, keep, TopK(K))
    now, _ = run(small, router, x)
    untouched = ~np.asarray(routed.active)[:, [1, 3]].any(axis=1)
    assert 0 < untouched.sum() < len(x)
    same_numbers(now[untouched], y[untouched], terms=K * F)
    assert not np.allclose(now[~untouched], y[~untouched], atol=1e-2)
    grown, _ = run(small, TopK(K, False), x)
    before, _ = run(params, TopK(K, False), x)
    z = np.asarray(routed.logits, np.float64)
    share = np.exp(z)[:, keep].sum(1) / np.exp(z).sum(1)  # without renormalisation weights grow by 1 over this
    np.testing.assert_allclose(grown[untouched] * share[untouched, None], before[untouched], atol=1e-3)
    with pytest.raises(ValueError, match="1 experts stay, but a token goes to 2"):
        take_experts(params, [1], TopK(K))


def task(amount=None, renormalised=True, count=E):
    module, v = model(renormalised, count)
    example = (jax.ShapeDtypeStruct((2, 7), jnp.int32),)
    return DecoderTask(module, None, v, example, amount, lambda: [IDS], lambda: [IDS], None)


def test_every_method_leaves_the_same_number_in_every_layer_and_a_model_that_runs():
    by_name = {m.name: m for m in METHODS}
    config, stats = ExpertConfig(experts=0.5), expert_stats(*model(), [IDS])
    wanted = {"reap": reap(stats), "expert-frequency": stats.tokens, "expert-weight": stats.weight}
    for name in ("reap", "expert-frequency", "expert-weight", "expert-random"):
        found = by_name[name].find(task(), config)
        if name in wanted:
            for i, kept in enumerate(found.units.values()):
                assert set(kept) == set(np.argsort(wanted[name][i], kind="stable")[2:])
        assert set(found.widths.values()) == {(E, 3)} and found.model.config.experts.count == 3
        assert found.cost.params == sum(x.size for x in jax.tree.leaves(found.variables))
    logits = jax.jit(found.model.apply)(found.variables, IDS)
    assert np.isfinite(logits).all()
    by_amount = by_name["reap"].find(task(Amount.of("experts", sparsity=0.4)), ExpertConfig())
    assert by_amount.model.config.experts.count == 3
    assert by_name["reap"].find(task(renormalised=False), config).warnings
    with pytest.raises(ValueError, match="not both"):
        by_name["reap"].check(task(Amount.of("experts", sparsity=0.4)), config)
    with pytest.raises(ValueError, match=r"leaves 1, but a token goes to 2: remove at most 0\.6"):
        by_name["reap"].check(task(), ExpertConfig(experts=0.8))
    for setting in ({"experts": 1.0}, {"gate": "other"}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            ExpertConfig(**setting)


def test_experts_that_nobody_uses_go_without_a_trace():
    """A text of one token over and over uses as many experts as a token goes to."""
    ids = np.full((2, 7), 3)
    some = dataclasses.replace(task(), inputs=lambda: [ids])
    found = {m.name: m for m in METHODS}["expert-idle"].find(some, None)
    assert found.model.config.experts.count == K and found.notes["experts_never_used"] == [E - K] * 2
    assert found.notes["routed_pairs_lost"] == [0.0, 0.0]
    one, other = jax.jit(lambda: (some.model.apply(some.variables, ids), found.model.apply(found.variables, ids)))()
    same_numbers(other, one, terms=2 * (K * F + D))
    nothing = {m.name: m for m in METHODS}["expert-idle"].find(task(), None)
    assert nothing.model.config.experts.count == E and "nothing is removed" in nothing.warnings[0]
    assert (lowest(np.array([[3.0, 1.0, 1.0, 2.0]]), 2) == [[True, False, False, True]]).all()


def test_four_devices_see_what_one_sees():
    """Experts divided by their channels, rows by the data axis."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    module, v = model()
    place = placement(mesh)
    shapes = {path: place(path, leaf) for path, leaf in flatten(v)}
    assert shapes["params/layer0/experts/up"].spec == PartitionSpec(None, None, "model")
    assert shapes["params/layer0/experts/down"].spec == PartitionSpec(None, "model", None)
    spread = jax.tree_util.tree_map_with_path(lambda path, x: jax.device_put(x, place(path_str(path), x)), v)
    ids = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec("data")))
    for one, four in zip(expert_stats(module, v, [IDS]), expert_stats(module, spread, [ids]), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-4)
