"""The core's programs are accepted by the compilers of real TPU chips, and sharded ones communicate as they should."""

import pytest

from pallas_kernels.common import aot_tpu as aot

aot.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jprune  # noqa: E402
from jprune.methods.channels.masksparsity.masksparsity import all_masked, listed_scales, masked_penalty  # noqa: E402
from jprune.models import MODELS, build  # noqa: E402
from jprune.tracing import taps  # noqa: E402

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")]
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def half(graph):
    rng = np.random.default_rng(0)
    return {g: rng.permutation(i.size) < (i.size + 1) // 2 for g, i in graph.groups.items()}


def traced(name, batch=8):
    model = build(name)
    x = jax.ShapeDtypeStruct((batch, *MODELS[name].image), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return jprune.trace(model.apply, variables, x), variables, x


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2_small", "vit_small"])
def test_pruned_networks_compile_and_need_less(topology, name):
    graph, variables, x = traced(name)
    on = aot.mesh(topology)
    keep = half(graph)
    small = jax.eval_shape(lambda v: graph.compact(v, keep, verify=None), variables)
    images = aot.abstract(x, on, lambda *_: P("data"))
    dense = aot.compile_for(graph.dense, aot.abstract(variables, on), images)
    pruned = aot.compile_for(graph.replay(keep), aot.abstract(small, on), images)
    assert pruned.flops < 0.5 * dense.flops
    assert pruned.argument < dense.argument
    assert "all-to-all" not in pruned.collectives()  # a batch split over the mesh needs no exchange of activations


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_masking_with_traced_masks_compiles_without_communication(topology):
    graph, variables, _ = traced("resnet20")
    on = aot.mesh(topology)
    keep = {g: jax.ShapeDtypeStruct((i.size,), jnp.float32) for g, i in graph.groups.items()}
    layout = aot.abstract(variables, on, lambda path, v: P("data") if v.ndim == 4 and v.shape[0] % 4 == 0 else P())
    out = aot.compile_for(graph.mask, layout, aot.abstract(keep, on))
    assert out.memory > 0 and not out.collectives()


def test_a_calibration_step_of_a_sharded_decoder_compiles_for_a_slice():
    layers, width, hidden, heads, size = 4, 512, 1408, 8, 64

    def decoder(p, tokens):
        x = p["embed"][tokens]

        def block(x, w):
            q, k, v = (jnp.einsum("bte,ehd->bthd", x, w[n]) for n in ("q", "k", "v"))
            a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5)
            x = x + jnp.einsum("bhqk,bkhd,hde->bqe", a, v, w["o"])
            return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

        return jax.lax.scan(block, x, p["blocks"])[0] @ p["head"]

    def z(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    blocks = {n: z(layers, width, heads, size) for n in "qkv"} | {
        "o": z(layers, heads, size, width), "gate": z(layers, width, hidden), "up": z(layers, width, hidden),
        "down": z(layers, hidden, width)}  # fmt: skip
    params = {"embed": z(1024, width), "blocks": blocks, "head": z(width, 1024)}
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    graph = jprune.trace(decoder, params, tokens)
    on = aot.mesh("v5e:2x4", ("data", "model"), (2, 4))
    specs = {"gate": P(None, None, "model"), "up": P(None, None, "model"), "down": P(None, "model", None),
             "q": P(None, None, "model"), "k": P(None, None, "model"), "v": P(None, None, "model"),
             "o": P(None, "model")}  # fmt: skip
    step, states = taps.step_of(graph, {"squares": taps.sum_of_squares()})
    out = aot.compile_for(
        step,
        aot.abstract(jax.eval_shape(lambda: states), on),
        aot.abstract(params, on, lambda path, _: specs.get(path.split("/")[-1], P())),
        (aot.abstract(tokens, on, lambda *_: P("data")),),
    )
    weights = sum(np.prod(x.shape) * 2 for x in jax.tree.leaves(params))
    assert out.argument < 0.5 * weights  # the blocks stay split over the model axis
    assert out.collectives().get("all-reduce", 0) > 0  # statistics of a split batch are summed over it


@pytest.mark.parametrize("kind", ["l1", "smooth_l1"])
def test_a_penalised_step_compiles(kind):
    graph, variables, x = traced("resnet20")
    model = build("resnet20")
    tx = masked_penalty(all_masked(graph, listed_scales(graph)), 1e-3, kind)

    def step(params, stats, state, images):
        def loss(p):
            out, new = model.apply({"params": p, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
            return jnp.mean(out**2), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        grads, state = tx.update(grads, state, params, learning_rate=jnp.float32(0.1))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new, state

    on = aot.mesh("v5e:2x2")
    args = (variables["params"], variables["batch_stats"], jax.eval_shape(tx.init, variables["params"]))
    out = aot.compile_for(step, *(aot.abstract(a, on) for a in args), aot.abstract(x, on, lambda *_: P("data")))
    assert out.collectives().get("all-reduce", 0) > 0  # gradients are averaged over the batch


def test_unknown_chips_are_named():
    with pytest.raises(ValueError, match="v9z"):
        aot.mesh("v9z:2x2")
