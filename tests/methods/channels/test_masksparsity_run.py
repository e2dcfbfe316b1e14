"""The five steps end to end on a small network, with the user's own training function, and resumed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_digits import few_digits

import jprune
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.channels.masksparsity.run import MaskSparsityConfig, run
from jprune.models import rebuild, resnet
from jprune.training import TrainConfig, evaluate

QUICK = TrainConfig(epochs=2, batch_size=16, eval_every_epochs=0)
CONFIG = MaskSparsityConfig(
    baseline=dataclasses.replace(QUICK, epochs=4),
    sparse=QUICK,
    finetune=dataclasses.replace(QUICK, epochs=1, learning_rate=0.01),
    strength_global=0.02,
    strength=0.2,
    rule=ms.MaskRule("sparsity", sparsity=0.5),
    coupled=False,
    prune_by="mask",
)


@pytest.fixture(scope="module")
def ingredients():
    model = resnet.small((1, 1), widths=(8, 16))
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1))), few_digits(320, 96)


def test_the_pipeline_prunes_what_it_masked_and_resumes(ingredients, tmp_path):
    model, variables, data = ingredients
    result = run(model, variables, data, CONFIG, out=tmp_path, progress=False)
    (only,) = result.rounds
    assert sum(int((~k).sum()) for k in only.mask.values()) == (8 + 16) // 2
    assert only.macs[1] < only.macs[0]
    assert only.accuracy.keys() == {"before", "pruned", "finetuned"}
    assert evaluate(result.model, result.variables, data).accuracy == only.accuracy["finetuned"] > 0.5
    small = rebuild(model, result.variables)  # the replayed network is the rebuilt module
    assert evaluate(small, result.variables, data) == pytest.approx(
        evaluate(result.model, result.variables, data), rel=1e-5
    )
    again = run(model, variables, data, CONFIG, out=tmp_path, resume=True, progress=False)
    for a, b in zip(jax.tree.leaves(result.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    sliced = only.plan.apply(variables)
    assert jax.tree.map(jnp.shape, sliced) == jax.tree.map(jnp.shape, result.variables)


def test_the_users_own_training_function_sees_every_phase(ingredients):
    model, variables, data = ingredients
    rng = np.random.default_rng(1)
    variables = jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype) if "scale" in str(p[-1]) else x, variables
    )
    seen = []

    def fit(name, forward, weights, config, transform):
        seen.append((name, config.epochs, transform is not None))
        if name.endswith("masked"):  # what training would do: the masked scales vanish
            masks = transform.init(None).masks
            weights = jax.tree_util.tree_map_with_path(
                lambda p, x: x * (1 - masks.get(jax.tree_util.keystr(p, simple=True, separator="/"), 0)), weights
            )
        return weights

    config = dataclasses.replace(CONFIG, baseline=None, rounds=2, prune_by="threshold")
    result = run(model, variables, data, config, train_fn=fit)
    phases = ["global", "masked", "finetune"]
    assert seen == [(f"round{r}-{p}", 1 if p == "finetune" else 2, p != "finetune") for r in (1, 2) for p in phases]
    for r in result.rounds:
        assert r.masked_peak == 0.0 and r.decision.masked_survivors == r.decision.unmasked_losses == 0
    sizes = [sum(k.sum() for k in r.decision.keep.values()) for r in result.rounds]
    assert sizes == [12, 6]
    assert result.rounds[1].graph.cost().macs < result.rounds[0].graph.cost().macs


def test_a_mask_of_ones_own_takes_the_place_of_the_first_two_steps(ingredients):
    model, variables, data = ingredients
    graph = jprune.trace(model.apply, variables, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
    mask = {g: np.arange(graph.groups[g].size) % 2 == 0 for g in ms.listed_scales(graph, coupled=False)}

    class Seen(Exception):
        pass

    def fit(name, forward, weights, config, transform):
        raise Seen(name, transform.init(None).masks)

    config = dataclasses.replace(CONFIG, baseline=None)
    with pytest.raises(Seen) as found:
        run(model, variables, data, config, train_fn=fit, mask=mask)
    name, masks = found.value.args
    assert name == "round1-masked"
    for g, (path,) in ms.listed_scales(graph, coupled=False).items():
        np.testing.assert_array_equal(masks[path], ~mask[g])
    with pytest.raises(ValueError, match="one boolean per channel of every listed group"):
        run(model, variables, data, config, train_fn=fit, mask=dict(list(mask.items())[1:]))
    with pytest.raises(ValueError, match="for one round, not for 2"):
        run(model, variables, data, dataclasses.replace(config, rounds=2), train_fn=fit, mask=mask)


def test_absorbing_constants_repairs_what_the_shifts_did(ingredients):
    model, variables, data = ingredients
    rng = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype) if "bias" in str(p[-1]) else x, variables
    )

    def fit(name, forward, weights, config, transform):
        masks = {} if transform is None or name.endswith("global") else transform.init(None).masks
        return jax.tree_util.tree_map_with_path(
            lambda p, x: x * (1 - masks.get(jax.tree_util.keystr(p, simple=True, separator="/"), 0)), weights
        )

    logits = {}
    x = data.test.read(np.arange(64))["image"]
    for absorb in (False, True):
        config = dataclasses.replace(CONFIG, baseline=None, finetune=None, absorb=absorb)
        result = run(model, variables, data, config, train_fn=fit)
        logits[absorb] = np.asarray(result.model.evaluate(result.variables, x))
    (only,) = result.rounds
    listed = ms.listed_scales(only.graph, coupled=False)
    masks = ms.leaf_masks(listed, only.mask)
    dense = jax.tree_util.tree_map_with_path(
        lambda p, v: v * (1 - masks.get(jax.tree_util.keystr(p, simple=True, separator="/"), 0)), variables
    )
    wanted = np.asarray(jax.jit(model.apply)(dense, x))
    error = {k: np.abs(v - wanted).mean() for k, v in logits.items()}
    assert error[True] < 0.95 * error[False]  # zero-padded borders are most of such small images


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="rounds"):
        MaskSparsityConfig(rounds=0)
    with pytest.raises(ValueError, match=r"finetune.batch_size is 32"):
        MaskSparsityConfig(finetune=TrainConfig(batch_size=32))
