"""The blocks of decoders, found from the trace alone: against names where there are names, and on users' own code."""

import functools

import jax
import jax.numpy as jnp
import plain_decoders as plain
import pytest
from decoders import FAMILIES, prompt, tiny, weights
from laws import members

import jprune
from jprune.language.blocks import BlockError, blocks
from jprune.models.llama import Llama

IDS, MASK = prompt()


@functools.cache
def traced(family, scanned, remat):
    module = Llama(tiny(family), scanned, remat)
    shapes = jax.eval_shape(lambda: weights(module.config, scanned=scanned))
    return jprune.trace(module.apply, shapes, IDS, *([MASK] if family == "mistral" else []))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_the_blocks_are_those_of_the_names(family, scanned, remat):
    graph = traced(family, scanned, remat)
    found = blocks(graph)
    assert len(found) == (1 if scanned else 3)
    for i, b in enumerate(found):
        at, lead = ("params/layers", 1) if scanned else (f"params/layer{i}", 0)
        assert (b.down, b.out) == (f"{at}/mlp/down/kernel", f"{at}/attn/o/kernel")
        names = ("ffn", "kv", "query", "value")
        leaves = {name: {(p.removeprefix(f"{at}/"), a - lead) for p, a in members(graph, getattr(b, name))}
                  for name in names}  # fmt: skip
        assert leaves["ffn"] >= {("mlp/gate/kernel", 1), ("mlp/up/kernel", 1), ("mlp/down/kernel", 0)}
        assert leaves["kv"] >= {(f"attn/{n}/kernel", 1) for n in "qkv"} | {("attn/o/kernel", 0)}
        assert leaves["query"] >= {("attn/q/kernel", 1), ("attn/o/kernel", 0)}
        assert leaves["value"] >= {("attn/v/kernel", 2), ("attn/o/kernel", 1)}
        assert not any("attn/k" in p or "attn/v" in p for p, _ in leaves["query"])
        assert b.layers == (3 if scanned else None) and (b.scan is not None) == scanned


@pytest.mark.parametrize(
    ("layer", "heads", "kv", "fused", "repeat"),
    [
        (plain.sequential, 4, 2, False, False),
        (plain.sequential, 4, 2, True, True),
        (plain.sequential, 4, 4, False, False),
        (plain.sequential, 4, 1, True, False),
        (plain.sequential, 4, 1, False, True),
        (plain.behind, 4, 2, False, True),
        (plain.beside, 4, 2, True, False),
        (plain.beside_in_turn, 4, 4, True, True),
        (plain.beside_in_turn, 4, 2, False, False),
    ],
)
def test_users_own_decoders(layer, heads, kv, fused, repeat):
    """Flat and fused projections, repeated and grouped keys, one key-value head, branches beside each other."""
    graph = jprune.trace(
        plain.decoder(layer, heads, kv, repeat=repeat), plain.params(heads=heads, kv=kv, fused=fused), plain.IDS
    )
    found = blocks(graph)
    assert [b.down for b in found] == ["layers/0/down", "layers/1/down"]
    assert [b.out for b in found] == ["layers/0/o", "layers/1/o"]
    sizes = {n: graph.groups[g].size if (g := getattr(found[1], n)) else None for n in ("ffn", "kv", "query", "value")}
    queries = None if heads == kv else heads // kv
    assert sizes == {"ffn": plain.F, "kv": None if kv == 1 else kv, "query": queries, "value": plain.H}
    value = {p for p, _ in members(graph, found[1].value)}
    assert value == ({"layers/1/qkv", "layers/1/o"} if fused else {"layers/1/v", "layers/1/o"})


ORDERS = [plain.sequential, plain.behind, plain.beside, plain.beside_in_turn, plain.beside_the_other_way]


@functools.cache
def seen(layer):
    """(start, end) of both blocks as values of one evaluation, and the streams that the function itself has there."""
    from jprune.tracing.evaluate import Evaluator
    from jprune.tracing.paths import flatten

    params = plain.params()
    graph = jprune.trace(plain.decoder(layer), params, plain.IDS)
    held = {}

    def observe(path, eqn, ins, outs, states):
        for i, b in enumerate(blocks(graph)):
            for name, point in (("start", b.start), ("end", b.end)):
                if point.path == path:
                    held[i, name] = (outs if point.after else ins)[point.index]

    taps = {str(p): (p, None) for b in blocks(graph) for p in (b.start.path, b.end.path)}
    ev = Evaluator(graph.rules, scan_symbols=graph.scan_symbols, observe=observe, tap_paths=taps)
    leaves = [x for _, x in flatten(params)]
    ev.run(graph.jaxpr.jaxpr, graph.jaxpr.consts, graph.select_used(leaves, [plain.IDS]), ())
    x = params["table"][plain.IDS]
    streams = [x]
    for p in params["layers"]:
        streams.append(layer(p, streams[-1], heads=4, kv=2))
    return held, streams


@pytest.mark.parametrize("layer", ORDERS)
def test_blocks_start_and_end_where_the_layers_do(layer):
    held, streams = seen(layer)
    for i in range(2):
        assert jnp.allclose(held[i, "start"], streams[i], atol=1e-5)
        assert jnp.allclose(held[i, "end"], streams[i + 1], atol=1e-5)
    assert not jnp.allclose(streams[0], streams[1], atol=1e-1)


def test_casts_and_placements_do_not_hide_the_stream():
    def layer(p, x, **heads):
        x = (x.astype(jnp.float32) + plain.attention(p, plain.norm(x, p["n1"]), **heads)).astype(jnp.bfloat16)
        y = plain.mlp(p, plain.norm(x, p["n2"]))
        return jax.lax.optimization_barrier(x.astype(jnp.float32) + y).astype(jnp.bfloat16)

    graph = jprune.trace(plain.decoder(layer), plain.params(depth=3), plain.IDS)
    assert [b.down for b in blocks(graph)] == [f"layers/{i}/down" for i in range(3)]


def test_two_kinds_of_layers_in_one_scan_are_two_blocks():
    p = plain.params(depth=4)
    pairs = [jax.tree.map(lambda *xs: jnp.stack(xs), *p["layers"][i::2]) for i in range(2)]

    def fn(p, ids):
        def body(x, pair):
            x = plain.sequential(pair[0], x, heads=4, kv=2)
            return plain.beside(pair[1], x, heads=4, kv=2), None

        return jax.lax.scan(body, p["table"][ids], p["layers"])[0] @ p["head"]

    found = blocks(jprune.trace(fn, {**p, "layers": pairs}, plain.IDS))
    assert [(b.down, b.layers) for b in found] == [("layers/0/down", 2), ("layers/1/down", 2)]
    assert found[0].scan == found[1].scan


def test_a_residual_mlp_is_a_block_without_attention():
    def fn(p, ids):
        x = p["table"][ids]
        for one in p["layers"]:
            x = x + plain.mlp(one, plain.norm(x, one["n2"]))
        return x @ p["head"]

    found = blocks(jprune.trace(fn, plain.params(), plain.IDS))
    assert [b.down for b in found] == ["layers/0/down", "layers/1/down"]
    assert {(b.kv, b.query, b.value, b.out) for b in found} == {(None, None, None, None)}


# -- what is refused ---------------------------------------------------------------------------------------------------


def attention_last(p, x, **heads):
    x = x + plain.mlp(p, plain.norm(x, p["n2"]))
    return x + plain.attention(p, plain.norm(x, p["n1"]), **heads)


def two_mlps(p, x, **heads):
    y = plain.norm(x, p["n1"])
    return x + (plain.mlp(p, y) + jax.nn.silu(y @ p["q"][:, : plain.D]) @ p["k"][:, :1].T.repeat(plain.D, 0))


def linear(p, x, **heads):
    return x + plain.norm(x, p["n1"]) @ p["o"]


def fixed_channels(p, x, **heads):
    y = jax.nn.silu(plain.norm(x, p["n1"]) @ p["gate"])
    return x + jnp.sort(y, axis=-1) @ p["down"]


def no_residual(p, x, **heads):
    return plain.mlp(p, x)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (attention_last, "leads to no MLP"),
        (two_mlps, "close one residual branch"),
        (linear, "maps the stream to itself"),
        (fixed_channels, "no group of their own"),
        (no_residual, "no residual branch"),
    ],
)
def test_what_cannot_be_told_is_refused(layer, said):
    graph = jprune.trace(plain.decoder(layer), plain.params(), plain.IDS)
    with pytest.raises(BlockError, match=said):
        blocks(graph)
