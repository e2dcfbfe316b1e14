"""CFSP inside other codebases: a forward pass over their own tree is traced, and the same channels are kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import tiny, weights

import jprune
from jprune.checkpoint.layouts import LAYOUTS, LINEN, convert, kept_of_plan
from jprune.methods.channels.cfsp import CFSPConfig, cfsp
from jprune.models.llama import Llama

CONFIG = tiny("llama")
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab, (4, 10)).astype(np.int32)
OPTIONS = CFSPConfig(fine="relative3", multiple_of=None)


def kept(fn, tree, layout, config):
    """Indices per layer, from a trace of this very tree."""
    graph = jprune.trace(fn, tree, IDS)
    return kept_of_plan(graph.plan(cfsp(graph, tree, [IDS], 0.4, OPTIONS)[0]), layout, config).ffn


@functools.cache
def ours():
    return kept(Llama(CONFIG).apply, weights(CONFIG), LINEN, CONFIG)


@pytest.mark.parametrize(
    "name", ["easylm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hf", "maxtext", "tunix"))]
)
def test_the_same_channels_are_kept_in_every_codebase(name):
    layout = LAYOUTS[name]
    tree = convert(weights(CONFIG), LINEN, layout, CONFIG)

    def forward(tree, ids):
        return Llama(CONFIG).apply(convert(tree, layout, LINEN, CONFIG), ids)

    assert kept(forward, tree, layout, CONFIG) == ours()


def test_layers_stacked_along_another_axis():
    """Kernels of shape (inputs, layers, outputs), as a scan with its parameter axis at one keeps them."""
    module, v = Llama(CONFIG, scanned=True), weights(CONFIG, scanned=True)
    stored = {"params": {**v["params"], "layers": jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), v["params"]["layers"])}}

    def forward(tree, ids):
        p = tree["params"]
        layers = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), p["layers"])
        return module.apply({"params": {**p, "layers": layers}}, ids)

    graph = jprune.trace(forward, stored, IDS)
    keep, _ = cfsp(graph, stored, [IDS], 0.4, OPTIONS)
    (rows,) = keep.values()
    assert tuple(tuple(np.flatnonzero(r)) for r in rows) == ours()
    small = graph.compact(stored, graph.decide(keep, stacked="pad"))
    assert small["params"]["layers"]["mlp"]["gate"]["kernel"].shape == (32, 3, max(map(len, ours())))
