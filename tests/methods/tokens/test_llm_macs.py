"""Costs of a prefill: the paper's tables to the last digit, and a model's own products."""

import statistics

import pytest

from jprune.methods.tokens.decoder_cost import (
    ANYRES_TOKENS,
    TEXT_TOKENS,
    VIDEO_TEXT_TOKENS,
    kept_within,
    last_layer_within,
    paper_tmacs,
    true_macs,
)
from jprune.models.llama_config import LlamaConfig, llama_config

SEVEN, THIRTEEN = llama_config(32064, 4096, 11008, 32, 32), llama_config(32064, 5120, 13824, 40, 40)


def mean(config, visual=576, texts=TEXT_TOKENS, **how):
    return statistics.fmean(
        paper_tmacs(config, t, visual if isinstance(visual, int) else visual[name], **how) for name, t in texts.items()
    )


def test_the_papers_table():
    for config, visual, texts, ratio, full, pruned, share in (
        (SEVEN, 576, TEXT_TOKENS, 0.098, 3.2280, 0.5122, 15.6303),
        (THIRTEEN, 576, TEXT_TOKENS, 0.098, 6.2813, 1.0020, 15.7132),
        (SEVEN, ANYRES_TOKENS, TEXT_TOKENS, 0.098, 11.8489, 1.2659, 10.7966),
        (SEVEN, 1152, VIDEO_TEXT_TOKENS, 0.1, 6.5386, 0.9371, 14.1044),
    ):
        before, after = (mean(config, visual, texts, keep=r) for r in (1.0, ratio))
        assert (round(before, 4), round(after, 4)) == (full, pruned)
        tokens = [(t, visual if isinstance(visual, int) else visual[name]) for name, t in texts.items()]
        each = [paper_tmacs(config, t, v, keep=ratio) / paper_tmacs(config, t, v) for t, v in tokens]
        assert round(100 * statistics.fmean(each), 4) == share  # the mean of the shares, not the share of the means


def test_the_papers_baselines_have_almost_no_visual_tokens_left():
    """The rows of FastV and VTW, from where they drop and what they keep."""
    assert round(mean(SEVEN, layer=4, kept=0), 3) == 0.603
    assert round(mean(SEVEN, layer=3, kept=1), 3) == 0.514


def test_equal_cost():
    text, visual = 23, 576
    budget = paper_tmacs(SEVEN, text, visual, kept=64)
    assert kept_within(SEVEN, text, visual, budget) == 64
    fast = kept_within(SEVEN, text, visual, budget, layer=2)
    assert paper_tmacs(SEVEN, text, visual, layer=2, kept=fast) <= budget
    assert paper_tmacs(SEVEN, text, visual, layer=2, kept=fast + 1) > budget
    assert fast < 64
    last = last_layer_within(SEVEN, text, visual, budget)
    costs = [paper_tmacs(SEVEN, text, visual, layer=n, kept=0) for n in (last, last + 1)]
    assert costs[0] <= budget < costs[1]
    assert kept_within(SEVEN, text, visual, 1e3) == visual
    assert last_layer_within(SEVEN, text, visual, 1e3) == 32
    with pytest.raises(ValueError, match="drop earlier"):
        kept_within(SEVEN, text, visual, budget, layer=20)
    with pytest.raises(ValueError, match="text alone"):
        last_layer_within(SEVEN, text, visual, 1e-3)


def test_macs_of_a_model_with_grouped_heads_and_uneven_layers():
    config = LlamaConfig(11, 8, (3, 5), (4, 2), (2, 1), 6, value_dim=(7, 4))
    n, k, v, t = 9, 4, 6, 3

    def layer(n, heads, kv, value, ffn):
        q, keys, values = n * 8 * heads * 6, n * 8 * kv * 6, n * 8 * kv * value
        scores, mix, out = n * n * heads * 6, n * n * heads * value, n * heads * value * 8
        return q + keys + values + scores + mix + out + 3 * n * 8 * ffn

    head = 8 * 11
    both = layer(n, 4, 2, 7, 3) + layer(n, 2, 1, 4, 5)
    assert true_macs(config, t, v) == both + head
    assert true_macs(config, t, v, 1, layer=1) == layer(n, 4, 2, 7, 3) + layer(k, 2, 1, 4, 5) + head
    assert true_macs(config, t, v, 0, layer=2, logits=n) == both + n * head
    with pytest.raises(ValueError, match="one width"):
        paper_tmacs(config, t, v)


def test_the_rule_is_the_count_less_a_third_matrix():
    n = 600
    missing = 32 * n * 4096 * 11008
    attention_and_rest = true_macs(SEVEN, 24, 576, logits=0) - missing
    assert attention_and_rest == round(paper_tmacs(SEVEN, 24, 576) * 1e12)


def test_errors():
    for call, said in (
        (lambda: paper_tmacs(SEVEN, 1, 2, keep=1.5), "between 0 and 1"),
        (lambda: paper_tmacs(SEVEN, 1, 2, layer=33), "32 of them"),
        (lambda: true_macs(SEVEN, 1, 2, kept=3), "there are 2 visual"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
