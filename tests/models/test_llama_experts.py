"""A decoder with experts in place of MLPs: scanned or not, cached or not, padded or not it is one function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, same_numbers

import jprune
from jprune.checkpoint import save_hf
from jprune.models.decoding import generate, new_cache
from jprune.models.llama import Llama, config_from_params, llama_config, stack_layers
from jprune.models.moe import Experts, ReluNorm, TopK, all_experts, tile_experts, union_experts

CONFIG = llama_config(19, 16, 12, 2, 4, kv_heads=2, experts=Experts(6))
IDS = np.random.default_rng(0).integers(0, 19, (2, 7))
VARIABLES = jax.tree.map(
    lambda x: x * 8 if x.ndim > 1 else x, jax.jit(Llama(CONFIG).init)(jax.random.key(0), jnp.asarray(IDS))
)


@jax.jit
def routed_of(ids, mask=None):
    logits, state = Llama(CONFIG).apply(VARIABLES, ids, mask, mutable=["routed"])
    return logits, state["routed"]


def test_scanned_and_cached_passes_agree():
    whole, routed = routed_of(IDS)
    stacked = Llama(CONFIG, scanned=True)
    one, state = stacked.apply(stack_layers(VARIABLES), IDS, mutable=["routed"])
    same_numbers(one, whole, 64)
    assert state["routed"]["layers"]["layer"].active.shape == (2, 14, 6)
    np.testing.assert_array_equal(state["routed"]["layers"]["layer"].active[1], routed["layer1"]["layer"].active)
    cache, rows = new_cache(Llama(CONFIG), 2, 7), []
    step = jax.jit(lambda ids, cache: Llama(CONFIG).apply(VARIABLES, ids, None, cache))
    for t in range(7):
        logits, cache = step(IDS[:, t : t + 1], cache)
        rows.append(logits)
    same_numbers(jnp.concatenate(rows, 1), whole, 64)
    assert 0.1 < float(routed["layer0"]["layer"].active.mean()) < 0.9
    assert generate(Llama(CONFIG), VARIABLES, IDS, 3).shape == (2, 10)


@pytest.mark.parametrize("experts_fn", [tile_experts, union_experts])
def test_kernels_in_place_of_all_experts_give_the_same(experts_fn):
    whole, _ = routed_of(IDS)
    same_numbers(jax.jit(Llama(CONFIG, experts_fn=experts_fn).apply)(VARIABLES, IDS), whole, 64)


def test_gradients_through_the_kernels_are_those_of_all_experts():
    def loss(v, experts_fn):
        return jnp.sum(jnp.sin(Llama(CONFIG, experts_fn=experts_fn).apply(v, IDS)))

    found, want = (jax.jit(jax.grad(loss), static_argnums=1)(VARIABLES, fn) for fn in (tile_experts, all_experts))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        same_numbers(a, b, 4096)


def test_padding_runs_no_expert():
    mask = np.ones((2, 7), int)
    mask[1, :3] = 0
    logits, routed = routed_of(IDS, mask)
    active = np.asarray(routed["layer0"]["layer"].active).reshape(2, 7, 6)
    assert not active[1, :3].any() and active[1, 3:].any()
    alone, _ = routed_of(IDS[1:, 3:])
    same_numbers(logits[1, 3:], alone[0], 64)


def test_experts_and_their_widths_are_groups_that_are_cut_like_any_other():
    graph = jprune.trace(Llama(CONFIG).apply, VARIABLES, IDS)
    widths = next(g for g in graph.groups if g.startswith("params/layer0/experts/up"))
    few = graph.compact(VARIABLES, {widths: np.arange(12) < 5})
    small = config_from_params(few, CONFIG)
    assert small.ffn == (5, 12) and small.experts == CONFIG.experts
    got = Llama(small).apply(few, IDS)
    cut = jax.tree.map(jnp.asarray, VARIABLES)
    cut["params"]["layer0"]["experts"]["down"] = cut["params"]["layer0"]["experts"]["down"].at[:, 5:].set(0)
    same_numbers(got, Llama(CONFIG).apply(cut, IDS), 64)


def test_channels_inside_gated_experts_obey_the_laws():
    """One group for all experts of a layer: gate, up and down; and a number of rows that stays free."""
    gated = dataclasses.replace(CONFIG, experts=Experts(6, TopK(2), gated=True))
    v = jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, jax.jit(Llama(gated).init)(jax.random.key(0), IDS))
    group = "params/layer0/experts/gate:2"
    graph = check_laws(Llama(gated).apply, v, (IDS,), {group: np.arange(12) < 5}, gradients=False, tolerance=1e-4)
    assert {(m.path, m.axis) for m in graph.groups[group].members} == {
        (f"params/layer0/experts/{name}", axis) for name, axis in (("gate", 2), ("up", 2), ("down", 1))
    }
    small = graph.compact(v, {group: np.arange(12) < 5})
    assert config_from_params(small, gated).ffn == (5, 12)
    run = jax.jit(graph.replay({group: np.arange(12) < 5}))
    assert run(small, np.concatenate([IDS, IDS])).shape == (4, 7, 19)


def test_other_routers_and_what_is_refused(tmp_path):
    topk = dataclasses.replace(CONFIG, experts=Experts(6, TopK(2)))
    v = Llama(topk).init(jax.random.key(0), IDS)
    _, state = Llama(topk).apply(v, IDS, mutable=["routed"])
    assert (np.asarray(state["routed"]["layer1"]["layer"].active).sum(-1) == 2).all()
    with pytest.raises(ValueError, match="at least one expert"):
        Experts(0, ReluNorm())
    with pytest.raises(ValueError, match="with experts fits no Hugging Face model"):
        save_hf(VARIABLES, CONFIG, tmp_path / "x")
