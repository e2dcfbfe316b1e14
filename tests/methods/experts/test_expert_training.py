"""Training a decoder with experts: its losses do what they say, and a run that was interrupted ends with the same bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprune.methods.experts.losses import AdaptiveFactor
from jprune.methods.experts.sparsity import chunk_sparsity, token_sparsity
from jprune.methods.experts.training import ExpertLosses, losses_of, routed_layers, train_experts
from jprune.models.llama import Llama, llama_config, stack_layers
from jprune.models.moe import Experts, ReMoE, TopK

CONFIG = llama_config(16, 16, 6, 2, 2, experts=Experts(8))
FACTOR = AdaptiveFactor(3.0, stable=8, adjust=4)


def batch_of_step(step):
    rng = np.random.default_rng(step)
    return (rng.integers(0, 4, (4, 1)) * 4 + rng.integers(0, 4, (4, 16))).astype(np.int32)  # each row has four tokens


def started(config=CONFIG):
    v = jax.jit(Llama(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return Llama(config), jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, v)


def activity(module, v):
    _, state = module.apply(v, batch_of_step(99), mutable=["routed"])
    return [np.asarray(r.active) for r in routed_layers(state)]


@pytest.mark.slow
def test_the_losses_make_tokens_and_chunks_sparse_and_resume_to_the_bit(tmp_path):
    module, v = started()
    plain = train_experts(module, v, batch_of_step, 24, optax.adam(1e-2)).state.params
    losses = ExpertLosses(1e-2, FACTOR, chunk=8)
    args = module, v, batch_of_step, 24, optax.adam(1e-2), losses
    whole = train_experts(*args)

    def stops(k):
        if k == 15:
            raise KeyboardInterrupt
        return batch_of_step(k)

    with pytest.raises(KeyboardInterrupt):
        train_experts(module, v, stops, *args[3:], out=tmp_path / "o", save_every=5)
    again = train_experts(*args, out=tmp_path / "o", save_every=5, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.state, again.state)
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["factor"] == pytest.approx(3.0) and {"locality", "chunks", "active"} <= set(lines[0])
    sparse = [activity(module, p) for p in (plain, whole.state.params)]
    for measure in (lambda a: float(token_sparsity(a)), lambda a: chunk_sparsity(a, 8)):
        before, after = (np.mean([measure(a) for a in layers]) for layers in sparse)
        assert after > before + 0.1
    assert float(whole.state.params["params"]["embed"]["embedding"].std()) > 0


def test_a_run_with_another_router_is_not_gone_on_with(tmp_path):
    other, _ = started(llama_config(16, 16, 6, 2, 2, experts=Experts(8, ReMoE(2))))
    topk, w = started(llama_config(16, 16, 6, 2, 2, experts=Experts(8, TopK(2))))
    train_experts(topk, w, batch_of_step, 1, optax.sgd(0.1), out=tmp_path / "o", save_every=1)
    with pytest.raises(ValueError, match="TopK"):
        train_experts(other, w, batch_of_step, 1, optax.sgd(0.1), out=tmp_path / "o", resume=True)


def test_losses_are_means_over_layers_and_see_stacked_layers_alike():
    module, v = started()
    losses = ExpertLosses(1e-2, FACTOR, chunk=8)
    found = []
    for m, p in ((module, v), (Llama(CONFIG, scanned=True), stack_layers(v))):
        _, state = m.apply(p, batch_of_step(0), mutable=["routed"])
        found.append([float(x) for x in losses_of(routed_layers(state), 4, losses)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    _, state = module.apply(v, batch_of_step(0), mutable=["routed"])
    each = [losses_of([r], 4, losses) for r in routed_layers(state)]
    np.testing.assert_allclose(found[0], np.mean(each, axis=0), rtol=1e-5)


def test_remoes_weight_follows_the_share_of_experts_and_what_does_not_fit_is_refused():
    module, v = started(llama_config(16, 16, 6, 2, 2, experts=Experts(8, ReMoE(1))))
    trained = train_experts(module, v, batch_of_step, 6, optax.sgd(0.0), ExpertLosses(balance=1e-3))
    assert float(trained.state.balance) == pytest.approx(1e-3 * 1.05**6, rel=1e-4)  # more than one in eight runs
    module, v = started()
    with pytest.raises(ValueError, match="no whole chunks of 7"):
        train_experts(module, v, batch_of_step, 1, optax.sgd(0.1), ExpertLosses(factor=FACTOR, chunk=7))
    with pytest.raises(ValueError, match="at least 0"):
        ExpertLosses(locality=-1)
