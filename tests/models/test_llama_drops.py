"""Embeddings instead of ids, own positions, tokens that leave between layers: against single blocks and whole passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import prompt, tiny, weights
from laws import same_numbers

from jprune.methods.tokens.decoder_drops import divprune_inside, fastv, vtw
from jprune.methods.tokens.divprune import divprune_select
from jprune.models.decoding import continue_from, new_cache, new_caches
from jprune.models.llama import Block, Drop, Llama, context, stack_layers, token_positions

TOKENS, LENGTH, LAYERS = 9, 4, 2
START = jnp.array([[4], [3]])  # the second row is padded on the left by three tokens


@functools.cache
def ready():
    config = tiny("qwen3", depth=LAYERS)
    v = weights(config)
    ids, mask = prompt()
    return config, Llama(config), v, ids, mask, v["params"]["embed"]["embedding"][ids]


@functools.cache
def whole():
    _, module, v, ids, mask, _ = ready()
    return np.asarray(jax.jit(module.apply)(v, ids, mask))


def test_embeddings_instead_of_ids():
    _, module, v, ids, mask, x = ready()
    got = jax.jit(lambda x: module.apply(v, None, mask, embeddings=x, positions=token_positions(TOKENS, mask)))(x)
    same_numbers(got, whole(), terms=LAYERS * 200)  # 32 + 16 + 9 + 64 + 32 + 48 in each layer
    for both in ((ids, x), (None, None)):
        with pytest.raises(ValueError, match="either ids or embeddings"):
            module.apply(v, both[0], embeddings=both[1])


def test_positions_of_ones_own_turn_queries_and_keys():
    _, module, v, ids, mask, _ = ready()
    real = np.asarray(mask, bool)
    run = jax.jit(lambda places: module.apply(v, ids, mask, positions=places))
    moved = run(token_positions(TOKENS, mask) + 100)  # only differences matter
    np.testing.assert_allclose(moved[real], whole()[real], atol=2e-3)
    apart = run(3 * token_positions(TOKENS, mask))
    assert np.abs(apart - whole())[real].max() > 0.1
    with pytest.raises(ValueError, match="8 positions of 9 tokens"):
        module.apply(v, ids, positions=jnp.zeros((2, 8), jnp.int32))


@pytest.mark.slow  # the tests of LLaVA have it too
def test_a_masked_token_is_one_that_is_not_there():
    """The whole prompt with tokens masked, and the shorter prompt at its old positions: the same logits."""
    _, module, v, ids, mask, _ = ready()
    kept = jnp.array([[0, 1, 3, 5, 6, 7, 8], [0, 1, 2, 3, 5, 7, 8]])
    there = jnp.zeros((2, TOKENS), bool).at[jnp.arange(2)[:, None], kept].set(True) & mask.astype(bool)
    places = token_positions(TOKENS, mask)
    at = functools.partial(jnp.take_along_axis, indices=kept, axis=1)
    run = jax.jit(lambda ids, mask, places: module.apply(v, ids, mask, positions=places))
    masked = jnp.take_along_axis(run(ids, there, places), kept[..., None], axis=1)
    short = run(at(ids), at(mask), at(places))
    real = np.asarray(at(mask), bool)
    np.testing.assert_allclose(short[real], masked[real], atol=1e-4)


@functools.partial(jax.jit, static_argnums=2)
def by_blocks(x, mask, layer, index):
    """(stream before the drop, logits behind) with the blocks one by one."""
    config, _, v, *_ = ready()
    p, places = v["params"], token_positions(x.shape[1], mask)
    for i in range(LAYERS):
        if i == layer:
            before = x
            x = jnp.take_along_axis(x, index[..., None], axis=1)
            mask, places = (jnp.take_along_axis(a, index, axis=1) for a in (mask, places))
        at = context(config, x.shape[1], mask, positions=places)[0]
        x = Block(config, i).apply({"params": p[f"layer{i}"]}, x, at)[0]
    square = jnp.mean(x**2, -1, keepdims=True)
    return before, (x / jnp.sqrt(square + config.eps) * p["final_norm"]["scale"]) @ p["embed"]["embedding"].T


def last_attention(x, mask, layer):
    """(batch, tokens), mean over heads, of the last token in `layer`, whose input is x; float64, scalar products."""
    config, _, v, *_ = ready()
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), v["params"][f"layer{layer}"])
    x, mask = np.asarray(x, np.float64), np.asarray(mask, bool)

    def norm(z, scale):
        return z / np.sqrt((z * z).mean(-1, keepdims=True) + config.eps) * scale

    def turned(z, place):
        half = config.head_dim // 2
        angle = place * config.rope.theta ** (-np.arange(half) / half)
        a, b = z[..., :half], z[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    out = np.zeros(mask.shape)
    for b in range(len(x)):
        h = norm(x[b], p["input_norm"]["scale"])
        place = np.maximum(np.cumsum(mask[b]) - 1, 0)
        share = config.q_heads[layer] // config.kv_heads[layer]
        for head in range(config.q_heads[layer]):
            q = norm(h[-1] @ p["attn"]["q"]["kernel"][:, head], p["attn"]["q_norm"]["scale"])
            keys = norm(h @ p["attn"]["k"]["kernel"][:, head // share], p["attn"]["k_norm"]["scale"])
            scores = np.array([turned(q, place[-1]) @ turned(k, at) for k, at in zip(keys, place)])
            weight = np.exp(scores / np.sqrt(config.head_dim)) * mask[b]
            out[b] += weight / weight.sum() / config.q_heads[layer]
    return out


def kept_of(chosen):
    """Places that stay, per row, if these of the four visual tokens do."""
    rows = []
    for s, c in zip(START[:, 0].tolist(), chosen, strict=True):
        rows.append([l for l in range(TOKENS) if not s <= l < s + LENGTH or l - s in c])
    return jnp.array(rows)


def test_fastv_keeps_what_the_last_token_looks_at():
    config, module, v, _, mask, x = ready()
    seen = last_attention(x, mask, 0)
    told = jax.jit(lambda x: Block(config, 0, tells=True).apply(
        {"params": v["params"]["layer0"]}, x, context(config, TOKENS, mask)[0])[2])(x)  # fmt: skip
    np.testing.assert_allclose(told.mean(1), seen, atol=1e-5)
    chosen = [np.argsort(-seen[b, s : s + LENGTH])[:2].tolist() for b, s in enumerate(START[:, 0].tolist())]
    assert all(sorted(c) != [0, 1] for c in chosen)  # what equal scores would give
    _, want = by_blocks(x, mask, 1, kept_of(chosen))
    got = jax.jit(
        lambda x: module.apply(v, None, mask, embeddings=x, drops=[fastv(START, LENGTH, 2, TOKENS, layer=1)])
    )(x)
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.slow
def test_vtw_and_divprune_inside():
    _, module, v, _, mask, x = ready()
    run = jax.jit(lambda x: [module.apply(v, None, mask, embeddings=x, drops=[d]) for d in
                             (vtw(START, LENGTH, TOKENS, 1), divprune_inside(START, LENGTH, 2, TOKENS, 1))])  # fmt: skip
    none, diverse = run(x)
    before, want = by_blocks(x, mask, 1, kept_of([[], []]))
    np.testing.assert_allclose(none, want, atol=2e-4)
    chosen = [divprune_select(before[b, s : s + LENGTH], 2).order.tolist() for b, s in enumerate(START[:, 0].tolist())]
    np.testing.assert_allclose(diverse, by_blocks(x, mask, 1, kept_of(chosen))[1], atol=2e-4)


def test_decoding_from_caches_of_two_lengths():
    """Steps from the caches make the tokens of a whole pass in which the same tokens leave behind the same layer."""
    _, module, v, _, mask, x = ready()
    steps, kept = 5, kept_of([[0, 3], [1, 2]])
    short, table = kept.shape[1], v["params"]["embed"]["embedding"]

    def answer(x):
        caches = new_caches(module, 2, [(1, TOKENS + steps), (LAYERS, short + steps)])
        drop = Drop(1, short, lambda *_: kept)
        logits, caches = module.apply(v, None, mask, caches, embeddings=x, drops=[drop])
        place = mask.sum(1)
        return continue_from(module, v, logits[:, -1], caches, place, steps, None), caches

    got, caches = jax.jit(answer)(x)
    assert [c.k[0].shape[1] for c in caches] == [TOKENS + steps, short + steps]
    assert [len(c.k) for c in caches] == [1, 1] and caches[1].valid[:, :short].all(1).tolist() == [True, False]
    n = steps - 1  # the last token is read by nobody
    every = jnp.concatenate([x, table[got[:, :n]]], axis=1)
    later = jnp.concatenate([kept, jnp.broadcast_to(TOKENS + jnp.arange(n), (2, n))], axis=1)
    drop = Drop(1, short + n, lambda *_: later)
    run = jax.jit(lambda x, mask: module.apply(v, None, mask, embeddings=x, drops=[drop]))
    logits = run(every, jnp.pad(mask, ((0, 0), (0, n)), constant_values=1))
    np.testing.assert_array_equal(got, jnp.argmax(logits[:, short - 1 :], -1))
    assert len(set(np.asarray(got).ravel().tolist())) > 2


def test_what_is_refused():
    config, module, v, ids, *_ = ready()
    drop = Drop(1, 5, lambda *_: jnp.zeros((2, 4), jnp.int32))
    stacked = stack_layers(v)
    shapes = functools.partial(jax.eval_shape, module.apply)
    for call, said in (
        (lambda: jax.eval_shape(lambda: module.apply(v, ids, drops=[drop])), r"layer 1 picked \(2, 4\), not \(2, 5\)"),
        (lambda: module.apply(v, ids, drops=[Drop(2, 5, drop.pick)]), "from 1 to 1"),
        (lambda: module.apply(v, ids, None, new_cache(module, 2, 9), drops=[drop]), r"end at the layers \[2\]"),
        (lambda: shapes(v, ids, None, new_caches(module, 2, [(1, 9)])), r"end at the layers \[1\]"),
        (lambda: Llama(config, scanned=True).apply(stacked, ids, drops=[drop]), "unstack_layers"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError, match="vtw keeps none"):
        fastv(START, LENGTH, 0, TOKENS)
