"""MACs by the published rule, token counts out of shapes, and settings of every method that meet a budget."""

import numpy as np
import pytest
from small_vit import case, dims, run

from jprune.methods.tokens.cost import (
    Counts,
    Dims,
    block_macs,
    count_macs,
    counts,
    deit,
    dims_of,
    overhead,
    preset_table,
    uniform_dims,
)
from jprune.methods.tokens.reducers_by_name import METHODS, reducer_for
from jprune.methods.tokens.schedules import entry_for, fitted, schedule_for, share, tome_for, topk_for
from jprune.methods.tokens.tome import ToMe
from jprune.methods.tokens.zero_tprune import PRESETS, PruneSpec, ZeroTPrune
from jprune.models import vit
from jprune.models.token_hook import TokenReducer

TOKENS = {
    "proto-S": [197] * 3 + [177] * 3 + [141] * 3 + [99] * 3,
    "proto-T6": [197] * 3 + [157] * 3 + [125] * 3 + [87, 61, 43],
    "table-3.08": [197] + [187] * 2 + [159] * 3 + [119] * 3 + [76] * 3,
    "a-like": [197] + [189] * 2 + [150] * 3 + [110] * 3 + [74] * 3,
    "b-like": [197] + [181] * 2 + [133] * 3 + [83] * 3 + [41] * 3,
    "c-like": [197] + [192] * 2 + [185] * 3 + [169] * 3 + [146] * 3,
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_presets(name):
    size, reducer = PRESETS[name]
    found, last = counts(reducer, deit(size))
    assert [n.attention for n in found] == TOKENS[name] == [n.mlp for n in found]
    assert last == (30 if name == "proto-T6" else TOKENS[name][-1])


def test_published_numbers():
    whole = count_macs(TokenReducer(), deit("small"))
    assert whole == {"blocks": 4_549_773_312, "total": 4_608_338_304, "overhead": 0, "fraction": 1.0}
    totals = {"proto-S": 3_554_802_816, "proto-T": 962_559_552, "proto-B": 13_628_340_480, "proto-T6": 848_572_032}
    for name, total in totals.items():
        size, reducer = PRESETS[name]
        assert count_macs(reducer, deit(size))["total"] == total
    rounded = {
        "table-3.08": (3.084, 3.142),
        "a-like": (2.974, 3.032),
        "b-like": (2.499, 2.557),
        "c-like": (3.970, 4.029),
    }
    for name, (blocks, total) in rounded.items():
        found = count_macs(PRESETS[name][1], deit("small"))
        assert (round(found["blocks"] / 1e9, 3), round(found["total"] / 1e9, 3)) == (blocks, total)
    assert preset_table().row_count == len(PRESETS)


def test_one_block_by_hand():
    d, n = 8, 5
    block = uniform_dims(d, 1, 2, 4).blocks[0]
    assert block_macs(block, d, Counts(n, n)) == 12 * n * d * d + 2 * n * n * d + 10 * n * d
    half = block_macs(block, d, Counts(n, 3))
    assert half == 4 * n * d * d + 2 * n * n * d + 5 * n * d + 3 * (8 * d * d + 5 * d)
    pruned = vit.ViTBlock(3, 2, 4, 7)
    assert (
        block_macs(pruned, d, Counts(n, n))
        == n * d * (3 * 2 * 2 + 3 * 4 * 2) + n * n * (6 + 12) + 2 * n * d * 7 + 10 * n * d
    )


def test_the_choice_costs_too():
    reducer = ZeroTPrune((PruneSpec(0, 4, keep=10, iters=30), PruneSpec(1, keep=6, iters=1)))
    first = 3 * 21**2 + 10 * 10 * 12 + 30 * 3 * 17**2
    assert overhead(reducer, dims()) == first + 3 * 11**2
    assert overhead(ToMe((2, 0, 1)), dims()) == 10 * 11 * 4 + 9 * 10 * 4


@pytest.mark.parametrize("name", ["token", "deit"])
def test_sizes_of_a_model(name):
    config = case(name)[0].config
    assert dims(name) == Dims(12, config.blocks, 20, config.prefix, 48, 5)
    assert dims_of(vit.vit_base().config, (224, 224, 3)) == deit("base")


@pytest.mark.parametrize("name", [*METHODS])
def test_every_method_meets_its_budget(name):
    for of, fraction in ((deit("small"), 0.4), (uniform_dims(32, 6, 4, 64), 0.8)):
        found = count_macs(reducer_for(name, fraction, of), of)["fraction"]
        step = 0.02 if name.endswith("entry") or name == "divprune" else 0.01  # one patch in all blocks is as much
        assert abs(found / fraction - 1) <= step
    whole = uniform_dims(32, 3, 4, 64)
    assert [n.attention for n in counts(reducer_for(name, 1.0, whole), whole)[0]] == [65, 65, 65]


@pytest.mark.parametrize("name", ["zero_tprune", "ats", pytest.param("evit", marks=pytest.mark.slow)])
def test_a_model_has_the_tokens_that_were_counted(name):
    reducer = reducer_for(name, 0.7, dims())
    found, last = counts(reducer, dims())
    passed = run(reducer)[1]
    assert [(i.shape[1], m.shape[1]) for i, m in zip(passed.index, passed.mlp)] == list(found)
    assert passed.index[-1].shape[1] == last


def test_schedules_come_from_the_presets():
    of = deit("small")
    for name, fraction in (("a-like", 0.6536), ("b-like", 0.5493), ("c-like", 0.8727)):
        found = [n.attention for n in counts(schedule_for(fraction, of), of)[0]]
        assert np.abs(np.array(found) - TOKENS[name]).max() <= 2
    half = schedule_for(0.5, of)
    assert [s.layer for s in half.specs] == [0, 2, 5, 8] and [s.iters for s in half.specs] == [30, 5, 5, 1]
    assert all(s.remove > 0 for s in half.specs) and half.specs[0].boost
    assert reducer_for("zero_tprune", 0.5, of).specs[0].vhf == (0.01, 0.7)
    assert reducer_for("zero_tprune", 0.5, uniform_dims(32, 6, 4, 64)).specs[0].vhf is None
    uniform = reducer_for("zero_tprune_uni", 0.5, of)
    assert not any(s.boost for s in uniform.specs)
    assert not schedule_for(0.5, uniform_dims(32, 6, 4, 64, prefix=0)).specs[0].boost


def test_budgets_that_cannot_be_met():
    of = deit("tiny")
    for fraction in (0.0, 1.5, -1.0):
        for name in METHODS:
            with pytest.raises(ValueError, match="share of MACs"):
                reducer_for(name, fraction, of)
    with pytest.raises(ValueError, match=r"cannot be reached: dropping in blocks 0, 2, 5, 8 leaves at least 0\.0"):
        schedule_for(0.02, of)
    small = uniform_dims(8, 2, 2, 4)
    kept, _ = fitted(small, 0.8, (0,), lambda s: [max(1, int(4 * (1 - s)))], False)
    assert kept == [2]  # three patches would be over it
    assert share(small, (0,), [2], False) <= 0.8 < share(small, (0,), [3], False)
    with pytest.raises(ValueError, match="1 block"):
        schedule_for(0.5, uniform_dims(8, 1, 2, 4))
    with pytest.raises(ValueError, match="named 'magic': there are zero_tprune"):
        reducer_for("magic", 0.5, of)
    for name in ("ats", "evit", "cls_topk"):
        with pytest.raises(ValueError, match="class token, and this model has none: use zero_tprune, tome"):
            reducer_for(name, 0.7, uniform_dims(192, 12, 3, 196, prefix=0))
    with pytest.raises(ValueError, match="'tiny', 'small' or 'base'"):
        deit("large")


def test_knobs():
    of = deit("tiny")
    merged = tome_for(0.65, of).r
    assert max(merged) - min(merged) <= 1 or max(merged[:-1]) - min(merged[:-1]) <= 1
    assert [i for i, _ in topk_for(0.65, of, "cls").keeps] == [3, 6, 9]
    assert topk_for(0.25, of, "cls").keeps[0][0] == 0  # the fourth block is too late
    assert entry_for(1.0, of) == 196 and 90 < entry_for(0.5, of) < 110
