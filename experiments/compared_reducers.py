"""The token reducers that are compared at equal numbers of tokens, before the first block and between blocks; their costs."""

from __future__ import annotations

from typing import Any

from experiments.digit_canvas import sizes
from experiments.digit_reader import Setting, WrongWay
from jprune.methods.tokens.before_first_block import AtEntry
from jprune.methods.tokens.cost import count_macs
from jprune.methods.tokens.reducers_by_name import reducer_for
from jprune.methods.tokens.schedules import ats_for, tome_for, topk_for
from jprune.methods.tokens.topk import TopK
from jprune.methods.tokens.zero_tprune import PAPER_VARIANCES, PruneSpec, ZeroTPrune
from jprune.models.token_hook import TokenReducer

SHARE = 0.4  # of what a layer drops, by similarity


def at_entry(k: int) -> dict[str, tuple[TokenReducer, bool]]:
    """{name: (reducer, whether it needs a first pass)} that keep k embedded tokens."""

    def votes(iters: int, **more: Any) -> TokenReducer:
        return ZeroTPrune((PruneSpec(0, keep=k, iters=iters, **more),))

    return {
        "PageRank, 5 votes": (votes(5), True),
        "PageRank, 1 vote": (votes(1), True),
        "class token's attention": (TopK("cls", ((0, k),), inside_block=False), True),
        "wrong transpose": (WrongWay(k), True),
        "random": (AtEntry("random", k), False),
        "grid": (AtEntry("grid", k), False),
        "norm": (AtEntry("norm", k), False),
        "DivPrune": (AtEntry("divprune", k), False),
    }


def by_stages(keeps: tuple[int, ...], share: float = 0.0, **more: Any) -> ZeroTPrune:
    """So many patches left after the first blocks, a share of what goes by similarity."""
    specs, n = [], sizes().patches
    for layer, keep in enumerate(keeps):
        remove = min(int(share * (n - keep)), n // 2)
        specs.append(PruneSpec(layer, remove, keep=keep, **more))
        n = keep
    return ZeroTPrune(tuple(specs))


def in_network(keeps: tuple[int, ...]) -> dict[str, TokenReducer]:
    """Reducers of equal MACs: the same numbers of tokens, or as many as the same budget allows."""
    drops = tuple(enumerate(keeps))
    fraction = count_macs(by_stages(keeps), sizes())["fraction"]
    return {
        "Zero-TPrune": by_stages(keeps, SHARE),
        "Zero-TPrune, uniform start": by_stages(keeps, SHARE, boost=False),
        "Zero-TPrune, heads filtered": by_stages(keeps, SHARE, vhf=PAPER_VARIANCES),
        "Zero-TPrune, prune important": by_stages(keeps, SHARE, partition="seq_i"),
        "Zero-TPrune, alternate": by_stages(keeps, SHARE, partition="alternate"),
        "Zero-TPrune, random halves": by_stages(keeps, SHARE, partition="random"),
        "Zero-TPrune, no halves": by_stages(keeps, SHARE, partition="full"),
        "importance, 1 vote": by_stages(keeps, iters=1),
        "importance, 5 votes": by_stages(keeps),
        "importance, 30 votes": by_stages(keeps, iters=30),
        "class token's attention": TopK("cls", drops, inside_block=False),
        "column mean": TopK("column", drops, inside_block=False),
        "random": TopK("random", drops, inside_block=False),
        "EViT, own blocks": topk_for(fraction, sizes(), "cls", fused=True),
        "ATS": ats_for(fraction, sizes()),
        "ToMe": tome_for(fraction, sizes()),
    }


def costs(s: Setting) -> dict[str, Any]:
    """{"network", "curves"}: shares of MACs, those of choosing tokens apart."""
    whole = count_macs(TokenReducer(), sizes())["blocks"]

    def of(reducer: TokenReducer) -> dict[str, float]:
        found = count_macs(reducer, sizes())
        return {"fraction": found["fraction"], "choosing": found["overhead"] / whole}

    networks = {"-".join(map(str, c)): {n: of(r) for n, r in in_network(c).items()} for c in s.schedules}
    return {
        "network": networks,
        "curves": {n: {f"{f:g}": of(reducer_for(n, f, sizes())) for f in s.fractions} for n in s.methods},
    }
