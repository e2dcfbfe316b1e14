"""What a trace finds in a decoder, unrolled and scanned, and that pruned decoders are decoders again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FAMILIES, prompt, tiny, weights
from laws import check_laws, members, relative, subset

import jprune
from jprune.models import llama, rebuild
from jprune.models.decoding import generate
from jprune.models.llama import Llama, fold_norm_width, stack_layers, unstack_layers
from jprune.tracing.paths import flatten

IDS, MASK = prompt()


@functools.cache
def traced(family, scanned=False, fold=False):
    """(module, variables, graph)."""
    module = Llama(tiny(family), scanned)
    v = weights(module.config, scanned=scanned)
    return module, v, jprune.trace(module.apply, v, IDS, MASK, fold_constants=fold)


@functools.cache
def compiled(module):
    """Compiled once for all masks."""
    return jax.jit(module.apply)


def by_role(graph, scanned, layer=0):
    """{role: group} of one layer."""
    where, lead = ("params/layers", 1) if scanned else (f"params/layer{layer}", 0)
    axes = {"ffn": ("mlp/down", 0), "kv": ("attn/k", 1), "query": ("attn/q", 1), "value": ("attn/v", 2)}
    out = {}
    for role, (module, axis) in axes.items():
        own = [g for g in graph.groups if (f"{where}/{module}/kernel", axis + lead) in members(graph, g)]
        out[role] = own
    out["query"] = [g for g in out["query"] if g not in out["kv"]]
    assert all(len(g) == 1 for g in out.values()), out
    return {role: g[0] for role, g in out.items()}


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scanned", [False, True])
def test_the_groups(family, scanned):
    """Per layer FFN channels, key-value heads, queries of each, value channels; and one stream. All exact."""
    module, _, graph = traced(family, scanned)
    c = module.config
    assert all(g.exact for g in graph.groups.values()) and not graph.unsupported
    assert len(graph.groups) == 1 + 4 * (1 if scanned else c.depth)
    at, lead = ("params/layers", 1) if scanned else ("params/layer1", 0)
    roles = by_role(graph, scanned, 1)
    sizes = {"ffn": c.ffn[1], "kv": 2, "query": 2, "value": c.head_dim}
    assert {r: graph.groups[g].size for r, g in roles.items()} == sizes
    assert {graph.groups[g].layers for g in roles.values()} == {c.depth if scanned else None}

    def leaves(*names):
        present = {p for p, _ in flatten(traced(family, scanned)[1])}
        return {(p, a + lead) for n, a in names if (p := f"{at}/{n}") in present}

    ffn = leaves(("mlp/gate/kernel", 1), ("mlp/up/kernel", 1), ("mlp/down/kernel", 0),
                 ("mlp/gate/bias", 0), ("mlp/up/bias", 0))  # fmt: skip
    heads = leaves(("attn/q/kernel", 1), ("attn/q/bias", 0), ("attn/o/kernel", 0))
    kv = heads | leaves(("attn/k/kernel", 1), ("attn/k/bias", 0), ("attn/v/kernel", 1), ("attn/v/bias", 0))
    value = leaves(("attn/v/kernel", 2), ("attn/v/bias", 1), ("attn/o/kernel", 1))
    want = {"ffn": ffn, "kv": kv, "query": heads, "value": value}
    assert {r: members(graph, g) for r, g in roles.items()} == want


@pytest.mark.parametrize("scanned", [False, True])
def test_a_key_value_head_carries_its_query_heads(scanned):
    _, _, graph = traced("llama", scanned)
    group = graph.groups[by_role(graph, scanned)["kv"]]
    positions = {m.path.split("/")[-2]: m.positions.tolist() for m in group.members if m.path.endswith("kernel")}
    assert positions == {"q": [[0, 1], [2, 3]], "k": [[0], [1]], "v": [[0], [1]], "o": [[0, 1], [2, 3]]}
    other = graph.groups[by_role(graph, scanned)["query"]]
    positions = {m.path.split("/")[-2]: m.positions.tolist() for m in other.members}
    assert positions == {"q": [[0, 2], [1, 3]], "o": [[0, 2], [1, 3]]}


@pytest.mark.parametrize("scanned", [False, True])
def test_the_stream_is_one_group_through_everything(scanned):
    module, v, graph = traced("llama", scanned)
    (stream,) = [g for g, i in graph.groups.items() if i.size == module.config.stream]
    assert graph.groups[stream].layers is None
    assert {p for p, _ in members(graph, stream)} == {p for p, _ in flatten(v)}


@pytest.mark.parametrize("scanned", [False, True])
def test_what_is_frozen_and_why(scanned):
    _, _, graph = traced("qwen3", scanned)
    at, lead = ("params/layers", 1) if scanned else ("params/layer2", 0)
    for name, axis in (("q/kernel", 2), ("k/kernel", 2), ("q_norm/scale", 0), ("k_norm/scale", 0)):
        reason = graph.leaves[f"{at}/attn/{name}"].frozen[axis + lead]
        assert reason.code == "CONST_IOTA" and "rope.py" in reason.where, reason
    assert graph.leaves["params/embed/embedding"].frozen[0].code == "DATA_INDEXED"
    assert graph.leaves[f"{at}/attn/v/kernel"].frozen[2 + lead] is None


@pytest.mark.parametrize("scanned", [False, True])
def test_rotary_pairs_are_units_when_constants_are_folded(scanned):
    """Without a padding mask the positions, and with them the tables, are constants."""
    module = Llama(tiny("qwen3"), scanned)
    v = weights(module.config, scanned=scanned)
    graph = jprune.trace(module.apply, v, IDS, fold_constants=True)
    at, lead = ("params/layers", 1) if scanned else ("params/layer0", 0)
    half = module.config.head_dim // 2
    (pairs,) = [g for g in graph.groups.values() if (f"{at}/attn/q/kernel", 2 + lead) in members(graph, g.id)]
    (k,) = [m for m in pairs.members if m.path == f"{at}/attn/k_norm/scale"]
    assert pairs.size == half and k.positions.tolist() == [[j, j + half] for j in range(half)]
    keep = {pairs.id: np.arange(half) % 3 > 0}
    check_laws(module.apply, v, (IDS,), graph=graph, keep=keep, gradients=False)
    with pytest.raises(ValueError, match="rotary pairs were pruned"):
        rebuild(module, graph.compact(v, keep))


# -- the laws ----------------------------------------------------------------------------------------------------------


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "scanned"),
    [
        ("llama", True),
        ("qwen2", True),
        pytest.param("biased", False, marks=slow),
        pytest.param("llama3", True, marks=slow),
        pytest.param("qwen3", False, marks=slow),
    ],
)
def test_decoders_obey_the_laws(family, scanned):
    module, v, graph = traced(family, scanned)
    check_laws(module.apply, v, (IDS, MASK), graph=graph, gradients=family == "llama3", tolerance=2e-5)


@pytest.mark.parametrize("role", ["kv", "query", *(pytest.param(r, marks=slow) for r in ("ffn", "value"))])
def test_every_group_alone(role):
    module, v, graph = traced("qwen2", True)
    keep = subset(graph, np.random.default_rng(3), groups={by_role(graph, True)[role]})
    whole = compiled(module)
    want = whole(graph.mask(v, keep), IDS, MASK)
    assert relative(jax.jit(graph.replay(keep))(graph.compact(v, keep), IDS, MASK), want) < 1e-5
    assert relative(whole(v, IDS, MASK), want) > 1e-2


# -- pruned decoders are decoders again --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f if f in ("biased", "qwen3") else pytest.param(f, marks=slow) for f in FAMILIES])
def test_rebuilding(family):
    module, v, graph = traced(family)
    keep = subset(graph, np.random.default_rng(1))
    small = graph.compact(v, keep)
    smaller = rebuild(module, small)
    want = jax.jit(graph.replay(keep))(small, IDS, MASK)
    assert relative(jax.jit(smaller.apply)(small, IDS, MASK), want) < 1e-5
    shapes = jax.eval_shape(smaller.init, jax.random.key(0), IDS)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, small)
    c = smaller.config
    assert c.norm_width == 32 and c.stream < 32 and len(set(c.ffn)) > 1 and c.value_dim is not None
    assert rebuild(smaller, small) == smaller
    folded, tree = fold_norm_width(small, c)
    assert folded.norm_width is None
    assert relative(jax.jit(Llama(folded).apply)(tree, IDS, MASK), want) < 1e-5


def test_rebuilding_scanned_layers():
    """Equal widths stay scanned; unequal ones are padded, or leave the scan as single layers."""
    module, v, graph = traced("qwen2", True)
    roles = by_role(graph, True)
    rng = np.random.default_rng(0)
    n = graph.groups[roles["ffn"]].size
    even = {roles["ffn"]: np.stack([rng.permutation(n) < 20 for _ in range(3)])}
    small = graph.compact(v, even)
    smaller = rebuild(module, small)
    assert smaller.scanned and smaller.config.ffn == (20, 20, 20)
    assert relative(jax.jit(smaller.apply)(small, IDS, MASK), jax.jit(graph.replay(even))(small, IDS, MASK)) < 1e-5

    uneven = {roles["ffn"]: np.stack([rng.permutation(n) < k for k in (20, 31, 7)])}
    want = jax.jit(module.apply)(graph.mask(v, uneven), IDS, MASK)
    padded = graph.compact(v, uneven)
    assert rebuild(module, padded).config.ffn == (31, 31, 31)
    assert relative(jax.jit(rebuild(module, padded).apply)(padded, IDS, MASK), want) < 1e-5
    lists = graph.compact(v, graph.decide(uneven, stacked="unstack"))
    with pytest.raises(ValueError, match="unstack_layers"):
        rebuild(module, lists)
    apart = unstack_layers(lists)
    smaller = rebuild(module, apart)
    assert not smaller.scanned and smaller.config.ffn == (20, 31, 7)
    assert relative(jax.jit(smaller.apply)(apart, IDS, MASK), want) < 1e-5


def test_a_pruned_decoder_generates():
    module, v, graph = traced("llama")
    small = graph.compact(v, subset(graph, np.random.default_rng(1)))
    out = generate(rebuild(module, small), small, IDS, 3, mask=MASK)
    assert out.shape == (2, IDS.shape[1] + 3)


def test_both_arrangements_find_the_same_groups_and_cost_the_same():
    (_, v1, loop), (_, v2, scan) = traced("qwen2"), traced("qwen2", True)
    assert loop.cost().macs == scan.cost().macs and loop.cost().params == scan.cost().params
    keep1, keep2 = {}, {}
    for role, g in by_role(scan, True).items():
        rows = np.stack([np.random.default_rng(i).permutation(scan.groups[g].size) < 2 for i in range(3)])
        keep2[g] = rows
        for i in range(3):
            keep1[by_role(loop, False, i)[role]] = rows[i]
    assert loop.cost(keep1).macs == scan.cost(keep2).macs
    a, b = loop.compact(v1, keep1), unstack_layers(scan.compact(v2, keep2))
    for (path, x), (_, y) in zip(flatten(a), flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def test_another_models_tree_is_refused():
    module, v, _ = traced("llama")
    other = {**v["params"], "layer1": {**v["params"]["layer1"], "mlp": {}}}
    with pytest.raises(ValueError, match="layer1/mlp/gate"):
        rebuild(module, {"params": other})
    wrong = jax.tree.map(lambda x: x, v)
    wrong["params"]["layer1"]["attn"]["o"]["kernel"] = jnp.zeros((4, 8, 30))
    with pytest.raises(ValueError, match=r"attn/o/kernel' has shape \(4, 8, 30\)"):
        rebuild(module, wrong)


@pytest.mark.slow
def test_seven_billion_parameters_are_traced_without_a_weight():
    c = llama.llama_config(32000, 4096, 11008, 32, 32, eps=1e-5, dtype="bfloat16")
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    for scanned in (False, True):
        module = Llama(c, scanned)
        shapes = jax.eval_shape(module.init, jax.random.key(0), ids)
        graph = jprune.trace(module.apply, shapes, ids)
        assert graph.cost().params == 6_738_415_616
        ffn = [g for g in graph.groups.values() if g.size == 11008]
        assert len(ffn) == (1 if scanned else 32)
        small = graph.compact(shapes, {g.id: np.arange(11008) < 5504 for g in ffn}, verify=None)
        assert rebuild(module, small).config == dataclasses.replace(c, ffn=(5504,) * 32)
        assert (stack_layers(unstack_layers(small)) == small) or not scanned
