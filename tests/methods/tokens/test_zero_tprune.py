"""Zero-TPrune: counts, its layer against plain loops, and in a model: gathered or hidden, adaptive, one image or many."""

import dataclasses

import jax
import numpy as np
import pytest
from laws import same_numbers
from plain_zero_tprune import layer, one_score, votes
from quickly import quickly
from small_vit import case, run, seen

from jprune.methods.tokens.zero_tprune import PAPER_VARIANCES, PRESETS, PruneSpec, ZeroTPrune, importance, preset
from jprune.models.token_hook import Seen, TokenReducer, all_tokens

SCHEDULE = ZeroTPrune((PruneSpec(0, 3, keep=14, iters=6), PruneSpec(1, 2, rate=0.75, iters=1, vhf=(0.1, 2.0))))


def after_block(spec, name="token", key=None):
    """What the spec leaves of the tokens after its block, outside of a model."""
    attention, x = seen(spec.layer, name)
    prefix = case(name)[0].config.prefix

    @quickly
    def program(x, parts):
        return ZeroTPrune((spec,)).after(spec.layer, all_tokens(x, key), Seen(*parts, prefix=prefix))

    return program(x, attention[:4])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_counts():
    rates = [PruneSpec(0, rate=r) for r in (0.9, 0.8, 0.7)]
    n, found = 196, []
    for spec in rates:
        n = spec.numbers(n)[1]
        found.append(n)
    assert found == [176, 140, 98]
    assert PruneSpec(0, rate=0.29).numbers(100) == (0, 29)  # in floating point the product is a little less
    assert PruneSpec(0, 10, rate=0.9).numbers(187) == (10, 159)
    assert PruneSpec(0, 3, keep=50).numbers(20) == (3, 17)
    with pytest.warns(UserWarning, match="12 becomes 10"):
        assert PruneSpec(0, 12).numbers(20) == (10, 10)


@pytest.mark.parametrize(("name", "vhf"), [("token", None), ("distilled", (0.05, 1.0)), ("mean", None)])
def test_one_layer_against_plain_loops(name, vhf):
    (attention, x), prefix = seen(1, name), case(name)[0].config.prefix
    found = after_block(PruneSpec(1, 4, keep=9, iters=3, vhf=vhf), name)
    assert found.x.shape[1] == prefix + 9
    for i in range(2):
        keys = attention.key[i].reshape(x.shape[1], -1)
        kept = layer(attention.weights[i], keys, 4, 9, 3, prefix, vhf=vhf)
        assert found.index[i].tolist() == kept
        np.testing.assert_array_equal(found.x[i], x[i, np.array(kept)])


@pytest.mark.parametrize(
    "name", ["token", *(pytest.param(name, marks=pytest.mark.slow) for name in ("distilled", "mean"))]
)
def test_hidden_tokens_change_nothing(name):
    short, passed = run(SCHEDULE, name)
    hidden, marked = run(dataclasses.replace(SCHEDULE, masked=True), name)
    close(hidden, short)
    prefix = case(name)[0].config.prefix
    assert [i.shape[1] - prefix for i in passed.index] == [20, 14, 9, 9]
    for one, index, alive in zip(range(4), passed.index, marked.alive, strict=True):
        if one:
            assert [np.flatnonzero(a).tolist() for a in alive] == index.tolist()
        assert index[:, :prefix].tolist() == [list(range(prefix))] * 2  # special tokens stay
        assert (np.diff(index, axis=1) > 0).all()  # and the others in their order


def test_removing_nothing_changes_nothing():
    nothing = ZeroTPrune((PruneSpec(0, keep=20), PruneSpec(1, rate=1.0)))
    same_numbers(run(nothing)[0], run(TokenReducer())[0], terms=3 * 100)


def test_similarity_alone_and_importance_alone():
    similar, important = (after_block(s).index for s in (PruneSpec(0, 6), PruneSpec(0, keep=14)))
    both = after_block(PruneSpec(0, 3, keep=14)).index
    assert similar.shape == important.shape == both.shape == (2, 15)
    assert len({str(i.tolist()) for i in (similar, important, both)}) == 3


def test_images_do_not_see_each_other():
    x = case()[2]
    logits, passed = run(SCHEDULE)
    beside, others = run(SCHEDULE, x=x.at[0].set(x[0, ::-1]))
    assert beside[1].tolist() == logits[1].tolist() and beside[0].tolist() != logits[0].tolist()
    assert others.index[-1][1].tolist() == passed.index[-1][1].tolist()


def test_an_image_keeps_what_is_above_a_threshold():
    specs = (PruneSpec(0, 2, keep=16, threshold=1.02), PruneSpec(1, 5, keep=9, iters=8, threshold=1.0))
    logits, passed = run(ZeroTPrune(specs))
    hidden, marked = run(ZeroTPrune(specs, masked=True))
    close(logits, hidden)
    assert [i.shape[1] for i in passed.index] == [21, 17, 10, 10]
    numbers = []  # each image has its own
    for at in (1, 2):
        living = [i[a].tolist() for i, a in zip(passed.index[at], passed.alive[at], strict=True)]
        assert living == [np.flatnonzero(a).tolist() for a in marked.alive[at]]
        numbers.append([len(n) for n in living])
    assert all(1 < n < most for ns, most in zip(numbers, (17, 10)) for n in ns)
    nearly = after_block(PruneSpec(0, keep=16, threshold=1e3))  # no score is so high: the best one stays
    assert nearly.alive.sum(1).tolist() == [2, 2]


def test_a_boosted_start_matters_where_votes_are_few():
    weights = seen(0)[0].weights

    def score(iters, boost):
        return quickly(lambda w: importance(w, PruneSpec(0, iters=iters, boost=boost), 1))(weights)

    assert np.abs(np.subtract(score(1, True), score(1, False))).max() > 0.01
    np.testing.assert_allclose(score(50, True), score(50, False), rtol=1e-5)


@pytest.mark.parametrize("iters", [1, 5])
def test_the_authors_earlier_code_is_a_setting(iters):
    # softmax(logits / 0.5) of queries and keys, all tokens alike at first, root mean square over heads
    found, _ = seen(0)
    q, k = (np.moveaxis(np.asarray(a[0], np.float64), 1, 0) for a in (found.query, found.key))
    e = np.exp(q @ np.moveaxis(k, 1, 2) / q.shape[-1] ** 0.5 / 0.5)
    expected = one_score(votes(e / e.sum(-1, keepdims=True), iters, np.full(21, 1 / 21)))
    spec = dataclasses.replace(preset("proto-S").specs[0], iters=iters)
    score = quickly(lambda w: importance(w, spec, 1))(found.weights)[0]
    np.testing.assert_allclose(score, expected, rtol=1e-3)


@pytest.mark.parametrize("partition", ["random", "full"])
def test_other_partitions(partition):
    spec = PruneSpec(0, 5, partition=partition, feature="x", metric="l2")
    one, two = (after_block(spec, key=jax.random.key(k)).index for k in range(2))
    assert one.shape == (2, 16)
    assert (one.tolist() == two.tolist()) == (partition == "full")
    if partition == "random":
        with pytest.raises(ValueError, match="needs a key"):
            after_block(spec)


def test_presets():
    assert preset("table-3.08").specs[0] == PruneSpec(0, 10, rate=1.0, iters=30, vhf=PAPER_VARIANCES)
    proto = preset("proto-S").specs[1]
    assert (proto.layer, proto.rate, proto.iters, proto.boost, proto.temperature, proto.remove) == (
        5,
        0.8,
        1,
        False,
        0.5,
        0,
    )
    assert len(PRESETS) == 9
    with pytest.raises(ValueError, match="no preset is named 'a': there are proto-T"):
        preset("a")


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ((PruneSpec(3), PruneSpec(1)), r"\[3, 1\]"),
        ((PruneSpec(-1),), r"\[-1\]"),
        ((PruneSpec(1, rate=0.0),), "rate after block 1 is 0.0"),
        ((PruneSpec(1, keep=0),), "0 patches cannot be kept"),
        ((PruneSpec(1, remove=-1),), "-1 tokens cannot be removed"),
        ((PruneSpec(1, iters=0),), "0 votes"),
        ((PruneSpec(1, partition="half"),), "partition 'half'"),
        ((PruneSpec(1, feature="k"),), "feature 'k'"),
        ((PruneSpec(1, metric="cos"),), "not 'cos'"),
    ],
)
def test_errors(specs, match):
    with pytest.raises(ValueError, match=match):
        ZeroTPrune(specs)
