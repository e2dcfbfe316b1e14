"""ToMe, ATS, EViT and the controls beside plain loops in float64; tokens dropped before the first block; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickly import quickly
from small_vit import case, run, seen

from jprune.methods.tokens.ats import ATS, sampled
from jprune.methods.tokens.before_first_block import AtEntry, two_pass
from jprune.methods.tokens.tome import ToMe, merge, tome_schedule
from jprune.methods.tokens.topk import TopK
from jprune.methods.tokens.zero_tprune import PruneSpec, ZeroTPrune
from jprune.models.token_hook import Seen, TokenReducer, Tokens, all_tokens


def in_block(reducer, place, layer=0, name="token", tokens=None):
    """What the reducer makes of the tokens of a block, outside of a model."""
    attention, x = seen(layer, name)
    prefix = case(name)[0].config.prefix

    @quickly
    def program(x, parts, tokens):
        tokens = all_tokens(x, jax.random.key(0)) if tokens is None else tokens
        return getattr(reducer, place)(layer, tokens, Seen(*parts, prefix=prefix))

    return program(x, attention[:4], tokens), attention, np.asarray(x, np.float64)


# -- ToMe -------------------------------------------------------------------------------------------------------------


def merged_by_loops(x, size, keys, r, special):
    """[(members, size, mean)] in ToMe's order; keys (tokens, features)."""
    n = len(x)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    found = []
    for a in even:
        pairs = [(unit[a] @ unit[b], -b) for b in odd if b >= special]
        if a >= special and pairs:
            found.append((*max(pairs), a))
    found.sort(key=lambda t: (-t[0], t[2]))
    into = {a: -b for _, b, a in found[:r]}
    members = {b: [b] + [a for a in even if into.get(a) == b] for b in odd}
    rows = [[a] for a in even if a not in into] + [members[b] for b in odd]
    front = [next(row for row in rows if row[0] == i) for i in range(special)]
    rows = front + [row for row in rows if row[0] >= special]
    return [(m[0], size[m].sum(), (x[m] * size[m, None]).sum(0) / size[m].sum()) for m in rows]


@pytest.mark.parametrize(("n", "special", "r"), [(9, 1, 3), (10, 2, 4), (8, 0, 4), (11, 3, 1)])
def test_tome_against_plain_loops(n, special, r):
    rng = np.random.default_rng(n)
    x, keys, size = rng.normal(size=(2, n, 3)), rng.normal(size=(2, n, 4)), rng.integers(1, 5, (2, n)).astype(float)
    tokens = all_tokens(jnp.asarray(x, jnp.float32))._replace(size=jnp.asarray(size, jnp.float32))
    found = quickly(merge, "r", "special")(tokens, jnp.asarray(keys, jnp.float32), r, special)
    assert found.x.shape == (2, n - r, 3)
    for i in range(2):
        index, sizes, means = zip(*merged_by_loops(x[i], size[i], keys[i], r, special))
        assert found.index[i].tolist() == list(index) and found.size[i].tolist() == list(sizes)
        np.testing.assert_allclose(found.x[i], np.array(means), rtol=1e-5, atol=1e-6)
    assert found.size.sum(1).tolist() == size.sum(1).tolist()  # nobody is lost


def test_half_precision_tokens_are_merged_in_full_precision():
    x = jnp.full((1, 2, 3), 1.0, jnp.bfloat16)
    tokens = all_tokens(x)._replace(size=jnp.array([[1.0, 512.0]]))  # 513 is no bfloat16
    found = quickly(merge, "r", "special")(tokens, jnp.ones((1, 2, 3)), 1, 0)
    assert found.x.dtype == jnp.bfloat16 and found.size.tolist() == [[513.0]] and (found.x == 1).all()


def test_merged_tokens_weigh_in_attention():
    r = (4, 3)
    by_size, passed = run(ToMe(r))
    plain, same = run(ToMe(r, attention_by_size=False))
    assert [i.shape[1] for i in passed.index] == [21, 17, 14, 14] and [i.shape[1] for i in passed.mlp] == [17, 14, 14]
    assert passed.size[-1].sum(1).tolist() == [21, 21] == same.size[-1].sum(1).tolist()
    assert np.abs(by_size - plain).max() > 1e-3


def test_schedules_of_tome():
    assert tome_schedule(13, 12) == (13,) * 12
    assert tome_schedule(13, 12, -1.0) == (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    assert tome_schedule(8, 3, 1.0) == (0, 8, 16)
    with pytest.raises(ValueError, match="inflect 2"):
        tome_schedule(8, 3, 2)


# -- ATS --------------------------------------------------------------------------------------------------------------


SAMPLED = quickly(sampled, "heights")


def sampled_by_loops(score, heights):
    order = sorted(range(len(score)), key=lambda i: (score[i], i))
    total = np.cumsum(score[order])
    spread = (total - total[0]) / (total[-1] - total[0])
    start = min(s for s in spread if s > 0)
    found = set()
    for k in range(heights):
        at = start + k / (heights - 1) * (1 - start)
        found.add(order[int(np.argmin(np.abs(at - spread)))])
    return sorted(found)


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.floats(0.2, 3))
def test_sampling_against_plain_loops(seed, spread):
    rng = np.random.default_rng(seed)
    score, here = rng.lognormal(0, spread, (2, 12)), np.arange(12) != 4
    found = SAMPLED(jnp.asarray(score, jnp.float32), jnp.broadcast_to(here, (2, 12)), 6)
    for i in range(2):
        others = np.flatnonzero(here)
        assert np.flatnonzero(found[i]).tolist() == others[sampled_by_loops(score[i, others], 6)].tolist()


def test_even_scores_keep_all_heights_and_one_sided_ones_few():
    def number(score, heights):
        return np.sum(SAMPLED(np.array([score], np.float32), np.ones((1, len(score)), bool), heights))

    assert number([1.0] * 9, 8) == 8  # the least of all lies at 0, below every height
    assert number([1e-3] * 8 + [1.0], 8) < 5
    assert number([1.0], 2) == 1


def test_ats_in_a_block():
    reducer = ATS(((1, 8),))
    found, attention, x = in_block(reducer, "inside", 1, "distilled")
    assert found.x.shape[1] == 10
    for i in range(2):
        row = np.asarray(attention.weights[i, :, 0], np.float64).sum(0)
        norm = np.sqrt((np.asarray(attention.value[i], np.float64) ** 2).sum((1, 2)))
        kept = [0, 1] + [2 + j for j in sampled_by_loops((row * norm)[2:], 8)]
        assert found.index[i][found.alive[i]].tolist() == kept
        assert (np.asarray(found.index[i])[~np.asarray(found.alive[i])] == -1).all()
        np.testing.assert_array_equal(found.x[i, : len(kept)], x[i, kept].astype(np.float32))


def test_places_without_a_token_change_nothing():
    x = case()[2]
    reducer = ATS(((0, 19), (1, 17)))
    logits, passed = run(reducer)
    number = np.sum(passed.alive[-1], 1)
    assert (number < 18).all() and (number > 1).all()
    # the same tokens again, dropped one by one, in a model that has no empty places
    for i in range(2):
        where = [np.asarray(a[i]) for a in passed.alive[1:3]]
        kept = [np.asarray(n[i])[w] for n, w in zip(passed.index[1:3], where, strict=True)]
        lone, _ = run(_Given(tuple(map(tuple, kept))), x=x[i : i + 1])
        np.testing.assert_allclose(lone[0], logits[i], atol=1e-4)


class _Given(TokenReducer):
    """Keeps given original tokens inside of the first blocks; for one image."""

    def __init__(self, kept):
        object.__setattr__(self, "kept", kept)

    def inside(self, layer, tokens, seen):
        if layer >= len(self.kept):
            return tokens
        before = list(range(21)) if layer == 0 else list(self.kept[layer - 1])
        at = jnp.array([before.index(j) for j in self.kept[layer]])
        return tokens._replace(x=tokens.x[:, at], index=tokens.index[:, at])

    def __hash__(self):
        return hash(self.kept)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["cls", "column", "norm"])
def test_the_highest_scores_stay(score):
    found, attention, x = in_block(TopK(score, ((0, 6),)), "inside")
    weights = np.asarray(attention.weights, np.float64)
    expected = {
        "cls": weights[:, :, 0].mean(1),
        "column": weights.mean((1, 2)),
        "norm": np.linalg.norm(x, axis=-1),
    }[score]
    for i in range(2):
        best = sorted(range(1, 21), key=lambda j: -expected[i, j])[:6]
        assert found.index[i].tolist() == [0, *sorted(best)]


def test_evit_adds_what_it_drops():
    found, attention, x = in_block(TopK("cls", ((0, 6),), fused=True), "inside")
    assert found.x.shape[1] == 8 and found.index[:, -1].tolist() == [-1, -1]
    row = np.asarray(attention.weights, np.float64)[:, :, 0].mean(1)
    for i in range(2):
        dropped = sorted(set(range(21)) - set(found.index[i, :-1].tolist()))
        np.testing.assert_allclose(found.x[i, -1], row[i, dropped] @ x[i, dropped], rtol=1e-4, atol=1e-5)
    logits, passed = run(TopK("cls", ((0, 9), (1, 5)), fused=True))
    assert [i.shape[1] for i in passed.mlp] == [11, 7, 7] and np.isfinite(logits).all()


def test_chance_needs_a_key_and_differs_by_it_and_by_image():
    reducer = TopK("random", ((0, 9), (1, 5)), inside_block=False)
    one, two = (run(reducer, seed=k)[1].index[-1].tolist() for k in range(2))
    assert one != two and one[0] != one[1] and len(one[0]) == 6
    with pytest.raises(ValueError, match="need a key"):
        reducer.after(0, all_tokens(seen(0)[1]), seen(0)[0]._replace(prefix=1))


def test_hidden_tokens_are_not_kept():
    attention, x = seen(0)
    alive = jnp.asarray(np.arange(21)[None] % 3 != 1).repeat(2, 0)
    tokens = all_tokens(x)._replace(alive=alive)
    found, *_ = in_block(TopK("norm", ((0, 6),)), "inside", tokens=tokens)
    assert found.alive.all() and (np.asarray(found.index) % 3 != 1).all()
    with pytest.raises(ValueError, match="arrays full of tokens"):
        ToMe((2,)).inside(0, tokens, attention)


# -- before the first block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["random", "grid", "norm", "divprune"])
def test_before_the_first_block(select):
    x = seen(0)[1]
    entered = quickly(lambda x: AtEntry(select, 5).before(all_tokens(x, jax.random.key(1)), 1))(x)
    index = np.asarray(entered.index)
    assert index.shape == (2, 6) and not index[:, 0].any() and (np.diff(index, axis=1) > 0).all()
    np.testing.assert_array_equal(entered.x, np.take_along_axis(np.asarray(x), index[..., None], 1))
    patches = np.asarray(x)[:, 1:]
    if select == "grid":
        assert index.tolist() == [[0, 1, 5, 9, 13, 17]] * 2
    elif select == "norm":
        best = np.argsort(-np.linalg.norm(patches, axis=-1))[:, :5] + 1
        assert index[:, 1:].tolist() == np.sort(best).tolist()
    else:
        assert index[0].tolist() != index[1].tolist()
    whole = all_tokens(x)
    assert AtEntry(select, 20).before(whole, 1) is whole


def test_a_second_pass_on_what_a_first_one_chose():
    module, variables, x = case()
    chooser = ZeroTPrune((PruneSpec(0, keep=7),))

    @quickly
    def both(x):
        def apply(x, **options):
            return module.apply(variables, x, **options)

        logits = two_pass(apply, x, chooser)
        kept = apply(x, reducer=chooser, trace=True)[1].index[-1]
        return logits, kept, module.apply(variables, x, reducer=_First(kept), trace=False)

    logits, kept, expected = both(x)
    assert kept.shape == (2, 8)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


class _First(TokenReducer):
    """Cuts the embedded tokens to given places, image by image."""

    def __init__(self, kept):
        object.__setattr__(self, "kept", kept)

    def before(self, tokens, prefix):
        x = jnp.stack([tokens.x[i, self.kept[i]] for i in range(2)])
        return Tokens(x, self.kept)


def test_errors():
    for make, match in (
        (lambda: TopK("best", ((0, 1),)), "score must be one of cls"),
        (lambda: TopK("cls", ((2, 1), (0, 1))), r"\[2, 0\]"),
        (lambda: TopK("cls", ((0, 0),)), "keep 1 patch or more"),
        (lambda: TopK("norm", ((0, 2),), fused=True), "fused by attention"),
        (lambda: ATS(((0, 1),)), "2 heights or more"),
        (
            lambda: ATS(
                ((1, 4), (1, 4)),
            ),
            r"\[1, 1\]",
        ),
        (lambda: ToMe((2, -1)), "0 tokens or more"),
        (lambda: AtEntry("best", 3), "select must be one of random"),
        (lambda: AtEntry("norm", 0), "keep 1 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    (attention, x), (module, variables, images) = seen(0, "mean"), case("mean")
    for reducer in (ATS(((0, 4),)), TopK("cls", ((0, 4),))):
        with pytest.raises(ValueError, match="class token"):
            reducer.inside(0, all_tokens(x), attention)
        with pytest.raises(ValueError, match="looks at the class token"):
            jax.eval_shape(lambda x, r=reducer: module.apply(variables, x, reducer=r), images)
    with pytest.warns(UserWarning, match="half of 20 patches"):
        assert jax.eval_shape(lambda t: ToMe((13,)).inside(0, t, attention), all_tokens(x)).x.shape[1] == 10
    with pytest.raises(ValueError, match="need a key"):
        AtEntry("random", 3).before(all_tokens(x), 0)
