"""Pure functions of arrays give the same numbers jitted, operation by operation, and on the device: one test, all variants."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from laws import same_numbers

import jprune
from jprune import importance
from jprune.language.perplexity import next_token_loss
from jprune.surgery.mask import gated
from jprune.training.gradients import clipped


def two_layers(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]


RNG = np.random.default_rng(0)
PARAMS = {n: RNG.normal(size=s).astype(np.float32) for n, s in {"w1": (5, 6), "b1": (6,), "w2": (6, 3)}.items()}
GRAPH = jprune.trace(two_layers, PARAMS, jax.ShapeDtypeStruct((2, 5), jnp.float32))
(GROUP,) = GRAPH.groups
KEPT = np.array([1, 0, 1, 1, 0, 1], bool)


class Variants(chex.TestCase):
    """Each is compared with numpy; what depends on shapes alone (the keep set of a compaction) stays outside."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_mask(self):
        got = self.variant(lambda p, k: GRAPH.mask(p, {GROUP: k}))(PARAMS, KEPT)
        chex.assert_trees_all_equal(
            got, {"w1": PARAMS["w1"] * KEPT, "b1": PARAMS["b1"] * KEPT, "w2": PARAMS["w2"] * KEPT[:, None]}
        )

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_compact(self):
        got = self.variant(lambda p: GRAPH.compact(p, {GROUP: KEPT}))(PARAMS)
        want = {"w1": PARAMS["w1"][:, KEPT], "b1": PARAMS["b1"][KEPT], "w2": PARAMS["w2"][KEPT]}
        chex.assert_trees_all_equal(got, want)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, want)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_magnitude(self):
        got = self.variant(lambda p: importance.magnitude(GRAPH, p, 2))(PARAMS)[GROUP]
        squares = (PARAMS["w1"] ** 2).sum(0) + (PARAMS["w2"] ** 2).sum(1)
        ratio = np.asarray(got) / squares  # up to a common factor: scores are compared, not read
        same_numbers(ratio, np.full(6, ratio.mean()), terms=9)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_a_gate_of_zero_removes_what_is_not_finite(self):
        x = np.array([np.nan, np.inf, 2.0, -3.0], np.float32)
        got = self.variant(gated)(x, np.array([0, 0, 1, 0.5], np.float32))
        chex.assert_trees_all_equal(np.asarray(got), np.array([0, 0, 2, -1.5], np.float32))

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_next_token_loss(self):
        logits, ids = RNG.normal(size=(2, 5, 7)).astype(np.float32), RNG.integers(0, 7, (2, 5))
        wide = logits[:, :-1].astype(np.float64)
        p = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
        want = -np.log(np.take_along_axis(p, ids[:, 1:, None], -1)[..., 0]).mean(1)
        same_numbers(self.variant(next_token_loss)(jnp.asarray(logits), jnp.asarray(ids)), want, terms=32)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_clipping_keeps_directions_and_short_gradients(self):
        grads = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([4.0], np.float32)}
        short, norm = self.variant(lambda g: clipped(g, 2.5))(grads)
        chex.assert_trees_all_close(short, {"a": np.array([1.5, 0]), "b": np.array([2.0])}, rtol=1e-6)
        assert float(norm) == 5.0
        chex.assert_trees_all_equal(self.variant(lambda g: clipped(g, 6.0))(grads)[0], grads)
