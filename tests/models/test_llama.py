"""Decoders against the formulas written out in numpy, head by head; both arrangements; what a config refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FAMILIES, prompt, tiny, weights
from test_rope import by_hand

from jprune.models.llama import (
    Block,
    Llama,
    LlamaConfig,
    config_from_params,
    context,
    llama_config,
    stack_layers,
    unstack_layers,
)
from jprune.tracing.paths import flatten


def formulas(variables, c, ids, mask):
    """Logits in float64, one head and one token at a time: the definition, not the implementation."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    ids, mask = np.asarray(ids), np.asarray(mask).astype(bool)

    def norm(x, scale):
        return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + c.eps)

    def biased(y, part):
        return y + part["bias"] if "bias" in part else y

    def turned(x, position, scale):
        if scale is not None:
            x = norm(x, scale)
        angle = position * by_hand(c.rope, c.head_dim)
        a, b = np.split(x, 2)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    out = []
    for row, real in zip(ids, mask, strict=True):
        position = np.maximum(np.cumsum(real) - 1, 0)
        x = p["embed"]["embedding"][row]
        for i in range(c.depth):
            w = p[f"layer{i}"]
            y, attn = norm(x, w["input_norm"]["scale"]), w["attn"]
            window = None if c.windows is None else c.windows[i]
            new = x.copy()
            for n in range(c.q_heads[i]):
                g = n // (c.q_heads[i] // c.kv_heads[i])
                q, k, v = (
                    biased(y @ attn[s]["kernel"][:, m], {"bias": attn[s]["bias"][m]} if "bias" in attn[s] else {})
                    for s, m in (("q", n), ("k", g), ("v", g))
                )
                scales = [attn[f"{s}_norm"]["scale"] if c.qk_norm else None for s in "qk"]
                q, k = (np.stack([turned(z[t], position[t], s) for t in range(len(z))]) for z, s in zip((q, k), scales))
                for t in range(len(row)):
                    seen = [u for u in range(t + 1) if real[u] and (window is None or u > t - window)]
                    if seen:
                        weight = np.exp(k[seen] @ q[t] / np.sqrt(c.head_dim))
                        new[t] += (weight / weight.sum()) @ v[seen] @ attn["o"]["kernel"][n]
            x = biased(new, attn["o"])
            y, mlp = norm(x, w["post_norm"]["scale"]), w["mlp"]
            gate, up = (biased(y @ mlp[s]["kernel"], mlp[s]) for s in ("gate", "up"))
            x = x + biased((gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["kernel"], mlp["down"])
        x = norm(x, p["final_norm"]["scale"])
        out.append(x @ (p["embed"]["embedding"].T if c.tied else p["lm_head"]["kernel"]))
    return np.stack(out), mask


@functools.cache
def model(family):
    """(config, variables, ids, mask, logits of the formulas)."""
    c = tiny(family)
    v = weights(c)
    ids, mask = prompt()
    return c, v, ids, mask, formulas(v, c, ids, mask)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scanned", [False, True])
def test_the_logits_are_those_of_the_formulas(family, scanned):
    c, v, ids, mask, want = model(family)
    got = jax.jit(Llama(c, scanned).apply)(stack_layers(v) if scanned else v, ids, mask)
    real = np.asarray(mask, bool)
    assert got.dtype == jnp.float32 and np.isfinite(got).all()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got[real], want[real], atol=5e-4)


def test_layers_of_different_widths():
    c = LlamaConfig(50, 32, (16, 48, 24), (4, 2, 6), (2, 2, 1), 8)
    v = weights(c)
    ids, mask = prompt()
    want, real = formulas(v, c, ids, mask)
    np.testing.assert_allclose(jax.jit(Llama(c).apply)(v, ids, mask)[real], want[real], atol=5e-4)
    assert not c.uniform
    with pytest.raises(ValueError, match="unstack_layers"):
        Llama(c, scanned=True).init(jax.random.key(0), ids)
    with pytest.raises(ValueError, match=r"'attn/k/kernel' has shape .* in layer 0 and .* in layer 2"):
        stack_layers(v)


def test_padding_does_not_matter_wherever_it_stands():
    c, v, ids, _, _ = model("mistral")
    short = ids[:, 3:]
    alone = jax.jit(Llama(c).apply)(v, short)
    left = jax.jit(Llama(c).apply)(v, ids, jnp.ones(ids.shape, bool).at[:, :3].set(False))
    np.testing.assert_allclose(left[:, 3:], alone, atol=2e-4)
    right = jax.jit(Llama(c).apply)(v, ids[:, ::-1], jnp.ones(ids.shape, bool).at[:, 6:].set(False))
    np.testing.assert_allclose(right[:, :6], jax.jit(Llama(c).apply)(v, ids[:, ::-1][:, :6]), atol=2e-4)
    assert np.abs(jax.jit(Llama(c).apply)(v, ids)[:, 3:] - alone).max() > 0.1  # else the mask is never looked at


def test_the_initial_tree_is_the_documented_one():
    c = tiny("qwen2")
    shapes = dict(flatten(jax.eval_shape(Llama(c).init, jax.random.key(0), prompt()[0])))
    own = {p.removeprefix("params/layer1/"): tuple(x.shape) for p, x in shapes.items() if "/layer1/" in p}
    assert own == {
        "input_norm/scale": (32,),
        "post_norm/scale": (32,),
        "attn/q/kernel": (32, 4, 8),
        "attn/q/bias": (4, 8),
        "attn/k/kernel": (32, 2, 8),
        "attn/k/bias": (2, 8),
        "attn/v/kernel": (32, 2, 8),
        "attn/v/bias": (2, 8),
        "attn/o/kernel": (4, 8, 32),
        "mlp/gate/kernel": (32, 48),
        "mlp/up/kernel": (32, 48),
        "mlp/down/kernel": (48, 32),
    }
    rest = {p: tuple(x.shape) for p, x in shapes.items() if "/layer" not in p}
    assert rest == {
        "params/embed/embedding": (50, 32),
        "params/final_norm/scale": (32,),
        "params/lm_head/kernel": (32, 50),
    }
    stacked = dict(flatten(jax.eval_shape(Llama(c, scanned=True).init, jax.random.key(0), prompt()[0])))
    assert stacked["params/layers/attn/q/kernel"].shape == (3, 32, 4, 8)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stack_layers(weights(c))) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(Llama(c, scanned=True).init, jax.random.key(0), prompt()[0])
    )


def test_stacking_and_back():
    c = tiny("biased")
    v = weights(c)
    for tree in (v, v["params"], jax.tree.map(np.asarray, v), jax.eval_shape(lambda: v)):
        back = unstack_layers(stack_layers(tree))
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for (path, a), (_, b) in zip(flatten(back), flatten(tree), strict=True):
            assert type(a) is type(b) and a.shape == b.shape, path
            if not isinstance(a, jax.ShapeDtypeStruct):
                np.testing.assert_array_equal(a, b, err_msg=path)
    assert unstack_layers(v) is v and stack_layers(stack_layers(v)).keys() == v.keys()


def test_one_block_stands_alone():
    c, v, ids, _, _ = model("qwen3")
    x = v["params"]["embed"]["embedding"][ids]
    at, _ = context(c, ids.shape[1])
    for i in range(c.depth):
        x, _ = jax.jit(Block(c, i).apply)({"params": v["params"][f"layer{i}"]}, x, at)
    x = np.asarray(x, np.float64)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.eps) * np.asarray(v["params"]["final_norm"]["scale"])
    np.testing.assert_allclose(
        x @ np.asarray(v["params"]["embed"]["embedding"]).T, jax.jit(Llama(c).apply)(v, ids), atol=5e-4
    )


def test_bfloat16_weights():
    c, v, ids, mask, want = model("qwen3")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), v)
    real = np.asarray(mask, bool)
    for scanned in (False, True):
        run = jax.jit(Llama(dataclasses.replace(c, dtype="bfloat16"), scanned).apply)
        got = run(stack_layers(half) if scanned else half, ids, mask)
        assert got.dtype == jnp.float32
        assert np.abs(got[real] - want[real]).max() < 0.05 * np.abs(want).max()


def test_norms_of_bfloat16_are_computed_in_float32():
    """A sum of 4096 squares in bfloat16 would stop growing at 256."""
    from jprune.models.llama import RMSNorm

    x = jnp.ones((1, 4096), jnp.bfloat16)
    y = RMSNorm(0.0, dtype="bfloat16").apply({"params": {"scale": jnp.ones(4096, jnp.bfloat16)}}, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1)


def test_rematerialisation_changes_no_gradient():
    c, v, ids, mask, _ = model("llama")

    def loss(module):
        return jax.jit(jax.grad(lambda p: jax.nn.logsumexp(module.apply(p, ids, mask), axis=-1).mean()))

    plain = loss(Llama(c))(v)
    for module, tree in ((Llama(c, remat=True), v), (Llama(c, True, True), stack_layers(v))):
        for (path, a), (_, b) in zip(flatten(unstack_layers(loss(module)(tree))), flatten(plain), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=path)


def test_the_config_is_read_from_the_tree():
    for c in (tiny("qwen2"), LlamaConfig(50, 32, (16, 48, 24), (4, 2, 6), (2, 2, 1), 8, value_dim=(8, 4, 8))):
        wider = dataclasses.replace(c, ffn=(99,) * 3, q_heads=(12,) * 3, kv_heads=(3,) * 3, value_dim=None)
        assert config_from_params(weights(c), wider) == c
    assert config_from_params(weights(tiny(), scanned=True), tiny(ffn=99)) == tiny()


def test_what_is_refused():
    c, v, ids, mask, _ = model("llama")
    with pytest.raises(ValueError, match="layer 1: 3 query heads cannot be shared evenly among 2"):
        LlamaConfig(50, 32, (8, 8), (4, 3), (2, 2), 8)
    with pytest.raises(ValueError, match="kv_heads lists 1 layers, ffn 2"):
        LlamaConfig(50, 32, (8, 8), (4, 4), (2,), 8)
    with pytest.raises(ValueError, match="odd"):
        LlamaConfig(50, 32, (8,), (4,), (2,), 7)
    with pytest.raises(ValueError, match="'falcon' is unknown"):
        LlamaConfig(50, 32, (8,), (4,), (2,), 8, family="falcon")
    with pytest.raises(ValueError, match="give head_dim"):
        llama_config(50, 32, 48, 2, 3)
    with pytest.raises(ValueError, match="mask has 8 tokens, the ids 9"):
        Llama(c).apply(v, ids, mask[:, 1:])
    with pytest.raises(ValueError, match="the tree has 3 layers, the config 4"):
        config_from_params(v, llama_config(50, 32, 48, 4, 4, 2))
    with pytest.raises(ValueError, match="the tree has 3 layers, the config 4"):
        config_from_params(stack_layers(v), llama_config(50, 32, 48, 4, 4, 2))
    with pytest.raises(ValueError, match="rotary pairs were pruned"):
        config_from_params(v, llama_config(50, 32, 48, 3, 4, 2, head_dim=16))
    with pytest.raises(ValueError, match=r"has layers \[0, 2\]"):
        stack_layers({k: x for k, x in v["params"].items() if k != "layer1"})
