"""One small model as nine codebases keep it, each tree made here by a converter of the test's own from the flat tensors.

The converters follow those codebases' published conversion scripts; none uses the tables under test.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import prompt, tiny, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.checkpoint.layouts import (
    HF,
    LAYOUTS,
    LEVANTER,
    LINEN,
    LINEN_SCAN,
    PEFT,
    TUNIX,
    Kept,
    Layout,
    Site,
    convert,
    custom,
    gemma,
    kept_of_plan,
    slice_kept,
    update,
    view,
    views,
)
from jprune.models.llama import Llama, stack_layers
from jprune.tracing.paths import flatten

D, F, NQ, NK, H, V, L = 32, 48, 4, 2, 8, 50, 3
CONFIG = tiny("llama")


@functools.cache
def flat():
    """The checkpoint's tensors: (outputs, inputs)."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    def scale():
        return rng.uniform(0.5, 1.5, D).astype(np.float32)

    out = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": scale(), "lm_head.weight": normal(V, D)}
    for i in range(L):
        at = f"model.layers.{i}."
        for name, n in (("q", NQ), ("k", NK), ("v", NK)):
            out[f"{at}self_attn.{name}_proj.weight"] = normal(n * H, D)
        out[f"{at}self_attn.o_proj.weight"] = normal(D, NQ * H)
        out[f"{at}mlp.gate_proj.weight"], out[f"{at}mlp.up_proj.weight"] = normal(F, D), normal(F, D)
        out[f"{at}mlp.down_proj.weight"] = normal(D, F)
        out[f"{at}input_layernorm.weight"], out[f"{at}post_attention_layernorm.weight"] = scale(), scale()
    return out


def layer(i, name):
    group = "self_attn" if name in "qkvo" else "mlp"
    norms = {"n1": "input_layernorm", "n2": "post_attention_layernorm"}
    return flat()[f"model.layers.{i}." + norms.get(name, f"{group}.{name}_proj") + ".weight"]


def interleave(w, heads):
    """Rows of every head from (0, h/2, 1, h/2 + 1, ...): neighbours are rotated together."""
    w = w.reshape(heads, H, -1)
    out = np.empty_like(w)
    out[:, 0::2], out[:, 1::2] = w[:, : H // 2], w[:, H // 2 :]
    return out.reshape(heads * H, -1)


def heads_last(w, heads):
    """(outputs, inputs) -> (inputs, heads, head size)."""
    return np.ascontiguousarray(w.T).reshape(-1, heads, H)


def linen(scanned):
    def one(i):
        attn = {n: {"kernel": heads_last(layer(i, n), k)} for n, k in (("q", NQ), ("k", NK), ("v", NK))}
        attn["o"] = {"kernel": layer(i, "o").T.reshape(NQ, H, D)}
        mlp = {n: {"kernel": layer(i, n).T} for n in ("gate", "up", "down")}
        norms = {"input_norm": {"scale": layer(i, "n1")}, "post_norm": {"scale": layer(i, "n2")}}
        return {"attn": attn, "mlp": mlp, **norms}

    rest = {
        "embed": {"embedding": flat()["model.embed_tokens.weight"]},
        "final_norm": {"scale": flat()["model.norm.weight"]},
        "lm_head": {"kernel": flat()["lm_head.weight"].T},
    }
    rows = [one(i) for i in range(L)]
    stack = {"layers": jax.tree.map(lambda *x: np.stack(x), *rows)}
    return {"params": {**rest, **(stack if scanned else {f"layer{i}": r for i, r in enumerate(rows)})}}


def maxtext(scanned):
    def one(i):
        return {
            "mlp": {n: {"kernel": layer(i, s).T} for n, s in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))},
            "self_attention": {
                "query": {"kernel": heads_last(interleave(layer(i, "q"), NQ), NQ) / np.float32(np.sqrt(H))},
                "key": {"kernel": heads_last(interleave(layer(i, "k"), NK), NK)},
                "value": {"kernel": heads_last(layer(i, "v"), NK)},
                "out": {"kernel": layer(i, "o").T.reshape(NQ, H, D)},
            },
            "pre_self_attention_layer_norm": {"scale": layer(i, "n1")},
            "post_self_attention_layer_norm": {"scale": layer(i, "n2")},
        }

    rows = [one(i) for i in range(L)]
    stack = {"layers": jax.tree.map(lambda *x: np.stack(x, axis=1), *rows)}
    decoder = {
        "decoder_norm": {"scale": flat()["model.norm.weight"]},
        "logits_dense": {"kernel": flat()["lm_head.weight"].T},
        **(stack if scanned else {f"layers_{i}": r for i, r in enumerate(rows)}),
    }
    embed = {"embedding": flat()["model.embed_tokens.weight"]}
    return {"params": {"decoder": decoder, "token_embedder": embed}}


def easylm():
    def one(i):
        return {
            "attention": {
                "wq": {"kernel": interleave(layer(i, "q"), NQ).T},
                "wk": {"kernel": interleave(layer(i, "k"), NK).T},
                "wv": {"kernel": layer(i, "v").T},
                "wo": {"kernel": layer(i, "o").T},
            },
            "feed_forward": {n: {"kernel": layer(i, s).T} for n, s in (("w1", "gate"), ("w2", "down"), ("w3", "up"))},
            "attention_norm": {"kernel": layer(i, "n1")},
            "ffn_norm": {"kernel": layer(i, "n2")},
        }

    transformer = {
        "wte": {"embedding": flat()["model.embed_tokens.weight"]},
        "h": {str(i): one(i) for i in range(L)},
        "ln_f": {"kernel": flat()["model.norm.weight"]},
    }
    return {"params": {"transformer": transformer, "lm_head": {"kernel": flat()["lm_head.weight"].T}}}


def tunix():
    def one(i):
        attn = {f"{n}_proj": {"w": heads_last(layer(i, n), k)} for n, k in (("q", NQ), ("k", NK), ("v", NK))}
        attn["o_proj"] = {"w": layer(i, "o").T.reshape(NQ, H, D)}
        mlp = {f"{n}_proj": {"kernel": layer(i, n).T} for n in ("gate", "up", "down")}
        norms = {"input_layernorm": {"w": layer(i, "n1")}, "post_attention_layernorm": {"w": layer(i, "n2")}}
        return {"attn": attn, "mlp": mlp, **norms}

    return {
        "embedder": {"input_embedding": flat()["model.embed_tokens.weight"]},
        "layers": {i: one(i) for i in range(L)},  # nnx numbers them by integers
        "final_norm": {"w": flat()["model.norm.weight"]},
        "lm_head": {"w": flat()["lm_head.weight"].T},
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """An array with named axes, as haliax wraps it."""

    array: object


def levanter():
    def one(i):
        attn = {
            "q_proj": layer(i, "q").reshape(NK, NQ // NK, H, D),
            "k_proj": layer(i, "k").reshape(NK, H, D),
            "v_proj": layer(i, "v").reshape(NK, H, D),
            "o_proj": layer(i, "o").reshape(D, NQ, H),
        }
        return {
            "self_attn": {n: {"weight": w} for n, w in attn.items()},
            "mlp": {f"{n}_proj": {"weight": layer(i, n)} for n in ("gate", "up", "down")},
            "input_layernorm": {"weight": layer(i, "n1")},
            "post_attention_layernorm": {"weight": layer(i, "n2")},
        }

    stacked = jax.tree.map(lambda *x: np.stack(x), *[one(i) for i in range(L)])
    tree = {
        "embeddings": {"token_embeddings": {"weight": flat()["model.embed_tokens.weight"]}},
        "transformer": {"layers": {"stacked": stacked}, "norm": {"weight": flat()["model.norm.weight"]}},
        "lm_head": {"weight": flat()["lm_head.weight"]},
    }
    return jax.tree.map(Named, tree)


def gemma_tree(transpose=False):
    def one(i):
        gate, up = layer(i, "gate"), layer(i, "up")
        return {
            "attn": {
                "q_einsum": {"w": layer(i, "q").reshape(NQ, H, D).transpose(0, 2, 1)},
                "kv_einsum": {"w": np.stack([layer(i, n).reshape(NK, H, D).transpose(0, 2, 1) for n in ("k", "v")])},
                "attn_vec_einsum": {"w": layer(i, "o").T.reshape(NQ, H, D)},
            },
            "mlp": {
                "gating_einsum": np.stack([gate, up] if transpose else [gate.T, up.T]),
                "linear": layer(i, "down").T,
            },
            "pre_attention_norm": {"scale": layer(i, "n1") - 1},
            "pre_ffw_norm": {"scale": layer(i, "n2") - 1},
        }

    return {
        "embedder": {"input_embedding": flat()["model.embed_tokens.weight"]},
        **{f"layer_{i}": one(i) for i in range(L)},
        "final_norm": {"scale": flat()["model.norm.weight"] - 1},
    }


TREES = {
    "hf": flat,
    "linen": lambda: linen(False),
    "linen_scan": lambda: linen(True),
    "maxtext": lambda: maxtext(False),
    "maxtext_scan": lambda: maxtext(True),
    "easylm": easylm,
    "tunix": tunix,
    "levanter": levanter,
    "gemma": gemma_tree,
}
CUSTOM = custom(
    {
        "gate": (r"transformer/h/(?P<l>\d+)/feed_forward/w1/kernel", ("d", "F")),
        "up": (r"transformer/h/(?P<l>\d+)/feed_forward/w3/kernel", ("d", "F")),
        "down": (r"transformer/h/(?P<l>\d+)/feed_forward/w2/kernel", ("F", "d")),
        "q": (r"transformer/h/(?P<l>\d+)/attention/wq/kernel", ("d", "q_head.h")),
        "k": (r"transformer/h/(?P<l>\d+)/attention/wk/kernel", ("d", "kv_head.h")),
        "v": (r"transformer/h/(?P<l>\d+)/attention/wv/kernel", ("d", "kv_head.hv")),
        "o": (r"transformer/h/(?P<l>\d+)/attention/wo/kernel", ("q_head.hv", "d")),
    },
    interleaved=True,
)
CASES = [
    *((LAYOUTS[name], make) for name, make in TREES.items()),
    (gemma(transpose_gating=True), lambda: gemma_tree(True)),
    (CUSTOM, easylm),
]
every = pytest.mark.parametrize(("layout", "make"), CASES, ids=lambda x: getattr(x, "name", ""))


def same(a, b, tolerance=0.0):
    a, b = dict(flatten(a)), dict(flatten(b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=tolerance, rtol=0, err_msg=path)


def test_every_layout_is_tested():
    assert {layout.name for layout, _ in CASES} == {*LAYOUTS, "custom"} - {"peft"}  # adapters have a test of their own


@every
def test_the_matrices_are_those_of_the_checkpoint_up_to_order_and_scale(layout, make):
    """Values, MLP matrices and embeddings are equal; rows of a head may be permuted, queries scaled."""
    found = views(make(), layout)
    assert found.depth == L
    for (name, i), x in found.items():
        if i is None:
            key = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}[name]
            want = flat()[f"{key}.weight"]
        else:
            want = layer(i, {"input_norm": "n1", "post_norm": "n2"}.get(name, name))
        if name.endswith("norm"):
            want = want - layout.norm_offset
        elif name in ("q", "k") and layout.interleaved:
            want = interleave(want, want.shape[0] // H)
        if name == "q" and layout.scaled_query:
            want = want / np.float32(np.sqrt(H))
        np.testing.assert_array_equal(x, want, err_msg=f"{name} {i}")


@pytest.mark.parametrize("name", TREES)
def test_to_our_tree_and_back(name):
    source, tree = LAYOUTS[name], TREES[name]()
    for target, scanned in ((LINEN, False), (LINEN_SCAN, True)):
        ours = convert(tree, source, target, CONFIG)
        want = linen(scanned)
        if name == "gemma":  # its logits reuse the embedding
            del want["params"]["lm_head"]
        same(ours, want, 1e-6)
        back = convert(ours, target, source, CONFIG)
        given = (
            tree if name != "levanter" else jax.tree.map(lambda n: n.array, tree, is_leaf=lambda n: type(n) is Named)
        )
        given = {"params": given} if name == "gemma" else given
        same(back, given, 1e-6)


def test_a_converted_tree_computes_the_same():
    ids, _ = prompt()
    want = jax.jit(Llama(CONFIG).apply)(linen(False), ids)
    for name in TREES.keys() - {"gemma"}:
        ours = convert(TREES[name](), LAYOUTS[name], LINEN, CONFIG, read=jnp.asarray)
        np.testing.assert_allclose(jax.jit(Llama(CONFIG).apply)(ours, ids), want, atol=1e-5, err_msg=name)


def test_fused_queries_keys_and_values():
    """With as many key-value heads as queries Gemma keeps all three in one array."""
    c = tiny("llama", kv_heads=4)
    v = jax.tree.map(np.asarray, weights(c))
    rest = {k: x for k, x in v["params"].items() if k != "lm_head"}
    tree = convert(rest, LINEN, gemma(), c)
    assert tree["params"]["layer_0"]["attn"]["qkv_einsum"]["w"].shape == (3, 4, 32, 8)
    same(convert(tree, gemma(), LINEN, c), {"params": rest}, 1e-6)
    kept = Kept.of(c, kv_heads=[(0, 2), (1, 3), (0, 1)])
    small = slice_kept(tree, gemma(), kept, c)
    same(convert(small, gemma(), LINEN, kept.config(c)), slice_kept({"params": rest}, LINEN, kept, c), 1e-6)
    odd = Kept(q_heads=((0,), (0,), (0,)), kv_heads=((1,), (1,), (1,)))
    with pytest.raises(ValueError, match="keep the same of both"):
        slice_kept(tree, gemma(), odd, c)


# -- the same choice everywhere ----------------------------------------------------------------------------------------


def chosen(tree, layout):
    """Kept indices by a score that divides every matrix by its norm, from logical matrices alone."""
    found = views(tree, layout)

    def energy(name, i, n, axis):
        x = np.asarray(found[name, i], np.float64)
        x = (x if axis == 0 else x.T).reshape(n, -1)
        score = (x * x).sum(1)
        return score / np.linalg.norm(score)

    ffn = [sum(energy(n, i, F, a) for n, a in (("gate", 0), ("up", 0), ("down", 1))) for i in range(L)]
    kv = [
        energy("q", i, NK, 0) + energy("o", i, NK, 1) + energy("k", i, NK, 0) + energy("v", i, NK, 0) for i in range(L)
    ]  # a key-value head with its queries: consecutive rows of q
    return Kept.of(
        CONFIG,
        ffn=[np.argsort(-s, kind="stable")[:20] for s in ffn],
        kv_heads=[np.argsort(-s, kind="stable")[:1] for s in kv],
    )


@every
def test_the_same_units_are_kept_in_every_codebase(layout, make):
    assert chosen(make(), layout) == chosen(flat(), HF)


@every
def test_slices_are_those_of_the_checkpoint(layout, make):
    kept = chosen(flat(), HF)
    small = slice_kept(make(), layout, kept, CONFIG)
    want = slice_kept(linen(False), LINEN, kept, CONFIG)
    if "embed" not in layout.sites:  # the custom one speaks of matrices only
        found = views(small, layout)
        assert {(n, i): tuple(x.shape) for (n, i), x in found.items() if i == 0} == {
            ("gate", 0): (20, D), ("up", 0): (20, D), ("down", 0): (D, 20),
            ("q", 0): (2 * H, D), ("k", 0): (H, D), ("v", 0): (H, D), ("o", 0): (D, 2 * H),
        }  # fmt: skip
        return
    if layout.name == "gemma":
        del want["params"]["lm_head"]
    same(convert(small, layout, LINEN, kept.config(CONFIG)), want, 1e-6)


# -- slicing -----------------------------------------------------------------------------------------------------------

BALANCED = Kept.of(CONFIG, ffn=[range(0, 48, 2)] * L, q_heads=[(0, 3), (1, 2), (0, 2)])


@pytest.mark.parametrize("kept", [
    Kept.of(CONFIG, ffn=[range(10), range(5, 40), (1, 7, 9)]),
    Kept.of(CONFIG, kv_heads=[(0,), (1,), (0, 1)]),
    Kept.of(CONFIG, q_heads=[(0, 3), (1, 2), (0, 1, 2, 3)]),
    Kept.of(CONFIG, ffn=[range(10)] * 3, q_heads=[(0,), (3,), (1, 3)], kv_heads=[(0,), (1,), (0, 1)]),
], ids=["ffn", "kv", "balanced queries", "all"])  # fmt: skip
def test_sliced_equals_zeroed_columns_of_o_and_down(kept):
    ids, mask = prompt()
    tree = jax.tree.map(jnp.asarray, linen(False))
    small = slice_kept(tree, LINEN, kept, CONFIG)
    zeroed = {}
    found = views(tree, LINEN)
    for i in range(L):
        for name, rows, width in (("down", kept.ffn, 1), ("o", kept.q_heads, H)):
            if rows is not None:
                on = np.isin(np.arange(found[name, i].shape[1]) // width, rows[i])
                zeroed[name, i] = found[name, i] * on
    want = jax.jit(Llama(CONFIG).apply)(update(tree, LINEN, zeroed), ids, mask)
    got = jax.jit(Llama(kept.config(CONFIG)).apply)(small, ids, mask)
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)
    assert np.abs(jax.jit(Llama(CONFIG).apply)(tree, ids, mask)[real] - want[real]).max() > 1e-2


def test_stacked_layers_keep_equally_many_or_are_padded():
    ids, _ = prompt()
    tree = jax.tree.map(jnp.asarray, linen(True))
    even = Kept.of(CONFIG, ffn=[range(20), range(10, 30), range(28, 48)], kv_heads=[(0,), (1,), (0,)])
    small = slice_kept(tree, LINEN_SCAN, even, CONFIG)
    same(small, stack_layers(slice_kept(linen(False), LINEN, even, CONFIG)))
    uneven = Kept.of(CONFIG, ffn=[range(20), range(10), range(30)])
    with pytest.raises(ValueError, match=r"would keep \[10, 20, 30\] units"):
        slice_kept(tree, LINEN_SCAN, uneven, CONFIG)
    padded = slice_kept(tree, LINEN_SCAN, uneven, CONFIG, pad=True)
    wide = dataclasses.replace(CONFIG, ffn=(30,) * L)
    apart = slice_kept(linen(False), LINEN, uneven, CONFIG)
    np.testing.assert_allclose(
        jax.jit(Llama(wide, scanned=True).apply)(padded, ids),
        jax.jit(Llama(uneven.config(CONFIG)).apply)(apart, ids),
        atol=1e-5,
    )
    heads = Kept.of(CONFIG, kv_heads=[(0,), (0, 1), (1,)])
    padded = slice_kept(tree, LINEN_SCAN, heads, CONFIG, pad=True)
    apart = slice_kept(linen(False), LINEN, heads, CONFIG)
    np.testing.assert_allclose(
        jax.jit(Llama(CONFIG, scanned=True).apply)(padded, ids),
        jax.jit(Llama(heads.config(CONFIG)).apply)(apart, ids),
        atol=1e-5,
    )
    shifting = Kept.of(CONFIG, q_heads=[(0, 2), (0, 1, 2, 3), (1, 3)])
    with pytest.raises(ValueError, match="shift queries to other keys"):
        slice_kept(tree, LINEN_SCAN, shifting, CONFIG, pad=True)


@settings(max_examples=30)
@given(st.data())
def test_any_valid_choice_slices_alike_in_all_codebases(data):
    def some(n, least=1):
        return st.lists(st.integers(0, n - 1), min_size=least, max_size=n, unique=True).map(sorted)

    ffn = [data.draw(some(F)) for _ in range(L)]
    kv = [data.draw(some(NK)) for _ in range(L)]
    q = []
    for groups in kv:
        count = data.draw(st.integers(1, NQ // NK))
        q.append([g * 2 + j for g in groups for j in data.draw(st.permutations(range(2)))[:count]])
    kept = Kept.of(CONFIG, ffn, q, kv)
    assert kept.q_heads == tuple(tuple(sorted(r)) for r in q)
    assert Kept.from_json(kept.to_json(), CONFIG) == kept
    want = slice_kept(linen(False), LINEN, kept, CONFIG)
    for layout, make in ((HF, flat), (LAYOUTS["easylm"], easylm), (LAYOUTS["maxtext"], lambda: maxtext(False))):
        same(convert(slice_kept(make(), layout, kept, CONFIG), layout, LINEN, kept.config(CONFIG)), want, 1e-6)


def test_shapes_shards_and_numpy_stay_what_they_are():
    kept = BALANCED
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, linen(False)))
    small = slice_kept(shapes, LINEN, kept, CONFIG)
    arrays = slice_kept(linen(False), LINEN, kept, CONFIG)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(small))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(arrays))
    assert jax.tree.map(lambda x: x.shape, small) == jax.tree.map(lambda x: x.shape, arrays)
    stacked = slice_kept(jax.eval_shape(levanter), LEVANTER, kept, CONFIG)
    real = slice_kept(levanter(), LEVANTER, kept, CONFIG)
    assert [x.shape for x in jax.tree.leaves(stacked)] == [x.shape for x in jax.tree.leaves(real)]


# -- a graph's decision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scanned", [False, True])
def test_a_graphs_plan_becomes_kept_units(scanned):
    module = Llama(CONFIG, scanned)
    tree, layout = linen(scanned), LINEN_SCAN if scanned else LINEN
    ids, _ = prompt()
    graph = jprune.trace(module.apply, tree, ids)
    rng = np.random.default_rng(0)
    keep = {
        g: np.stack([rng.permutation(i.size) < i.size // 2 for _ in range(L)]) if scanned
        else rng.permutation(i.size) < i.size // 2
        for g, i in graph.groups.items()
        if i.size in (F, NK) and "v/kernel" not in g
    }  # fmt: skip
    kept = kept_of_plan(graph.plan(keep), layout, CONFIG)
    assert {len(r) for r in kept.ffn} == {F // 2} and {len(r) for r in kept.kv_heads} == {1}
    same(slice_kept(tree, layout, kept, CONFIG), graph.compact(tree, keep))
    (stream,) = [g for g, i in graph.groups.items() if i.size == D]
    with pytest.raises(ValueError, match="only ffn channels and heads can be said per layer"):
        kept_of_plan(graph.plan({stream: np.arange(D) > 3}), layout, CONFIG)


# -- reading, writing, adapters ----------------------------------------------------------------------------------------


@every
def test_updates_change_one_matrix_only(layout, make):
    tree = jax.tree.map(np.copy, make())
    before = {k: np.array(x) for k, x in views(tree, layout).items()}
    new = {("gate", 1): before["gate", 1] * 2, ("q", 2): before["q", 2] + 1}
    for after in (update(tree, layout, new), jax.jit(lambda t: update(t, layout, new))(tree)):
        for k, x in views(after, layout).items():
            np.testing.assert_array_equal(x, new.get(k, before[k]), err_msg=str(k))
    for k, x in views(tree, layout).items():
        np.testing.assert_array_equal(x, before[k], err_msg=f"the argument itself was changed: {k}")
    np.testing.assert_array_equal(view(make(), layout, "down", 0), before["down", 0])


def test_adapters_of_both_kinds_agree():
    """qwix keeps the transposes of PEFT's factors, with heads as axes; both give the same product B A."""
    rng = np.random.default_rng(1)
    r = 2
    peft, qwix = {}, {"layers": {i: {"attn": {}, "mlp": {}} for i in range(L)}}
    for i in range(L):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            group = "self_attn" if name in "qkvo" else "mlp"
            w = layer(i, name)
            a = rng.normal(size=(r, w.shape[1])).astype(np.float32)
            b = rng.normal(size=(w.shape[0], r)).astype(np.float32)
            path = f"base_model.model.model.layers.{i}.{group}.{name}_proj.lora"
            peft[f"{path}_A.weight"], peft[f"{path}_B.weight"] = a, b
            a2, b2 = a.T, b.T
            if name == "o":
                a2 = a2.reshape(NQ, H, r)
            elif name in "qkv":
                b2 = b2.reshape(r, -1, H)
            leaf = "w" if name in "qkvo" else "kernel"
            part = {f"{leaf}_lora_a": a2, f"{leaf}_lora_b": b2}
            qwix["layers"][i]["attn" if name in "qkvo" else "mlp"][f"{name}_proj"] = part
    same(convert(peft, PEFT, TUNIX, CONFIG), jax.tree.map(np.asarray, qwix))
    same(convert(qwix, TUNIX, PEFT, CONFIG), peft)
    small = slice_kept(peft, PEFT, BALANCED, CONFIG)
    other = slice_kept(qwix, TUNIX, BALANCED, CONFIG)
    for i in range(L):
        for name in ("q", "o", "gate", "down", "k"):
            a, b = (view(small, PEFT, f"{name}_lora_{f}", i) for f in "ab")
            whole = view(peft, PEFT, f"{name}_lora_b", i) @ view(peft, PEFT, f"{name}_lora_a", i)
            sliced = slice_kept(update(flat(), HF, {(name, i): whole}), HF, BALANCED, CONFIG)
            np.testing.assert_allclose(b @ a, view(sliced, HF, name, i), atol=1e-5)
            np.testing.assert_array_equal(view(other, TUNIX, f"{name}_lora_b", i), b)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused():
    with pytest.raises(ValueError, match="no leaf of this tree is one of layout hf"):
        views(easylm(), HF)
    with pytest.raises(ValueError, match="has 2 axes, layout levanter says"):
        views({"lm_head": {"weight": np.zeros((3, 4))}, "transformer": {"layers": {"stacked": {"mlp": {
            "gate_proj": {"weight": np.zeros((3, 4))}}}}}}, LEVANTER)  # fmt: skip
    with pytest.raises(ValueError, match="'gates' is no logical tensor"):
        Layout("mine", {"gates": (Site("x", ("F", "d")),)})
    with pytest.raises(ValueError, match="needs the roles"):
        Layout("mine", {"gate": (Site("x", ("F", "h")),)})
    with pytest.raises(ValueError, match="another order"):
        Layout("mine", {"q": (Site("x", ("d", "h.q_head")),)})
    with pytest.raises(ValueError, match="which layer is it"):
        custom({"gate": (r"blocks/\d+/w1", ("d", "F"))})
    matrices = {k: {"mlp": v["mlp"]} for k, v in linen(False)["params"].items() if k.startswith("layer")}
    with pytest.raises(ValueError, match="it can be read only"):
        convert(matrices, LINEN, CUSTOM, CONFIG)
    with pytest.raises(ValueError, match="no place for"):
        convert(linen(False), LINEN, CUSTOM, CONFIG)
    with pytest.raises(ValueError, match=r"no \('gate', 3\)"):
        update(flat(), HF, {("gate", 3): np.zeros((F, D))})
    with pytest.raises(ValueError, match="does not fit"):
        update(flat(), HF, {("gate", 0): np.zeros((F, D + 1))})
    with pytest.raises(ValueError, match="not of this config's widths"):
        convert(flat(), HF, LINEN, tiny("llama", ffn=40))
    with pytest.raises(ValueError, match="not those of a model with 40 Fs"):
        slice_kept(flat(), HF, Kept(ffn=((0,),) * 3), tiny("llama", ffn=40))


@pytest.mark.parametrize(("given", "message"), [
    ({"ffn": [range(3)] * 2}, "ffn has 2 layers, the model 3"),
    ({"ffn": [range(3), (), (1,)]}, "ffn of layer 1: keep at least one of the 48"),
    ({"ffn": [range(3), (1, 1), (1,)]}, "each once"),
    ({"ffn": [range(3), (48,), (1,)]}, "of the 48 units"),
    ({"ffn": [np.ones(47, bool)] * 3}, "a mask of shape"),
    ({"q_heads": [(0, 1), (0, 2), (0, 2)]}, r"layer 0: the kept query heads are \[2, 0\] per key-value head"),
    ({"q_heads": [(0, 2), (0, 2), (0, 1, 2)]}, "layer 2"),
    ({"q_heads": [(0,), (2,), (0,)], "kv_heads": [(1,), (1,), (0,)]}, "layer 0"),
])  # fmt: skip
def test_choices_that_no_model_can_have(given, message):
    with pytest.raises(ValueError, match=message):
        Kept.of(CONFIG, **given)
